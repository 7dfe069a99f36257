"""The end of the server while replies and streams are open."""

import asyncio
import signal
from collections.abc import Callable
from typing import Any

import pytest
from bson import ObjectId

from chatserver.replies.registry import Phase
from tests.apps import Database, MakeApp
from tests.clients import Client, Event, RawStream, text_of
from tests.http.turns import document
from tests.processes import Server

pytestmark = pytest.mark.gen_test


async def _all_events(stream: RawStream) -> list[Event]:
    """Return the events of a stream up to its end, and close it."""
    events = [event async for event in stream.events()]
    stream.close()
    return events


async def test_reply_started_after_the_drain_time_is_interrupted(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await make_app(simulated_token_delay_ms=50, simulated_tokens=1000)
    begin, held = app.store.start_turn, asyncio.Event()

    async def late(*arguments: Any, **options: Any) -> Any:
        begun = await begin(*arguments, **options)
        await held.wait()
        return begun

    monkeypatch.setattr(app.store, "start_turn", late)
    saying = asyncio.create_task(app.client.say("Hello"))
    await app.until(lambda: app.replies.starting)
    draining = asyncio.create_task(app.replies.drain())
    await app.until(lambda: app.replies.phase is Phase.INTERRUPTING)
    held.set()
    answer = await saying
    await asyncio.wait_for(draining, 2)
    assert document(app, answer["conversationId"])["messages"][-1]["status"] == "interrupted"


@pytest.mark.alone
async def test_signal_during_two_hundred_replies_ends_each_reply_and_stream_in_order(
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
    # Time to drain, to store, and to flush the streams, on a busy machine.
    assert asyncio.get_running_loop().time() - began < 10
    received = await asyncio.gather(*readers)
    for number, answer in enumerate(answers):
        found = database.conversations.find_one({"_id": ObjectId(answer["conversationId"])})
        message = found["messages"][-1]
        for events in received[5 * number : 5 * number + 5]:
            assert (message["status"], events[-1].name) == ("interrupted", "error")
            assert message["content"] == text_of(events) and "reply" not in found
    await client.close()
