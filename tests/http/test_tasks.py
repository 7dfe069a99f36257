"""Background jobs survive an unexpected exception: each of them fails once."""

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from chatserver import tasks
from chatserver.errors import DatabaseUnavailable, OutcomeUnknown
from chatserver.hub import LiveConversation, delivery
from chatserver.mongod import Mongod
from chatserver.replies import publishing
from chatserver.store.batcher import Batcher
from chatserver.streams import Connection
from tests.apps import App, MakeApp, Script
from tests.clients import RawStream, new_id, text_of

pytestmark = [pytest.mark.gen_test, pytest.mark.expects_log("background job failed; retrying")]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "PAUSE_S", 0.01)


class Broken:
    """Replaces a function and raises at its first call, or whenever `when` holds for its arguments."""

    def __init__(self, function: Callable[..., Any], when: Callable[..., bool] | None = None) -> None:
        self.calls = 0
        self._function = function
        self._when = when

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self._when(*arguments) if self._when else self.calls == 1:
            raise LookupError("nobody foresaw this")
        return self._function(*arguments, **options)


def stored(app: App, conversation_id: str) -> Any:
    return app.database.conversations.find_one({"_id": ObjectId(conversation_id)})


@pytest.mark.parametrize("error", [LookupError("nobody foresaw this"), asyncio.CancelledError()])
async def test_step_is_run_again_until_it_is_done(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    outcomes: list[Any] = [None, error, DatabaseUnavailable(), False, True]

    async def step() -> bool | None:
        outcome = outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome  # type: ignore[no-any-return]

    await tasks.repeat(step, expected=(DatabaseUnavailable,))
    assert not outcomes
    records = [record for record in caplog.records if record.name == "chatserver.tasks"]
    assert len(records) == 1 and records[0].exc_info is not None


async def test_job_ends_when_its_task_is_cancelled() -> None:
    task = asyncio.create_task(tasks.repeat(lambda: asyncio.sleep(60)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.process
@pytest.mark.expects_log("private MongoDB server has exited")
async def test_private_server_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mongod = Mongod(tmp_path, replica_set=False)
    await mongod.start()
    monkeypatch.setattr(mongod, "_spawn", Broken(mongod._spawn))
    killed = int((tmp_path / "db" / "mongod.lock").read_text())
    keeping = asyncio.create_task(mongod.keep_running())
    try:
        os.kill(killed, signal.SIGKILL)
        async with asyncio.timeout(20):
            while (tmp_path / "db" / "mongod.lock").read_text().strip() in ("", str(killed)):
                await asyncio.sleep(0.05)
    finally:
        keeping.cancel()
        mongod.kill()
        await mongod.stop()


@pytest.mark.expects_log("a subscriber failed and is aborted")
async def test_streams_are_looked_after(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app = await make_app()
    bad, good = new_id(), new_id()
    streams = [await RawStream(app.port, f"/chat/stream/{each}").open() for each in (bad, good)]
    await app.until(lambda: app.subscribers == 2)
    ticked: list[str] = []
    tick = Connection.tick

    def failing(connection: Connection, *arguments: Any) -> bool:
        assert connection.live is not None
        ticked.append(connection.live.key.id)
        if ticked[-1] == bad:
            raise LookupError("nobody foresaw this")
        return tick(connection, *arguments)

    monkeypatch.setattr(Connection, "tick", failing)
    monkeypatch.setattr(app.streams, "tick", Broken(app.streams.tick))
    await app.until(lambda: ticked.count(good) == 2)
    assert ticked.count(bad) == 1 and app.subscribers == 1
    for stream in streams:
        stream.close()


async def test_event_loop_is_measured_again_after_a_failure(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app = await make_app()
    observe = Broken(lambda _lag: None)
    monkeypatch.setattr(app.server.loop_lag, "observe", observe)
    await app.until(lambda: observe.calls == 2)


@pytest.mark.expects_log("a subscriber failed and is aborted")
async def test_subscriber_that_fails_does_not_stop_the_delivery_to_others(make_app: MakeApp) -> None:
    gate = asyncio.Semaphore(0)
    app = await make_app(source=Script("a", "b", gate=gate))
    answer = await app.client.say("hi")
    path = f"/chat/stream/{answer['conversationId']}?lastEventId={answer['lastEventId']}"
    broken = await RawStream(app.port, path).open()
    await app.until(lambda: app.subscribers == 1)
    (subscriber,) = app.hub.conversations[0].subscribers
    events = asyncio.create_task(app.client.events(answer["conversationId"], answer["lastEventId"]))
    await app.until(lambda: app.subscribers == 2)
    subscriber.write = Broken(subscriber.write)  # type: ignore[method-assign]
    gate.release()
    gate.release()
    gate.release()
    assert text_of(await events) == "ab"
    await app.until(lambda: app.listener.open <= 1)
    broken.close()


@pytest.mark.expects_log("a delivery failed")
async def test_conversation_that_fails_does_not_stop_the_delivery_of_others(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await make_app()
    bad, good = new_id(), new_id()
    deliver = LiveConversation.deliver
    broken = Broken(deliver, lambda live: live.key.id == bad)
    monkeypatch.setattr(LiveConversation, "deliver", lambda live: broken(live))
    # The delivery loop itself fails, too.
    monkeypatch.setattr(delivery, "monotonic", Broken(time.monotonic))
    stream = await RawStream(app.port, f"/chat/stream/{bad}").open()
    await app.client.say("hi", bad)
    _, events = await app.client.turn("hi", good)
    assert events[-1].name == "done"
    await app.until(lambda: all(each.key.id != bad or not each.subscribers for each in app.hub.conversations))
    stream.close()


@pytest.mark.expects_log("a checkpoint failed")
async def test_reply_that_cannot_be_checkpointed_costs_the_others_nothing(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Semaphore(0)
    app = await make_app(source=Script("kept ", "rest", gate=gate))
    bad, good = await app.client.say("hi"), await app.client.say("hi")
    gate.release()
    gate.release()
    broken = Broken(app.store.checkpoint, lambda replies: bad["replyId"] in replies)
    monkeypatch.setattr(app.store, "checkpoint", broken)
    await app.until(lambda: stored(app, good["conversationId"]).get("reply", {}).get("content") == "kept ")
    await app.until(lambda: app.replies.running == 1)
    assert stored(app, bad["conversationId"])["messages"][-1]["status"] == "failed"
    gate.release()
    gate.release()
    events = await app.client.events(good["conversationId"], good["lastEventId"])
    assert text_of(events) == "kept rest" and events[-1].name == "done"


@pytest.mark.expects_log("a reply could not be stored; retrying")
async def test_reply_is_stored_after_all(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app = await make_app(source=Script("every ", "word"))
    monkeypatch.setattr(app.store, "finish", Broken(app.store.finish))
    _, events = await app.client.turn("hi")
    assert text_of(events) == "every word" and events[-1].data["status"] == "complete"


@pytest.mark.expects_log("a reply could not be stored or published")
async def test_end_that_cannot_be_published_is_published_from_what_is_stored(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await make_app(source=Script("every ", "word"))
    monkeypatch.setattr(publishing, "publish_end", Broken(publishing.publish_end))
    _, events = await app.client.turn("hi")
    assert text_of(events) == "every word" and events[-1].data["status"] == "complete"


@pytest.mark.expects_log("an expired reply could not be finished")
async def test_expired_replies_are_finished(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = asyncio.Semaphore(0)
    lost = await make_app(source=Script("a", gate=gate), checkpoint_ms=60_000, lease_ms=180_000)
    other = await make_app(lease_ms=200, checkpoint_ms=20)
    bad, *others = [new_id() for _ in range(3)]
    monkeypatch.setattr(other.store, "find_expired", Broken(other.store.find_expired))
    finish = Broken(other.store.finish, lambda conversation, _: conversation.id == bad)
    monkeypatch.setattr(other.store, "finish", finish)
    # Posted only now: the other server must not expire a reply before its store is broken.
    for conversation_id in (bad, *others):
        await lost.client.say("hi", conversation_id)
    for conversation_id in others:
        await other.until(lambda each=conversation_id: "reply" not in stored(other, each))
    assert "reply" in stored(other, bad)
    for _ in range(6):
        gate.release()


async def test_reply_of_another_server_is_followed(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = asyncio.Semaphore(1)
    writer = await make_app(source=Script("a", "b", gate=gate))
    answer = await writer.client.say("hi")
    await writer.until(lambda: stored(writer, answer["conversationId"]).get("reply", {}).get("content") == "a")
    other = await make_app()
    broken = Broken(other.store.read, lambda *_: broken.calls in (2, 3))
    monkeypatch.setattr(other.store, "read", broken)
    events = asyncio.create_task(other.client.events(answer["conversationId"], answer["lastEventId"]))
    await other.until(lambda: broken.calls > 4)
    gate.release()
    gate.release()
    assert text_of(await events) == "ab"


async def test_turn_with_an_unknown_outcome_is_settled(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app = await make_app()
    begin = app.store.start_turn

    async def silent(*arguments: Any, **options: Any) -> Any:
        await begin(*arguments, **options)
        raise OutcomeUnknown

    monkeypatch.setattr(app.store, "start_turn", silent)
    monkeypatch.setattr(app.store, "find_started", Broken(app.store.find_started))
    conversation_id = new_id()
    assert (await app.client.post("hi", conversation_id)).status_code == 503
    events = await app.client.events(conversation_id, f"{conversation_id}-0")
    assert [events[0].name, events[-1].name] == ["input", "done"]


async def test_call_for_many_that_answers_only_some_is_an_error_to_all() -> None:
    async def one_answer(_: Any) -> list[int]:
        return [1]

    joined: Batcher[int, int] = Batcher(one_answer)
    async with asyncio.timeout(5):
        assert await joined.submit(0) == 1
        answers = await asyncio.gather(joined.submit(1), joined.submit(2))
    assert list(answers) == [1, 1]  # asked again, one by one
