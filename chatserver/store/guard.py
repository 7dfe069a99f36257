"""The guard around each call to MongoDB: it bounds calls in time and number, and translates the driver's errors."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic

import pymongo
from pymongo.errors import (
    BulkWriteError,
    ConnectionFailure,
    ExecutionTimeout,
    OperationFailure,
    ServerSelectionTimeoutError,
    WriteConcernError,
)

from chatserver.errors import ChatError, ConversationFull, DatabaseRefused, DatabaseUnavailable, OutcomeUnknown

logger = logging.getLogger(__name__)

BUSY = {24, 112, 262, 365, 388, 462}
"""LockTimeout, WriteConflict, ExceededTimeLimit, TemporarilyUnavailable, TransactionTooLargeForCache,
IngressRequestRateLimitExceeded: MongoDB rejects an operation for now."""
_UNREACHABLE = {6, 7, 89, 133, 134, 9001}
"""HostUnreachable, HostNotFound, NetworkTimeout, FailedToSatisfyReadPreference, ReadConcernMajorityNotAvailableYet,
SocketException: the answer of a `mongos` that cannot reach a shard."""
_TOO_LARGE = {10334, 17419}
"""BSONObjectTooLarge, and that of an update: the document would be larger than 16 MB."""
_PROBE_S = 0.5
"""While the database is away, one call per this interval probes it; the others fail at once."""
_CONCURRENT_CALLS = 10
"""Motor has five threads per core. Calls queue here, where they can time out, and not in its pool."""

Observer = Callable[[str, float, bool], None]
"""Called after each call with its operation, its duration in seconds, and whether the database answered."""


class Guard:
    """Bounds the calls to one database.

    :param timeout_s: the longest that a call may take, its time in the queue included, in seconds
    """

    def __init__(self, timeout_s: float, observe: Observer) -> None:
        self.timeout_s = timeout_s
        self.away_until = 0.0
        """Before this time (`time.monotonic`) the database is known to be away, and calls fail at once."""
        self.slots = asyncio.Semaphore(_CONCURRENT_CALLS)
        self.observe = observe

    @asynccontextmanager
    async def call(self, operation: str, *, write: bool = False) -> AsyncIterator[None]:
        """Make one call inside the block.

        :param write: whether the caller must know whether an unanswered call was carried out
        :raises DatabaseUnavailable: if MongoDB does not answer in time, or rejects the call for now
        :raises OutcomeUnknown: instead, if `write` and the call may have been carried out
        :raises ConversationFull: if the document has no room for what an update would add
        :raises DatabaseRefused: if MongoDB answers with another error
        """
        started = monotonic()
        answered = False
        try:
            try:
                async with asyncio.timeout(self.timeout_s / 2):
                    await self.slots.acquire()
            except TimeoutError:
                raise DatabaseUnavailable from None
            try:
                left_s = started + self.timeout_s - monotonic()
                if left_s <= 0 or monotonic() < self.away_until:
                    raise DatabaseUnavailable
                with pymongo.timeout(left_s):
                    yield
                answered = True
            except DatabaseUnavailable:
                raise
            except ChatError:
                answered = True
                raise
            finally:
                self.slots.release()
        except (ConnectionFailure, WriteConcernError, BulkWriteError) as error:
            if monotonic() >= self.away_until:
                logger.warning("the database does not answer (%s): %s", operation, type(error).__name__)
            self.away_until = monotonic() + _PROBE_S
            never_sent = isinstance(error, ServerSelectionTimeoutError)
            raise OutcomeUnknown if write and not never_sent else DatabaseUnavailable from error
        except OperationFailure as error:
            # Without the error's message: it may quote a document.
            code, name = error.code or 0, (error.details or {}).get("codeName", type(error).__name__)
            if code in _TOO_LARGE:
                answered = True
                raise ConversationFull("This conversation's document has no room for the change.") from error
            logger.warning("the database rejected a call (%s): code %s %s", operation, code, name)
            if code in BUSY or isinstance(error, ExecutionTimeout):
                busy = "The database is busy. Try again in a moment."
                raise (OutcomeUnknown if write else DatabaseUnavailable)(busy) from error
            if code in _UNREACHABLE:
                raise OutcomeUnknown if write else DatabaseUnavailable from error
            answered = True
            raise DatabaseRefused from error
        finally:
            self.observe(operation, monotonic() - started, answered)

    async def close(self) -> None:
        """Wait for the calls that are in progress, and let no other one begin."""
        for _ in range(_CONCURRENT_CALLS):
            await self.slots.acquire()
