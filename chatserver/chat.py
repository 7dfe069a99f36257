"""The use cases: say, stop, retry, history, list, delete, subscribe. Owns the replies that run.

A reply belongs to its conversation, not to a request: its task is kept here, and it is generated and stored whoever
watches. The order of a turn is: begin (stored) → pieces (published, checkpointed) → finish (stored) → end (published).
Whatever happens, what subscribers are told of a reply's end is what the database has of it.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from chatserver import sse, store
from chatserver.errors import (
    DatabaseUnavailable,
    Draining,
    KeyReused,
    NotFound,
    OutcomeUnknown,
    ReplyInProgress,
    SourceError,
    TooManyReplies,
)
from chatserver.hub import Hub, Live, LiveReply, Subscriber
from chatserver.metrics import Metrics
from chatserver.settings import Settings
from chatserver.sources import Message as Said
from chatserver.sources import Prompt, Source
from chatserver.sse import Position
from chatserver.store import INTERRUPTED, Begun, Message, Record, ReplyError, Status, Store, StoredReply, Turn

logger = logging.getLogger(__name__)

RETRY_MS = 1000
"""How soon a client shall reconnect."""
FULL = ReplyError("conversation_full", "The reply was cut where the conversation had no more room.")
CRASHED = ReplyError("source_failed", "The source of replies failed unexpectedly; try again.")
_STOPPED: tuple[Status, ReplyError | None] = ("stopped", None)
_STOP_PATIENCE_S = 1.0
_CHECKPOINTS_AT_ONCE = 200
_SETTLE_LOOKS = 3
_SETTLE_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class History:
    """A conversation as it stands, a running reply included as the last of `messages`.

    `in_flight` is whether the last of `messages` still grows; `position` is where the stream goes on from;
    `has_more` is whether older messages were left out.
    """

    created_at: datetime
    updated_at: datetime
    messages: Sequence[Message]
    streaming: bool
    in_flight: bool
    position: Position
    has_more: bool


def _now() -> float:
    return time.monotonic()


@dataclass(eq=False, slots=True)
class _Running:
    """A reply that this process writes."""

    begun: Begun
    live: Live
    reply: LiveReply
    started_at: float = field(default_factory=_now)
    started: bool = False
    generating: bool = True
    ending: tuple[Status, ReplyError | None] | None = None
    task: "asyncio.Task[None] | None" = None


def iso(time: datetime) -> str:
    """Return a time as ISO 8601 in UTC with milliseconds and `Z`."""
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Chat:
    """The use cases, over one store, one hub and one source.

    :param alone: whether the database is private, so that a reply found running at start-up has lost its server
    """

    def __init__(
        self, settings: Settings, store: Store, hub: Hub, source: Source, metrics: Metrics, *, alone: bool = False
    ) -> None:
        self._settings = settings
        self._store = store
        self._hub = hub
        self._source = source
        self._metrics = metrics
        self._alone = alone
        self._running: dict[str, _Running] = {}
        self._beginning: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self._out_of_time = False
        counts = hub.counts
        store.observe = metrics.observe_store
        metrics.watch("chatserver_running_replies", "Replies that are being written.", lambda: self.running)
        metrics.watch("chatserver_live_conversations", "Conversations in memory.", lambda: len(hub.lives))
        metrics.watch("chatserver_tasks", "Tasks of the event loop.", lambda: len(asyncio.all_tasks()))
        metrics.watch("chatserver_tokens", "Pieces that the sources said.", lambda: counts.tokens, counter=True)
        metrics.watch("chatserver_events_sent", "Events written to streams.", lambda: counts.events, counter=True)
        metrics.watch("chatserver_stream_writes", "Writes to streams.", lambda: counts.writes, counter=True)

    @property
    def draining(self) -> bool:
        """Whether new turns are refused because the process is about to end."""
        return self._draining

    @property
    def running(self) -> int:
        """The number of replies that this process writes."""
        return len(self._running)

    # -- the process ---------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Make the indexes, finish lost replies, start to deliver, checkpoint and sweep."""
        await self._store.prepare()
        await self._finish_lost(alone=self._alone)
        self._spawn(self._hub.deliver())
        self._spawn(_for_ever(self._checkpoint))
        self._spawn(_for_ever(self._sweep))

    async def drain(self) -> None:
        """Refuse new turns, let replies end for `DRAIN_S`, finish the rest as interrupted with their text stored."""
        self._draining = True
        if not await self._idle_within(self._settings.drain_s):
            self._out_of_time = True
            for running in list(self._running.values()):
                self._end(running, "interrupted", INTERRUPTED)
            if not await self._idle_within(self._settings.database_timeout_s + 1):
                logger.error("%d replies could not be stored; their last checkpoint stands", len(self._running))

    async def close(self) -> None:
        """End all that runs in the background."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._source.close()

    async def ping(self) -> None:
        """Return if new turns can be taken.

        :raises Draining, DatabaseUnavailable: if not
        """
        if self._draining:
            raise Draining
        await self._store.ping()

    # -- turns ---------------------------------------------------------------------------------------------------

    async def say(self, conversation_id: str | None, text: str, key: str | None = None) -> Turn:
        """Store what a user said and start the reply; with a known idempotency key return the first answer.

        :param conversation_id: None for a new conversation; an unknown one is created
        :raises ReplyInProgress, ConversationFull, KeyReused: and nothing is stored
        :raises DatabaseUnavailable, Draining, TooManyReplies: and nothing is stored, or the turn runs
        """
        new = conversation_id is None and key is None
        if key is not None:
            conversation_id = conversation_id or store.keyed_id(key)
            if (first := await self._store.find_keyed(conversation_id, key, text)) is not None:
                return first
        turn = Turn(conversation_id or store.new_id(), store.new_id(), store.new_id())
        try:
            return await self._begin(
                turn.conversation_id, turn.reply_id, lambda: self._store.begin(turn, text, key, new=new)
            )
        except KeyReused:
            # Another attempt with this key got in between our look and our write.
            if key is None or (first := await self._store.find_keyed(turn.conversation_id, key, text)) is None:
                raise
            return first

    async def retry(self, conversation_id: str) -> Turn:
        """Start a new reply in place of the last one, if that was stopped, failed or interrupted.

        :raises NotFound, NothingToRetry, ReplyInProgress, ConversationFull: and nothing is stored
        :raises DatabaseUnavailable, Draining, TooManyReplies: as `say`
        """
        reply_id = store.new_id()
        return await self._begin(conversation_id, reply_id, lambda: self._store.begin_retry(conversation_id, reply_id))

    async def stop(self, conversation_id: str) -> str | None:
        """End the running reply, keeping what was said; return its id, or None if none runs or it ends by itself.

        :raises NotFound: if there is no such conversation
        """
        with self._hub.hold(conversation_id) as live:
            while True:
                record = None
                if live.reply is None or live.reply.message_id not in self._running:
                    record = await self._read(live, peek=True)
                    if record is None:
                        raise NotFound("There is no conversation with this id.")
                if live.reply is not None and (running := self._running.get(live.reply.message_id)):
                    self._end(running, "stopped", None)
                    if running.ending != _STOPPED or running.task is None:
                        return None
                    # Stored, as a rule, when this returns, so that a retry or a post may follow at once.
                    await asyncio.wait({running.task}, timeout=_STOP_PATIENCE_S)
                    return running.reply.message_id
                if record is None or record.reply is None:
                    return None
                # It runs on another server, which will find its reply ended at its next checkpoint. One that was
                # checkpointed since we looked is looked at again.
                if await self._finish_checkpointed(conversation_id, record.reply, *_STOPPED):
                    return record.reply.id

    async def delete(self, conversation_id: str) -> None:
        """Delete a conversation, its running reply first; its streams end with `reset`.

        :raises NotFound: if there is none
        """
        with self._hub.hold(conversation_id) as live:
            reply = live.reply
            found = await self._store.delete(conversation_id)
            # Unless a new conversation under this id has begun meanwhile: that one lives on.
            if found and live.reply is reply:
                live.reset()
            if reply is not None and (running := self._running.get(reply.message_id)):
                self._end(running, "stopped", None)
        if not found:
            raise NotFound("There is no conversation with this id.")

    # -- reading -------------------------------------------------------------------------------------------------

    async def history(self, conversation_id: str, limit: int | None = None, before: str | None = None) -> History:
        """Return a conversation: all of it, or its newest `limit` messages (before a message's id).

        :raises NotFound: if there is no such conversation, or `before` is none of its messages
        """
        with self._hub.hold(conversation_id) as live:
            record = await self._read(live, before=before, last=limit)
            if record is not None and record.reply is not None and record.reply.id == before:
                # Before the reply in flight are all that are stored.
                record = await self._read(live, last=limit)
            # No await from here on, so that text and position are of one moment.
            if record is None:
                raise NotFound("There is no conversation with this id.")
            if not record.found:
                raise NotFound("The parameter before names no message of this conversation.")
            messages = list(record.messages)
            older = record.first
            in_flight = record.reply if before is None else None
            if in_flight is not None:
                content = in_flight.content
                if live.reply is not None and live.reply.message_id == in_flight.id:
                    content = max(content, live.reply.content, key=len)
                messages.append(Message(in_flight.id, "assistant", content, in_flight.created_at))
                if limit is not None and len(messages) > limit:
                    del messages[0]
                    older += 1
            position = sse.start(conversation_id)
            if messages:
                position = Position(messages[-1].id, len(messages[-1].content) if in_flight else None)
            return History(
                record.created_at,
                record.updated_at,
                messages,
                record.reply is not None,
                bool(in_flight),
                position,
                older > 0,
            )

    async def summaries(self, limit: int, after: tuple[datetime, str] | None = None) -> Sequence[store.Summary]:
        """Return up to `limit` conversations, newest first, older than `after`."""
        return await self._store.summaries(limit, after)

    async def subscribe(self, conversation_id: str, position: Position | None, subscriber: Subscriber) -> None:
        """Have a subscriber told all that follows a position, then whatever comes.

        Without a position: the running reply from its start, if there is one. A position that does not exist is
        answered by `reset`.
        """
        if position is not None:
            self._metrics.resumes.inc()
        with self._hub.hold(conversation_id) as live:
            record = None
            # What is idle here may have gone on elsewhere.
            if not _is_live(live, position) or (live.reply is None and not self._alone):
                try:
                    record = await self._read(live, **_what_to_read(conversation_id, position))
                    self._align(live, record)
                except DatabaseUnavailable:
                    if not _is_live(live, position):
                        raise
            # No await from here on: snapshot and cursor are of one moment, so that no token lands between them.
            at = position or _where_a_stream_begins(live) or sse.start(conversation_id)
            missed = _Missed()
            if not live.covers(at):
                found = _missed(record, at, conversation_id, subscriber.until_done)
                if found is None:
                    self._metrics.resets.inc()
                    subscriber.end(sse.RESET)
                    return
                missed = found
            subscriber.replay(sse.preamble(RETRY_MS, at) + missed.frames)
            if missed.ended:
                subscriber.end()
            else:
                live.subscribe(subscriber, missed.position or at)

    def unsubscribe(self, subscriber: Subscriber) -> None:
        """Let a subscriber go, if it watches anything."""
        self._hub.unsubscribe(subscriber)

    async def _read(self, live: Live, *, peek: bool = False, **what: Any) -> Record | None:
        """Read a conversation while no turn begins or ends here, so that it can be put together with what is live.

        :param peek: whether its messages do not matter; else `what` of them: see `Store.read`
        """
        while True:
            version = live.version
            if peek:
                record = await self._store.peek(live.conversation_id)
            else:
                record = await self._store.read(live.conversation_id, **what)
            reply = record.reply if record else None
            if reply is not None and (begun := self._beginning.get(reply.id)) is not None:
                # Stored, but not yet published: our own begin is about to return, or to be settled.
                await begun.wait()
            elif reply is not None and reply.expired and reply.id not in self._running:
                await self._finish_checkpointed(live.conversation_id, reply, "interrupted", INTERRUPTED)
            elif live.version == version:
                return record

    def _align(self, live: Live, record: Record | None) -> None:
        """Give a live conversation what only the database knows: where it stands, a reply of another server."""
        end = sse.start(live.conversation_id)
        if record is not None and record.last_id is not None:
            end = Position(record.last_id, None)
        stored = record.reply if record else None
        if stored is None:
            if live.reply is None:
                live.adopt(end)
        elif live.reply is None or live.reply.message_id != stored.id:
            live.begin(end, None, stored.id, stored.created_at)
            assert live.reply is not None
            _append(live, live.reply, stored.content)
            self._hub.settle(live)
            self._spawn(self._follow(live, live.reply))

    async def _follow(self, live: Live, reply: LiveReply) -> None:
        """Publish a reply that another server writes, as its checkpoints tell, until it ends."""
        conversation_id = live.conversation_id
        while True:
            await asyncio.sleep(self._settings.checkpoint_ms / 1000)
            try:
                record = await self._store.read(conversation_id, since=reply.message_id)
                stored = record.reply if record else None
                if stored is not None and stored.id == reply.message_id and stored.expired:
                    await self._finish_checkpointed(conversation_id, stored, "interrupted", INTERRUPTED)
                    continue
            except DatabaseUnavailable:
                continue
            if live.reply is not reply:
                return
            if stored is not None and stored.id == reply.message_id:
                _append(live, reply, stored.content[reply.chars :])
                self._hub.settle(live)
                continue
            message = record.messages[0] if record and record.found else None
            if message is not None:
                _append(live, reply, message.content[reply.chars :])
            self._publish_end(live, reply, message)
            return

    # -- a reply that runs ---------------------------------------------------------------------------------------

    async def _begin(self, conversation_id: str, reply_id: str, begin: Callable[[], Awaitable[Begun]]) -> Turn:
        """Begin a turn and start its reply; one whose outcome is unknown is settled in the background."""
        if self._draining:
            raise Draining
        if len(self._running) + len(self._beginning) >= self._settings.max_replies:
            raise TooManyReplies
        with self._hub.hold(conversation_id) as live:
            begun = self._beginning[reply_id] = asyncio.Event()
            unknown = False
            try:
                try:
                    turn = await begin()
                except ReplyInProgress:
                    # Whoever reads finishes a reply that has lost its server; then there may be room for ours.
                    record = await self._read(live, peek=True)
                    if record is not None and record.reply is not None:
                        raise
                    turn = await begin()
                self._start(live, turn)
                return turn.turn
            except OutcomeUnknown:
                unknown = True
                raise
            finally:
                if unknown:
                    self._spawn(self._settle(conversation_id, reply_id, begun))
                else:
                    del self._beginning[reply_id]
                    begun.set()

    async def _settle(self, conversation_id: str, reply_id: str, begun: asyncio.Event) -> None:
        """Find out, once the database answers, whether a begin was done: its reply runs, or nothing is left of it.

        A write that was on its way may arrive a moment after the database is back, hence the second and third look.
        """
        looks = 0
        try:
            while looks < _SETTLE_LOOKS:
                await asyncio.sleep(_SETTLE_PAUSE_S)
                try:
                    turn = await self._store.find_begun(conversation_id, reply_id)
                except DatabaseUnavailable:
                    continue
                looks += 1
                if turn is not None:
                    with self._hub.hold(conversation_id) as live:
                        self._start(live, turn)
                    return
        finally:
            del self._beginning[reply_id]
            begun.set()

    def _start(self, live: Live, begun: Begun) -> None:
        """Publish what was said and write the reply."""
        previous = Position(begun.previous_id, None) if begun.previous_id else sse.start(live.conversation_id)
        said = (begun.said.id, _input_frame(begun.said)) if begun.said else None
        live.begin(previous, said, begun.turn.reply_id, begun.created_at)
        self._hub.settle(live)
        assert live.reply is not None
        running = self._running[begun.turn.reply_id] = _Running(begun, live, live.reply)
        running.task = self._spawn(self._answer(running))
        logger.info("reply started", extra=_ids(begun.turn))
        if self._out_of_time:
            self._end(running, "interrupted", INTERRUPTED)

    async def _answer(self, running: _Running) -> None:
        """Write one reply from its source's first piece to its stored end."""
        begun, reply = running.begun, running.reply
        status, error = await self._generate(running)
        running.generating = False
        message = Message(reply.message_id, "assistant", reply.content, reply.created_at, status, error)
        try:
            stored = await self._finish(begun.turn.conversation_id, message)
        except Exception:
            # It cannot be stored as it is: its lease runs out, its checkpoint stands, and its subscribers are told so.
            self._spawn(self._follow(running.live, reply))
            raise
        finally:
            del self._running[reply.message_id]
        if running.live.reply is reply:
            self._publish_end(running.live, reply, stored)
        ended = stored.status if stored else "deleted"
        self._metrics.reply_duration.labels(ended).observe(_now() - running.started_at)
        code = stored.error.code if stored and stored.error else None
        logger.info("reply %s", ended, extra={**_ids(begun.turn), "code": code})

    async def _generate(self, running: _Running) -> tuple[Status, ReplyError | None]:
        """Publish what the source says; return how it ended."""
        begun, live, reply = running.begun, running.live, running.reply
        prompt = Prompt([Said(each.role, each.content) for each in begun.messages], begun.number)
        if running.ending is not None:
            return running.ending
        running.started = True
        said = False
        try:
            async with aclosing(self._source.reply(prompt)) as pieces:
                async for piece in pieces:
                    if live.reply is not reply:
                        return "interrupted", INTERRUPTED
                    if not _append(live, reply, piece, begun.reply_room):
                        return "failed", FULL
                    self._hub.settle(live)
                    if not said:
                        said = True
                        self._metrics.first_token.observe(_now() - running.started_at)
        except SourceError as failure:
            return "failed", ReplyError(failure.code, failure.message)
        except asyncio.CancelledError:
            if running.ending is None:
                raise
            return running.ending
        except Exception:
            # Whatever a source does, its reply ends and says so: a conversation is never left streaming.
            logger.exception("the source of replies crashed", extra=_ids(begun.turn))
            return "failed", CRASHED
        return "complete", None

    def _end(self, running: _Running, status: Status, error: ReplyError | None) -> bool:
        """End a reply early, if it has not ended by itself; return whether this did it."""
        if not running.generating or running.ending is not None:
            return False
        running.ending = (status, error)
        # A task that is cancelled before its first step never takes it: it finds its ending there by itself.
        if running.started and running.task is not None:
            running.task.cancel()
        return True

    async def _finish(self, conversation_id: str, message: Message) -> Message | None:
        """Store a reply however long it takes; return what the database has of it."""
        delay = 0.1
        while True:
            try:
                return await self._store.finish(conversation_id, message)
            except DatabaseUnavailable:
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                delay = min(2 * delay, 2.0)

    def _publish_end(self, live: Live, reply: LiveReply, message: Message | None) -> None:
        """Tell the subscribers how a reply ended, as the database has it."""
        if message is None or (message.content != reply.content and message.error is None):
            # Deleted, or ended by another server with less than was seen here: only the history tells the truth.
            live.reset()
        else:
            live.finish(_end_frame(message), failed=message.error is not None)
        self._hub.settle(live)

    # -- what runs in the background -----------------------------------------------------------------------------

    async def _checkpoint(self) -> None:
        """Save, over one interval, what the running replies have said; end those that others have taken for lost.

        Many are saved in several parts, so that no one write of them holds the process up.
        """
        parts = len(self._running) // _CHECKPOINTS_AT_ONCE + 1
        for part in range(parts):
            await asyncio.sleep(self._settings.checkpoint_ms / 1000 / parts)
            replies = {
                reply_id: (each.live.conversation_id, each.reply.content)
                for reply_id, each in self._running.items()
                if hash(reply_id) % parts == part
            }
            lost = await self._store.checkpoint(replies) if replies else ()
            for reply_id in lost:
                if (running := self._running.get(reply_id)) and self._end(running, "interrupted", INTERRUPTED):
                    logger.info("reply ended or deleted by another hand", extra=_ids(running.begun.turn))

    async def _sweep(self) -> None:
        """Finish, after a while, the replies whose servers were lost."""
        await asyncio.sleep(min(self._settings.lease_ms / 4000, 5.0))
        await self._finish_lost()

    async def _finish_lost(self, *, alone: bool = False) -> None:
        """Finish the replies whose servers were lost."""
        own = [*self._running, *self._beginning]
        for conversation_id, reply in await self._store.find_lost(own, alone=alone):
            await self._finish_checkpointed(conversation_id, reply, "interrupted", INTERRUPTED)

    async def _finish_checkpointed(
        self, conversation_id: str, reply: StoredReply, status: Status, error: ReplyError | None
    ) -> bool:
        """Finish a reply of another server with what was checkpointed, unless it has been renewed since we looked.

        :return: whether this did it
        """
        message = Message(reply.id, "assistant", reply.content, reply.created_at, status, error)
        if await self._store.finish(conversation_id, message, if_renewed_at=reply.renewed_at) is not message:
            return False
        logger.info("reply of another server finished", extra={"conversation": conversation_id, "reply": reply.id})
        return True

    async def _idle_within(self, seconds: float) -> bool:
        """Wait until no reply runs; return whether that came within so many seconds."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self._running or self._beginning:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return False
            tasks = {each.task for each in self._running.values() if each.task}
            events = {asyncio.ensure_future(each.wait()) for each in self._beginning.values()}
            await asyncio.wait({*tasks, *events}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for event in events:
                event.cancel()
        return True

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run something in the background, as this object's own."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task crashed", exc_info=error)


async def _for_ever(work: Callable[[], Awaitable[None]]) -> None:
    """Do something again and again; whatever fails is done again the next time."""
    while True:
        try:
            await work()
        except DatabaseUnavailable:
            continue
        except Exception:
            logger.exception("what runs in the background failed")


@dataclass(frozen=True, slots=True)
class _Missed:
    """What a client missed: frames, the position after them, and whether its stream ends there (`?until=done`)."""

    frames: bytes = b""
    position: Position | None = None
    ended: bool = False


def _missed(record: Record | None, at: Position, conversation_id: str, until_done: bool) -> _Missed | None:
    """Return what the stored messages say after a position; None if the position does not exist."""
    if record is None or not record.found:
        return None
    frames = []
    for message in record.messages:
        seen: int | None = 0
        if message.id == at.message_id:
            seen = at.chars
        position = Position(message.id, None)
        if message.role == "user":
            if seen:
                return None
            if seen == 0:
                frames.append(_input_frame(message))
            continue
        if seen is None:
            continue
        if seen > len(message.content) and message.error is None:
            # It has ended with less than this client saw, and a `done` would be a lie to it.
            return None
        if text := message.content[seen:]:
            frames.append(sse.token_frame(message.id, len(message.content), text))
        frames.append(_end_frame(message))
        if until_done:
            return _Missed(b"".join(frames), position, True)
    end = Position(record.last_id, None) if record.last_id else sse.start(conversation_id)
    return _Missed(b"".join(frames), end)


def _what_to_read(conversation_id: str, at: Position | None) -> dict[str, Any]:
    """Return what of the record is needed to go on from a position: no message, if there is none."""
    if at is None:
        return {"peek": True}
    if at == sse.start(conversation_id):
        return {}
    return {"since": at.message_id}


def _where_a_stream_begins(live: Live) -> Position | None:
    """Return where a stream without a position begins: at the running reply's start, else at the end; None: unknown."""
    return Position(live.reply.message_id, 0) if live.reply else live.position


def _is_live(live: Live, position: Position | None) -> bool:
    """Return whether all that follows a position (None: where a stream begins) is in memory."""
    at = position or _where_a_stream_begins(live)
    return at is not None and live.covers(at)


def _append(live: Live, reply: LiveReply, text: str, room: int | None = None) -> bool:
    """Add text to a reply; return False if it was cut because only `room` bytes were left."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        # A source may say half a surrogate pair, which neither UTF-8 nor BSON can hold.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        size = len(text.encode())
    fits = room is None or reply.size + size <= room
    if not fits and room is not None:
        text = text.encode()[: room - reply.size].decode(errors="ignore")
        size = len(text.encode())
    if text:
        live.append(text, size)
    return fits


def _input_frame(message: Message) -> bytes:
    data = {"messageId": message.id, "text": message.content, "createdAt": iso(message.created_at)}
    return sse.frame("input", Position(message.id, None), data)


def _end_frame(message: Message) -> bytes:
    """Return the `done` or `error` of a stored reply."""
    position = Position(message.id, None)
    if message.error is not None:
        data = {"code": message.error.code, "message": message.error.message, "messageId": message.id}
        return sse.frame("error", position, data)
    status = "complete" if message.status == "complete" else "stopped"
    return sse.frame("done", position, {"messageId": message.id, "status": status})


def _ids(turn: Turn) -> dict[str, str]:
    return {"conversation": turn.conversation_id, "reply": turn.reply_id}
