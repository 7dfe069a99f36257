"""The failures of a model provider, with their meaning and remedy in the sentences that users read. No I/O.

The provider's own message is used only to recognise an error. It may quote the key or the conversation, so it is
neither logged nor sent to a client.
"""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from chatserver.errors import ReplyCode, SourceError

LONGEST_WAIT_SHOWN_S = 86_400.0  # some servers ask for centuries

_WORDS_CHARS = 10_000
_NAME = re.compile(r"[\w.\[\]-]{1,80}", re.ASCII)
_STATUS = re.compile("[45][0-9][0-9]")

# OpenAI, llama.cpp, GitHub Models, LiteLLM, Anthropic behind a gateway
_TOO_LONG_NAMES = {
    "context_length_exceeded",
    "exceed_context_size_error",
    "string_above_max_length",
    "tokens_limit_reached",
    "model_max_prompt_tokens_exceeded",
    "context_window_exceeded",
    "contextwindowexceedederror",
    "request_too_large",
}
# vLLM and most others have no name for it. "Request too large" is a 429 that waiting does not cure.
_TOO_LONG_WORDS = re.compile(
    r"context (length|size|window)|maximum (model|prompt|input) length|context.?window.?exceeded|max(imum)?.seq.len"
    r"|(prompt|input|request|conversation|messages?)\b.{0,40}? (is|are) too (long|large)|request too large"
    r"|input token count|(reduce|shorten) (the|your) (length of )?(the |your )?(prompt|input|messages)"
    r"|input tokens exceed|too many (input |prompt )tokens|`?inputs`? tokens \+",
    re.IGNORECASE | re.DOTALL,
)
_NO_CREDIT_NAMES = {
    "insufficient_quota",
    "insufficient_balance",
    "insufficient_credits",
    "exceeded_current_quota_error",
    "billing_hard_limit_reached",
    "billing_not_active",
}
_NO_CREDIT_WORDS = re.compile(r"insufficient (account )?(balance|quota|credits?|funds)|credit balance", re.IGNORECASE)
_FILTER_NAMES = {
    "content_filter",
    "content_policy_violation",
    "contentpolicyviolationerror",
    "responsibleaipolicyviolation",
    "data_inspection_failed",
    "invalid_prompt",
    "moderation_blocked",
}
_RATE_LIMIT_NAMES = {"rate_limit_exceeded", "rate_limit_error", "ratelimiterror", "too_many_requests"}
_UNKNOWN_MODEL_NAMES = {"model_not_found", "deploymentnotfound", "model_not_available"}
_BUSY_NAMES = {
    "server_error",
    "internal_error",
    "internal_server_error",
    "internalservererror",
    "overloaded_error",
    "service_unavailable",
    "unavailable_error",
}
_TEMPORARY = {408, 409, 425}


class TemporaryError(SourceError):
    """A failure that another attempt may overcome, after `wait_s` seconds if the server asked for that."""

    def __init__(self, code: str, message: str, wait_s: float | None = None) -> None:
        super().__init__(code, message)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """An error that a model server reported.

    :ivar status: the HTTP status, or the status named by an error inside a stream; None if there is none
    :ivar body: the JSON of the error, in one of the many shapes that servers have for it
    :ivar headers: of the response
    :ivar redirected: whether the request was redirected before
    """

    status: int | None
    body: object
    headers: Mapping[str, str] = field(default_factory=dict)
    redirected: bool = False

    @property
    def names(self) -> dict[str, str]:
        """Return the error's `code`, `type` and `param`, as far as they are names and not sentences."""
        found = {}
        for error in _levels(self.body):
            for name in ("code", "type", "param"):
                if _NAME.fullmatch(text := str(error.get(name) or "")):
                    found[name] = text
        return found

    @property
    def words(self) -> str:
        """Return the error's message. Never show or log it."""
        messages: list[object] = [self.body] if isinstance(self.body, str) else []
        for error in _levels(self.body):
            messages += [error.get("message"), error.get("detail"), error.get("error")]
        return "\n".join(message for message in messages if isinstance(message, str))[:_WORDS_CHARS]


def _levels(body: object) -> Iterator[Mapping[str, Any]]:
    """Return the objects that describe an error, the outer first: `{"error": {...}}`, a list of that, or neither."""
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    if isinstance(body, dict):
        yield body
        if isinstance(inner := body.get("error"), dict):
            yield inner


def explain(report: ErrorReport, model: str) -> SourceError:
    """Return the meaning of an error that the server reported.

    :param model: the name of the model that was asked
    """
    names = {name.lower() for name in report.names.values()}
    status = report.status
    if status is None and _STATUS.fullmatch(code := report.names.get("code", "")):
        status = int(code)
    if report.redirected and status in (401, 403, 404, 405):
        return redirected()
    if status == 401:
        return SourceError(ReplyCode.AUTHENTICATION, "The model provider rejected the API key. Check OPENAI_API_KEY.")
    if status == 402 or names & _NO_CREDIT_NAMES or _NO_CREDIT_WORDS.search(report.words):
        return SourceError(
            ReplyCode.RATE_LIMITED,
            "The account at the model provider has no credit left, or not enough for this request. "
            "Add credit, then retry.",
        )
    if names & _FILTER_NAMES:
        return SourceError(ReplyCode.REFUSED, "The model provider's content filter rejected the prompt. Rephrase it.")
    if status == 413 or names & _TOO_LONG_NAMES or _TOO_LONG_WORDS.search(report.words):
        return SourceError(
            ReplyCode.FAILED,
            f"This conversation is too long for the model {model}. Start a new conversation, or lower "
            "OPENAI_HISTORY_CHARS or OPENAI_MAX_TOKENS.",
        )
    if status == 403:
        return SourceError(
            ReplyCode.AUTHENTICATION,
            f"The API key has no access to the model {model}. Check OPENAI_API_KEY, OPENAI_MODEL and the account.",
        )
    wait_s = retry_after(report.headers)
    later = "in a minute" if wait_s is None else f"in {math.ceil(wait_s)} s"
    if status == 429 or (status is None and names & _RATE_LIMIT_NAMES):
        return TemporaryError(
            ReplyCode.RATE_LIMITED, f"The model provider's rate limit was exceeded. Retry {later}.", wait_s
        )
    if status is not None and (status >= 500 or status in _TEMPORARY):
        return unavailable(f"has a temporary problem ({status})", later, wait_s)
    if status is None and names & _BUSY_NAMES:
        return unavailable("has a temporary problem", later, wait_s)
    if status == 404 or names & _UNKNOWN_MODEL_NAMES:
        return SourceError(
            ReplyCode.FAILED,
            f"The model provider does not know the model {model}. Check OPENAI_MODEL and OPENAI_BASE_URL.",
        )
    if status is None:
        return SourceError(ReplyCode.FAILED, "The model provider reported an error instead of a reply. Retry later.")
    if status < 400 or status == 405:
        return SourceError(
            ReplyCode.FAILED, f"The model provider accepts no chat completions there ({status}). Check OPENAI_BASE_URL."
        )
    return SourceError(
        ReplyCode.FAILED,
        f"The model provider rejected the request ({status}). Check OPENAI_MODEL and the other OPENAI_ settings; "
        "the log has the details.",
    )


def unavailable(what: str, later: str = "in a minute", wait_s: float | None = None) -> TemporaryError:
    """Return the error of a server that cannot answer now."""
    return TemporaryError(
        ReplyCode.UNAVAILABLE,
        f"The model provider {what}. Retry {later}; if the problem persists, check OPENAI_BASE_URL.",
        wait_s,
    )


def redirected() -> SourceError:
    """Return the error of a redirect that loses the POST, or of too many redirects."""
    return SourceError(
        ReplyCode.UNAVAILABLE,
        "The model provider redirects requests, and the redirect failed. Set OPENAI_BASE_URL to the final address.",
    )


def timed_out() -> SourceError:
    """Return the error of a server that sent nothing for too long."""
    return SourceError(
        ReplyCode.TIMEOUT,
        "The model provider stopped sending data. Retry in a moment, or raise OPENAI_READ_TIMEOUT_S.",
    )


def incomplete(reason: str | None = None) -> TemporaryError:
    """Return the error of a reply that the server did not finish.

    :param reason: the finish_reason, if the server named one
    """
    named = f" (finish_reason: {reason})" if reason else ""
    return TemporaryError(
        ReplyCode.INCOMPLETE, f"The model provider ended the answer before it was complete{named}. Retry in a moment."
    )


def invalid() -> SourceError:
    """Return the error of data that is not a chat completion."""
    return SourceError(
        ReplyCode.INVALID, "The model provider sent data that is not a chat completion. Retry in a moment."
    )


def not_a_stream() -> SourceError:
    """Return the error of an answer without any chat completion, such as a web page."""
    return SourceError(
        ReplyCode.INVALID,
        "The server at OPENAI_BASE_URL answered, but not with a chat completion. Check OPENAI_BASE_URL (most end in "
        "/v1).",
    )


def too_large(what: str) -> SourceError:
    """Return the error of data that exceeds a limit of size.

    :param what: names the limit: "a line of more than 1 MB"
    """
    return SourceError(ReplyCode.TOO_LONG, f"The model provider sent {what}, which is more than is accepted.")


def shown(name: str) -> str:
    """Return a name that a server sent if it may be shown and logged, else ""."""
    return name if _NAME.fullmatch(name) else ""


_WAITS: tuple[tuple[str, Callable[[str], float]], ...] = (
    ("retry-after-ms", lambda text: float(text) / 1000),
    ("retry-after", float),
    ("retry-after", lambda text: parsedate_to_datetime(text).timestamp() - time.time()),
)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that the server asks to wait, if it does."""
    for name, seconds in _WAITS:
        with suppress(KeyError, ValueError):
            if (wait_s := seconds(headers[name])) > 0:
                return min(wait_s, LONGEST_WAIT_SHOWN_S)
    return None
