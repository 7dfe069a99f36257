"""Retries: the start of another version of a reply."""

from chatserver.branches import Parent, Tree
from chatserver.errors import NoSuchConversation, NoSuchMessage, NotAReply, NothingToRetry, ReplyInProgress
from chatserver.records import Key, StartedTurn
from chatserver.store import documents
from chatserver.store.turns import MARGIN, NO_REPLY, REPLY_ROOM, Expected, Turns, start_reply


class Retries(Turns):
    """Starts retries. The new reply has the same parent as the existing one."""

    async def start_retry(
        self, conversation: Key, reply_id: str, message_id: str | None = None, key: str | None = None
    ) -> StartedTurn:
        """Store that another version of a reply runs.

        :param message_id: the existing reply; None for the last one of the active path
        :raises NoSuchConversation, NoSuchMessage, NotAReply, NothingToRetry: and nothing is stored
        :raises ReplyInProgress, ConversationFull, KeyReused, UnsupportedConversation, OutcomeUnknown: as `start_turn`
        """
        needed = MARGIN + REPLY_ROOM
        async with self.guard.call("begin", write=True):
            for _ in range(3):
                state = await self._examine(conversation, key, needed)
                if state is None:
                    raise NoSuchConversation
                parent = state.tree.parent(_retried(state.tree, message_id))
                update = start_reply(reply_id, documents.now(), Parent(parent), length=state.length + 1, key=key)
                expected = Expected(state.head, state.length, state.tree.path(parent))
                if started := await self._insert_turn(conversation, NO_REPLY, update, needed, expected):
                    return started
            raise ReplyInProgress


def _retried(tree: Tree, message_id: str | None) -> str:
    """Return the id of the reply to retry.

    :param message_id: as given; None for the last reply of the active path
    :raises NoSuchMessage, NotAReply, NothingToRetry: if it cannot be retried
    """
    if message_id is None:
        path = (tree.nodes[index] for index in reversed(tree.path(tree.head)))
        message_id = next((each.id for each in path if each.role == "assistant"), None)
        if message_id is None:
            raise NothingToRetry
    elif message_id not in tree:
        raise NoSuchMessage
    elif tree.node(message_id).role != "assistant":
        raise NotAReply
    if answered(tree, message_id) is None:
        raise NothingToRetry
    return message_id


def answered(tree: Tree, reply_id: str) -> str | None:
    """Return the id of the user's message that a reply answers; None if it answers none.

    Messages of roles that no source is sent, which another application stored, may be between them.
    """
    before = (tree.nodes[index] for index in reversed(tree.path(reply_id)[:-1]))
    nearest = next((each for each in before if each.role in ("user", "assistant")), None)
    return nearest.id if nearest is not None and nearest.role == "user" else None
