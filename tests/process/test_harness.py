"""What the test run says of tests that it did not run, since a skip that nobody sees is a gap."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT

TESTS = """
import pytest

def test_that_needs_nothing() -> None:
    pass

@pytest.mark.needs("node", "nginx")
def test_that_needs_tools() -> None:
    pass

@pytest.mark.skip(reason="some other day")
def test_that_is_skipped() -> None:
    pass
"""


def run(folder: Path, *options: str, path: str = "") -> "subprocess.CompletedProcess[str]":
    (folder / "test_three.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "tests.conftest"]
    return subprocess.run(
        [*command, "-p", "no:cacheprovider", str(folder), *options],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_what_is_not_run_is_named_in_the_last_line(tmp_path: Path) -> None:
    done = run(tmp_path)
    *_, summary, last = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 2 skipped" in summary
    assert last.startswith("NOT RUN: ")
    assert "test_that_needs_tools" in last and "test_that_is_skipped" in last and "nothing" not in last
    assert "needs node, nginx" in done.stdout


@pytest.mark.parametrize("chosen", ["tools", "skipped"])
def test_what_is_not_run_is_a_failure_when_all_is_required(tmp_path: Path, chosen: str) -> None:
    done = run(tmp_path, "--require-all", "-k", chosen)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("NOT RUN: ")


def test_when_all_is_run_no_line_says_otherwise(tmp_path: Path) -> None:
    done = run(tmp_path, "--require-all", "-k", "nothing")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "NOT RUN" not in done.stdout and "1 passed" in done.stdout.splitlines()[-1]
