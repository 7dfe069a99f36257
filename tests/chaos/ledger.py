"""The record of a run: requests, received events and faults, with times. Plain data, so that tests can make it up."""

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
    """A retry of a reply that was answered 202, and the id of the new reply."""

    conversation_id: str
    key: str
    reply_id: str
    new_id: str


@dataclass(frozen=True)
class Deletion:
    """The deletion of a conversation: the time of its answer, and the stored messages before its last turn."""

    time: float
    messages: list[dict[str, Any]]


@dataclass(frozen=True)
class Seen:
    """An event that a client received; `kind` is the event's name.

    Three further kinds: `history`, the history that the client fetched after a reset; `gone`, if there was no history;
    `left`, the end of a stream. Its data holds the time when the stream was `opened` and whether its body ended with
    the last chunk (`clean`), which promises that the client has received everything.
    """

    time: float
    kind: str
    id: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """An injected fault, with the times of its begin and end in seconds.

    `hits` is `server`, `shutdown` (of a server, which must lose nothing), `database` or `connection`.
    """

    kind: str
    hits: str
    begin: float
    end: float


@dataclass
class Ledger:
    """The whole record of a run."""

    interval_s: float
    lease_s: float
    posts: list[Post] = field(default_factory=list)
    stops: list[tuple[str, str]] = field(default_factory=list)
    """Conversation and reply of each stop that was answered with a reply's id."""
    retries: list[Retry] = field(default_factory=list)
    deletions: dict[str, Deletion] = field(default_factory=dict)
    """By conversation."""
    seen: dict[tuple[str, int], list[Seen]] = field(default_factory=dict)
    """By conversation and number of the client."""
    faults: list[Fault] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    """Descriptions of clients that had not finished when the run ended."""
    resent: int = 0
    branches: int = 0
    """How many times a post continued another message than the head, or another branch was shown."""
    reconnects: int = 0
