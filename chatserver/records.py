"""Conversations as plain values: no driver, no I/O. Ids are 24 hex digits, times are in UTC."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

from chatserver.branches import Parent, Tree
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


class View(NamedTuple):
    """What clients see of a conversation, apart from the text of its messages.

    :ivar head: the id of the message at the end of the active path, running replies left out; None without messages
    :ivar has_branches: whether its streams open with the head
    :ivar title: as chosen by a user; None for the automatic one
    """

    head: str | None
    has_branches: bool = False
    title: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """A stored message, or a running reply.

    `parent` and `key` (the idempotency key of a retry) are those of a reply that is to be stored with them.
    """

    id: str
    role: str
    """"user" or "assistant"; documents of other applications may have others."""
    content: str
    created_at: datetime
    status: Status = "complete"
    error: ReplyError | None = None
    parent: Parent | None = None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class StoredReply:
    """A running reply as checkpointed. `parent` is None if it continues the last message of the array."""

    id: str
    content: str
    created_at: datetime
    renewed_at: object
    """The lease's date as MongoDB has it; None if there is none."""
    expired: bool
    parent: Parent | None = None
    key: str | None = None


PAGE_SIZE = 128 * 1024
"""The limit of one read: the messages that begin within this many bytes, and this many code points of a larger message.
Decoding more would hold the interpreter, and with it the event loop, for too long. The two limits are equal, so that a
message that is read in part is always the last of its page."""


class Newest(NamedTuple):
    """The newest messages of the active path, a running reply counted as one of them; without a `limit`, all."""

    limit: int | None = None


class Before(NamedTuple):
    """The newest messages on the path to one, which may be the running reply; without a `limit`, all of them."""

    message_id: str
    limit: int | None = None


class After(NamedTuple):
    """A message without its first `chars` code points and the messages after it; without `chars`, only the latter.

    In the order of the array, of all branches.
    """

    message_id: str
    chars: int | None


class All(NamedTuple):
    """All messages of all branches, in the order of the array.

    :ivar with_tree: whether the record must have the tree, even if there are no branches
    """

    with_tree: bool = False


class Between(NamedTuple):
    """The messages with the indexes `begin` to `end` - 1, without the first `chars` code points of the first one."""

    begin: int
    end: int
    chars: int = 0


class Along(NamedTuple):
    """The messages with some indexes, without the first `chars` code points of the first one."""

    indexes: Sequence[int]
    chars: int = 0


Rest = Between | Along
"""What remains to be read of a span."""
Span = Newest | Before | After | All | Rest
"""Which messages of a conversation to read."""


@dataclass(frozen=True, slots=True)
class Record:
    """A conversation with the first of the requested messages, as many as may be in memory at once.

    `older` is the number of messages before `messages`. `following` is the rest of the requested messages; if it has
    `chars`, the last message of `messages` is a part that ends there. `length` is the whole length in code points of a
    last message that is read in part. `last_id` is the id of the conversation's last message, even if that is not in
    `messages`. `found` is whether the message that the request names exists. `tree` has the parents of all messages and
    of a running reply; None if each message continues the one before it, as far as was read, or if no read needs it.
    """

    created_at: datetime
    updated_at: datetime
    messages: Sequence[Message]
    reply: StoredReply | None
    last_id: str | None
    older: int
    view: View
    found: bool = True
    following: Rest | None = None
    length: int | None = None
    tree: Tree | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """The names of a turn's parts; the ids are 24 hex digits."""

    conversation: Key
    message_id: str
    reply_id: str


@dataclass(frozen=True, slots=True)
class StartedTurn:
    """A turn that is stored and whose reply is to be written.

    `new_message` is the user's message, None at a retry; `messages` are the newest ones of the active path, the last
    being the user's; `number` counts the user's messages on it; `previous_id` is the message right before this turn in
    the array, if any; `reply_room` is how many bytes the reply may have; `parent` and `key` are the reply's; `title` is
    the one that a user chose for the conversation.
    """

    turn: Turn
    new_message: Message | None
    messages: Sequence[Message]
    number: int
    previous_id: str | None
    created_at: datetime
    reply_room: int
    parent: Parent | None = None
    key: str | None = None
    title: str | None = None


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

    `title` is the one that a user chose, or None. `beginning` is the beginning of the active path's first user message;
    `is_truncated` is whether the message is longer. `message_count` counts the messages of all branches.
    """

    id: str
    title: str | None
    beginning: str
    is_truncated: bool
    created_at: datetime
    updated_at: datetime
    message_count: int
    streaming: bool
    place: Place
