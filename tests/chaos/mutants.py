"""Servers that each break one promise: `python -m tests.chaos.mutants NAME`. The chaos program must catch each."""

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any

from chatserver import __main__ as server
from chatserver.hub import Hub, LiveConversation, LiveReply, Log
from chatserver.positions import Position
from chatserver.replies import publishing
from chatserver.replies.leases import Leases
from chatserver.replies.writer import Writer
from chatserver.store.retries import Retries
from chatserver.store.turns import Turns
from chatserver.tasks import Tasks
from chatserver.wire import sse


def post_stored_twice() -> None:
    """Idempotency keys are not stored, so that a repeated post is stored twice."""
    begin = Turns.start_turn

    async def without_key(self: Turns, turn: Any, content: str, _key: str | None, **options: Any) -> Any:
        return await begin(self, turn, content, None, **options)

    Turns.start_turn = without_key  # type: ignore[assignment, method-assign]


def retry_stored_twice() -> None:
    """Idempotency keys of retries are not stored, so that a repeated retry starts another reply."""
    begin = Retries.start_retry

    async def without_key(self: Retries, conversation: Any, reply_id: str, message_id: str | None, _key: Any) -> Any:
        return await begin(self, conversation, reply_id, message_id)

    Retries.start_retry = without_key  # type: ignore[assignment, method-assign]


def head_not_sent() -> None:
    """A branch begins, or is shown, without a `head`, except on streams that are opened later."""

    def without_frame(self: Log, message_id: str | None) -> None:
        self.head = message_id

    Log.append_head = without_frame  # type: ignore[method-assign]


def done_before_the_write() -> None:
    """The end is sent at once, and stored two seconds later."""
    finish, tasks = Writer._finish, Tasks()

    async def early(self: Writer, message: Any) -> Any:
        async def later() -> None:
            await asyncio.sleep(2.0)
            await finish(self, message)

        tasks.spawn(later())
        return message

    Writer._finish = early  # type: ignore[method-assign]


def text_repeated_on_resume() -> None:
    """A position in a running reply is located one character too early."""
    locate = Log.locate

    def before(self: Log, position: Position) -> Any:
        if position.chars:
            position = Position(position.message_id, position.chars - 1)
        return locate(self, position)

    Log.locate = before  # type: ignore[method-assign]


def expired_replies_ignored() -> None:
    """No server finishes the replies of a dead server."""

    async def nothing(*_: Any, **__: Any) -> bool:
        await asyncio.sleep(0.05)
        return False

    Leases.finish_expired = nothing  # type: ignore[assignment, method-assign]
    Leases.finish_from_checkpoint = nothing  # type: ignore[method-assign]


def rare_checkpoints() -> None:
    """Checkpoints are taken every second instead of every quarter of a second."""
    os.environ |= {"CHECKPOINT_MS": "1000", "LEASE_MS": "3000"}


def end_not_sent_at_shutdown() -> None:
    """Streams end without the end of the replies that the shutdown interrupts."""
    publish_end = publishing.publish_end

    def skipped(hub: Hub, live: LiveConversation, reply: LiveReply, stored: Any) -> None:
        if stored is None or stored.status != "interrupted":
            publish_end(hub, live, reply, stored)

    publishing.publish_end = skipped


def deletion_not_sent() -> None:
    """The streams of a conversation that is deleted while a reply runs receive no reset."""
    LiveConversation.reset = lambda self: None  # type: ignore[method-assign]


def position_first() -> None:
    """A frame begins with its `id`, so that a client may have stored the position of a frame that is aborted."""

    def moved(frame: bytes) -> bytes:
        head, _, position = frame.removesuffix(b"\n").rpartition(b"\nid: ")
        return b"id: " + position + head + b"\n\n"

    frame, token_frame = sse.frame, sse.token_frame
    sse.frame = lambda *event: moved(frame(*event))
    sse.token_frame = lambda *token: moved(token_frame(*token))


def last_chunk_within_reply() -> None:
    """Streams that end without the end of an interrupted reply end with the last chunk nevertheless."""
    end_not_sent_at_shutdown()
    LiveConversation.is_complete_for = lambda self, subscriber: True  # type: ignore[method-assign]


MUTANTS: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        post_stored_twice,
        retry_stored_twice,
        head_not_sent,
        done_before_the_write,
        text_repeated_on_resume,
        expired_replies_ignored,
        rare_checkpoints,
        end_not_sent_at_shutdown,
        deletion_not_sent,
        position_first,
        last_chunk_within_reply,
    )
}

if __name__ == "__main__":
    MUTANTS[sys.argv.pop(1)]()
    sys.exit(server.main())
