"""The follower: one reply that another server writes, published here from its checkpoints."""

import asyncio
from typing import NamedTuple

from chatserver import tasks
from chatserver.errors import DatabaseUnavailable
from chatserver.hub import Hub, LiveConversation, LiveReply
from chatserver.records import After, Record
from chatserver.replies import endings, publishing
from chatserver.replies.leases import Leases
from chatserver.settings import Settings
from chatserver.store import Store


class Followed(NamedTuple):
    """A reply was followed to its end, which is published. `record` is the conversation as read then."""

    record: Record | None


class Follower:
    """Follows one reply. It ends the reply itself if its lease has expired.

    :param live: the conversation, in which `reply` is open
    """

    def __init__(
        self, settings: Settings, store: Store, hub: Hub, leases: Leases, live: LiveConversation, reply: LiveReply
    ) -> None:
        self._interval_s = settings.checkpoint_ms / 1000
        self._store = store
        self._hub = hub
        self._leases = leases
        self._live = live
        self._reply = reply
        self._followed: Followed | None = None

    async def run(self) -> Followed | None:
        """Publish the reply until it ends; return None if it was replaced or reset here before that."""
        await tasks.repeat(self._step, expected=(DatabaseUnavailable,))
        return self._followed

    async def _step(self) -> bool:
        """Publish the next checkpoint, or the end; return whether nothing remains to be followed."""
        live, reply = self._live, self._reply
        await asyncio.sleep(self._interval_s)
        record = await self._store.read(live.key, After(reply.message_id, 0), divided="none")
        stored = record.reply if record else None
        if stored is not None and stored.id != reply.message_id:
            stored = None
        if stored is not None and stored.expired:
            await self._leases.finish_from_checkpoint(live.key, stored, endings.INTERRUPTED)
            return False
        if live.reply is not reply:
            return True
        if stored is not None:
            publishing.publish_text(live, reply, stored.content[reply.chars :])
            return False
        message = record.messages[0] if record and record.found else None
        if message is not None:
            publishing.publish_text(live, reply, message.content[reply.chars :])
        publishing.publish_end(self._hub, live, reply, message)
        self._followed = Followed(record)
        return True
