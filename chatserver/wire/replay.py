"""What is stored, as the events of a stream: pure, no I/O."""

from datetime import datetime
from typing import NamedTuple

from chatserver import positions
from chatserver.positions import Position
from chatserver.records import After, Message, Newest, Record, Span
from chatserver.wire import sse


def iso(time: datetime) -> str:
    """Return a time as ISO 8601 in UTC with milliseconds and `Z`."""
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Page(NamedTuple):
    """What stored messages say after a position, as events: all of it, or as much as was read at once.

    `position` is the one after them; `more` is whether text or messages follow that are not in it; `ends` is whether
    the stream ends with it.
    """

    frames: list[bytes]
    position: Position
    more: bool = False
    ends: bool = False


def missed(record: Record, at: Position, until_done: bool) -> Page | None:
    """Return what the messages of a record say after a position; None if the position does not exist.

    :param record: as read by `span_after` the position, users' messages whole
    :param until_done: whether the stream ends after the first `done` or `error`
    """
    if not record.found:
        return None
    frames: list[bytes] = []
    position = at
    rest = record.following
    for message in record.messages:
        seen = at.chars or 0 if message.id == at.message_id else 0
        position = Position(message.id, None)
        if message.role != "assistant":
            if seen:
                return None
            frames.append(input_frame(message) if message.role == "user" else message_frame(message))
            continue
        if seen and record.length is not None and seen > record.length and message.error is None:
            # It has ended with less than this client saw, and a `done` would be a lie to it.
            return None
        chars = seen + len(message.content)
        if message.content:
            frames.append(sse.token_frame(message.id, chars, message.content))
        if rest is not None and rest.chars and message is record.messages[-1]:
            return Page(frames, Position(message.id, chars), more=True)
        frames.append(end_frame(message))
        if until_done:
            return Page(frames, position, ends=True)
    return Page(frames, position, more=rest is not None)


def span_after(position: Position, conversation_id: str) -> Span:
    """Return which messages follow a position."""
    return Newest() if position == positions.start(conversation_id) else After(*position)


def input_frame(message: Message) -> bytes:
    """Return the `input` of a user's message."""
    data = {"messageId": message.id, "text": message.content, "createdAt": iso(message.created_at)}
    return sse.frame("input", Position(message.id, None), data)


def message_frame(message: Message) -> bytes:
    """Return the `message` of another role than user and assistant, which another application stored."""
    data = {
        "messageId": message.id,
        "role": message.role,
        "text": message.content,
        "createdAt": iso(message.created_at),
    }
    return sse.frame("message", Position(message.id, None), data)


def end_frame(message: Message) -> bytes:
    """Return the `done` or `error` of a stored reply."""
    position = Position(message.id, None)
    if message.error is not None:
        data = {"code": message.error.code, "message": message.error.message, "messageId": message.id}
        return sse.frame("error", position, data)
    status = "complete" if message.status == "complete" else "stopped"
    return sse.frame("done", position, {"messageId": message.id, "status": status})
