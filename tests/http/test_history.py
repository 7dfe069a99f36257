"""The pages of a history, with and without a reply in flight."""

import asyncio
from typing import Any

import pytest

from tests.apps import MakeApp, Script
from tests.clients import new_id
from tests.http.turns import gated, release, said

pytestmark = pytest.mark.gen_test


async def test_history_pages_join_without_gaps(make_app: MakeApp) -> None:
    app = await make_app(source=Script("answer"))
    conversation_id = new_id()
    for number in range(5):
        await app.client.turn(f"{number}", conversation_id)
    whole = await app.client.history(conversation_id)
    assert "hasMore" not in whole and len(whole["messages"]) == 10
    page = await app.client.history(conversation_id, limit=4)
    assert page["hasMore"] and page["messages"] == whole["messages"][6:] and page["lastEventId"] == whole["lastEventId"]
    messages = page["messages"]
    while page["hasMore"]:
        page = await app.client.history(conversation_id, limit=4, before=messages[0]["id"])
        assert page["lastEventId"] == f"{page['messages'][-1]['id']}-done"
        messages = page["messages"] + messages
    assert messages == whole["messages"]
    assert (await app.client.history(conversation_id, limit=10))["hasMore"] is False
    response = await app.client.http.get(f"/chat/{conversation_id}", params={"before": new_id()})
    assert (response.status_code, response.json()["code"]) == (404, "not_found")


async def test_newest_page_has_the_reply_in_flight(make_app: MakeApp) -> None:
    source = Script("answer")
    app = await make_app(source=source)
    conversation_id = new_id()
    await app.client.turn("0", conversation_id)
    source.gate, source.pieces = asyncio.Semaphore(1), ("half", " done")
    answer = await app.client.say("1", conversation_id)
    await said(app, conversation_id, 4)
    page = await app.client.history(conversation_id, limit=2)
    assert [each["content"] for each in page["messages"]] == ["1", "half"] and page["hasMore"]
    assert page["status"] == "streaming" and page["lastEventId"] == f"{answer['replyId']}-4"
    older = await app.client.history(conversation_id, limit=2, before=page["messages"][0]["id"])
    assert [each["status"] for each in older["messages"]] == ["complete", "complete"] and not older["hasMore"]


async def test_history_read_while_a_reply_ends_is_consistent(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = gated("one ", "two", said=1)
    app = await make_app(source=source)
    answer = await app.client.say("Hello")
    await said(app, answer["conversationId"], 4)
    read = app.store.read

    async def ends_before_it_returns(*arguments: Any, **options: Any) -> Any:
        record = await read(*arguments, **options)
        monkeypatch.undo()
        release(source, 2)
        await app.until(lambda: not app.replies.running)
        return record

    monkeypatch.setattr(app.store, "read", ends_before_it_returns)
    history = await app.client.history(answer["conversationId"])
    assert history["status"] == "idle" and history["lastEventId"] == f"{answer['replyId']}-done"
    assert [(each["content"], each["status"]) for each in history["messages"]] == [
        ("Hello", "complete"),
        ("one two", "complete"),
    ]


async def test_page_before_the_reply_in_flight(make_app: MakeApp) -> None:
    source = gated("one ", "two ", said=1)
    app = await make_app(source=source)
    answer = await app.client.say("Hello")
    newest = await app.client.history(answer["conversationId"], limit=1)
    assert newest["messages"][0]["id"] == answer["replyId"] and newest["hasMore"]
    older = await app.client.history(answer["conversationId"], limit=1, before=answer["replyId"])
    assert [each["id"] for each in older["messages"]] == [answer["messageId"]] and not older["hasMore"]
    release(source)
