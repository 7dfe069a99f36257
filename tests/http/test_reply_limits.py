"""Replies that are too long or empty, or that fill their document."""

import pytest

from chatserver.store import turns
from tests.apps import MakeApp, Script
from tests.clients import text_of
from tests.http.turns import document

pytestmark = pytest.mark.gen_test


async def test_reply_beyond_the_limit_fails_and_keeps_its_text(make_app: MakeApp) -> None:
    source = Script("é😀" * 20, "é" * 30, "never")
    app = await make_app(source=source, max_reply_chars=50)
    answer, events = await app.client.turn("Hello")
    assert events[-1].name == "error" and events[-1].data["code"] == "source_too_long"
    assert "MAX_REPLY_CHARS" in events[-1].data["message"]
    message = document(app, answer["conversationId"])["messages"][-1]
    assert message["content"] == text_of(events) == "é😀" * 20 + "é" * 10
    assert (message["status"], message["error"]["code"]) == ("failed", "source_too_long")
    assert source.closed == 1
    source.pieces = ("x" * 50,)
    _, events = await app.client.turn("Exactly so much", answer["conversationId"])
    assert events[-1].data["status"] == "complete"


@pytest.mark.parametrize("pieces", [(), ("",), (" ", "\n\n", "\u3000")])
async def test_reply_without_a_word_is_not_complete(make_app: MakeApp, pieces: tuple[str, ...]) -> None:
    app = await make_app(source=Script(*pieces))
    answer, events = await app.client.turn("Hello")
    assert events[-1].name == "error" and events[-1].data["code"] == "source_empty"
    [_, reply] = (await app.client.history(answer["conversationId"]))["messages"]
    assert (reply["content"], reply["status"]) == ("".join(pieces), "failed")


async def test_reply_that_fills_the_document_fails_and_keeps_what_fits(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "DOCUMENT_BYTES", turns.REPLY_ROOM + 20_000)
    app = await make_app(source=Script(*["é" * 9_999] * 200), max_reply_chars=10_000_000)
    answer, events = await app.client.turn("Hello")
    assert events[-1].data["code"] == "conversation_full"
    message = document(app, answer["conversationId"])["messages"][-1]
    assert text_of(events) == message["content"] and message["status"] == "failed"
    assert 0 <= turns.REPLY_ROOM + 20_000 - len(message["content"].encode()) < 20_000
    response = await app.client.post("More", answer["conversationId"])
    assert (response.status_code, response.json()["code"]) == (409, "conversation_full")
