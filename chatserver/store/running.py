"""A running reply in the database: its checkpoints, which renew its lease, and the second write of a turn, its end."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from bson import ObjectId
from pymongo.errors import OperationFailure

from chatserver.records import Key, Message, StoredReply
from chatserver.store import documents, indexes
from chatserver.store.batcher import Batcher
from chatserver.store.collection import Condition, every, one, several
from chatserver.store.database import Database
from chatserver.store.documents import Document

_NO_SUCH_INDEX = 2
"""BadValue: the hint names an index that does not exist, or is still being built."""


class RunningReplies(Database):
    """Checkpoints, ends and finds running replies. Every write holds only while the reply still runs."""

    @cached_property
    def _finishes(self) -> Batcher[tuple[Condition, Document], bool]:
        return Batcher(self._finish_all)

    async def checkpoint(self, replies: Mapping[str, tuple[Key, str]]) -> Collection[str]:
        """Save the text of running replies and renew their leases, in one bulk write.

        :param replies: reply id -> conversation, content
        :return: the ids of the replies that no longer run: another server ended them, or they were deleted
        """
        changes: list[tuple[Condition, Document]] = [
            (
                one(conversation, {"reply._id": ObjectId(reply_id)}),
                {"$set": {"reply.content": content}, "$currentDate": {"reply.renewedAt": True}},
            )
            for reply_id, (conversation, content) in replies.items()
        ]
        async with self.guard.call("checkpoint"):
            if await self.conversations.update_all(changes) == len(changes):
                return ()
            condition = several(conversation for conversation, _ in replies.values())
            found = await self.conversations.find(condition, {"owner": 1, "reply._id": 1}).to_list(None)
        running = [(documents.key(each), documents.reply(each, expired=False)) for each in found]
        running_ids = {(key, reply.id) for key, reply in running if reply is not None}
        return {reply_id for reply_id, (key, _) in replies.items() if (key, reply_id) not in running_ids}

    async def finish(self, conversation: Key, message: Message, *, if_renewed_at: object = None) -> Message | None:
        """Store a running reply as a message, and end it. Replies that end together share one bulk write.

        :param if_renewed_at: only if its lease was not renewed since
        :return: the message as the database has it, whichever server stored it; None if the database has none
        :raises RuntimeError: if MongoDB rejects the message
        """
        stored: dict[str, Any] = {
            "_id": ObjectId(message.id),
            "role": message.role,
            "content": message.content,
            "createdAt": message.created_at,
        }
        if message.status != "complete":
            stored["status"] = message.status
        if message.error is not None:
            stored["error"] = message.error._asdict()
        if message.parent is not None:
            stored["parent"] = message.parent.id and ObjectId(message.parent.id)
        if message.key is not None:
            stored["key"] = message.key
        running: dict[str, Any] = {"reply._id": stored["_id"]}
        if if_renewed_at is not None:
            running["reply.renewedAt"] = if_renewed_at
        change = {"$push": {"messages": stored}, "$unset": {"reply": ""}, "$max": {"updatedAt": documents.now()}}
        if await self._finishes.submit((one(conversation, running), change)):
            return message
        async with self.guard.call("finish"):
            document = await self.conversations.find_one(
                one(conversation), {"messages": {"$elemMatch": {"_id": stored["_id"]}}, "reply._id": 1}
            )
        if document and document.get("messages"):
            return documents.message(document["messages"][0], document, 0)
        if document and if_renewed_at is None and document.get("reply") == {"_id": stored["_id"]}:
            raise RuntimeError("MongoDB rejects the reply")
        return None

    async def _finish_all(self, changes: Sequence[tuple[Condition, Document]]) -> Sequence[bool]:
        """Return for each change whether it is known to be stored."""
        async with self.guard.call("finish"):
            done = await self.conversations.update_all(changes) == len(changes)
        return [done] * len(changes)

    async def find_expired(
        self, own: Collection[str], *, sole_server: bool = False
    ) -> Sequence[tuple[Key, StoredReply]]:
        """Return conversation and reply of up to 1,000 running replies whose lease has expired.

        :param own: ids of replies to leave out, those of this server
        :param sole_server: whether no other server can be running, so that every lease counts as expired
        """
        running = {"reply._id": {"$type": "objectId", "$nin": [ObjectId(each) for each in own]}}
        condition = every(running) if sole_server else every(running, self._is_expired)
        async with self.guard.call("find_lost"):
            cursor = self.conversations.find(condition, {"owner": 1, "reply": 1}).hint(indexes.RUNNING_REPLIES)
            try:
                found = await cursor.to_list(1000)
            except OperationFailure as error:
                if error.code != _NO_SUCH_INDEX:
                    raise
                # A scan of all conversations would exceed the call's time limit. Until the index is built, an expired
                # reply is ended by the next read of its conversation.
                return ()
        replies = ((documents.key(each), documents.reply(each, expired=True)) for each in found)
        return [(key, reply) for key, reply in replies if key is not None and reply is not None]
