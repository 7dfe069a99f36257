"""Servers that break a promise are caught by the tests."""

import os
import subprocess
import sys

import pytest

from tests.mutants import MUTANTS
from tests.processes import ROOT

pytestmark = pytest.mark.soak


def run(name: str) -> tuple[int, str]:
    """Run the tests of a mutant; return pytest's exit code and its report."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "tests.mutants", name]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_server_as_it_is_passes_the_tests_of_the_mutants() -> None:
    code, report = run("none")

    assert code == pytest.ExitCode.OK, report


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str) -> None:
    code, report = run(name)

    assert code == pytest.ExitCode.TESTS_FAILED, report
    assert "1 failed" in report and "error" not in report.splitlines()[-1], report
