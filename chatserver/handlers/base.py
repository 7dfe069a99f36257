"""The base of all handlers: the checks before the body is read, ids and parameters, JSON answers."""

import asyncio
import json
import logging
import re
import secrets
import sys
from asyncio import Future
from collections.abc import AsyncIterator, Collection
from time import time
from typing import Any, ClassVar, NamedTuple

from tornado.httputil import HTTPServerRequest
from tornado.iostream import IOStream, StreamClosedError
from tornado.web import stream_request_body

from chatserver import schemas
from chatserver.auth import Caller
from chatserver.chat import Chat
from chatserver.errors import (
    ChatError,
    CrossSite,
    HeadersTooLarge,
    HostNotAllowed,
    InvalidId,
    InvalidRequest,
    NotFound,
    PayloadTooLarge,
    TokenExpired,
    TooManyConnections,
)
from chatserver.handlers.access import client_address, cors_headers, host_is_allowed, is_cross_site
from chatserver.handlers.body import RequestBody
from chatserver.handlers.identity import Identity
from chatserver.handlers.problems import ProblemHandler
from chatserver.metrics import Metrics
from chatserver.reading import Reading
from chatserver.records import Key
from chatserver.settings import Settings
from chatserver.streams import Streams

logger = logging.getLogger(__name__)

COMMON_ERRORS = (ChatError, HeadersTooLarge, HostNotAllowed, TooManyConnections)
"""The errors of every method. Methods that pages of other sites may not use also raise `CrossSite`."""
_CHUNK_BYTES = 64 * 1024
"""A long answer is sent in chunks of this size; a shorter one is sent whole."""
_ID = re.compile(r"[0-9a-fA-F]{24}\Z", re.ASCII)
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}\Z", re.ASCII)
_KEY = re.compile(r"[\x21-\x7e]{1,255}\Z", re.ASCII)


class Services(NamedTuple):
    """The parts of a server that its handlers use."""

    chat: Chat
    reading: Reading
    streams: Streams
    metrics: Metrics
    identity: Identity
    settings: Settings


@stream_request_body
class BaseHandler(ProblemHandler):
    """A handler of this server."""

    cross_site_methods: ClassVar[Collection[str]] = ("GET", "HEAD", "OPTIONS")
    """The methods that pages of any site may use: without CORS they cannot read the answer, and nothing changes."""
    is_public: ClassVar[bool] = False
    """Whether the resource is the same for all users, so that none has to be identified."""

    def initialize(self, services: Services) -> None:
        self.services = services
        self.config = settings = services.settings
        self.log_fields = {}
        self.is_refused = False
        self.caller = Caller(None, ambient=True)
        self._body = RequestBody(self.request.headers, settings.max_body_bytes)
        given = self.request.headers.get("X-Request-Id", "")
        self.request_id = given if _REQUEST_ID.match(given) else secrets.token_hex(16)
        self.address = client_address(self.request.remote_ip or "", self.request.headers, settings.trusted_proxies)

    def common_headers(self) -> dict[str, str]:
        """Return the headers of every answer, including streams and errors."""
        return {
            "X-Content-Type-Options": "nosniff",
            "X-Request-Id": self.request_id,
            **cors_headers(self.request.headers, self.config),
        }

    def flush(self, include_footers: bool = False) -> "Future[None]":
        """Send the headers, including the common ones, and the bytes written so far."""
        self.clear_header("Server")
        for name, value in self.common_headers().items():
            self.set_header(name, value)
        return super().flush(include_footers)

    def options(self, *_: str) -> None:
        """Answer a preflight (Fetch standard, "CORS protocol"), or name the methods that are supported."""
        self.set_header("Allow", ", ".join(self.allowed_methods()))
        if "Access-Control-Allow-Origin" in self.common_headers():
            self.set_header("Access-Control-Allow-Methods", ", ".join(self.allowed_methods()))
            self.set_header(
                "Access-Control-Allow-Headers",
                "Authorization, Content-Type, Idempotency-Key, Last-Event-ID, X-Request-Id",
            )
            self.set_header("Access-Control-Max-Age", "600")
        self.set_status(204)
        self.finish()

    async def prepare(self) -> None:
        """Check the request before its body is read. A handler that overrides this must await it first.

        :raises HeadersTooLarge, PayloadTooLarge:
        """
        if _head_bytes(self.request) > self.config.max_header_bytes:
            raise HeadersTooLarge
        self._body.check_length()
        if self.is_public:
            self._body.discard()  # no method of these reads one
        try:
            await self._admit()
        except ChatError as refusal:
            self.refuse(refusal)

    async def _admit(self) -> None:
        """Find out who sends the request, and whether a page may send it.

        :raises HostNotAllowed, CrossSite, KeysUnavailable:
        :raises Unauthenticated: if there is no valid credential
        """
        if not host_is_allowed(self.request.host_name, self.config.allowed_hosts, self.config.host):
            raise HostNotAllowed
        if not self.is_public and self.request.method != "OPTIONS":
            self.caller = await self.services.identity.identify(self.request.headers, self.request.remote_ip or "")
            if self.caller.owner is not None:
                self.log_fields["owner"] = self.caller.owner
        if (
            self.caller.ambient
            and self.request.method not in self.cross_site_methods
            and is_cross_site(
                self.request.headers, self.request.host_name, self.config, has_user=self.caller.owner is not None
            )
        ):
            raise CrossSite

    def refuse(self, refusal: ChatError) -> None:
        """Answer with an error once the body is read; an answer before that would close the connection."""

        def answer(*_: str) -> None:
            raise refusal

        assert self.request.method is not None
        setattr(self, self.request.method.lower(), answer)
        self.is_refused = True
        self._body.discard()

    def data_received(self, chunk: bytes) -> None:
        try:
            self._body.add(chunk)
        except PayloadTooLarge as error:
            if not self._finished:
                self.send_error(error.status, exc_info=sys.exc_info())

    # -- in ------------------------------------------------------------------------------------------------------

    def json_body(self, schema: str) -> Any:
        """Return the request's JSON body; see `RequestBody.json`."""
        return self._body.json(schema, self.config.max_input_chars)

    def query(self, schema: str) -> dict[str, Any]:
        """Return the request's query parameters, integers as `int`.

        :raises InvalidRequest: naming each invalid parameter
        """
        values: dict[str, Any] = {}
        if not self.request.query:
            return values  # every parameter is optional
        for name, kind in schemas.parameter_types(schema).items():
            texts = self.get_query_arguments(name, strip=False)
            if len(texts) > 1:
                detail = "must be given only once"
                raise InvalidRequest(f"/{name} {detail}.", fields=[{"pointer": f"/{name}", "detail": detail}])
            for text in texts:
                values[name] = int(text) if kind == "integer" and re.fullmatch("[0-9]{1,9}", text) else text
        schemas.validate(schema, values)
        return values

    def key(self, text: str) -> Key:
        """Return the caller's conversation with an id from the path, and add the id to the access log.

        :raises InvalidId: if it is not 24 hex digits
        """
        if _ID.match(text) is None:
            raise InvalidId
        self.log_fields["conversation"] = text.lower()
        return Key(self.caller.owner, text.lower())

    def idempotency_key(self) -> str | None:
        """Return the Idempotency-Key header, if there is one.

        :raises InvalidRequest: if it is not 1 to 255 visible ASCII characters
        """
        keys = self.request.headers.get_list("Idempotency-Key")
        if not keys:
            return None
        if len(keys) > 1 or _KEY.match(keys[0]) is None:
            raise InvalidRequest("The Idempotency-Key header must be 1 to 255 visible ASCII characters, once.")
        return keys[0]

    def compute_etag(self) -> str | None:
        """Return None: answers are not to be cached."""
        return None

    # -- out -----------------------------------------------------------------------------------------------------

    def send_json(self, value: object, status: int = 200) -> None:
        """Send a value as JSON."""
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        self.finish(json.dumps(value, ensure_ascii=False) + "\n")

    async def send_chunks(self, parts: AsyncIterator[bytes], media_type: str = "application/json") -> None:
        """Send a text while it is produced: whole if it is short, else in chunks, as fast as the client reads.

        A failure after the first chunk aborts the connection, since an orderly end would make the answer seem complete.
        So does a client that has not taken a chunk within `SLOW_CLIENT_TIMEOUT_S`, or whose credential expires.
        """
        self.set_header("Content-Type", media_type)
        self.set_header("Cache-Control", "no-store")
        waiting = 0
        try:
            async for part in parts:
                for begin in range(0, len(part), _CHUNK_BYTES):
                    chunk = part[begin : begin + _CHUNK_BYTES]
                    if waiting + len(chunk) > _CHUNK_BYTES:
                        await self._send_chunk()
                        if self.request.method == "HEAD":
                            return
                        waiting = 0
                    self.write(chunk)
                    waiting += len(chunk)
            if self._headers_written:
                await self._send_chunk()
        except Exception as failure:
            if not self._headers_written:
                raise
            if isinstance(failure, TimeoutError):
                logger.info("slow client disconnected", extra={"request": self.request_id})
            elif isinstance(failure, ChatError):
                self.log_fields["code"] = failure.code
            elif not isinstance(failure, StreamClosedError):
                self.log_exception(*sys.exc_info())
            self.detach().close()
            return
        if self._headers_written and self.request.version == "HTTP/1.0":
            self.detach().close()  # the end of the connection ends the answer
        else:
            self.finish()

    async def _send_chunk(self) -> None:
        """Send the buffered bytes, and wait until the kernel has taken them.

        :raises TokenExpired: if the caller's credential has expired since the request; a client that reads slowly would
            receive even what is written much later
        :raises TimeoutError: if that takes longer than `SLOW_CLIENT_TIMEOUT_S`
        :raises StreamClosedError: if the connection is closed
        """
        if time() >= self.caller.expires_at:
            raise TokenExpired("expired")
        if self.request.version == "HTTP/1.0":
            # Without it Tornado does not announce keep-alive: only the end of the connection ends the answer.
            self.request.headers.pop("Connection", None)
        async with asyncio.timeout(self.config.slow_client_timeout_s):
            await self.flush()

    def detach(self) -> IOStream:
        """Take the connection from Tornado, log the request and return the connection's stream."""
        stream = super().detach()
        self.application.log_request(self)
        self.ui.clear()  # its reference cycle would keep a handler that never finishes alive after its socket is closed
        return stream


class NoSuchRoute(BaseHandler):
    """Every path that is not in the routing table."""

    is_public = True

    def get(self, *_: str) -> None:
        raise NotFound

    head = post = put = patch = delete = options = get


def _head_bytes(request: HTTPServerRequest) -> int:
    """Return the size in bytes of a request's line and headers, written without optional white space."""
    line = len(f"{request.method} {request.uri} {request.version}\r\n")
    return line + sum(len(name) + len(value) + 4 for name, value in request.headers.get_all())
