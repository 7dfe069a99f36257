"""Starting a turn: its first write, and what to do if the outcome of that write is unknown."""

import asyncio
from dataclasses import dataclass
from functools import partial

from chatserver import tasks
from chatserver.branches import Parent
from chatserver.errors import DatabaseUnavailable
from chatserver.hub import LiveConversation
from chatserver.records import Key, StartedTurn, Turn
from chatserver.replies.alignment import Alignment
from chatserver.store import Store

_LOOKS = 3
"""A write in flight may reach MongoDB shortly after it answers again, so one look is not enough."""
_PAUSE_S = 0.5


@dataclass(frozen=True, slots=True)
class NewTurn:
    """A turn that begins with a user's message.

    :ivar parent: the message that it continues; None for the head
    :ivar is_new: whether the conversation's id is fresh, so that the conversation need not be searched for
    """

    turn: Turn
    text: str
    key: str | None
    parent: Parent | None
    is_new: bool

    @property
    def conversation(self) -> Key:
        return self.turn.conversation

    @property
    def reply_id(self) -> str:
        return self.turn.reply_id


@dataclass(frozen=True, slots=True)
class Retry:
    """A turn that is another version of a reply.

    :ivar message_id: the existing reply; None for the last one of the active path
    """

    conversation: Key
    reply_id: str
    message_id: str | None
    key: str | None


class Starter:
    """Stores the starts of turns."""

    def __init__(self, store: Store, alignment: Alignment) -> None:
        self._store = store
        self._alignment = alignment

    async def store(self, live: LiveConversation, turn: NewTurn | Retry) -> StartedTurn:
        """Store the start of a turn, once an expired reply that blocks it is ended.

        :raises OutcomeUnknown: if MongoDB stopped answering in the middle; see `settle`
        :raises ChatError: as `Store.start_turn` or `Store.start_retry`, and nothing is stored
        """
        return await self._alignment.unblocked(live, partial(self._write, turn))

    async def _write(self, turn: NewTurn | Retry) -> StartedTurn:
        if isinstance(turn, Retry):
            return await self._store.start_retry(turn.conversation, turn.reply_id, turn.message_id, turn.key)
        return await self._store.start_turn(turn.turn, turn.text, turn.key, parent=turn.parent, new=turn.is_new)

    async def settle(self, turn: NewTurn | Retry) -> StartedTurn | None:
        """Find out, once MongoDB answers, whether a start with an unknown outcome was stored; return it, or None."""
        search = _Search(self._store, turn)
        await tasks.repeat(search.look, expected=(DatabaseUnavailable,))
        return search.found


class _Search:
    def __init__(self, store: Store, turn: NewTurn | Retry) -> None:
        self.found: StartedTurn | None = None
        self._store = store
        self._turn = turn
        self._looks = 0

    async def look(self) -> bool:
        """Look once; return whether the search is over."""
        await asyncio.sleep(_PAUSE_S)
        self.found = await self._store.find_started(self._turn.conversation, self._turn.reply_id)
        self._looks += 1
        return self.found is not None or self._looks == _LOOKS
