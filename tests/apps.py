"""The server inside the test's process: every part is real and accessible."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymongo.database import Database as PyMongoDatabase
from tornado.routing import PathMatches
from tornado.testing import bind_unused_port

from chatserver.server import Server
from chatserver.settings import Settings
from chatserver.sources import Prompt, Source
from tests.clients import Client, new_id


@dataclass
class Database:
    """A test's database: the URI for the server, and a client of its own."""

    uri: str
    db: "PyMongoDatabase[dict[str, Any]]"

    @property
    def conversations(self) -> Any:
        return self.db["conversations"]


class Script:
    """A source that sends the given chunks; an exception among them is raised.

    :param gate: acquired before each chunk, if given
    """

    def __init__(self, *pieces: str | BaseException, gate: asyncio.Semaphore | None = None) -> None:
        self.pieces = pieces
        self.gate = gate
        self.prompts: list[Prompt] = []
        self.closed = 0

    async def reply(self, prompt: Prompt) -> AsyncIterator[str]:
        self.prompts.append(prompt)
        try:
            for piece in self.pieces:
                if self.gate is not None:
                    await self.gate.acquire()
                else:
                    await asyncio.sleep(0)
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.closed += 1

    async def close(self) -> None:
        pass


class App:
    """A server on a socket of this process.

    :param source: by default the simulated one, without delay
    :param settings: fields of `Settings`
    """

    def __init__(self, database: Database, source: Source | Script | None = None, **settings: Any) -> None:
        self.database = database
        settings = {"checkpoint_ms": 20, "drain_s": 0.0, "simulated_token_delay_ms": 0, **settings}
        self.settings = Settings(mongodb_uri=database.uri, chat_data_dir=Path("unused"), **settings)
        self.source: Any = source

    async def start(self) -> None:
        settings = self.settings
        self.server = server = Server(
            settings,
            self.database.uri,
            source=self.source,
            max_connections=settings.max_connections or 20_000,
        )
        self.store, self.hub, self.metrics = server.store, server.hub, server.metrics
        self.chat, self.reading, self.replies = server.chat, server.reading, server.replies
        self.streams, self.listener = server.streams, server.listener
        # A test may depend on an index, and the server builds them in the background.
        await self.store.build_indexes()
        sock, self.port = bind_unused_port()
        await server.start([sock])
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = Client(self.url)

    async def stop(self) -> None:
        await self.client.close()
        await self.server.stop()

    @property
    def paths(self) -> list[str]:
        """A path of every route; the conversation in it, if any, is an unknown one."""
        patterns = [
            rule.matcher.regex.pattern.removesuffix("$")
            for rule in self.server.application.wildcard_router.rules
            if isinstance(rule.matcher, PathMatches)
        ]
        for group, value in {"([^/]*)": new_id(), "(.*)": "client.js", "()": "", "\\": ""}.items():
            patterns = [each.replace(group, value) for each in patterns]
        return patterns

    @property
    def subscribers(self) -> int:
        """The number of subscribed streams."""
        return sum(len(live.subscribers) for live in self.hub.conversations)

    async def until(self, condition: Any, seconds: float = 10.0) -> None:
        """Wait until a condition of this process holds."""
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.005)

    async def end_streams(self) -> None:
        """End all open streams; their clients resume."""
        connections = set(self.streams.connections)
        for connection in connections:
            connection.finish()
        await self.until(lambda: connections.isdisjoint(self.streams.connections))

    async def until_idle(self) -> None:
        """Wait until no reply is running and no live conversation is left."""
        await self.until(lambda: not self.replies.running and not self.hub.conversations)


MakeApp = Callable[..., Awaitable[App]]
"""Starts a server for a test; see the fixture `make_app`."""


@asynccontextmanager
async def running(app: App) -> AsyncIterator[App]:
    """Start a server that the test built itself, and stop it at the end."""
    await app.start()
    try:
        yield app
    finally:
        await app.stop()
