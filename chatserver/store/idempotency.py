"""Idempotency keys: the turn that was started with one."""

from chatserver.branches import Parent
from chatserver.errors import KeyReused
from chatserver.records import Key, Turn
from chatserver.store import documents, expressions
from chatserver.store.collection import Condition, one
from chatserver.store.database import Database
from chatserver.store.retries import answered


class IdempotencyKeys(Database):
    """Finds the turns that were started with them. The writes that start turns refuse a key that is stored."""

    async def find_by_key(self, conversation: Key, key: str, content: str, parent: Parent | None = None) -> Turn | None:
        """Return the turn that was started with an idempotency key, or None.

        :param parent: the message that it continues; None if that need not be compared
        :raises KeyReused: if it has another content or parent, or the key was used for a retry
        """
        at = expressions.index_of_key(key)
        projection = {"at": at, "messages": expressions.messages_from(at, count=2), "reply._id": 1}
        if parent is not None:
            projection |= expressions.WITH_TREE
        async with self.guard.call("find_keyed"):
            document = await self.conversations.find_one(_with_key(conversation, key), projection)
        if document is None:
            return None
        if document["at"] < 0:
            raise KeyReused
        question, *replies = (
            documents.message(each, document, index) for index, each in enumerate(document["messages"], document["at"])
        )
        reply = replies[0] if replies else documents.reply(document, expired=False)
        if question.role != "user" or question.content != content or reply is None:
            raise KeyReused
        if parent is not None and (await self._tree(document)).parent(question.id) != parent.id:
            raise KeyReused
        return Turn(conversation, question.id, reply.id)

    async def find_retry(self, conversation: Key, key: str, message_id: str | None) -> Turn | None:
        """Return the retry that was started with an idempotency key, or None.

        :raises KeyReused: if it was the retry of another message, or the key was used for a post
        """
        projection = {**expressions.WITH_TREE, "at": expressions.index_of_key(key)}
        async with self.guard.call("find_keyed"):
            document = await self.conversations.find_one(_with_key(conversation, key), projection)
        if document is None:
            return None
        tree, running = await self._tree(document), documents.reply(document, expired=False)
        if running is not None and running.key == key:
            reply = running.id
        elif document["at"] >= 0:
            reply = tree.nodes[document["at"]].id
        else:
            # Another application stored the key in something else than a message or a reply.
            raise KeyReused
        question = answered(tree, reply)
        of_another = message_id is not None and (
            message_id not in tree or tree.parent(message_id) != tree.parent(reply)
        )
        if tree.node(reply).role != "assistant" or question is None or of_another:
            raise KeyReused
        return Turn(conversation, question, reply)


def _with_key(conversation: Key, key: str) -> Condition:
    """Return the condition for a conversation in which an idempotency key was used."""
    return one(conversation, {"$or": [{"messages.key": key}, {"reply.key": key}]})
