"""What is stored, as the events of a stream: pure, no I/O."""

from datetime import datetime

from chatserver import sse
from chatserver.records import Message, Record
from chatserver.sse import Position


def iso(time: datetime) -> str:
    """Return a time as ISO 8601 in UTC with milliseconds and `Z`."""
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def missed(
    record: Record, at: Position, conversation_id: str, until_done: bool
) -> tuple[list[bytes], Position | None] | None:
    """Return the events of the stored messages after a position, and the position after them.

    :param until_done: whether to stop after the first `done` or `error`; then there is no position after it
    :return: None if the position does not exist
    """
    if not record.found:
        return None
    frames = []
    for message in record.messages:
        seen: int | None = 0
        if message.id == at.message_id:
            seen = at.chars
        if message.role == "user":
            if seen:
                return None
            if seen == 0:
                frames.append(input_frame(message))
            continue
        if seen is None:
            continue
        if seen > len(message.content) and message.error is None:
            # It has ended with less than this client saw, and a `done` would be a lie to it.
            return None
        if text := message.content[seen:]:
            frames.append(sse.token_frame(message.id, len(message.content), text))
        frames.append(end_frame(message))
        if until_done:
            return frames, None
    return frames, sse.after(record.last_id, conversation_id)


def input_frame(message: Message) -> bytes:
    """Return the `input` of a user's message."""
    data = {"messageId": message.id, "text": message.content, "createdAt": iso(message.created_at)}
    return sse.frame("input", Position(message.id, None), data)


def end_frame(message: Message) -> bytes:
    """Return the `done` or `error` of a stored reply."""
    position = Position(message.id, None)
    if message.error is not None:
        data = {"code": message.error.code, "message": message.error.message, "messageId": message.id}
        return sse.frame("error", position, data)
    status = "complete" if message.status == "complete" else "stopped"
    return sse.frame("done", position, {"messageId": message.id, "status": status})
