"""A timer that many replies share."""

import asyncio
import math
from collections import deque

_WOKEN_AT_ONCE = 200


class CoalescingTimer:
    """Wakes all sleepers that fall due within the same tick by one timer, which halves the cost of a token.

    At most `_WOKEN_AT_ONCE` sleepers are woken per iteration of the event loop. So an overloaded loop has time for its
    other work, and each reply, woken less often, sends more text at a time.

    :param tick_s: how late a sleeper may be woken
    """

    def __init__(self, tick_s: float) -> None:
        self._tick_s = tick_s
        self._asleep: dict[int, list[asyncio.Future[None]]] = {}
        self._due: deque[asyncio.Future[None]] = deque()

    def at(self, time: float, loop: asyncio.AbstractEventLoop) -> "asyncio.Future[None]":
        """Return a future that is done at a time of the event loop's clock, or up to a tick later."""
        sleeper: asyncio.Future[None] = loop.create_future()
        tick = math.ceil(time / self._tick_s)
        if (asleep := self._asleep.get(tick)) is None:
            asleep = self._asleep[tick] = []
            loop.call_at(tick * self._tick_s, self._ring, tick)
        asleep.append(sleeper)
        return sleeper

    def _ring(self, tick: int) -> None:
        is_waking = bool(self._due)
        self._due.extend(self._asleep.pop(tick))
        if not is_waking:
            self._wake()

    def _wake(self) -> None:
        for _ in range(min(_WOKEN_AT_ONCE, len(self._due))):
            sleeper = self._due.popleft()
            if not sleeper.done():  # its reply was cancelled
                sleeper.set_result(None)
        if self._due:
            asyncio.get_running_loop().call_soon(self._wake)
