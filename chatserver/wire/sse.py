"""The bytes of a Server-Sent Events stream. Pure: no I/O, no clock.

The format is the WHATWG HTML standard's, section "Server-sent events". An event's `id` is the position right after it.
It is the last line of its frame: clients that store an `id` as soon as its line arrives (npm eventsource 2,
fetch-event-source) would otherwise skip the event's text when the connection breaks inside the frame. For them one
place is left, right before the line break that ends the frame. The data is JSON, so that no line break of a message
ends a line of the stream; U+0085, U+2028 and U+2029 are escaped, too, since some clients split lines there.
"""

import json
from json.encoder import encode_basestring
from typing import Any

from chatserver.positions import Position

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

RESET = b"event: reset\ndata: {}\nid:\n\n"
LAST_CHUNK = b"0\r\n\r\n"
"""The end of a chunked body (RFC 9112, 7.1). A body that ends without it was cut off."""


def preamble(retry_ms: int, position: Position) -> bytes:
    """Return a stream's first bytes: how soon to reconnect, and the position to resume from if nothing else arrives.

    A block with an `id` but no data sets the client's last event id and dispatches nothing (HTML standard, 9.2.6). It
    has an event name of its own for clients that dispatch it nevertheless.
    """
    return f"retry: {retry_ms}\n: chatserver\nevent: stream\nid: {position}\n\n".encode()


def ping(every_s: float) -> bytes:
    """Return a keep-alive, which announces that a quiet stream has one every so many seconds."""
    return f'event: ping\ndata: {{"everyS":{every_s:g}}}\n\n'.encode()


def frame(event: str, position: Position, data: dict[str, Any]) -> bytes:
    """Return one event as bytes."""
    return f"event: {event}\ndata: {_escape(_encode(data))}\nid: {position}\n\n".encode()


def token_frame(message_id: str, chars: int, text: str) -> bytes:
    """Return the `token` event that brings a reply to `chars` code points: the hot path of `frame`."""
    data = _escape(encode_basestring(text))
    return f'event: token\ndata: {{"text":{data}}}\nid: {message_id}-{chars}\n\n'.encode()


def chunk(data: bytes) -> bytes:
    """Return bytes, at least one, as a chunk of a chunked body (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def _escape(text: str) -> str:
    """Return JSON without the characters beyond ASCII at which some clients end a line."""
    if text.isascii():
        return text
    return text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
