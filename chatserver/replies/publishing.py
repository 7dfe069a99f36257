"""Publishing: a reply's start, its text and its end, into the live conversation that subscribers read."""

from chatserver import positions
from chatserver.hub import Hub, LiveConversation, LiveReply
from chatserver.records import Message, StartedTurn


def publish_start(live: LiveConversation, started: StartedTurn) -> LiveReply:
    """Publish the user's message of a turn, if it is new, and the title; open the reply and return it."""
    previous = positions.after(started.previous_id, live.key.id)
    parent = started.parent if started.new_message is None else started.new_message.parent
    live.open_turn(previous, started.new_message, started.turn.reply_id, started.created_at, parent)
    live.rename(started.title)
    assert live.reply is not None
    return live.reply


def publish_text(live: LiveConversation, reply: LiveReply, text: str, room: int | None = None) -> bool:
    """Add text to a running reply.

    :param room: the reply's maximum size in bytes (UTF-8)
    :return: whether all of the text was added; False if it was truncated to fit
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        text = replace_surrogates(text)
        size = len(text.encode())
    if room is not None and reply.size + size > room:
        if text := text.encode()[: room - reply.size].decode(errors="ignore"):
            live.append(text, len(text.encode()))
        return False
    if text:
        live.append(text, size)
    return True


def publish_end(hub: Hub, live: LiveConversation, reply: LiveReply, stored: Message | None) -> None:
    """Publish the end of a running reply as the database has it, and forget the conversation if it is unused.

    :param stored: None if the database has no such message
    """
    if stored is None or (stored.content != reply.content and stored.error is None):
        # Deleted, or ended by another server with less text than was published here: clients must fetch the history.
        live.reset()
    else:
        live.finish(stored)
    hub.release(live)


def replace_surrogates(text: str) -> str:
    """Return text without halves of surrogate pairs: a source may send them, but UTF-8 and BSON cannot encode them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
