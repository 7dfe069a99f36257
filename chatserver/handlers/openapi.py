"""The API as an OpenAPI 3.1 document.

Its schemas are the files that validate requests; its error codes are read from the handlers and from errors.py.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from chatserver import __version__
from chatserver.errors import (
    ChatError,
    CrossSite,
    InvalidToken,
    KeysUnavailable,
    QuotaExceeded,
    ReplyCode,
    TokenExpired,
    Unauthenticated,
)
from chatserver.handlers.base import COMMON_ERRORS, BaseHandler
from chatserver.handlers.chat import (
    ConversationHandler,
    ConversationsHandler,
    ExportHandler,
    HeadHandler,
    RetryHandler,
    StopHandler,
)
from chatserver.handlers.me import MeHandler
from chatserver.handlers.ops import MetricsHandler, ReadyHandler
from chatserver.handlers.problems import declared_errors
from chatserver.handlers.stream import StreamHandler
from chatserver.schemas import Schema, load
from chatserver.settings import Settings

_REQUESTS = ("say", "retry", "head", "rename", "empty")
_ANSWERS = (
    *("accepted", "message", "conversation", "summary", "conversations", "shown", "stopped"),
    *("me", "health", "problem", "events"),
)


def problem_codes() -> dict[str, tuple[int, str]]:
    """Return each problem code with its HTTP status and when it occurs."""
    return {kind.code: (kind.status, kind.when) for kind in _with_subclasses(ChatError)}


def _with_subclasses(kind: type[ChatError]) -> Iterable[type[ChatError]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from _with_subclasses(subclass)


@cache
def make_openapi(settings: Settings) -> dict[str, Any]:
    """Return the document of a server with these settings: they limit the input, and say how a user is identified."""
    schemas = dict(_component(name, settings.max_input_chars) for name in (*_REQUESTS, *_ANSWERS))
    schemes = _security_schemes(settings)
    return {
        "openapi": "3.1.0",
        "info": {"title": "chatserver", "version": __version__, "description": _description()},
        "servers": [{"url": "."}],
        "paths": _paths([{name: []} for name in schemes]),
        "components": {"schemas": schemas, **({"securitySchemes": schemes} if schemes else {})},
    }


def _security_schemes(settings: Settings) -> dict[str, Any]:
    """Return how a client can send its token. With AUTH=proxy, the client authenticates to the proxy."""
    if settings.auth != "jwt":
        return {}
    schemes: dict[str, Any] = {"bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}}
    if settings.auth_cookie is not None:
        schemes["cookie"] = {"type": "apiKey", "in": "cookie", "name": settings.auth_cookie}
    return schemes


def _component(name: str, max_input_chars: int) -> tuple[str, Schema]:
    schema = load(name, max_input_chars)
    del schema["$schema"]
    return schema.pop("title"), schema


def _description() -> str:
    codes = "\n".join(f"- `{code}` ({status}): {when}" for code, (status, when) in sorted(problem_codes().items()))
    ends = "\n".join(f"- `{code}`: {code.when}" for code in ReplyCode)
    return (
        "A chat backend that never loses a word.\n\n"
        "A position marks how much of a conversation a client has received. It is opaque, except for the position "
        "before the first message, `<conversationId>-0`. Each event of a stream has the position right after it as its "
        "id. The history has the position at the end of its messages: a stream opened with it continues exactly "
        "there.\n\n"
        f"Errors are problem+json (RFC 9457). The codes:\n\n{codes}\n\n"
        f"A reply that failed or was interrupted has a code, too, in its `error` event and in the history:\n\n{ends}"
    )


def _paths(security: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the paths. `security` are the alternatives for an operation that needs a user."""
    conversation = _path_parameter("conversationId")

    def checks(handler: type[BaseHandler], method: str) -> dict[str, Any]:
        return {"errors": _errors(handler, method), "security": [] if handler.is_public else security}

    return {
        "/chat": {
            "post": _operation(
                "say",
                "Send a message and start the reply.",
                {"202": _accepted("The message is stored, and its reply is running.")},
                parameters=[_IDEMPOTENCY_KEY],
                body="SayRequest",
                **checks(ConversationsHandler, "post"),
            ),
            "get": _operation(
                "listConversations",
                "List the conversations, the latest activity first.",
                {"200": _json("Conversations", "A page.")},
                parameters=_query("list"),
                **checks(ConversationsHandler, "get"),
            ),
        },
        "/chat/export": {
            "get": _operation(
                "exportConversations",
                "Read all conversations, each as `GET /chat/{conversationId}?branches=all` returns it, on a line of "
                "its own.",
                {"200": _ndjson("Conversation", "The conversations, in the order of their ids.")},
                **checks(ExportHandler, "get"),
            ),
        },
        "/chat/{conversationId}": {
            "parameters": [conversation],
            "get": _operation(
                "getHistory",
                "Read a conversation, including a running reply.",
                {"200": _json("Conversation", "The whole conversation, or a page of it.")},
                parameters=_query("history"),
                **checks(ConversationHandler, "get"),
            ),
            "patch": _operation(
                "rename",
                "Rename a conversation. Its streams receive a `title`.",
                {"200": _json("Summary", "The conversation, as in the list.")},
                body="RenameRequest",
                **checks(ConversationHandler, "patch"),
            ),
            "delete": _operation(
                "deleteConversation",
                "Delete a conversation. Its running reply is ended first, and its streams end with `reset`.",
                {"204": {"description": "Deleted.", "headers": _HEADERS}},
                **checks(ConversationHandler, "delete"),
            ),
        },
        "/chat/stream/{conversationId}": {
            "parameters": [conversation],
            "get": _operation(
                "stream",
                "Stream a conversation as Server-Sent Events from a position, until the client disconnects.",
                {"200": _event_stream()},
                parameters=[_LAST_EVENT_ID, *_query("stream")],
                **checks(StreamHandler, "get"),
            ),
        },
        "/chat/{conversationId}/stop": {
            "parameters": [conversation],
            "post": _operation(
                "stop",
                "Stop the running reply. Its text so far is kept.",
                {"202": _json("Stopped", "The reply is being stopped, or none was running.")},
                body="EmptyRequest",
                body_required=False,
                **checks(StopHandler, "post"),
            ),
        },
        "/chat/{conversationId}/retry": {
            "parameters": [conversation],
            "post": _operation(
                "retry",
                "Answer a user's message again, beside an existing reply.",
                {"202": _accepted("The new reply is running. The existing one is kept as its sibling.")},
                parameters=[_IDEMPOTENCY_KEY],
                body="RetryRequest",
                body_required=False,
                **checks(RetryHandler, "post"),
            ),
        },
        "/chat/{conversationId}/head": {
            "parameters": [conversation],
            "put": _operation(
                "show",
                "Show another branch: the one through a message. Streams receive a `head`.",
                {"200": _json("Shown", "The branch is shown.")},
                body="HeadRequest",
                **checks(HeadHandler, "put"),
            ),
        },
        "/me": {
            "get": _operation(
                "me",
                "Who the caller is.",
                {"200": _json("Me", "The caller.")},
                **checks(MeHandler, "get"),
            ),
            "delete": _operation(
                "deleteAll",
                "Delete all conversations of the caller. Running replies are ended, and streams end with `reset`.",
                {"204": {"description": "All are deleted.", "headers": _HEADERS}},
                **checks(MeHandler, "delete"),
            ),
        },
        "/healthz": {"get": _operation("health", "Liveness: the process is up.", {"200": _json("Health", "Up.")})},
        "/readyz": {
            "get": _operation(
                "ready",
                "Readiness: the server accepts turns.",
                {"200": _json("Health", "Ready.")},
                **checks(ReadyHandler, "get"),
            )
        },
        "/metrics": {
            "get": _operation(
                "metrics",
                "Metrics for Prometheus. With METRICS_TOKEN set, it must be sent as a bearer token.",
                {"200": _text("text/plain", "Metrics.")},
                **checks(MetricsHandler, "get"),
            )
        },
        "/openapi.json": {
            "get": _operation("openapi", "This document.", {"200": _text("application/json", "OpenAPI 3.1.")})
        },
        "/docs": {"get": _operation("docs", "This document as a page.", {"200": _text("text/html", "A page.")})},
        "/": {"get": _operation("page", "The chat page.", {"200": _text("text/html", "A page.")})},
    }


_HEADERS = {"X-Request-Id": {"description": "The request's own, or a generated one.", "schema": {"type": "string"}}}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "string", "pattern": "^[0-9]+$"}}}
_CHALLENGE = {"WWW-Authenticate": {"description": "How to identify the user (RFC 9110).", "schema": {"type": "string"}}}
_PROBLEM_HEADERS = {401: _CHALLENGE, 429: _RETRY_AFTER, 503: _RETRY_AFTER}
"""The headers of a problem beside the common ones, by status."""
_RATE_LIMIT = {
    "RateLimit-Policy": {
        "description": 'The limits of the caller, if there are any: `"turns";q=30;w=60`, 30 turns a minute, and '
        '`"replies";q=5;qu="concurrent-requests"`, 5 running replies.',
        "schema": {"type": "string"},
    },
    "RateLimit": {
        "description": "What is left of them, `r`, and in how many seconds one more turn is left, `t`: "
        '`"turns";r=12;t=2, "replies";r=4`.',
        "schema": {"type": "string"},
    },
}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "A request with a known key and the same body gets the first answer and stores nothing. A key "
    "belongs to its conversation, or to the server if the request names none, and lives as long as the conversation.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$", "maxLength": 255},
}
_LAST_EVENT_ID = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "The position to resume from, as an EventSource sends it.",
    "schema": {"type": "string"},
}


_REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "Returned with the answer and logged, if it is 1 to 128 visible ASCII characters; otherwise one is "
    "generated.",
    "schema": {"type": "string"},
}


def _path_parameter(name: str) -> dict[str, Any]:
    schema = {"type": "string", "pattern": "^[0-9a-fA-F]{24}$", "minLength": 24, "maxLength": 24}
    return {"name": name, "in": "path", "required": True, "description": "24 hex digits.", "schema": schema}


def _query(name: str) -> list[dict[str, Any]]:
    """Return the parameters that a query's schema file describes."""
    parameters = []
    for parameter, schema in load(name)["properties"].items():
        description = schema.pop("description")
        parameters.append({"name": parameter, "in": "query", "description": description, "schema": schema})
    return parameters


def _operation(
    name: str,
    summary: str,
    answers: dict[str, Any],
    *,
    errors: Iterable[type[ChatError]] = (),
    parameters: Iterable[dict[str, Any]] = (),
    body: str | None = None,
    body_required: bool = True,
    security: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    operation: dict[str, Any] = {"operationId": name, "summary": summary, "parameters": [*parameters, _REQUEST_ID]}
    if body:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body}"}}}
        operation["requestBody"] = {"required": body_required, "content": content}
    if security:
        operation["security"] = security
    operation["responses"] = {**answers, **_problems({*errors, *COMMON_ERRORS})}
    return operation


def _errors(handler: type[BaseHandler], method: str) -> Iterable[type[ChatError]]:
    """Return the errors of one method, without the common ones."""
    yield from declared_errors(handler, method)
    if not handler.is_public:
        yield from (Unauthenticated, InvalidToken, TokenExpired, KeysUnavailable)
    if method.upper() not in handler.cross_site_methods:
        yield CrossSite


def _problems(errors: Iterable[type[ChatError]]) -> dict[str, Any]:
    """Return the answers for some errors, by status."""
    by_status: dict[int, list[str]] = {}
    for status, code in sorted((error.status, error.code) for error in errors):
        by_status.setdefault(status, []).append(code)
    return {str(status): _problem(status, codes) for status, codes in by_status.items()}


def _problem(status: int, codes: list[str]) -> dict[str, Any]:
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    headers = {**_HEADERS, **_PROBLEM_HEADERS.get(status, {}), **(_RATE_LIMIT if QuotaExceeded.code in codes else {})}
    return {"description": f"`{'`, `'.join(codes)}`", "headers": headers, "content": content}


def _accepted(description: str) -> dict[str, Any]:
    return {**_json("Accepted", description), "headers": {**_HEADERS, **_RATE_LIMIT}}


def _json(schema: str, description: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": description, "headers": _HEADERS, "content": content}


def _ndjson(schema: str, description: str) -> dict[str, Any]:
    """Return the answer of lines, each of which is JSON."""
    # OpenAPI 3.1 can describe the body only as a whole; `itemSchema` is part of 3.2.
    return _text("application/x-ndjson", f"{description} Each line is a {schema}.")


def _text(media_type: str, description: str) -> dict[str, Any]:
    return {"description": description, "headers": _HEADERS, "content": {media_type: {"schema": {}}}}


def _event_stream() -> dict[str, Any]:
    events = "\n".join(f"- `{name}`: {schema['description']}" for name, schema in load("events")["properties"].items())
    description = (
        "Events with JSON as data (see Events); each event's id is the position right after it. The body is chunked; "
        f"if its last chunk is missing, the connection was lost, and the client should resume.\n\n{events}"
    )
    event = {
        "type": "object",
        "description": "One event.",
        "properties": {
            "event": {"type": "string", "enum": list(load("events")["properties"])},
            "id": {"type": "string", "description": "The position right after the event."},
            "data": {"type": "string", "description": "JSON, as Events describes it by the event's name."},
        },
    }
    return {**_text("text/event-stream", description), "content": {"text/event-stream": {"schema": event}}}
