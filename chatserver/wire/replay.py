"""Stored messages as a stream's frames, in any format."""

from dataclasses import dataclass, field

from chatserver import positions
from chatserver.positions import Position
from chatserver.records import After, All, Record, Span
from chatserver.wire import Format


@dataclass(slots=True)
class Page:
    """The frames of the stored messages after a position, as far as one read returned them.

    `position` is the position after these frames; `first_head` and `head` are the messages at which the visible
    conversation ends before and after them; `more` is whether stored text or messages follow; `ends` is whether the
    stream ends with them.
    """

    position: Position
    first_head: str | None
    head: str | None
    frames: list[bytes] = field(default_factory=list)
    more: bool = False
    ends: bool = False


def span_after(position: Position, conversation_id: str) -> Span:
    """Return which messages follow a position."""
    return All() if position == positions.start(conversation_id) else After(*position)


def page_after(position: Position, record: Record, stream_format: Format, *, until_done: bool) -> Page | None:
    """Return the page of a record's messages after a position; None if the position does not exist.

    :param record: as read by `span_after` the position, users' messages whole
    :param until_done: whether the stream ends after the first `done` or `error`
    """
    if not record.found:
        return None
    head = _head_at(position, record)
    page = Page(position, head, head)
    rest = record.following
    for message in record.messages:
        seen = position.chars or 0 if message.id == position.message_id else 0
        if record.tree is not None and not seen and (parent := record.tree.parent(message.id)) != page.head:
            page.frames.append(stream_format.head_frame(parent))
        page.position, page.head = Position(message.id, None), message.id
        if message.role != "assistant":
            if seen:
                return None
            page.frames.append(stream_format.message_frame(message))
            continue
        if seen and record.length is not None and seen > record.length and message.error is None:
            # The reply has ended with less text than this client saw, and `done` would be wrong.
            return None
        chars = seen + len(message.content)
        if message.content:
            page.frames.append(stream_format.token_frame(message.id, chars, message.content))
        if rest is not None and rest.chars and message is record.messages[-1]:
            page.position, page.more = Position(message.id, chars), True
            return page
        page.frames.append(stream_format.end_frame(message))
        if until_done:
            page.ends = True
            return page
    page.more = rest is not None
    return page


def _head_at(position: Position, record: Record) -> str | None:
    """Return the message at which the visible conversation ends at a position.

    :param record: as read by `span_after` the position
    """
    first = record.messages[0].id if record.messages else None
    if position.chars and first == position.message_id:
        return first
    return record.view.head if first is None or record.tree is None else record.tree.parent(first)
