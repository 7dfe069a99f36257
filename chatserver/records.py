"""What is stored of a conversation, in plain values: no driver, no I/O. Ids are 24 hex digits, times are in UTC."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

Status = Literal["complete", "stopped", "failed", "interrupted", "superseded", "streaming"]
"""Of a message; "streaming" is never stored."""


class ReplyError(NamedTuple):
    """Why a reply failed or was interrupted."""

    code: str
    message: str


INTERRUPTED = ReplyError("interrupted", "The server stopped while it wrote this reply; what was saved is kept.")


@dataclass(frozen=True, slots=True)
class Message:
    """A message as stored, or the one that still grows."""

    id: str
    role: str
    """"user" or "assistant"; documents of other applications may have others."""
    content: str
    created_at: datetime
    status: Status = "complete"
    error: ReplyError | None = None


@dataclass(frozen=True, slots=True)
class StoredReply:
    """A running reply as checkpointed."""

    id: str
    content: str
    created_at: datetime
    renewed_at: object
    """The lease's date as MongoDB has it; None if there is none."""
    expired: bool


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation, or its messages from one on.

    `older` is the number of messages before `messages`; `last_id` is the conversation's last message, whether it is
    among them or not; `found` is whether the message asked for is there.
    """

    created_at: datetime
    updated_at: datetime
    messages: Sequence[Message]
    reply: StoredReply | None
    last_id: str | None
    older: int
    found: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """The ids of a turn, all 24 hex digits."""

    conversation_id: str
    message_id: str
    reply_id: str


@dataclass(frozen=True, slots=True)
class Begun:
    """A turn that is stored and whose reply is to be written.

    `said` is the user's message if it is new, None at a retry; `messages` are the newest ones, the last being the
    user's; `number` counts the user's messages; `previous_id` is the message right before this turn, if any;
    `reply_room` is how many bytes the reply may have.
    """

    turn: Turn
    said: Message | None
    messages: Sequence[Message]
    number: int
    previous_id: str | None
    created_at: datetime
    reply_room: int


class Place(NamedTuple):
    """A conversation's place in the list, which is sorted by last activity, the latest first.

    Conversations without a date in `updatedAt` come after all others, sorted by id, the highest first.
    """

    updated_ms: int | None
    """Milliseconds since 1970."""
    id: str


@dataclass(frozen=True, slots=True)
class Summary:
    """A conversation in the list.

    `beginning` is the beginning of its first user message; `is_cut` is whether that goes on.
    """

    id: str
    beginning: str
    is_cut: bool
    created_at: datetime
    updated_at: datetime
    message_count: int
    streaming: bool
    place: Place
