"""Several servers on one database: expired leases, paused servers, replies followed from another server."""

import asyncio
import contextlib
import signal
from collections.abc import Callable

import pytest
from bson import ObjectId

from chatserver.records import INTERRUPTED, Key, Message
from chatserver.store import Store
from tests.apps import App, Database, MakeApp
from tests.clients import Client, RawStream, Transcript, new_id, text_of
from tests.http.turns import AGES_AGO, document, event_names, gated, release, said
from tests.processes import Server, until

pytestmark = pytest.mark.gen_test


async def lose(app: App) -> None:
    """Make an application behave like a killed server: it stores nothing more and renews no lease."""
    await app.server.background.close()


@pytest.mark.expects_log("could not be stored")
async def test_expired_reply_is_followed_and_finished_once(make_app: MakeApp) -> None:
    source = gated("seen ", "kept ", "lost", said=2)
    lost = await make_app(source=source, checkpoint_ms=20, lease_ms=2000)
    answer = await lost.client.say("Hello")
    conversation_id = answer["conversationId"]
    await lost.until(lambda: document(lost, conversation_id)["reply"]["content"] == "seen kept ")
    others = [await make_app(checkpoint_ms=20, lease_ms=2000) for _ in range(3)]
    position = f"{answer['replyId']}-3"
    watchers = [asyncio.create_task(app.client.events(conversation_id, position)) for app in others]
    ahead = asyncio.create_task(others[0].client.events(conversation_id, f"{answer['replyId']}-12"))
    history = await others[0].client.history(conversation_id)
    assert history["messages"][-1]["content"] == "seen kept " and history["status"] == "streaming"
    response = await others[1].client.post("More", conversation_id)
    assert response.status_code == 409
    await lose(lost)
    for events in await asyncio.gather(*watchers):
        assert text_of(events) == "n kept " and events[-1].data["code"] == "interrupted"
    # A client ahead of the checkpoint receives the end, and no text twice.
    assert [event.name for event in await ahead] == ["error"]
    messages = document(lost, conversation_id)["messages"]
    assert [(each["content"], each.get("status")) for each in messages] == [
        ("Hello", None),
        ("seen kept ", "interrupted"),
    ]
    await others[2].client.turn("More", conversation_id)
    again = (await others[2].client.history(conversation_id))["messages"]
    assert len(again) == 4


@pytest.mark.expects_log("could not be stored")
async def test_post_to_a_conversation_of_a_dead_server_finishes_its_reply(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "find_expired", lambda *_, **__: asyncio.sleep(0, ()))
    lost = await make_app(source=gated("a"), lease_ms=300, checkpoint_ms=20)
    answer = await lost.client.say("Hello")
    await lose(lost)
    app = await make_app(lease_ms=300, checkpoint_ms=20)
    async with asyncio.timeout(5):
        while (response := await app.client.post("More", answer["conversationId"])).status_code == 409:
            await asyncio.sleep(0.02)
    assert response.status_code == 202
    statuses = [each.get("status") for each in document(app, answer["conversationId"])["messages"]]
    assert statuses[:3] == [None, "interrupted", None]


async def test_expired_reply_is_finished_without_subscribers(make_app: MakeApp) -> None:
    await make_app(lease_ms=2000)
    lost = await make_app(source=gated("kept", "lost", said=1), lease_ms=2000)
    answer = await lost.client.say("Hello")
    await lost.until(lambda: document(lost, answer["conversationId"])["reply"]["content"] == "kept")
    await lose(lost)
    lost.database.conversations.update_one({"reply": {"$exists": True}}, AGES_AGO)
    await lost.until(lambda: "reply" not in document(lost, answer["conversationId"]))
    message = document(lost, answer["conversationId"])["messages"][-1]
    assert (message["content"], message["status"]) == ("kept", "interrupted")


async def test_server_paused_beyond_its_lease_serves_the_stored_reply(
    make_server: Callable[..., Server], database: Database
) -> None:
    settings = {"LEASE_MS": 1500, "CHECKPOINT_MS": 100, "SIMULATED_TOKEN_DELAY_MS": 20, "SIMULATED_TOKENS": 5000}
    paused, _ = await asyncio.gather(*(asyncio.to_thread(make_server(**settings).start) for _ in range(2)))
    client = Client(paused.url)
    answer = await client.say("Hello")
    conversation_id = ObjectId(answer["conversationId"])
    watcher = asyncio.create_task(client.events(answer["conversationId"], answer["lastEventId"]))
    count = database.conversations.count_documents
    await asyncio.to_thread(until, lambda: count({"reply.content": {"$gt": ""}}) == 1)
    paused.signal(signal.SIGSTOP)
    await asyncio.to_thread(until, lambda: count({"reply": {"$exists": False}}) == 1, 30)
    paused.signal(signal.SIGCONT)
    events = await watcher
    assert events[-1].name == "error" and events[-1].data["code"] == "interrupted"
    _, message = database.conversations.find_one({"_id": conversation_id})["messages"]
    assert message["status"] == "interrupted" and text_of(events).startswith(message["content"])
    history = await client.history(answer["conversationId"])
    assert history["status"] == "idle" and history["messages"][-1]["content"] == message["content"]
    await client.say("And?", answer["conversationId"])
    await client.close()


async def test_outage_longer_than_a_lease_interrupts_no_reply(make_app: MakeApp) -> None:
    source = gated("one ", "two ", said=1)
    writer = await make_app(source=source, checkpoint_ms=20, lease_ms=800)
    other = await make_app(checkpoint_ms=20, lease_ms=800)
    answer = await writer.client.say("Hello")
    watcher = asyncio.create_task(other.client.events(answer["conversationId"], answer["lastEventId"]))
    await other.until(lambda: other.subscribers == 1)
    for app in writer, other:
        app.store.guard.away_until = float("inf")
    await asyncio.sleep(1)

    # The other one finds the database first.
    calls: list[str] = []
    other.store.guard.away_until, other.store.guard.observe = 0.0, lambda operation, *_: calls.append(operation)
    await other.until(lambda: {"read", "find_lost"} <= set(calls) and len(calls) > 20)
    writer.store.guard.away_until = 0.0
    release(source)

    events = await watcher
    assert events[-1].name == "done" and text_of(events) == "one two "


async def test_paused_server_notices_that_its_reply_was_finished_elsewhere(make_app: MakeApp) -> None:
    source = gated("one ", "two ", "three", said=1)
    paused = await make_app(source=source, checkpoint_ms=20, lease_ms=10_000)
    answer = await paused.client.say("Hello")
    conversation_id = answer["conversationId"]
    watcher = asyncio.create_task(paused.client.events(conversation_id, answer["lastEventId"]))
    await paused.until(lambda: document(paused, conversation_id)["reply"]["content"] == "one ")
    await paused.until(lambda: paused.subscribers == 1)
    # Do as another server does after the lease has expired.
    ((_, reply),) = await paused.store.find_expired([], sole_server=True)
    message = Message(reply.id, "assistant", "one ", reply.created_at, "interrupted", INTERRUPTED)
    release(source)
    await said(paused, conversation_id, 8)
    assert await paused.store.finish(Key(None, conversation_id), message) == message
    events = await watcher
    assert text_of(events) == "one two " and events[-1].data["code"] == "interrupted"
    await paused.until_idle()
    messages = document(paused, conversation_id)["messages"]
    assert [each["content"] for each in messages] == ["Hello", "one "] and source.closed == 1


async def test_stop_and_delete_reach_a_reply_of_another_server(make_app: MakeApp) -> None:
    source = gated("one ", "two", said=1)
    writer = await make_app(source=source)
    other = await make_app()
    for verb in ("stop", "delete"):
        answer = await writer.client.say("Hello")
        conversation_id = answer["conversationId"]
        watcher = asyncio.create_task(writer.client.events(conversation_id, answer["lastEventId"]))
        await writer.until(lambda: document(writer, conversation_id)["reply"]["content"] == "one ")  # noqa: B023
        if verb == "stop":
            assert (await other.client.http.post(f"/chat/{conversation_id}/stop")).json()["status"] == "stopping"
            assert [event.name for event in await watcher] == ["token", "done"]
            assert document(writer, conversation_id)["messages"][-1]["status"] == "stopped"
        else:
            assert (await other.client.http.delete(f"/chat/{conversation_id}")).status_code == 204
            assert [event.name for event in await watcher] == ["token", "reset"]
        release(source)
        await writer.until_idle()


async def test_stop_on_another_server_loses_no_text_of_any_stream(make_app: MakeApp) -> None:
    source = gated("one ", "two ", "three", said=1)
    writer = await make_app(source=source, checkpoint_ms=250)
    other, third = [await make_app(checkpoint_ms=250) for _ in range(2)]
    answer = await writer.client.say("Hello")
    conversation_id, apps = answer["conversationId"], (writer, other, third)
    watchers = [asyncio.create_task(app.client.events(conversation_id, answer["lastEventId"])) for app in apps]
    await writer.until(lambda: document(writer, conversation_id)["reply"]["content"] == "one ")
    # This text is newer than the checkpoint.
    release(source)
    await said(writer, conversation_id, 8)

    began = asyncio.get_running_loop().time()
    response = await other.client.http.post(f"/chat/{conversation_id}/stop")

    assert response.json() == {"status": "stopping", "messageId": answer["replyId"]}
    assert document(writer, conversation_id)["messages"][-1]["content"] == "one two "
    for watcher in watchers:
        events = await watcher
        assert text_of(events) == "one two " and events[-1].data["status"] == "stopped"
    assert asyncio.get_running_loop().time() - began < 1
    again = await other.client.http.post(f"/chat/{conversation_id}/stop")
    assert again.json()["status"] == "idle"
    await other.client.turn("More", conversation_id)


@pytest.mark.expects_log("could not be stored")
async def test_stop_of_a_reply_whose_server_is_dead_is_accepted(make_app: MakeApp) -> None:
    lost = await make_app(source=gated("kept"), checkpoint_ms=20, lease_ms=2000)
    other = await make_app(checkpoint_ms=20, lease_ms=2000)
    answer = await lost.client.say("Hello")
    watcher = asyncio.create_task(other.client.events(answer["conversationId"], answer["lastEventId"]))
    await other.until(lambda: other.subscribers == 1)
    await lose(lost)

    response = await other.client.http.post(f"/chat/{answer['conversationId']}/stop")

    assert response.json()["status"] == "stopping"
    assert (await watcher)[-1].data["code"] == "interrupted"


async def test_stream_on_another_server_resumes_from_the_stored_text(make_app: MakeApp) -> None:
    """Also while that server keeps an older state of the conversation in memory for another subscriber."""
    writer, other = await make_app(), await make_app()
    first, _ = await writer.client.turn("one")
    conversation_id = first["conversationId"]
    end = f"{first['replyId']}-done"
    watcher = await RawStream(other.port, f"/chat/stream/{conversation_id}?lastEventId={end}").open()
    await other.until(lambda: other.subscribers == 1)
    await writer.client.turn("two", conversation_id)
    events = await other.client.events(conversation_id, end)
    assert [event.name for event in events][:1] == ["input"] and events[-1].name == "done"
    assert text_of(events) == document(writer, conversation_id)["messages"][-1]["content"]
    watcher.close()


async def test_turn_started_elsewhere_while_a_reply_is_followed_is_not_missed(make_app: MakeApp) -> None:
    source = gated("one ", "two ", said=1)
    writer = await make_app(source=source, checkpoint_ms=20)
    other = await make_app(checkpoint_ms=250, lease_ms=10_000)
    first = await writer.client.say("Hello")
    conversation_id = first["conversationId"]
    watcher = asyncio.create_task(event_names(other, conversation_id))
    await said(other, conversation_id, 4)
    release(source)
    await writer.until(lambda: not writer.replies.running)
    # Now the other server still follows a reply that has ended.
    second = await writer.client.say("And?", conversation_id)
    seen = Transcript()
    position = first["lastEventId"]
    release(source, 2)
    while second["replyId"] not in seen.ended:
        async for event in other.client.stream(conversation_id, position):
            seen.take(event)
            position = event.id
            if second["replyId"] in seen.ended:
                break
    assert seen.said[first["replyId"]] == seen.said[second["replyId"]] == "one two "
    assert await watcher == ["token", "token", "done"]


async def test_client_in_the_middle_of_a_frame_receives_only_its_rest(
    make_app: MakeApp,
) -> None:
    """Guards against replaying the whole log because the cursor is set after the rest of the frame."""
    pieces = [f"{number:09d}." for number in range(12)]
    source = gated(*pieces, said=3)
    writer = await make_app(source=source, checkpoint_ms=20, lease_ms=60_000)
    other = await make_app(checkpoint_ms=300, lease_ms=60_000)
    answer = await writer.client.say("Hello")
    conversation_id = answer["conversationId"]
    await writer.until(lambda: len(document(writer, conversation_id)["reply"]["content"]) == 30)
    watcher = await RawStream(other.port, f"/chat/stream/{conversation_id}").open()
    await said(other, conversation_id, 30)
    # The next frame of the other server ends beyond the text that this client has received here.
    ahead = await RawStream(other.port, f"/chat/stream/{conversation_id}?lastEventId={answer['replyId']}-50").open()
    release(source, 5)
    await said(other, conversation_id, 80)
    release(source, 5)
    events = []
    async for event in ahead.events():
        events.append(event)
        if event.name == "done":
            break
    assert text_of(events) == "".join(pieces)[50:]
    watcher.close()
    ahead.close()


async def test_concurrent_turns_of_another_server_are_not_missed(make_app: MakeApp) -> None:
    here, there = await make_app(), await make_app()
    conversation_id = new_id()
    first, _ = await here.client.turn("here", conversation_id)
    seen, position = Transcript(), f"{first['replyId']}-done"
    stream = here.client.stream(conversation_id, position)
    reading = asyncio.ensure_future(anext(stream))
    await here.until(lambda: here.subscribers == 1)
    await there.client.turn("there", conversation_id)
    last, _ = await here.client.turn("here again", conversation_id)
    # The server aborted the stream, since it would have skipped a turn; resuming brings everything.
    with contextlib.suppress(StopAsyncIteration):
        seen.take(await reading)
    assert not seen.said
    async for event in here.client.stream(conversation_id, position):
        seen.take(event)
        if last["replyId"] in seen.ended:
            break
    texts = {each["id"]: each["content"] for each in (await here.client.history(conversation_id))["messages"][2:]}
    assert seen.said == texts and len(texts) == 4
