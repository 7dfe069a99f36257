"""What readers see of a conversation: which branch, and which title."""

from bson import ObjectId

from chatserver.errors import NoSuchConversation, NoSuchMessage, ReplyInProgress, UnsupportedConversation
from chatserver.records import Key, Summary
from chatserver.store import documents, expressions
from chatserver.store.collection import one
from chatserver.store.listing import Listing
from chatserver.store.turns import NO_REPLY


class Views(Listing):
    """Changes the head and the title. Neither is activity: `updatedAt` remains."""

    async def show(self, conversation: Key, message_id: str) -> str:
        """Make the end of the path through a message the head; see `Tree.leaf`. Return its id.

        :raises NoSuchConversation, NoSuchMessage, ReplyInProgress: and nothing is stored
        :raises ConversationFull, UnsupportedConversation: likewise
        """
        async with self.guard.call("show"):
            for _ in range(3):
                document = await self.conversations.find_one(one(conversation), expressions.WITH_TREE_IF_IDLE)
                if document is None:
                    raise NoSuchConversation
                if "reply" in document:
                    raise ReplyInProgress if documents.reply(document, expired=False) else UnsupportedConversation
                tree = await self._tree(document)
                if message_id not in tree:
                    raise NoSuchMessage
                leaf = tree.leaf(message_id)
                if leaf == tree.head:
                    return leaf
                same = {"$expr": {"$eq": [expressions.COUNT, document["count"]]}, **NO_REPLY}
                head = documents.stored_head(ObjectId(leaf), document["count"])
                if await self.conversations.update_one(one(conversation, same), {"$set": {"head": head}}):
                    return leaf
            raise ReplyInProgress

    async def rename(self, conversation: Key, title: str | None) -> Summary | None:
        """Set a conversation's title, or None for the automatic one; return the conversation, None if it is unknown.

        :raises ConversationFull: and nothing is stored
        """
        change = {"$unset": {"title": ""}} if title is None else {"$set": {"title": title}}
        async with self.guard.call("rename"):
            await self.conversations.update_one(one(conversation), change)
        return await self.summary(conversation)
