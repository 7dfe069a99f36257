"""The first write of a turn, its start: a user's message, or a retry, and the mark that a reply runs."""

from dataclasses import replace
from datetime import datetime
from typing import Any

from bson import ObjectId
from pymongo.errors import AutoReconnect, DuplicateKeyError, OperationFailure, ServerSelectionTimeoutError

from chatserver.errors import (
    ConversationFull,
    IdTaken,
    KeyReused,
    NoSuchConversation,
    NothingToRetry,
    ReplyInProgress,
    UnsupportedConversation,
)
from chatserver.records import Key, Message, StartedTurn, Turn
from chatserver.store import documents, expressions
from chatserver.store.collection import one
from chatserver.store.database import Database
from chatserver.store.documents import Document

DOCUMENT_BYTES = 16 * 1024 * 1024
"""MongoDB's limit for one document."""
REPLY_ROOM = 1024 * 1024
"""Bytes kept free for a reply: a turn that would leave less is rejected."""
_MARGIN = 4096
"""Bytes for the fields around two messages, for an error and for the document's own fields."""
_RETRIED = ("stopped", "failed", "interrupted")
_NO_REPLY = {"reply": {"$exists": False}}


class Turns(Database):
    """Starts turns. Each start is one atomic write, which holds only while no reply runs."""

    async def start_turn(self, turn: Turn, content: str, key: str | None, *, new: bool = False) -> StartedTurn:
        """Store a user's message, and that a reply to it runs.

        :param new: whether the conversation's id is fresh, so that the conversation need not be searched for
        :raises ReplyInProgress, ConversationFull: and nothing is stored
        :raises NoSuchConversation: if the id is taken by a conversation of another owner
        :raises IdTaken: if `new` is set, and the id is taken
        :raises KeyReused: if a message with this key exists already; see `find_by_key`
        :raises UnsupportedConversation: if another application stored values that a turn cannot follow
        :raises OutcomeUnknown: if the database stopped answering in the middle; see `find_started`
        """
        time = documents.now()
        message = {"_id": ObjectId(turn.message_id), "role": "user", "content": content, "createdAt": time}
        absent: dict[str, Any] = dict(_NO_REPLY)
        if key is not None:
            message["key"] = key
            absent["messages.key"] = {"$ne": key}
        update = {
            "$push": {"messages": message},
            "$setOnInsert": {"createdAt": time},
            **_start_reply(turn.reply_id, time),
        }
        needed = len(content.encode()) + _MARGIN + REPLY_ROOM
        async with self.guard.call("begin", write=True):
            for _ in range(3):
                if not new and (started := await self._insert_turn(turn.conversation, absent, update, needed)):
                    return started
                try:
                    unknown = one(turn.conversation, {"messages": {"$exists": False}, **_NO_REPLY})
                    await self.conversations.update_one(unknown, update, upsert=True)
                except DuplicateKeyError:
                    if new:
                        raise IdTaken from None
                    is_known = await self._reject(turn.conversation, key, needed)
                    continue
                first = Message(turn.message_id, "user", content, time)
                return StartedTurn(
                    turn=turn,
                    new_message=first,
                    messages=[first],
                    number=1,
                    previous_id=None,
                    created_at=time,
                    reply_room=DOCUMENT_BYTES - len(content.encode()) - 2 * _MARGIN,
                )
            # The id of an unknown conversation is taken if the conversation is another owner's.
            raise ReplyInProgress if is_known else NoSuchConversation

    async def start_retry(self, conversation: Key, reply_id: str) -> StartedTurn:
        """Supersede a stopped, failed or interrupted reply at the conversation's end by a new one.

        :raises NoSuchConversation, NothingToRetry: and nothing is stored
        :raises ReplyInProgress, ConversationFull, UnsupportedConversation, OutcomeUnknown: as `start_turn`
        """
        needed = _MARGIN + REPLY_ROOM
        async with self.guard.call("begin", write=True):
            document = await self.conversations.find_one(
                one(conversation),
                {
                    "reply._id": 1,
                    "count": expressions.COUNT,
                    "last": {"$last": expressions.MESSAGES},
                    "prompt": {"$map": {"input": {"$slice": [expressions.PROMPT, -2]}, "in": {"role": "$$this.role"}}},
                    "supported": expressions.IS_SUPPORTED,
                },
            )
            if document is None:
                raise NoSuchConversation
            if documents.reply(document, expired=False) is not None:
                raise ReplyInProgress
            if document["count"] == 0:
                raise NothingToRetry
            if not document["supported"]:
                raise UnsupportedConversation
            last = document["last"]
            is_answer = [each["role"] for each in document["prompt"]] == ["user", "assistant"]
            if last.get("role") != "assistant" or last.get("status") not in _RETRIED or not is_answer:
                raise NothingToRetry
            at = f"messages.{document['count'] - 1}"
            retryable = {**_NO_REPLY, f"{at}.status": last["status"]}
            update = _start_reply(reply_id, documents.now())
            update["$set"][f"{at}.status"] = "superseded"
            still_last = {"$eq": [expressions.COUNT, document["count"]]}
            if started := await self._insert_turn(conversation, retryable, update, needed, still_last):
                return started
            await self._reject(conversation, None, needed)
            raise ReplyInProgress

    async def find_started(self, conversation: Key, reply_id: str) -> StartedTurn | None:
        """Return a turn whose start had an unknown outcome, if it was stored and its reply still runs."""
        async with self.guard.call("find_begun"):
            running = one(conversation, {"reply._id": ObjectId(reply_id)})
            document = await self.conversations.find_one(running, self._turn_projection)
        return _started_turn(conversation, document) if document else None

    async def find_by_key(self, conversation: Key, key: str, content: str) -> Turn | None:
        """Return the turn that was started with an idempotency key, or None.

        :raises KeyReused: if it was started with another content
        """
        keys = {"$map": {"input": expressions.MESSAGES, "in": {"$ifNull": ["$$this.key", None]}}}
        at = {"$indexOfArray": [keys, expressions.literal(key)]}
        async with self.guard.call("find_keyed"):
            document = await self.conversations.find_one(
                one(conversation, {"messages.key": key}),
                {"at": at, "messages": expressions.messages_from(at, count=2), "reply._id": 1},
            )
        if document is None:
            return None
        question, *replies = (
            documents.message(each, document, index) for index, each in enumerate(document["messages"], document["at"])
        )
        reply = replies[0] if replies else documents.reply(document, expired=False)
        if question.content != content or reply is None:
            raise KeyReused
        return Turn(conversation, question.id, reply.id)

    async def _insert_turn(
        self, conversation: Key, also: Document, update: Document, needed: int, *also_true: Document
    ) -> StartedTurn | None:
        """Update a conversation if it has room for `needed` bytes and meets the other conditions, else return None."""
        fits = {"$lte": [{"$bsonSize": "$$ROOT"}, DOCUMENT_BYTES - needed]}
        condition = one(conversation, {**also, "$expr": {"$and": [fits, expressions.IS_SUPPORTED, *also_true]}})
        document = await self.conversations.find_changed(condition, update, self._turn_projection)
        if document is not None and "last" not in document:
            # The driver repeated the write after a disconnect, and MongoDB answered with the image of the first one,
            # to which it does not apply the projection.
            try:
                document = await self.conversations.find_one(one(conversation), self._turn_projection)
            except (ServerSelectionTimeoutError, OperationFailure) as error:
                raise AutoReconnect("after the turn was stored") from error
        return _started_turn(conversation, document) if document else None

    async def _reject(self, conversation: Key, key: str | None, needed: int) -> bool:
        """Raise why a turn could not start; if the reason no longer holds, return whether the conversation exists."""
        projection: dict[str, Any] = {
            "reply._id": 1,
            "size": {"$bsonSize": "$$ROOT"},
            "supported": expressions.IS_SUPPORTED,
            "is_null": {"$eq": [{"$type": "$messages"}, "null"]},
        }
        if key is not None:
            keys = {"$map": {"input": expressions.MESSAGES, "in": "$$this.key"}}
            projection["keyed"] = {"$in": [expressions.literal(key), keys]}
        document = await self.conversations.find_one(one(conversation), projection)
        if document is None:
            return False
        if document.get("keyed"):
            raise KeyReused
        if "reply" in document:
            raise ReplyInProgress if documents.reply(document, expired=False) else UnsupportedConversation
        if document["is_null"]:
            # MongoDB cannot push to null.
            is_null = one(conversation, {"$expr": {"$eq": [{"$type": "$messages"}, "null"]}})
            await self.conversations.update_one(is_null, {"$set": {"messages": []}})
        elif not document["supported"]:
            raise UnsupportedConversation
        elif document["size"] > DOCUMENT_BYTES - needed:
            raise ConversationFull
        return True


def _started_turn(conversation: Key, document: Document) -> StartedTurn:
    conversation_id, count = document["_id"], document["count"]
    messages = [documents.message(each, document, 0) for each in document["prompt"]["messages"]]
    if (index := document["prompt"]["question_index"]) is not None:
        messages[-1] = replace(messages[-1], id=documents.message_id(conversation_id, index, None))
    question, reply = messages[-1], documents.reply(document, expired=False)
    assert reply is not None
    last = [
        documents.message_id(conversation_id, index, each)
        for index, each in enumerate(document["last"], count - len(document["last"]))
    ]
    is_new = last[-1] == question.id
    before = last[:-1] if is_new else last
    return StartedTurn(
        turn=Turn(conversation, question.id, reply.id),
        new_message=question if is_new else None,
        messages=messages,
        number=document["turns"],
        previous_id=before[-1] if before else None,
        created_at=reply.created_at,
        reply_room=DOCUMENT_BYTES - document["size"] - _MARGIN,
    )


def _start_reply(reply_id: str, time: datetime) -> dict[str, Any]:
    """Return the update that marks a reply as running, without text, with a new lease."""
    return {
        # `$max`: with a clock that was set back, a conversation would move down the list, and a client that pages
        # through it would see the conversation twice.
        "$max": {"updatedAt": time},
        "$set": {"reply._id": ObjectId(reply_id), "reply.createdAt": time, "reply.content": ""},
        "$currentDate": {"reply.renewedAt": True},
    }
