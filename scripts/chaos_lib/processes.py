"""The real processes: a `mongod` on a port of its own that keeps it, and `python -m chatserver`."""

import asyncio
import random
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from chatserver.mongod import find_mongod
from chatserver.store import initiate_replica_set
from tests.servers import Server


def steady_port() -> int:
    """Return a free port below those that outgoing connections get, so that it is free again after a crash, too."""
    while True:
        port = random.randrange(15_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Mongod:
    """A replica set of one, always at the same address, to be killed and frozen."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.host = f"127.0.0.1:{steady_port()}"
        self.uri = f"mongodb://{self.host}/chaos?directConnection=true"
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start it, and return when it is primary."""
        self._folder.mkdir(exist_ok=True)
        host, port = self.host.split(":")
        command = [find_mongod(), "--dbpath", str(self._folder), "--bind_ip", host, "--port", port, "--replSet", "rs0"]
        command += ["--oplogSize", "64", "--wiredTigerCacheSizeGB", "0.5", "--nounixsocket"]
        command += ["--logpath", str(self._folder / "mongod.log"), "--logappend"]
        for _ in range(5):
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            if await self._listens():
                await initiate_replica_set(self.uri, self.host)
                return
        log = (self._folder / "mongod.log").read_text().splitlines()
        raise RuntimeError("mongod does not start again:\n" + "\n".join(log[-20:]))

    async def _listens(self) -> bool:
        """Wait until it accepts connections; return False if it ends instead."""
        assert self._process is not None
        host, port = self.host.split(":")
        while self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex((host, int(port))) == 0:
                    return True
            await asyncio.sleep(0.05)
        return False

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def remove(self) -> None:
        """End it and delete its data."""
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


class ChatServer:
    """`python -m chatserver`, always at the same port, to be killed, paused and restarted."""

    def __init__(self, folder: Path, variables: dict[str, object], command: list[str] | None) -> None:
        folder.mkdir(exist_ok=True)
        self._server = Server(folder, {**variables, "PORT": steady_port()}, command)

    @property
    def port(self) -> int:
        return self._server.port

    @property
    def output(self) -> str:
        return self._server.output

    async def start(self) -> None:
        """Start it; return when it listens. It waits for its database a few times, as a supervisor would."""
        for attempt in range(20):
            try:
                await asyncio.to_thread(self._server.start)
                return
            except AssertionError:
                if attempt == 19:
                    raise
                await asyncio.sleep(0.3)

    def kill(self) -> None:
        self._server.kill()

    def pause(self) -> None:
        self._server.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._server.signal(signal.SIGCONT)

    async def stop(self) -> None:
        """End it in order; its exit code must be 0."""
        code = await asyncio.to_thread(self._server.stop)
        if code != 0:
            raise RuntimeError(f"the server ended with {code}: {self.output[-2000:]}")
