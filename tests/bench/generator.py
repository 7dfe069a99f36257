"""The load generator, `load.c`, as functions: each runs it to its end and returns its results."""

import json
import subprocess
import time
from collections.abc import Callable
from typing import Any

from tests.bench import tools
from tests.processes import Server

Result = dict[str, Any]


class LoadError(Exception):
    """The load generator, or the server under it, failed."""


def _command(mode: str, server: Server, others: tuple[int, ...], options: dict[str, object]) -> list[str]:
    command = [str(tools.load_generator()), mode, "--port", str(server.port)]
    for pid in (server.pid, *others):
        command += ["--pid", str(pid)]
    for name, value in options.items():
        if value is True:
            command.append("--" + name.replace("_", "-"))
        elif value is not False and value is not None:
            command += ["--" + name.replace("_", "-"), str(value)]
    return command


def load(mode: str, server: Server, *others: int, **options: object) -> Result:
    """Run the load generator in one of its modes (see `load.c`) against a server.

    :param others: ids of more processes whose CPU time to measure
    :param options: its options; True is an option without a value, False and None omit one
    :raises LoadError: if it fails, or the server has died
    """
    done = subprocess.run(_command(mode, server, others, options), capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise LoadError(f"{done.stderr.strip()}\n{server.output[-2000:]}")
    result: Result = json.loads(done.stdout)
    return result


def idle(server: Server, *others: int, seconds: float, measure: Callable[[], float], **options: object) -> Result:
    """Open streams, keep them open for `seconds`, then call `measure` before they are closed.

    :return: the generator's results of `opening` and `holding` the streams, and the value `measured`
    :raises LoadError: if it fails
    """
    command = _command("idle", server, others, options)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        opening = process.stdout.readline()
        if opening:
            time.sleep(seconds)
        measured = measure()
        process.stdin.close()
        holding = process.stdout.readline()
    if process.returncode or not holding:
        raise LoadError(f"the load generator ended with {process.returncode}\n{server.output[-2000:]}")
    return {"opening": json.loads(opening), "holding": json.loads(holding), "measured": measured}
