"""Turns while the database is away, silent, or fails."""

import asyncio
from typing import Any

import pytest
from bson import ObjectId

from chatserver.errors import DatabaseUnavailable, OutcomeUnknown
from tests.apps import MakeApp, Script
from tests.clients import RawStream, new_id, text_of
from tests.http.turns import AGES_AGO, document, gated, release, said

pytestmark = pytest.mark.gen_test


async def test_idle_conversation_in_memory_needs_no_database(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await make_app()
    answer, _ = await app.client.turn("one")
    path = f"/chat/stream/{answer['conversationId']}?lastEventId={answer['replyId']}-done"
    watcher = await RawStream(app.port, path).open()
    await app.until(lambda: app.subscribers == 1)

    async def away(*_: Any, **__: Any) -> None:
        raise DatabaseUnavailable

    monkeypatch.setattr(app.store, "read", away)
    monkeypatch.setattr(app.store, "peek", away)
    second = await RawStream(app.port, path).open()
    assert second.head.startswith("HTTP/1.1 200") and app.subscribers == 2
    unknown = await RawStream(app.port, f"/chat/stream/{new_id()}").open()
    assert unknown.head.startswith("HTTP/1.1 503")
    for each in (watcher, second, unknown):
        each.close()


@pytest.mark.expects_log("a checkpoint failed")
async def test_checkpoints_continue_after_a_failure(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    source = gated("one ", "two ", said=1)
    app = await make_app(source=source)
    checkpoint, failed = app.store.checkpoint, asyncio.Event()

    async def fails_once(replies: Any) -> Any:
        if failed.is_set():
            return await checkpoint(replies)
        failed.set()
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(app.store, "checkpoint", fails_once)
    answer = await app.client.say("Hello")
    await failed.wait()
    await app.until(lambda: document(app, answer["conversationId"])["reply"]["content"] == "one ")
    release(source)


async def test_reply_continues_during_an_outage_and_is_stored_after_it(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = gated("a", "b", said=1)
    app = await make_app(source=source)
    answer = await app.client.say("Hello")
    conversation_id = answer["conversationId"]
    watcher = asyncio.create_task(app.client.events(conversation_id, answer["lastEventId"]))
    await app.until(lambda: app.subscribers == 1)
    app.store.guard.away_until = float("inf")
    release(source, 5)
    await said(app, conversation_id, 2)
    late = asyncio.create_task(app.client.events(conversation_id, f"{answer['replyId']}-1"))
    await app.until(lambda: app.subscribers == 2)
    response = await app.client.post("More")
    assert response.status_code == 503 and int(response.headers["Retry-After"]) > 0
    assert response.json()["code"] == "database_unavailable"
    assert (await app.client.http.get("/readyz")).status_code == 503
    assert (await app.client.http.get("/healthz")).status_code == 200
    assert not watcher.done() and "reply" in document(app, conversation_id)
    app.store.guard.away_until = 0.0
    assert text_of(await watcher) == "ab" and text_of(await late) == "b"
    message = document(app, conversation_id)["messages"][-1]
    assert message["content"] == "ab" and "status" not in message


async def test_own_reply_never_expires_during_an_outage(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    source = gated("a", "b")
    app = await make_app(source=source, lease_ms=300)
    sweeps: list[str] = []

    async def not_yet(_: Any) -> Any:
        raise DatabaseUnavailable

    # The database is back, and no checkpoint has renewed the lease yet.
    monkeypatch.setattr(app.store, "checkpoint", not_yet)
    answer = await app.client.say("Hello")
    conversation_id = answer["conversationId"]
    app.database.conversations.update_one({"_id": ObjectId(conversation_id)}, AGES_AGO)
    app.store.guard.observe = lambda operation, _seconds, _ok: sweeps.append(operation)
    await app.until(lambda: sweeps.count("find_lost") >= 2)
    assert (await app.client.history(conversation_id))["status"] == "streaming"
    assert "reply" in document(app, conversation_id)
    release(source, 3)
    events = await app.client.events(conversation_id, answer["lastEventId"])
    assert text_of(events) == "ab" and events[-1].data["status"] == "complete"


@pytest.mark.parametrize("done", [True, False])
async def test_start_with_an_unknown_outcome_is_settled(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, done: bool
) -> None:
    app = await make_app()
    begin = app.store.start_turn

    async def silent(*args: Any, **options: Any) -> Any:
        monkeypatch.undo()
        if done:
            await begin(*args, **options)
        raise OutcomeUnknown

    monkeypatch.setattr(app.store, "start_turn", silent)
    conversation_id = new_id()
    response = await app.client.post("Hello", conversation_id, "key")
    assert response.status_code == 503
    first = await app.client.say("Hello", conversation_id, "key")
    events = await app.client.events(conversation_id, f"{conversation_id}-0")
    assert [event.name for event in events][:: len(events) - 1] == ["input", "done"]
    messages = document(app, conversation_id)["messages"]
    assert [str(each["_id"]) for each in messages] == [first["messageId"], first["replyId"]]
    await app.until(lambda: not app.replies.starting)


async def test_start_that_is_stored_late_is_found(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app = await make_app()
    begin, begun = app.store.start_turn, []

    async def late(*args: Any, **options: Any) -> Any:
        begun.append((args, options))
        raise OutcomeUnknown

    monkeypatch.setattr(app.store, "start_turn", late)
    conversation_id = new_id()
    assert (await app.client.post("Hello", conversation_id)).status_code == 503
    args, options = begun[0]
    await begin(*args, **options)
    events = await app.client.events(conversation_id, f"{conversation_id}-0")
    assert events[0].name == "input" and events[-1].name == "done"


async def test_database_error_while_following_or_finishing_is_retried(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await make_app(source=Script("a"))
    finish = app.store.finish
    failures: list[int] = []

    async def fails_twice(*args: Any, **options: Any) -> Any:
        if len(failures) < 2:
            failures.append(1)
            raise DatabaseUnavailable
        return await finish(*args, **options)

    monkeypatch.setattr(app.store, "finish", fails_twice)
    _, events = await app.client.turn("Hello")
    assert events[-1].name == "done" and len(failures) == 2
