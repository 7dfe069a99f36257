"""One database: its client, the guard around its calls, and the settings that the queries need."""

import asyncio
import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

from pymongo.errors import ConfigurationError, OperationFailure

from chatserver.branches import Tree
from chatserver.errors import DatabaseRefused, SetupError
from chatserver.records import Key
from chatserver.store import documents, expressions, indexes
from chatserver.store.collection import Conversations, one
from chatserver.store.connection import DEFAULT_DATABASE
from chatserver.store.documents import Document, new_id
from chatserver.store.guard import Guard, Observer

_LARGE_TREE = 2000
"""Messages. Making a tree of that many takes a few milliseconds."""


class Database:
    """The part that all operations share.

    :param client: a Motor client, or PyMongo's AsyncMongoClient
    :param uri: the same database's, for the connection that builds the indexes
    :param timeout_s: the longest that a call may take, in seconds
    :param lease_ms: a reply is presumed dead this long after its last renewal
    :param history: how many of the newest messages a turn reads
    :param history_chars: how many code points of them a source uses: older messages may be left out
    :param observe: called after each call
    """

    def __init__(
        self,
        client: Any,
        uri: str,
        *,
        timeout_s: float,
        lease_ms: int,
        history: int,
        history_chars: int = 48_000,
        observe: Observer = lambda _operation, _seconds, _answered: None,
    ) -> None:
        self.guard = Guard(timeout_s, observe)
        self.conversations = Conversations(client)
        self._client = client
        self._uri = uri
        self._is_expired = expressions.is_expired(lease_ms)
        self._overview = {**expressions.OVERVIEW, "expired": self._is_expired}
        """Projects the fields of a `Record`, except the messages."""
        self._turn_along = partial(expressions.turn, history, history_chars)
        self._turn_projection = self._turn_along()
        """Projects the fields that a new turn needs; `prompt.messages` ends with the user's message."""

    async def prepare(self) -> None:
        """Check that the database accepts our writes.

        :raises SetupError: if it rejects them
        """
        try:
            async with self.guard.call("prepare"):
                await self.conversations.update_one(one(Key(None, new_id())), {"$unset": {"reply": ""}})
        except ConfigurationError as error:
            raise SetupError(f"MONGODB_URI cannot be resolved: {error}") from None
        except DatabaseRefused as error:
            assert isinstance(error.__cause__, OperationFailure)
            reason = (error.__cause__.details or {}).get("errmsg", "unknown error")
            raise SetupError(f"MongoDB refused the connection (MONGODB_URI): {reason}") from None

    async def build_indexes(self) -> None:
        """Build the indexes, however long it takes; see `indexes.build`."""
        await indexes.build(self._uri, DEFAULT_DATABASE)

    async def _trees(self, found: Sequence[Document]) -> Sequence[Tree]:
        """Return the trees of conversations; see `documents.tree`.

        Large ones are made in a thread: a tree of 40,000 messages would hold the event loop for 80 ms.
        """
        if sum(len(each["tree"]) for each in found) < _LARGE_TREE:
            return _made(found)
        return await asyncio.to_thread(_made, found)

    async def _tree(self, document: Document) -> Tree:
        """Return the tree of a conversation; see `_trees`."""
        return (await self._trees([document]))[0]

    async def ping(self) -> None:
        """Check that the database answers.

        :raises DatabaseUnavailable: if it does not
        """
        async with self.guard.call("ping"):
            await self._client.admin.command("ping")

    async def close(self) -> None:
        """Close the client after the calls in progress, each of which is bounded in time."""
        await self.guard.close()
        closing = self._client.close()
        if inspect.isawaitable(closing):
            await closing


def _made(found: Sequence[Document]) -> Sequence[Tree]:
    return [documents.tree(each) for each in found]
