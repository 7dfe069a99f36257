"""scripts/run and scripts/test after an interrupted set-up."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.processes import ROOT, until

PYTHON = """#!/bin/sh
# Stands for Python, pip and the server: quick, and stops where the test interrupts it.
echo "$*" >>calls
stop() { if [ "$STOP" = "$1" ]; then : >stopped; sleep 60; fi; }
case "$*" in
  --version) echo Python 3.12.0 ;;
  "-m venv --clear .venv")
    rm -rf .venv/*
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    stop venv
    : >.venv/pip
    ;;
  "-m pip"*)
    test -e .venv/pip || { echo "No module named pip" >&2; exit 1; }
    test "$2 $3" = "pip install" || exit 0
    test -z "$FAIL" || exit 1
    test -e .venv/half && exit 0 # pip finds it installed
    : >.venv/half
    stop pip
    : >.venv/package
    ;;
  "-m pytest"*) exit "${TESTS:-0}" ;;
  "-m chatserver"*) test -e .venv/package && echo served ;;
esac
"""
NPM = """#!/bin/sh
mkdir -p tests/node/node_modules
test -e tests/node/node_modules/half && exit 0
: >tests/node/node_modules/half
if [ "$STOP" = npm ]; then : >stopped; sleep 60; fi
: >tests/node/node_modules/package
"""


class Scripts:
    """The project's scripts in a folder of their own, with stand-ins for the programs that they run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "tests" / "node").mkdir(parents=True)
        for name in ("requirements.txt", "tests/requirements.txt", "tests/node/package.json"):
            shutil.copy(ROOT / name, folder / name)
        (folder / "bin").mkdir()
        for name, text in (("python3", PYTHON), ("npm", NPM), ("node", "#!/bin/sh\n")):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.processes: list[subprocess.Popen[str]] = []

    def spawn(self, script: str, *options: str, **variables: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [self.folder / "scripts" / script, *options],
            env={"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, script: str = "run", *options: str, **variables: str) -> tuple[int, str]:
        """Return the exit code and the output."""
        process = self.spawn(script, *options, **variables)
        output, _ = process.communicate(timeout=20)
        return process.returncode, output

    def interrupt(self, script: str, stop: str, number: int) -> None:
        """Start a script, wait until it is at a certain step, and send its processes a signal, as a terminal does."""
        process = self.spawn(script, STOP=stop)
        until((self.folder / "stopped").exists)
        os.killpg(process.pid, number)
        process.communicate(timeout=20)
        assert process.returncode != 0
        (self.folder / "stopped").unlink()

    def calls(self, beginning: str) -> int:
        return sum(line.startswith(beginning) for line in (self.folder / "calls").read_text().splitlines())


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    scripts = Scripts(tmp_path)
    yield scripts
    for process in scripts.processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with process:  # closes its pipe
            pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("stop", ["venv", "pip"])
@pytest.mark.parametrize("script", ["run", "test"])
def test_interrupted_script_works_at_the_next_start(scripts: Scripts, script: str, stop: str, number: int) -> None:
    scripts.interrupt(script, stop, number)
    assert scripts.run() == (0, "run: making .venv with Python 3.12.0\nrun: installing requirements.txt\nserved\n")
    # Once it is complete, nothing is done again.
    assert scripts.run() == (0, "served\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_npm_starts_afresh(scripts: Scripts, number: int) -> None:
    scripts.interrupt("test", "npm", number)
    assert scripts.run("test")[0] == 0
    assert (scripts.folder / "tests" / "node" / "node_modules" / "package").exists()


@pytest.mark.parametrize(
    ("options", "passed_on", "last_line"),
    [
        (["--fast"], "--up-to=fast", "test: that was the fast lane; scripts/test adds servers and browsers, "),
        ([], "--up-to=process", "test: that was all but the long programs; scripts/test --all runs them, too"),
        (["--all", "--require-all", "-k", "a b"], "--up-to=soak --require-all -k a b", "test: pytest"),
    ],
)
@pytest.mark.parametrize("code", [0, 1])
def test_option_chooses_the_lane_and_the_last_line_says_how_to_run_the_rest(
    scripts: Scripts, options: list[str], passed_on: str, last_line: str, code: int
) -> None:
    assert scripts.run()[0] == 0
    status, output = scripts.run("test", *options, TESTS=str(code))

    *_, call = (scripts.folder / "calls").read_text().splitlines()
    assert call.startswith("-m pytest ") and call.endswith(f" {passed_on}")
    assert output.splitlines()[-1].startswith(last_line)
    assert status == code


def test_ci_runs_all_lanes_and_allows_no_test_to_be_skipped() -> None:
    *_, last = (ROOT / ".ci" / "run").read_text().splitlines()
    assert last == "exec scripts/test --all --require-all"


def test_installation_that_fails_leaves_what_was_there(scripts: Scripts) -> None:
    """Without a network the tests' packages cannot be installed; the server still starts."""
    assert scripts.run()[0] == 0
    assert scripts.run("test", FAIL="1")[0] == 1
    assert scripts.run() == (0, "served\n") and scripts.calls("-m venv") == 1


def test_environment_without_pip_is_made_again(scripts: Scripts) -> None:
    assert scripts.run()[0] == 0
    (scripts.folder / ".venv" / "pip").unlink()
    (scripts.folder / "requirements.txt").write_text("another\n")
    assert scripts.run()[0] == 0 and scripts.calls("-m venv") == 2


@pytest.mark.skipif(shutil.which("flock") is None, reason="needs flock")
def test_two_scripts_at_once_do_not_disturb_each_other(scripts: Scripts) -> None:
    first = scripts.spawn("run", STOP="pip")
    until((scripts.folder / "stopped").exists)
    second = scripts.spawn("run")
    assert second.stdout is not None and "waiting for another script" in second.stdout.readline()
    assert scripts.calls("-m venv") == 1
    os.killpg(first.pid, signal.SIGKILL)
    assert "served" in second.communicate(timeout=20)[0] and second.returncode == 0


def test_server_does_not_hold_the_lock(scripts: Scripts) -> None:
    serving = scripts.folder / "bin" / "python3"
    serving.write_text(PYTHON.replace("echo served ;;", "{ : >stopped; sleep 60; } ;;"))
    scripts.spawn("run")
    until((scripts.folder / "stopped").exists)
    serving.write_text(PYTHON)
    shutil.copy(serving, scripts.folder / ".venv" / "bin" / "python")
    assert scripts.run() == (0, "served\n")
