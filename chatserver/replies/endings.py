"""The ways in which a reply ends."""

from typing import NamedTuple

from chatserver.errors import ReplyCode
from chatserver.records import INTERRUPTED as INTERRUPTED_ERROR
from chatserver.records import ReplyError, Status


class Ending(NamedTuple):
    """The status of a reply that has ended, and its error if it failed or was interrupted."""

    status: Status
    error: ReplyError | None = None


def failed(code: ReplyCode, message: str) -> Ending:
    """Return the ending of a reply that failed.

    :param message: for users: the failure and the remedy
    """
    return Ending("failed", ReplyError(str(code), message))


COMPLETE = Ending("complete")
STOPPED = Ending("stopped")
INTERRUPTED = Ending("interrupted", INTERRUPTED_ERROR)
FULL = failed(ReplyCode.CONVERSATION_FULL, "The reply was truncated because the conversation has no more room.")
EMPTY = failed(ReplyCode.EMPTY, "The model sent no text. Retry, or rephrase the question.")
CRASHED = failed(ReplyCode.FAILED, "The source of replies failed unexpectedly. Try again.")


def too_long(max_chars: int) -> Ending:
    """Return the ending of a reply that exceeds `max_chars` characters."""
    return failed(
        ReplyCode.TOO_LONG,
        f'The reply reached its maximum length of {max_chars} characters (MAX_REPLY_CHARS). Write "continue".',
    )
