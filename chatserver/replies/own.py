"""The replies of this process, being written or being started."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from tornado.locks import Condition

from chatserver.limits import decrement
from chatserver.replies.writer import Writer


class OwnReplies:
    """The table of a process's replies.

    A reply is listed while its start is being stored, so that readers who find it in the database wait until it is
    published; then its writer is listed until it has ended.
    """

    def __init__(self) -> None:
        self.writers: dict[str, Writer] = {}
        """Reply id -> writer."""
        self._starting: dict[str, asyncio.Event] = {}
        """Reply id -> set when its start is published, or known not to be stored."""
        self._owners: Counter[str | None] = Counter()
        """Owner -> the number of the owner's replies in the table."""
        self._changed = Condition()

    def __len__(self) -> int:
        return len(self.writers) + len(self._starting)

    @property
    def ids(self) -> list[str]:
        """The ids of all replies in the table."""
        return [*self.writers, *self._starting]

    @property
    def starting(self) -> int:
        """The number of replies whose start is not settled."""
        return len(self._starting)

    def of_owner(self, owner: str | None) -> int:
        """Return the number of an owner's replies in the table."""
        return self._owners[owner]

    @contextmanager
    def start(self, reply_id: str, owner: str | None) -> Iterator[None]:
        """List a reply as starting inside the block."""
        settled = self._starting[reply_id] = asyncio.Event()
        self._owners[owner] += 1
        try:
            yield
        finally:
            del self._starting[reply_id]
            decrement(self._owners, owner)
            settled.set()
            self._changed.notify_all()

    def unsettled(self, reply_id: str) -> asyncio.Event | None:
        """Return the event that is set once a starting reply is settled; None if the reply is not starting."""
        return self._starting.get(reply_id)

    def add(self, writer: Writer) -> None:
        """List a writer."""
        self.writers[writer.reply.message_id] = writer
        self._owners[writer.live.key.owner] += 1

    def remove(self, writer: Writer) -> None:
        """Remove a writer that has ended."""
        del self.writers[writer.reply.message_id]
        decrement(self._owners, writer.live.key.owner)
        self._changed.notify_all()

    async def idle_within(self, seconds: float) -> bool:
        """Wait until the table is empty; return whether that happened within `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                while self:
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True
