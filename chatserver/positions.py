"""Positions: how much of a conversation a client has seen. Pure: no I/O, no clock."""

import re
from typing import NamedTuple

_POSITION = re.compile(r"([0-9a-f]{24})-(done|0|[1-9][0-9]{0,8})\Z", re.ASCII)


class Position(NamedTuple):
    """How much of a conversation a client has seen: everything before a message, and `chars` of that message.

    The position `start(conversation_id)` lies before the first message.
    """

    message_id: str
    chars: int | None
    """Code points of the message; None: all of it, and that it has ended."""

    def __str__(self) -> str:
        return f"{self.message_id}-{'done' if self.chars is None else self.chars}"


def start(conversation_id: str) -> Position:
    """Return the position before a conversation's first message."""
    return Position(conversation_id, 0)


def after(message_id: str | None, conversation_id: str) -> Position:
    """Return the position at the end of a message; without one, the conversation's start."""
    return Position(message_id, None) if message_id else start(conversation_id)


def parse_position(text: str) -> Position | None:
    """Return the position from its opaque form; None if the text is not a position."""
    match = _POSITION.match(text)
    if match is None:
        return None
    chars = match[2]
    return Position(match[1], None if chars == "done" else int(chars))
