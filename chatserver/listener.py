"""Accepts the connections of this process, counts them and limits them.

A connection counts from `accept` until its socket is closed, by the HTTP server or by the transport of a stream. Beyond
the limit a client gets a 503 and is disconnected, so that file descriptors remain for MongoDB, the source of replies
and the log.
"""

import asyncio
import json
import logging
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from http import HTTPStatus

from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream

from chatserver.errors import TooManyConnections
from chatserver.metrics import Metrics

logger = logging.getLogger(__name__)

REFUSED_AT_ONCE = 32
"""Connections beyond the limit that are answered at the same time; any more are closed without an answer."""
_ACCEPTED_AT_ONCE = 128
"""Connections accepted before other callbacks of the event loop run."""
_PAUSE_S = 1.0
"""How long accepting pauses after it has failed; also the shortest time between two log records."""
_REFUSAL_S = 2.0
"""How long a refused client may take to send its request and to read the answer."""


class _Connection(socket.socket):
    """An accepted socket that reports its end.

    asyncio and Tornado close it; uvloop detaches it and closes its descriptor.
    """

    __slots__ = ("on_end",)
    on_end: Callable[[], None] | None

    def close(self) -> None:
        super().close()
        self._report_end()

    def detach(self) -> int:
        descriptor = super().detach()
        self._report_end()
        return descriptor

    def _report_end(self) -> None:
        if self.on_end is not None:
            on_end, self.on_end = self.on_end, None
            on_end()


class Listener:
    """Accepts connections and passes them to an HTTP server.

    :param limit: the number of connections that may be open
    """

    def __init__(self, server: HTTPServer, limit: int, metrics: Metrics) -> None:
        self._sockets: Sequence[socket.socket] = ()
        self._server = server
        self._limit = limit
        self._open = 0
        self._refused = 0
        self._unreported = 0
        self._refusing: set[asyncio.Task[None]] = set()
        self._pausing: asyncio.TimerHandle | None = None
        self._reporting: asyncio.TimerHandle | None = None
        metrics.watch("chatserver_open_connections", "Open connections.", lambda: self.open)
        metrics.watch(
            "chatserver_refused_connections",
            "Connections refused at the limit.",
            lambda: self._refused,
            counter=True,
        )

    @property
    def open(self) -> int:
        """The number of connections that are open."""
        return self._open

    def start(self, sockets: Sequence[socket.socket]) -> None:
        """Accept connections from now on.

        :param sockets: bound, listening and non-blocking; closed by `stop`
        """
        self._sockets = sockets
        self._start_accepting()

    def _start_accepting(self) -> None:
        self._pausing = None
        loop = asyncio.get_running_loop()
        for listening in self._sockets:
            loop.add_reader(listening, self._accept, listening)

    def stop(self) -> None:
        """Stop accepting connections. Open ones stay open."""
        self._stop_accepting()
        if self._pausing is not None:
            self._pausing.cancel()
        if self._reporting is not None:
            self._reporting.cancel()
            self._report_refused()
        for task in self._refusing:
            task.cancel()
        for listening in self._sockets:
            listening.close()

    def serve(self, connection: socket.socket) -> None:
        """Count a connection and have the HTTP server read its next request.

        :param connection: owned by the listener and the server from now on
        """
        counted = _Connection(connection.family, connection.type, connection.proto, fileno=connection.detach())
        counted.on_end = self._ended
        self._open += 1
        try:
            address = counted.getpeername()
            counted.setblocking(False)
            server = self._server
            server.handle_stream(
                IOStream(counted, server.max_buffer_size, read_chunk_size=server.read_chunk_size), address
            )
        except OSError:  # the client has already disconnected
            counted.close()
        except Exception:
            # Logged here, so that the connections after this one are accepted.
            counted.close()
            logger.exception("a connection could not be served")

    def _ended(self) -> None:
        self._open -= 1

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, _ = listening.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:  # by its client, while it waited
                continue
            except OSError as error:
                # Usually out of file descriptors. The socket stays readable: without a pause this would be called again
                # at once, in a busy loop.
                self._pause(error)
                return
            if self._open < self._limit:
                self.serve(connection)
            else:
                self._refuse(connection)

    def _stop_accepting(self) -> None:
        loop = asyncio.get_running_loop()
        for listening in self._sockets:
            loop.remove_reader(listening)

    def _pause(self, error: OSError) -> None:
        logger.error("no connection can be accepted: %s; tried again in %g s", error.strerror, _PAUSE_S)
        self._stop_accepting()
        self._pausing = asyncio.get_running_loop().call_later(_PAUSE_S, self._start_accepting)

    # -- beyond the limit ------------------------------------------------------------------------------------------

    def _refuse(self, connection: socket.socket) -> None:
        self._refused += 1
        self._unreported += 1
        if self._reporting is None:
            self._reporting = asyncio.get_running_loop().call_later(_PAUSE_S, self._report_refused)
        if len(self._refusing) >= REFUSED_AT_ONCE:
            connection.close()
            return
        task = asyncio.get_running_loop().create_task(_answer_refused(connection))
        self._refusing.add(task)
        task.add_done_callback(self._refusing.discard)

    def _report_refused(self) -> None:
        logger.warning("connections refused: %d; %d may be open (MAX_CONNECTIONS)", self._unreported, self._limit)
        self._unreported, self._reporting = 0, None


async def _answer_refused(connection: socket.socket) -> None:
    """Answer the first request of a connection with 503, and close it once the client has."""
    loop = asyncio.get_running_loop()
    connection.setblocking(False)
    with connection, suppress(OSError, TimeoutError):  # the client has disconnected, or is slow
        async with asyncio.timeout(_REFUSAL_S):
            await loop.sock_recv(connection, 65536)
            await loop.sock_sendall(connection, _refusal())
            connection.shutdown(socket.SHUT_WR)
            # Closing a socket with unread bytes resets the connection, and the client might never see the answer.
            while await loop.sock_recv(connection, 65536):
                pass


def _refusal() -> bytes:
    problem = TooManyConnections()
    request_id = secrets.token_hex(16)
    content = json.dumps(problem.document(request_id)).encode() + b"\n"
    head = (
        f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\n"
        "Content-Type: application/problem+json\r\n"
        "Cache-Control: no-store\r\n"
        "Connection: close\r\n"
        f"Content-Length: {len(content)}\r\n"
        f"Retry-After: {problem.retry_after_s}\r\n"
        "X-Content-Type-Options: nosniff\r\n"
        f"X-Request-Id: {request_id}\r\n\r\n"
    )
    return head.encode() + content
