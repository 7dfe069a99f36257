"""What was done and what clients were told, with times; plain data, so that the checker is tested on made-up ones."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Post:
    """A post that was answered 202."""

    conversation_id: str
    key: str
    text: str
    answer: dict[str, Any]
    time: float


@dataclass(frozen=True)
class Seen:
    """An event as a client got it; `kind` is its name, or `history` for what it fetched after a reset."""

    time: float
    kind: str
    id: str
    data: dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """Something that was broken, from when to when (seconds); `hits` is `server`, `database` or `line`."""

    kind: str
    hits: str
    begin: float
    end: float


@dataclass
class Ledger:
    """All of a run."""

    interval_s: float
    slack_s: float
    posts: list[Post] = field(default_factory=list)
    seen: dict[tuple[str, int], list[Seen]] = field(default_factory=dict)
    """By conversation and number of the client."""
    faults: list[Fault] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    """What had not come to its end when the run was over."""
    retried: int = 0
    reconnects: int = 0
