"""Binds processes to cores: the servers under test to one, the load generator and MongoDB to another."""

import asyncio
import os
import re
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from bson import ObjectId
from pymongo import MongoClient

from tests.bench import tools
from tests.bench.issuer import Issuer
from tests.processes import ROOT, MongoServer, Server


def cores() -> tuple[int, int]:
    """Return the core of the server under test and the core of the other processes.

    :raises SystemExit: if there is only one core
    """
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        raise SystemExit("bench: needs two cores, one for the server and one for the load generator")
    return available[0], available[1]


def bind(core: int) -> None:
    """Bind the calling process, and the processes that it starts, to a core."""
    os.sched_setaffinity(0, {core})


class Database:
    """A private MongoDB server in a new folder, on the core of the calling process."""

    def __init__(self) -> None:
        self._mongod = MongoServer(Path(tempfile.mkdtemp(prefix="chatserver-bench-")))
        self._count = 0

    @property
    def pid(self) -> int:
        return self._mongod.pid

    def __enter__(self) -> Self:
        asyncio.run(self._mongod.start())
        return self

    def __exit__(self, *raised: object) -> None:
        self._mongod.remove()

    def seed(self, uri: str, conversation_ids: Sequence[str], length: int) -> str:
        """Store conversations of `length` messages, as the server does; return the id of their last message."""
        return self._seed(uri, conversation_ids, [_message(number % 2) for number in range(length)])

    def seed_siblings(self, uri: str, conversation_id: str, replies: int) -> str:
        """Store a conversation of a message and some replies to it, as the server does; return the last one's id."""
        question, first = _message(0), _message(1)
        others = [{**_message(1), "parent": question["_id"]} for _ in range(replies - 1)]
        messages = [question, first, *others]
        head = {"head": {"_id": messages[-1]["_id"], "length": len(messages)}} if others else {}
        return self._seed(uri, [conversation_id], messages, **head)

    def _seed(self, uri: str, ids: Sequence[str], messages: Sequence[dict[str, Any]], **more: object) -> str:
        time = datetime.now(UTC)
        with MongoClient[dict[str, Any]](uri) as client:
            client.get_default_database()["conversations"].insert_many(
                {"_id": ObjectId(each), "createdAt": time, "updatedAt": time, "messages": messages, **more}
                for each in ids
            )
        return str(messages[-1]["_id"])

    def fresh_uri(self) -> str:
        """Return the URI of a new database."""
        self._count += 1
        return self._mongod.database_uri(f"bench-{self._count}")


def _message(is_reply: int) -> dict[str, Any]:
    return {
        "_id": ObjectId(),
        "role": "assistant" if is_reply else "user",
        "content": "Some words of a usual length, and then a few more. " * (8 if is_reply else 1),
        "createdAt": datetime.now(UTC),
    }


def memory_kib(server: Server) -> int:
    """Return the resident memory of a server's process."""
    status = Path(f"/proc/{server.pid}/status").read_text()
    match = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    assert match is not None
    return int(match[1])


def metrics(server: Server) -> dict[str, float]:
    """Return the metrics of a chatserver, by their names."""
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (each.rpartition(" ") for each in lines if each[:1] != "#")}


def ours(core: int, uri: str, tokens: int, delay_ms: int, *, checkout: Path = ROOT, **settings: object) -> Server:
    """Return a chatserver, with limits that are in force, but higher than any load here.

    :param checkout: the checkout to run; with its own `.venv` if it has one, else with the packages of this one
    """
    limits = {"MAX_STREAMS": 100_000, "MAX_REPLIES": 100_000}
    simulated = {"SIMULATED_TOKENS": tokens, "SIMULATED_TOKEN_DELAY_MS": delay_ms, "REPLY_SOURCE": "simulated"}
    process = {"PYTHONPATH": checkout, "MONGODB_URI": uri}
    own = checkout / ".venv" / "bin" / "python"
    python = own if own.exists() else sys.executable
    variables = {**process, **limits, **simulated, **settings}
    return Server(tools.BENCH, variables, [python, "-m", "chatserver"], core=core)


def users(core: int, uri: str, tokens: int, delay_ms: int, issuer: Issuer, **settings: object) -> Server:
    """Return a chatserver that accepts the issuer's token only.

    One user sends all requests, so the limits per owner are off.
    """
    limits = {"MAX_TURNS_PER_MINUTE": 0, "MAX_REPLIES_PER_OWNER": 0, "MAX_STREAMS_PER_OWNER": 0}
    return ours(core, uri, tokens, delay_ms, checkout=ROOT, **issuer.settings, **limits, **settings)


def express(core: int, tokens: int, delay_ms: int, **settings: object) -> Server:
    """Return the Express twin."""
    process = {"NODE_ENV": "production", "NODE_PATH": tools.express_modules(), "TOKENS_FILE": tools.tokens_file()}
    reply = {"TOKENS": tokens, "DELAY_MS": delay_ms}
    return Server(tools.BENCH, {**process, **reply, **settings}, ["node", tools.HERE / "express.js"], core=core)


def fastapi(core: int, tokens: int, delay_ms: int, **settings: object) -> Server:
    """Return the FastAPI twin, without a database unless MONGODB_URI is among the settings."""
    # It imports packages from its own virtual environment only.
    process = {"PYTHONPATH": None, "TOKENS_FILE": tools.tokens_file()}
    reply = {"TOKENS": tokens, "DELAY_MS": delay_ms}
    command = [tools.twin_python(), tools.HERE / "fastapi_twin.py"]
    return Server(tools.BENCH, {**process, **reply, **settings}, command, core=core)
