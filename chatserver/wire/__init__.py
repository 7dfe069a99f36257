"""Stream formats: the bytes of events. Pure: no I/O, no clock.

Nothing outside this package makes the bytes of a stream. Each format is a module, or another object, that satisfies
`Format`; `sse` is ours. `replay` renders stored messages in any format. `chunked` is HTTP's framing around all of them.
"""

from datetime import datetime
from typing import Protocol

from chatserver.positions import Position
from chatserver.records import Message


class Format(Protocol):
    """A stream format. Its frames are encoded once for all subscribers, so they depend on nothing but the arguments."""

    FRAME_END: bytes
    """The bytes that end each frame, and that occur nowhere else in it."""
    RESET: bytes
    """The frame after which the client must fetch the history again, because its position is unknown."""

    def opening(self, position: Position, keepalive_s: float) -> bytes:
        """Return a stream's first bytes, before any event.

        :param position: the position to resume from if nothing else arrives
        :param keepalive_s: the interval of keep-alives in seconds
        """

    def message_frame(self, message: Message) -> bytes:
        """Return the frame of a whole message that is not a reply: a user's, or another application's."""

    def token_frame(self, message_id: str, chars: int, text: str) -> bytes:
        """Return the frame of a reply's next text. Called for every token.

        :param chars: the code points of the reply up to the end of this text
        """

    def end_frame(self, message: Message) -> bytes:
        """Return the frame of a reply's end, as stored."""

    def head_frame(self, message_id: str | None) -> bytes:
        """Return the frame that says where the visible conversation ends; None for before the first message."""

    def title_frame(self, title: str | None) -> bytes:
        """Return the frame of a title that a user chose; None for the automatic one."""

    def ping(self, every_s: float) -> bytes:
        """Return a keep-alive, which announces the interval of keep-alives in seconds."""


def iso(time: datetime) -> str:
    """Return a time as ISO 8601 in UTC with milliseconds and `Z`."""
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
