"""Errors as answers (problem+json, RFC 9457), and the access log."""

import json
import logging
import string
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import quote

from tornado.web import HTTPError, RequestHandler

from chatserver.errors import ChatError, InvalidRequest, MethodNotAllowed, NotFound, Unauthenticated

logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., Any])


def raises(*kinds: type[ChatError]) -> Callable[[Method], Method]:
    """Declare which errors a handler's method answers with; the OpenAPI document reads it."""

    def declare(method: Method) -> Method:
        vars(method)["raises"] = kinds
        return method

    return declare


def declared_errors(handler: type[RequestHandler], method: str) -> tuple[type[ChatError], ...]:
    """Return the errors that a handler declares for a method.

    :param method: its name in lower case
    """
    declared: tuple[type[ChatError], ...] = vars(getattr(handler, method)).get("raises", ())
    return declared


class ProblemHandler(RequestHandler):
    """A handler that renders every error as problem+json, and has the fields of the access log.

    :ivar request_id: in the log and in every answer
    :ivar address: the client's
    :ivar log_fields: the fields of the access log that only some requests have
    """

    request_id: str
    address: str
    log_fields: dict[str, str]

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Answer with an error of this server or of Tornado."""
        raised = kwargs.get("exc_info", (None, None, None))[1]
        problem = _as_chat_error(raised, status_code)
        self.log_fields["code"] = problem.code
        self.set_status(problem.status)
        self.set_header("Content-Type", "application/problem+json")
        self.set_header("Cache-Control", "no-store")
        if problem.retry_after_s is not None:
            self.set_header("Retry-After", str(problem.retry_after_s))
        if isinstance(problem, Unauthenticated):
            self.set_header("WWW-Authenticate", problem.challenge)
            self.log_fields["reason"] = problem.reason
        if problem.status == 405:
            self.set_header("Allow", ", ".join(self.allowed_methods()))
        self.finish(json.dumps(self.problem_document(problem)) + "\n")

    def problem_document(self, problem: ChatError) -> dict[str, object]:
        """Return the body of an error."""
        return problem.document(self.request_id)

    def allowed_methods(self) -> list[str]:
        """Return the methods that this resource supports, which a 405 must name (RFC 9110, 15.5.6)."""
        return [
            name
            for name in self.SUPPORTED_METHODS
            if getattr(type(self), name.lower()) is not getattr(RequestHandler, name.lower())
        ]

    def log_exception(self, typ: Any, value: Any, tb: Any) -> None:
        """Log an unexpected exception with its stack trace; the access log has the others."""
        if not isinstance(value, ChatError | HTTPError):
            logger.error("unexpected error", exc_info=(typ, value, tb), extra={"request": self.request_id})


def log_request(handler: RequestHandler) -> None:
    """Log one answered request: the application's `log_function`."""
    assert isinstance(handler, ProblemHandler)
    request = handler.request
    context = {
        "status": handler.get_status(),
        "ms": round(1000 * request.request_time(), 1),
        "address": handler.address,
        "request": handler.request_id,
        **handler.log_fields,
    }
    # A terminal would obey control characters, of which Latin-1 has more than ASCII.
    path = request.path
    if not (path.isascii() and path.isprintable()):
        path = quote(path, safe=string.punctuation, encoding="latin-1")
    # At INFO for every status: an unexpected error has a record of its own.
    logger.info("%s %s", request.method, path, extra=context)


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
