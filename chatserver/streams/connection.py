"""The connection of one stream: an asyncio protocol on a socket that the HTTP server has handed over."""

import asyncio
import fcntl
import os
import socket
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from math import inf
from time import time
from typing import cast

from tornado.iostream import IOStream

from chatserver.hub import MAX_WRITE, LiveConversation
from chatserver.wire import Format
from chatserver.wire.chunked import LAST_CHUNK, chunk

TICK_S = 1.0
"""Seconds between two calls of `Connection.tick`."""
_SEND_BUFFER = 128 * 1024
"""`SO_SNDBUF` in bytes: bounds the kernel's memory for a client that stops reading."""


class Connection(asyncio.Protocol):
    """A stream's connection: a `hub.Subscriber`, and the only writer to its socket.

    `pause_writing` and `resume_writing` are the back-pressure: while the kernel has not taken all bytes, the connection
    is not `ready` and its cursor stays, so that the frames wait in the conversation's log.

    :param head: the response's status line and headers
    :param on_close: called once, when the stream is over
    :param chunked: whether the head announces a chunked body
    :param valid_until: when the caller's credential expires, in seconds since 1970
    :param reuse: takes the socket after an orderly end, for the next request; None: the connection is closed
    """

    def __init__(
        self,
        head: bytes,
        on_close: Callable[["Connection"], None],
        *,
        stream_format: Format,
        chunked: bool,
        until_done: bool = False,
        valid_until: float = inf,
        reuse: Callable[[socket.socket], None] | None = None,
    ) -> None:
        self.cursor = 0
        self.ready = False
        self.format = stream_format
        self.chunked = chunked
        self.until_done = until_done
        self.valid_until = valid_until
        self.live: LiveConversation | None = None
        self.expires_at: float | None = None
        """The event loop's time at which the stream ends, in seconds; None: never."""
        self.closed = False
        self.ending = False
        """Whether the response is being ended, or has ended: no more data is accepted."""
        self.paused = False
        """Whether the kernel has not taken all bytes of the last write."""
        self.progress = (0, 0, 0)
        """The cursor, the backlog and the bytes in flight at the last tick: they change when the client reads."""
        self.write: Callable[[bytes], None]  # set to the transport's own method, which saves a call for each write
        self._on_close = on_close
        self._reuse = reuse
        self._backlog = bytearray(head)
        self._on_replayed: Callable[[], None] | None = None
        self._transport: asyncio.Transport | None = None
        self._progress_at = 0.0

    async def attach(self, stream: IOStream) -> None:
        """Take over the socket of a request from the HTTP server, which has detached it."""
        if stream.closed():
            self.release()
            return
        if stream._read_buffer_size:
            self.close_at_end()
        stream.io_loop.remove_handler(stream.socket)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        await asyncio.get_running_loop().connect_accepted_socket(lambda: self, stream.socket)

    # -- the subscriber ------------------------------------------------------------------------------------------

    def replay(self, data: bytes, then: Callable[[], None] | None = None) -> None:
        if time() >= self.valid_until:
            # It has expired while MongoDB was read. Not `finish`: the client lacks at least this data.
            self.disconnect()
        elif not self.ending:
            self.ready = False
            self._backlog += self._wrap(data)
            self._on_replayed = then
            self._flush()

    def end(self, data: bytes = b"") -> None:
        if not self.ending:
            # Not by `replay`, after which the conversation's next frames would follow.
            if data:
                self._backlog += self._wrap(data)
            if self.chunked:
                self._backlog += LAST_CHUNK
            self._start_ending()

    def disconnect(self) -> None:
        if not self.ending:
            self._reuse = None
            self._start_ending()

    def finish(self) -> None:
        if self.live is not None and self.live.is_complete_for(self):
            self.end()
        else:
            self.disconnect()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def release(self) -> None:
        """Release everything, because the connection is lost or never came up."""
        self.ready = False
        self._transport = None
        self.ending = True
        self._backlog.clear()
        if not self.closed:
            self.closed = True
            self._on_close(self)

    # -- the protocol --------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        # A byte that the kernel does not take at once pauses writing, so that frames wait in the log, not in a buffer.
        self._transport.set_write_buffer_limits(high=0)
        self.write = self._transport.write
        loop = asyncio.get_running_loop()
        self._progress_at = loop.time()
        # Later: uvloop begins to read after this call, which would undo the pause of reading at a stream's end.
        loop.call_soon(self._flush)

    def data_received(self, data: bytes) -> None:
        self.close_at_end()

    def close_at_end(self) -> None:
        """Close the connection after the stream: the client has sent bytes that the HTTP server will not see."""
        self._reuse = None

    def pause_writing(self) -> None:
        self.ready = False
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.release()

    # -- time ----------------------------------------------------------------------------------------------------

    def tick(self, now: float, keepalive_s: float, slow_s: float) -> bool:
        """Send a keep-alive if one is due; end the stream if it has expired; abort it if the client stopped reading.

        Called every `TICK_S`.

        :param now: the event loop's time, in seconds
        :param keepalive_s: the longest time without a write, in seconds
        :param slow_s: the time without progress after which a client that has bytes to read is aborted, in seconds
        :return: whether the connection was aborted
        """
        if self._transport is None:
            return False
        progress = (self.cursor, len(self._backlog), self._bytes_in_flight() if self.paused else 0)
        if progress != self.progress:
            self.progress, self._progress_at = progress, now
        elif self.paused and now - self._progress_at >= slow_s:
            self.abort()
            return True
        elif self.ready and now - self._progress_at >= keepalive_s - TICK_S:
            # Ready means that the last frame was written to its last byte: the keep-alive never lands inside it.
            self._progress_at = now
            self.write(self._wrap(self.format.ping(keepalive_s)))
        if (self.expires_at is not None and now >= self.expires_at) or time() >= self.valid_until:
            self.finish()
        return False

    # -- buffers ------------------------------------------------------------------------------------------------

    @property
    def backlog_bytes(self) -> int:
        """The bytes of replayed frames that are not yet written."""
        return len(self._backlog)

    @property
    def buffered_bytes(self) -> int:
        """The bytes that the transport has and the kernel has not."""
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    @property
    def client_socket(self) -> socket.socket:
        """The socket, as the transport exposes it; only while the connection is up."""
        assert self._transport is not None
        return cast(socket.socket, self._transport.get_extra_info("socket"))

    def _bytes_in_flight(self) -> int:
        """Return the bytes that the client has not acknowledged: ours, and on Linux the kernel's (tcp(7), SIOCOUTQ)."""
        unsent = self.buffered_bytes
        if sys.platform == "linux":
            unsent += int.from_bytes(
                fcntl.ioctl(self.client_socket.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder
            )
        return unsent

    # -- writing -------------------------------------------------------------------------------------------------

    def _wrap(self, data: bytes) -> bytes:
        """Return bytes of this stream alone as its body carries them; the log wraps shared frames."""
        return chunk(data) if self.chunked else data

    def _start_ending(self) -> None:
        """Write the backlog, then close the connection."""
        self.ready = False
        self.ending = True
        self._flush()

    def _flush(self) -> None:
        """Write the backlog in parts; then end, or continue with the conversation's log."""
        if self._transport is None:
            return
        if self.ending and self._reuse is not None:
            # Before the last chunk is written: the HTTP server must read the bytes that the client sends after it.
            self._transport.pause_reading()
        while self._backlog and not self.paused:
            part = bytes(self._backlog[:MAX_WRITE])
            del self._backlog[:MAX_WRITE]
            self.write(part)
        if self._backlog or self.paused:
            return
        if self.ending:
            # Not at once: a transport that is closed inside `resume_writing` calls `connection_lost` twice.
            asyncio.get_running_loop().call_soon(self._close)
        elif self._on_replayed is not None:
            on_replayed, self._on_replayed = self._on_replayed, None
            on_replayed()
        elif time() >= self.valid_until:
            self.finish()
        else:
            self.ready = True
            if self.live is not None:
                self.live.catch_up((self,))

    def _close(self) -> None:
        """Close the transport; pass the socket on if it is to be reused."""
        if self._transport is None or self._transport.is_closing():
            # Lost, or closed before: an end right after `connection_made` calls this twice.
            return
        reused: socket.socket | None = None
        if self._reuse is not None:
            with suppress(OSError):  # no file descriptor is left: the connection is closed
                reused = socket.socket(fileno=os.dup(self.client_socket.fileno()))
        # Close first, so that this stream is no longer counted when the next request is read.
        self._transport.close()
        if reused is not None and self._reuse is not None:
            self._reuse(reused)
