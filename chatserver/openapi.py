"""The API as an OpenAPI 3.1 document, made from the JSON Schema files that validate requests."""

from collections.abc import Iterable
from functools import cache
from typing import Any

from chatserver import __version__
from chatserver.errors import ChatError, InvalidRequest
from chatserver.schemas import Schema, load

_REQUESTS = ("say", "empty")
_ANSWERS = ("accepted", "message", "conversation", "conversations", "stopped", "health", "problem", "events")
_WHEN = {
    "invalid_request": "the request does not fit its schema; `errors` names each place",
    "invalid_json": "the body is not JSON in UTF-8",
    "invalid_id": "an id in the path is not 24 hex digits",
    "cross_site": "a web page of an origin that is not in CORS_ORIGINS sent the request",
    "not_found": "there is no such conversation, or no such path",
    "method_not_allowed": "the resource does not support the method; see `Allow`",
    "reply_in_progress": "the conversation is being answered",
    "conversation_full": "the conversation's document has no room for another turn",
    "unsupported_conversation": "another application stored something in this conversation that is not text",
    "nothing_to_retry": "the last message is no stopped, failed or interrupted reply",
    "payload_too_large": "the body is too large",
    "unsupported_media_type": "the body is not sent as application/json",
    "host_not_allowed": "the Host header is none of ours",
    "idempotency_key_reused": "the key was used with another body",
    "too_many_streams": "the limit of open streams is reached",
    "headers_too_large": "the request's line and headers are too large",
    "too_many_connections": "the limit of open connections is reached",
    "too_many_replies": "the limit of running replies is reached",
    "database_unavailable": "MongoDB does not answer; a retry with the same Idempotency-Key is safe",
    "draining": "the server is shutting down",
    "internal": "an error of ours; the log has it under the request's id",
}
ENDS = {
    "interrupted": "its server stopped or was lost while it was written; retry it",
    "conversation_full": "it was cut where the conversation had no more room",
    "source_authentication": "the model provider rejected the API key, or the key has no access to the model",
    "source_cut": "the model provider ended the answer before it was complete",
    "source_empty": "the model sent no text, or only white space",
    "source_failed": "the model provider reported an error or rejected the request, or the source crashed",
    "source_invalid": "the model provider sent data that is not a chat completion",
    "source_length": "the answer reached the model's maximum length",
    "source_rate_limited": "the model provider's rate limit was exceeded, or the account has no credit",
    "source_refused": "the model declined to answer, or a content filter rejected the prompt or the answer",
    "source_timeout": "the model provider stopped sending data",
    "source_too_long": "the answer is longer than MAX_REPLY_CHARS, or a line or event of it too large",
    "source_unavailable": "the model provider cannot be reached or has a temporary problem",
}
"""The codes of replies that failed or were interrupted, and when they occur."""
_CODES: dict[type[ChatError], tuple[str, ...]] = {
    InvalidRequest: ("invalid_request", "invalid_json", "invalid_id"),
}


def problem_codes() -> dict[str, tuple[int, str]]:
    """Return each problem code with its HTTP status and when it occurs."""
    kinds: list[type[ChatError]] = [ChatError, *ChatError.__subclasses__()]
    return {code: (kind.status, _WHEN[code]) for kind in kinds for code in _CODES.get(kind, (kind.code,))}


@cache
def make_openapi(max_input_chars: int) -> dict[str, Any]:
    """Return the document.

    :param max_input_chars: the setting of that name, a limit in the document
    """
    return {
        "openapi": "3.1.0",
        "info": {"title": "chatserver", "version": __version__, "description": _description()},
        "servers": [{"url": "."}],
        "paths": _paths(),
        "components": {"schemas": dict(_component(name, max_input_chars) for name in (*_REQUESTS, *_ANSWERS))},
    }


def _component(name: str, max_input_chars: int) -> tuple[str, Schema]:
    schema = load(name, max_input_chars)
    del schema["$schema"]
    return schema.pop("title"), schema


def _description() -> str:
    codes = "\n".join(f"- `{code}` ({status}): {when}" for code, (status, when) in sorted(problem_codes().items()))
    ends = "\n".join(f"- `{code}`: {when}" for code, when in ENDS.items())
    return (
        "A chat backend that never loses a word.\n\n"
        "A position says how much of a conversation a client has seen; it is opaque, but for the one before the first "
        "message, which is `<conversationId>-0`. Every event of a stream has the "
        "position right after it as its id, and the history has the one where its messages end, so that a stream "
        "opened with it brings exactly what follows.\n\n"
        f"Errors are problem+json (RFC 9457). The codes:\n\n{codes}\n\n"
        f"A reply that failed or was interrupted has a code, too, in its `error` event and in the history:\n\n{ends}"
    )


def _paths() -> dict[str, Any]:
    conversation = _path_parameter("conversationId")
    return {
        "/chat": {
            "post": _operation(
                "say",
                "Say something and start the reply.",
                {"202": _json("Accepted", "Stored; the reply runs.")},
                (*_BODY_CODES, *_TURN_CODES, "cross_site", "idempotency_key_reused"),
                parameters=[_IDEMPOTENCY_KEY],
                body="SayRequest",
            ),
            "get": _operation(
                "listConversations",
                "List the conversations, the latest activity first.",
                {"200": _json("Conversations", "A page.")},
                ("invalid_request", "database_unavailable"),
                parameters=_query("list"),
            ),
        },
        "/chat/{conversationId}": {
            "parameters": [conversation],
            "get": _operation(
                "getHistory",
                "Read a conversation, a running reply included.",
                {"200": _json("Conversation", "All of it, or a page.")},
                (*_ID_CODES, "not_found", "database_unavailable"),
                parameters=_query("history"),
            ),
            "delete": _operation(
                "deleteConversation",
                "Delete a conversation, its running reply first; its streams end with `reset`.",
                {"204": {"description": "Deleted.", "headers": _HEADERS}},
                (*_ID_CODES, "cross_site", "not_found", "database_unavailable"),
            ),
        },
        "/chat/stream/{conversationId}": {
            "parameters": [conversation],
            "get": _operation(
                "stream",
                "Watch a conversation: Server-Sent Events, from a position on, until the client leaves.",
                {"200": _event_stream()},
                (*_ID_CODES, "cross_site", "too_many_streams", "database_unavailable", "draining"),
                parameters=[_LAST_EVENT_ID, *_query("stream")],
            ),
        },
        "/chat/{conversationId}/stop": {
            "parameters": [conversation],
            "post": _operation(
                "stop",
                "Stop the running reply; what was said is kept.",
                {"202": _json("Stopped", "It is being stopped, or none ran.")},
                (*_ID_CODES, *_BODY_CODES, "cross_site", "not_found", "database_unavailable"),
                body="EmptyRequest",
                body_required=False,
            ),
        },
        "/chat/{conversationId}/retry": {
            "parameters": [conversation],
            "post": _operation(
                "retry",
                "Have the last message answered anew, if its reply was stopped, failed or interrupted.",
                {"202": _json("Accepted", "The new reply runs; the old one is superseded.")},
                (*_ID_CODES, *_BODY_CODES, *_TURN_CODES, "cross_site", "not_found", "nothing_to_retry"),
                body="EmptyRequest",
                body_required=False,
            ),
        },
        "/healthz": {"get": _operation("health", "The process is up.", {"200": _json("Health", "It is.")})},
        "/readyz": {
            "get": _operation(
                "ready",
                "New turns can be taken.",
                {"200": _json("Health", "They can.")},
                ("database_unavailable", "draining"),
            )
        },
        "/metrics": {"get": _operation("metrics", "Metrics for Prometheus.", {"200": _text("text/plain", "Metrics.")})},
        "/openapi.json": {
            "get": _operation("openapi", "This document.", {"200": _text("application/json", "OpenAPI 3.1.")})
        },
        "/docs": {"get": _operation("docs", "This document, for people.", {"200": _text("text/html", "A page.")})},
        "/": {"get": _operation("page", "The chat page.", {"200": _text("text/html", "A page.")})},
    }


_ALL_CODES = ("headers_too_large", "host_not_allowed", "internal", "too_many_connections")
_ID_CODES = ("invalid_request", "invalid_id")
_BODY_CODES = ("invalid_request", "invalid_json", "payload_too_large", "unsupported_media_type")
_TURN_CODES = (
    "reply_in_progress",
    "conversation_full",
    "unsupported_conversation",
    "too_many_replies",
    "database_unavailable",
    "draining",
)

_HEADERS = {"X-Request-Id": {"description": "Taken over from the request, or made.", "schema": {"type": "string"}}}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "string", "pattern": "^[0-9]+$"}}}
_IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "The same key with the same body gets the first answer and stores nothing new. It belongs to the "
    "conversation, or without one to the server, and lives as long as the conversation.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$", "maxLength": 255},
}
_LAST_EVENT_ID = {
    "name": "Last-Event-ID",
    "in": "header",
    "description": "The position to go on from, as an EventSource sends it.",
    "schema": {"type": "string"},
}


_REQUEST_ID = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "Comes back with the answer and is in the log, if it is 1 to 128 visible ASCII characters; else one "
    "is made.",
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
    codes: Iterable[str] = (),
    *,
    parameters: Iterable[dict[str, Any]] = (),
    body: str | None = None,
    body_required: bool = True,
) -> dict[str, Any]:
    operation: dict[str, Any] = {"operationId": name, "summary": summary, "parameters": [*parameters, _REQUEST_ID]}
    if body:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body}"}}}
        operation["requestBody"] = {"required": body_required, "content": content}
    operation["responses"] = {**answers, **_problems({*codes, *_ALL_CODES})}
    return operation


def _problems(codes: Iterable[str]) -> dict[str, Any]:
    """Return the answers that tell some problem codes, by status."""
    known = problem_codes()
    by_status: dict[int, list[str]] = {}
    for status, code in sorted((known[code][0], code) for code in codes):
        by_status.setdefault(status, []).append(code)
    return {str(status): _problem(status, its) for status, its in by_status.items()}


def _problem(status: int, codes: list[str]) -> dict[str, Any]:
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    headers = {**_HEADERS, **_RETRY_AFTER} if status in (429, 503) else _HEADERS
    return {"description": f"`{'`, `'.join(codes)}`", "headers": headers, "content": content}


def _json(schema: str, description: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    return {"description": description, "headers": _HEADERS, "content": content}


def _text(media_type: str, description: str) -> dict[str, Any]:
    return {"description": description, "headers": _HEADERS, "content": {media_type: {"schema": {}}}}


def _event_stream() -> dict[str, Any]:
    events = "\n".join(f"- `{name}`: {schema['description']}" for name, schema in load("events")["properties"].items())
    description = (
        "Events with JSON as data (see Events); each event's id is the position right after it. The body is chunked; "
        f"without its last chunk it was cut off, and the client should open it again.\n\n{events}"
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
