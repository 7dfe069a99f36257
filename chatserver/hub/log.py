"""The log: the frames of a conversation's current turn in one stream format, and the position of each."""

from array import array
from bisect import bisect_left
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from chatserver.positions import Position
from chatserver.records import Message
from chatserver.wire import Format, chunked

MAX_WRITE = 128 * 1024
"""Bytes passed to a connection at once: the most that the server buffers for a client that stops reading."""
_KEPT_TURN = 256 * 1024
"""Bytes of an ended turn that are kept for slow subscribers when the next turn starts."""


class LiveReply:
    """The text of a reply that is running, or has just ended."""

    def __init__(self, message_id: str, created_at: datetime) -> None:
        self.message_id = message_id
        self.created_at = created_at
        self.chars = 0
        self.size = 0
        """Bytes of the text in UTF-8."""
        self._parts: list[str] = []

    @property
    def content(self) -> str:
        """The text so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def append(self, text: str, size: int) -> int:
        """Add text of `size` bytes (UTF-8); return the reply's new length in code points."""
        self._parts.append(text)
        self.size += size
        self.chars = chars = self.chars + len(text)
        return chars


class ResumePoint(NamedTuple):
    """Where a position lies in a log: the offset to continue from, after sending `before` (the rest of a frame).

    `head` is the message at the end of the visible conversation there.
    """

    offset: int
    head: str | None
    before: bytes = b""


@dataclass(slots=True)
class Piece:
    """A run of whole frames of a log, copied and wrapped as a chunk once for all subscribers at its start."""

    begin: int
    end: int
    data: bytes
    events: int
    chunk: bytes


_NO_PIECE = Piece(-1, -1, b"", 0, b"")


@dataclass(slots=True)
class _Entry:
    """A message in the log: the offsets of its frames, and its reply (None: another message)."""

    message_id: str
    parent_id: str | None
    begin: int
    reply: LiveReply | None
    end: int | None = None
    """None while the reply runs."""
    failed: bool = False
    char_ends: "array[int]" = field(default_factory=lambda: array("Q", [0]))
    """The code points of the reply up to the end of each frame, and 0 for the start."""
    byte_ends: "array[int]" = field(default_factory=lambda: array("Q"))
    """The offset at the end of each frame, and that of the start."""

    def __post_init__(self) -> None:
        self.byte_ends.append(self.begin)


class Log:
    """The frames of the current turn, each encoded once, as one run of bytes.

    Offsets count from the conversation's first frame in this process, so that they stay valid when the front of the log
    is dropped. Most subscribers need `piece` next; it starts at a frame.
    """

    # As in `LiveConversation`.
    __slots__ = ("_data", "_entries", "_tail", "base", "end", "format", "head", "piece")

    def __init__(self, stream_format: Format) -> None:
        self.format = stream_format
        self.base = 0
        """The offset of the first byte kept."""
        self.end = 0
        """Always `base` plus the bytes kept; each delivery reads it several times."""
        self.piece = _NO_PIECE
        self.head: str | None = None
        """The message at the end of the visible conversation, after all frames."""
        self._tail: Position | None = None
        """The position at `base`."""
        self._data = bytearray()
        self._entries: list[_Entry] = []

    def __len__(self) -> int:
        return len(self._data)

    @property
    def position(self) -> Position | None:
        """The position at the end; None while nothing is known of the conversation."""
        if not self._entries:
            return self._tail
        entry = self._entries[-1]
        chars = entry.reply.chars if entry.reply is not None and entry.end is None else None
        return Position(entry.message_id, chars)

    # -- writing -------------------------------------------------------------------------------------------------

    def append_head(self, message_id: str | None) -> None:
        """Append that the visible conversation ends at a message, or before the first one."""
        self.head = message_id
        self._append_frame(self.format.head_frame(message_id), delivered=False)

    def append_title(self, title: str | None) -> None:
        """Append the title that a user chose; None for the automatic one."""
        self._append_frame(self.format.title_frame(title), delivered=False)

    def append_message(self, message: Message, parent_id: str | None, *, delivered: bool) -> None:
        """Append a whole message that is not a reply; see `append` for `delivered`."""
        self._open(message.id, parent_id, None)
        self.append(self.format.message_frame(message), 0, delivered)
        self._entries[-1].end = self.end

    def open_reply(self, reply: LiveReply, parent_id: str | None) -> None:
        """Assign the next frames to a reply."""
        self._open(reply.message_id, parent_id, reply)

    def _open(self, message_id: str, parent_id: str | None, reply: LiveReply | None) -> None:
        """Assign the next frames to a message, after a head if it does not continue the visible conversation."""
        if parent_id != self.head:
            self.append_head(parent_id)
        self._entries.append(_Entry(message_id, parent_id, self.end, reply))
        self.head = message_id

    def close_reply(self, message: Message, *, delivered: bool) -> None:
        """Append the end of the running reply, as stored; see `append` for `delivered`."""
        entry = self._entries[-1]
        assert entry.reply is not None
        self.append(self.format.end_frame(message), entry.reply.chars, delivered)
        entry.end, entry.failed = self.end, message.error is not None

    def append(self, frame: bytes, chars: int, delivered: bool) -> None:
        """Append a frame of the last message. Called for every token.

        :param chars: the code points of the reply up to the end of this frame
        :param delivered: whether every frame before was delivered
        """
        self._append_frame(frame, delivered)
        entry = self._entries[-1]
        entry.char_ends.append(chars)
        entry.byte_ends.append(self.end)

    def _append_frame(self, frame: bytes, delivered: bool) -> None:
        begin = self.end
        self._data += frame
        self.end = end = begin + len(frame)
        # When all is delivered, every up-to-date cursor is at this frame's start, so it is the next piece.
        self.piece = Piece(begin, end, frame, 1, chunked.chunk(frame)) if delivered else _NO_PIECE

    # -- reading -------------------------------------------------------------------------------------------------

    def locate(self, position: Position) -> ResumePoint | None:
        """Return where a position lies in the log; None if it does not, or not yet.

        A stream that starts there opens with the head and the title: their frames before the next message are skipped.
        """
        if position == self._tail:
            return self._before(0)
        for index, entry in enumerate(self._entries):
            if entry.message_id != position.message_id:
                continue
            if position.chars is None:
                return None if entry.end is None else self._before(index + 1)
            if position.chars == 0:
                return self._before(index)
            if entry.reply is None:
                return None
            if position.chars > entry.reply.chars and not entry.failed:
                # Not yet written; or the reply has ended with less text than this client saw: `done` would be wrong.
                return None
            return self._locate_in_reply(entry, entry.reply, min(position.chars, entry.reply.chars))
        return None

    def _before(self, index: int) -> ResumePoint:
        """Return the point right before a message, which is given by its index, or at the end of the log."""
        if index == len(self._entries):
            return ResumePoint(self.end, self.head)
        return ResumePoint(self._entries[index].begin, self._entries[index].parent_id)

    def _locate_in_reply(self, entry: _Entry, reply: LiveReply, chars: int) -> ResumePoint:
        index = bisect_left(entry.char_ends, chars)
        offset, end = entry.byte_ends[index], entry.char_ends[index]
        if end == chars:
            return ResumePoint(offset, reply.message_id)
        return ResumePoint(
            offset, reply.message_id, self.format.token_frame(reply.message_id, end, reply.content[chars:end])
        )

    def end_of_reply_after(self, offset: int) -> int | None:
        """Return the offset at the end of the first reply that ends after an offset; None if none has."""
        return next((each.end for each in self._entries if each.reply and each.end and each.end > offset), None)

    def piece_at(self, begin: int) -> Piece:
        """Return the piece at an offset, and keep it for the next subscriber: whole frames, about `MAX_WRITE` at most.

        A longer frame is a piece by itself.
        """
        frame_end = self.format.FRAME_END
        first, last = begin - self.base, len(self._data)
        if last - first > MAX_WRITE:
            found = self._data.rfind(frame_end, first, first + MAX_WRITE)
            if found < 0:
                found = self._data.find(frame_end, first)
            last = found + len(frame_end)
        data = bytes(memoryview(self._data)[first:last])
        self.piece = Piece(begin, self.base + last, data, self.count_events(data), chunked.chunk(data))
        return self.piece

    def count_events(self, frames: bytes) -> int:
        """Return the number of events in whole frames."""
        return frames.count(self.format.FRAME_END)

    # -- dropping ------------------------------------------------------------------------------------------------

    def drop(self, position: Position | None) -> None:
        """Drop all frames; the end is at a position from now on (None: unknown)."""
        self._drop_before(self.end, position)

    def drop_ended_turns(self) -> None:
        """Drop the ended turns, but keep the last one if it is short, so that slow subscribers can finish it."""
        ended = [entry for entry in self._entries if entry.reply is not None]
        before_last = ended[-2].end if len(ended) > 1 else self.base
        assert before_last is not None
        if self.end - before_last > _KEPT_TURN:
            self.drop(self.position)
        elif before_last > self.base:
            self._drop_before(before_last, Position(ended[-2].message_id, None))

    def _drop_before(self, offset: int, tail: Position | None) -> None:
        # At the end no entry is left, not even that of a reply that was replaced before its first frame.
        self._entries = [entry for entry in self._entries if entry.begin >= offset and offset < self.end]
        del self._data[: offset - self.base]
        self.base, self._tail = offset, tail
        self.piece = _NO_PIECE
