"""The use cases that read conversations: history, list, export, subscribe."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import NamedTuple

from chatserver import positions
from chatserver.branches import Tree
from chatserver.errors import DatabaseUnavailable, NoSuchConversation, NotFound
from chatserver.hub import Hub, LiveConversation, Subscriber
from chatserver.metrics import Metrics
from chatserver.positions import Position
from chatserver.records import PAGE_SIZE, All, Before, Key, Message, Newest, Place, Record, Span, Summary, View
from chatserver.replies import Alignment
from chatserver.settings import Settings
from chatserver.store import Store
from chatserver.tasks import Tasks
from chatserver.wire.replay import Page, page_after, span_after

_EXPORTED_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class History:
    """A conversation, including a running reply as its last message, with the status "streaming".

    `streaming` is whether a reply runs, even if it is not among the messages; `has_more` is whether older messages were
    left out; `tree` is None if no branches were found. `parts` yields the messages, in at least one part. Later parts
    are read on demand, which raises `NoSuchConversation` if the conversation has been deleted.
    """

    created_at: datetime
    updated_at: datetime
    streaming: bool
    has_more: bool
    view: View
    tree: Tree | None
    parts: AsyncIterator["Part"]


class Part(NamedTuple):
    """Some messages of a history, as many as may be in memory at once.

    `position` is the position after them. With `continues`, the first message continues the last one of the previous
    part; with `breaks_off`, the next part continues the last message.
    """

    messages: Sequence[Message]
    position: Position
    continues: bool = False
    breaks_off: bool = False


class Reading:
    """The use cases that read conversations. Each method may raise `DatabaseUnavailable`.

    :param sole_server: whether the database is private, so that no other server writes replies
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        hub: Hub,
        alignment: Alignment,
        metrics: Metrics,
        background: Tasks,
        *,
        sole_server: bool = False,
    ) -> None:
        self._store = store
        self._hub = hub
        self._alignment = alignment
        self._tasks = background
        self._sole_server = sole_server
        self._keepalive_s = settings.keepalive_s
        self._resets = metrics.counter("chatserver_resets_total", "Streams whose position was unknown.")

    async def history(
        self, conversation: Key, limit: int | None = None, before: str | None = None, *, all_branches: bool = False
    ) -> History:
        """Return a conversation with all messages of the active path, or the newest `limit` of them.

        :param before: the id of a message: only the messages before it, on the path to it
        :param all_branches: whether to return all messages of all branches instead, in the order of the array
        :raises NotFound: if the conversation does not exist, or does not contain the message `before`
        """
        with self._hub.hold(conversation) as live:
            span: Span = Newest(limit) if before is None else Before(before, limit)
            if all_branches:
                span = All(with_tree=True)
            record = await self._alignment.read(live, span)
            # No await from here on: the stored messages and the running reply's text must be consistent. Stored
            # messages do not change, so most of them can be read later.
            if record is None:
                raise NoSuchConversation
            if not record.found:
                raise NotFound("The parameter before names no message of this conversation.")
            running, end = None, None
            if before is None:
                end = positions.after(record.last_id, conversation.id)
            if (reply := record.reply) is not None and before is None:
                content = reply.content
                if live.reply is not None and live.reply.message_id == reply.id:
                    content = max(content, live.reply.content, key=len)
                running = Message(reply.id, "assistant", content, reply.created_at, "streaming")
                end = Position(reply.id, len(content))
            return History(
                created_at=record.created_at,
                updated_at=record.updated_at,
                streaming=reply is not None,
                has_more=record.older > 0,
                view=record.view,
                tree=record.tree,
                parts=self._parts(conversation, record, running, end),
            )

    async def _parts(
        self, conversation: Key, record: Record, running: Message | None, end: Position | None
    ) -> AsyncIterator[Part]:
        """Yield the messages of a record, all later messages, and the running reply.

        :param end: the position at the end; None for that of the last message
        """
        created_at, continues = record.created_at, False
        position = positions.start(conversation.id)
        while True:
            rest = record.following
            breaks_off = rest is not None and rest.chars > 0
            if record.messages:
                last = record.messages[-1]
                position = Position(last.id, rest.chars if rest is not None and breaks_off else None)
            yield Part(record.messages, end or position, continues, breaks_off)
            if rest is None:
                break
            continues = breaks_off
            found = await self._store.read(conversation, rest)
            if found is None or found.created_at != created_at or not found.messages:
                raise NoSuchConversation
            record = found
        if running is not None:
            chars = len(running.content)
            for begin in range(0, chars or 1, PAGE_SIZE):
                until = min(begin + PAGE_SIZE, chars)
                part = replace(running, content=running.content[begin:until])
                yield Part([part], end or position, continues=begin > 0, breaks_off=until < chars)

    async def summaries(self, owner: str | None, limit: int, after: Place | None = None) -> Sequence[Summary]:
        """Return up to `limit` conversations of an owner that follow a place in the list (None: from its start)."""
        return await self._store.summaries(owner, limit, after)

    async def export(self, owner: str | None) -> AsyncIterator[tuple[Key, History]]:
        """Yield all conversations of an owner, in the order of their ids, which activity does not change.

        Each that exists from the beginning to the end is yielded once. One that is created or deleted meanwhile may be
        left out.
        """
        last = None
        while conversations := await self._store.keys(owner, _EXPORTED_AT_ONCE, last):
            for conversation in conversations:
                try:
                    history = await self.history(conversation, all_branches=True)
                except NoSuchConversation:
                    continue
                yield conversation, history
            last = conversations[-1]

    async def subscribe(
        self, conversation: Key, position: Position | None, subscriber: Subscriber, *, continues: bool = False
    ) -> None:
        """Replay everything after a position to a subscriber, then keep it subscribed.

        :param position: None for the start of the running reply, or the conversation's end if no reply runs. An unknown
            position is answered by `reset`
        :param continues: whether the subscriber was sent everything before the position in this stream
        """
        with self._hub.hold(conversation) as live:
            record = await self._read_after(live, position)
            if subscriber.closed:
                return
            # No await from here on: the replay ends exactly at the cursor, so that no text is lost or repeated.
            at = position or _default_position(live) or positions.start(conversation.id)
            stream_format, has_branches = subscriber.format, live.has_branches
            # Another branch may be shown since another server has ended the reply: only the database knows.
            outdated = record is not None and live.is_outdated_at(at)
            page: Page | None = None
            if live.covers(at) and not outdated:
                head = live.head_at(at, at.message_id)
                page = Page(at, head, head)
            elif record is not None:
                page = page_after(at, record, stream_format, until_done=subscriber.until_done)
                has_branches = has_branches or record.view.has_branches or record.tree is not None
            if page is None:
                self.refuse(subscriber)
                return
            frames = [] if live.title is None else [stream_format.title_frame(live.title)]
            # In the middle of a stream, the head would name a reply whose id the client may not know yet.
            if has_branches and not (continues and page.first_head == at.message_id):
                frames.append(stream_format.head_frame(page.first_head))
            frames += page.frames
            is_last = not page.more and not page.ends
            if is_last and (head := live.head_at(page.position, page.head)) != page.head:
                frames.append(stream_format.head_frame(head))
            then = partial(self._replay_next, conversation, page.position, subscriber) if page.more else None
            self._hub.replay(subscriber, stream_format.opening(at, self._keepalive_s), frames, then)
            if page.ends:
                subscriber.end()
            elif is_last:
                live.subscribe(subscriber, page.position)

    async def _read_after(self, live: LiveConversation, position: Position | None) -> Record | None:
        """Read what is stored after a position (None: the default one), and align the live conversation with it.

        :return: None if memory has everything after the position, or if the conversation does not exist
        :raises DatabaseUnavailable: unless memory has it
        """
        outdated = position is not None and live.is_outdated_at(position)
        # A conversation without a running reply here may have continued on another server.
        if _is_live(live, position) and not outdated and (live.reply is not None or self._sole_server):
            return None
        try:
            span = None if position is None else span_after(position, live.key.id)
            record = await self._alignment.read(live, span, divided="replies")
            self._alignment.align(live, record)
        except DatabaseUnavailable:
            if not _is_live(live, position):
                raise
            return None
        return record

    def refuse(self, subscriber: Subscriber) -> None:
        """Answer an unknown position with `reset`, and end the stream."""
        self._resets.inc()
        self._hub.reset(subscriber)

    def _replay_next(self, conversation: Key, position: Position, subscriber: Subscriber) -> None:
        """Replay the next page to a subscriber that has received the previous one."""
        self._tasks.spawn(self._continue(conversation, position, subscriber))

    async def _continue(self, conversation: Key, position: Position, subscriber: Subscriber) -> None:
        try:
            await self.subscribe(conversation, position, subscriber, continues=True)
        except DatabaseUnavailable:
            subscriber.disconnect()
        except Exception:
            subscriber.disconnect()
            raise


def _default_position(live: LiveConversation) -> Position | None:
    """Return where a stream without a position begins: at the running reply's start, else at the end.

    :return: None if the position of the conversation's end is unknown
    """
    return Position(live.reply.message_id, 0) if live.reply else live.position


def _is_live(live: LiveConversation, position: Position | None) -> bool:
    """Return whether everything after a position (None: the default one) is in memory."""
    at = position or _default_position(live)
    return at is not None and live.covers(at)
