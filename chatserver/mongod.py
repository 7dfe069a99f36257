"""A private MongoDB server for `python -m chatserver` without `MONGODB_URI`: a process, its folder and its lock.

The folder is locked while its chatserver lives, so that a `mongod` found running on it was left behind by a killed
chatserver. The server requires no password. It therefore listens on no port, but on a Unix socket in a folder that
other users of the machine cannot enter.
"""

import asyncio
import contextlib
import ctypes
import fcntl
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import IO
from urllib.parse import quote

from chatserver import tasks
from chatserver.errors import SetupError

logger = logging.getLogger(__name__)

_STOP_S = 20.0
_START_S = 30.0
_LOOK_S = 1.0
_LOG_LINES = 5
_SHORT = r"[\w/.-]{1,50}"
_SOCKET_FOLDER = rf"{_SHORT}/chatserver-\w{{8}}"
_LOCK_BYTES = 200
"""Longer than every valid name."""
_REMEDY = """Start one, and set its address:

    docker run -d --name chat-mongo -p 127.0.0.1:27017:27017 mongo:7
    MONGODB_URI=mongodb://127.0.0.1:27017/chat-db scripts/run"""
_MISSING = f"""No MongoDB server was found: there is no `mongod` on the PATH, and no package with one for this machine.
{_REMEDY}"""
_LIBRARY_MISSING = f"""A library is missing (Debian: apt-get install libssl3 libcurl4). Or use another MongoDB server:
{_REMEDY}"""

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def find_mongod() -> str:
    """Return the path of a `mongod`, from the installed package or else from the PATH.

    :raises SetupError: with a remedy, if there is none
    """
    package = find_spec("fiftyone")
    for folder in (package.submodule_search_locations or []) if package else []:
        path = Path(folder, "db", "bin", "mongod")
        if path.is_file():
            return str(path)
    if (found := shutil.which("mongod")) is not None:
        return found
    raise SetupError(_MISSING)


class Mongod:
    """A MongoDB server that lives as long as this process, with its data in a folder.

    :param data_dir: created if missing
    :param replica_set: whether to start it as a member of the replica set `rs0`; see `store.initiate_replica_set`
    """

    def __init__(self, data_dir: Path, *, replica_set: bool = True) -> None:
        self._folder = Path(os.path.realpath(data_dir))
        self._replica_set = replica_set
        self._lock: IO[bytes] | None = None
        self._socket: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        """The address of the started server, as the configuration of a replica set names it."""
        return str(self._socket)

    async def start(self) -> str:
        """Start the server and return its URI. A server left on this folder by a killed chatserver is ended first.

        :raises SetupError: if the folder is locked or unusable, or if the server is missing or does not start
        """
        binary = find_mongod()
        try:
            self._take_folder()
            await self._end_stale()
            self._remove_last_socket_folder()
            self._make_socket_folder()
            self._process = self._spawn(binary)
            await self._wait_until_listening()
        except BaseException as error:
            self.kill()
            self._release_folder()
            if isinstance(error, OSError):
                raise SetupError(self._describe(error)) from None
            raise
        return f"mongodb://{quote(self.host, safe='')}/?directConnection=true"

    async def keep_running(self) -> None:
        """Restart the server on the same folder and socket whenever it has exited, until cancelled."""
        await tasks.repeat(self._start_again)

    async def _start_again(self) -> None:
        """Check after `_LOOK_S` whether the server has exited, and restart it if so."""
        await asyncio.sleep(_LOOK_S)
        if self._process is not None and self._exited:
            logger.error("the private MongoDB server has exited (%d) and is restarted", self._process.returncode)
            try:
                self._process = self._spawn(find_mongod())
            except (SetupError, OSError) as error:
                logger.error("%s", error)

    async def stop(self) -> None:
        """Shut the server down, kill it after 20 seconds, and unlock the folder."""
        if self._process is not None:
            self._process.terminate()
            await _within(_STOP_S, lambda: self._exited)
        self.kill()
        self._release_folder()

    def kill(self) -> None:
        """Kill the server, if it runs. Its journal keeps every acknowledged write."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._socket is not None:
            shutil.rmtree(self._socket.parent, ignore_errors=True)

    @property
    def _exited(self) -> bool:
        return self._process is None or self._process.poll() is not None

    # -- the folder ----------------------------------------------------------------------------------------------

    @property
    def _data(self) -> Path:
        return self._folder / "db"

    @property
    def _log(self) -> Path:
        return self._folder / "mongod.log"

    def _take_folder(self) -> None:
        # The server's log may quote messages: other users of the machine must not read it.
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._data.mkdir(exist_ok=True)
        self._lock = (self._folder / "lock").open("a+b")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SetupError(
                f"CHAT_DATA_DIR {self._folder} is in use by another chatserver; stop it, or choose another folder"
            ) from None

    def _describe(self, error: OSError) -> str:
        """Return why the folder cannot be used: the file at fault, if known, and the remedy."""
        why = error.strerror or str(error)
        files = [str(each) for each in (error.filename, error.filename2) if each not in (None, str(self._folder))]
        if not files:
            return f"CHAT_DATA_DIR {self._folder} cannot be used: {why}; choose another folder"
        return (
            f"CHAT_DATA_DIR {self._folder} cannot be used: {', '.join(files)}: {why}; "
            "repair or move that file, or choose another folder"
        )

    def _release_folder(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    async def _end_stale(self) -> None:
        """End the server named in the folder's own lock file, if it still runs on this folder."""
        try:
            pid = int((self._data / "mongod.lock").read_text().strip() or 0)
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return
        if os.fsencode(self._data) not in command:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            if await _within(_STOP_S, lambda: _ended(pid)):
                return

    def _remove_last_socket_folder(self) -> None:
        """Remove the socket folder of a killed chatserver, which the lock file names."""
        assert self._lock is not None
        self._lock.seek(0)
        last = os.fsdecode(self._lock.read(_LOCK_BYTES))
        if re.fullmatch(_SOCKET_FOLDER, last):
            shutil.rmtree(last, ignore_errors=True)
        elif last:
            # The folder to remove is unknown. That must not prevent a start.
            logger.warning(
                "%s is damaged and is written again; if a folder chatserver-* is left over in %s, remove it",
                self._lock.name,
                tempfile.gettempdir(),
            )

    def _make_socket_folder(self) -> None:
        """Create a folder for the socket, whose path must be short, and write its name to the lock file."""
        assert self._lock is not None
        usual = tempfile.gettempdir()
        folder = tempfile.mkdtemp(prefix="chatserver-", dir=usual if re.fullmatch(_SHORT, usual) else "/tmp")
        self._socket = Path(folder, "mongodb.sock")
        self._lock.truncate(0)
        self._lock.write(os.fsencode(folder))
        self._lock.flush()

    # -- the process ---------------------------------------------------------------------------------------------

    def _spawn(self, binary: str) -> "subprocess.Popen[bytes]":
        # Only on that socket: by default it adds one at a fixed path in /tmp, where two servers would replace each
        # other's, and where another user's file of that name would prevent a start.
        command = [binary, "--dbpath", str(self._data), "--bind_ip", self.host, "--nounixsocket"]
        # An upper limit. With half of it, updates of 16 MB documents are sometimes refused as too large for the cache.
        command += ["--wiredTigerCacheSizeGB", "0.5"]
        command += ["--logpath", str(self._log), "--logappend", "--quiet"]
        command += ["--setParameter", "diagnosticDataCollectionEnabled=false"]
        if self._replica_set:
            command += ["--replSet", "rs0", "--oplogSize", "64"]
        if self._log.exists():
            self._log.replace(self._folder / "mongod.log.1")
        # The loader reports a missing library to stderr, which goes to the log as well. The new session keeps Ctrl-C in
        # the terminal from the server: this process ends it after the last write.
        with self._log.open("ab") as log:
            try:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=_die_with_parent if _libc else None,
                )
            except OSError as error:
                raise SetupError(f"{binary} cannot be run: {error.strerror}") from None

    async def _wait_until_listening(self) -> None:
        if await _within(_START_S, lambda: self._exited or _listens(self.host)) and not self._exited:
            return
        code = self._process.returncode if self._process is not None else None
        how = "takes too long to start" if code is None else f"does not start (exit code {code})"
        last = "\n".join(self._log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        remedy = f"\n{_LIBRARY_MISSING}" if "shared librar" in last else ""
        raise SetupError(f"The private MongoDB server {how}; the end of {self._log}:\n{last}{remedy}")


def _die_with_parent() -> None:
    """Have the kernel shut the server down if this process is killed (prctl PR_SET_PDEATHSIG, Linux).

    It watches the thread that started the server: the event loop's, which lives as long as the process.
    """
    assert _libc is not None
    _libc.prctl(1, signal.SIGTERM)


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def _ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


async def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Wait until a condition holds, at most some seconds; return whether it does."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True
