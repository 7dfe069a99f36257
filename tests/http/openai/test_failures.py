"""Failures of a model provider, and the reply after each."""

import asyncio
import socket
import traceback
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, aclosing
from typing import Any

import pytest

from chatserver.sources import openai as source_module
from chatserver.sources.openai import OpenAI
from tests.http.openai.provider import (
    KEY,
    STORY,
    LLMock,
    ask,
    fails_loudly,
    opened,
    prompt,
    settings,
)


@fails_loudly
@pytest.mark.parametrize(
    ("fail", "code", "advice"),
    [
        ({"status": 401}, "source_authentication", "OPENAI_API_KEY"),
        ({"status": 403}, "source_authentication", "OPENAI_MODEL"),
        ({"status": 404}, "source_failed", "OPENAI_MODEL"),
        ({"status": 400}, "source_failed", "OPENAI_MODEL"),
        ({"status": 400, "code": "context_length_exceeded"}, "source_failed", "OPENAI_HISTORY_CHARS"),
        ({"status": 400, "code": "content_filter"}, "source_refused", "Rephrase"),
        ({"status": 402}, "source_rate_limited", "no credit"),
        ({"status": 429, "code": "insufficient_quota"}, "source_rate_limited", "no credit"),
        ({"status": 405}, "source_failed", "OPENAI_BASE_URL"),
        ({"status": 413}, "source_failed", "too long"),
        ({"status": 429, "retry_after": 60}, "source_rate_limited", "in 60 s"),
        ({"status": 503, "retry_after": 3600}, "source_unavailable", "in 3600 s"),
    ],
)
def test_an_error_that_would_not_pass_soon_ends_the_reply_at_once(
    llm: LLMock, fail: dict[str, Any], code: str, advice: str
) -> None:
    llm.script({"type": "fail", "times": None, "message": f"Wrong, Bearer {KEY}!", **fail})
    outcome = ask(settings(llm.url))
    assert outcome.error is not None
    assert outcome.code == code
    assert advice in outcome.error.message
    assert KEY not in outcome.error.message
    assert KEY not in "".join(traceback.format_exception(outcome.error)), "the SDK's error holds the server's words"
    assert outcome.text == ""
    assert len(llm.requests()) == 1


@fails_loudly
def test_retry_after_is_waited_for(llm: LLMock) -> None:
    llm.script({"type": "fail", "status": 429, "retry_after": 1}, {"type": "reply", "text": STORY})
    outcome = ask(settings(llm.url))
    assert outcome.text == STORY
    assert 1 <= outcome.seconds < 4
    assert len(llm.requests()) == 2
    assert llm.verdict() == []


@fails_loudly
@pytest.mark.parametrize(("status", "code"), [(429, "source_rate_limited"), (500, "source_unavailable")])
def test_a_few_attempts_are_made_with_growing_pauses(llm: LLMock, status: int, code: str) -> None:
    llm.script({"type": "fail", "status": status, "retry_after": None, "times": 2}, {"type": "reply", "text": STORY})
    assert ask(settings(llm.url)).text == STORY
    assert len(llm.requests()) == 3
    llm.script({"type": "fail", "status": status, "times": None, "message": KEY})
    outcome = ask(settings(llm.url))
    assert outcome.code == code
    assert outcome.text == ""
    assert len(llm.requests()) == 6
    assert llm.verdict() == []


@fails_loudly
def test_a_refused_connection_is_reported_after_a_few_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "FIRST_WAIT_S", 0.01)
    with socket.socket() as bound:  # to a port, but it does not listen
        bound.bind(("127.0.0.1", 0))
        outcome = ask(settings(f"http://127.0.0.1:{bound.getsockname()[1]}"))
    assert outcome.error is not None
    assert outcome.code == "source_unavailable"
    assert "OPENAI_BASE_URL" in outcome.error.message


@fails_loudly
def test_a_server_that_takes_no_connection_is_left_after_the_connect_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "FIRST_WAIT_S", 0.01)
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # fill its queue, which is never emptied
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        outcome = ask(
            settings(
                f"http://127.0.0.1:{full.getsockname()[1]}", openai_connect_timeout_s=0.2, openai_read_timeout_s=60
            )
        )
    assert outcome.code == "source_unavailable"
    assert 0.6 <= outcome.seconds < 5


@fails_loudly
@pytest.mark.parametrize(
    ("kind", "code"), [("disconnect", "source_cut"), ("truncate", "source_cut"), ("malformed", "source_invalid")]
)
def test_a_disconnect_keeps_the_text_and_is_not_retried(llm: LLMock, kind: str, code: str) -> None:
    llm.script({"type": "reply", "text": STORY}, {"type": "stream_fault", "kind": kind, "after_chunks": 5})
    outcome = ask(settings(llm.url))
    assert outcome.code == code
    assert outcome.text == "Once upon a time "  # the first chunk has no text
    assert len(llm.requests()) == 1


@fails_loudly
@pytest.mark.parametrize("kind", ["disconnect", "truncate"])
def test_a_disconnect_before_the_first_token_is_retried(llm: LLMock, kind: str) -> None:
    llm.script(
        {"type": "stream_fault", "kind": kind, "after_chunks": 1},
        {"type": "reply", "text": STORY, "times": 2},
    )
    outcome = ask(settings(llm.url))
    assert (outcome.text, outcome.error) == (STORY, None)
    assert len(llm.requests()) == 2


@pytest.mark.parametrize("after_chunks", [0, 3])
def test_a_silent_server_is_abandoned(llm: LLMock, after_chunks: int) -> None:
    llm.script(
        {"type": "reply", "text": STORY},
        {"type": "stream_fault", "kind": "stall", "after_chunks": after_chunks, "stall_seconds": 30},
    )
    outcome = ask(settings(llm.url, openai_read_timeout_s=0.5))
    assert outcome.code == "source_timeout"
    assert 0.5 <= outcome.seconds < 3
    assert STORY.startswith(outcome.text)
    [request] = llm.requests()
    assert not request["completed"]


@pytest.mark.parametrize(
    ("finish", "code"),
    [("content_filter", "source_refused"), ("length", "source_length"), ("tool_calls", "source_invalid")],
)
def test_an_incomplete_answer_is_an_error(llm: LLMock, finish: str, code: str) -> None:
    llm.script({"type": "reply", "text": STORY, "finish_reason": finish})
    outcome = ask(settings(llm.url))
    assert outcome.code == code
    assert outcome.text == STORY


async def close_reply(source: OpenAI) -> None:
    async with aclosing(source.reply(prompt("hello"))) as reply:
        assert await anext(reply)


async def cancel_reply(source: OpenAI) -> None:
    speaking = asyncio.Event()

    async def consume() -> None:
        async for _ in source.reply(prompt("hello")):
            speaking.set()

    task = asyncio.create_task(consume())
    await speaking.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("leave", [close_reply, cancel_reply])
def test_closing_a_reply_aborts_the_request_and_leaves_no_task(
    llm: LLMock, leave: Callable[[OpenAI], Awaitable[None]]
) -> None:
    llm.script({"type": "reply", "text": STORY * 20, "times": None})

    async def run() -> list[dict[str, Any]]:
        async with opened(settings(llm.url)) as source:
            await leave(source)
            requests = await asyncio.to_thread(llm.requests)  # with the client still open
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return requests

    [request] = asyncio.run(run())
    assert request["completed"] is False
    assert request["chunks_sent"] < 100, "not to the end of some 400"
