"""Delivery: one coroutine writes the frames of all live conversations to their subscribers."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from time import monotonic, time

from tornado.locks import Condition

from chatserver import tasks
from chatserver.hub.live import Counts, LiveConversation, Subscriber, for_each
from chatserver.metrics import Metrics
from chatserver.records import Key

logger = logging.getLogger(__name__)

_SLICE_S = 0.005
"""Seconds after which delivery yields to other tasks, requests above all."""


class Hub:
    """All live conversations of this process."""

    def __init__(self, metrics: Metrics) -> None:
        self.counts = counts = Counts()
        self._conversations: dict[Key, LiveConversation] = {}
        self._dirty: deque[LiveConversation] = deque()
        """The conversations with something to deliver, in order: a busy one waits for its turn behind all others."""
        self._wake = Condition()
        self._next_expiry = inf
        """The earliest `valid_until` of a subscriber; possibly of one that is gone."""
        metrics.watch("chatserver_live_conversations", "Conversations in memory.", lambda: len(self._conversations))
        metrics.watch("chatserver_tokens", "Chunks of text from the sources.", lambda: counts.tokens, counter=True)
        metrics.watch("chatserver_events_sent", "Events written to streams.", lambda: counts.events, counter=True)
        metrics.watch("chatserver_stream_writes", "Writes to streams.", lambda: counts.writes, counter=True)

    @property
    def conversations(self) -> list[LiveConversation]:
        """All live conversations."""
        return list(self._conversations.values())

    def get(self, key: Key) -> LiveConversation | None:
        """Return a live conversation, or None."""
        return self._conversations.get(key)

    @contextmanager
    def hold(self, key: Key) -> Iterator[LiveConversation]:
        """Yield the live conversation, created if necessary; it is not released inside the block."""
        live = self._conversations.get(key)
        if live is None:
            live = self._conversations[key] = LiveConversation(key, self.counts, self._schedule)
        live.holders += 1
        try:
            yield live
        finally:
            live.holders -= 1
            self.release(live)

    def release(self, live: LiveConversation) -> None:
        """Remove a conversation from memory if it is unused."""
        if live.is_unused and self._conversations.get(live.key) is live:
            del self._conversations[live.key]

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Remove a subscriber from its conversation, if it has one."""
        if (live := subscriber.live) is not None:
            live.unsubscribe(subscriber)
            self.release(live)

    def replay(
        self,
        subscriber: Subscriber,
        opening: bytes,
        frames: Sequence[bytes],
        then: Callable[[], None] | None = None,
    ) -> None:
        """Send a subscriber the opening of its stream and the frames of stored messages, before the live ones.

        :param then: called once they are written, unless the connection is lost before
        """
        self._next_expiry = min(self._next_expiry, subscriber.valid_until)
        self.counts.events += len(frames)
        subscriber.replay(opening + b"".join(frames), then)

    def reset(self, subscriber: Subscriber) -> None:
        """Send a subscriber a `reset`, because its position is unknown, and end its stream."""
        self.counts.events += 1
        subscriber.end(subscriber.format.RESET)

    # -- delivery ------------------------------------------------------------------------------------------------

    async def deliver(self) -> None:
        """Deliver until cancelled."""
        await tasks.repeat(self._deliver_slice)

    async def _deliver_slice(self) -> None:
        # No `await` between the check and the wait, or a wake-up would be lost.
        while not self._dirty:
            await self._wake.wait()
        if time() >= self._next_expiry:
            self._end_expired()
        pause_at = monotonic() + _SLICE_S
        while self._dirty and monotonic() < pause_at:
            live = self._dirty.popleft()
            try:
                live.deliver()
            except Exception:
                logger.exception("a delivery failed", extra={"conversation": live.key.id})
                live.abort()
        if self._dirty:
            await asyncio.sleep(0)

    def _end_expired(self) -> None:
        """End the streams of expired credentials. Usually their timer has done it, unless the machine was suspended."""
        now = time()
        subscribers = [each for live in self.conversations for each in live.all_subscribers]
        for_each((each for each in subscribers if now >= each.valid_until), lambda each: each.finish())
        self._next_expiry = min((each.valid_until for each in subscribers if now < each.valid_until), default=inf)

    def _schedule(self, live: LiveConversation) -> None:
        if not self._dirty:  # otherwise delivery is awake already
            self._wake.notify()
        self._dirty.append(live)
