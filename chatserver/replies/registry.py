"""The registry: starts the replies of this process, acts on their outcomes, and drains them."""

import asyncio
import logging
from contextlib import ExitStack, suppress
from enum import Enum, auto
from time import monotonic

from chatserver import tasks
from chatserver.errors import (
    DatabaseUnavailable,
    Draining,
    NoSuchConversation,
    OutcomeUnknown,
    QuotaExceeded,
    ReplyInProgress,
    TooManyReplies,
)
from chatserver.hub import Hub, LiveConversation
from chatserver.limits import REPLIES, Quota
from chatserver.metrics import Metrics
from chatserver.records import StartedTurn, Turn
from chatserver.replies import endings, publishing
from chatserver.replies.alignment import Alignment
from chatserver.replies.leases import Leases
from chatserver.replies.own import OwnReplies
from chatserver.replies.starting import NewTurn, Retry, Starter
from chatserver.replies.writer import Outcome, Timings, Writer
from chatserver.settings import Settings
from chatserver.sources import Source
from chatserver.store import Store
from chatserver.tasks import Tasks

logger = logging.getLogger(__name__)

_STOP_PATIENCE_S = 1.0
_LOOK_S = 0.05
"""Interval at which the end of another server's reply is looked for, once that was asked to stop it."""
_QUOTA_RETRY_S = 2
"""When to try again after the limit of an owner's running replies was reached: it is unknown when one of them ends."""


class Phase(Enum):
    """Whether the process takes turns."""

    OPEN = auto()
    DRAINING = auto()
    """New turns are refused; running replies may end by themselves."""
    INTERRUPTING = auto()
    """The time to drain is over: running replies are interrupted, as are replies that start later."""


class Replies:
    """The replies of this process, over one store, one hub and one source."""

    def __init__(
        self, settings: Settings, store: Store, hub: Hub, source: Source, metrics: Metrics, background: Tasks
    ) -> None:
        self.phase = Phase.OPEN
        self._settings = settings
        self._store = store
        self._hub = hub
        self._source = source
        self._tasks = background
        self._timings = Timings(metrics)
        self._own = OwnReplies()
        self.leases = Leases(settings, store, self._own)
        self.alignment = Alignment(settings, store, hub, self._own, self.leases, background)
        self._starter = Starter(store, self.alignment)
        metrics.watch("chatserver_running_replies", "Replies being written.", lambda: self.running)

    @property
    def running(self) -> int:
        """The number of replies that this process writes."""
        return len(self._own.writers)

    @property
    def is_draining(self) -> bool:
        """Whether new turns are refused."""
        return self.phase is not Phase.OPEN

    @property
    def starting(self) -> int:
        """The number of replies whose start is being stored, or has an unknown outcome."""
        return self._own.starting

    def quota(self, owner: str | None) -> Quota | None:
        """Return how many more replies of an owner may run in this process; None if there is no limit."""
        limit = self._settings.max_replies_per_owner
        if owner is None or not limit:
            return None
        return Quota(REPLIES, limit, max(0, limit - self._own.of_owner(owner)))

    def writer(self, reply_id: str) -> Writer | None:
        """Return the writer of a reply; None if this process does not write it."""
        return self._own.writers.get(reply_id)

    # -- the process ---------------------------------------------------------------------------------------------

    async def start(self, *, sole_server: bool) -> None:
        """End expired replies; then checkpoint and sweep in the background.

        :param sole_server: whether no other server can be running, so that every lease counts as expired
        """
        await self.leases.finish_expired(sole_server=sole_server)
        for job in (self.leases.checkpoint, self.leases.sweep):
            self._tasks.spawn(tasks.repeat(job, expected=(DatabaseUnavailable,)))

    def refuse_turns(self) -> None:
        """Refuse new turns from now on."""
        self.phase = Phase.DRAINING

    async def drain(self) -> None:
        """Refuse new turns, let replies end for `DRAIN_S`, then interrupt the others and store their text."""
        self.refuse_turns()
        if not await self._own.idle_within(self._settings.drain_s):
            self.phase = Phase.INTERRUPTING
            for writer in list(self._own.writers.values()):
                writer.end(endings.INTERRUPTED)
            if not await self._own.idle_within(self._settings.database_timeout_s + 1):
                logger.error("%d replies could not be stored; their last checkpoints remain", self.running)

    # -- one reply -----------------------------------------------------------------------------------------------

    async def start_turn(self, turn: NewTurn | Retry) -> Turn:
        """Store the start of a turn and write its reply; an unknown outcome is settled in the background.

        :raises Draining, TooManyReplies, QuotaExceeded: and nothing is stored
        :raises ChatError: as `Starter.store`
        """
        if self.is_draining:
            raise Draining
        owner = turn.conversation.owner
        with self._hub.hold(turn.conversation) as live, ExitStack() as starting:
            if (refusal := self._limit_reached(owner)) is not None:
                raise ReplyInProgress if live.reply is not None else refusal
            starting.enter_context(self._own.start(turn.reply_id, owner))
            try:
                started = await self._starter.store(live, turn)
            except OutcomeUnknown:
                self._tasks.spawn(self._settle(turn, starting.pop_all()))
                raise
            self._write(live, started)
            return started.turn

    def _limit_reached(self, owner: str | None) -> TooManyReplies | QuotaExceeded | None:
        if len(self._own) >= self._settings.max_replies:
            return TooManyReplies()
        if (quota := self.quota(owner)) is not None and not quota.remaining:
            detail = "You have reached your limit of running replies. Stop one, or wait until one ends."
            return QuotaExceeded(quota.policy, detail, _QUOTA_RETRY_S)
        return None

    async def stop(self, live: LiveConversation) -> str | None:
        """Stop a conversation's running reply, on whichever server it runs, keeping its text.

        :param live: the conversation, which the caller must hold
        :return: the reply's id; None if no reply runs, or it is ending by itself
        :raises NoSuchConversation: if the conversation does not exist
        """
        while True:
            if (writer := self._writer_in(live)) is not None:
                return writer.reply.message_id if await writer.stop(_STOP_PATIENCE_S) else None
            record = await self.alignment.read(live)
            if record is None:
                raise NoSuchConversation
            if self._writer_in(live) is not None:
                continue
            if record.reply is None:
                return None
            if await self._store.request_stop(live.key, record.reply.id):
                await self._wait_for_end(live, record.reply.id)
                return record.reply.id

    async def _wait_for_end(self, live: LiveConversation, reply_id: str) -> None:
        """Wait until another server has ended a reply, but no longer than `_STOP_PATIENCE_S`."""
        deadline = monotonic() + _STOP_PATIENCE_S
        with suppress(DatabaseUnavailable):
            while monotonic() < deadline:
                await asyncio.sleep(_LOOK_S)
                record = await self.alignment.read(live)
                if record is None or record.reply is None or record.reply.id != reply_id:
                    return

    def abandon(self, reply_id: str) -> None:
        """End a reply that was deleted, if this process writes it."""
        if (writer := self.writer(reply_id)) is not None:
            writer.end(endings.STOPPED)

    def _writer_in(self, live: LiveConversation) -> Writer | None:
        return self.writer(live.reply.message_id) if live.reply is not None else None

    async def _settle(self, turn: NewTurn | Retry, starting: ExitStack) -> None:
        """Write the reply of a turn whose start had an unknown outcome, if it was stored.

        :param starting: lists the reply as starting until it is closed
        """
        with starting:
            started = await self._starter.settle(turn)
            if started is not None:
                with self._hub.hold(turn.conversation) as live:
                    self._write(live, started)

    def _write(self, live: LiveConversation, started: StartedTurn) -> None:
        """Publish the start of a turn, and write its reply in the background."""
        writer = Writer(
            live,
            publishing.publish_start(live, started),
            started,
            source=self._source,
            store=self._store,
            hub=self._hub,
            timings=self._timings,
            max_chars=self._settings.max_reply_chars,
        )
        self._own.add(writer)
        writer.task = self._tasks.spawn(self._run(writer))
        logger.info("reply started", extra=writer.log_fields)
        if self.phase is Phase.INTERRUPTING:
            writer.end(endings.INTERRUPTED)

    async def _run(self, writer: Writer) -> None:
        """Write one reply, and bring its subscribers into line with the database."""
        try:
            outcome = await writer.run()
        finally:
            self._own.remove(writer)
        if outcome is Outcome.ENDED_ELSEWHERE:
            await self.alignment.realign(writer.live)
        elif outcome is Outcome.FAILED and writer.live.reply is writer.reply:
            # Its subscribers receive the end that the database has, at the latest once the lease has expired.
            self.alignment.follow(writer.live, writer.reply)
