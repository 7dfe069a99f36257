"""The replies that run: each is written by a task of this process, or followed while another server writes it.

A reply belongs to its conversation, not to a request: its task is kept here, and it is generated and stored whoever
watches. The order of a turn is: begin (stored) → pieces (published, checkpointed) → finish (stored) → end (published).
Whatever happens, what subscribers are told of a reply's end is what the database has of it.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, NamedTuple

from tornado.locks import Condition

from chatserver import positions, sources, tasks
from chatserver.errors import (
    DatabaseUnavailable,
    Draining,
    OutcomeUnknown,
    ReplyInProgress,
    SourceError,
    TooManyReplies,
)
from chatserver.hub import Hub, LiveConversation, LiveReply
from chatserver.metrics import Metrics
from chatserver.records import INTERRUPTED, After, Message, Record, ReplyError, StartedTurn, Status, StoredReply, Turn
from chatserver.settings import Settings
from chatserver.store import Store

logger = logging.getLogger(__name__)


class Ending(NamedTuple):
    """How a reply ends: its status, and its error if it failed or was interrupted."""

    status: Status
    error: ReplyError | None = None


STOPPED = Ending("stopped")
_COMPLETE = Ending("complete")
_INTERRUPTED = Ending("interrupted", INTERRUPTED)
_FULL = Ending("failed", ReplyError("conversation_full", "The reply was cut where the conversation had no more room."))
_EMPTY = Ending("failed", ReplyError("source_empty", "The model sent no text. Retry, or rephrase the question."))
_CRASHED = Ending("failed", ReplyError("source_failed", "The source of replies failed unexpectedly; try again."))
_CHECKPOINTS_AT_ONCE = 200
_ATTEMPTS = 5
"""How often a reply's checkpoint or its end may fail to be stored unexpectedly, before it is given up."""
_SETTLE_LOOKS = 3
_SETTLE_PAUSE_S = 0.5


@dataclass(eq=False, slots=True)
class Running:
    """A reply that this process writes."""

    begun: StartedTurn
    live: LiveConversation
    reply: LiveReply
    started_at: float = field(default_factory=monotonic)
    started: bool = False
    generating: bool = True
    ending: Ending | None = None
    unsaved: int = 0
    """How many of its checkpoints failed unexpectedly."""
    task: "asyncio.Task[None]" = field(init=False)


class Replies:
    """The replies of this process, over one store, one hub and one source."""

    def __init__(self, settings: Settings, store: Store, hub: Hub, source: sources.Source, metrics: Metrics) -> None:
        self._settings = settings
        self._store = store
        self._hub = hub
        self._source = source
        self._metrics = metrics
        self._running: dict[str, Running] = {}
        self._pending: dict[str, asyncio.Event] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = Condition()
        self._out_of_time = False
        self.draining = False
        """Whether new turns are refused because the process is about to end."""

    def __len__(self) -> int:
        return len(self._running)

    def get(self, reply_id: str) -> Running | None:
        """Return a reply that this process writes, or None."""
        return self._running.get(reply_id)

    # -- the process ---------------------------------------------------------------------------------------------

    async def start(self, *, sole_server: bool) -> None:
        """Finish lost replies, start to deliver, checkpoint and sweep."""
        await self._finish_expired(sole_server=sole_server)
        self.spawn(self._hub.deliver())
        self.spawn(tasks.repeat(self._checkpoint, expected=(DatabaseUnavailable,)))
        self.spawn(tasks.repeat(self._sweep, expected=(DatabaseUnavailable,)))

    async def drain(self) -> None:
        """Refuse new turns, let replies end for `DRAIN_S`, finish the rest as interrupted with their text stored."""
        self.draining = True
        if not await self._idle_within(self._settings.drain_s):
            self._out_of_time = True
            for running in list(self._running.values()):
                self.end(running, _INTERRUPTED)
            if not await self._idle_within(self._settings.database_timeout_s + 1):
                logger.error("%d replies could not be stored; their last checkpoint stands", len(self._running))

    async def close(self) -> None:
        """End all that runs in the background."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._source.close()

    # -- together with what is stored ----------------------------------------------------------------------------

    async def read(self, live: LiveConversation, look: Callable[[str], Awaitable[Record | None]]) -> Record | None:
        """Read a conversation while no turn begins or ends here, so that it can be put together with what is live.

        :param look: given its id; `Store.peek` or `Store.read`
        """
        tried: StoredReply | None = None
        while True:
            version = live.version
            record = await look(live.conversation_id)
            reply = record.reply if record else None
            if reply is not None and (begun := self._pending.get(reply.id)) is not None:
                # Stored, but not yet published: our own begin is about to return, or to be settled.
                await begun.wait()
            elif reply is not None and reply.expired and reply.id not in self._running and reply != tried:
                await self.finish_from_checkpoint(live.conversation_id, reply, _INTERRUPTED)
                tried = reply
            elif live.version == version:
                if record is None and live.reply is None:
                    # Deleted, perhaps by another server: whoever watches it shall know.
                    live.adopt(positions.start(live.conversation_id))
                return record

    def align(self, live: LiveConversation, record: Record | None) -> None:
        """Give a live conversation what only the database knows: where it stands, a reply of another server."""
        end = positions.after(record.last_id if record else None, live.conversation_id)
        stored = record.reply if record else None
        if stored is None:
            if live.reply is None:
                live.adopt(end)
        elif live.reply is None or live.reply.message_id != stored.id:
            live.open_turn(end, None, stored.id, stored.created_at)
            assert live.reply is not None
            _append(live, live.reply, stored.content)
            self.spawn(self._follow(live, live.reply))

    async def _follow(self, live: LiveConversation, reply: LiveReply) -> None:
        """Publish a reply that another server writes, as its checkpoints tell, until it ends."""
        await tasks.repeat(lambda: self._follow_once(live, reply), expected=(DatabaseUnavailable,))

    async def _follow_once(self, live: LiveConversation, reply: LiveReply) -> bool:
        """Publish the next checkpoint, or the end; return whether there is nothing more to follow."""
        conversation_id = live.conversation_id
        await asyncio.sleep(self._settings.checkpoint_ms / 1000)
        record = await self._store.read(conversation_id, After(reply.message_id, 0), divided="none")
        stored = record.reply if record else None
        if stored is not None and stored.id == reply.message_id and stored.expired:
            await self.finish_from_checkpoint(conversation_id, stored, _INTERRUPTED)
            return False
        if live.reply is not reply:
            return True
        if stored is not None and stored.id == reply.message_id:
            _append(live, reply, stored.content[reply.chars :])
            return False
        message = record.messages[0] if record and record.found else None
        if message is not None:
            _append(live, reply, message.content[reply.chars :])
        self._publish_end(live, reply, message)
        if not live.is_unused:
            # The other server may have gone on.
            self.align(live, record)
        return True

    # -- a reply that runs ---------------------------------------------------------------------------------------

    async def begin(self, conversation_id: str, reply_id: str, begin: Callable[[], Awaitable[StartedTurn]]) -> Turn:
        """Begin a turn and start its reply; one whose outcome is unknown is settled in the background.

        :param begin: `Store.start_turn` or `Store.start_retry`; called again if a lost reply stood in the way
        :raises Draining, TooManyReplies: and nothing is stored
        """
        if self.draining:
            raise Draining
        with self._hub.hold(conversation_id) as live:
            if len(self._running) + len(self._pending) >= self._settings.max_replies:
                raise ReplyInProgress if live.reply is not None else TooManyReplies
            self._pending[reply_id] = asyncio.Event()
            try:
                try:
                    begun = await begin()
                except ReplyInProgress:
                    # Whoever reads finishes a reply that has lost its server; then there may be room for ours.
                    record = await self.read(live, self._store.peek)
                    if record is not None and record.reply is not None:
                        raise
                    begun = await begin()
                self._start(live, begun)
            except OutcomeUnknown:
                self.spawn(self._settle(conversation_id, reply_id))
                raise
            except BaseException:
                self._release_readers(reply_id)
                raise
            self._release_readers(reply_id)
            return begun.turn

    def _release_readers(self, reply_id: str) -> None:
        """Let those go on who wait for a begin."""
        self._pending.pop(reply_id).set()
        self._ended.notify_all()

    async def _settle(self, conversation_id: str, reply_id: str) -> None:
        """Find out, once the database answers, whether a begin was done: its reply runs, or nothing is left of it.

        A write that was on its way may arrive a moment after the database is back, hence the second and third look.
        """
        looks = 0

        async def look() -> bool:
            nonlocal looks
            await asyncio.sleep(_SETTLE_PAUSE_S)
            begun = await self._store.find_started(conversation_id, reply_id)
            looks += 1
            if begun is not None:
                with self._hub.hold(conversation_id) as live:
                    self._start(live, begun)
            return begun is not None or looks == _SETTLE_LOOKS

        try:
            await tasks.repeat(look, expected=(DatabaseUnavailable,))
        finally:
            self._release_readers(reply_id)

    def _start(self, live: LiveConversation, begun: StartedTurn) -> None:
        """Publish what was said and write the reply."""
        previous = positions.after(begun.previous_id, live.conversation_id)
        live.open_turn(previous, begun.said, begun.turn.reply_id, begun.created_at)
        assert live.reply is not None
        running = self._running[begun.turn.reply_id] = Running(begun, live, live.reply)
        running.task = self.spawn(self._answer(running))
        logger.info("reply started", extra=_ids(begun.turn))
        if self._out_of_time:
            self.end(running, _INTERRUPTED)

    async def _answer(self, running: Running) -> None:
        """Write one reply from its source's first piece to its stored end."""
        try:
            await self._write(running)
        except Exception:
            # It may not have been stored: its lease expires, its checkpoint stands, and its subscribers are sent what
            # the database has.
            if running.live.reply is running.reply:
                self.spawn(self._follow(running.live, running.reply))
            raise

    async def _write(self, running: Running) -> None:
        begun, live, reply = running.begun, running.live, running.reply
        try:
            ending = await self._generate(running)
            running.generating = False
            message = Message(reply.message_id, "assistant", reply.content, reply.created_at, *ending)
            stored = await self._finish(live.conversation_id, message)
        finally:
            del self._running[reply.message_id]
            self._ended.notify_all()
        if live.reply is reply:
            self._publish_end(live, reply, stored)
        if stored is not message and not live.is_unused:
            # Whoever ended it may have gone on.
            with suppress(DatabaseUnavailable), self._hub.hold(live.conversation_id) as live:
                self.align(live, await self.read(live, self._store.peek))
        ended = stored.status if stored else "deleted"
        self._metrics.reply_duration.labels(ended).observe(monotonic() - running.started_at)
        code = stored.error.code if stored and stored.error else None
        logger.info("reply %s", ended, extra={**_ids(begun.turn), "code": code})

    async def _generate(self, running: Running) -> Ending:
        """Publish the source's text; return how it ended."""
        begun, live, reply = running.begun, running.live, running.reply
        # Other applications may have stored messages of other roles; no source expects those.
        messages = [sources.Message(each.role, each.content) for each in begun.messages if each.role in sources.ROLES]
        prompt = sources.Prompt(messages, begun.number)
        if running.ending is not None:
            return running.ending
        running.started = True
        has_spoken = has_words = False
        try:
            async with aclosing(self._source.reply(prompt)) as pieces:
                async for piece in pieces:
                    if live.reply is not reply:
                        return _INTERRUPTED
                    room_chars = self._settings.max_reply_chars - reply.chars
                    if not _append(live, reply, piece[:room_chars], begun.reply_room):
                        return _FULL
                    has_words = has_words or bool(piece.strip())
                    if not has_spoken:
                        has_spoken = True
                        self._metrics.first_token.observe(monotonic() - running.started_at)
                    if len(piece) > room_chars:
                        return _too_long(self._settings.max_reply_chars)
        except SourceError as failure:
            return Ending("failed", ReplyError(failure.code, _whole(failure.message)))
        except (Exception, asyncio.CancelledError) as failure:
            if isinstance(failure, asyncio.CancelledError) and running.task.cancelling():
                if running.ending is None:
                    raise
                return running.ending
            # Whatever a source does, its reply ends and says so: a conversation is never left streaming.
            logger.exception("the source of replies crashed", extra=_ids(begun.turn))
            return _CRASHED
        return _COMPLETE if has_words else _EMPTY

    def end(self, running: Running, ending: Ending) -> bool:
        """End a reply early, if it has not ended by itself; return whether this did it."""
        if not running.generating or running.ending is not None:
            return False
        running.ending = ending
        # A task that is cancelled before its first step never takes it: it finds its ending there by itself.
        if running.started:
            running.task.cancel()
        return True

    async def _finish(self, conversation_id: str, message: Message) -> Message | None:
        """Store a reply however long it takes; return what the database has of it.

        :raises RuntimeError: if MongoDB refuses to store it
        """
        delay = 0.1
        unexpected = 0
        while True:
            try:
                return await self._store.finish(conversation_id, message)
            except DatabaseUnavailable:
                pass
            except Exception as error:
                unexpected += 1
                if isinstance(error, RuntimeError) or unexpected == _ATTEMPTS:
                    raise
                # What was written since the last checkpoint exists only here.
                logger.exception("a reply could not be stored; tried again")
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(2 * delay, 2.0)

    def _publish_end(self, live: LiveConversation, reply: LiveReply, message: Message | None) -> None:
        """Tell the subscribers how a reply ended, as the database has it."""
        if message is None or (message.content != reply.content and message.error is None):
            # Deleted, or ended by another server with less than was seen here: only the history tells the truth.
            live.reset()
        else:
            live.finish(message)
        self._hub.release(live)

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
            if replies:
                await self._save(replies)

    async def _save(self, replies: dict[str, tuple[str, str]]) -> None:
        """Checkpoint some replies. One that repeatedly cannot be is ended, and costs the others nothing."""
        try:
            lost = await self._store.checkpoint(replies)
        except DatabaseUnavailable:
            raise
        except Exception:
            for reply_id, each in replies.items():
                if len(replies) > 1:
                    await self._save({reply_id: each})
                elif running := self._running.get(reply_id):
                    logger.exception("a checkpoint failed", extra=_ids(running.begun.turn))
                    running.unsaved += 1
                    if running.unsaved == _ATTEMPTS:
                        self.end(running, _CRASHED)
            return
        for reply_id in lost:
            if (running := self._running.get(reply_id)) and self.end(running, _INTERRUPTED):
                logger.info("reply ended or deleted by another server", extra=_ids(running.begun.turn))

    async def _sweep(self) -> None:
        """Finish, after a while, the replies whose servers were lost."""
        await asyncio.sleep(min(self._settings.lease_ms / 4000, 5.0))
        await self._finish_expired()

    async def _finish_expired(self, *, sole_server: bool = False) -> None:
        """Finish the replies whose servers were lost."""
        own = [*self._running, *self._pending]
        for conversation_id, reply in await self._store.find_expired(own, sole_server=sole_server):
            try:
                await self.finish_from_checkpoint(conversation_id, reply, _INTERRUPTED)
            except DatabaseUnavailable:
                raise
            except Exception:
                # One that cannot be finished must not keep the others unfinished, nor the server from starting.
                ids = {"conversation": conversation_id, "reply": reply.id}
                logger.exception("a lost reply could not be finished", extra=ids)

    async def finish_from_checkpoint(self, conversation_id: str, reply: StoredReply, ending: Ending) -> bool:
        """Finish a reply of another server with what was checkpointed, unless it has been renewed since we looked.

        :return: whether this did it
        """
        message = Message(reply.id, "assistant", reply.content, reply.created_at, *ending)
        if await self._store.finish(conversation_id, message, if_renewed_at=reply.renewed_at) is not message:
            return False
        # By its last checkpoint: its server was lost, or it was stopped from here.
        logger.info("reply stored as %s", ending.status, extra={"conversation": conversation_id, "reply": reply.id})
        return True

    async def _idle_within(self, seconds: float) -> bool:
        """Wait until no reply runs; return whether that came within so many seconds."""
        try:
            async with asyncio.timeout(seconds):
                while self._running or self._pending:
                    await self._ended.wait()
        except TimeoutError:
            return False
        return True

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run something in the background, as this object's own."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task crashed", exc_info=error)


def _too_long(max_chars: int) -> Ending:
    message = f'The reply reached its maximum length of {max_chars} characters (MAX_REPLY_CHARS). Write "continue".'
    return Ending("failed", ReplyError("source_too_long", message))


def _append(live: LiveConversation, reply: LiveReply, text: str, room: int | None = None) -> bool:
    """Add text to a reply; return False if it was cut because only `room` bytes were left."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        text = _whole(text)
        size = len(text.encode())
    if room is not None and reply.size + size > room:
        if text := text.encode()[: room - reply.size].decode(errors="ignore"):
            live.append(text, len(text.encode()))
        return False
    if text:
        live.append(text, size)
    return True


def _whole(text: str) -> str:
    """Return text without halves of surrogate pairs, which a source may say, but neither UTF-8 nor BSON can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _ids(turn: Turn) -> dict[str, str]:
    return {"conversation": turn.conversation_id, "reply": turn.reply_id}
