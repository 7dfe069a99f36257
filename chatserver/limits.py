"""The limits of each owner. Pure: everything is counted in memory, for this process alone.

None of them applies to the owner `None`, who has all conversations of a server without users.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from chatserver.errors import QuotaExceeded

T = TypeVar("T")

TURNS, REPLIES = "turns", "replies"
"""The names of the limits."""
WINDOW_S = 60
"""Seconds in which an owner's whole allowance of turns is restored."""
_NS = 1_000_000_000
_TURN = WINDOW_S * _NS
"""What one turn costs. An allowance of n turns regains n units in each nanosecond, so that all times are whole."""


@dataclass(frozen=True, slots=True)
class Quota:
    """The state of one limit of an owner.

    :ivar policy: the limit's name
    :ivar limit: the number of turns in `WINDOW_S`, or of replies at once
    :ivar remaining: how many of them are left
    :ivar reset_s: whole seconds until one more is left, 0 if all are; None if that depends on the end of another one
    """

    policy: str
    limit: int
    remaining: int
    reset_s: int | None = None


class TurnLimit:
    """Limits how many turns each owner starts, by the generic cell rate algorithm (GCRA).

    An owner has an allowance of `per_minute` turns. Each turn takes one, and the allowance is restored evenly, so that
    an empty one is full after a minute. In any period of n seconds an owner therefore starts at most `per_minute` turns
    and n * `per_minute` / 60 more. A refused turn takes nothing.

    :param per_minute: 0 for any number
    :param clock: a monotonic time in nanoseconds
    """

    def __init__(self, per_minute: int, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.clock = clock
        self._per_minute = per_minute
        self._full_at: dict[str, int] = {}
        """Owner -> the time in units at which the allowance is full, ordered by the last turn. It is at most a minute
        after that turn, so nobody stays here for longer."""

    def __len__(self) -> int:
        """Return the number of owners in memory: at most those who took a turn in the minute before the last one."""
        return len(self._full_at)

    def take(self, owner: str | None) -> None:
        """Take one turn from an owner's allowance.

        :raises QuotaExceeded: if none is left; `retry_after_s` seconds later there is one
        """
        if owner is None or not self._per_minute:
            return
        now = self.clock() * self._per_minute
        self._forget_full(now)
        missing = self._missing(owner, now)
        if missing > (self._per_minute - 1) * _TURN:
            raise QuotaExceeded(TURNS, "You have started too many turns. Wait a moment.", self._reset_s(missing))
        self._full_at.pop(owner, None)
        self._full_at[owner] = now + missing + _TURN

    def give_back(self, owner: str | None) -> None:
        """Return a turn that was taken."""
        if owner in self._full_at:
            self._full_at[owner] -= _TURN

    def quota(self, owner: str | None) -> Quota | None:
        """Return the state of an owner's allowance; None if there is no limit."""
        if owner is None or not self._per_minute:
            return None
        missing = self._missing(owner, self.clock() * self._per_minute)
        remaining = self._per_minute - _ceil(missing, _TURN)
        return Quota(TURNS, self._per_minute, remaining, self._reset_s(missing))

    def _missing(self, owner: str, now: int) -> int:
        """Return how many units an owner's allowance lacks."""
        return max(0, self._full_at.get(owner, now) - now)

    def _reset_s(self, missing: int) -> int:
        """Return the seconds, rounded up, until one more turn is left; 0 if nothing is missing."""
        units = (missing - 1) % _TURN + 1 if missing else 0
        return _ceil(units, self._per_minute * _NS)

    def _forget_full(self, now: int) -> None:
        while self._full_at and self._full_at[owner := next(iter(self._full_at))] <= now:
            del self._full_at[owner]


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def decrement(counter: Counter[T], name: T) -> None:
    """Subtract one from a count, and remove it at 0, so that the counter has no more names than are in use."""
    counter[name] -= 1
    if not counter[name]:
        del counter[name]
