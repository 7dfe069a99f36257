"""The indexes of the collection `conversations`, built in the background.

On a large collection that another application has filled a build takes longer than an ordinary call may. It has a
client of its own, PyMongo's, because a build must be waited for without a limit and still be given up at once when the
process ends: a call of Motor blocks a thread, and the interpreter does not exit before all threads have returned.
MongoDB continues a build whose client has disconnected, and the next start finds it ready or waits for the rest.
"""

import asyncio
import logging
from collections.abc import Coroutine
from time import monotonic
from typing import Any

import pymongo
from pymongo.errors import ConnectionFailure, OperationFailure, PyMongoError

logger = logging.getLogger(__name__)

RUNNING_REPLIES = [("reply._id", 1)]
_WANTED: list[tuple[list[tuple[str, int]], dict[str, Any]]] = [
    (RUNNING_REPLIES, {"sparse": True}),
    ([("owner", 1), ("updatedAt", -1), ("_id", -1)], {}),  # the list
    ([("owner", 1), ("_id", 1)], {}),  # all conversations of an owner, in an order that activity does not change
]
_FORMER = ["createdAt_-1__id_-1", "updatedAt_-1__id_-1"]
"""The names of indexes that earlier versions made."""
_EXISTS_OTHERWISE = {85, 86}
"""IndexOptionsConflict, IndexKeySpecsConflict: another application made an index of these fields."""
_OPTIONS: dict[str, Any] = {"timeoutMS": None, "socketTimeoutMS": None, "appname": "chatserver indexes"}
"""Without the limits of time that the URI may set for ordinary calls."""
_CLOSE_S = 1.0
_CANCEL_AGAIN_S = 0.1
_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0


async def build(uri: str, database: str) -> None:
    """Build the indexes that are missing, then drop those of earlier versions; log failures and retry.

    Cancel it to give up waiting.

    :param database: the name of the database if the URI has none
    """
    wait_s = _FIRST_WAIT_S
    while True:
        try:
            client: pymongo.AsyncMongoClient[dict[str, Any]] = pymongo.AsyncMongoClient(uri, **_OPTIONS)
            try:
                await _cancellable(_build(client.get_default_database(database)["conversations"]))
            finally:
                await _close(client)
            return
        except PyMongoError as error:
            # Without its message, which may quote a document.
            why = f"code {error.code}" if isinstance(error, OperationFailure) else type(error).__name__
            # While MongoDB is away, the store warns of that.
            level = logging.INFO if isinstance(error, ConnectionFailure) else logging.WARNING
            logger.log(level, "the indexes could not be built (%s); next try in %g s", why, wait_s)
        except Exception:
            logger.exception("the indexes could not be built; next try in %g s", wait_s)
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


async def _cancellable(work: Coroutine[Any, Any, None]) -> None:
    """Run calls of PyMongo as a task that is cancelled until it ends.

    PyMongo waits with `asyncio.wait_for`, which before Python 3.12 loses a cancellation that comes as its result does.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    finally:
        while not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=_CANCEL_AGAIN_S)


async def _close(client: Any) -> None:
    """Close a client to the end, also if that is cancelled: it would leave tasks and sockets behind."""
    with pymongo.timeout(_CLOSE_S):  # it ends its sessions at the database, which may not answer
        closing = asyncio.ensure_future(client.close())
    try:
        await asyncio.shield(closing)
    finally:
        await closing


async def _build(conversations: Any) -> None:
    existing = set(await conversations.index_information())
    for keys, options in _WANTED:
        name = "_".join(f"{field}_{direction}" for field, direction in keys)
        started = monotonic()
        if name not in existing:
            logger.info("building the index %s", name)
        try:
            # Also if it is listed: it may still be being built, for another server, and is then waited for.
            await conversations.create_index(keys, name=name, **options)
        except OperationFailure as error:
            if error.code not in _EXISTS_OTHERWISE:
                raise
            logger.warning("the index %s exists with other options; it is kept", name)
        else:
            if name not in existing:
                logger.info("built the index %s in %.1f s", name, monotonic() - started)
    for name in _FORMER:
        if name in existing:
            await conversations.drop_index(name)
            logger.info("dropped the index %s, which is no longer used", name)
