"""The stream: `GET /chat/stream/:conversationId` in our format, Server-Sent Events. docs/protocol.md is normative.

The stream resumes from the position in `Last-Event-ID`, else in `?lastEventId=`; `?until=done` ends it after one reply.

The body is chunked in HTTP/1.1. Its last chunk is sent only if the client has received everything and no reply runs, so
that a client can distinguish an end from a lost connection (RFC 9112, 8). In HTTP/1.0 the connection ends the body.

The request is an ordinary one up to its headers; then its socket goes to a `Connection`. After the last chunk the
socket goes back to the HTTP server, which reads the connection's next request. It must not be closed then: a pooled
client would send its next post into a closed connection. Nor may the response announce `Connection: close`: Node's
`fetch()` would treat a lost connection as the end of the body.
"""

from chatserver import positions
from chatserver.errors import ChatError, DatabaseUnavailable, Draining, InvalidId, InvalidRequest, TooManyStreams
from chatserver.handlers.base import BaseHandler
from chatserver.handlers.problems import raises
from chatserver.wire import sse

_HEAD = (
    "HTTP/1.1 200 OK\r\n"
    "Content-Type: text/event-stream\r\n"
    # A proxy that compresses holds small events back until it has a block of them; no-transform forbids it.
    "Cache-Control: no-cache, no-transform\r\n"
    "X-Accel-Buffering: no\r\n"
)


class StreamHandler(BaseHandler):
    """`/chat/stream/:conversationId`"""

    # An open stream counts against the limits, also for a page that cannot read it.
    cross_site_methods = ("HEAD", "OPTIONS")

    async def prepare(self) -> None:
        """Stream the conversation as soon as the headers are read: later, Tornado does not let go of the socket."""
        await super().prepare()
        if self.request.method == "GET" and not self.is_refused:
            try:
                await self._stream(*self.path_args)
            except ChatError as refusal:
                self.refuse(refusal)

    @raises(InvalidRequest, InvalidId, TooManyStreams, DatabaseUnavailable, Draining)
    def get(self, _conversation_id: str) -> None:
        """Never called: `prepare` streams the conversation, or refuses the request."""

    async def _stream(self, conversation_id: str) -> None:
        """Open a stream that starts at the client's position.

        :raises ChatError: if it is refused
        """
        conversation = self.key(conversation_id)
        query = self.query("stream")
        last_event_id = self.request.headers.get("Last-Event-ID") or query.get("lastEventId") or None
        position = positions.parse_position(last_event_id) if last_event_id else None
        chunked = self.request.version == "HTTP/1.1"
        options = self.request.headers.get("Connection", "").lower().split(",")
        reusable = chunked and "close" not in (each.strip() for each in options)
        connection = self.services.streams.open(
            conversation,
            self.address,
            self._head(chunked=chunked, reusable=reusable),
            stream_format=sse,
            resumes=position is not None,
            chunked=chunked,
            until_done=query.get("until") == "done",
            valid_until=self.caller.expires_at,
            reusable=reusable,
        )
        try:
            if last_event_id and position is None:
                self.services.reading.refuse(connection)
            else:
                await self.services.reading.subscribe(conversation, position, connection)
            await connection.attach(self.detach())
        except BaseException:
            connection.release()
            raise

    def _head(self, *, chunked: bool, reusable: bool) -> bytes:
        headers = {"Connection": "keep-alive" if reusable else "close", **self.common_headers()}
        if chunked:
            headers["Transfer-Encoding"] = "chunked"
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        return f"{_HEAD}{''.join(lines)}\r\n".encode("latin-1")
