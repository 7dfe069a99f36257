"""What was done and what clients were told, with times; plain data, so that the checker is tested on made-up ones."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Post:
    """A post that was answered 202."""

    conversation_id: str
    key: str
    answer: dict[str, Any]


@dataclass(frozen=True)
class Retry:
    """That a reply was to be made anew, and the id of the new one; None if no answer came, so that it may or may not
    have been.
    """

    conversation_id: str
    reply_id: str
    new_id: str | None


@dataclass(frozen=True)
class Deletion:
    """A conversation that was deleted: when that was answered, and its messages before its last turn, as stored."""

    time: float
    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class Seen:
    """An event as a client got it; `kind` is its name.

    Or `history`, what it fetched after a reset; `gone`, if there was none; `left`, when the server or the line ended a
    stream that was `opened` at that time: with the last chunk of its body, which says that the client has everything
    (`clean`), or without.
    """

    time: float
    kind: str
    id: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """Something that was broken, from when to when (seconds).

    `hits` is `server`, `shutdown` (a server that ended in order, and may lose nothing), `database` or `line`.
    """

    kind: str
    hits: str
    begin: float
    end: float


@dataclass
class Ledger:
    """All of a run."""

    interval_s: float
    lease_s: float
    posts: list[Post] = field(default_factory=list)
    stops: list[tuple[str, str]] = field(default_factory=list)
    """Conversation and reply, of the stops that took effect by their answers."""
    retries: list[Retry] = field(default_factory=list)
    deletions: dict[str, Deletion] = field(default_factory=dict)
    """By conversation."""
    seen: dict[tuple[str, int], list[Seen]] = field(default_factory=dict)
    """By conversation and number of the client."""
    faults: list[Fault] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    """What had not come to its end when the run was over."""
    resent: int = 0
    reconnects: int = 0
