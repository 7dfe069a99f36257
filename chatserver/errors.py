"""The errors of chatserver. Each code, its status and its meaning are defined here and nowhere else.

Exception
├── SetupError                 for the operator: printed at start-up, exit code 1
├── IdTaken                    internal: the fresh id of a new conversation exists already
├── SourceError                a source of replies failed; stored with the reply and streamed as `error`
└── ChatError                  an answer to the client: problem+json (RFC 9457), rendered in handlers/problems.py
    ├── InvalidRequest         400 invalid_request
    │   ├── InvalidJson        400 invalid_json
    │   └── InvalidId          400 invalid_id
    ├── Unauthenticated        401 unauthenticated         (WWW-Authenticate)
    │   ├── NoForwardedUser    the same to programs; the proxy named no user
    │   ├── InvalidToken       401 invalid_token           (WWW-Authenticate)
    │   └── TokenExpired       401 token_expired           (WWW-Authenticate)
    ├── CrossSite              403 cross_site
    ├── NotFound               404 not_found
    │   ├── NoSuchConversation the same to programs
    │   └── NoSuchMessage      the same to programs
    ├── MethodNotAllowed       405 method_not_allowed
    ├── ReplyInProgress        409 reply_in_progress
    ├── ConversationFull       409 conversation_full
    ├── NothingToRetry         409 nothing_to_retry
    ├── NotAReply              409 not_a_reply
    ├── UnsupportedConversation 409 unsupported_conversation
    ├── PayloadTooLarge        413 payload_too_large
    ├── UnsupportedMediaType   415 unsupported_media_type
    ├── HostNotAllowed         421 host_not_allowed
    ├── KeyReused              422 idempotency_key_reused
    ├── QuotaExceeded          429 quota_exceeded          (Retry-After)
    ├── TooManyStreams         429 too_many_streams        (Retry-After)
    ├── HeadersTooLarge        431 headers_too_large
    ├── TooManyConnections     503 too_many_connections    (Retry-After); rendered in listener.py
    ├── TooManyReplies         503 too_many_replies        (Retry-After)
    ├── KeysUnavailable        503 keys_unavailable        (Retry-After)
    ├── DatabaseUnavailable    503 database_unavailable    (Retry-After)
    │   ├── OutcomeUnknown     the same to the client; the write may have reached the database
    │   └── DatabaseRefused    500 internal; the database answered with an error
    └── Draining               503 draining                (Retry-After)
"""

from enum import StrEnum
from typing import ClassVar, TypedDict


class FieldError(TypedDict):
    """One invalid place of a request: a JSON Pointer (RFC 6901) into its body or its parameters, and the reason."""

    pointer: str
    detail: str


class SetupError(Exception):
    """The server cannot be started as configured; the message names the remedy."""


class IdTaken(Exception):
    """A conversation with this fresh id exists already, possibly another owner's: choose another id."""


class ReplyCode(StrEnum):
    """The codes of replies that failed or were interrupted, in their `error` event and in the history.

    :ivar when: when it occurs
    """

    when: str

    def __new__(cls, code: str, when: str) -> "ReplyCode":
        member = str.__new__(cls, code)
        member._value_ = code
        member.when = when
        return member

    INTERRUPTED = "interrupted", "the server stopped or crashed while it wrote the reply; retry it"
    CONVERSATION_FULL = "conversation_full", "the conversation had no room for the rest of the reply"
    AUTHENTICATION = (
        "source_authentication",
        "the model provider rejected the API key, or the key has no access to the model",
    )
    INCOMPLETE = "source_cut", "the model provider ended the answer before it was complete"
    EMPTY = "source_empty", "the model sent no text, or only white space"
    FAILED = "source_failed", "the model provider reported an error or rejected the request, or the source crashed"
    INVALID = "source_invalid", "the model provider sent data that is not a chat completion"
    LENGTH = "source_length", "the answer reached the model's maximum length"
    RATE_LIMITED = "source_rate_limited", "the model provider's rate limit was exceeded, or the account has no credit"
    REFUSED = (
        "source_refused",
        "the model declined to answer, or a content filter rejected the prompt or the answer",
    )
    TIMEOUT = "source_timeout", "the model provider stopped sending data"
    TOO_LONG = "source_too_long", "the answer is longer than MAX_REPLY_CHARS, or a line or event of it too large"
    UNAVAILABLE = "source_unavailable", "the model provider cannot be reached or has a temporary problem"


class SourceError(Exception):
    """A source of replies failed in a way that it understands.

    :param code: one of `ReplyCode`
    :param message: for users: the failure and the remedy, without secrets
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = str(code)
        self.message = message


class ChatError(Exception):
    """An error that is sent to the client.

    :param detail: one sentence about this occurrence; by default the class's own
    :param fields: the invalid places of the request
    :cvar type_uri: the problem type (RFC 9457); by default the status says everything
    :cvar code: stable, for programs
    :cvar when: when the code occurs, for the API's documentation
    """

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal server error"
    default_detail: ClassVar[str] = "An unexpected error occurred. The server's log has the details."
    retry_after_s: int | None = None
    type_uri: ClassVar[str] = "about:blank"
    code: ClassVar[str] = "internal"
    when: ClassVar[str] = "an unexpected error; the server's log has it under the request's id"

    def __init__(self, detail: str | None = None, *, fields: list[FieldError] | None = None) -> None:
        self.detail = detail or self.default_detail
        super().__init__(self.detail)
        self.fields = fields or []

    def document(self, request_id: str) -> dict[str, object]:
        """Return the answer's body (RFC 9457)."""
        body: dict[str, object] = {
            "type": self.type_uri,
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
    when = "the request does not fit its schema; `errors` names each place"


class InvalidJson(InvalidRequest):
    default_detail = "The body is not valid JSON."
    code = "invalid_json"
    when = "the body is not valid JSON in UTF-8"


class InvalidId(InvalidRequest):
    default_detail = "A conversation id must be 24 hex digits."
    code = "invalid_id"
    when = "an id in the path is not 24 hex digits"


class Unauthenticated(ChatError):
    """The request does not show who sends it.

    :param reason: what is wrong, for the log; the client is not informed. It holds nothing of the credential
    :cvar challenge: the value of the answer's WWW-Authenticate header
    """

    status = 401
    title = "Unauthenticated"
    default_detail = "This request needs a credential: sign in, or send a bearer token."
    challenge: ClassVar[str] = "Bearer"
    code = "unauthenticated"
    when = "the request has no credential"

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason


class NoForwardedUser(Unauthenticated):
    """With AUTH=proxy: the request did not come from a trusted proxy, or the proxy named no valid user.

    A 401 must have a challenge (RFC 9110, 15.5.2), but no registered scheme fits: the client authenticates to the
    proxy. The scheme is named after the mechanism EXTERNAL of SASL (RFC 4422). Browsers ignore schemes that they do not
    know, while `Basic` would open a dialog.
    """

    default_detail = "The proxy in front of this server did not name the user. Sign in there."
    challenge = "External"


class InvalidToken(Unauthenticated):
    title = "Invalid token"
    default_detail = "The token is not valid for this server."
    challenge = 'Bearer error="invalid_token"'
    code = "invalid_token"
    when = "the token is not valid for this server"


class TokenExpired(Unauthenticated):
    title = "Token expired"
    default_detail = "The token has expired. Send a new one."
    challenge = 'Bearer error="invalid_token"'
    code = "token_expired"
    when = "the token has expired; a new one is needed"


class CrossSite(ChatError):
    status = 403
    title = "Cross-site request"
    default_detail = "Pages of this origin may not use this server; see CORS_ORIGINS."
    code = "cross_site"
    when = "a web page whose origin is not in CORS_ORIGINS sent the request"


class NotFound(ChatError):
    status = 404
    title = "Not found"
    default_detail = "No such path."
    code = "not_found"
    when = "there is no such conversation, no such message in it, or no such path"


class NoSuchConversation(NotFound):
    default_detail = "There is no conversation with this id."


class NoSuchMessage(NotFound):
    default_detail = "The conversation has no message with this id."


class MethodNotAllowed(ChatError):
    status = 405
    title = "Method not allowed"
    default_detail = "This resource does not support that method; see the Allow header."
    code = "method_not_allowed"
    when = "the resource does not support the method; see `Allow`"


class ReplyInProgress(ChatError):
    status = 409
    title = "Reply in progress"
    default_detail = "A reply to this conversation is still running. Wait for its end, or stop it."
    code = "reply_in_progress"
    when = "a reply to the conversation is running"


class ConversationFull(ChatError):
    status = 409
    title = "Conversation full"
    default_detail = "This conversation has no room for another turn. Start a new one."
    code = "conversation_full"
    when = "the conversation's document has no room for another turn, a title or a head"


class NothingToRetry(ChatError):
    status = 409
    title = "Nothing to retry"
    default_detail = "There is no reply to a user's message that could be retried."
    code = "nothing_to_retry"
    when = "the visible conversation has no reply, or the reply answers no user's message"


class NotAReply(ChatError):
    status = 409
    title = "Not a reply"
    default_detail = "Only replies can be retried. To change a user's message, post the new one with its parentId."
    code = "not_a_reply"
    when = "the message to retry is not a reply"


class UnsupportedConversation(ChatError):
    status = 409
    title = "Unsupported conversation"
    default_detail = "Another application stored something in this conversation that is not text. Start a new one."
    code = "unsupported_conversation"
    when = "another application stored something in this conversation that is not text"


class PayloadTooLarge(ChatError):
    status = 413
    title = "Payload too large"
    default_detail = "The request's body is larger than this server accepts."
    code = "payload_too_large"
    when = "the body is too large"


class UnsupportedMediaType(ChatError):
    status = 415
    title = "Unsupported media type"
    default_detail = "The body must be JSON, sent with Content-Type: application/json."
    code = "unsupported_media_type"
    when = "the body is not sent as application/json"


class HostNotAllowed(ChatError):
    status = 421
    title = "Host not allowed"
    default_detail = "This server does not serve the requested host name; see ALLOWED_HOSTS."
    code = "host_not_allowed"
    when = "the server does not serve the name in the Host header"


class KeyReused(ChatError):
    status = 422
    title = "Idempotency key reused"
    default_detail = "This Idempotency-Key was already used with another body."
    code = "idempotency_key_reused"
    when = "the key was used with another body"


class QuotaExceeded(ChatError):
    """An owner's limit is reached (draft-ietf-httpapi-ratelimit-headers).

    :param policy: the limit's name, as in the header `RateLimit-Policy`
    :param retry_after_s: whole seconds
    """

    status = 429
    title = "Quota exceeded"
    type_uri = "https://iana.org/assignments/http-problem-types#quota-exceeded"
    code = "quota_exceeded"
    when = "the caller's limit of turns a minute or of running replies is reached; `violated-policies` names it"

    def __init__(self, policy: str, detail: str, retry_after_s: int) -> None:
        super().__init__(detail)
        self.policy = policy
        self.retry_after_s = retry_after_s

    def document(self, request_id: str) -> dict[str, object]:
        return {**super().document(request_id), "violated-policies": [self.policy]}


class TooManyStreams(ChatError):
    status = 429
    title = "Too many streams"
    default_detail = "The limit of open streams is reached. Close one, or try again later."
    retry_after_s = 5
    code = "too_many_streams"
    when = "the limit of open streams is reached"


class HeadersTooLarge(ChatError):
    status = 431
    title = "Headers too large"
    default_detail = "The request's headers are larger than this server accepts."
    code = "headers_too_large"
    when = "the request's line and headers are too large"


class TooManyConnections(ChatError):
    status = 503
    title = "Too many connections"
    default_detail = "The server has reached its limit of open connections. Try again later."
    retry_after_s = 5
    code = "too_many_connections"
    when = "the limit of open connections is reached"


class TooManyReplies(ChatError):
    status = 503
    title = "Too many replies"
    default_detail = "The server has reached its limit of running replies. Try again in a moment."
    retry_after_s = 2
    code = "too_many_replies"
    when = "the limit of running replies is reached"


class KeysUnavailable(ChatError):
    status = 503
    title = "Keys unavailable"
    default_detail = "The keys that verify tokens have not been received yet. Try again in a moment."
    retry_after_s = 10
    code = "keys_unavailable"
    when = "the issuer of the tokens has not sent its keys yet"


class DatabaseUnavailable(ChatError):
    status = 503
    title = "Database unavailable"
    default_detail = "The database does not answer. Try again in a moment."
    retry_after_s: int | None = 2
    code = "database_unavailable"
    when = "MongoDB does not answer; a retry with the same Idempotency-Key is safe"


class OutcomeUnknown(DatabaseUnavailable):
    """The connection failed after a write was sent: the caller must find out whether it was applied."""


class DatabaseRefused(DatabaseUnavailable):
    """The database answered with an error. Background jobs try again, as if it had not answered."""

    status = ChatError.status
    title = ChatError.title
    default_detail = "The database refused an operation. The server's log has its error code."
    retry_after_s = None
    code = ChatError.code
    when = ChatError.when


class Draining(ChatError):
    status = 503
    title = "Shutting down"
    default_detail = "This server is shutting down and starts no new replies."
    retry_after_s = 5
    code = "draining"
    when = "the server is shutting down"
