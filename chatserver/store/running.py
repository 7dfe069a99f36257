"""A running reply in the database: its checkpoints, which renew its lease, and the second write of a turn, its end."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

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
_STOP = {"reply._id": 1, "reply.stop": 1}
"""The projection of a running reply's id, and of the mark that it is to be stopped."""
_NOT_STOPPED = {"reply.stop": {"$exists": False}}


class Unsaved(NamedTuple):
    """The ids of the replies that a checkpoint did not save.

    :ivar ended: those that no longer run: another server ended them, or they were deleted
    :ivar stopping: those that another server was asked to stop
    """

    ended: Collection[str] = ()
    stopping: Collection[str] = ()


class RunningReplies(Database):
    """Checkpoints, ends and finds running replies. Every write holds only while the reply still runs."""

    @cached_property
    def _finishes(self) -> Batcher[tuple[Condition, Document], bool]:
        return Batcher(self._finish_all)

    async def checkpoint(self, replies: Mapping[str, tuple[Key, str]]) -> Unsaved:
        """Save the text of running replies and renew their leases, in one bulk write.

        :param replies: reply id -> conversation, content
        """
        changes: list[tuple[Condition, Document]] = [
            (
                one(conversation, {"reply._id": ObjectId(reply_id), **_NOT_STOPPED}),
                {"$set": {"reply.content": content}, "$currentDate": {"reply.renewedAt": True}},
            )
            for reply_id, (conversation, content) in replies.items()
        ]
        async with self.guard.call("checkpoint"):
            if await self.conversations.update_all(changes) == len(changes):
                return Unsaved()
            condition = several(conversation for conversation, _ in replies.values())
            found = await self.conversations.find(condition, {"owner": 1, **_STOP}).to_list(None)
        # Key of the conversation -> id of its running reply, and whether it is to be stopped.
        running = {
            documents.key(each): (str(each["reply"]["_id"]), "stop" in each["reply"])
            for each in found
            if each.get("reply")
        }
        states = {reply_id: running.get(key) for reply_id, (key, _) in replies.items()}
        return Unsaved(
            {reply_id for reply_id, state in states.items() if state is None or state[0] != reply_id},
            {reply_id for reply_id, state in states.items() if state == (reply_id, True)},
        )

    async def request_stop(self, conversation: Key, reply_id: str) -> bool:
        """Have the server that writes a reply stop it at its next checkpoint; return whether the reply still runs."""
        async with self.guard.call("request_stop"):
            return await self.conversations.update_one(
                one(conversation, {"reply._id": ObjectId(reply_id)}), {"$set": {"reply.stop": True}}
            )

    async def finish(self, conversation: Key, message: Message, *, if_renewed_at: object = None) -> Message | None:
        """Store a running reply as a message, and end it. Replies that end together share one bulk write.

        A complete reply that a client has stopped meanwhile, on another server, is stored as stopped.

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
        if message.status == "complete":
            running |= _NOT_STOPPED
        change = {"$push": {"messages": stored}, "$unset": {"reply": ""}, "$max": {"updatedAt": documents.now()}}
        if await self._finishes.submit((one(conversation, running), change)):
            return message
        async with self.guard.call("finish"):
            document = await self.conversations.find_one(
                one(conversation), {"messages": {"$elemMatch": {"_id": stored["_id"]}}, **_STOP}
            )
        if document and document.get("messages"):
            return documents.message(document["messages"][0], document, 0)
        if document and if_renewed_at is None and document.get("reply", {}).get("_id") == stored["_id"]:
            if message.status == "complete" and "stop" in document["reply"]:
                return await self.finish(conversation, replace(message, status="stopped"))
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
