"""The list of conversations, and the titles in it."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from bson import ObjectId
from bson.datetime_ms import DatetimeMS

from chatserver.errors import DatabaseRefused
from chatserver.records import Key, Place, Summary
from chatserver.store import documents, expressions
from chatserver.store.collection import Condition, one, owned
from chatserver.store.database import Database
from chatserver.store.documents import Document

_BY_ACTIVITY = [("updatedAt", -1), ("_id", -1)]
_OTHER_TYPES = [
    *("minKey", "double", "string", "object", "binData", "undefined", "objectId", "bool", "regex", "dbPointer"),
    *("javascript", "symbol", "javascriptWithScope", "int", "timestamp", "long", "decimal", "maxKey"),
]
"""All BSON types but date, null and array, which MongoDB would not search by the index: an array is indexed, and
matched, by its elements."""


class Listing(Database):
    """Lists the conversations of an owner."""

    async def summaries(self, owner: str | None, limit: int, after: Place | None) -> Sequence[Summary]:
        """Return up to `limit` conversations of an owner that follow a place in the list (None: from its beginning)."""
        summary = expressions.summary(expressions.MESSAGES)
        try:
            found = await self._list(owner, limit, after, summary)
        except DatabaseRefused:
            # One has text that is not UTF-8, which `$substrCP` rejects. Only that conversation has no title.
            found = await self._list(owner, limit, after, {**summary, "beginning": expressions.literal("")})
            for each in found:
                with suppress(DatabaseRefused):
                    each.update(await self._find_summary(Key(owner, str(each["_id"])), summary) or {})
        await self._begin_along_path(owner, found)
        return [documents.summary(each) for each in found]

    async def summary(self, conversation: Key) -> Summary | None:
        """Return a conversation as in the list; None if it is unknown."""
        summary = expressions.summary(expressions.MESSAGES)
        try:
            found = await self._find_summary(conversation, summary)
        except DatabaseRefused:
            # As in `summaries`.
            found = await self._find_summary(conversation, {**summary, "beginning": expressions.literal("")})
        if found is None:
            return None
        await self._begin_along_path(conversation.owner, [found])
        return documents.summary(found)

    async def _find_summary(self, conversation: Key, projection: Document) -> dict[str, Any] | None:
        async with self.guard.call("list"):
            return await self.conversations.find_one(one(conversation), projection)

    async def _begin_along_path(self, owner: str | None, found: Sequence[dict[str, Any]]) -> None:
        """Correct the `beginning` of the conversations with branches: that of the active path."""
        branching = [each for each in found if each["tree"] is not None]
        if not branching:
            return
        paths = []
        for each, tree in zip(branching, await self._trees(branching), strict=True):
            path = [index for index in tree.path(tree.head)[:10] if index < each["count"]]
            paths.append({"_id": each["_id"], "path": path})
        own = {"$first": {"$filter": {"input": {"$literal": paths}, "cond": {"$eq": ["$$this._id", "$_id"]}}}}
        messages = expressions.along(expressions.let({"own": own}, result="$$own.path"))
        projection = {"beginning": expressions.summary(messages)["beginning"]}
        condition = owned(owner, {"_id": {"$in": [each["_id"] for each in paths]}})
        # After text that is not UTF-8, the beginnings of the array remain.
        with suppress(DatabaseRefused):
            async with self.guard.call("list"):
                beginnings = await self.conversations.find(condition, projection).to_list(None)
            by_id = {each["_id"]: each for each in beginnings}
            for each in found:
                each.update(by_id.get(each["_id"], {}))

    async def _list(
        self, owner: str | None, limit: int, after: Place | None, projection: Document
    ) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        # All queries in one call: while the process shuts down, no second call may begin.
        async with self.guard.call("list"):
            for condition in _dated_after(after):
                if len(found) < limit:
                    found += await self._find(owned(owner, condition), projection, _BY_ACTIVITY, limit - len(found))
            if len(found) < limit:
                undated, odd = [
                    await self._find(owned(owner, condition), projection, order, limit - len(found))
                    for condition, order in _undated_after(after)
                ]
                by_id = {each["_id"]: each for each in [*undated, *odd]}
                found += sorted(by_id.values(), key=lambda each: each["_id"], reverse=True)[: limit - len(found)]
        return found

    async def _find(
        self, condition: Condition, projection: Document, order: Sequence[tuple[str, int]], limit: int
    ) -> list[dict[str, Any]]:
        cursor = self.conversations.find(condition, projection)
        return list(await cursor.sort(order).limit(limit).to_list(limit))

    async def keys(self, owner: str | None, limit: int, after: Key | None = None) -> Sequence[Key]:
        """Return up to `limit` conversations of an owner, in the order of their ids, which never changes.

        :param after: only those that follow this one
        """
        condition = owned(owner, {} if after is None else {"_id": {"$gt": ObjectId(after.id)}})
        async with self.guard.call("keys"):
            found = await self._find(condition, {"_id": 1}, [("_id", 1)], limit)
        return [Key(owner, str(each["_id"])) for each in found]


# Each condition is one range of the index of the list: with `$or` or `$not`, MongoDB would also look at conversations
# that are not in the page.


def _dated_after(place: Place | None) -> Sequence[Document]:
    """Return conditions, in order, for the conversations with a date in `updatedAt` that follow a place in the list."""
    if place is None:
        return [{"updatedAt": {"$type": "date"}}]
    if place.updated_ms is None:
        return []
    time = DatetimeMS(place.updated_ms)
    return [{"updatedAt": time, "_id": {"$lt": ObjectId(place.id)}}, {"updatedAt": {"$lt": time}}]


def _undated_after(place: Place | None) -> Sequence[tuple[Document, Sequence[tuple[str, int]]]]:
    """Return two conditions, each with its order, for the conversations without a date that follow a place in the list.

    The first is for those with nothing in `updatedAt`, the second for those with a value of another type.
    """
    no_date: Document = {"$not": {"$type": "date"}}
    following: Document = {"_id": {"$lt": ObjectId(place.id)}} if place is not None and place.updated_ms is None else {}
    return [
        # In the order of the index, which is the order of the ids here, no other index is considered.
        ({"updatedAt": {"$eq": None, **no_date}, **following}, _BY_ACTIVITY),
        ({"updatedAt": {"$type": _OTHER_TYPES, **no_date}, **following}, [("_id", -1)]),
    ]
