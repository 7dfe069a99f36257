"""Leases: a running reply belongs to the server that renews its lease.

Each checkpoint saves a reply's text and renews its lease. If the lease has expired, the server is presumed dead: any
server that finds the reply stores its end, "interrupted", with the text of the last checkpoint. The dates are
MongoDB's, so the servers' clocks need not agree.

While MongoDB is away no lease can be renewed. So after an outage, which the sweeps notice, no server is presumed dead
until every server had time to renew its leases.
"""

import asyncio
import logging
from math import inf
from time import monotonic

from chatserver.errors import DatabaseUnavailable
from chatserver.records import Key, Message, StoredReply
from chatserver.replies import endings
from chatserver.replies.endings import Ending
from chatserver.replies.own import OwnReplies
from chatserver.replies.writer import STORE_ATTEMPTS
from chatserver.settings import Settings
from chatserver.store import Store

logger = logging.getLogger(__name__)

_BATCH = 200
"""The approximate number of replies in one checkpoint."""
_MAX_SWEEP_INTERVAL_S = 5.0
_RENEWAL_S = 1.5
"""How long a server may take after an outage to find the database again and to renew its leases."""


class Leases:
    """Renews the leases of this process's replies, and ends the replies whose lease has expired."""

    def __init__(self, settings: Settings, store: Store, own: OwnReplies) -> None:
        self._checkpoint_s = settings.checkpoint_ms / 1000
        self._sweep_s = min(settings.lease_ms / 1000 / 4, _MAX_SWEEP_INTERVAL_S)
        self._store = store
        self._own = own
        self._swept_at = inf
        """When a sweep last read the database; infinity until the first one, so that it is never overdue."""
        self._trusted_at = 0.0
        """From when on an expired lease means that its server is dead."""

    async def checkpoint(self) -> None:
        """Checkpoint the running replies over one interval. End those that other servers were asked to stop, or ended.

        Many replies are saved in several batches, so that no single write blocks the event loop for long.
        """
        batches = len(self._own.writers) // _BATCH + 1
        for batch in range(batches):
            await asyncio.sleep(self._checkpoint_s / batches)
            # By hash, not by slice: a reply that starts between two batches may still get its first checkpoint.
            replies = {
                reply_id: (writer.live.key, writer.reply.content)
                for reply_id, writer in self._own.writers.items()
                if hash(reply_id) % batches == batch
            }
            if replies:
                await self._save(replies)

    async def _save(self, replies: dict[str, tuple[Key, str]]) -> None:
        """Checkpoint some replies. A reply that repeatedly fails is ended, and does not affect the others.

        :param replies: reply id -> conversation, content
        """
        try:
            unsaved = await self._store.checkpoint(replies)
        except DatabaseUnavailable:
            raise
        except Exception:
            for reply_id, each in replies.items():
                if len(replies) > 1:
                    await self._save({reply_id: each})
                elif writer := self._own.writers.get(reply_id):
                    logger.exception("a checkpoint failed", extra=writer.log_fields)
                    writer.failed_checkpoints += 1
                    if writer.failed_checkpoints == STORE_ATTEMPTS:
                        writer.end(endings.CRASHED)
            return
        for reply_id in unsaved.stopping:
            if writer := self._own.writers.get(reply_id):
                writer.end(endings.STOPPED)
        for reply_id in unsaved.ended:
            if (writer := self._own.writers.get(reply_id)) and writer.end(endings.INTERRUPTED):
                logger.info("reply ended or deleted by another server", extra=writer.log_fields)

    async def sweep(self) -> None:
        """Wait for one interval, then end the replies whose lease has expired."""
        await asyncio.sleep(self._sweep_s)
        await self.finish_expired()

    async def finish_expired(self, *, sole_server: bool = False) -> None:
        """End the replies of other servers whose lease has expired.

        :param sole_server: whether no other server can be running, so that every lease counts as expired
        """
        expired = await self._store.find_expired(self._own.ids, sole_server=sole_server)
        if self._is_sweep_overdue:
            self._trusted_at = monotonic() + _RENEWAL_S
        self._swept_at = monotonic()
        for conversation, reply in expired:
            try:
                await self.finish_from_checkpoint(conversation, reply, endings.INTERRUPTED)
            except DatabaseUnavailable:
                raise
            except Exception:
                # A reply that cannot be finished must not block the others, nor prevent the server from starting.
                extra = {"conversation": conversation.id, "reply": reply.id}
                logger.exception("an expired reply could not be finished", extra=extra)

    @property
    def _is_sweep_overdue(self) -> bool:
        """Whether two sweeps are missing: the database, or this server, was away."""
        return monotonic() > self._swept_at + 2 * self._sweep_s

    async def finish_from_checkpoint(self, conversation: Key, reply: StoredReply, ending: Ending) -> bool:
        """Store the end of another server's reply with its checkpointed text, unless its lease was renewed.

        :param reply: as read; its `renewed_at` is compared
        :return: whether this call stored it; False also if the database was away just now, so that it may be renewed
        """
        if self._is_sweep_overdue or monotonic() < self._trusted_at:
            return False
        message = Message(reply.id, "assistant", reply.content, reply.created_at, *ending, reply.parent, reply.key)
        if await self._store.finish(conversation, message, if_renewed_at=reply.renewed_at) is not message:
            return False
        logger.info("reply stored as %s", ending.status, extra={"conversation": conversation.id, "reply": reply.id})
        return True
