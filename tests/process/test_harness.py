"""The test run itself: it names the tests that it skips, and its lanes leave none out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT

TESTS = """
import pytest

pytestmark = pytest.mark.fast

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


@pytest.mark.parametrize("workers", ["0", "2"])
def test_skips_are_named_and_fail_the_run_with_any_number_of_workers(tmp_path: Path, workers: str) -> None:
    done = run(tmp_path, "--require-all", "--up-to=fast", "-n", workers)
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("NOT RUN: ") and "test_that_needs_tools" in last and "test_that_is_skipped" in last


LANES = """
import pytest

@pytest.fixture
def make_server() -> None:
    pass

def test_that_is_pure() -> None:
    pass

def test_of_a_server(make_server: None) -> None:
    pass

@pytest.mark.needs("node")
def test_with_a_tool() -> None:
    pass

@pytest.mark.process
def test_that_is_slow() -> None:
    pass

@pytest.mark.soak
def test_that_is_long(make_server: None) -> None:
    pass

@pytest.mark.fast
def test_that_is_fast_all_the_same(make_server: None) -> None:
    pass
"""


@pytest.mark.parametrize(
    ("lane", "left_out"),
    [
        ("fast", {"of_a_server", "with_a_tool", "that_is_slow", "that_is_long"}),
        ("process", {"that_is_long"}),
        ("soak", set()),
    ],
)
def test_lane_includes_the_lanes_before_it(tmp_path: Path, lane: str, left_out: set[str]) -> None:
    (tmp_path / "test_lanes.py").write_text(LANES)
    done = run(tmp_path, f"--up-to={lane}", "--collect-only", "-k", "test_lanes")
    everything = set(re.findall(r"def test_(\w+)", LANES))
    assert {name for name in everything if f"::test_{name}\n" in done.stdout} == everything - left_out, done.stdout


COUNT = """
import sys

import pytest

from tests import conftest


class Counter:
    def pytest_collection_finish(self, session):
        names = [{item.nodeid for item in conftest.select(session.items, lane)} for lane in conftest.LANES]
        fast, process, soak = names
        assert set() < fast < process < soak == {item.nodeid for item in session.items}


sys.exit(pytest.main(["--collect-only", "-qq"], plugins=[Counter()]))
"""


def test_lanes_leave_no_test_out() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


ALONE = """
import time
from pathlib import Path

import pytest

LOG = Path(__file__).parent / "log"

@pytest.mark.parametrize("number", range(5))
{mark}
def test_that_is_written_down(number: int) -> None:
    with LOG.open("a") as log:
        log.write("{name}")
        log.flush()
        time.sleep(0.05)
        log.write("{name}")
"""


def test_test_that_is_alone_has_no_neighbours(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(ALONE.format(name="a", mark="@pytest.mark.alone"))
    (tmp_path / "test_b.py").write_text(ALONE.format(name="b", mark=""))
    done = run(tmp_path, "-n", "2", "--dist", "loadfile", "-k", "written_down")
    assert done.returncode == 0 and "10 passed" in done.stdout, done.stdout
    written = (tmp_path / "log").read_text()
    assert re.fullmatch("(aa|bb)+", written) and written.count("a") == written.count("b") == 10
