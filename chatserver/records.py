"""Conversations as plain values: no driver, no I/O. Ids are 24 hex digits, times are in UTC."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

from chatserver.errors import ReplyCode

Status = Literal["complete", "stopped", "failed", "interrupted", "superseded", "streaming"]
"""Of a message; "streaming" is never stored."""


class ReplyError(NamedTuple):
    """Why a reply failed or was interrupted."""

    code: str
    message: str


INTERRUPTED = ReplyError(
    str(ReplyCode.INTERRUPTED), "The server stopped while it wrote this reply. Its text so far is kept."
)


class Key(NamedTuple):
    """Names a conversation by its owner and its id. Keys of two owners with the same id are different conversations.

    In the database at most one of them exists.

    :ivar owner: None for the conversations of a server without users
    """

    owner: str | None
    id: str


@dataclass(frozen=True, slots=True)
class Message:
    """A stored message, or a running reply."""

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


PAGE_SIZE = 128 * 1024
"""The limit of one read: the messages that begin within this many bytes, and this many code points of a larger message.
Decoding more would hold the interpreter, and with it the event loop, for too long. The two limits are equal, so that a
message that is read in part is always the last of its page."""


class Newest(NamedTuple):
    """The newest messages, a running reply counted as one of them; without a `limit`, all."""

    limit: int | None = None


class Before(NamedTuple):
    """The newest messages before one, which may be the running reply; without a `limit`, all of them."""

    message_id: str
    limit: int | None = None


class After(NamedTuple):
    """A message without its first `chars` code points and the messages after it; without `chars`, only the latter."""

    message_id: str
    chars: int | None


class Between(NamedTuple):
    """The messages with the indexes `begin` to `end` - 1, without the first `chars` code points of the first one."""

    begin: int
    end: int
    chars: int = 0


Span = Newest | Before | After | Between
"""Which messages of a conversation to read."""


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation with the first of the requested messages, as many as may be in memory at once.

    `older` is the number of messages before `messages`. `following` is the rest of the requested messages; if it has
    `chars`, the last message of `messages` is a part that ends there. `length` is the whole length in code points of a
    last message that is read in part. `last_id` is the id of the conversation's last message, even if that is not in
    `messages`. `found` is whether the message that the request names exists.
    """

    created_at: datetime
    updated_at: datetime
    messages: Sequence[Message]
    reply: StoredReply | None
    last_id: str | None
    older: int
    found: bool = True
    following: Between | None = None
    length: int | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """The names of a turn's parts; the ids are 24 hex digits."""

    conversation: Key
    message_id: str
    reply_id: str


@dataclass(frozen=True, slots=True)
class StartedTurn:
    """A turn that is stored and whose reply is to be written.

    `new_message` is the user's message, None at a retry; `messages` are the newest ones, the last being the
    user's; `number` counts the user's messages; `previous_id` is the message right before this turn, if any;
    `reply_room` is how many bytes the reply may have.
    """

    turn: Turn
    new_message: Message | None
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

    `beginning` is the beginning of its first user message; `is_truncated` is whether the message is longer.
    """

    id: str
    beginning: str
    is_truncated: bool
    created_at: datetime
    updated_at: datetime
    message_count: int
    streaming: bool
    place: Place
