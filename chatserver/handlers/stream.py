"""The stream: `GET /chat/stream/:conversationId`, Server-Sent Events.

The stream resumes from the position in `Last-Event-ID`, else in `?lastEventId=`. It opens with `retry: 1000`, a
comment, and a block with `event: stream` and an `id:` but no data, which clients do not dispatch. Then come events:
each has its name as `event:`, JSON as `data:`, and the position right after it as `id:`, in this order.

    token   {"text"}                            the next characters of the reply
    done    {"messageId", "status"}             the reply has ended and is stored; status: complete, stopped
    error   {"code", "message", "messageId"}    the reply failed or was interrupted; what was said is stored
    input   {"messageId", "text", "createdAt"}  what a user said
    message {"messageId", "role", "text", "createdAt"}
                                                a message of another role, which another application stored
    reset   {}                                  the position is unknown: fetch the history again; the stream ends
    ping    {"everyS"}                          keep-alive, without an `id`

A `ping` is sent at the beginning, and then whenever nothing else was sent for `everyS` seconds (`KEEPALIVE_S`): a
client that has received nothing for two and a half times as long has lost its connection, and should open another.
The response stays open across turns. It ends after a `reset`, after the first `done` or `error` with `?until=done`, at
about `STREAM_MAX_AGE_S`, and at shutdown.

The body is chunked in HTTP/1.1. Its last chunk is sent only if the client has received everything and no reply runs, so
that a client can tell an end from a connection that was lost (RFC 9112, 8). In HTTP/1.0 the body ends with the
connection.

The request is an ordinary one up to its headers; then its socket goes to an asyncio transport, whose protocol is the
subscriber: `pause_writing` and `resume_writing` are the back-pressure, `connection_lost` the end. After the last chunk
the socket goes back to the HTTP server, which reads the connection's next request. It must not be closed then: a pooled
client would send its next post into a closed connection. Nor may the response announce `Connection: close`: Node's
`fetch()` would take a lost connection for the end of the body.
"""

import asyncio
import logging
import socket

from chatserver import positions
from chatserver.chat import Chat
from chatserver.errors import ChatError, DatabaseUnavailable, Draining, InvalidId, InvalidRequest, TooManyStreams
from chatserver.handlers.base import BaseHandler
from chatserver.handlers.problems import raises
from chatserver.settings import Settings
from chatserver.streams import Connection, Streams

logger = logging.getLogger(__name__)

_HEAD = (
    "HTTP/1.1 200 OK\r\n"
    "Content-Type: text/event-stream\r\n"
    # A proxy that compresses holds small events back until it has a block of them; no-transform forbids it.
    "Cache-Control: no-cache, no-transform\r\n"
    "X-Accel-Buffering: no\r\n"
)
_SEND_BUFFER = 128 * 1024
"""`SO_SNDBUF` in bytes: bounds the kernel memory held by a client that stops reading."""


class StreamHandler(BaseHandler):
    """`/chat/stream/:conversationId`"""

    # An open stream counts against the limits, also for a page that cannot read it.
    cross_site_methods = ("HEAD", "OPTIONS")

    def initialize(self, chat: Chat, settings: Settings, streams: Streams) -> None:  # type: ignore[override]
        super().initialize(chat, settings)
        self.streams = streams
        self._refusal: ChatError | None = None

    async def prepare(self) -> None:
        """Stream the conversation once the headers are there: only then does Tornado let go of a socket."""
        await super().prepare()
        if self.request.method == "GET":
            try:
                await self._stream(*self.path_args)
            except ChatError as refusal:
                self._refusal = refusal

    @raises(InvalidRequest, InvalidId, TooManyStreams, DatabaseUnavailable, Draining)
    def get(self, _conversation_id: str) -> None:
        """Say why there is no stream: not before the body is read, or Tornado closes the connection with it."""
        assert self._refusal is not None
        raise self._refusal

    async def _stream(self, conversation_id: str) -> None:
        """Stream the conversation from the client's position on."""
        conversation_id = self.conversation_id(conversation_id)
        query = self.query("stream")
        asked = self.request.headers.get("Last-Event-ID") or query.get("lastEventId") or None
        position = positions.parse_position(asked) if asked else None
        if position is not None:
            self.streams.metrics.resumes.inc()
        chunked = self.request.version == "HTTP/1.1"
        options = self.request.headers.get("Connection", "").lower().split(",")
        reusable = chunked and "close" not in (each.strip() for each in options)
        connection = self.streams.open(
            conversation_id,
            self.address,
            self._head(chunked=chunked, reusable=reusable),
            chunked=chunked,
            until_done=query.get("until") == "done",
            reusable=reusable,
        )
        try:
            if asked and position is None:
                self.chat.refuse(connection)
            else:
                await self.chat.subscribe(conversation_id, position, connection)
            await self._hand_over(connection)
        except BaseException:
            connection.leave()
            raise

    def _head(self, *, chunked: bool, reusable: bool) -> bytes:
        headers = {"Connection": "keep-alive" if reusable else "close", **self.common_headers()}
        if chunked:
            headers["Transfer-Encoding"] = "chunked"
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        return f"{_HEAD}{''.join(lines)}\r\n".encode("latin-1")

    async def _hand_over(self, connection: Connection) -> None:
        """Give the socket to a transport of the loop; Tornado, and this handler, are done with it."""
        stream = self.detach()
        if stream.closed():
            connection.leave()
            return
        if stream._read_buffer_size:
            connection.close_at_end()
        stream.io_loop.remove_handler(stream.socket)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, stream.socket)
