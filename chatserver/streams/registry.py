"""The registry of open streams: their limits, their timer, and their orderly end."""

import asyncio
import logging
import random
import socket
from collections import Counter
from collections.abc import Callable
from math import inf

from chatserver import tasks
from chatserver.errors import Draining, TooManyStreams
from chatserver.hub import for_each
from chatserver.limits import decrement
from chatserver.metrics import Metrics
from chatserver.records import Key
from chatserver.settings import Settings
from chatserver.streams.connection import TICK_S, Connection
from chatserver.wire import Format

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 2.0
"""Seconds that the streams have for their last bytes when the process ends."""
_CLOSE_POLL_S = 0.02


class Streams:
    """All open streams of this process.

    :param on_close: called once with each connection that `open` returned, when its stream is over
    """

    def __init__(self, settings: Settings, metrics: Metrics, *, on_close: Callable[[Connection], None]) -> None:
        self._settings = settings
        self._on_close = on_close
        self._open: dict[Connection, tuple[Key, str]] = {}
        """The conversation and the client's address of each."""
        self._conversations: Counter[Key] = Counter()
        self._addresses: Counter[str] = Counter()
        self._owners: Counter[str | None] = Counter()
        self._closing = False
        self._reuse: Callable[[socket.socket], None] | None = None
        metrics.watch("chatserver_open_streams", "Open streams.", lambda: len(self))
        self._resumes = metrics.counter("chatserver_resumes_total", "Streams opened with a position.")
        self._slow_clients = metrics.counter(
            "chatserver_slow_clients_cut_total", "Streams closed because the client stopped reading."
        )

    def __len__(self) -> int:
        return len(self._open)

    @property
    def connections(self) -> list[Connection]:
        """The connections of all open streams."""
        return list(self._open)

    def return_sockets_to(self, serve: Callable[[socket.socket], None]) -> None:
        """Set where sockets go after an orderly end, for the connection's next request; see `Listener.serve`."""
        self._reuse = serve

    def open(
        self,
        conversation: Key,
        address: str,
        head: bytes,
        *,
        stream_format: Format,
        resumes: bool = False,
        chunked: bool = False,
        until_done: bool = False,
        valid_until: float = inf,
        reusable: bool = False,
    ) -> Connection:
        """Return a connection that counts from now on and is yet to be attached to a socket; see `Connection`.

        :param address: the client's
        :param resumes: whether the client has a position
        :param reusable: whether the client may send another request after the stream
        :raises TooManyStreams: if a limit is reached
        :raises Draining: if all streams are being closed
        """
        if resumes:
            self._resumes.inc()
        if self._closing:
            raise Draining("The server is shutting down and opens no new streams.")
        limits = self._settings
        if len(self._open) >= limits.max_streams:
            raise TooManyStreams("The server has reached its limit of open streams. Try again later.")
        if self._conversations[conversation] >= limits.max_streams_per_conversation:
            raise TooManyStreams("This conversation has reached its limit of open streams. Close one.")
        if 0 < limits.max_streams_per_address <= self._addresses[address]:
            raise TooManyStreams("Your address has reached its limit of open streams. Close one.")
        if conversation.owner is not None and 0 < limits.max_streams_per_owner <= self._owners[conversation.owner]:
            raise TooManyStreams("You have reached your limit of open streams. Close one.")
        connection = Connection(
            head,
            self._closed,
            stream_format=stream_format,
            chunked=chunked,
            until_done=until_done,
            valid_until=valid_until,
            reuse=self._reuse if reusable else None,
        )
        if limits.stream_max_age_s:
            age = limits.stream_max_age_s * random.uniform(0.5, 1.5)
            connection.expires_at = asyncio.get_running_loop().time() + age
        self._open[connection] = (conversation, address)
        self._conversations[conversation] += 1
        self._addresses[address] += 1
        self._owners[conversation.owner] += 1
        return connection

    def _closed(self, connection: Connection) -> None:
        conversation, address = self._open.pop(connection)
        decrement(self._conversations, conversation)
        decrement(self._addresses, address)
        decrement(self._owners, conversation.owner)
        self._on_close(connection)

    async def run(self) -> None:
        """Call `tick` every `TICK_S` seconds until cancelled."""
        await tasks.repeat(self._run_once)

    async def _run_once(self) -> None:
        await asyncio.sleep(TICK_S)
        self.tick()

    def tick(self) -> None:
        """Send keep-alives, abort the streams of slow clients, end the expired ones."""
        now = asyncio.get_running_loop().time()

        def tick(connection: Connection) -> None:
            if connection.tick(now, self._settings.keepalive_s, self._settings.slow_client_timeout_s):
                self._slow_clients.inc()
                conversation, _ = self._open[connection]
                logger.info("slow client disconnected", extra={"conversation": conversation.id})

        for_each(self.connections, tick)

    async def close(self) -> None:
        """End all streams, each once everything is written to it; abort those whose clients take too long."""
        self._closing = True
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                while self._open:
                    for_each(self.connections, _finish_if_caught_up)
                    await asyncio.sleep(_CLOSE_POLL_S)
        except TimeoutError:
            for connection in self.connections:
                connection.abort()


def _finish_if_caught_up(connection: Connection) -> None:
    if connection.live is None or connection.live.is_caught_up(connection):
        connection.finish()
