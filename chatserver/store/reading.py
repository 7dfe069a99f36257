"""Reading conversations, and deleting them."""

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from bson import ObjectId
from bson.datetime_ms import DatetimeMS

from chatserver.errors import DatabaseRefused
from chatserver.records import Key, Place, Record, Span, Summary
from chatserver.store import documents, expressions, indexes, pages
from chatserver.store.batcher import Batcher
from chatserver.store.collection import Condition, one, owned, several
from chatserver.store.database import Database
from chatserver.store.documents import Document
from chatserver.store.pages import Divided


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
        # Both queries in one call: while the process shuts down, no second call may begin.
        async with self.guard.call("list"):
            if after is None or after.updated_ms is not None:
                found = await self._find(owned(owner, _dated_after(after)), projection, indexes.LIST, limit)
                after = None
            if len(found) < limit:
                undated: dict[str, Any] = {"updatedAt": {"$not": {"$type": "date"}}}
                if after is not None:
                    undated["_id"] = {"$lt": ObjectId(after.id)}
                found += await self._find(owned(owner, undated), projection, [("_id", -1)], limit - len(found))
        return found

    async def _find(
        self, condition: Condition, projection: Document, order: Sequence[tuple[str, int]], limit: int
    ) -> list[dict[str, Any]]:
        cursor = self.conversations.find(condition, projection)
        return list(await cursor.sort(order).limit(limit).to_list(limit))

    async def delete(self, conversation: Key) -> bool:
        """Delete a conversation; return whether there was one."""
        async with self.guard.call("delete"):
            return await self.conversations.delete_one(one(conversation))


def _dated_after(place: Place | None) -> Document:
    """Return the condition for the conversations with a date in `updatedAt` that follow a place in the list."""
    if place is None or place.updated_ms is None:
        return {"updatedAt": {"$type": "date"}}
    time = DatetimeMS(place.updated_ms)
    return {
        "updatedAt": {"$lte": time},
        "$or": [{"updatedAt": {"$lt": time}}, {"_id": {"$lt": ObjectId(place.id)}}],
    }
