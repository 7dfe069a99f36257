"""Conversations over HTTP: JSON in, a use case, JSON out."""

import json
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import regex

from chatserver.branches import Parent, Tree
from chatserver.errors import (
    ConversationFull,
    DatabaseUnavailable,
    Draining,
    InvalidId,
    InvalidRequest,
    KeyReused,
    NoSuchConversation,
    NotAReply,
    NotFound,
    NothingToRetry,
    QuotaExceeded,
    ReplyInProgress,
    TooManyReplies,
    UnsupportedConversation,
)
from chatserver.handlers.base import BaseHandler
from chatserver.handlers.body import BODY_ERRORS
from chatserver.handlers.problems import raises
from chatserver.handlers.ratelimit import rate_limit_headers
from chatserver.positions import Position
from chatserver.reading import History, Part
from chatserver.records import Key, Message, Place, Summary, Turn
from chatserver.wire import iso

_TURN_ERRORS = (
    ReplyInProgress,
    ConversationFull,
    UnsupportedConversation,
    QuotaExceeded,
    TooManyReplies,
    DatabaseUnavailable,
    Draining,
)
TITLE_CHARS = 60
_EARLIEST = 2**63
"""Milliseconds before 1970 of MongoDB's earliest date."""
_encode = json.JSONEncoder(ensure_ascii=False).encode


class TurnHandler(BaseHandler):
    """A route that starts turns. Accepted and refused turns are answered with the state of the owner's limits."""

    def common_headers(self) -> dict[str, str]:
        headers = super().common_headers()
        if self.get_status() in (202, QuotaExceeded.status):
            headers |= rate_limit_headers(self.services.chat.quotas(self.caller.owner))
        return headers

    def accept(self, turn: Turn) -> None:
        """Answer with a turn whose reply is running."""
        self.log_fields |= {"conversation": turn.conversation.id, "reply": turn.reply_id}
        value = {
            "conversationId": turn.conversation.id,
            "status": "streaming",
            "messageId": turn.message_id,
            "replyId": turn.reply_id,
            "lastEventId": str(Position(turn.reply_id, 0)),
        }
        self.send_json(value, 202)


class ConversationsHandler(TurnHandler):
    """`/chat`"""

    @raises(*BODY_ERRORS, *_TURN_ERRORS, NotFound, KeyReused)
    async def post(self) -> None:
        """Send a message: 202 as soon as it is durably stored."""
        body = self.json_body("say")
        known = body.get("conversationId")
        parent = Parent(_lower(body["parentId"])) if "parentId" in body else None
        turn = await self.services.chat.say(
            self.caller.owner, _lower(known), body["input"], self.idempotency_key(), parent
        )
        self.accept(turn)

    @raises(InvalidRequest, DatabaseUnavailable)
    async def get(self) -> None:
        """List the conversations, the latest activity first."""
        query = self.query("list")
        limit = query.get("limit", 20)
        after = _parse_cursor(query["cursor"]) if "cursor" in query else None
        found = await self.services.reading.summaries(self.caller.owner, limit + 1, after)
        page: dict[str, Any] = {"conversations": [_summary(each) for each in found[:limit]]}
        if len(found) > limit:
            page["nextCursor"] = _cursor(found[limit - 1].place)
        self.send_json(page)

    head = get


class ExportHandler(BaseHandler):
    """`/chat/export`"""

    @raises(DatabaseUnavailable)
    async def get(self) -> None:
        """Return all conversations of the caller, one a line."""
        await self.send_chunks(_export(self.services.reading.export(self.caller.owner)), "application/x-ndjson")

    head = get


class ConversationHandler(BaseHandler):
    """`/chat/:conversationId`"""

    @raises(InvalidRequest, InvalidId, NotFound, DatabaseUnavailable)
    async def get(self, conversation_id: str) -> None:
        """Return the history, including a running reply."""
        conversation = self.key(conversation_id)
        query = self.query("history")
        before, limit, all_branches = _lower(query.get("before")), query.get("limit"), query.get("branches") == "all"
        paged = before is not None or limit is not None
        if paged and all_branches:
            raise InvalidRequest("The parameter branches cannot be combined with limit or before.")
        history = await self.services.reading.history(conversation, limit, before, all_branches=all_branches)
        await self.send_chunks(_history(conversation.id, history, paged=paged, all_branches=all_branches))

    head = get

    @raises(InvalidId, *BODY_ERRORS, NotFound, ConversationFull, DatabaseUnavailable)
    async def patch(self, conversation_id: str) -> None:
        """Rename the conversation."""
        conversation = self.key(conversation_id)
        body = self.json_body("rename")
        self.send_json(_summary(await self.services.chat.rename(conversation, body["title"])))

    @raises(InvalidRequest, InvalidId, NotFound, DatabaseUnavailable)
    async def delete(self, conversation_id: str) -> None:
        """Delete the conversation."""
        await self.services.chat.delete(self.key(conversation_id))
        self.set_status(204)
        self.finish()


class StopHandler(BaseHandler):
    """`/chat/:conversationId/stop`"""

    @raises(InvalidId, *BODY_ERRORS, NotFound, DatabaseUnavailable)
    async def post(self, conversation_id: str) -> None:
        """Stop the running reply."""
        conversation = self.key(conversation_id)
        self.json_body("empty")
        reply_id = await self.services.chat.stop(conversation)
        self.send_json({"status": "stopping", "messageId": reply_id} if reply_id else {"status": "idle"}, 202)


class RetryHandler(TurnHandler):
    """`/chat/:conversationId/retry`"""

    @raises(InvalidId, *BODY_ERRORS, *_TURN_ERRORS, NotFound, NotAReply, NothingToRetry, KeyReused)
    async def post(self, conversation_id: str) -> None:
        """Start another version of a reply."""
        conversation = self.key(conversation_id)
        message_id = _lower(self.json_body("retry").get("messageId"))
        self.accept(await self.services.chat.retry(conversation, message_id, self.idempotency_key()))


class HeadHandler(BaseHandler):
    """`/chat/:conversationId/head`"""

    @raises(
        *(InvalidId, *BODY_ERRORS, NotFound),
        *(ReplyInProgress, ConversationFull, UnsupportedConversation, DatabaseUnavailable),
    )
    async def put(self, conversation_id: str) -> None:
        """Show another branch."""
        conversation = self.key(conversation_id)
        message_id = self.json_body("head")["messageId"].lower()
        head = await self.services.chat.show(conversation, message_id)
        self.send_json({"conversationId": conversation.id, "messageId": head})


def _lower(id_: str | None) -> str | None:
    return None if id_ is None else id_.lower()


async def _history(conversation_id: str, history: History, *, paged: bool, all_branches: bool) -> AsyncIterator[bytes]:
    """Yield a history's JSON text, part by part."""
    tree = history.tree
    head: dict[str, Any] = {
        "conversationId": conversation_id,
        "createdAt": iso(history.created_at),
        "updatedAt": iso(history.updated_at),
        "status": "streaming" if history.streaming else "idle",
    }
    if history.view.title is not None:
        head["title"] = history.view.title
    if all_branches and tree is not None:
        head["head"] = tree.head
    yield f'{_encode(head)[:-1]}, "messages": ['.encode()
    position, separator = None, ""
    render = partial(_message, tree=tree, all_branches=all_branches)
    async for part in history.parts:
        yield _part(part, separator, render)
        position = part.position
        separator = ", " if part.messages else separator
    tail: dict[str, Any] = {"lastEventId": str(position)}
    if paged:
        tail["hasMore"] = history.has_more
    yield f"], {_encode(tail)[1:]}\n".encode()


async def _export(conversations: AsyncIterator[tuple[Key, History]]) -> AsyncIterator[bytes]:
    """Yield the JSON texts of histories, each a line.

    :raises DatabaseUnavailable: if a conversation is deleted after the beginning of its line
    """
    async for conversation, history in conversations:
        try:
            async for text in _history(conversation.id, history, paged=False, all_branches=True):
                yield text
        except NoSuchConversation:
            raise DatabaseUnavailable("A conversation was deleted while it was being exported. Try again.") from None


def _part(part: Part, separator: str, render: Callable[[Message], dict[str, Any]]) -> bytes:
    """Return the JSON text of some messages.

    :param separator: precedes the part, unless it continues a message
    """
    texts = [_encode(render(each)) for each in part.messages]
    # Neither delimiter occurs in the text of a message, where quotation marks are escaped.
    if part.continues:
        separator, texts[0] = "", texts[0].partition('"content": "')[2]
    if part.breaks_off:
        texts[-1] = texts[-1].rpartition('", "createdAt"')[0]
    return f"{separator if texts else ''}{', '.join(texts)}".encode()


def _message(message: Message, tree: Tree | None, *, all_branches: bool) -> dict[str, Any]:
    """Return a message as JSON.

    :param tree: None if no message has siblings
    :param all_branches: whether it is one of all branches, and names its parent instead of its siblings
    """
    value: dict[str, Any] = {
        "id": message.id,
        "role": message.role,
        "content": message.content,
        "createdAt": iso(message.created_at),
        "status": message.status,
    }
    if message.error is not None:
        value["error"] = message.error._asdict()
    if tree is not None and all_branches:
        value["parentId"] = tree.parent(message.id)
    elif tree is not None and len(siblings := tree.siblings(message.id)) > 1:
        value["siblings"] = siblings
    return value


def _summary(summary: Summary) -> dict[str, Any]:
    return {
        "conversationId": summary.id,
        "title": summary.title or _title(summary.beginning, summary.is_truncated),
        "createdAt": iso(summary.created_at),
        "updatedAt": iso(summary.updated_at),
        "messageCount": summary.message_count,
        "status": "streaming" if summary.streaming else "idle",
    }


def _title(text: str, is_truncated: bool) -> str:
    """Return the first words of a text, truncated between grapheme clusters (user-perceived characters).

    :param is_truncated: whether the text is truncated, so that its last cluster may be incomplete
    """
    characters = regex.findall(r"\X", " ".join(text.split()))
    if is_truncated:
        del characters[-1:]
    elif len(characters) <= TITLE_CHARS:
        return "".join(characters)
    title = "".join(characters[:TITLE_CHARS])
    return (title.rpartition(" ")[0] or title) + "…"


def _cursor(place: Place) -> str:
    """Return a place in the list as opaque text of a fixed length.

    The first letter distinguishes it from the cursors of earlier versions, which had another order.
    """
    time = 0 if place.updated_ms is None else place.updated_ms + _EARLIEST
    return f"{'n' if place.updated_ms is None else 'u'}{time:016x}-{place.id}"


def _parse_cursor(cursor: str) -> Place:
    return Place(int(cursor[1:17], 16) - _EARLIEST if cursor[0] == "u" else None, cursor[18:])
