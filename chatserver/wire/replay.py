"""Stored messages as a stream's frames, in any format."""

from typing import NamedTuple

from chatserver import positions
from chatserver.positions import Position
from chatserver.records import After, Newest, Record, Span
from chatserver.wire import Format


class Page(NamedTuple):
    """The frames of the stored messages after a position, as far as one read returned them.

    `position` is the position after these frames; `more` is whether stored text or messages follow; `ends` is whether
    the stream ends with them.
    """

    frames: list[bytes]
    position: Position
    more: bool = False
    ends: bool = False


def span_after(position: Position, conversation_id: str) -> Span:
    """Return which messages follow a position."""
    return Newest() if position == positions.start(conversation_id) else After(*position)


def page_after(position: Position, record: Record, stream_format: Format, *, until_done: bool) -> Page | None:
    """Return the page of a record's messages after a position; None if the position does not exist.

    :param record: as read by `span_after` the position, users' messages whole
    :param until_done: whether the stream ends after the first `done` or `error`
    """
    if not record.found:
        return None
    frames: list[bytes] = []
    end = position
    rest = record.following
    for message in record.messages:
        seen = position.chars or 0 if message.id == position.message_id else 0
        end = Position(message.id, None)
        if message.role != "assistant":
            if seen:
                return None
            frames.append(stream_format.message_frame(message))
            continue
        if seen and record.length is not None and seen > record.length and message.error is None:
            # The reply has ended with less text than this client saw, and `done` would be wrong.
            return None
        chars = seen + len(message.content)
        if message.content:
            frames.append(stream_format.token_frame(message.id, chars, message.content))
        if rest is not None and rest.chars and message is record.messages[-1]:
            return Page(frames, Position(message.id, chars), more=True)
        frames.append(stream_format.end_frame(message))
        if until_done:
            return Page(frames, end, ends=True)
    return Page(frames, end, more=rest is not None)
