"""Positions in a conversation, and the bytes of a Server-Sent Events stream. Pure: no I/O, no clock.

The stream's format is the WHATWG HTML standard's, section "Server-sent events". An event's `id` is the position right
after it; the text of its data is JSON, so that no line break of a message ever becomes one of the stream.
"""

import json
import re
from json.encoder import encode_basestring
from typing import Any, NamedTuple

_POSITION = re.compile(r"([0-9a-f]{24})-(done|0|[1-9][0-9]{0,8})\Z", re.ASCII)
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

KEEPALIVE = b":\n\n"
RESET = b"event: reset\nid:\ndata: {}\n\n"


class Position(NamedTuple):
    """How much of a conversation a client has seen: all before a message, and so much of that message.

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
    """Return the position that `text` is the opaque form of; None if it is none."""
    match = _POSITION.match(text)
    if match is None:
        return None
    chars = match[2]
    return Position(match[1], None if chars == "done" else int(chars))


def preamble(retry_ms: int, position: Position) -> bytes:
    """Return a stream's first bytes, which say how soon to reconnect, and from where if nothing else arrives.

    A block with an `id` but no data sets the client's last event id and dispatches nothing (HTML standard, 9.2.6).
    """
    return f"retry: {retry_ms}\n: chatserver\nid: {position}\n\n".encode()


def frame(event: str, position: Position, data: dict[str, Any]) -> bytes:
    """Return one event as bytes."""
    return f"id: {position}\nevent: {event}\ndata: {_encode(data)}\n\n".encode()


def token_frame(message_id: str, chars: int, text: str) -> bytes:
    """Return the `token` event that brings a reply to `chars` code points: the hot path of `frame`."""
    return f'id: {message_id}-{chars}\nevent: token\ndata: {{"text":{encode_basestring(text)}}}\n\n'.encode()
