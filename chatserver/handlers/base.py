"""What all handlers share: JSON in, JSON out, and the one place where errors become answers."""

import asyncio
import json
import logging
import re
import secrets
import string
import sys
from asyncio import Future
from collections.abc import AsyncIterator, Awaitable, Collection
from email.message import Message
from typing import Any, ClassVar
from urllib.parse import quote

from tornado.httputil import HTTPServerRequest
from tornado.iostream import IOStream, StreamClosedError
from tornado.web import HTTPError, RequestHandler, stream_request_body

from chatserver import schemas
from chatserver.chat import Chat
from chatserver.errors import (
    ChatError,
    CrossSite,
    HeadersTooLarge,
    HostNotAllowed,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from chatserver.handlers.access import client_address, cors_headers, host_is_allowed, is_cross_site
from chatserver.settings import Settings

logger = logging.getLogger(__name__)

_DISCARDED = 16 * 1024 * 1024
_PIECE = 64 * 1024
"""Bytes of a long answer that are sent at once; a shorter one is sent whole."""
_ID = re.compile(r"[0-9a-fA-F]{24}\Z", re.ASCII)
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}\Z", re.ASCII)
_KEY = re.compile(r"[\x21-\x7e]{1,255}\Z", re.ASCII)


@stream_request_body
class BaseHandler(RequestHandler):
    """A handler of this server.

    Bodies are taken as they come. Of one that is too large, up to `_DISCARDED` bytes are read, not kept: a connection
    that is closed before all is read is reset, and the client may never see why.
    """

    cross_site_methods: ClassVar[Collection[str]] = ("GET", "HEAD", "OPTIONS")
    """The methods that pages of any site may use: without CORS they cannot read the answer, and nothing changes."""

    def initialize(self, chat: Chat, settings: Settings) -> None:
        self.chat = chat
        self.config = settings
        # What the access log says of this request beside what it says of each.
        self.logged: dict[str, str] = {}
        self._body = bytearray()
        self._body_bytes = 0
        # The request's X-Request-Id, or one made for it.
        given = self.request.headers.get("X-Request-Id", "")
        self.request_id = given if _REQUEST_ID.match(given) else secrets.token_hex(16)
        # The client's: behind a proxy that the settings name, the one that it says.
        self.address = client_address(self.request.remote_ip or "", self.request.headers, settings.trusted_proxies)

    def common_headers(self) -> dict[str, str]:
        """Return the headers of every answer, streams and errors among them."""
        return {
            "X-Content-Type-Options": "nosniff",
            "X-Request-Id": self.request_id,
            **cors_headers(self.request.headers, self.config),
        }

    def flush(self, include_footers: bool = False) -> "Future[None]":
        """Send the headers, the common ones among them, with what has been written so far."""
        self.clear_header("Server")
        for name, value in self.common_headers().items():
            self.set_header(name, value)
        return super().flush(include_footers)

    def options(self, *_: str) -> None:
        """Answer a preflight (Fetch standard, "CORS protocol"), or say what is supported."""
        self.set_header("Allow", ", ".join(self.allowed_methods()))
        if "Access-Control-Allow-Origin" in self.common_headers():
            self.set_header("Access-Control-Allow-Methods", ", ".join(self.allowed_methods()))
            self.set_header(
                "Access-Control-Allow-Headers", "Content-Type, Idempotency-Key, Last-Event-ID, X-Request-Id"
            )
            self.set_header("Access-Control-Max-Age", "600")
        self.set_status(204)
        self.finish()

    def prepare(self) -> Awaitable[None] | None:
        """Refuse what is refused by its headers; what this returns is awaited before the body is read."""
        if _head_bytes(self.request) > self.config.max_header_bytes:
            raise HeadersTooLarge
        if not host_is_allowed(self.request.host_name, self.config.allowed_hosts, self.config.host):
            raise HostNotAllowed
        if self.request.method not in self.cross_site_methods and is_cross_site(
            self.request.headers, self.request.host_name, self.config
        ):
            raise CrossSite
        length = self.request.headers.get("Content-Length", "0")
        # What is no number is refused where the body would be read.
        if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > self._most_body_bytes):
            raise PayloadTooLarge
        return None

    def data_received(self, chunk: bytes) -> None:
        self._body_bytes += len(chunk)
        if self._body_bytes <= self.config.max_body_bytes:
            self._body += chunk
        elif self._body_bytes > self._most_body_bytes and not self._finished:
            # A chunked body that never said its length: answer now; what still comes is not read.
            error = PayloadTooLarge()
            self.send_error(error.status, exc_info=(PayloadTooLarge, error, None))

    @property
    def _most_body_bytes(self) -> int:
        return self.config.max_body_bytes + _DISCARDED

    # -- in ------------------------------------------------------------------------------------------------------

    def body(self, schema: str) -> Any:
        """Return the request's JSON body.

        :param schema: the name of its schema; for `empty`, no body at all will do
        :raises PayloadTooLarge, UnsupportedMediaType, InvalidRequest: naming what is wrong
        """
        if self._body_bytes > self.config.max_body_bytes:
            raise PayloadTooLarge
        if schema == "empty" and not self._body:
            return {}
        headers = Message()
        headers["Content-Type"] = self.request.headers.get("Content-Type", "")
        if headers.get_content_type() != "application/json":
            raise UnsupportedMediaType
        if str(headers.get_param("charset", "utf-8")).lower() not in ("utf-8", "utf8"):
            raise UnsupportedMediaType("JSON is sent as UTF-8.")
        if self.request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise UnsupportedMediaType("The body must be sent without a Content-Encoding.")
        value = _parse_json(bytes(self._body))
        schemas.validate(schema, value, self.config.max_input_chars)
        return value

    def query(self, schema: str) -> dict[str, Any]:
        """Return the request's query parameters, whole numbers as such.

        :raises InvalidRequest: naming what is wrong
        """
        values: dict[str, Any] = {}
        if not self.request.query:
            return values  # no parameter is required
        for name, kind in schemas.parameter_types(schema).items():
            texts = self.get_query_arguments(name, strip=False)
            if len(texts) > 1:
                detail = "must be given only once"
                raise InvalidRequest(f"/{name} {detail}.", fields=[{"pointer": f"/{name}", "detail": detail}])
            for text in texts:
                values[name] = int(text) if kind == "integer" and re.fullmatch("[0-9]{1,9}", text) else text
        schemas.validate(schema, values)
        return values

    def conversation_id(self, text: str) -> str:
        """Return an id from the path, in lower case; the access log names it from now on.

        :raises InvalidRequest: if it is not 24 hex digits
        """
        if _ID.match(text) is None:
            raise InvalidRequest("A conversation's id is 24 hex digits.", code="invalid_id")
        self.logged["conversation"] = text.lower()
        return self.logged["conversation"]

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
        """Make no ETag: answers are not to be stored."""
        return None

    # -- out -----------------------------------------------------------------------------------------------------

    def answer(self, value: object, status: int = 200) -> None:
        """Send a value as JSON."""
        self.set_status(status)
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        self.finish(json.dumps(value, ensure_ascii=False) + "\n")

    async def answer_in_pieces(self, parts: AsyncIterator[bytes]) -> None:
        """Send JSON text as it is made: whole if it is short, else piece by piece, as fast as the client reads.

        A failure after the first piece aborts the connection, as does a client that has not taken a piece after
        `SLOW_CLIENT_TIMEOUT_S`: an answer that ended in order would seem complete.
        """
        self.set_header("Content-Type", "application/json")
        self.set_header("Cache-Control", "no-store")
        waiting = 0
        try:
            async for part in parts:
                for begin in range(0, len(part), _PIECE):
                    piece = part[begin : begin + _PIECE]
                    if waiting + len(piece) > _PIECE:
                        await self._send_piece()
                        if self.request.method == "HEAD":
                            return
                        waiting = 0
                    self.write(piece)
                    waiting += len(piece)
            if self._headers_written:
                await self._send_piece()
        except Exception as failure:
            if not self._headers_written:
                raise
            if isinstance(failure, TimeoutError):
                logger.info("slow client disconnected", extra={"request": self.request_id})
            elif isinstance(failure, ChatError):
                self.logged["code"] = failure.code
            elif not isinstance(failure, StreamClosedError):
                self.log_exception(*sys.exc_info())
            self.detach().close()
            return
        if self._headers_written and self.request.version == "HTTP/1.0":
            self.detach().close()  # its end is the connection's
        else:
            self.finish()

    async def _send_piece(self) -> None:
        """Send what has been written, and wait until the kernel has taken it.

        :raises TimeoutError: if it has not after `SLOW_CLIENT_TIMEOUT_S`
        :raises StreamClosedError: if the connection is closed
        """
        if self.request.version == "HTTP/1.0":
            # Tornado would promise to keep the connection, whose end is the answer's.
            self.request.headers.pop("Connection", None)
        async with asyncio.timeout(self.config.slow_client_timeout_s):
            await self.flush()

    def detach(self) -> IOStream:
        """Take the connection over from Tornado, which is done with this request."""
        stream = super().detach()
        self.application.log_request(self)
        self.ui.clear()  # the one cycle by which a handler that never finishes would outlive its socket
        return stream

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Render every error of every route as problem+json (RFC 9457)."""
        raised = kwargs.get("exc_info", (None, None, None))[1]
        problem = _as_chat_error(raised, status_code)
        self.logged["code"] = problem.code
        self.set_status(problem.status)
        self.set_header("Content-Type", "application/problem+json")
        self.set_header("Cache-Control", "no-store")
        if problem.retry_after_s is not None:
            self.set_header("Retry-After", str(problem.retry_after_s))
        if problem.status == 405:
            self.set_header("Allow", ", ".join(self.allowed_methods()))
        self.finish(json.dumps(problem.document(self.request_id)) + "\n")

    def allowed_methods(self) -> list[str]:
        """Return the methods that this resource supports, as a 405 must say (RFC 9110, 15.5.6)."""
        return [
            name
            for name in self.SUPPORTED_METHODS
            if getattr(type(self), name.lower()) is not getattr(RequestHandler, name.lower())
        ]

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Log what we did not expect, with its stack trace; the rest is in the access log."""
        if not isinstance(value, ChatError | HTTPError):
            logger.error("unexpected error", exc_info=(typ, value, tb), extra={"request": self.request_id})


def log_request(handler: RequestHandler) -> None:
    """Log one answered request: the application's `log_function`."""
    assert isinstance(handler, BaseHandler)
    request = handler.request
    context = {
        "status": handler.get_status(),
        "ms": round(1000 * request.request_time(), 1),
        "address": handler.address,
        "request": handler.request_id,
        **handler.logged,
    }
    # A terminal obeys control characters, and what is read as Latin-1 has some of them beyond ASCII.
    path = request.path
    if not (path.isascii() and path.isprintable()):
        path = quote(path, safe=string.punctuation, encoding="latin-1")
    # What is unexpected is logged where it happens; here it is one of many answers.
    logger.info("%s %s", request.method, path, extra=context)


class NoSuchRoute(BaseHandler):
    """Every path that is none of ours."""

    def get(self, *_: str) -> None:
        raise NotFound

    head = post = put = patch = delete = options = get


def _head_bytes(request: HTTPServerRequest) -> int:
    """Return the size of a request's line and headers as they are written without needless white space."""
    line = len(f"{request.method} {request.uri} {request.version}\r\n")
    return line + sum(len(name) + len(value) + 4 for name, value in request.headers.get_all())


def _as_chat_error(raised: BaseException | None, status: int) -> ChatError:
    if isinstance(raised, ChatError):
        return raised
    if status == 404:
        return NotFound()
    if status == 405:
        return MethodNotAllowed()
    if 400 <= status < 500:
        return InvalidRequest()
    return ChatError()


def _parse_json(body: bytes) -> Any:
    """Return the value of a JSON text (RFC 8259) in UTF-8.

    :raises InvalidRequest: if it is none, nested too deeply, or holds half a surrogate pair
    """

    def refuse(constant: str) -> None:
        raise InvalidRequest(f"The body is not JSON: {constant} is no number.", code="invalid_json")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        detail = "The body is not UTF-8."
    except UnicodeEncodeError:
        detail = "The body has an escape that is half a surrogate pair."
    except RecursionError:
        detail = "The body is nested too deeply."
    except json.JSONDecodeError as error:
        detail = f"The body is not JSON: {error.msg}, line {error.lineno} column {error.colno}."
    except ValueError:
        detail = "The body has a number with too many digits."
    else:
        return value
    raise InvalidRequest(detail, code="invalid_json")
