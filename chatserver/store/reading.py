"""Reading conversations, and deleting them."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from bson import ObjectId
from bson.datetime_ms import DatetimeMS

from chatserver.errors import DatabaseRefused
from chatserver.records import Key, Place, Record, Span, Summary
from chatserver.store import documents, expressions, pages
from chatserver.store.batcher import Batcher
from chatserver.store.collection import Condition, one, owned, several
from chatserver.store.database import Database
from chatserver.store.documents import Document
from chatserver.store.pages import Divided

_BY_ACTIVITY = [("updatedAt", -1), ("_id", -1)]
_OTHER_TYPES = [
    *("minKey", "double", "string", "object", "binData", "undefined", "objectId", "bool", "regex", "dbPointer"),
    *("javascript", "symbol", "javascriptWithScope", "int", "timestamp", "long", "decimal", "maxKey"),
]
"""All BSON types but date, null and array, which MongoDB would not search by the index: an array is indexed, and
matched, by its elements."""


class Reading(Database):
    """Reads conversations, and deletes them."""

    @cached_property
    def peeks(self) -> Batcher[Key, Record | None]:
        """The batched calls of `peek`."""
        return Batcher(self._peek_all)

    async def read(self, conversation: Key, span: Span, *, divided: Divided = "all") -> Record | None:
        """Return a conversation (None if unknown) and the first page of some of its messages; see `Record`.

        Messages are only ever appended, so the pages after it (`Record.following`) can be read later, unless the
        conversation has been deleted. A new conversation with the same id has another `created_at`.

        :param span: which messages
        :param divided: which of them are read in parts if they are long
        """
        projection = {**self._overview, "page": pages.page(ObjectId(conversation.id), span, divided)}
        async with self.guard.call("read"):
            document = await self.conversations.find_one(one(conversation), projection)
        return pages.record_with_page(document, span) if document else None

    async def peek(self, conversation: Key) -> Record | None:
        """Return a conversation (None if unknown) without its messages: its last message's id and its running reply.

        Concurrent calls share one query.
        """
        return await self.peeks.submit(conversation)

    async def _peek_all(self, conversations: Sequence[Key]) -> Sequence[Record | None]:
        async with self.guard.call("peek"):
            found = await self.conversations.find(several(conversations), self._overview).to_list(None)
        records = {documents.key(each): documents.record(each, older=each["count"]) for each in found}
        return [records.get(each) for each in conversations]

    async def summaries(self, owner: str | None, limit: int, after: Place | None) -> Sequence[Summary]:
        """Return up to `limit` conversations of an owner that follow a place in the list (None: from its beginning)."""
        try:
            found = await self._list(owner, limit, after, expressions.SUMMARY)
        except DatabaseRefused:
            # One has text that is not UTF-8, which `$substrCP` rejects. Only that conversation has no title.
            found = await self._list(owner, limit, after, {**expressions.SUMMARY, "beginning": expressions.literal("")})
            for each in found:
                with suppress(DatabaseRefused):
                    async with self.guard.call("list"):
                        titled = await self.conversations.find_one(
                            one(Key(owner, str(each["_id"]))), expressions.SUMMARY
                        )
                    each.update(titled or {})
        return [documents.summary(each) for each in found]

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

    async def delete(self, conversation: Key) -> bool:
        """Delete a conversation; return whether there was one."""
        async with self.guard.call("delete"):
            return await self.conversations.delete_one(one(conversation))

    async def delete_all(self, owner: str, conversations: Iterable[Key]) -> None:
        """Delete conversations of one owner; those that do not exist are ignored."""
        ids = [ObjectId(each.id) for each in conversations]
        async with self.guard.call("delete_all"):
            await self.conversations.delete_many(owned(owner, {"_id": {"$in": ids}}))


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
