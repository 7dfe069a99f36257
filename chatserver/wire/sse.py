"""Our stream format: Server-Sent Events, as docs/protocol.md defines them.

The framing is the WHATWG HTML standard's, section "Server-sent events". An event's `id` is the position right after it.
It is the last line of its frame: clients that store an `id` as soon as its line arrives (npm eventsource 2,
fetch-event-source) would otherwise skip the event's text when the connection breaks inside the frame. For them one
gap remains, right before the line break that ends the frame. The data is JSON, so that no line break of a message
ends a line of the stream; U+0085, U+2028 and U+2029 are escaped, too, since some clients split lines there.
"""

import json
from json.encoder import encode_basestring
from typing import Any

from chatserver.positions import Position
from chatserver.records import Message
from chatserver.wire import iso

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

RETRY_MS = 1000
"""The delay in milliseconds before a client reconnects."""
FRAME_END = b"\n\n"
RESET = b"event: reset\ndata: {}\nid:\n\n"


def opening(position: Position, keepalive_s: float) -> bytes:
    """Return a stream's first bytes: the reconnection delay, the position to resume from, and a keep-alive.

    A block with an `id` but no data sets the client's last event id and dispatches nothing (HTML standard, 9.2.6). It
    has an event name of its own for clients that dispatch it nevertheless. The keep-alive announces that more follow.
    """
    return f"retry: {RETRY_MS}\n: chatserver\nevent: stream\nid: {position}\n\n".encode() + ping(keepalive_s)


def message_frame(message: Message) -> bytes:
    """Return the `input` of a user's message, or the `message` of another role, which another application stored."""
    is_input = message.role == "user"
    data = {
        "messageId": message.id,
        **({} if is_input else {"role": message.role}),
        "text": message.content,
        "createdAt": iso(message.created_at),
    }
    return frame("input" if is_input else "message", Position(message.id, None), data)


def token_frame(message_id: str, chars: int, text: str) -> bytes:
    """Return the `token` that brings a reply to `chars` code points: `frame`, but faster."""
    data = _escape(encode_basestring(text))
    return f'event: token\ndata: {{"text":{data}}}\nid: {message_id}-{chars}\n\n'.encode()


def end_frame(message: Message) -> bytes:
    """Return the `done` or `error` of a stored reply."""
    position = Position(message.id, None)
    if message.error is not None:
        data = {"code": message.error.code, "message": message.error.message, "messageId": message.id}
        return frame("error", position, data)
    status = "complete" if message.status == "complete" else "stopped"
    return frame("done", position, {"messageId": message.id, "status": status})


def head_frame(message_id: str | None) -> bytes:
    """Return a `head`. Without an `id`, it leaves the position as it is."""
    return f"event: head\ndata: {_encode({'messageId': message_id})}\n\n".encode()


def title_frame(title: str | None) -> bytes:
    """Return a `title`. Without an `id`, it leaves the position as it is."""
    return f"event: title\ndata: {_escape(_encode({'title': title}))}\n\n".encode()


def ping(every_s: float) -> bytes:
    """Return a `ping`, which announces the interval of keep-alives on a quiet stream in seconds."""
    return f'event: ping\ndata: {{"everyS":{every_s:g}}}\n\n'.encode()


def frame(event: str, position: Position, data: dict[str, Any]) -> bytes:
    """Return one event."""
    return f"event: {event}\ndata: {_escape(_encode(data))}\nid: {position}\n\n".encode()


def _escape(text: str) -> str:
    """Escape the characters beyond ASCII in JSON at which some clients end a line."""
    if text.isascii():
        return text
    return text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
