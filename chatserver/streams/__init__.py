"""The open streams of this process: their connections, limits and timers."""

import asyncio
import fcntl
import logging
import os
import random
import socket
import sys
import termios
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import cast

from chatserver import tasks
from chatserver.chat import Chat
from chatserver.errors import Draining, TooManyStreams
from chatserver.hub import MAX_WRITE, LiveConversation
from chatserver.metrics import Metrics
from chatserver.settings import Settings
from chatserver.wire import sse

logger = logging.getLogger(__name__)

_TICK_S = 1.0
_PARTING_S = 2.0
"""How long a connection may take for its last bytes when the process ends, and how often that is looked at."""
_PARTING_LOOK_S = 0.02


class Connection(asyncio.Protocol):
    """A stream's connection: the one writer to its socket, and a `hub.Subscriber`.

    :param head: the response's status line and headers
    :param on_end: called once, when the stream is over
    :param chunked: whether the head announces a chunked body
    :param reuse: takes the socket after an orderly end, for the next request; None: the connection is closed
    """

    def __init__(
        self,
        head: bytes,
        on_end: Callable[["Connection"], None],
        *,
        chunked: bool,
        until_done: bool = False,
        reuse: Callable[[socket.socket], None] | None = None,
    ) -> None:
        self.cursor = 0
        self.ready = False
        self.chunked = chunked
        self.until_done = until_done
        self.live: LiveConversation | None = None
        self.expires_at: float | None = None
        self.gone = False
        self.write: Callable[[bytes], None]  # the transport's own, once it is there: a step less for each write
        self._on_end = on_end
        self._reuse = reuse
        self._backlog = bytearray(head)
        self._then: Callable[[], None] | None = None
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self._ending = False
        self._progress = (0, 0, 0)
        self._since = 0.0

    # -- what the hub sees ---------------------------------------------------------------------------------------

    def replay(self, data: bytes, then: Callable[[], None] | None = None) -> None:
        if not self._ending:
            self.ready = False
            self._backlog += self._wrap(data)
            self._then = then
            self._pump()

    def end(self, data: bytes = b"") -> None:
        if not self._ending:
            # Not by `replay`: once that is written, the conversation's next frames would follow.
            if data:
                self._backlog += self._wrap(data)
            if self.chunked:
                self._backlog += sse.LAST_CHUNK
            self._close()

    def disconnect(self) -> None:
        if not self._ending:
            self._reuse = None
            self._close()

    def finish(self) -> None:
        """End the response: in order if the client has everything and no reply runs; else it has to resume."""
        if self.live is not None and self.live.is_complete_for(self):
            self.end()
        else:
            self.disconnect()

    def _wrap(self, data: bytes) -> bytes:
        """Return bytes of this stream alone as its body carries them; the hub wraps what it writes for all."""
        return sse.chunk(data) if self.chunked else data

    def _close(self) -> None:
        """Write the backlog, then let go of the connection."""
        self.ready = False
        self._ending = True
        self._pump()

    # -- what the transport says ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # Any byte that the kernel does not take at once pauses us: what is pending waits in the log, not in a buffer.
        self._transport.set_write_buffer_limits(high=0)
        self.write = self._transport.write
        loop = asyncio.get_running_loop()
        self._since = loop.time()
        # Later: uvloop begins to read after this call, which would undo the pause of reading at a stream's end.
        loop.call_soon(self._pump)

    def data_received(self, data: bytes) -> None:
        self.close_at_end()

    def close_at_end(self) -> None:
        """Close the connection after the stream: the client has sent bytes that the HTTP server will not see."""
        self._reuse = None

    def pause_writing(self) -> None:
        self.ready = False
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._pump()

    def connection_lost(self, exc: Exception | None) -> None:
        self.leave()

    def leave(self) -> None:
        """Let go of everything; the connection is gone, or never came up."""
        self.ready = False
        self._transport = None
        self._ending = True
        self._backlog.clear()
        if not self.gone:
            self.gone = True
            self._on_end(self)

    def abort(self) -> None:
        """Cut the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now: float, keepalive_s: float, slow_s: float) -> bool:
        """Send a keep-alive if one is due, end the stream if it has expired, abort it if the client stopped reading.

        Called about once a second.

        :param now: the event loop's time, in seconds
        :param keepalive_s: the longest that nothing may be sent, in seconds
        :param slow_s: how long a client may receive nothing of what was written, in seconds
        :return: whether the connection was aborted
        """
        if self._transport is None:
            return False
        progress = (self.cursor, len(self._backlog), self._in_flight() if self._paused else 0)
        if progress != self._progress:
            self._progress, self._since = progress, now
        elif self._paused and now - self._since >= slow_s:
            self.abort()
            return True
        elif self.ready and now - self._since >= keepalive_s - _TICK_S:
            # Ready means that everything before was written to its last byte, so that it never lands inside a frame.
            self._since = now
            self.write(self._wrap(sse.ping(keepalive_s)))
        if self.expires_at is not None and now >= self.expires_at:
            self.finish()
        return False

    def _in_flight(self) -> int:
        """Return the bytes that the client has not taken: ours, and on Linux the kernel's (tcp(7), SIOCOUTQ)."""
        assert self._transport is not None
        unsent = self._transport.get_write_buffer_size()
        if sys.platform == "linux":
            descriptor = self._transport.get_extra_info("socket").fileno()
            unsent += int.from_bytes(fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return unsent

    def _pump(self) -> None:
        """Write what comes before the live frames, piece by piece; then end, or go on with the conversation's log."""
        if self._transport is None:
            return
        if self._ending and self._reuse is not None:
            # Before the last chunk is written: what the client sends after it is for the HTTP server to read.
            self._transport.pause_reading()
        while self._backlog and not self._paused:
            piece = bytes(self._backlog[:MAX_WRITE])
            del self._backlog[:MAX_WRITE]
            self.write(piece)
        if self._backlog or self._paused:
            return
        if self._ending:
            # Not at once: a transport that is closed inside `resume_writing` calls `connection_lost` twice.
            asyncio.get_running_loop().call_soon(self._release)
        elif self._then is not None:
            then, self._then = self._then, None
            then()
        else:
            self.ready = True
            if self.live is not None:
                self.live.catch_up(self)

    def _release(self) -> None:
        """Close the transport; pass the socket on if it may be used again."""
        if self._transport is None or self._transport.is_closing():
            # Lost, or released before: an end right after `connection_made` asks for it twice.
            return
        kept: socket.socket | None = None
        if self._reuse is not None:
            with suppress(OSError):  # no file descriptor is left: the connection is closed
                kept = socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno()))
        # Closed first, so that this stream is no longer counted when the next request is read.
        self._transport.close()
        if kept is not None and self._reuse is not None:
            self._reuse(kept)


class Streams:
    """All open streams of this process: their limits, and the one timer that looks after them."""

    def __init__(self, chat: Chat, settings: Settings, metrics: Metrics) -> None:
        self._chat = chat
        self.metrics = metrics
        self._settings = settings
        self._open: dict[Connection, tuple[str, str]] = {}
        self._conversations: Counter[str] = Counter()
        self._addresses: Counter[str] = Counter()
        self._ending = False
        self._serve: Callable[[socket.socket], None] | None = None
        metrics.watch("chatserver_open_streams", "Streams that are open.", lambda: len(self))

    def __len__(self) -> int:
        return len(self._open)

    def give_back_to(self, serve: Callable[[socket.socket], None]) -> None:
        """Have the next requests of connections whose streams have ended in order read; see `Listener.serve`."""
        self._serve = serve

    def open(
        self,
        conversation_id: str,
        address: str,
        head: bytes,
        *,
        chunked: bool = False,
        until_done: bool = False,
        reusable: bool = False,
    ) -> Connection:
        """Return a connection yet to be made, counted from now on; see `Connection`.

        :raises TooManyStreams: if there are as many as may be
        :raises Draining: if all are being ended
        """
        if self._ending:
            raise Draining("This server is shutting down and opens no new streams.")
        limits = self._settings
        if len(self._open) >= limits.max_streams:
            raise TooManyStreams("This server has as many streams open as it may; try again later.")
        if self._conversations[conversation_id] >= limits.max_streams_per_conversation:
            raise TooManyStreams("This conversation has as many streams open as it may; close one.")
        if 0 < limits.max_streams_per_address <= self._addresses[address]:
            raise TooManyStreams("Your address has as many streams open as it may; close one.")
        reuse = self._serve if reusable else None
        connection = Connection(head, self._closed, chunked=chunked, until_done=until_done, reuse=reuse)
        if limits.stream_max_age_s:
            age = limits.stream_max_age_s * random.uniform(0.5, 1.5)
            connection.expires_at = asyncio.get_running_loop().time() + age
        self._open[connection] = (conversation_id, address)
        self._conversations[conversation_id] += 1
        self._addresses[address] += 1
        return connection

    def _closed(self, connection: Connection) -> None:
        conversation_id, address = self._open.pop(connection)
        for counter, name in ((self._conversations, conversation_id), (self._addresses, address)):
            counter[name] -= 1
            if not counter[name]:
                del counter[name]
        self._chat.unsubscribe(connection)

    async def tick_for_ever(self) -> None:
        """Send keep-alives, cut who takes nothing, end who has been here long enough."""
        await tasks.repeat(self._tick)

    async def _tick(self) -> None:
        await asyncio.sleep(_TICK_S)
        now = asyncio.get_running_loop().time()

        def tick(connection: Connection) -> None:
            if connection.tick(now, self._settings.keepalive_s, self._settings.slow_client_timeout_s):
                self.metrics.slow_clients.inc()
                conversation_id, _ = self._open[connection]
                logger.info("slow client disconnected", extra={"conversation": conversation_id})

        self._for_each(tick)

    def _for_each(self, act: Callable[[Connection], None]) -> None:
        """Do something with every connection; abort one that fails, and go on with the others."""
        for connection in list(self._open):
            try:
                act(connection)
            except Exception:
                conversation_id, _ = self._open[connection]
                logger.exception("a stream failed and is aborted", extra={"conversation": conversation_id})
                connection.abort()

    async def close(self) -> None:
        """End all streams, each once everything was written to it; abort those whose clients take too long."""
        self._ending = True
        try:
            async with asyncio.timeout(_PARTING_S):
                while self._open:
                    self._for_each(_finish_if_told)
                    await asyncio.sleep(_PARTING_LOOK_S)
        except TimeoutError:
            for connection in list(self._open):
                connection.abort()


def _finish_if_told(connection: Connection) -> None:
    if connection.live is None or connection.live.is_caught_up(connection):
        connection.finish()
