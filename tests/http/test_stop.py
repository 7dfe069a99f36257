"""Stopping a reply, on its own server and on another, in time and too late."""

import asyncio
import random
from typing import Any

import pytest

from chatserver.records import Key
from tests.apps import MakeApp, Script
from tests.clients import text_of
from tests.http.turns import document, gated, said

pytestmark = pytest.mark.gen_test


async def test_stop_keeps_the_text_and_notifies_every_subscriber(make_app: MakeApp) -> None:
    source = gated("a", "b", "c", said=2)
    app = await make_app(source=source)
    answer = await app.client.say("Hello")
    conversation_id = answer["conversationId"]
    watchers = [asyncio.create_task(app.client.events(conversation_id, answer["lastEventId"])) for _ in range(3)]
    await said(app, conversation_id, 2)
    await app.until(lambda: app.subscribers == 3)
    response = await app.client.http.post(f"/chat/{conversation_id}/stop")
    assert (response.status_code, response.json()["status"]) == (202, "stopping")
    for events in await asyncio.gather(*watchers):
        assert text_of(events) == "ab"
        assert events[-1].name == "done" and events[-1].data == {"messageId": answer["replyId"], "status": "stopped"}
    assert source.closed == 1
    message = document(app, conversation_id)["messages"][-1]
    assert (message["content"], message["status"]) == ("ab", "stopped")
    for _ in range(2):
        response = await app.client.http.post(f"/chat/{conversation_id}/stop")
        assert (response.status_code, response.json()) == (202, {"status": "idle"})


async def test_stop_takes_effect_at_once(make_app: MakeApp) -> None:
    """From the request to a watcher's `done`, stored; the best of several, as the machine may be busy."""
    app = await make_app(simulated_token_delay_ms=10, simulated_tokens=5000)
    loop, seconds = asyncio.get_running_loop(), []
    for _ in range(6):
        answer = await app.client.say("Hello")
        watcher = asyncio.create_task(app.client.events(answer["conversationId"], answer["lastEventId"]))
        await app.until(lambda: app.subscribers == 1)
        began = loop.time()
        stopping = asyncio.create_task(app.client.http.post(f"/chat/{answer['conversationId']}/stop"))
        assert (await watcher)[-1].data["status"] == "stopped"
        seconds.append(loop.time() - began)
        await stopping
        await app.until_idle()
    assert min(seconds) < 0.1, seconds


async def test_stop_before_the_first_token(make_app: MakeApp) -> None:
    app = await make_app(source=gated("a"))
    answer = await app.client.say("Hello")
    assert (await app.client.http.post(f"/chat/{answer['conversationId']}/stop")).json()["status"] == "stopping"
    await app.until_idle()
    message = document(app, answer["conversationId"])["messages"][-1]
    assert (message["content"], message["status"]) == ("", "stopped")


async def test_stop_races_the_natural_end_and_one_of_the_two_wins(make_app: MakeApp) -> None:
    app = await make_app(source=Script(*["x"] * 300))
    ends = set()
    for _ in range(40):
        answer = await app.client.say("Hello")
        await asyncio.sleep(random.choice([0, 0.01, 0.05]) * random.random())
        stops = await asyncio.gather(
            *(app.client.http.post(f"/chat/{answer['conversationId']}/stop") for _ in range(2))
        )
        events = await app.client.events(answer["conversationId"], answer["lastEventId"])
        message = document(app, answer["conversationId"])["messages"][-1]
        status = message.get("status", "complete")
        assert events[-1].data["status"] == status and text_of(events) == message["content"]
        assert (status == "stopped") == any(stop.json()["status"] == "stopping" for stop in stops)
        ends.add(status)
    assert "stopped" in ends


async def test_stop_while_the_reply_is_being_stored_is_too_late(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await make_app(source=Script("all ", "of it"))
    finish, storing, stopped = app.store.finish, asyncio.Event(), asyncio.Event()

    async def finish_when_stopped(*arguments: Any, **options: Any) -> Any:
        storing.set()
        await stopped.wait()
        return await finish(*arguments, **options)

    monkeypatch.setattr(app.store, "finish", finish_when_stopped)
    answer = await app.client.say("Hello")
    conversation_id = answer["conversationId"]
    watcher = asyncio.create_task(app.client.events(conversation_id, answer["lastEventId"]))
    await storing.wait()
    assert (await app.client.http.post(f"/chat/{conversation_id}/stop")).json() == {"status": "idle"}
    stopped.set()
    events = await watcher
    assert text_of(events) == "all of it" and events[-1].data["status"] == "complete"
    assert (await app.client.history(conversation_id))["messages"][-1]["status"] == "complete"


async def test_stop_that_races_checkpoints_of_another_server_stops(make_app: MakeApp) -> None:
    writer = await make_app(simulated_token_delay_ms=2, simulated_tokens=5000, checkpoint_ms=10, lease_ms=10_000)
    other = await make_app()
    for _ in range(10):
        answer = await writer.client.say("Hello")
        response = await other.client.http.post(f"/chat/{answer['conversationId']}/stop")
        assert response.json() == {"status": "stopping", "messageId": answer["replyId"]}
        assert document(writer, answer["conversationId"])["messages"][-1]["status"] == "stopped"
    await writer.until_idle()


async def test_concurrent_stops_get_the_same_answer(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app = await make_app(simulated_token_delay_ms=10, simulated_tokens=5000)
    answer = await app.client.say("Hello")
    finish, all_here = app.store.finish, asyncio.Event()

    async def finish_when_all_are_here(*arguments: Any, **options: Any) -> Any:
        await all_here.wait()
        return await finish(*arguments, **options)

    monkeypatch.setattr(app.store, "finish", finish_when_all_are_here)
    path = f"/chat/{answer['conversationId']}/stop"
    stops = [asyncio.create_task(app.client.http.post(path)) for _ in range(5)]
    live = app.hub.get(Key(None, answer["conversationId"]))
    assert live is not None
    await app.until(lambda: live.holders == 5)
    all_here.set()
    responses = await asyncio.gather(*stops)
    assert [each.json() for each in responses] == 5 * [{"status": "stopping", "messageId": answer["replyId"]}]
    assert (await app.client.http.post(path)).json() == {"status": "idle"}
