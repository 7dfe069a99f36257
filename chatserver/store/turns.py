"""The first write of a turn, its start: a user's message, or a retry, and the mark that a reply runs.

In a conversation without branches, a message has no `parent`, and there is no `head`: each message continues the one
before it. A turn that continues another message first reads the tree. Its write holds only while the array has the same
length, so that the tree is still the same.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, NamedTuple

from bson import ObjectId
from pymongo.errors import AutoReconnect, DuplicateKeyError, OperationFailure, ServerSelectionTimeoutError

from chatserver.branches import Parent, Tree
from chatserver.errors import (
    ConversationFull,
    IdTaken,
    KeyReused,
    NoSuchConversation,
    NoSuchMessage,
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
MARGIN = 4096
"""Bytes for the fields around two messages, for an error and for the document's own fields."""
NO_REPLY = {"reply": {"$exists": False}}


class State(NamedTuple):
    """A conversation in which a turn can start.

    :ivar head: the stored head, in any form; None if there is none: the conversation has no branches
    """

    tree: Tree
    head: object

    @property
    def length(self) -> int:
        """The length of the array."""
        return len(self.tree.nodes)


class Expected(NamedTuple):
    """The state of a conversation that a turn's write requires, and the path that the turn continues.

    :ivar head: the stored head; None if it must be absent
    :ivar length: the length of the array; None for any
    :ivar path: the indexes of the path, a new user's message included; None in a conversation without branches
    """

    head: object = None
    length: int | None = None
    path: Sequence[int] | None = None


_NO_BRANCHES = Expected()


class Turns(Database):
    """Starts turns. Each start is one atomic write, which holds only while no reply runs."""

    async def start_turn(
        self, turn: Turn, content: str, key: str | None, *, parent: Parent | None = None, new: bool = False
    ) -> StartedTurn:
        """Store a user's message, and that a reply to it runs.

        :param parent: the message that this one continues; None for the head
        :param new: whether the conversation's id is fresh, so that the conversation need not be searched for
        :raises ReplyInProgress, ConversationFull: and nothing is stored
        :raises NoSuchConversation: if the id is taken by a conversation of another owner
        :raises NoSuchMessage: if the parent does not exist
        :raises IdTaken: if `new` is set, and the id is taken
        :raises KeyReused: if a message with this key exists already; see `IdempotencyKeys.find_by_key`
        :raises UnsupportedConversation: if another application stored values that a turn cannot follow
        :raises OutcomeUnknown: if the database stopped answering in the middle; see `find_started`
        """
        conversation, time = turn.conversation, documents.now()
        message = {"_id": ObjectId(turn.message_id), "role": "user", "content": content, "createdAt": time}
        absent: dict[str, Any] = dict(NO_REPLY)
        if key is not None:
            message["key"] = key
            absent["messages.key"] = {"$ne": key}
        update = {**start_reply(turn.reply_id, time), "$push": {"messages": message}}
        needed = len(content.encode()) + MARGIN + REPLY_ROOM
        may_be_first = parent is None or parent.id is None
        async with self.guard.call("begin", write=True):
            if new and may_be_first:
                if started := await self._create(turn, message, update):
                    return started
                raise IdTaken
            # Most turns continue a conversation without branches, or begin one: nothing has to be read before.
            if parent is None and (
                started := await self._insert_turn(conversation, absent, update, needed)
                or await self._create(turn, message, update)
            ):
                return started
            for _ in range(3):
                state = await self._examine(conversation, key, needed)
                if state is not None:
                    target = state.tree.head if parent is None else parent.id
                    started = await self._continue(state, target, turn, message, absent, needed)
                elif may_be_first:
                    started = await self._create(turn, message, update)
                else:
                    raise NoSuchMessage
                if started is not None:
                    return started
            # The id of an unknown conversation is taken if the conversation is another owner's.
            raise NoSuchConversation if state is None else ReplyInProgress

    async def _create(self, turn: Turn, message: Document, update: Document) -> StartedTurn | None:
        """Store the first turn of a conversation; return None if the id is taken by one that has messages.

        :param message: the user's; `update` stores it, and that the reply runs
        """
        content, time = message["content"], message["createdAt"]
        unknown = one(turn.conversation, {"messages": {"$exists": False}, **NO_REPLY})
        try:
            await self.conversations.update_one(unknown, {**update, "$setOnInsert": {"createdAt": time}}, upsert=True)
        except DuplicateKeyError:
            return None
        first = Message(turn.message_id, "user", content, time)
        return StartedTurn(
            turn=turn,
            new_message=first,
            messages=[first],
            number=1,
            previous_id=None,
            created_at=time,
            reply_room=DOCUMENT_BYTES - len(content.encode()) - 2 * MARGIN,
        )

    async def _continue(
        self, state: State, target: str | None, turn: Turn, message: Document, absent: Document, needed: int
    ) -> StartedTurn | None:
        """Store a user's message after another message; return None if the conversation has changed.

        :param target: the id of the message that the new one continues; None for a first message
        """
        tree, length = state.tree, state.length
        if target is not None and target not in tree:
            raise NoSuchMessage
        path, reply_parent = None, None
        last = tree.nodes[-1].id if length else None
        if state.head is not None or target != last or target != tree.next_parent:
            path, reply_parent = [*tree.path(target), length], Parent(turn.message_id)
            message = {**message, "parent": target and ObjectId(target)}
        update = start_reply(turn.reply_id, message["createdAt"], reply_parent, length=length + 2)
        push = {"$push": {"messages": message}}
        expected = Expected(state.head, length, path)
        return await self._insert_turn(turn.conversation, absent, {**update, **push}, needed, expected)

    async def find_started(self, conversation: Key, reply_id: str) -> StartedTurn | None:
        """Return a turn whose start had an unknown outcome, if it was stored and its reply still runs."""
        async with self.guard.call("find_begun"):
            return await self._find_turn(conversation, {"reply._id": ObjectId(reply_id)})

    async def _find_turn(self, conversation: Key, also: Document) -> StartedTurn | None:
        """Return the turn whose reply runs, if the conversation meets some conditions."""
        document = await self.conversations.find_one(one(conversation, also), self._turn_projection)
        if document is None or not _has_branches(document):
            return _started_turn(conversation, document) if document else None
        # The path of a reply that runs does not change.
        running = one(conversation, {"reply._id": document["reply"]["_id"]})
        found = await self.conversations.find_one(running, expressions.WITH_TREE)
        if found is None:
            return None
        tree = await self._tree(found)
        document = await self.conversations.find_one(running, self._turn_along(tree.path(tree.head)[:-1]))
        return _started_turn(conversation, document) if document else None

    async def _insert_turn(
        self, conversation: Key, also: Document, update: Document, needed: int, expected: Expected = _NO_BRANCHES
    ) -> StartedTurn | None:
        """Update a conversation if it has room for `needed` bytes and meets the other conditions, else return None."""
        conditions = [{"$lte": [{"$bsonSize": "$$ROOT"}, DOCUMENT_BYTES - needed]}, expressions.IS_SUPPORTED]
        if expected.length is not None:
            conditions.append({"$eq": [expressions.COUNT, expected.length]})
        path, head = expected.path, {"head": {"$eq": expected.head}}
        condition = one(conversation, {**also, **head, "$expr": {"$and": conditions}})
        projection = self._turn_projection if path is None else self._turn_along(path)
        document = await self.conversations.find_changed(condition, update, projection)
        if document is None:
            return None
        if "last" in document and (path is not None or not _has_branches(document)):
            return _started_turn(conversation, document)
        # Another application stored branches. Or the driver repeated the write after a disconnect, and MongoDB answered
        # with the image of the first one, to which it does not apply the projection.
        try:
            return await self._find_turn(conversation, {"reply._id": update["$set"]["reply._id"]})
        except (ServerSelectionTimeoutError, OperationFailure) as error:
            raise AutoReconnect("after the turn was stored") from error

    async def _examine(self, conversation: Key, key: str | None, needed: int) -> State | None:
        """Return a conversation in which a turn can start, None if it is unknown; raise why a turn cannot start."""
        projection: dict[str, Any] = {
            **expressions.WITH_TREE_IF_IDLE,
            "size": {"$bsonSize": "$$ROOT"},
            "supported": expressions.IS_SUPPORTED,
            "is_null": {"$eq": [{"$type": "$messages"}, "null"]},
        }
        if key is not None:
            projection["at"] = expressions.index_of_key(key)
        document = await self.conversations.find_one(one(conversation), projection)
        if document is None:
            return None
        if document.get("at", -1) >= 0:
            raise KeyReused
        if "reply" in document:
            running = documents.reply(document, expired=False)
            if running is not None and key is not None and running.key == key:
                raise KeyReused
            raise ReplyInProgress if running else UnsupportedConversation
        if document["is_null"]:
            # MongoDB cannot push to null.
            is_null = one(conversation, {"$expr": {"$eq": [{"$type": "$messages"}, "null"]}})
            await self.conversations.update_one(is_null, {"$set": {"messages": []}})
        elif not document["supported"]:
            raise UnsupportedConversation
        elif document["size"] > DOCUMENT_BYTES - needed:
            raise ConversationFull
        return State(await self._tree(document), document.get("head"))


def _has_branches(document: Document) -> bool:
    """Return whether a turn's document, as projected for a conversation without branches, has some nevertheless."""
    return document.get("head") is not None or any("parent" in each for each in document["prompt"]["messages"])


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
        reply_room=DOCUMENT_BYTES - document["size"] - MARGIN,
        parent=reply.parent,
        key=reply.key,
        title=documents.title(document),
    )


def start_reply(
    reply_id: str, time: datetime, parent: Parent | None = None, *, length: int = 0, key: str | None = None
) -> dict[str, Any]:
    """Return the update that marks a reply as running, without text, with a new lease.

    :param parent: the reply's; None in a conversation without branches
    :param length: with `parent`, the length of the array once the reply is stored
    """
    reply: dict[str, Any] = {"reply._id": ObjectId(reply_id), "reply.createdAt": time, "reply.content": ""}
    if parent is not None:
        reply["reply.parent"] = parent.id and ObjectId(parent.id)
        reply["head"] = documents.stored_head(ObjectId(reply_id), length)
    if key is not None:
        reply["reply.key"] = key
    return {
        # `$max`: with a clock that was set back, a conversation would move down the list, and a client that pages
        # through it would see the conversation twice.
        "$max": {"updatedAt": time},
        "$set": reply,
        "$currentDate": {"reply.renewedAt": True},
    }
