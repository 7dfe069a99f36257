"""The writer: one reply, from its source to its stored end."""

import asyncio
import logging
import random
from contextlib import aclosing
from enum import Enum, auto
from time import monotonic

from chatserver import sources
from chatserver.errors import DatabaseUnavailable, SourceError
from chatserver.hub import Hub, LiveConversation, LiveReply
from chatserver.metrics import Metrics
from chatserver.records import Message, ReplyError, StartedTurn
from chatserver.replies import endings, publishing
from chatserver.replies.endings import Ending
from chatserver.store import Store

logger = logging.getLogger(__name__)

STORE_ATTEMPTS = 5
"""Unexpected failures to save a reply's checkpoint, or its end, after which it is abandoned."""


class Stage(Enum):
    """How far a writer is; only the writer itself moves it."""

    NEW = auto()
    """Its task has not run yet."""
    GENERATING = auto()
    """The source sends text, which is published."""
    STOPPING = auto()
    """An early end was requested. The text is kept."""
    STORING = auto()
    """The text is complete; its end is being stored, however long that takes."""
    ENDED = auto()
    """It does nothing more; see its `Outcome`."""


class Outcome(Enum):
    """How writing a reply ended."""

    STORED = auto()
    """This writer stored and published the end."""
    ENDED_ELSEWHERE = auto()
    """Another server had ended or deleted the reply. The database's version is published."""
    FAILED = auto()
    """The end could not be stored or published. The lease will expire, and the last checkpoint will remain."""


class Timings:
    """Histograms of the time that replies take."""

    def __init__(self, metrics: Metrics) -> None:
        self.first_token = metrics.histogram(
            "chatserver_time_to_first_token_seconds",
            "Time from a stored user message to the first text of its reply.",
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )
        self.duration = metrics.histogram(
            "chatserver_reply_duration_seconds",
            "Time from a stored user message to the stored end of its reply.",
            buckets=(0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
            labels=["status"],
        )


class Writer:
    """Writes one reply. Set `task` to the task that awaits `run` before it first runs.

    :param live: the conversation, in which `reply` is open
    :param max_chars: the maximum length of a reply
    """

    task: "asyncio.Task[None]"

    def __init__(
        self,
        live: LiveConversation,
        reply: LiveReply,
        started: StartedTurn,
        *,
        source: sources.Source,
        store: Store,
        hub: Hub,
        timings: Timings,
        max_chars: int,
    ) -> None:
        self.live = live
        self.reply = reply
        self.stage = Stage.NEW
        self.failed_checkpoints = 0
        """The number of its checkpoints that failed unexpectedly."""
        self.log_fields = {"conversation": started.turn.conversation.id, "reply": started.turn.reply_id}
        self._started = started
        self._source = source
        self._store = store
        self._hub = hub
        self._timings = timings
        self._max_chars = max_chars
        self._started_at = monotonic()
        self._early_ending: Ending | None = None

    async def run(self) -> Outcome:
        """Generate, store and publish the reply; return how that ended. Raises nothing but `CancelledError`."""
        try:
            return await self._run()
        except Exception:
            logger.exception("a reply could not be stored or published", extra=self.log_fields)
            return Outcome.FAILED
        finally:
            self.stage = Stage.ENDED

    def end(self, ending: Ending) -> bool:
        """End the reply early, keeping its text; return whether this call did it, False if it is ending already."""
        if self.stage not in (Stage.NEW, Stage.GENERATING):
            return False
        self._early_ending = ending
        # Cancelling a task before its first step would skip all of `run`. It checks the stage when it starts instead.
        if self.stage is Stage.GENERATING:
            self.task.cancel()
        self.stage = Stage.STOPPING
        return True

    async def stop(self, patience_s: float) -> bool:
        """End the reply as stopped, and wait for its end to be stored, but no longer than `patience_s`.

        :return: whether the reply was stopped, by this call or an earlier one; False if it ends in another way
        """
        self.end(endings.STOPPED)
        if self._early_ending != endings.STOPPED:
            return False
        await asyncio.wait({self.task}, timeout=patience_s)
        return True

    async def _run(self) -> Outcome:
        live, reply = self.live, self.reply
        ending = await self._generate()
        self.stage = Stage.STORING
        origin = (self._started.parent, self._started.key)
        message = Message(reply.message_id, "assistant", reply.content, reply.created_at, *ending, *origin)
        stored = await self._finish(message)
        if live.reply is reply:
            publishing.publish_end(self._hub, live, reply, stored)
        ended = stored.status if stored else "deleted"
        self._timings.duration.labels(ended).observe(monotonic() - self._started_at)
        code = stored.error.code if stored and stored.error else None
        logger.info("reply %s", ended, extra={**self.log_fields, "code": code})
        return Outcome.STORED if stored is message else Outcome.ENDED_ELSEWHERE

    async def _generate(self) -> Ending:
        """Publish the source's text; return how it ended."""
        started, live, reply = self._started, self.live, self.reply
        # Other applications may have stored messages of other roles, which no source expects.
        messages = [sources.Message(each.role, each.content) for each in started.messages if each.role in sources.ROLES]
        prompt = sources.Prompt(messages, started.number)
        if self._early_ending is not None:
            return self._early_ending
        self.stage = Stage.GENERATING
        has_text = has_words = False
        publish, max_chars = publishing.publish_text, self._max_chars
        try:
            async with aclosing(self._source.reply(prompt)) as chunks:
                async for chunk in chunks:
                    if live.reply is not reply:
                        return endings.INTERRUPTED
                    room_chars = max_chars - reply.chars
                    if not publish(live, reply, chunk[:room_chars], started.reply_room):
                        return endings.FULL
                    has_words = has_words or bool(chunk.strip())
                    if not has_text:
                        has_text = True
                        self._timings.first_token.observe(monotonic() - self._started_at)
                    if len(chunk) > room_chars:
                        return endings.too_long(max_chars)
        except SourceError as failure:
            return Ending("failed", ReplyError(failure.code, publishing.replace_surrogates(failure.message)))
        except (Exception, asyncio.CancelledError) as failure:
            if isinstance(failure, asyncio.CancelledError) and self.task.cancelling():
                if self._early_ending is None:
                    raise
                return self._early_ending
            # The reply must end after any exception of a source, or the conversation would stay busy for ever.
            logger.exception("the source of replies crashed", extra=self.log_fields)
            return endings.CRASHED
        return endings.COMPLETE if has_words else endings.EMPTY

    async def _finish(self, message: Message) -> Message | None:
        """Store the reply's end, however long it takes; return the message as the database has it.

        :raises RuntimeError: if MongoDB rejects it
        """
        delay = 0.1
        failures = 0
        while True:
            try:
                return await self._store.finish(self.live.key, message)
            except DatabaseUnavailable:
                pass
            except Exception as error:
                failures += 1
                if isinstance(error, RuntimeError) or failures == STORE_ATTEMPTS:
                    raise
                # The text since the last checkpoint exists only here.
                logger.exception("a reply could not be stored; retrying")
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(2 * delay, 2.0)
