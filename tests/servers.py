"""The server as its users have it: `python -m chatserver`, a process."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent


class Server:
    """`python -m chatserver` in a folder of its own, without any of the settings of whoever runs the tests.

    :param folder: its working directory: `.env` and `.data` are there
    :param variables: of its environment; those that are None are unset
    :param command: what to run instead
    """

    def __init__(self, folder: Path, variables: dict[str, object], command: list[str] | None = None) -> None:
        self.folder = folder
        self.variables = {"PORT": 0, "SIMULATED_TOKEN_DELAY_MS": 5, **variables}
        self.command = command or [sys.executable, "-m", "chatserver"]
        self.port = 0
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self.process: subprocess.Popen[str] | None = None
        self._listening = threading.Event()
        self._readers: list[threading.Thread] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def spawn(self, *options: str) -> "Server":
        """Start the process; return at once."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        given = {name: str(value) for name, value in self.variables.items() if value is not None}
        if self.port:
            given["PORT"] = str(self.port)
        self.stdout, self.stderr, self._listening = [], [], threading.Event()
        self.process = subprocess.Popen(
            [*self.command, *options],
            cwd=self.folder,
            env={**kept, "PYTHONPATH": str(ROOT), **given},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        # Each reader keeps the event of its own process: one that lags must not announce the process after it.
        self._readers = [
            threading.Thread(target=self._read, args=(pipe, lines, self._listening), daemon=True)
            for pipe, lines in ((self.process.stdout, self.stdout), (self.process.stderr, self.stderr))
        ]
        for reader in self._readers:
            reader.start()
        return self

    def start(self, *options: str) -> "Server":
        """Start the process and wait until it listens."""
        self.spawn(*options)
        self.wait_until_listening()
        return self

    def wait_until_listening(self, seconds: float = 30.0) -> None:
        """Wait until it has said its address; fail with what it did say, if it ends before."""
        assert self._listening.wait(seconds) and self.is_running, self.output

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def output(self) -> str:
        """All that it has printed."""
        return "".join([*self.stdout, *self.stderr])

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, seconds: float = 30.0) -> int:
        """Wait for its end and for the last of its output; return its exit code."""
        assert self.process is not None
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(5)
        return code

    def stop(self) -> int:
        """End it in order; return its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """End it at once, if it runs."""
        if self.process is not None and self.is_running:
            self.process.kill()
            self.wait()

    def _read(self, pipe: IO[str] | None, lines: list[str], listening: threading.Event) -> None:
        assert pipe is not None
        with pipe:
            for line in pipe:
                lines.append(line)
                if lines is self.stdout and (match := re.search(r"http://[^ ]*:(\d+)/", line)):
                    self.port = int(match[1])
                    listening.set()
        # Its end: whoever waits for an address waits in vain.
        listening.set()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until a condition of another process holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
