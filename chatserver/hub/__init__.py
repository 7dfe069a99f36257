"""The hub: the live conversations, and the one coroutine that delivers them.

A `Live` conversation is watched by somebody or is being answered. It keeps the frames of the turn that runs, each
encoded once, as one run of bytes (the log), and what it needs to find a client's position in it. A subscriber is a
connection and a cursor into that log, never a queue: what is published is news to the hub and wakes `Hub.deliver`,
which writes to each subscriber, in one write, all that lies after its cursor.
"""

import asyncio
import logging
import sys
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from time import monotonic
from typing import NamedTuple, Protocol

from tornado.locks import Condition

from chatserver import tasks
from chatserver.positions import Position
from chatserver.wire import sse

logger = logging.getLogger(__name__)

MAX_WRITE = 128 * 1024
"""Bytes handed to a connection at once: what a client that stops reading may cost us."""
KEPT_TURN = 256 * 1024
"""Bytes of an ended turn that are kept for those who lag when the next one begins."""
_DELIVERY_S = 0.005
"""After so long a delivery lets others run, requests above all; seconds."""
_FRAME_END = b"\n\n"
_EARLY = sys.maxsize
"""The cursor of a subscriber whose position the log has not reached."""


class Subscriber(Protocol):
    """One connection that watches a conversation."""

    cursor: int
    """Offset in the conversation's log of the first byte not yet written to this connection."""
    ready: bool
    """Whether a write would leave at once: the connection is up, not ending, and has no bytes in flight."""
    live: "LiveConversation | None"
    """The conversation that it watches; whenever the connection is ready again, it has that one `catch_up`."""
    until_done: bool
    """Whether the connection ends after the first `done` or `error`."""
    gone: bool
    """Whether the connection is lost."""
    chunked: bool
    """Whether the response's body is chunked (HTTP/1.1), so that each write must be a chunk."""

    def replay(self, data: bytes, then: Callable[[], None] | None = None) -> None:
        """Take what comes before the live frames; it is written first, in pieces if it is long.

        :param then: called, if the connection is still there, once it is all written
        """

    def write(self, data: bytes) -> None:
        """Write to the connection; only while `ready`."""

    def end(self, data: bytes = b"") -> None:
        """Write `data`, if any, then end the response in order: the client has everything."""

    def abort(self) -> None:
        """Close the connection at once: the client has to resume."""

    def disconnect(self) -> None:
        """Close the connection, after what is being written, without an orderly end: the client has to resume."""


@dataclass(slots=True)
class Counts:
    """What was published and delivered since the start."""

    tokens: int = 0
    events: int = 0
    writes: int = 0


class Place(NamedTuple):
    """Where a position lies in a log: the offset to go on from, after sending `before` (the rest of a frame)."""

    offset: int
    before: bytes = b""


@dataclass(slots=True)
class _Piece:
    """A run of whole frames of a log, cut out and wrapped as a chunk once for all subscribers at its begin."""

    begin: int
    end: int
    data: bytes
    events: int
    chunk: bytes


_NO_PIECE = _Piece(-1, -1, b"", 0, b"")


class LiveReply:
    """A reply that still grows, or has just ended: its text, and where in the log each of its frames ends."""

    def __init__(self, message_id: str, created_at: datetime, offset: int) -> None:
        self.message_id = message_id
        self.created_at = created_at
        self.chars = 0
        self.size = 0
        self._parts: list[str] = []
        self._char_ends = array("Q", [0])
        self._byte_ends = array("Q", [offset])

    @property
    def content(self) -> str:
        """Return all that was said so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def append(self, text: str, size: int) -> bytes:
        """Add text of `size` bytes (UTF-8) and return its frame."""
        self._parts.append(text)
        self.size += size
        self.chars = chars = self.chars + len(text)
        frame = sse.token_frame(self.message_id, chars, text)
        self._char_ends.append(chars)
        self._byte_ends.append(self._byte_ends[-1] + len(frame))
        return frame

    def locate(self, chars: int) -> Place:
        """Return the place after so many code points; after the last one if there are fewer."""
        if chars >= self.chars:
            return Place(self._byte_ends[-1])
        index = bisect_left(self._char_ends, chars)
        offset, end = self._byte_ends[index], self._char_ends[index]
        if end == chars:
            return Place(offset)
        return Place(offset, sse.token_frame(self.message_id, end, self.content[chars:end]))


class _Entry(NamedTuple):
    """A message in the log: from where to where, and the reply that it is (None: an input)."""

    message_id: str
    begin: int
    end: int | None
    reply: LiveReply | None
    failed: bool = False


class LiveConversation:
    """One live conversation: the log of the turn that runs, and who watches it.

    Every method is synchronous, so that whoever calls several of them without an `await` between sees one state.

    :param on_dirty: called when there is something to deliver, once until it has been
    """

    def __init__(self, conversation_id: str, counts: Counts, on_dirty: Callable[["LiveConversation"], None]) -> None:
        self.conversation_id = conversation_id
        self.subscribers: set[Subscriber] = set()
        self.reply: LiveReply | None = None
        self.version = 0
        """Raised whenever a turn begins or ends: tells a reader of the database that what it read may be old."""
        self.holders = 0
        self.is_dirty = False
        """Whether it waits to be delivered."""
        self._schedule = on_dirty
        self._counts = counts
        self._tail: Position | None = None
        self._base = 0
        self._end = 0
        """Always `_base + len(_log)`, which each delivery asks for several times."""
        self._log = bytearray()
        self._entries: list[_Entry] = []
        self._early: dict[Subscriber, Position] = {}
        self._piece = _NO_PIECE

    # -- what the conversation says ------------------------------------------------------------------------------

    @property
    def position(self) -> Position | None:
        """The position at the log's end; None while nothing is known of the conversation."""
        if self.reply is not None:
            return Position(self.reply.message_id, self.reply.chars)
        return Position(self._entries[-1].message_id, None) if self._entries else self._tail

    def adopt(self, position: Position) -> None:
        """Take the database's word for where the conversation stands, while no reply runs here.

        Subscribers that stand elsewhere missed turns of another server: they are cut, and resume from the database.
        """
        if self.position == position:
            return
        if self.position is not None:
            self.disconnect()
        self._drop(self._end, position)

    def open_turn(
        self, previous: Position, said: tuple[str, bytes] | None, reply_id: str, created_at: datetime
    ) -> None:
        """Publish what was said (message id and `input` frame; None at a retry) and start its reply.

        :param previous: the position right before, as the database has it
        """
        if self.reply is not None or self.position not in (None, previous):
            self.reply = None
            self.disconnect()
            self._drop(self._end, previous)
        elif self._tail is None:
            self._tail = previous
        else:
            self._forget_ended_turns()
        self.version += 1
        if said is not None:
            message_id, frame = said
            self._entries.append(_Entry(message_id, self._end, self._end + len(frame), None))
            self._append_frame(frame)
        self.reply = LiveReply(reply_id, created_at, self._end)
        self._entries.append(_Entry(reply_id, self._end, None, self.reply))
        self._mark_dirty()

    def append(self, text: str, size: int) -> None:
        """Add the next characters of the running reply: `size` bytes in UTF-8."""
        reply = self.reply
        assert reply is not None
        self._append_frame(reply.append(text, size))
        self._counts.tokens += 1

    def finish(self, frame: bytes, *, failed: bool = False) -> None:
        """End the running reply with its `done` frame, or with its `error` frame if it `failed`."""
        assert self.reply is not None
        self._append_frame(frame)
        self._entries[-1] = self._entries[-1]._replace(end=self._end, failed=failed)
        self.reply = None
        self.version += 1

    def reset(self) -> None:
        """Tell every subscriber that its position is gone, and end its stream."""
        self.reply = None
        self._for_each([*self.subscribers, *self._early], self._reset_one)
        self._drop(self._end, None)

    def disconnect(self) -> None:
        """End every stream after what there is for it: the clients resume from where they are."""
        self._for_each([*self.subscribers, *self._early], self._disconnect_one)

    def abort(self) -> None:
        """Abort every stream, after an unexpected failure: the clients resume, and the server goes on."""
        for subscriber in [*self.subscribers, *self._early]:
            subscriber.ready = False
            subscriber.abort()

    def _reset_one(self, subscriber: Subscriber) -> None:
        self._counts.events += 1
        subscriber.end(sse.RESET)

    def _disconnect_one(self, subscriber: Subscriber) -> None:
        self.catch_up(subscriber)
        subscriber.disconnect()

    def _for_each(self, subscribers: Iterable[Subscriber], act: Callable[[Subscriber], None]) -> None:
        """Do something with each subscriber; abort one that fails, and go on with the others."""
        for subscriber in subscribers:
            try:
                act(subscriber)
            except Exception:
                # Not ready: nothing is written to it any more. The end of its connection unsubscribes it.
                logger.exception("a subscriber failed and is aborted", extra={"conversation": self.conversation_id})
                subscriber.ready = False
                subscriber.abort()

    # -- who watches it ------------------------------------------------------------------------------------------

    def locate(self, position: Position) -> Place | None:
        """Return where a position lies in the log; None if it does not, or not yet."""
        if position == self._tail:
            return Place(self._base)
        for entry in self._entries:
            if entry.message_id != position.message_id:
                continue
            if position.chars is None:
                return None if entry.end is None else Place(entry.end)
            if entry.reply is None:
                return Place(entry.begin) if position.chars == 0 else None
            if position.chars > entry.reply.chars and not entry.failed:
                # Not yet said; or it has ended, with less than this client saw, and a `done` would be a lie to it.
                return None
            return entry.reply.locate(position.chars)
        return None

    def covers(self, position: Position) -> bool:
        """Return whether all that follows a position is, or will be, in the log."""
        if self.reply is not None and self.reply.message_id == position.message_id:
            return True
        return self.locate(position) is not None

    def subscribe(self, subscriber: Subscriber, position: Position) -> None:
        """Deliver to a subscriber what comes after a position, from now on.

        A position that the log has not reached (the reply runs on another server, whose checkpoints lag behind what its
        clients saw) waits until the log reaches it, or the reply ends.
        """
        subscriber.live = self
        place = self.locate(position)
        if place is None:
            subscriber.cursor = _EARLY
            self._early[subscriber] = position
            return
        # The cursor first: a connection that takes the rest of a frame at once goes on from there.
        subscriber.cursor = place.offset
        self.subscribers.add(subscriber)
        if place.before:
            self._counts.events += 1
            subscriber.replay(place.before)
        self.catch_up(subscriber)

    def is_caught_up(self, subscriber: Subscriber) -> bool:
        """Return whether a subscriber was given all that there is for it."""
        return subscriber.cursor >= self._end

    def is_complete_for(self, subscriber: Subscriber) -> bool:
        """Return whether no reply runs and a subscriber was given everything: its response may end in order."""
        return self.reply is None and subscriber in self.subscribers and self.is_caught_up(subscriber)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Forget a subscriber, if it is one."""
        self.subscribers.discard(subscriber)
        self._early.pop(subscriber, None)

    @property
    def is_unused(self) -> bool:
        """Whether nobody watches it, and nothing is being said in it."""
        return self.reply is None and not (self.holders or self.subscribers or self._early)

    def deliver(self) -> None:
        """Write to every ready subscriber what lies after its cursor."""
        self.is_dirty = False
        if self._early:
            self._admit_early()
        self._for_each(self.subscribers, self.catch_up)
        end = self._end
        if self.reply is None and self._log and all(each.cursor == end for each in self.subscribers):
            self._drop(end, self.position)

    def catch_up(self, subscriber: Subscriber) -> None:
        """Write to one subscriber what lies after its cursor, for as long as its connection takes it."""
        counts = self._counts
        while subscriber.ready and subscriber.cursor < self._end:
            piece = self._piece
            if piece.begin != subscriber.cursor:
                piece = self._cut(subscriber.cursor)
            counts.writes += 1
            if subscriber.until_done and (last := self._end_of_reply_after(piece.begin)) and last <= piece.end:
                data = piece.data[: last - piece.begin]
                counts.events += data.count(_FRAME_END)
                subscriber.cursor = last
                subscriber.end(data)
                return
            counts.events += piece.events
            subscriber.cursor = piece.end
            subscriber.write(piece.chunk if subscriber.chunked else piece.data)

    # -- the log -------------------------------------------------------------------------------------------------

    def _append_frame(self, frame: bytes) -> None:
        begin = self._end
        self._log += frame
        self._end = end = begin + len(frame)
        if self.is_dirty:
            self._piece = _NO_PIECE
        else:
            # Every up-to-date cursor is here, so this frame is the next piece.
            self._piece = _Piece(begin, end, frame, 1, sse.chunk(frame))
            self._mark_dirty()

    def _mark_dirty(self) -> None:
        if not self.is_dirty:
            self.is_dirty = True
            self._schedule(self)

    def _end_of_reply_after(self, offset: int) -> int | None:
        return next((each.end for each in self._entries if each.reply and each.end and each.end > offset), None)

    def _cut(self, begin: int) -> _Piece:
        """Cut out what is to be written next from an offset on: whole frames, to the end unless that is too long."""
        first, last = begin - self._base, len(self._log)
        if last - first > MAX_WRITE:
            found = self._log.rfind(_FRAME_END, first, first + MAX_WRITE)
            if found < 0:
                found = self._log.find(_FRAME_END, first)
            last = found + len(_FRAME_END)
        data = bytes(memoryview(self._log)[first:last])
        self._piece = _Piece(begin, self._base + last, data, data.count(_FRAME_END), sse.chunk(data))
        return self._piece

    def _admit_early(self) -> None:
        for subscriber, position in list(self._early.items()):
            if self.locate(position) is not None:
                del self._early[subscriber]
                self.subscribe(subscriber, position)
            elif self.reply is None:
                subscriber.disconnect()

    def _forget_ended_turns(self) -> None:
        """Forget what has ended, but for a short last turn that some may still be reading: who lags costs no memory."""
        ended = [entry for entry in self._entries if entry.reply is not None]
        before_last = ended[-2].end if len(ended) > 1 else self._base
        assert before_last is not None
        if self._end - before_last > KEPT_TURN:
            self._drop(self._end, self.position)
        elif before_last > self._base:
            self._drop(before_last, Position(ended[-2].message_id, None))

    def _drop(self, offset: int, tail: Position | None) -> None:
        """Forget the log before an offset, at which the conversation stood at `tail`; cut who has not got that far."""
        # At the end nothing is left, nor a reply that was replaced before its first word and has no length.
        self._entries = [entry for entry in self._entries if entry.begin >= offset and offset < self._end]
        del self._log[: offset - self._base]
        self._base, self._tail = offset, tail
        self._piece = _NO_PIECE
        behind = [each for each in self.subscribers if each.cursor < offset]
        self._for_each(behind, lambda subscriber: subscriber.disconnect())
        self.version += 1


class Hub:
    """All live conversations of this process."""

    def __init__(self) -> None:
        self._conversations: dict[str, LiveConversation] = {}
        self._news: deque[LiveConversation] = deque()
        """To be delivered in this order: the first one that had news comes first, and then waits for all others."""
        self._wake = Condition()
        self.counts = Counts()

    def get(self, conversation_id: str) -> LiveConversation | None:
        """Return a live conversation, or None."""
        return self._conversations.get(conversation_id)

    @property
    def conversations(self) -> list[LiveConversation]:
        """Return all live conversations."""
        return list(self._conversations.values())

    @contextmanager
    def hold(self, conversation_id: str) -> Iterator[LiveConversation]:
        """Give the live conversation, made if need be, which is not forgotten inside the block."""
        live = self._conversations.get(conversation_id)
        if live is None:
            live = self._conversations[conversation_id] = LiveConversation(conversation_id, self.counts, self._schedule)
        live.holders += 1
        try:
            yield live
        finally:
            live.holders -= 1
            self.release(live)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Let a subscriber go, if it watches anything."""
        if (live := subscriber.live) is not None:
            live.unsubscribe(subscriber)
            self.release(live)

    def release(self, live: LiveConversation) -> None:
        """Forget a conversation if it is unused."""
        if live.is_unused and self._conversations.get(live.conversation_id) is live:
            del self._conversations[live.conversation_id]

    def _schedule(self, live: LiveConversation) -> None:
        if not self._news:  # else it is awake already
            self._wake.notify()
        self._news.append(live)

    async def deliver(self) -> None:
        """Deliver for ever; no await between the check and the wait, so that no news is missed."""
        await tasks.repeat(self._deliver)

    async def _deliver(self) -> None:
        while not self._news:
            await self._wake.wait()
        pause_at = monotonic() + _DELIVERY_S
        while self._news and monotonic() < pause_at:
            live = self._news.popleft()
            try:
                live.deliver()
            except Exception:
                logger.exception("a delivery failed", extra={"conversation": live.conversation_id})
                live.abort()
        if self._news:
            await asyncio.sleep(0)
