"""Reading conversations, and deleting them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from bson import ObjectId

from chatserver.records import All, Along, Key, Record, Span
from chatserver.store import documents, expressions, pages
from chatserver.store.batcher import Batcher
from chatserver.store.collection import one, owned, several
from chatserver.store.database import Database
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
        async with self.guard.call("read"):
            needs_tree = isinstance(span, All) and span.with_tree
            has_branches: Any = True if needs_tree else expressions.HAS_BRANCHES
            document = await self._read(conversation, span, divided, has_branches)
            if document and document.get("head") is None and not needs_tree and document["page"]["branching"]:
                # Branches of version 1, or of another application.
                document = await self._read(conversation, span, divided, has_branches=True)
            if document is None:
                return None
            page = document["page"]
            if page.get("tree") is None:
                return pages.record_with_page(document, span)
            tree = await self._tree({**document, "tree": page["tree"]})
            if not pages.is_along_path(span):
                return replace(pages.record_with_page(document, span), tree=tree)
            older, path = pages.along_path(span, tree, document["count"])
            page = pages.chosen(page, path)
            if page is None:
                assert path is not None
                rest = await self._read(conversation, Along(path), divided, has_branches=False)
                if rest is None or rest.get("createdAt") != document.get("createdAt"):
                    return None
                page = rest["page"]
        found = pages.record_with_page({**document, "page": page}, Along(path or []))
        return replace(found, older=older, tree=tree)

    async def _read(
        self, conversation: Key, span: Span, divided: Divided, has_branches: Any
    ) -> Mapping[str, Any] | None:
        """Return the document with the page of a span, which has the tree if that is needed.

        If it has branches, and the span follows the path, the page is as `pages.page_along_path` makes it.
        """
        page = pages.page(ObjectId(conversation.id), span, divided, has_branches)
        if pages.is_along_path(span):
            page = {"$cond": [has_branches, pages.page_along_path(), page]}
        return await self.conversations.find_one(one(conversation), {**self._overview, "page": page})

    async def peek(self, conversation: Key) -> Record | None:
        """Return a conversation (None if unknown) without its messages: its last message's id and its running reply.

        Concurrent calls share one query.
        """
        return await self.peeks.submit(conversation)

    async def _peek_all(self, conversations: Sequence[Key]) -> Sequence[Record | None]:
        async with self.guard.call("peek"):
            found = await self.conversations.find(several(conversations), self._overview).to_list(None)
        records = {documents.key(each): documents.record(each, ()) for each in found}
        return [records.get(each) for each in conversations]

    async def delete(self, conversation: Key) -> bool:
        """Delete a conversation; return whether there was one."""
        async with self.guard.call("delete"):
            return await self.conversations.delete_one(one(conversation))

    async def delete_all(self, owner: str, conversations: Iterable[Key]) -> None:
        """Delete conversations of one owner; those that do not exist are ignored."""
        ids = [ObjectId(each.id) for each in conversations]
        async with self.guard.call("delete_all"):
            await self.conversations.delete_many(owned(owner, {"_id": {"$in": ids}}))
