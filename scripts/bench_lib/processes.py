"""Processes bound to a core: the servers under test, on one core, and all that serves to measure them, on another."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self

from bson import ObjectId
from pymongo import MongoClient

from chatserver.mongod import Mongod
from chatserver.store import initiate_replica_set
from scripts.bench_lib import tools

_START_S = 30.0


def cores() -> tuple[int, int]:
    """Return the core for the server and the one for everything else.

    :raises SystemExit: if there is only one
    """
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        raise SystemExit("bench: needs two cores, one for the server and one for the load generator")
    return available[0], available[1]


def bind(core: int) -> None:
    """Bind the calling process, and those it starts, to a core."""
    os.sched_setaffinity(0, {core})


class Database:
    """A private MongoDB server in a new folder, on the core of whoever starts it."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="chatserver-bench-"))
        self._mongod = Mongod(self._folder)
        self._uri = ""
        self._count = 0
        self.pid = 0

    def __enter__(self) -> Self:
        before = _children()
        asyncio.run(self._start())
        (self.pid,) = _children() - before
        return self

    async def _start(self) -> None:
        self._uri = await self._mongod.start()
        await initiate_replica_set(self._uri, self._mongod.host)

    def __exit__(self, *raised: object) -> None:
        self._mongod.kill()
        asyncio.run(self._mongod.stop())
        shutil.rmtree(self._folder)

    def seed(self, uri: str, conversation_ids: Sequence[str], length: int) -> str:
        """Store conversations of so many messages, as the server would have; return their last message's id."""
        time = datetime.now(UTC)
        messages = [
            {
                "_id": ObjectId(),
                "role": "assistant" if number % 2 else "user",
                "content": "Some words of a usual length, and then a few more. " * (8 if number % 2 else 1),
                "createdAt": time,
            }
            for number in range(length)
        ]
        with MongoClient[dict[str, Any]](uri) as client:
            client.get_default_database()["conversations"].insert_many(
                {"_id": ObjectId(each), "createdAt": time, "updatedAt": time, "messages": messages}
                for each in conversation_ids
            )
        return str(messages[-1]["_id"])

    def fresh_uri(self) -> str:
        """Return the URI of a database that nobody has used yet."""
        self._count += 1
        return self._uri.replace("/?", f"/bench-{self._count}?")


class Server:
    """A server under test, on its core, from `with` to its end.

    :param command: prints its address when it listens
    :param settings: of its environment, which has nothing else of ours
    """

    def __init__(self, command: Sequence[str | Path], settings: Mapping[str, object], core: int) -> None:
        self._command = command
        self._settings = settings
        self._core = core
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[bytes] | None = None
        self.port = 0
        self.pid = 0

    def __enter__(self) -> Self:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command,
            env={**kept, **{name: str(value) for name, value in self._settings.items()}},
            cwd=tools.BENCH,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            preexec_fn=lambda: bind(self._core),
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if (match := re.search(r"http://[^ ]*:(\d+)/", line)) is not None:
                self.port = int(match[1])
                return self
        log = self.log
        self.__exit__()
        raise SystemExit(f"bench: {' '.join(map(str, self._command))} does not start: {log}")

    def __exit__(self, *raised: object) -> None:
        assert self._process is not None
        assert self._log is not None
        self._process.kill()
        self._process.communicate()
        self._log.close()

    @property
    def log(self) -> str:
        """What it has written to its standard error."""
        assert self._log is not None
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def memory_kib(self) -> int:
        """Return the resident memory of its process."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        match = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        assert match is not None
        return int(match[1])

    def metrics(self) -> dict[str, float]:
        """Return the figures of our own server, by their names."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (each.rpartition(" ") for each in lines if each[:1] != "#")}


def ours(core: int, uri: str, tokens: int, delay_ms: int, *, checkout: Path = tools.ROOT, **settings: object) -> Server:
    """Return the whole product, with limits that are higher than any load here, but in force.

    :param checkout: whose code to run: with its own `.venv` if it has one, else with the packages of this one
    """
    limits = {"MAX_STREAMS": 100_000, "MAX_REPLIES": 100_000}
    simulated = {"SIMULATED_TOKENS": tokens, "SIMULATED_TOKEN_DELAY_MS": delay_ms, "REPLY_SOURCE": "simulated"}
    process = {"PYTHONPATH": checkout, "PORT": 0, "MONGODB_URI": uri}
    own = checkout / ".venv" / "bin" / "python"
    python = own if own.exists() else sys.executable
    return Server([python, "-m", "chatserver"], {**process, **limits, **simulated, **settings}, core)


def express(core: int, tokens: int, delay_ms: int, **settings: object) -> Server:
    """Return the Express twin."""
    process = {"NODE_ENV": "production", "NODE_PATH": tools.express_modules(), "TOKENS_FILE": tools.tokens_file()}
    reply = {"TOKENS": tokens, "DELAY_MS": delay_ms}
    return Server(["node", tools.HERE / "express.js"], {**process, **reply, **settings}, core)


def fastapi(core: int, tokens: int, delay_ms: int, **settings: object) -> Server:
    """Return the FastAPI twin, without a database unless MONGODB_URI is among the settings."""
    reply = {"TOKENS_FILE": tools.tokens_file(), "TOKENS": tokens, "DELAY_MS": delay_ms}
    return Server([tools.twin_python(), tools.HERE / "fastapi_twin.py"], {**reply, **settings}, core)


def _children() -> set[int]:
    """Return the ids of this process's child processes."""
    children: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        children.update(map(int, (task / "children").read_text().split()))
    return children
