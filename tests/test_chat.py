"""The use cases: turns, idempotency, stop, retry, delete, list, pages, lost servers, outages, the end."""

import asyncio
import contextlib
import random
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from bson import ObjectId

from chatserver import store as store_module
from chatserver.errors import DatabaseUnavailable, KeyReused, OutcomeUnknown, SourceError
from chatserver.records import INTERRUPTED, Message
from chatserver.replies import Replies
from chatserver.sources.simulated import Simulated
from tests.apps import App, Database, MakeApp, Script, running
from tests.clients import Client, Event, RawStream, Transcript, new_id, text_of
from tests.servers import Server, until

pytestmark = pytest.mark.gen_test


AGES_AGO = {"$set": {"reply.renewedAt": datetime(2020, 1, 1, tzinfo=UTC)}}
"""An update after which a lease has run out."""


def gated(*pieces: str | BaseException, said: int = 0) -> Script:
    """Return a source that waits before each piece but the first ones, until its gate is released."""
    return Script(*pieces, gate=asyncio.Semaphore(said))


def release(source: Script, count: int = 1) -> None:
    assert source.gate is not None
    for _ in range(count):
        source.gate.release()


def document(app: App, conversation_id: str) -> dict[str, Any]:
    found: dict[str, Any] = app.database.conversations.find_one({"_id": ObjectId(conversation_id)})
    return found


async def said(app: App, conversation_id: str, chars: int) -> None:
    """Wait until a reply has so many characters."""

    def reached() -> bool:
        live = app.hub.get(conversation_id)
        return live is not None and live.reply is not None and live.reply.chars >= chars

    await app.until(reached)


async def _names(app: App, conversation_id: str) -> list[str]:
    """Return the events of a stream without a position, until the server ends it."""
    return [event.name async for event in app.client.stream(conversation_id)]


async def _all_events(stream: RawStream) -> list[Event]:
    """Return the events of a stream up to its end, and close it."""
    events = [event async for event in stream.events()]
    stream.close()
    return events


# -- posts ---------------------------------------------------------------------------------------------------------


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


async def test_source_is_shown_the_conversation_without_superseded_replies(make_app: MakeApp) -> None:
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


# -- idempotency ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
async def test_same_key_gets_the_first_answer_at_any_time(database: Database, known: bool) -> None:
    conversation_id = new_id() if known else None
    source = gated("x", "y")
    async with running(App(database, source=source)) as app:
        responses = await asyncio.gather(*(app.client.post("Hello", conversation_id, "key") for _ in range(6)))
        assert [response.status_code for response in responses] == [202] * 6
        first = responses[0].json()
        assert all(response.json() == first for response in responses)
        assert (await app.client.post("Other", conversation_id, "key")).status_code == 422
        release(source, 2)
        await app.until_idle()
        assert await app.client.say("Hello", conversation_id, "key") == first
        app.chat._replies.draining = True
        assert await app.client.say("Hello", conversation_id, "key") == first
    async with running(App(database)) as app:
        await app.client.turn("And?", first["conversationId"])
        assert await app.client.say("Hello", conversation_id, "key") == first
        assert database.conversations.count_documents({}) == 1
        assert len(document(app, first["conversationId"])["messages"]) == 4


async def test_key_belongs_to_its_conversation(app: App) -> None:
    answers = [await app.client.say("Hello", conversation_id, "key") for conversation_id in (None, new_id(), new_id())]
    assert len({answer["conversationId"] for answer in answers}) == 3
    response = await app.client.http.post("/chat", json={"input": "x"}, headers={"Idempotency-Key": "not visible"})
    assert response.status_code == 400


@pytest.mark.parametrize("key", ["$", "$$", "$a", "$$ROOT", "$$NOW", "$$REMOVE", "$messages.key", "$a..b", "{$ne:1}"])
async def test_key_is_data_whatever_it_begins_with(app: App, key: str) -> None:
    for conversation_id in (new_id(), None):
        first = await app.client.say(f"the {key}", conversation_id, key)
        await app.until_idle()
        again = await app.client.say(f"the {key}", conversation_id, key)
        other = await app.client.post("another text", conversation_id, key)

        assert again == first
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


@pytest.mark.parametrize("deletions", [1, 3])
async def test_key_whose_conversation_is_deleted_between_write_and_look_is_tried_again(
    app: App, monkeypatch: pytest.MonkeyPatch, deletions: int
) -> None:
    conversation_id = new_id()
    begin, left = app.store.start_turn, deletions

    async def meet_another_attempt(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise KeyReused  # by an attempt whose conversation is gone when it is looked for
        return await begin(*arguments, **options)

    monkeypatch.setattr(app.store, "start_turn", meet_another_attempt)
    answer = await app.client.say("Hello", conversation_id, key="k")
    await app.until_idle()

    assert str(document(app, conversation_id)["messages"][0]["_id"]) == answer["messageId"]


async def test_key_lives_as_long_as_its_conversation(app: App) -> None:
    first = await app.client.say("Hello", None, "key")
    await app.until_idle()
    assert (await app.client.http.delete(f"/chat/{first['conversationId']}")).status_code == 204
    second = await app.client.say("Hello again", None, "key")
    assert second["messageId"] != first["messageId"]


# -- stop, retry, delete -------------------------------------------------------------------------------------------


async def test_stop_keeps_what_was_said_and_everybody_hears_of_it(make_app: MakeApp) -> None:
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


async def test_stop_is_felt_at_once(make_app: MakeApp) -> None:
    """From the request to a watcher's `done`, stored; the best of several, as the machine may be busy."""
    app = await make_app(source=Simulated(0.01, 5000))
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


async def test_stop_meets_the_natural_end_and_one_of_the_two_wins(make_app: MakeApp) -> None:
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


async def test_stop_of_a_reply_that_is_being_stored_comes_too_late(
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


async def test_retry_replaces_a_reply_that_failed(make_app: MakeApp) -> None:
    source = Script("half", SourceError("source_failed", "no"))
    app = await make_app(source=source)
    answer, events = await app.client.turn("Hello")
    conversation_id = answer["conversationId"]
    watcher = asyncio.create_task(app.client.events(conversation_id, events[-1].id))
    await app.until(lambda: app.subscribers == 1)
    source.pieces = ("whole",)
    again = (await app.client.http.post(f"/chat/{conversation_id}/retry")).json()
    assert again["messageId"] == answer["messageId"] and again["replyId"] != answer["replyId"]
    assert [event.name for event in await watcher] == ["token", "done"]
    history = await app.client.history(conversation_id)
    assert [(each["content"], each["status"]) for each in history["messages"]] == [
        ("Hello", "complete"),
        ("half", "superseded"),
        ("whole", "complete"),
    ]
    # Whoever was in the middle of the first reply is told its end, then the second one.
    seen = Transcript()
    async for event in app.client.stream(conversation_id, f"{answer['replyId']}-2"):
        seen.take(event)
        if again["replyId"] in seen.ended:
            break
    assert seen.said == {answer["replyId"]: "lf", again["replyId"]: "whole"}
    assert seen.ended == {answer["replyId"]: "source_failed", again["replyId"]: "complete"}
    response = await app.client.http.post(f"/chat/{conversation_id}/retry")
    assert (response.status_code, response.json()["code"]) == (409, "nothing_to_retry")


async def test_two_retries_at_one_moment_begin_one_reply(make_app: MakeApp) -> None:
    source = Script(SourceError("source_failed", "no"))
    app = await make_app(source=source)
    answer, _ = await app.client.turn("Hello")
    source.pieces = ("x",)
    source.gate = asyncio.Semaphore(0)
    retries = [app.client.http.post(f"/chat/{answer['conversationId']}/retry") for _ in range(5)]
    assert sorted(response.status_code for response in await asyncio.gather(*retries)) == [202, 409, 409, 409, 409]


async def test_delete_during_a_reply_leaves_nothing_and_brings_nothing_back(make_app: MakeApp) -> None:
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


async def test_delete_spares_a_conversation_that_begins_anew_in_the_same_moment(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await make_app(source=gated("a", "b", said=1))
    old = await app.client.say("old")
    conversation_id = old["conversationId"]
    await said(app, conversation_id, 1)
    delete = app.store.delete

    async def then_another_post(conversation_id: str) -> bool:
        found = await delete(conversation_id)
        new.append(await app.client.say("new", conversation_id))
        return found

    new: list[dict[str, str]] = []
    monkeypatch.setattr(app.store, "delete", then_another_post)
    assert (await app.client.http.delete(f"/chat/{conversation_id}")).status_code == 204
    release(app.source, 5)
    await app.until_idle()
    messages = document(app, conversation_id)["messages"]
    assert [(each["content"], each.get("status")) for each in messages] == [("new", None), ("ab", None)]
    assert str(messages[1]["_id"]) == new[0]["replyId"]


# -- pages of a history -------------------------------------------------------------------------------------------


async def test_history_comes_in_pages_that_join(make_app: MakeApp) -> None:
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


async def test_history_that_is_read_while_a_reply_ends_is_of_one_moment(
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
        await app.until(lambda: not app.chat.running)
        return record

    monkeypatch.setattr(app.store, "read", ends_before_it_returns)
    history = await app.client.history(answer["conversationId"])
    assert history["status"] == "idle" and history["lastEventId"] == f"{answer['replyId']}-done"
    assert [(each["content"], each["status"]) for each in history["messages"]] == [
        ("Hello", "complete"),
        ("one two", "complete"),
    ]


# -- lost and paused servers ---------------------------------------------------------------------------------------


async def lose(app: App) -> None:
    """MakeApp an application what a killed server is: it writes no more, neither replies nor leases."""
    for task in list(app.chat._replies._tasks):
        task.cancel()
    await asyncio.gather(*app.chat._replies._tasks, return_exceptions=True)


@pytest.mark.expects_log("could not be stored")
async def test_reply_of_a_lost_server_is_followed_and_finished_once(make_app: MakeApp) -> None:
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
    # Who saw more than was kept is told the end, and no word twice.
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
async def test_post_to_a_conversation_whose_server_is_lost_finishes_its_reply(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Replies, "_sweep", lambda _: asyncio.sleep(3600))
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


async def test_reply_of_a_lost_server_is_finished_though_nobody_reads_it(make_app: MakeApp) -> None:
    await make_app(lease_ms=2000)
    lost = await make_app(source=gated("kept", "lost", said=1), lease_ms=2000)
    answer = await lost.client.say("Hello")
    await lost.until(lambda: document(lost, answer["conversationId"])["reply"]["content"] == "kept")
    await lose(lost)
    lost.database.conversations.update_one({"reply": {"$exists": True}}, AGES_AGO)
    await lost.until(lambda: "reply" not in document(lost, answer["conversationId"]))
    message = document(lost, answer["conversationId"])["messages"][-1]
    assert (message["content"], message["status"]) == ("kept", "interrupted")


async def test_server_that_was_paused_for_longer_than_its_lease_tells_the_truth(
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


async def test_server_that_was_only_paused_notices_that_its_reply_was_taken_over(make_app: MakeApp) -> None:
    source = gated("one ", "two ", "three", said=1)
    paused = await make_app(source=source, checkpoint_ms=20, lease_ms=10_000)
    answer = await paused.client.say("Hello")
    conversation_id = answer["conversationId"]
    watcher = asyncio.create_task(paused.client.events(conversation_id, answer["lastEventId"]))
    await paused.until(lambda: document(paused, conversation_id)["reply"]["content"] == "one ")
    await paused.until(lambda: paused.subscribers == 1)
    # What another server does once the lease has run out.
    ((_, reply),) = await paused.store.find_expired([], sole_server=True)
    message = Message(reply.id, "assistant", "one ", reply.created_at, "interrupted", INTERRUPTED)
    release(source)
    await said(paused, conversation_id, 8)
    assert await paused.store.finish(conversation_id, message) == message
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


async def test_stream_opened_on_another_server_goes_on_from_what_is_stored(make_app: MakeApp) -> None:
    """Also while that server keeps in memory, for somebody who watches, how the conversation stood before."""
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


async def test_delete_that_meets_the_natural_end_resets_its_streams(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = gated("a")
    app = await make_app(source=source)
    answer = await app.client.say("Hello")
    watcher = asyncio.create_task(_names(app, answer["conversationId"]))
    await app.until(lambda: app.subscribers == 1)
    delete = app.store.delete

    async def late(conversation_id: str) -> bool:
        release(source)
        await app.until(lambda: not app.chat.running)
        return await delete(conversation_id)

    monkeypatch.setattr(app.store, "delete", late)
    assert (await app.client.http.delete(f"/chat/{answer['conversationId']}")).status_code == 204
    assert await watcher == ["token", "done", "reset"]


@pytest.mark.expects_log("does not answer")
async def test_delete_again_after_one_whose_answer_was_lost_resets_its_streams(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await make_app()
    answer, _ = await app.client.turn("Hello")
    conversation_id = answer["conversationId"]
    watcher = asyncio.create_task(_names(app, conversation_id))
    await app.until(lambda: app.subscribers == 1)
    delete = app.store.delete

    async def silent(conversation_id: str) -> bool:
        await delete(conversation_id)
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
    watcher = asyncio.create_task(_names(other, conversation_id))
    await other.until(lambda: other.subscribers == 1)
    assert (await app.client.http.delete(f"/chat/{conversation_id}")).status_code == 204
    assert (await other.client.http.get(f"/chat/{conversation_id}")).status_code == 404
    # Its client comes back with its position, and is told.
    assert await watcher == []


async def test_turn_that_began_elsewhere_while_a_reply_was_followed_is_not_missed(make_app: MakeApp) -> None:
    source = gated("one ", "two ", said=1)
    writer = await make_app(source=source, checkpoint_ms=20)
    other = await make_app(checkpoint_ms=250, lease_ms=10_000)
    first = await writer.client.say("Hello")
    conversation_id = first["conversationId"]
    watcher = asyncio.create_task(_names(other, conversation_id))
    await said(other, conversation_id, 4)
    release(source)
    await writer.until(lambda: not writer.chat.running)
    # Now the other server still follows what has ended.
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


async def test_client_from_another_server_that_stands_in_the_middle_of_a_frame_is_told_only_the_rest(
    make_app: MakeApp,
) -> None:
    """Guards against a client that was told the whole log again, its cursor being set after the rest of the frame."""
    pieces = [f"{number:09d}." for number in range(12)]
    source = gated(*pieces, said=3)
    writer = await make_app(source=source, checkpoint_ms=20, lease_ms=60_000)
    other = await make_app(checkpoint_ms=300, lease_ms=60_000)
    answer = await writer.client.say("Hello")
    conversation_id = answer["conversationId"]
    await writer.until(lambda: len(document(writer, conversation_id)["reply"]["content"]) == 30)
    watcher = await RawStream(other.port, f"/chat/stream/{conversation_id}").open()
    await said(other, conversation_id, 30)
    # What comes next to the other server is one frame that ends beyond what this client has seen here.
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


async def test_stop_that_meets_checkpoints_of_another_server_stops(make_app: MakeApp) -> None:
    writer = await make_app(source=Simulated(0.002, 5000), checkpoint_ms=10, lease_ms=10_000)
    other = await make_app()
    for _ in range(10):
        answer = await writer.client.say("Hello")
        response = await other.client.http.post(f"/chat/{answer['conversationId']}/stop")
        assert response.json() == {"status": "stopping", "messageId": answer["replyId"]}
        assert document(writer, answer["conversationId"])["messages"][-1]["status"] == "stopped"
    await writer.until_idle()


async def test_several_stops_at_once_say_the_same(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app = await make_app(source=Simulated(0.01, 5000))
    answer = await app.client.say("Hello")
    finish, all_here = app.store.finish, asyncio.Event()

    async def finish_when_all_are_here(*arguments: Any, **options: Any) -> Any:
        await all_here.wait()
        return await finish(*arguments, **options)

    monkeypatch.setattr(app.store, "finish", finish_when_all_are_here)
    path = f"/chat/{answer['conversationId']}/stop"
    stops = [asyncio.create_task(app.client.http.post(path)) for _ in range(5)]
    live = app.hub.get(answer["conversationId"])
    assert live is not None
    await app.until(lambda: live.holders == 5)
    all_here.set()
    responses = await asyncio.gather(*stops)
    assert [each.json() for each in responses] == 5 * [{"status": "stopping", "messageId": answer["replyId"]}]
    assert (await app.client.http.post(path)).json() == {"status": "idle"}


@pytest.mark.expects_log("a checkpoint failed")
async def test_checkpoints_go_on_after_one_that_failed(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    source = gated("one ", "two ", said=1)
    app = await make_app(source=source)
    checkpoint, failed = app.store.checkpoint, asyncio.Event()

    async def fails_once(replies: Any) -> Any:
        if failed.is_set():
            return await checkpoint(replies)
        failed.set()
        raise RuntimeError("nobody foresaw this")

    monkeypatch.setattr(app.store, "checkpoint", fails_once)
    answer = await app.client.say("Hello")
    await failed.wait()
    await app.until(lambda: document(app, answer["conversationId"])["reply"]["content"] == "one ")
    release(source)


async def test_reply_that_begins_when_the_time_to_drain_is_over_is_interrupted(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await make_app(source=Simulated(0.05, 1000))
    begin, held = app.store.start_turn, asyncio.Event()

    async def late(*arguments: Any, **options: Any) -> Any:
        begun = await begin(*arguments, **options)
        await held.wait()
        return begun

    monkeypatch.setattr(app.store, "start_turn", late)
    saying = asyncio.create_task(app.client.say("Hello"))
    await app.until(lambda: app.chat._replies._pending)
    draining = asyncio.create_task(app.chat.drain())
    await app.until(lambda: app.chat._replies._out_of_time)
    held.set()
    answer = await saying
    await asyncio.wait_for(draining, 2)
    assert document(app, answer["conversationId"])["messages"][-1]["status"] == "interrupted"


async def test_page_before_the_reply_in_flight(make_app: MakeApp) -> None:
    source = gated("one ", "two ", said=1)
    app = await make_app(source=source)
    answer = await app.client.say("Hello")
    newest = await app.client.history(answer["conversationId"], limit=1)
    assert newest["messages"][0]["id"] == answer["replyId"] and newest["hasMore"]
    older = await app.client.history(answer["conversationId"], limit=1, before=answer["replyId"])
    assert [each["id"] for each in older["messages"]] == [answer["messageId"]] and not older["hasMore"]
    release(source)


async def test_deleting_what_is_not_there_leaves_those_who_wait_for_it(app: App) -> None:
    conversation_id = new_id()
    waiting = await RawStream(app.port, f"/chat/stream/{conversation_id}").open()
    await app.until(lambda: app.subscribers == 1)
    assert (await app.client.http.delete(f"/chat/{conversation_id}")).status_code == 404
    await app.client.say("Hello", conversation_id)
    assert (await anext(waiting.events())).name == "input"
    waiting.close()


async def test_turns_that_another_server_wrote_meanwhile_are_not_missed(make_app: MakeApp) -> None:
    here, there = await make_app(), await make_app()
    conversation_id = new_id()
    first, _ = await here.client.turn("here", conversation_id)
    seen, position = Transcript(), f"{first['replyId']}-done"
    stream = here.client.stream(conversation_id, position)
    reading = asyncio.ensure_future(anext(stream))
    await here.until(lambda: here.subscribers == 1)
    await there.client.turn("there", conversation_id)
    last, _ = await here.client.turn("here again", conversation_id)
    # The stream was cut, since it would have skipped a turn; from its position all is there.
    with contextlib.suppress(StopAsyncIteration):
        seen.take(await reading)
    assert not seen.said
    async for event in here.client.stream(conversation_id, position):
        seen.take(event)
        if last["replyId"] in seen.ended:
            break
    texts = {each["id"]: each["content"] for each in (await here.client.history(conversation_id))["messages"][2:]}
    assert seen.said == texts and len(texts) == 4


# -- a silent database ---------------------------------------------------------------------------------------------


async def test_reply_goes_on_while_the_database_is_away_and_ends_when_it_is_back(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = gated("a", "b", said=1)
    app = await make_app(source=source)
    answer = await app.client.say("Hello")
    conversation_id = answer["conversationId"]
    watcher = asyncio.create_task(app.client.events(conversation_id, answer["lastEventId"]))
    await app.until(lambda: app.subscribers == 1)
    app.store._away_until = float("inf")
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
    app.store._away_until = 0.0
    assert text_of(await watcher) == "ab" and text_of(await late) == "b"
    message = document(app, conversation_id)["messages"][-1]
    assert message["content"] == "ab" and "status" not in message


async def test_own_reply_is_not_taken_for_lost_however_long_the_database_was_away(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    app.store.observe = lambda operation, _seconds, _ok: sweeps.append(operation)
    await app.until(lambda: sweeps.count("find_expired") >= 2)
    assert (await app.client.history(conversation_id))["status"] == "streaming"
    assert "reply" in document(app, conversation_id)
    release(source, 3)
    events = await app.client.events(conversation_id, answer["lastEventId"])
    assert text_of(events) == "ab" and events[-1].data["status"] == "complete"


@pytest.mark.parametrize("done", [True, False])
async def test_begin_with_an_unknown_outcome_is_settled(
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
    await app.until(lambda: not app.chat._replies._pending)


async def test_begin_that_arrives_late_is_found(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_reply_that_is_longer_than_allowed_fails_with_its_text_kept(make_app: MakeApp) -> None:
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


# -- room, and the end ---------------------------------------------------------------------------------------------


async def test_reply_that_outgrows_the_room_is_ended_with_what_fits(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "DOCUMENT_BYTES", store_module.REPLY_ROOM + 20_000)
    app = await make_app(source=Script(*["é" * 9_999] * 200), max_reply_chars=10_000_000)
    answer, events = await app.client.turn("Hello")
    assert events[-1].data["code"] == "conversation_full"
    message = document(app, answer["conversationId"])["messages"][-1]
    assert text_of(events) == message["content"] and message["status"] == "failed"
    assert 0 <= store_module.REPLY_ROOM + 20_000 - len(message["content"].encode()) < 20_000
    response = await app.client.post("More", answer["conversationId"])
    assert (response.status_code, response.json()["code"]) == (409, "conversation_full")


async def test_signal_while_two_hundred_replies_stream_ends_each_reply_and_stream_in_order(
    make_server: Callable[..., Server], database: Database
) -> None:
    # No reply may end by itself before the last of the streams is open, however busy the machine is.
    settings = {"SIMULATED_TOKEN_DELAY_MS": 200, "SIMULATED_TOKENS": 1_000, "DRAIN_S": 0.5}
    server = await asyncio.to_thread(make_server(**settings).start)
    client = Client(server.url)
    answers = await asyncio.gather(*(client.say(f"n {n}") for n in range(200)))
    opened = await asyncio.gather(
        *(
            RawStream(
                server.port,
                f"/chat/stream/{each['conversationId']}?until=done",
                headers=f"Last-Event-ID: {each['lastEventId']}\r\n",
            ).open()
            for each in answers
            for _ in range(5)
        )
    )
    assert {stream.head.split("\r\n")[0] for stream in opened} == {"HTTP/1.1 200 OK"}
    readers = [asyncio.create_task(_all_events(stream)) for stream in opened]
    assert "chatserver_open_streams 1000.0" in (await client.http.get("/metrics")).text
    began = asyncio.get_running_loop().time()
    server.signal(signal.SIGTERM)
    assert await asyncio.to_thread(server.wait) == 0
    # The time to drain, to store, and for the streams' last words; on a busy machine.
    assert asyncio.get_running_loop().time() - began < 10
    received = await asyncio.gather(*readers)
    for number, answer in enumerate(answers):
        found = database.conversations.find_one({"_id": ObjectId(answer["conversationId"])})
        message = found["messages"][-1]
        for events in received[5 * number : 5 * number + 5]:
            assert (message["status"], events[-1].name) == ("interrupted", "error")
            assert message["content"] == text_of(events) and "reply" not in found
    await client.close()
