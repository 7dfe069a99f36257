"""Deleting a conversation: during a reply, again, by another server."""

import asyncio

import pytest

from chatserver.errors import DatabaseUnavailable
from chatserver.records import Key
from tests.apps import App, MakeApp
from tests.clients import RawStream, new_id
from tests.http.turns import document, event_names, gated, release, said

pytestmark = pytest.mark.gen_test


async def test_delete_during_a_reply_removes_the_conversation_permanently(make_app: MakeApp) -> None:
    source = gated("a", "b", said=1)
    app = await make_app(source=source)
    answer = await app.client.say("Hello")
    conversation_id = answer["conversationId"]
    watcher = asyncio.create_task(app.client.events(conversation_id, answer["lastEventId"]))
    await app.until(lambda: app.subscribers == 1)
    await said(app, conversation_id, 1)
    assert (await app.client.http.delete(f"/chat/{conversation_id}")).status_code == 204
    assert [event.name for event in await watcher] == ["token", "reset"]
    release(source, 5)
    await app.until_idle()
    assert source.closed == 1 and app.database.conversations.count_documents({}) == 0
    assert (await app.client.http.get(f"/chat/{conversation_id}")).status_code == 404
    assert (await app.client.http.delete(f"/chat/{conversation_id}")).status_code == 404
    events = [event.name async for event in app.client.stream(conversation_id, answer["lastEventId"])]
    assert events == ["reset"]


async def test_delete_spares_a_conversation_that_restarts_concurrently(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await make_app(source=gated("a", "b", said=1))
    old = await app.client.say("old")
    conversation_id = old["conversationId"]
    await said(app, conversation_id, 1)
    delete = app.store.delete

    async def then_another_post(conversation: Key) -> bool:
        found = await delete(conversation)
        new.append(await app.client.say("new", conversation.id))
        return found

    new: list[dict[str, str]] = []
    monkeypatch.setattr(app.store, "delete", then_another_post)
    assert (await app.client.http.delete(f"/chat/{conversation_id}")).status_code == 204
    release(app.source, 5)
    await app.until_idle()
    messages = document(app, conversation_id)["messages"]
    assert [(each["content"], each.get("status")) for each in messages] == [("new", None), ("ab", None)]
    assert str(messages[1]["_id"]) == new[0]["replyId"]


async def test_delete_that_meets_the_natural_end_resets_its_streams(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = gated("a")
    app = await make_app(source=source)
    answer = await app.client.say("Hello")
    watcher = asyncio.create_task(event_names(app, answer["conversationId"]))
    await app.until(lambda: app.subscribers == 1)
    delete = app.store.delete

    async def late(conversation: Key) -> bool:
        release(source)
        await app.until(lambda: not app.replies.running)
        return await delete(conversation)

    monkeypatch.setattr(app.store, "delete", late)
    assert (await app.client.http.delete(f"/chat/{answer['conversationId']}")).status_code == 204
    assert await watcher == ["token", "done", "reset"]


@pytest.mark.expects_log("does not answer")
async def test_repeated_delete_after_a_lost_answer_resets_the_streams(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await make_app()
    answer, _ = await app.client.turn("Hello")
    conversation_id = answer["conversationId"]
    watcher = asyncio.create_task(event_names(app, conversation_id))
    await app.until(lambda: app.subscribers == 1)
    delete = app.store.delete

    async def silent(conversation: Key) -> bool:
        await delete(conversation)
        raise DatabaseUnavailable

    monkeypatch.setattr(app.store, "delete", silent)
    assert (await app.client.http.delete(f"/chat/{conversation_id}")).status_code == 503
    monkeypatch.undo()
    assert (await app.client.http.delete(f"/chat/{conversation_id}")).status_code == 404
    assert await watcher == ["reset"]


async def test_conversation_that_another_server_deleted_ends_its_streams_when_that_is_noticed(
    make_app: MakeApp,
) -> None:
    app, other = await make_app(), await make_app()
    answer, _ = await app.client.turn("Hello")
    conversation_id = answer["conversationId"]
    watcher = asyncio.create_task(event_names(other, conversation_id))
    await other.until(lambda: other.subscribers == 1)
    assert (await app.client.http.delete(f"/chat/{conversation_id}")).status_code == 204
    assert (await other.client.http.get(f"/chat/{conversation_id}")).status_code == 404
    # Its client resumes from its position and receives a reset.
    assert await watcher == []


async def test_deleting_an_unknown_conversation_keeps_its_waiting_streams(app: App) -> None:
    conversation_id = new_id()
    waiting = await RawStream(app.port, f"/chat/stream/{conversation_id}").open()
    await app.until(lambda: app.subscribers == 1)
    assert (await app.client.http.delete(f"/chat/{conversation_id}")).status_code == 404
    await app.client.say("Hello", conversation_id)
    assert (await anext(waiting.events())).name == "input"
    waiting.close()
