"""The use cases that change conversations: say, retry, stop, delete."""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from weakref import WeakValueDictionary

from chatserver import positions, store
from chatserver.errors import Draining, IdTaken, KeyReused, NoSuchConversation
from chatserver.hub import Hub, LiveConversation, LiveReply
from chatserver.limits import Quota, TurnLimit
from chatserver.records import Key, Turn
from chatserver.replies import NewTurn, Replies, Retry
from chatserver.store import Store

_DELETED_AT_ONCE = 100


class Chat:
    """The use cases that change a conversation. Each method may raise `DatabaseUnavailable`."""

    def __init__(self, store: Store, hub: Hub, replies: Replies, turn_limit: TurnLimit) -> None:
        self._store = store
        self._hub = hub
        self._replies = replies
        self._turn_limit = turn_limit
        self._attempts: WeakValueDictionary[tuple[Key, str], asyncio.Lock] = WeakValueDictionary()
        """Conversation and idempotency key -> the lock that one attempt at a time holds, while there are attempts."""

    async def ping(self) -> None:
        """Check that new turns can be taken.

        :raises Draining, DatabaseUnavailable: if they cannot
        """
        if self._replies.is_draining:
            raise Draining
        await self._store.ping()

    def quotas(self, owner: str | None) -> list[Quota]:
        """Return the state of the limits that apply to an owner's turns; none without an owner."""
        quotas = (self._turn_limit.quota(owner), self._replies.quota(owner))
        return [quota for quota in quotas if quota is not None]

    async def say(self, owner: str | None, conversation_id: str | None, text: str, key: str | None = None) -> Turn:
        """Store a user's message and start the reply; return the turn, or the first one with the same idempotency key.

        Only a new turn counts against the owner's limit of turns; then it counts also if it is refused.

        :param conversation_id: None for a new conversation; an unknown one is created
        :raises ReplyInProgress, ConversationFull, UnsupportedConversation, KeyReused, Draining, TooManyReplies,
            QuotaExceeded: and nothing is stored
        :raises NotFound: if the id is taken by a conversation of another owner
        :raises DatabaseUnavailable: and the message may be stored nevertheless; a repetition with the key is safe
        """
        if key is None:
            return await self._say(owner, conversation_id, text, None)
        conversation_id = conversation_id or store.id_for_key(owner, key)
        # One attempt at a time: otherwise the limit might refuse a repetition whose turn is being stored.
        attempt = self._attempts.setdefault((Key(owner, conversation_id), key), asyncio.Lock())
        async with attempt:
            return await self._say(owner, conversation_id, text, key)

    async def _say(self, owner: str | None, conversation_id: str | None, text: str, key: str | None) -> Turn:
        is_new = conversation_id is None
        while True:
            turn = Turn(Key(owner, conversation_id or store.new_id()), store.new_id(), store.new_id())
            if key is not None and (first := await self._store.find_by_key(turn.conversation, key, text)) is not None:
                return first
            self._turn_limit.take(owner)
            try:
                return await self._replies.start_turn(NewTurn(turn, text, key, is_new))
            except (KeyReused, IdTaken):
                # After `KeyReused`, another attempt with this key was stored since the search: find it, or start again
                # if its conversation has been deleted. After `IdTaken`, choose another id.
                self._turn_limit.give_back(owner)

    async def retry(self, conversation: Key) -> Turn:
        """Start a new reply in place of a stopped, failed or interrupted last one; return the turn.

        It counts against the owner's limit of turns, also if it is refused for another reason.

        :raises NotFound, NothingToRetry: and nothing is stored
        :raises ReplyInProgress, ConversationFull, UnsupportedConversation, Draining, TooManyReplies, QuotaExceeded: as
            `say`
        :raises DatabaseUnavailable: and the new reply may run nevertheless
        """
        self._turn_limit.take(conversation.owner)
        return await self._replies.start_turn(Retry(conversation, store.new_id()))

    async def stop(self, conversation: Key) -> str | None:
        """Stop the running reply, keeping its text; return its id, or None if no reply runs or it is ending by itself.

        :raises NotFound: if the conversation does not exist
        """
        with self._hub.hold(conversation) as live:
            return await self._replies.stop(live)

    async def delete(self, conversation: Key) -> None:
        """Delete a conversation and its running reply; its streams end with `reset`.

        :raises NotFound: if the conversation does not exist
        """
        with self._hub.hold(conversation) as live:
            reply = live.reply
            found = await self._store.delete(conversation)
            self._end_deleted(live, reply)
        if not found:
            raise NoSuchConversation

    async def delete_all(self, owner: str) -> None:
        """Delete all conversations of an owner and their running replies; their streams end with `reset`.

        A conversation that is created meanwhile may remain.

        :raises DatabaseUnavailable: and some conversations may be deleted; a repetition deletes the others
        """
        # First those in memory: an attempt that got no answer may have deleted them without a reset.
        await self._delete_several(owner, [live.key for live in self._hub.conversations if live.key.owner == owner])
        last = None
        while conversations := await self._store.keys(owner, _DELETED_AT_ONCE, last):
            await self._delete_several(owner, conversations)
            last = conversations[-1]

    async def _delete_several(self, owner: str, conversations: Sequence[Key]) -> None:
        with ExitStack() as held:
            lives = [held.enter_context(self._hub.hold(each)) for each in conversations]
            replies = [live.reply for live in lives]
            await self._store.delete_all(owner, conversations)
            for live, reply in zip(lives, replies, strict=True):
                self._end_deleted(live, reply)

    def _end_deleted(self, live: LiveConversation, reply: LiveReply | None) -> None:
        """End the streams and the reply of a conversation that was deleted.

        :param reply: the running reply before the deletion
        """
        # Reset it also if it was not found: an attempt that got no answer may have deleted it. But not if another reply
        # has started under this id since, nor for subscribers that wait for its first message.
        if live.reply in (None, reply) and live.position != positions.start(live.key.id):
            live.reset()
        if reply is not None:
            self._replies.abandon(reply.message_id)
