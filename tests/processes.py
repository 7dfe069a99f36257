"""Processes that the tests, chaos and bench start: chatserver as operators run it, and MongoDB."""

import asyncio
import ctypes
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Self
from urllib.parse import quote

from chatserver.mongod import find_mongod
from chatserver.store import initiate_replica_set

ROOT = Path(__file__).parent.parent
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class StartError(Exception):
    """A process ended, or timed out, before it accepted connections; the text holds its output."""


class Server:
    """`python -m chatserver` (or another HTTP server) in a folder, without the settings of the caller's environment.

    :param folder: its working directory, which holds `.env` and `.data`; created if missing
    :param variables: its environment variables; None removes a default
    :param command: what to run instead; it must print its address to standard output when it listens
    :param core: the CPU core to bind it to; None: any
    """

    def __init__(
        self,
        folder: Path,
        variables: Mapping[str, object],
        command: Sequence[str | Path] = (sys.executable, "-m", "chatserver"),
        *,
        core: int | None = None,
    ) -> None:
        self.folder = folder
        self.variables = {"PORT": 0, "PYTHONPATH": ROOT, "SIMULATED_TOKEN_DELAY_MS": 5, **variables}
        self.command = command
        self.port = 0
        """0 before the first start; later starts listen on the same port."""
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self.process: subprocess.Popen[str] | None = None
        self._core = core
        self._listening = threading.Event()
        self._readers: list[threading.Thread] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *raised: object) -> None:
        self.kill()

    def spawn(self, *options: str) -> Self:
        """Start the process without waiting for it to listen."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        given = {name: str(value) for name, value in self.variables.items() if value is not None}
        if self.port:
            given["PORT"] = str(self.port)
        core = self._core
        self.folder.mkdir(exist_ok=True)
        self.stdout, self.stderr, self._listening = [], [], threading.Event()
        self.process = subprocess.Popen(
            [*self.command, *options],
            cwd=self.folder,
            env={**kept, **given},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
        )
        # Each reader keeps the event of its own process: a late one must not announce the next process.
        self._readers = [
            threading.Thread(target=self._read, args=(pipe, lines, self._listening), daemon=True)
            for pipe, lines in ((self.process.stdout, self.stdout), (self.process.stderr, self.stderr))
        ]
        for reader in self._readers:
            reader.start()
        return self

    def start(self, *options: str) -> Self:
        """Start the process and wait until it listens.

        :raises StartError: if it does not
        """
        self.spawn(*options)
        self.wait_until_listening()
        return self

    def wait_until_listening(self, seconds: float = 30.0) -> None:
        """Wait until the process has printed its address.

        :raises StartError: if it ends first, or takes longer
        """
        if not (self._listening.wait(seconds) and self.is_running):
            raise StartError(f"{' '.join(map(str, self.command))} does not start:\n{self.output}")

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def output(self) -> str:
        """The whole output of the process: its standard output, then its standard error."""
        return "".join([*self.stdout, *self.stderr])

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, seconds: float = 30.0) -> int:
        """Wait until the process has ended and its output is read; return its exit code."""
        assert self.process is not None
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(5)
        return code

    def stop(self) -> int:
        """Shut the process down with SIGTERM; return its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """Kill the process if it runs."""
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
        # At the end of the output, wake a caller that waits for an address: none will come.
        listening.set()


class MongoServer:
    """A MongoDB server that keeps its address and its data over restarts, so that it can be killed and frozen.

    The product's own `Mongod` listens on a socket that only its own process uses, and removes it when it ends.

    :param folder: holds the data and the log; created if missing
    :param replica_set: whether the server is the only member of a replica set `rs0`
    :param port: listen on this port of 127.0.0.1; None: on a UNIX socket
    :param options: more options of the command line
    """

    def __init__(
        self, folder: Path, *, replica_set: bool = True, port: int | None = None, options: Sequence[str] = ()
    ) -> None:
        self._folder = folder
        self._replica_set = replica_set
        self._options = options
        self._port = port
        # Not in the folder, since the path of a UNIX socket may have 107 bytes only.
        self._socket_folder = None if port else Path(tempfile.mkdtemp(prefix="chatserver-test-", dir="/tmp"))
        self.host = f"127.0.0.1:{port}" if port else f"{self._socket_folder}/mongodb.sock"
        self.uri = f"mongodb://{quote(self.host, safe=':')}/?directConnection=true"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def database_uri(self, name: str) -> str:
        """Return the URI of one of its databases."""
        return self.uri.replace("/?", f"/{name}?")

    async def start(self) -> None:
        """Start the server, and return when it accepts connections and the replica set is initiated.

        :raises StartError: if it ends five times instead
        """
        self._folder.mkdir(exist_ok=True)
        # After a kill, the port may stay in use briefly.
        for _ in range(5):
            self._process = self._spawn()
            if await self._listens():
                if self._replica_set:
                    await initiate_replica_set(self.uri, self.host)
                return
        raise StartError("mongod does not start:\n" + "\n".join(self._log.read_text().splitlines()[-20:]))

    @property
    def _log(self) -> Path:
        return self._folder / "mongod.log"

    def _spawn(self) -> "subprocess.Popen[bytes]":
        address = ["--bind_ip", self.host] if self._port is None else ["--bind_ip", "127.0.0.1"]
        command = [find_mongod(), "--dbpath", str(self._folder), *address, "--nounixsocket"]
        command += ["--port", str(self._port)] if self._port else []
        command += ["--replSet", "rs0", "--oplogSize", "64"] if self._replica_set else []
        command += ["--logpath", str(self._log), "--logappend", "--quiet", "--wiredTigerCacheSizeGB", "0.5"]
        command += ["--setParameter", "diagnosticDataCollectionEnabled=false", *self._options]
        # In a session of its own, Ctrl-C does not end it before the servers that write to it.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_die_with_parent if _libc else None,
        )

    async def _listens(self) -> bool:
        """Wait until the server accepts connections; return False if it ends instead."""
        assert self._process is not None
        while self._process.poll() is None:
            with socket.socket(socket.AF_INET if self._port else socket.AF_UNIX) as probe:
                if probe.connect_ex(("127.0.0.1", self._port) if self._port else self.host) == 0:
                    return True
            await asyncio.sleep(0.02)
        return False

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill the server; its journal keeps the acknowledged writes."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def remove(self) -> None:
        """Kill the server and delete its data."""
        self.kill()
        for folder in (self._folder, self._socket_folder):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _die_with_parent() -> None:
    """Have the kernel kill the server when the thread that started it ends (prctl PR_SET_PDEATHSIG, Linux)."""
    assert _libc is not None
    _libc.prctl(1, signal.SIGKILL)


def steady_port() -> int:
    """Return a free port below the ephemeral range, so that no outgoing connection takes it during a restart."""
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Poll until a condition of another process holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
