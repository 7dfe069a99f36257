"""A conversation in memory: the log of its current turn, and its subscribers."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from sys import maxsize
from typing import Protocol, TypeVar

from chatserver import positions
from chatserver.branches import Parent
from chatserver.hub.log import LiveReply, Log
from chatserver.positions import Position
from chatserver.records import Key, Message, View
from chatserver.wire import Format, sse

logger = logging.getLogger(__name__)

_FAILED = "a subscriber failed and is aborted"
_AHEAD = maxsize
"""The cursor of a subscriber whose position is ahead of the log."""


class Subscriber(Protocol):
    """One connection that is subscribed to a conversation.

    Bytes are delivered in order and at most once: those in flight when the connection is lost are lost, and the client
    resumes from its position. No method blocks, and none does anything once the connection is ending.
    """

    cursor: int
    """Offset in the conversation's log of the first byte not yet written to this connection."""
    ready: bool
    """Whether a write would leave at once: the connection is up, not ending, and has no bytes in flight."""
    live: "LiveConversation | None"
    """The conversation. Whenever the connection becomes ready again, it calls the conversation's `catch_up`."""
    format: Format
    """The stream format of its frames."""
    until_done: bool
    """Whether the stream ends after the first `done` or `error`."""
    closed: bool
    """Whether the connection is lost."""
    chunked: bool
    """Whether the response's body is chunked (HTTP/1.1), so that each write must be a chunk."""
    valid_until: float
    """When its caller's credential expires, in seconds since 1970 by the wall clock: it is sent nothing after that."""

    def replay(self, data: bytes, then: Callable[[], None] | None = None) -> None:
        """Take the frames that come before the live ones; long ones are written in several parts.

        :param then: called once all is written, unless the connection is lost before
        """

    def write(self, data: bytes) -> None:
        """Write to the connection; only while `ready`."""

    def end(self, data: bytes = b"") -> None:
        """Write `data`, if any, then end the response in order: the client has received everything."""

    def finish(self) -> None:
        """End the response: in order if the client was sent everything and no reply runs, else it has to resume."""

    def abort(self) -> None:
        """Close the connection at once: the client has to resume."""

    def disconnect(self) -> None:
        """Close the connection after the bytes in flight, without an orderly end: the client has to resume."""


S = TypeVar("S", bound=Subscriber)


def for_each(subscribers: Iterable[S], act: Callable[[S], None]) -> None:
    """Call a function with each subscriber. One for which it fails is aborted; the others are not affected."""
    for subscriber in subscribers:
        try:
            act(subscriber)
        except Exception:
            conversation = subscriber.live.key.id if subscriber.live else None
            logger.exception(_FAILED, extra={"conversation": conversation})
            _abort(subscriber)


def _abort(subscriber: Subscriber) -> None:
    """Abort a subscriber, and write nothing more to it. The end of its connection unsubscribes it."""
    subscriber.ready = False
    subscriber.abort()


@dataclass(slots=True)
class Counts:
    """The tokens published, and the events and writes delivered, since the start."""

    tokens: int = 0
    events: int = 0
    writes: int = 0


class LiveConversation:
    """One conversation that has subscribers or a running reply.

    Every method is synchronous, so that a caller that calls several of them without an `await` between sees one state.

    :param on_dirty: called when there is something to deliver; once until it is delivered
    """

    # An idle stream keeps its conversation in memory: without a dictionary it takes less.
    __slots__ = (
        "_ahead",
        "_counts",
        "_log",
        "_schedule",
        "has_branches",
        "holders",
        "is_dirty",
        "key",
        "reply",
        "subscribers",
        "title",
        "version",
    )

    def __init__(self, key: Key, counts: Counts, on_dirty: Callable[["LiveConversation"], None]) -> None:
        self.key = key
        self.subscribers: set[Subscriber] = set()
        self.reply: LiveReply | None = None
        self.version = 0
        """Incremented with every change but new text, so that a reader of the database can detect an old result."""
        self.has_branches = False
        """Whether streams open with the head."""
        self.title: str | None = None
        """The title that a user chose, if any; streams open with it."""
        self.holders = 0
        self.is_dirty = False
        """Whether it waits to be delivered."""
        self._schedule = on_dirty
        self._counts = counts
        self._log = Log(sse)
        self._ahead: dict[Subscriber, Position] = {}
        """The subscribers whose position is ahead of the log, and that position."""

    @property
    def position(self) -> Position | None:
        """The position at the log's end; None while nothing is known of the conversation."""
        return self._log.position

    @property
    def kept_bytes(self) -> int:
        """The size of the log in bytes."""
        return len(self._log)

    @property
    def all_subscribers(self) -> list[Subscriber]:
        """The subscribers, including those whose position is ahead of the log."""
        return [*self.subscribers, *self._ahead]

    @property
    def is_unused(self) -> bool:
        """Whether it has no subscriber, no holder and no running reply."""
        return self.reply is None and not (self.holders or self.subscribers or self._ahead)

    # -- publishing ----------------------------------------------------------------------------------------------

    def adopt(self, position: Position, view: View) -> None:
        """Set the position and the view to the database's, while no reply runs here. Publish another head or title.

        Subscribers at another position missed turns of another server: they are disconnected, and resume from the
        database.
        """
        self.has_branches = view.has_branches
        if self.position != position:
            if self.position is not None:
                self.disconnect()
            self._drop(position)
            self._log.head = view.head
        elif self._log.head != view.head:
            self._log.append_head(view.head)
            self._mark_dirty()
            self.version += 1
        self.rename(view.title)

    def rename(self, title: str | None) -> None:
        """Publish the title that a user chose (None for the automatic one), if it is another one."""
        if title != self.title:
            self.title = title
            self._log.append_title(title)
            self._mark_dirty()
            self.version += 1

    def open_turn(
        self,
        previous: Position,
        message: Message | None,
        reply_id: str,
        created_at: datetime,
        parent: Parent | None = None,
    ) -> None:
        """Publish a user's message (None at a retry) and start its reply.

        :param previous: the position right before, as stored
        :param parent: the message that the first of them continues; None for the one before it
        """
        before = None if previous == positions.start(self.key.id) else previous.message_id
        parent_id = before if parent is None else parent.id
        if self.reply is not None or self.position != previous:
            if self.position is not None:
                self.disconnect()
            self.reply = None
            self._drop(previous)
            self._log.head = parent_id
        else:
            self._log.drop_ended_turns()
            self._disconnect_slow()
        self.version += 1
        self.has_branches = self.has_branches or parent is not None
        if message is not None:
            self._log.append_message(message, parent_id, delivered=not self.is_dirty)
            parent_id = message.id
        self.reply = LiveReply(reply_id, created_at)
        self._log.open_reply(self.reply, parent_id)
        self._mark_dirty()

    def append(self, text: str, size: int) -> None:
        """Add text to the running reply: `size` bytes in UTF-8."""
        reply, log = self.reply, self._log
        assert reply is not None
        delivered = not self.is_dirty
        chars = reply.append(text, size)
        log.append(log.format.token_frame(reply.message_id, chars, text), chars, delivered)
        if delivered:
            self.is_dirty = True
            self._schedule(self)
        self._counts.tokens += 1

    def finish(self, message: Message) -> None:
        """End the running reply as it is stored."""
        assert self.reply is not None
        self._log.close_reply(message, delivered=not self.is_dirty)
        self._mark_dirty()
        self.reply = None
        self.version += 1

    def reset(self) -> None:
        """Send every subscriber a `reset`, because its position is no longer known, and end its stream."""
        self.reply, self.has_branches, self.title = None, False, None
        for_each(self.all_subscribers, self._reset_one)
        self._drop(None)

    def disconnect(self) -> None:
        """Disconnect every subscriber after the frames that it can still take: the clients resume."""
        for_each(self.all_subscribers, self._disconnect_one)

    def abort(self) -> None:
        """Abort every subscriber, after an unexpected failure: the clients resume, and the server continues."""
        for subscriber in self.all_subscribers:
            _abort(subscriber)

    def _reset_one(self, subscriber: Subscriber) -> None:
        self._counts.events += 1
        subscriber.end(subscriber.format.RESET)

    def _disconnect_one(self, subscriber: Subscriber) -> None:
        self.catch_up((subscriber,))
        subscriber.disconnect()

    def _mark_dirty(self) -> None:
        if not self.is_dirty:
            self.is_dirty = True
            self._schedule(self)

    def _drop(self, position: Position | None) -> None:
        """Drop the log; disconnect the subscribers that have not received all of it."""
        self._log.drop(position)
        self._disconnect_slow()
        self.version += 1

    def _disconnect_slow(self) -> None:
        """Disconnect the subscribers whose next frame is no longer in the log."""
        base = self._log.base
        for_each([each for each in self.subscribers if each.cursor < base], lambda each: each.disconnect())

    # -- subscribing ---------------------------------------------------------------------------------------------

    def covers(self, position: Position) -> bool:
        """Return whether everything after a position is, or will be, in the log."""
        if self.reply is not None and self.reply.message_id == position.message_id:
            return True
        return self._log.locate(position) is not None

    def is_outdated_at(self, position: Position) -> bool:
        """Return whether a position is the end of the reply that still runs here: another server has ended it."""
        return self.reply is not None and position == Position(self.reply.message_id, None)

    def head_at(self, position: Position, otherwise: str | None) -> str | None:
        """Return the message at the end of the visible conversation at a position.

        :param otherwise: what to return if the position is not in the log, or not yet
        """
        point = self._log.locate(position)
        return otherwise if point is None else point.head

    def subscribe(self, subscriber: Subscriber, position: Position) -> None:
        """Deliver to a subscriber everything after a position, from now on.

        A position that the log has not reached (the reply runs on another server, whose checkpoints are older than the
        text that its clients have) waits until the log reaches it, or the reply ends.
        """
        subscriber.live = self
        point = self._log.locate(position)
        if point is None:
            subscriber.cursor = _AHEAD
            self._ahead[subscriber] = position
            return
        # Set the cursor first: a connection that takes the rest of a frame at once continues from it.
        subscriber.cursor = point.offset
        self.subscribers.add(subscriber)
        if point.before:
            self._counts.events += 1
            subscriber.replay(point.before)
        self.catch_up((subscriber,))

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Remove a subscriber, if it is one."""
        self.subscribers.discard(subscriber)
        self._ahead.pop(subscriber, None)

    def is_caught_up(self, subscriber: Subscriber) -> bool:
        """Return whether a subscriber was sent everything in the log."""
        return subscriber.cursor >= self._log.end

    def is_complete_for(self, subscriber: Subscriber) -> bool:
        """Return whether no reply runs and a subscriber was sent everything: its response may end in order."""
        return self.reply is None and subscriber in self.subscribers and self.is_caught_up(subscriber)

    # -- delivering ----------------------------------------------------------------------------------------------

    def deliver(self) -> None:
        """Write to every ready subscriber the frames after its cursor."""
        self.is_dirty = False
        if self._ahead:
            self._admit_ahead()
        self.catch_up(self.subscribers)
        end = self._log.end
        if self.reply is None and self._log and all(each.cursor == end for each in self.subscribers):
            self._drop(self.position)

    def catch_up(self, subscribers: Iterable[Subscriber]) -> None:
        """Write to subscribers the frames after their cursors, for as long as their connections are ready.

        A subscriber that fails is aborted. Runs for every token and client: no call but the write itself.
        """
        log, counts = self._log, self._counts
        for subscriber in subscribers:
            try:
                while subscriber.ready and subscriber.cursor < log.end:
                    piece = log.piece
                    if piece.begin != subscriber.cursor:
                        piece = log.piece_at(subscriber.cursor)
                    counts.writes += 1
                    if subscriber.until_done and (last := log.end_of_reply_after(piece.begin)) and last <= piece.end:
                        data = piece.data[: last - piece.begin]
                        counts.events += log.count_events(data)
                        subscriber.cursor = last
                        subscriber.end(data)
                        break
                    counts.events += piece.events
                    subscriber.cursor = piece.end
                    subscriber.write(piece.chunk if subscriber.chunked else piece.data)
            except Exception:
                logger.exception(_FAILED, extra={"conversation": self.key.id})
                _abort(subscriber)

    def _admit_ahead(self) -> None:
        """Subscribe each once the log has reached its position; disconnect the others if the reply has ended."""
        for subscriber, position in list(self._ahead.items()):
            if self._log.locate(position) is not None:
                del self._ahead[subscriber]
                self.subscribe(subscriber, position)
            elif self.reply is None:
                subscriber.disconnect()
