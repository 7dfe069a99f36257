"""A TCP proxy that aborts connections, to test how clients recover."""

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Protocol, Self


class Cutter(Protocol):
    """Decides where to abort one connection."""

    def take(self, data: bytes) -> tuple[bytes, bool]:
        """Take bytes for the client; return the bytes to pass on, and whether to abort the connection after them."""

    def rest(self) -> bytes:
        """Return the bytes held back, once the server has closed the connection."""


class After:
    """Aborts a connection after a number of bytes."""

    def __init__(self, n_bytes: int) -> None:
        self._left = n_bytes

    def take(self, data: bytes) -> tuple[bytes, bool]:
        part = data[: self._left]
        self._left -= len(part)
        return part, not self._left

    def rest(self) -> bytes:
        return b""


class CuttingProxy:
    """Passes bytes on between its clients and a server on 127.0.0.1, and aborts connections on request."""

    def __init__(self) -> None:
        self.port = 0
        self.refuse = False
        """Whether to close new connections at once."""
        self.connections = 0
        """The number of connections passed on so far, without the refused ones."""
        self.refused = 0
        self.cuts = 0
        """The number of connections aborted by `cut` or by a cutter."""
        self.resets = False
        """Whether a cutter ends a client's connection with a RST instead of a FIN."""
        self._cutter: Callable[[], Cutter] | None = None
        self._target = 0
        self._server: asyncio.Server | None = None
        self._lines: set[asyncio.WriteTransport] = set()
        self._streams: set[asyncio.WriteTransport] = set()
        self._muted: set[asyncio.WriteTransport] = set()
        self.streams = 0
        """The number of requests for a stream so far."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()

    async def start(self, target_port: int, port: int = 0) -> int:
        """Listen on `port` (0: any free port), pass bytes on to `target_port` and return the port."""
        self._target = target_port
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self.port

    def aim(self, target_port: int) -> None:
        """Pass new connections on to another port from now on."""
        self._target = target_port

    def cut(self) -> int:
        """Abort all open connections in both directions, with the bytes in transit; return their number."""
        lines = list(self._lines)
        for line in lines:
            line.abort()
        self.cuts += len(lines)
        return len(lines)

    def mute_streams(self) -> int:
        """Pass no more bytes on for the open streams, without closing them; return their number."""
        self._muted |= self._streams
        return len(self._streams)

    def cut_after(self, n_bytes: int | None) -> None:
        """Abort each new connection after `n_bytes` to the client, headers included; None: stop aborting."""
        self.cut_by(None if n_bytes is None else lambda: After(n_bytes))

    def cut_by(self, cutter: Callable[[], Cutter] | None) -> None:
        """Abort each new connection where its own cutter decides, made by `cutter`; None: stop aborting."""
        self._cutter = cutter

    async def wait_for(self, *, connections: int = 0, refused: int = 0, cuts: int = 0) -> None:
        """Wait until the total numbers of connections passed on, refused and aborted have reached these."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self.connections >= connections and self.refused >= refused and self.cuts >= cuts
            )

    async def close(self) -> None:
        """Stop listening and abort all connections."""
        if self._server is not None:
            self._server.close()
            self.cut()  # ends the tasks, too; asyncio's streams would log a cancellation
            await asyncio.gather(*self._tasks)
            await self._server.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self.refuse:
                await self._count(refused=1)
            else:
                await self._pass_on(reader, writer)
        except OSError:
            pass  # one end has closed the connection: close the other
        finally:
            await _drop(writer)
            self._tasks.discard(task)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream = await asyncio.open_connection("127.0.0.1", self._target)
        self._lines.add(writer.transport)
        cutter = self._cutter() if self._cutter else None
        try:
            await self._count(connections=1)
            up = asyncio.create_task(_pump(reader, upstream, None, partial(self._passes_up, writer.transport)))
            down = asyncio.create_task(
                _pump(upstream_reader, writer, cutter, lambda _: writer.transport not in self._muted)
            )
            try:
                await asyncio.wait((up, down), return_when=asyncio.FIRST_COMPLETED)
                if down.done() and down.exception() is None and down.result():
                    if self.resets:
                        # A socket that is closed without lingering is reset (socket(7), SO_LINGER).
                        linger = struct.pack("ii", 1, 0)
                        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    await self._count(cuts=1)
            finally:
                up.cancel()
                down.cancel()
                await asyncio.gather(up, down, return_exceptions=True)
        finally:
            for lines in (self._lines, self._streams, self._muted):
                lines.discard(writer.transport)
            await _drop(upstream)

    def _passes_up(self, line: asyncio.WriteTransport, data: bytes) -> bool:
        # A client may use the connection of an ended stream for its next request.
        self._streams.discard(line)
        if data.startswith(b"GET /chat/stream/"):
            self._streams.add(line)
            self.streams += 1
        return line not in self._muted

    async def _count(self, *, connections: int = 0, refused: int = 0, cuts: int = 0) -> None:
        async with self._changed:
            self.connections += connections
            self.refused += refused
            self.cuts += cuts
            self._changed.notify_all()


async def _drop(writer: asyncio.StreamWriter) -> None:
    """Close a connection and wait until its socket is closed; abort it if the other end reads nothing for a second."""
    writer.close()
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(1):
            await writer.wait_closed()
    writer.transport.abort()


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cutter: Cutter | None, passes: Callable[[bytes], bool]
) -> bool:
    """Pass bytes on until the end or an abort; return whether it was an abort. Drop bytes that `passes` rejects."""
    with suppress(OSError):
        while data := await reader.read(65536):
            if not passes(data):
                continue
            part, cut = cutter.take(data) if cutter else (data, False)
            writer.write(part)
            await writer.drain()
            if cut:
                return True
        if cutter:
            writer.write(cutter.rest())
            await writer.drain()
    return False
