"""Alignment: the database and memory, read consistently and brought into line.

MongoDB is authoritative. Memory is ahead of it only by the text of replies that this process writes.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from chatserver import positions
from chatserver.errors import DatabaseUnavailable, ReplyInProgress
from chatserver.hub import Hub, LiveConversation, LiveReply
from chatserver.records import Record, Span, StoredReply, View
from chatserver.replies import endings, publishing
from chatserver.replies.follower import Follower
from chatserver.replies.leases import Leases
from chatserver.replies.own import OwnReplies
from chatserver.settings import Settings
from chatserver.store import Store
from chatserver.store.pages import Divided
from chatserver.tasks import Tasks

T = TypeVar("T")


class Alignment:
    """Reads conversations consistently with memory, and starts to follow replies of other servers."""

    def __init__(
        self, settings: Settings, store: Store, hub: Hub, own: OwnReplies, leases: Leases, tasks: Tasks
    ) -> None:
        self._settings = settings
        self._store = store
        self._hub = hub
        self._own = own
        self._leases = leases
        self._tasks = tasks

    async def read(
        self, live: LiveConversation, span: Span | None = None, *, divided: Divided = "all"
    ) -> Record | None:
        """Read a conversation such that the record is consistent with `live` until the caller's next `await`.

        Repeat the read if a turn starts or ends here during it. End the running reply if its lease has expired.

        :param live: the conversation, which the caller must hold
        :param span: the messages to read; None for none
        :param divided: which of them are read in parts if they are long
        :return: None if the conversation is unknown
        """
        tried: StoredReply | None = None
        while True:
            version = live.version
            if span is None:
                record = await self._store.peek(live.key)
            else:
                record = await self._store.read(live.key, span, divided=divided)
            reply = record.reply if record else None
            if reply is not None and (settled := self._own.unsettled(reply.id)) is not None:
                # Our own start: stored, but not yet published, or about to be settled.
                await settled.wait()
            elif reply is not None and reply.expired and reply.id not in self._own.writers and reply != tried:
                await self._leases.finish_from_checkpoint(live.key, reply, endings.INTERRUPTED)
                tried = reply
            elif live.version == version:
                if record is None and live.reply is None:
                    # Deleted, possibly by another server: its subscribers are disconnected, and get a `reset` later.
                    live.adopt(positions.start(live.key.id), View(None))
                return record

    def align(self, live: LiveConversation, record: Record | None) -> None:
        """Bring a live conversation into line with a record: its last message, its view, and a reply of another server.

        :param record: as `read` returned it, without an `await` since
        """
        end = positions.after(record.last_id if record else None, live.key.id)
        view = record.view if record else View(None)
        stored = record.reply if record else None
        if stored is None and live.reply is None:
            live.adopt(end, view)
            return
        live.rename(view.title)
        if stored is None:
            # The reply has ended in the database, but not yet here.
            return
        if live.reply is None or live.reply.message_id != stored.id:
            live.open_turn(end, None, stored.id, stored.created_at, stored.parent)
            assert live.reply is not None
            publishing.publish_text(live, live.reply, stored.content)
            self.follow(live, live.reply)

    async def refresh(self, live: LiveConversation) -> None:
        """Read and align a conversation, which the caller must hold."""
        self.align(live, await self.read(live))

    async def unblocked(self, live: LiveConversation, write: Callable[[], Awaitable[T]]) -> T:
        """Make a write that a running reply blocks, once a reply whose lease has expired is ended.

        :param live: the conversation, which the caller must hold
        :raises ReplyInProgress: if a reply runs
        """
        try:
            return await write()
        except ReplyInProgress:
            # Reading ends a reply whose lease has expired.
            record = await self.read(live)
            if record is not None and record.reply is not None:
                raise
            return await write()

    async def realign(self, live: LiveConversation) -> None:
        """Read and align a conversation whose reply another server has ended: the next one may have started there."""
        if not live.is_unused:
            with suppress(DatabaseUnavailable), self._hub.hold(live.key) as live:
                await self.refresh(live)

    def follow(self, live: LiveConversation, reply: LiveReply) -> None:
        """Follow, in the background, a reply that this process does not write."""
        self._tasks.spawn(self._follow(live, reply))

    async def _follow(self, live: LiveConversation, reply: LiveReply) -> None:
        followed = await Follower(self._settings, self._store, self._hub, self._leases, live, reply).run()
        if followed is not None and not live.is_unused:
            # The other server may have started the next turn.
            self.align(live, followed.record)
