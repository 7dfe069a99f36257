"""The use cases: say, retry, stop, delete, history, list, subscribe."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import NamedTuple

from chatserver import positions, store
from chatserver.errors import DatabaseUnavailable, Draining, KeyReused, NoSuchConversation, NotFound
from chatserver.hub import Hub, LiveConversation, Subscriber
from chatserver.metrics import Metrics
from chatserver.positions import Position
from chatserver.records import PAGE_SIZE, Before, Message, Newest, Place, Record, Span, Summary, Turn
from chatserver.replies import STOPPED, Replies
from chatserver.settings import Settings
from chatserver.sources import Source
from chatserver.store import Store
from chatserver.wire.replay import Page, page_after, span_after

_STOP_PATIENCE_S = 1.0


@dataclass(frozen=True, slots=True)
class History:
    """A conversation as it stands, a running reply included as the last message, its status "streaming".

    `streaming` is whether a reply runs, be it among the messages or not; `has_more` is whether older messages were left
    out. `parts` are the messages, at least one part: the later ones are read when they are asked for, which raises
    `NoSuchConversation` if the conversation was deleted meanwhile.
    """

    created_at: datetime
    updated_at: datetime
    streaming: bool
    has_more: bool
    parts: AsyncIterator["Part"]


class Part(NamedTuple):
    """Some messages of a history, as many as may be in memory at once.

    `position` is the one right after them. With `continues`, the first message is the rest of the last one of the part
    before, or some of it; with `breaks_off`, the next part continues the last message.
    """

    messages: Sequence[Message]
    position: Position
    continues: bool = False
    breaks_off: bool = False


class Chat:
    """The use cases, over one store, one hub and one source. Whatever reads or writes may raise `DatabaseUnavailable`.

    :param sole_server: whether the database is private, so that a reply found running at start-up has lost its server
    """

    def __init__(
        self, settings: Settings, store: Store, hub: Hub, source: Source, metrics: Metrics, *, sole_server: bool = False
    ) -> None:
        self._store = store
        self._hub = hub
        self._metrics = metrics
        self._sole_server = sole_server
        self._keepalive_s = settings.keepalive_s
        self._replies = Replies(settings, store, hub, source, metrics)
        metrics.watch("chatserver_running_replies", "Replies that are being written.", lambda: self.running)

    @property
    def running(self) -> int:
        """The number of replies that this process writes."""
        return len(self._replies)

    # -- the process ---------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Build indexes in the background, finish lost replies, start to deliver, checkpoint and sweep."""
        await self._store.prepare()
        self._replies.spawn(self._store.build_indexes())
        await self._replies.start(sole_server=self._sole_server)

    async def drain(self) -> None:
        """Refuse new turns, let replies end for `DRAIN_S`, finish the rest as interrupted with their text stored."""
        await self._replies.drain()

    async def close(self) -> None:
        """End all that runs in the background."""
        await self._replies.close()

    async def ping(self) -> None:
        """Check that new turns can be taken.

        :raises Draining, DatabaseUnavailable: if they cannot
        """
        if self._replies.draining:
            raise Draining
        await self._store.ping()

    # -- turns ---------------------------------------------------------------------------------------------------

    async def say(self, conversation_id: str | None, text: str, key: str | None = None) -> Turn:
        """Store what a user said and start the reply; with a known idempotency key return the first answer.

        :param conversation_id: None for a new conversation; an unknown one is created
        :raises ReplyInProgress, ConversationFull, UnsupportedConversation, KeyReused: and nothing is stored
        :raises DatabaseUnavailable, Draining, TooManyReplies: and nothing is stored, or the turn runs
        """
        new = conversation_id is None and key is None
        if key is not None:
            conversation_id = conversation_id or store.id_for_key(key)
        turn = Turn(conversation_id or store.new_id(), store.new_id(), store.new_id())
        while True:
            if (
                key is not None
                and (first := await self._store.find_by_key(turn.conversation_id, key, text)) is not None
            ):
                return first
            with suppress(KeyReused):
                return await self._replies.begin(
                    turn.conversation_id, turn.reply_id, lambda: self._store.start_turn(turn, text, key, new=new)
                )
            # Another attempt with this key was stored after our look: find it, or, if its conversation was deleted
            # since, begin again.

    async def retry(self, conversation_id: str) -> Turn:
        """Start a new reply in place of the last one, if that was stopped, failed or interrupted.

        :raises NotFound, NothingToRetry, ReplyInProgress, ConversationFull, UnsupportedConversation: and nothing is
            stored
        :raises DatabaseUnavailable, Draining, TooManyReplies: as `say`
        """
        reply_id = store.new_id()
        return await self._replies.begin(
            conversation_id, reply_id, partial(self._store.start_retry, conversation_id, reply_id)
        )

    async def stop(self, conversation_id: str) -> str | None:
        """End the running reply, keeping what was said; return its id, or None if none runs or it ends by itself.

        :raises NotFound: if there is no such conversation
        """
        with self._hub.hold(conversation_id) as live:
            while True:
                record = None
                if live.reply is None or self._replies.get(live.reply.message_id) is None:
                    record = await self._replies.read(live, self._store.peek)
                    if record is None:
                        raise NoSuchConversation
                if live.reply is not None and (running := self._replies.get(live.reply.message_id)):
                    self._replies.end(running, STOPPED)
                    if running.ending != STOPPED:
                        return None
                    # Stored, as a rule, when this returns, so that a retry or a post may follow at once.
                    await asyncio.wait({running.task}, timeout=_STOP_PATIENCE_S)
                    return running.reply.message_id
                if record is None or record.reply is None:
                    return None
                # It runs on another server, which will find its reply ended at its next checkpoint. One that was
                # checkpointed since we looked is looked at again.
                if await self._replies.finish_from_checkpoint(conversation_id, record.reply, STOPPED):
                    return record.reply.id

    async def delete(self, conversation_id: str) -> None:
        """Delete a conversation, its running reply first; its streams end with `reset`.

        :raises NotFound: if there is none
        """
        with self._hub.hold(conversation_id) as live:
            reply = live.reply
            found = await self._store.delete(conversation_id)
            # Also if it was not found: an attempt that got no answer may have deleted it. But not if a new conversation
            # has begun under this id meanwhile, nor for those who wait for one to begin.
            if live.reply in (None, reply) and live.position != positions.start(conversation_id):
                live.reset()
            if reply is not None and (running := self._replies.get(reply.message_id)):
                self._replies.end(running, STOPPED)
        if not found:
            raise NoSuchConversation

    # -- reading -------------------------------------------------------------------------------------------------

    async def history(self, conversation_id: str, limit: int | None = None, before: str | None = None) -> History:
        """Return a conversation: all of it, or its newest `limit` messages (before a message's id).

        :raises NotFound: if there is no such conversation, or `before` is none of its messages
        """
        with self._hub.hold(conversation_id) as live:
            span: Span = Newest(limit) if before is None else Before(before, limit)
            record = await self._replies.read(live, partial(self._store.read, span=span))
            # No await from here on: the stored messages and the running reply's text belong together. Stored messages
            # do not change, so that most of them can be read later.
            if record is None:
                raise NoSuchConversation
            if not record.found:
                raise NotFound("The parameter before names no message of this conversation.")
            running = None
            if (reply := record.reply) is not None and before is None:
                content = reply.content
                if live.reply is not None and live.reply.message_id == reply.id:
                    content = max(content, live.reply.content, key=len)
                running = Message(reply.id, "assistant", content, reply.created_at, "streaming")
            return History(
                created_at=record.created_at,
                updated_at=record.updated_at,
                streaming=reply is not None,
                has_more=record.older > 0,
                parts=self._parts(conversation_id, record, running),
            )

    async def _parts(self, conversation_id: str, record: Record, running: Message | None) -> AsyncIterator[Part]:
        """Yield the messages of a record, those that follow, and the running reply."""
        created_at, continues = record.created_at, False
        position = positions.start(conversation_id)
        while True:
            rest = record.following
            breaks_off = rest is not None and rest.chars > 0
            if record.messages:
                last = record.messages[-1]
                position = Position(last.id, rest.chars if rest is not None and breaks_off else None)
            yield Part(record.messages, position, continues, breaks_off)
            if rest is None:
                break
            continues = breaks_off
            found = await self._store.read(conversation_id, rest)
            if found is None or found.created_at != created_at or not found.messages:
                raise NoSuchConversation
            record = found
        if running is not None:
            chars = len(running.content)
            for begin in range(0, chars or 1, PAGE_SIZE):
                end = min(begin + PAGE_SIZE, chars)
                part = replace(running, content=running.content[begin:end])
                yield Part([part], Position(running.id, end), continues=begin > 0, breaks_off=end < chars)

    async def summaries(self, limit: int, after: Place | None = None) -> Sequence[Summary]:
        """Return up to `limit` conversations that come after a place of the list, the latest activity first."""
        return await self._store.summaries(limit, after)

    async def subscribe(self, conversation_id: str, position: Position | None, subscriber: Subscriber) -> None:
        """Have a subscriber told all that follows a position, then whatever comes.

        Without a position: the running reply from its start, if there is one. A position that does not exist is
        answered by `reset`.
        """
        with self._hub.hold(conversation_id) as live:
            record = None
            # What is idle here may have gone on elsewhere.
            if not _is_live(live, position) or (live.reply is None and not self._sole_server):
                try:
                    record = await self._replies.read(live, self._look(conversation_id, position))
                    self._replies.align(live, record)
                except DatabaseUnavailable:
                    if not _is_live(live, position):
                        raise
            if subscriber.closed:
                return
            # No await from here on: snapshot and cursor are of one moment, so that no token lands between them.
            at = position or _where_a_stream_begins(live) or positions.start(conversation_id)
            page = Page([], at)
            if not live.covers(at):
                found = page_after(at, record, subscriber.format, until_done=subscriber.until_done) if record else None
                if found is None:
                    self.refuse(subscriber)
                    return
                page = found
            go_on = partial(self._go_on, conversation_id, page.position, subscriber) if page.more else None
            opening = subscriber.format.opening(at, self._keepalive_s)
            self._hub.replay(subscriber, opening, page.frames, go_on)
            if page.ends:
                subscriber.end()
            elif not page.more:
                live.subscribe(subscriber, page.position)

    def _go_on(self, conversation_id: str, position: Position, subscriber: Subscriber) -> None:
        """Have a subscriber that has taken a page of what it missed told the next one."""

        async def go_on() -> None:
            try:
                await self.subscribe(conversation_id, position, subscriber)
            except DatabaseUnavailable:
                subscriber.disconnect()
            except Exception:
                subscriber.disconnect()
                raise

        self._replies.spawn(go_on())

    def refuse(self, subscriber: Subscriber) -> None:
        """Tell a subscriber that its position does not exist, and end its stream."""
        self._metrics.resets.inc()
        self._hub.reset(subscriber)

    def _look(self, conversation_id: str, at: Position | None) -> Callable[[str], Awaitable[Record | None]]:
        """Return how to read what is needed of the record to go on from a position: no messages if there is none."""
        if at is None:
            return self._store.peek
        return partial(self._store.read, span=span_after(at, conversation_id), divided="replies")


def _where_a_stream_begins(live: LiveConversation) -> Position | None:
    """Return where a stream without a position begins: at the running reply's start, else at the end; None: unknown."""
    return Position(live.reply.message_id, 0) if live.reply else live.position


def _is_live(live: LiveConversation, position: Position | None) -> bool:
    """Return whether all that follows a position (None: where a stream begins) is in memory."""
    at = position or _where_a_stream_begins(live)
    return at is not None and live.covers(at)
