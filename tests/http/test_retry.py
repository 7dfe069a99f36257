"""Retrying a reply that failed."""

import asyncio

import pytest

from chatserver.errors import SourceError
from tests.apps import MakeApp, Script
from tests.clients import Transcript

pytestmark = pytest.mark.gen_test


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
    assert [event.name for event in await watcher] == ["head", "token", "done"]
    history = await app.client.history(conversation_id)
    assert [(each["content"], each["status"]) for each in history["messages"]] == [
        ("Hello", "complete"),
        ("whole", "complete"),
    ]
    assert history["messages"][1]["siblings"] == [answer["replyId"], again["replyId"]]
    everything = (await app.client.http.get(f"/chat/{conversation_id}?branches=all")).json()
    assert [(each["content"], each["status"]) for each in everything["messages"]] == [
        ("Hello", "complete"),
        ("half", "failed"),
        ("whole", "complete"),
    ]
    # A client in the middle of the first reply receives its end, then the second reply.
    seen = Transcript()
    async for event in app.client.stream(conversation_id, f"{answer['replyId']}-2"):
        seen.take(event)
        if again["replyId"] in seen.ended:
            break
    assert seen.said == {answer["replyId"]: "lf", again["replyId"]: "whole"}
    assert seen.ended == {answer["replyId"]: "source_failed", again["replyId"]: "complete"}
    # A complete reply is retried, too.
    assert (await app.client.http.post(f"/chat/{conversation_id}/retry")).status_code == 202


async def test_simultaneous_retries_start_one_reply(make_app: MakeApp) -> None:
    source = Script(SourceError("source_failed", "no"))
    app = await make_app(source=source)
    answer, _ = await app.client.turn("Hello")
    source.pieces = ("x",)
    source.gate = asyncio.Semaphore(0)
    retries = [app.client.http.post(f"/chat/{answer['conversationId']}/retry") for _ in range(5)]
    assert sorted(response.status_code for response in await asyncio.gather(*retries)) == [202, 409, 409, 409, 409]
