"""Posting a message: the answer, the stored turn, the source's prompt."""

import asyncio
from datetime import UTC, datetime

import pytest
from bson import ObjectId

from chatserver.errors import SourceError
from tests.apps import MakeApp, Script
from tests.clients import new_id
from tests.http.turns import document, gated

pytestmark = pytest.mark.gen_test


async def test_post_answers_as_soon_as_the_message_is_stored(make_app: MakeApp) -> None:
    app = await make_app(source=gated("x"))
    answer = await app.client.say("Hello")
    assert set(answer) == {"conversationId", "status", "messageId", "replyId", "lastEventId"}
    assert answer["status"] == "streaming" and answer["lastEventId"] == f"{answer['replyId']}-0"
    stored = document(app, answer["conversationId"])
    assert str(stored["messages"][0]["_id"]) == answer["messageId"] and stored["messages"][0]["content"] == "Hello"
    assert str(stored["reply"]["_id"]) == answer["replyId"]


async def test_second_post_while_a_reply_runs_is_refused_and_stores_nothing(make_app: MakeApp) -> None:
    app = await make_app(source=gated("x"))
    conversation_id = new_id()
    responses = await asyncio.gather(*(app.client.post(f"{n}", conversation_id) for n in range(8)))
    assert sorted(response.status_code for response in responses) == [202] + [409] * 7
    refused = next(response for response in responses if response.status_code == 409)
    assert refused.json()["code"] == "reply_in_progress"
    assert len(document(app, conversation_id)["messages"]) == 1


async def test_source_is_shown_the_active_path(make_app: MakeApp) -> None:
    source = Script("one", SourceError("source_failed", "no"))
    app = await make_app(source=source, history_messages=3)
    answer, _ = await app.client.turn("first")
    source.pieces = ("two",)
    retry = await app.client.http.post(f"/chat/{answer['conversationId']}/retry")
    assert retry.status_code == 202
    await app.until_idle()
    await app.client.turn("second", answer["conversationId"])
    prompts = [[(each.role, each.content) for each in prompt.messages] for prompt in source.prompts]
    assert prompts[1] == [("user", "first")]
    assert prompts[2] == [("user", "first"), ("assistant", "two"), ("user", "second")]
    assert [prompt.turn for prompt in source.prompts] == [1, 1, 2]


async def test_source_of_version_1_s_conversation_is_shown_no_superseded_reply(make_app: MakeApp) -> None:
    source = Script("two")
    app = await make_app(source=source, history_messages=3)
    now, conversation_id = datetime.now(UTC), ObjectId()
    texts = [("user", "first", "complete"), ("assistant", "no", "superseded"), ("assistant", "one", "complete")]
    messages = [
        {"_id": ObjectId(), "role": role, "content": text, "createdAt": now, "status": status}
        for role, text, status in texts
    ]
    app.database.conversations.insert_one({"_id": conversation_id, "createdAt": now, "messages": messages})
    await app.client.turn("second", str(conversation_id))
    (prompt,) = source.prompts
    assert [each.content for each in prompt.messages] == ["first", "one", "second"] and prompt.turn == 2


async def test_source_is_shown_only_users_and_assistants(make_app: MakeApp) -> None:
    source = Script("answer")
    app = await make_app(source=source)
    answer, _ = await app.client.turn("Hello")
    now = datetime.now(UTC)
    for role in ("system", "tool"):
        message = {"_id": ObjectId(), "role": role, "content": "x", "createdAt": now}
        app.database.conversations.update_one({}, {"$push": {"messages": message}})
    await app.client.turn("Again", answer["conversationId"])
    assert [(each.role, each.content) for each in source.prompts[-1].messages] == [
        ("user", "Hello"),
        ("assistant", "answer"),
        ("user", "Again"),
    ]
