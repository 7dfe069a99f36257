"""A private MongoDB server for `python -m chatserver` without `MONGODB_URI`: a process, its folder and its lock.

The folder is locked for as long as a chatserver lives, so that a `mongod` found running on it can only be one that a
killed chatserver left behind. The server listens on a port of its own on the loopback interface.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from chatserver.errors import SetupError

_STOP_S = 20.0
_START_S = 30.0
_NOWHERE = """There is no MongoDB server to be had: no `mongod` on the PATH, and no package with one for this machine.
Start one, and say where it is:

    docker run -d --name chat-mongo -p 127.0.0.1:27017:27017 mongo:7
    MONGODB_URI=mongodb://127.0.0.1:27017/chat-db scripts/run"""


def find_mongod() -> str:
    """Return the path of a `mongod`: the one of the installed package, else the one on the PATH.

    :raises SetupError: with a way out, if there is none
    """
    package = find_spec("fiftyone")
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder, "db", "bin", "mongod")
        if path.is_file():
            return str(path)
    if (found := shutil.which("mongod")) is not None:
        return found
    raise SetupError(_NOWHERE)


class Mongod:
    """A MongoDB server that lives as long as we do, with its data in a folder.

    :param data_dir: made if need be
    :param replica_set: whether it is to be a member of the replica set `rs0`; see `store.initiate_replica_set`
    """

    def __init__(self, data_dir: Path, *, replica_set: bool = True) -> None:
        self._folder = data_dir.absolute()
        self._replica_set = replica_set
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.host = ""
        """Its address, as `host:port`, once it is started."""

    async def start(self) -> str:
        """Start the server, ending one that a killed chatserver left on this folder; return its URI.

        :raises SetupError: if the folder is in use, or there is no server, or it does not start
        """
        binary = find_mongod()
        self._take_folder()
        try:
            await self._end_stale()
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            self.host = f"127.0.0.1:{port}"
            self._process = self._spawn(binary, port)
            await self._wait_until_listening(port)
        except BaseException:
            self.kill()
            self._release_folder()
            raise
        return f"mongodb://{self.host}/?directConnection=true"

    async def stop(self) -> None:
        """End the server in order, by force after 20 seconds; then let go of the folder."""
        if self._process is not None:
            self._process.terminate()
            if not await _within(_STOP_S, lambda: self._exited):
                self.kill()
        self._release_folder()

    def kill(self) -> None:
        """End the server at once; its journal keeps what was acknowledged."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def _exited(self) -> bool:
        return self._process is None or self._process.poll() is not None

    # -- the folder ----------------------------------------------------------------------------------------------

    def _take_folder(self) -> None:
        try:
            (self._folder / "db").mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / "lock").open("a+")
        except OSError as error:
            raise SetupError(f"CHAT_DATA_DIR {self._folder} cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._release_folder()
            raise SetupError(
                f"CHAT_DATA_DIR {self._folder} is in use by another chatserver; stop it, or choose another folder"
            ) from None

    def _release_folder(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    async def _end_stale(self) -> None:
        """End the server that the folder's own lock file names, if it still runs on this folder."""
        try:
            pid = int((self._folder / "db" / "mongod.lock").read_text().strip() or 0)
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return
        if str(self._folder / "db").encode() not in command:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            if await _within(_STOP_S, lambda: _ended(pid)):
                return

    # -- the process ---------------------------------------------------------------------------------------------

    def _spawn(self, binary: str, port: int) -> "subprocess.Popen[bytes]":
        command = [binary, "--dbpath", str(self._folder / "db"), "--bind_ip", "127.0.0.1", "--port", str(port)]
        command += ["--logpath", str(self._folder / "mongod.log"), "--wiredTigerCacheSizeGB", "0.25", "--quiet"]
        command += ["--nounixsocket", "--setParameter", "diagnosticDataCollectionEnabled=false"]
        if self._replica_set:
            command += ["--replSet", "rs0", "--oplogSize", "64"]
        try:
            # A session of its own: Ctrl-C in the terminal ends us, and we end it after the last write.
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        except OSError as error:
            raise SetupError(f"{binary} cannot be run: {error.strerror}") from None

    async def _wait_until_listening(self, port: int) -> None:
        def listening() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        if not await _within(_START_S, lambda: self._exited or listening()) or self._exited:
            log = self._folder / "mongod.log"
            last = "\n".join(log.read_text(errors="replace").splitlines()[-5:]) if log.is_file() else ""
            raise SetupError(f"The private MongoDB server does not start; the end of {log}:\n{last}")


def _die_with_parent() -> None:
    """Have the kernel end the server in order if we are killed (prctl PR_SET_PDEATHSIG, Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


async def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Wait until a condition holds; return whether it came to hold within so many seconds."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True
