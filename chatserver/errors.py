"""The errors that chatserver speaks of.

Exception
├── SetupError                 for whoever starts the server: printed, exit code 1
├── SourceError                a reply's source gave up; stored with the reply and streamed as `error`
└── ChatError                  an answer to the client: problem+json (RFC 9457), rendered in handlers/base.py
    ├── InvalidRequest         400 invalid_request, invalid_json, invalid_id
    ├── CrossSite              403 cross_site
    ├── NotFound               404 not_found
    │   └── NoSuchConversation the same to programs
    ├── MethodNotAllowed       405 method_not_allowed
    ├── ReplyInProgress        409 reply_in_progress
    ├── ConversationFull       409 conversation_full
    ├── NothingToRetry         409 nothing_to_retry
    ├── UnsupportedConversation 409 unsupported_conversation
    ├── PayloadTooLarge        413 payload_too_large
    ├── UnsupportedMediaType   415 unsupported_media_type
    ├── HostNotAllowed         421 host_not_allowed
    ├── KeyReused              422 idempotency_key_reused
    ├── TooManyStreams         429 too_many_streams        (Retry-After)
    ├── HeadersTooLarge        431 headers_too_large
    ├── TooManyConnections     503 too_many_connections    (Retry-After); rendered in listener.py
    ├── TooManyReplies         503 too_many_replies        (Retry-After)
    ├── DatabaseUnavailable    503 database_unavailable    (Retry-After)
    │   ├── OutcomeUnknown     the same to the client; the write may have reached the database
    │   └── DatabaseRefused    500 internal; the database answered with an error
    └── Draining               503 draining                (Retry-After)
"""

from typing import ClassVar, TypedDict


class FieldError(TypedDict):
    """One invalid place of a request: a JSON Pointer (RFC 6901) into its body or its parameters, and what is wrong."""

    pointer: str
    detail: str


class SetupError(Exception):
    """The server cannot be started as it is set up; the message says what to change."""


class SourceError(Exception):
    """A source of replies failed in a way that it understands.

    :param code: stable, for programs; starts with ``source_``
    :param message: for people: what happened and what to do; no secrets
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class ChatError(Exception):
    """An error that the client is told of.

    :param detail: one sentence about this very case; the class's own if None
    :param code: stable, for programs; the class's own if None
    :param fields: the invalid places of the request
    """

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal server error"
    default_detail: ClassVar[str] = "Something went wrong on our side; the log has the details."
    retry_after_s: ClassVar[int | None] = None
    code = "internal"

    def __init__(
        self, detail: str | None = None, *, code: str | None = None, fields: list[FieldError] | None = None
    ) -> None:
        self.detail = detail or self.default_detail
        super().__init__(self.detail)
        self.code = code or self.code
        self.fields = fields or []

    def document(self, request_id: str) -> dict[str, object]:
        """Return the answer's body (RFC 9457)."""
        body: dict[str, object] = {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "requestId": request_id,
        }
        if self.fields:
            body["errors"] = self.fields
        return body


class InvalidRequest(ChatError):
    status = 400
    title = "Invalid request"
    default_detail = "The request is malformed or does not fit its schema."
    code = "invalid_request"


class CrossSite(ChatError):
    status = 403
    title = "Cross-site request"
    default_detail = "Pages of this origin may not use this server; see CORS_ORIGINS."
    code = "cross_site"


class NotFound(ChatError):
    status = 404
    title = "Not found"
    default_detail = "There is nothing here."
    code = "not_found"


class NoSuchConversation(NotFound):
    default_detail = "There is no conversation with this id."


class MethodNotAllowed(ChatError):
    status = 405
    title = "Method not allowed"
    default_detail = "This resource does not support that method; see the Allow header."
    code = "method_not_allowed"


class ReplyInProgress(ChatError):
    status = 409
    title = "Reply in progress"
    default_detail = "This conversation is still being answered; wait for its end or stop it."
    code = "reply_in_progress"


class ConversationFull(ChatError):
    status = 409
    title = "Conversation full"
    default_detail = "This conversation has no room for another turn; start a new one."
    code = "conversation_full"


class NothingToRetry(ChatError):
    status = 409
    title = "Nothing to retry"
    default_detail = "Only a stopped, failed or interrupted reply at the end of a conversation can be retried."
    code = "nothing_to_retry"


class UnsupportedConversation(ChatError):
    status = 409
    title = "Unsupported conversation"
    default_detail = "Another application stored something in this conversation that is not text; start a new one."
    code = "unsupported_conversation"


class PayloadTooLarge(ChatError):
    status = 413
    title = "Payload too large"
    default_detail = "The request's body is larger than this server accepts."
    code = "payload_too_large"


class UnsupportedMediaType(ChatError):
    status = 415
    title = "Unsupported media type"
    default_detail = "The body must be JSON, sent with Content-Type: application/json."
    code = "unsupported_media_type"


class HostNotAllowed(ChatError):
    status = 421
    title = "Host not allowed"
    default_detail = "This server does not answer under that host name; see ALLOWED_HOSTS."
    code = "host_not_allowed"


class KeyReused(ChatError):
    status = 422
    title = "Idempotency key reused"
    default_detail = "This Idempotency-Key was already used with another body."
    code = "idempotency_key_reused"


class TooManyStreams(ChatError):
    status = 429
    title = "Too many streams"
    default_detail = "Too many streams are open; close one or try again later."
    retry_after_s = 5
    code = "too_many_streams"


class HeadersTooLarge(ChatError):
    status = 431
    title = "Headers too large"
    default_detail = "The request's headers are larger than this server accepts."
    code = "headers_too_large"


class TooManyConnections(ChatError):
    status = 503
    title = "Too many connections"
    default_detail = "The server has reached its limit of open connections. Try again later."
    retry_after_s = 5
    code = "too_many_connections"


class TooManyReplies(ChatError):
    status = 503
    title = "Too many replies"
    default_detail = "This server is already writing as many replies as it is allowed to; try again in a moment."
    retry_after_s = 2
    code = "too_many_replies"


class DatabaseUnavailable(ChatError):
    status = 503
    title = "Database unavailable"
    default_detail = "The database does not answer; try again in a moment."
    retry_after_s: ClassVar[int | None] = 2
    code = "database_unavailable"


class OutcomeUnknown(DatabaseUnavailable):
    """The database fell silent after a write went out: whoever asked for it must find out whether it was done."""


class DatabaseRefused(DatabaseUnavailable):
    """The database answered with an error. Background jobs try again, as if it had not answered."""

    status = 500
    title = ChatError.title
    default_detail = "The database refused an operation; the log has its code."
    retry_after_s = None
    code = ChatError.code


class Draining(ChatError):
    status = 503
    title = "Shutting down"
    default_detail = "This server is shutting down and starts no new replies."
    retry_after_s = 5
    code = "draining"
