"""Turns with the OpenAI source, through the server."""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from chatserver.sources.openai import OpenAI
from tests.apps import App, MakeApp
from tests.clients import RawStream, text_of
from tests.http.openai.provider import (
    KEY,
    STORY,
    LLMock,
    fails_loudly,
    settings,
)
from tests.processes import Server


async def app_on(make_app: MakeApp, llm: LLMock, **changes: Any) -> App:
    return await make_app(source=OpenAI(settings(llm.url, **changes)))


async def failed_turn(app: App) -> tuple[str, dict[str, Any]]:
    """Run a turn that fails; return the streamed text and the reply from the history."""
    answer, events = await app.client.turn("hello")
    history = await app.client.history(answer["conversationId"])
    [_, reply] = history["messages"]
    assert [event.name for event in events].count("error") == 1
    assert events[-1].name == "error"
    assert events[-1].data == {**reply["error"], "messageId": answer["replyId"]}
    assert reply["status"] == "failed"
    assert history["status"] == "idle"
    assert KEY not in json.dumps(history) + json.dumps([event.data for event in events])
    return text_of(events), reply


@pytest.mark.gen_test
async def test_a_turn_is_streamed_and_stored_and_the_next_one_sends_it(make_app: MakeApp, llm: LLMock) -> None:
    llm.script({"type": "reply", "text": STORY}, {"type": "reply", "text": "The end."})
    app = await app_on(make_app, llm)
    answer, events = await app.client.turn("Tell me a story")
    assert events[-1].name == "done"
    assert text_of(events) == STORY
    await app.client.turn("And then?", answer["conversationId"])
    messages = (await app.client.history(answer["conversationId"]))["messages"]
    contents = [message["content"] for message in messages]
    assert contents == ["Tell me a story", STORY, "And then?", "The end."]
    requests = await asyncio.to_thread(llm.requests)
    assert [message["content"] for message in requests[1]["body"]["messages"]] == contents[:3]


@fails_loudly
@pytest.mark.parametrize(
    ("behaviors", "text", "code"),
    [
        pytest.param([{"type": "fail", "status": 401, "message": KEY}], "", "source_authentication", id="401"),
        pytest.param([{"type": "fail", "status": 429, "retry_after": 99}], "", "source_rate_limited", id="429"),
        pytest.param([{"type": "fail", "status": 500, "times": 3}], "", "source_unavailable", id="500"),
        *(
            pytest.param(
                [
                    {"type": "reply", "text": STORY},
                    {"type": "stream_fault", "kind": kind, "after_chunks": 4, "stall_seconds": 30},
                ],
                "Once upon a ",
                code,
                id=kind,
            )
            for kind, code in (
                ("disconnect", "source_cut"),
                ("truncate", "source_cut"),
                ("stall", "source_timeout"),
                ("malformed", "source_invalid"),
            )
        ),
        pytest.param([{"type": "reply", "text": ""}], "", "source_empty", id="empty"),
        pytest.param(
            [{"type": "reply", "text": "Well", "finish_reason": "content_filter"}],
            "Well",
            "source_refused",
            id="filter",
        ),
    ],
)
@pytest.mark.gen_test
async def test_a_failure_is_one_error_event_and_the_text_is_kept(
    make_app: MakeApp, llm: LLMock, behaviors: list[dict[str, Any]], text: str, code: str
) -> None:
    llm.script(*behaviors)
    streamed, reply = await failed_turn(await app_on(make_app, llm, openai_read_timeout_s=0.5))
    assert reply["content"] == streamed == text
    assert reply["error"]["code"] == code


@fails_loudly
@pytest.mark.gen_test
async def test_a_busy_server_is_asked_again_while_the_client_waits(make_app: MakeApp, llm: LLMock) -> None:
    llm.script({"type": "fail", "status": 429, "retry_after": 1}, {"type": "reply", "text": STORY})
    _, events = await (await app_on(make_app, llm)).client.turn("hello")
    assert events[-1].name == "done"
    assert text_of(events) == STORY


@fails_loudly
@pytest.mark.gen_test
async def test_a_failed_reply_that_is_retried_is_not_sent_again(make_app: MakeApp, llm: LLMock) -> None:
    llm.script(
        {"type": "reply", "text": STORY},
        {"type": "stream_fault", "kind": "disconnect", "after_chunks": 4},
        {"type": "reply", "text": "Better."},
    )
    app = await app_on(make_app, llm)
    answer, _ = await app.client.turn("hello")
    again = (await app.client.http.post(f"/chat/{answer['conversationId']}/retry")).json()
    events = await app.client.events(answer["conversationId"], again["lastEventId"])
    assert text_of(events) == "Better."
    first, second = await asyncio.to_thread(llm.requests)
    assert first["body"]["messages"] == second["body"]["messages"]


@pytest.mark.gen_test
async def test_a_client_that_disconnects_ends_nothing(make_app: MakeApp, llm: LLMock) -> None:
    llm.script({"type": "reply", "text": STORY})
    app = await app_on(make_app, llm)
    answer = await app.client.say("hello")
    stream = await RawStream(app.port, f"/chat/stream/{answer['conversationId']}").open()
    async for event in stream.events():
        if event.name == "token":
            break
    stream.close()
    await app.until_idle()
    [_, reply] = (await app.client.history(answer["conversationId"]))["messages"]
    assert (reply["content"], reply["status"]) == (STORY, "complete")
    [request] = await asyncio.to_thread(llm.requests)
    assert request["completed"]


@pytest.mark.gen_test
async def test_stop_ends_the_request(make_app: MakeApp, llm: LLMock) -> None:
    llm.script({"type": "reply", "text": STORY * 20})
    app = await app_on(make_app, llm)
    answer = await app.client.say("hello")
    text = ""
    async for event in app.client.stream(answer["conversationId"], answer["lastEventId"], until_done=True):
        if event.name == "token" and not text:
            stopped = await app.client.http.post(f"/chat/{answer['conversationId']}/stop")
            assert stopped.json()["status"] == "stopping"
        text += event.data.get("text", "")
    [_, reply] = (await app.client.history(answer["conversationId"]))["messages"]
    assert (reply["content"], reply["status"]) == (text, "stopped")
    [request] = await asyncio.to_thread(llm.requests)
    assert not request["completed"]
    assert request["chunks_sent"] < 200, "not to the end of some 400"


def test_the_process_logs_neither_the_key_nor_any_text(make_server: Callable[..., Server], llm: LLMock) -> None:
    server = make_server(
        REPLY_SOURCE="openai", OPENAI_API_KEY=KEY, OPENAI_BASE_URL=f"{llm.url}/v1", LOG_LEVEL="debug", LOG_FORMAT="json"
    ).start()
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for behavior, expected in (
            ({"type": "reply", "text": STORY}, "event: done"),
            ({"type": "fail", "status": 401, "message": f"Wrong: Bearer {KEY}"}, "source_authentication"),
            ({"type": "fail", "status": 422, "message": "Wrong: a private matter"}, "source_failed"),
        ):
            llm.script(behavior)
            answer = client.post("/chat", json={"input": "a private matter"}).json()
            query = {"until": "done", "lastEventId": answer["lastEventId"]}
            stream = client.get(f"/chat/stream/{answer['conversationId']}", params=query)
            assert expected in stream.text
            assert KEY not in stream.text
    assert server.stop() == 0
    assert "401" in server.output
    assert KEY not in server.output
    assert "private" not in server.output and STORY[:9] not in server.output
    assert set(re.findall(r'"logger": "(\w+)', server.output)) == {"chatserver"}
