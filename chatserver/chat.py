"""The use cases that change conversations: say, retry, stop, show, rename, delete."""

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from weakref import WeakValueDictionary

from chatserver import positions, store
from chatserver.branches import Parent
from chatserver.errors import Draining, IdTaken, KeyReused, NoSuchConversation
from chatserver.hub import Hub, LiveConversation, LiveReply
from chatserver.limits import Quota, TurnLimit
from chatserver.records import Key, Summary, Turn
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

    async def say(
        self,
        owner: str | None,
        conversation_id: str | None,
        text: str,
        key: str | None = None,
        parent: Parent | None = None,
    ) -> Turn:
        """Store a user's message and start the reply; return the turn, or the first one with the same idempotency key.

        Only a new turn counts against the owner's limit of turns; then it counts also if it is refused.

        :param conversation_id: None for a new conversation; an unknown one is created
        :param parent: the message that this one continues; None for the head
        :raises ReplyInProgress, ConversationFull, UnsupportedConversation, KeyReused, Draining, TooManyReplies,
            QuotaExceeded: and nothing is stored
        :raises NotFound: if the id is taken by a conversation of another owner, or the parent does not exist
        :raises DatabaseUnavailable: and the message may be stored nevertheless; a repetition with the key is safe
        """
        is_new = conversation_id is None and key is None
        if conversation_id is None and key is not None:
            conversation_id = store.id_for_key(owner, key)
        while True:
            turn = Turn(Key(owner, conversation_id or store.new_id()), store.new_id(), store.new_id())
            try:
                return await self._start(NewTurn(turn, text, key, parent, is_new))
            except IdTaken:
                continue

    async def retry(self, conversation: Key, message_id: str | None = None, key: str | None = None) -> Turn:
        """Start another version of a reply; return the turn, or the first one with the same idempotency key.

        It counts against the owner's limit of turns as `say` does.

        :param message_id: the existing reply; None for the last one of the active path
        :raises NotFound, NotAReply, NothingToRetry: and nothing is stored
        :raises ReplyInProgress, ConversationFull, UnsupportedConversation, KeyReused, Draining, TooManyReplies,
            QuotaExceeded: as `say`
        :raises DatabaseUnavailable: and the new reply may run nevertheless; a repetition with the key is safe
        """
        return await self._start(Retry(conversation, store.new_id(), message_id, key))

    async def _start(self, turn: NewTurn | Retry) -> Turn:
        if turn.key is None:
            return await self._start_once(turn)
        # One attempt at a time: otherwise the limit might refuse a repetition whose turn is being stored.
        attempt = self._attempts.setdefault((turn.conversation, turn.key), asyncio.Lock())
        async with attempt:
            return await self._start_once(turn)

    async def _start_once(self, turn: NewTurn | Retry) -> Turn:
        owner = turn.conversation.owner
        while True:
            if (first := await self._find(turn)) is not None:
                return first
            self._turn_limit.take(owner)
            try:
                return await self._replies.start_turn(turn)
            except IdTaken:
                self._turn_limit.give_back(owner)
                raise
            except KeyReused:
                # Another attempt with this key was stored since the search: find it, or start again if its conversation
                # has been deleted.
                self._turn_limit.give_back(owner)

    async def _find(self, turn: NewTurn | Retry) -> Turn | None:
        """Return the turn that was started with the same idempotency key, or None.

        :raises KeyReused: if it was another one
        """
        if turn.key is None:
            return None
        if isinstance(turn, Retry):
            return await self._store.find_retry(turn.conversation, turn.key, turn.message_id)
        return await self._store.find_by_key(turn.conversation, turn.key, turn.text, turn.parent)

    async def show(self, conversation: Key, message_id: str) -> str:
        """Show another branch: the one through a message. Return the id of the message at its end.

        :raises NotFound: if the conversation or the message does not exist
        :raises ReplyInProgress, ConversationFull, UnsupportedConversation: and nothing is changed
        """
        alignment = self._replies.alignment
        with self._hub.hold(conversation) as live:
            head = await alignment.unblocked(live, partial(self._store.show, conversation, message_id))
            await alignment.refresh(live)
        return head

    async def rename(self, conversation: Key, title: str | None) -> Summary:
        """Set the title of a conversation, None for the automatic one; return the conversation as in the list.

        :raises NotFound: if the conversation does not exist
        :raises ConversationFull: and nothing is changed
        """
        with self._hub.hold(conversation) as live:
            summary = await self._store.rename(conversation, title)
            if summary is None:
                raise NoSuchConversation
            await self._replies.alignment.refresh(live)
        return summary

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
