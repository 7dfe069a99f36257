"""The parts of one server process: built, started and stopped in order.

`__main__` and the tests use the same parts with the same options; a test may pass another source or store.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from tornado.httpserver import HTTPServer

from chatserver import tasks
from chatserver.app import make_app
from chatserver.chat import Chat
from chatserver.handlers.base import Services
from chatserver.handlers.identity import make_identity
from chatserver.hub import Hub
from chatserver.limits import TurnLimit
from chatserver.listener import Listener
from chatserver.metrics import Metrics
from chatserver.mongod import Mongod
from chatserver.reading import Reading
from chatserver.replies import Replies
from chatserver.settings import Settings
from chatserver.sources import Source, make_source
from chatserver.store import Store, connect, initiate_replica_set
from chatserver.streams import Streams
from chatserver.tasks import Tasks

_HEADER_FACTOR = 4
"""Headers up to this multiple of `MAX_HEADER_BYTES` are read, so that the client gets a 431; beyond it Tornado closes
the connection without an answer."""
_CHUNK_BYTES = 16 * 1024
"""Bytes read at once; Tornado clears a buffer of this size for each read."""

_LAG_INTERVAL_S = 1.0


class Server:
    """One server over one database.

    :param uri: the database's
    :param sole_server: whether the database is private, so that at start-up every running reply lacks a server
    :param source: where replies come from; by default the configured one
    :param client: a MongoDB client for `uri`; by default one of its own. `stop` closes it
    """

    def __init__(
        self,
        settings: Settings,
        uri: str,
        *,
        max_connections: int,
        sole_server: bool = False,
        source: Source | None = None,
        client: Any = None,
        make_store: Callable[..., Store] = Store,
    ) -> None:
        self._settings = settings
        self._sole_server = sole_server
        self.background = Tasks()
        self.metrics = Metrics()
        self.metrics.watch("chatserver_tasks", "Tasks of the event loop.", lambda: len(asyncio.all_tasks()))
        self.loop_lag = self.metrics.histogram(
            "chatserver_event_loop_lag_seconds",
            "Delay of the event loop's timers, measured once a second.",
            buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5),
        )
        self.store = make_store(
            connect(uri, settings.database_timeout_s) if client is None else client,
            uri,
            timeout_s=settings.database_timeout_s,
            lease_ms=settings.lease_ms,
            history=settings.history_messages,
            history_chars=settings.openai_history_chars,
            observe=self.metrics.observe_store,
        )
        self.hub = Hub(self.metrics)
        self.source = source or make_source(settings)
        self.replies = Replies(settings, self.store, self.hub, self.source, self.metrics, self.background)
        self.turn_limit = TurnLimit(settings.max_turns_per_minute)
        self.chat = Chat(self.store, self.hub, self.replies, self.turn_limit)
        self.reading = Reading(
            settings,
            self.store,
            self.hub,
            self.replies.alignment,
            self.metrics,
            self.background,
            sole_server=sole_server,
        )
        self.streams = Streams(settings, self.metrics, on_close=self.hub.unsubscribe)
        self.identity = make_identity(settings)
        services = Services(self.chat, self.reading, self.streams, self.metrics, self.identity, settings)
        self.application = make_app(services)
        self.http = HTTPServer(
            self.application,
            max_header_size=_HEADER_FACTOR * settings.max_header_bytes,
            chunk_size=_CHUNK_BYTES,
            body_timeout=settings.request_timeout_s,
            idle_connection_timeout=settings.request_timeout_s,
        )
        self.listener = Listener(self.http, max_connections, self.metrics)
        self.streams.return_sockets_to(self.listener.serve)

    async def start(self, sockets: list[socket.socket]) -> None:
        """Start to serve.

        :param sockets: bound and listening; closed by `stop`
        :raises DatabaseUnavailable: if no MongoDB answers
        :raises SetupError: if the database cannot be used
        """
        # First: the kernel accepts connections already, and only later ones inherit the option.
        _set_tcp_user_timeout(sockets, self._settings.slow_client_timeout_s)
        try:
            await self.start_replies()
        except BaseException:
            await self.store.close()
            raise
        self.identity.start(self.background)
        self.listener.start(sockets)
        self.background.spawn(self.streams.run())
        self.background.spawn(tasks.repeat(self._measure_loop_lag))

    async def start_replies(self) -> None:
        """Start everything except HTTP: indexes are built, expired replies ended, replies delivered and saved.

        :raises DatabaseUnavailable: if no MongoDB answers
        :raises SetupError: if the database cannot be used
        """
        await self.store.prepare()
        self.background.spawn(self.store.build_indexes())
        await self.replies.start(sole_server=self._sole_server)
        self.background.spawn(self.hub.deliver())

    async def stop(self) -> None:
        """Stop in order: accept no connections, end the replies, then the streams, then all other connections."""
        try:
            self.listener.stop()
            await self.replies.drain()
            await self.streams.close()
            await self.stop_replies()
            await self.identity.close()
        finally:
            await self.store.close()
        # Last: the requests that waited for the store have been answered.
        await self.http.close_all_connections()

    async def stop_replies(self) -> None:
        """Cancel the background tasks; running replies remain in the database as checkpointed."""
        await self.background.close()
        await self.source.close()

    async def _measure_loop_lag(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + _LAG_INTERVAL_S
        await asyncio.sleep(_LAG_INTERVAL_S)
        self.loop_lag.observe(max(0.0, loop.time() - due))


@asynccontextmanager
async def private_database(mongod: Mongod) -> AsyncIterator[str]:
    """Run a private MongoDB server; yield its URI.

    :raises SetupError: if it cannot be started
    """
    keeping: asyncio.Task[None] | None = None
    try:
        uri = await mongod.start()
        await initiate_replica_set(uri, mongod.host)
        keeping = asyncio.create_task(mongod.keep_running())
        yield uri
    finally:
        if keeping is not None:
            keeping.cancel()
        await mongod.stop()


def _set_tcp_user_timeout(sockets: list[socket.socket], slow_client_timeout_s: float) -> None:
    """Have the kernel, where it can, abort connections whose client has vanished or has stopped reading.

    Accepted sockets inherit the option. It expires later than a stream's own timer, which counts its aborts.
    """
    milliseconds = int(slow_client_timeout_s * 1000) + 5000
    for each in sockets:
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
