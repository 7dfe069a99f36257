"""The OpenAI source over HTTP: against llmock and aimock, not written here, and answers that neither of them gives."""

import asyncio
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from chatserver.errors import SetupError, SourceError
from chatserver.settings import Settings, read_settings
from chatserver.sources import Message, Prompt, make_source
from chatserver.sources import openai as source_module
from chatserver.sources.openai import OpenAI
from tests.apps import App, MakeApp
from tests.clients import RawStream, text_of
from tests.servers import Server

KEY = "sk-test-4f9d2c7b8a1e6035"
AIMOCK = Path(__file__).parent / "node/node_modules/@copilotkit/aimock/dist/cli.js"
fails_loudly = pytest.mark.expects_log("the model's server failed")
STORY = "Once upon a time there was a server that never lost a word, and everybody who listened heard it all."


def settings(url: str, **changes: Any) -> Settings:
    base = Settings(
        reply_source="openai",
        openai_api_key=KEY,
        openai_base_url=f"{url}/v1",
        openai_connect_timeout_s=2,
        openai_read_timeout_s=5,
    )
    return replace(base, **changes)


def prompt(*contents: str) -> Prompt:
    """Return a prompt of which the last content is the user's, the one before it the assistant's, and so on."""
    roles = ("user", "assistant")
    messages = [Message(roles[(len(contents) - 1 - i) % 2], content) for i, content in enumerate(contents)]
    return Prompt(messages, turn=(len(contents) + 1) // 2)


@dataclass
class Outcome:
    pieces: list[str]
    error: SourceError | None
    seconds: float

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def code(self) -> str | None:
        return None if self.error is None else self.error.code


async def listen(source: OpenAI, question: Prompt) -> Outcome:
    """Take a whole reply, as the chat does."""
    pieces: list[str] = []
    error = None
    started = time.monotonic()
    try:
        async with aclosing(source.reply(question)) as reply:
            async for piece in reply:
                pieces.append(piece)
    except SourceError as failure:
        error = failure
    return Outcome(pieces, error, time.monotonic() - started)


@asynccontextmanager
async def opened(chosen: Settings) -> AsyncIterator[OpenAI]:
    source = OpenAI(chosen)
    try:
        yield source
    finally:
        await source.close()


def ask(chosen: Settings, *contents: str) -> Outcome:
    async def run() -> Outcome:
        async with opened(chosen) as source:
            return await listen(source, prompt(*(contents or ("hello",))))

    return asyncio.run(run())


def started(command: list[str], address: str, **environment: str) -> Iterator[str]:
    """Start a server and give its address, found in what it prints; end it afterwards."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    )
    assert process.stdout is not None
    try:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if found := re.search(address, line):
                yield found[1]
                break
        else:
            pytest.fail("".join(printed))
    finally:
        process.terminate()
        process.communicate(timeout=10)


class LLMock:
    """The control API of llmock."""

    def __init__(self, url: str) -> None:
        self.url = url

    def script(self, *behaviors: dict[str, Any]) -> None:
        httpx.post(f"{self.url}/_llmock/scenario", json={"behaviors": behaviors}).raise_for_status()

    def requests(self) -> list[dict[str, Any]]:
        """Return the requests so far, once none is in flight any more."""
        answer = httpx.get(f"{self.url}/_llmock/requests").raise_for_status().json()
        found: list[dict[str, Any]] = answer["requests"]
        return found

    def verdict(self) -> list[str]:
        """Return what llmock finds wrong with its client's manners."""
        answer = httpx.get(f"{self.url}/_llmock/verdict").raise_for_status().json()
        return [finding["code"] for finding in answer["findings"]]


@pytest.fixture(scope="module")
def llmock_url() -> Iterator[str]:
    command = [str(Path(sys.executable).with_name("llmock")), "serve", "--port", "0", "--stream-chunk-delay-ms", "10"]
    yield from started(command, r"running on (http://127\.0\.0\.1:\d+)")


@pytest.fixture
def llm(llmock_url: str, monkeypatch: pytest.MonkeyPatch) -> LLMock:
    monkeypatch.setattr(source_module, "FIRST_WAIT_S", 0.1)
    httpx.post(f"{llmock_url}/_llmock/reset").raise_for_status()
    return LLMock(llmock_url)


@pytest.fixture(autouse=True)
def never_the_key(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Hold every test to it: the key is in no log record."""
    caplog.set_level("INFO")
    yield
    assert KEY not in "\n".join(record.getMessage() for record in caplog.get_records("call"))


# --- what is asked


def test_a_plain_answer_arrives_in_pieces(llm: LLMock) -> None:
    llm.script({"type": "reply", "text": STORY})
    outcome = ask(settings(llm.url))
    assert outcome.text == STORY
    assert outcome.error is None
    assert len(outcome.pieces) > 10
    [request] = llm.requests()
    assert request["body"] == {
        "model": "gpt-4.1-mini",
        "stream": True,
        "messages": [{"role": "user", "content": "hello"}],
    }
    assert llm.verdict() == []


def test_the_settings_are_sent(llm: LLMock) -> None:
    ask(
        settings(
            llm.url,
            openai_model="another",
            openai_system_prompt="Be brief.",
            openai_temperature=0.0,
            openai_max_tokens=77,
        ),
        "one",
        "two",
        "three",
    )
    [request] = llm.requests()
    assert request["body"] == {
        "model": "another",
        "stream": True,
        "temperature": 0.0,
        "max_tokens": 77,
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ],
    }


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (16, ["five", "six!", "last"]),  # "four" is an answer without its question
        (12, ["five", "six!", "last"]),
        (11, ["last"]),
        (1, ["last"]),
        (1_000, ["one", "two", "three", "four", "five", "six!", "last"]),
    ],
)
def test_the_newest_messages_that_fit_are_sent_and_the_question_always(
    llm: LLMock, room: int, expected: list[str]
) -> None:
    ask(settings(llm.url, openai_history_chars=room), "one", "two", "three", "four", "five", "six!", "last")
    [request] = llm.requests()
    assert [message["content"] for message in request["body"]["messages"]] == expected


@pytest.mark.parametrize(
    ("said", "sent"),
    [
        pytest.param(["one", "", "three"], ["user: one\n\nthree"], id="reply-without-text"),
        pytest.param(["one", " \n\t", "three"], ["user: one\n\nthree"], id="blank-reply"),
        pytest.param(
            ["one", "two", "three", "", "five", "", "seven"],
            ["user: one", "assistant: two", "user: three\n\nfive\n\nseven"],
            id="two-questions-without-an-answer",
        ),
        pytest.param(
            ["one", "two", " ", "four", "five"],
            ["user: one", "assistant: two\n\nfour", "user: five"],
            id="blank-question-of-another-application",
        ),
        pytest.param(["", "two", "three"], ["user: three"], id="answer-without-its-question"),
        pytest.param(["", "two", "", "four", "five"], ["user: five"], id="two-answers-without-their-questions"),
        pytest.param(
            ["  one\n", "two", " three "], ["user:   one\n", "assistant: two", "user:  three "], id="verbatim"
        ),
    ],
)
def test_roles_alternate_and_nothing_blank_is_sent(llm: LLMock, said: list[str], sent: list[str]) -> None:
    ask(settings(llm.url), *said)
    [request] = llm.requests()
    assert [f"{message['role']}: {message['content']}" for message in request["body"]["messages"]] == sent


@pytest.mark.parametrize(
    "messages", [[], [Message("user", " ")], [Message("user", "one"), Message("assistant", "two")]]
)
def test_a_prompt_without_a_question_fails_and_nothing_is_sent(llm: LLMock, messages: list[Message]) -> None:
    async def run() -> Outcome:
        async with opened(settings(llm.url)) as source:
            return await listen(source, Prompt(messages, turn=1))

    assert asyncio.run(run()).code == "source_failed"
    assert llm.requests() == []


# --- what may go wrong


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
def test_nobody_there_is_said_after_a_few_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
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
        for _ in range(4):  # fill its queue, which nobody empties
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
def test_what_was_said_before_a_break_is_kept_and_nothing_is_asked_again(llm: LLMock, kind: str, code: str) -> None:
    llm.script({"type": "reply", "text": STORY}, {"type": "stream_fault", "kind": kind, "after_chunks": 5})
    outcome = ask(settings(llm.url))
    assert outcome.code == code
    assert outcome.text == "Once upon a time "  # the first chunk has no text
    assert len(llm.requests()) == 1


@fails_loudly
@pytest.mark.parametrize("kind", ["disconnect", "truncate"])
def test_a_break_before_the_first_word_is_worth_another_attempt(llm: LLMock, kind: str) -> None:
    llm.script(
        {"type": "stream_fault", "kind": kind, "after_chunks": 1},
        {"type": "reply", "text": STORY, "times": 2},
    )
    outcome = ask(settings(llm.url))
    assert (outcome.text, outcome.error) == (STORY, None)
    assert len(llm.requests()) == 2


@pytest.mark.parametrize("after_chunks", [0, 3])
def test_a_server_that_falls_silent_is_left(llm: LLMock, after_chunks: int) -> None:
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
def test_an_end_that_is_no_end_of_a_whole_answer_is_an_error(llm: LLMock, finish: str, code: str) -> None:
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
def test_leaving_a_reply_ends_the_request_and_leaves_no_task(
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


# --- answers that neither mock gives, from a socket


@dataclass
class Raw:
    """A server that answers each request with the bytes given, then keeps the line open or closes it."""

    answer: bytes
    keep: bool = False
    url: str = ""
    head: bytes = b""
    connections: int = 0
    requests: int = 0
    tasks: set["asyncio.Task[Any] | None"] = field(default_factory=set)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Raw"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self
            await asyncio.gather(*filter(None, self.tasks))  # its clients have left

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.tasks.add(asyncio.current_task())
        try:
            while True:
                self.head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", self.head, re.IGNORECASE)
                assert length is not None
                await reader.readexactly(int(length[1]))
                self.requests += 1
                writer.write(self.answer)
                await writer.drain()
                if not self.keep:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


def ask_raw(answer: bytes, **changes: Any) -> Outcome:
    """Return the outcome of a reply by a server that answers each request with these bytes."""

    async def run() -> Outcome:
        async with Raw(answer).running() as server, opened(settings(server.url, **changes)) as source:
            return await listen(source, prompt("hello"))

    return asyncio.run(run())


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def chunk(finish: str | None = None, **delta: Any) -> bytes:
    data = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


DONE = b"data: [DONE]\n\n"


A, B, STOP = chunk(content="a"), chunk(content="b"), chunk("stop")
BROKEN = chunk(content="a") + b"data: "


def data(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def parts(*found: object) -> bytes:
    return chunk(content=list(found))


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


@fails_loudly
@pytest.mark.parametrize(
    ("body", "text", "code"),
    [
        pytest.param(A + STOP + DONE, "a", None, id="plain"),
        pytest.param(A + STOP, "a", None, id="closed-without-DONE"),
        pytest.param(A + STOP + b"data: {bro", "a", None, id="cut-after-its-end"),
        pytest.param(A + b"data: {bro", "a", "source_cut", id="cut-within-an-event"),
        pytest.param(A + STOP[:-2], "a", None, id="no-empty-line-at-the-end"),
        pytest.param(A + chunk("eos") + DONE, "a", None, id="end-by-another-name"),
        pytest.param(A + chunk("STOP") + DONE, "a", None, id="end-in-capitals"),
        pytest.param(chunk("stop", content="a") + DONE, "a", None, id="text-and-end-in-one"),
        pytest.param(
            data({"choices": []}) + A + data({"choices": [], "usage": {}}) + STOP, "a", None, id="chunks-of-figures"
        ),
        pytest.param(chunk(content="a\ud83d") + chunk(content="\ude00b") + STOP, "a😀b", None, id="split-pair"),
        pytest.param(chunk(content="\ud83d") + chunk(content="") + STOP, "�", None, id="half-a-pair-at-the-end"),
        pytest.param(chunk(content="\ude00") + STOP, "�", None, id="the-other-half"),
        pytest.param(chunk(content="\ud83dx") + STOP, "�x", None, id="half-a-pair-before-a-letter"),
        # what ends a reply
        pytest.param(A + DONE, "a", None, id="DONE-without-a-reason"),
        pytest.param(A + b"data:[DONE]", "a", None, id="DONE-without-a-space-or-a-line-end"),
        pytest.param(chunk("", content="a") + chunk("null", content="b") + DONE, "ab", None, id="empty-reasons"),
        pytest.param(A + STOP + B + DONE, "ab", None, id="text-after-the-reason"),
        pytest.param(A + STOP + B + STOP, "ab", None, id="text-after-the-reason-and-a-second-reason"),
        pytest.param(A + chunk("length") + B + STOP + DONE, "ab", "source_length", id="cut-then-stopped"),
        pytest.param(A + STOP + chunk("content_filter") + DONE, "a", "source_refused", id="stopped-then-filtered"),
        pytest.param(A + STOP + DONE + B, "a", None, id="text-after-DONE"),
        pytest.param(A, "a", "source_cut", id="neither-a-reason-nor-DONE"),
        pytest.param(A + chunk("abort"), "a", "source_cut", id="aborted"),
        pytest.param(A + chunk("insufficient_system_resource") + DONE, "a", "source_cut", id="out-of-resources"),
        pytest.param(A + chunk("made-up") + DONE, "a", "source_cut", id="unknown-reason"),
        pytest.param(A + chunk("MAX_TOKENS") + DONE, "a", "source_length", id="length-by-another-name"),
        pytest.param(A + chunk("SAFETY") + DONE, "a", "source_refused", id="filter-by-another-name"),
        pytest.param(A + chunk("tool_use") + DONE, "a", "source_invalid", id="tool-by-another-name"),
        # what does not belong to the reply
        *(
            pytest.param(A + between + B + STOP + DONE, "ab", None, id=f"between-{name}")
            for name, between in {
                "comment": b": ping\n\n",
                "comments-without-an-empty-line": b":\n: OPENROUTER PROCESSING\n",
                "comment-that-is-not-UTF-8": b": \xff\n\n",
                "retry": b"retry: 3000\n\n",
                "id": b"id: 7\n\n: ping\n\n",
                "event-without-data": b"event: keepalive\n\n",
                "empty-data": b"data\n\ndata:\n\n",
                "null": data(None),
                "number": b"data: 42\n\n",
                "many-digits": b"data: " + b"1" * 5000 + b"\n\n",
                "words": b"data: ping\n\ndata: [PING]\n\ndata: : OPENROUTER PROCESSING\n\n",
                "text": data("ping"),
                "empty-object": data({}) + data([]),
                "deep-list": b"data: " + b"[" * 200_000 + b"\n\n",
                "ping": b"event: ping\n" + data({"type": "ping"}),
                "no-choices": data({"usage": {"total_tokens": 3}, "error": None}),
                "choices-null": data({"choices": None}),
                "choice-null": data({"choices": [None]}),
                "no-delta": data({"choices": [{"index": 0, "finish_reason": None, "content_filter_offsets": {}}]}),
                "delta-null": data({"choices": [{"index": 0, "delta": None}]}),
                "content-null": chunk(content=None, reasoning_content="Let me see"),
                "unknown-field": b"data2: {}\nfoo\n\n",
            }.items()
        ),
        pytest.param(b"\xef\xbb\xbf" + A + STOP, "a", None, id="byte-order-mark"),
        pytest.param((A + B + STOP + DONE).replace(b"\n", b"\r\n"), "ab", None, id="CRLF"),
        pytest.param((A + B + STOP + DONE).replace(b"\n", b"\r"), "ab", None, id="CR"),
        pytest.param(b"id: 1\nevent: message\n" + A + b"id: 2\n" + STOP, "a", None, id="events-with-an-id"),
        # content in parts
        pytest.param(parts({"type": "thinking", "thinking": [text_part("x")]}) + A + STOP, "a", None, id="thinking"),
        pytest.param(parts(text_part("a"), {"type": "thinking"}, text_part("b")) + STOP, "ab", None, id="text-parts"),
        pytest.param(parts() + A + STOP, "a", None, id="no-parts"),
        pytest.param(A + parts("b"), "a", "source_invalid", id="part-that-is-no-object"),
        pytest.param(A + parts({"type": "text", "text": 1}), "a", "source_invalid", id="text-that-is-a-number"),
        # damage
        pytest.param(BROKEN + b"{]\n\n", "a", "source_invalid", id="no-JSON"),
        pytest.param(BROKEN + b'{"x": "\xff\xfe"}\n\n', "a", "source_invalid", id="no-UTF-8"),
        pytest.param(BROKEN + b'{"x": ' + b"[" * 200_000 + b"\n\n", "a", "source_invalid", id="deep"),
        pytest.param(BROKEN + b'{"x": ' + b"1" * 5000 + b"}\n\n", "a", "source_invalid", id="digits"),
        pytest.param(A + data({"choices": 1}), "a", "source_invalid", id="no-list-of-choices"),
        pytest.param(A + data({"choices": [1]}), "a", "source_invalid", id="no-choice"),
        pytest.param(A + data({"choices": [{"delta": 1}]}), "a", "source_invalid", id="no-delta-object"),
        pytest.param(A + data({"choices": [{"finish_reason": 1}]}), "a", "source_invalid", id="reason-is-a-number"),
        pytest.param(A + chunk(content={"x": 1}), "a", "source_invalid", id="content-is-an-object"),
        # errors in the stream
        pytest.param(A + data({"error": {"message": f"no {KEY}"}}), "a", "source_failed", id="error"),
        pytest.param(A + data({"error": f"no {KEY}"}), "a", "source_failed", id="error-of-words"),
        pytest.param(A + data([{"error": {"code": 400}}]), "a", "source_failed", id="error-in-a-list"),
        pytest.param(A + b"event: error\n" + data({"message": KEY}), "a", "source_failed", id="event-error"),
        pytest.param(A + b"event: error\ndata: " + KEY.encode() + b"\n\n", "a", "source_failed", id="event-of-words"),
        pytest.param(A + b"error: " + data({"code": 500})[6:], "a", "source_unavailable", id="field-error"),
        pytest.param(A + data({"object": "error", "code": 429}), "a", "source_rate_limited", id="object-error"),
        pytest.param(
            A + data({"type": "error", "error": {"type": "overloaded_error"}}),
            "a",
            "source_unavailable",
            id="type-error",
        ),
        pytest.param(
            A + data({"error": {"code": 502}, "choices": [{"delta": {"content": "b"}, "finish_reason": "error"}]}),
            "ab",
            "source_unavailable",
            id="error-beside-text",
        ),
        pytest.param(A + STOP + data({"error": {"code": "402"}}) + DONE, "a", "source_rate_limited", id="error-at-end"),
        # the model's own refusal
        pytest.param(
            chunk(refusal="I ") + chunk(refusal="won't.") + STOP, "", "source_refused", id="the-model-refuses"
        ),
        # sizes
        pytest.param(A + b": " + b"x" * 1_000_000, "a", "source_too_long", id="line-too-long"),
        pytest.param(A + 5 * (b"data: " + b"x" * 900_000 + b"\n"), "a", "source_too_long", id="event-too-large"),
        pytest.param(A + b": " + b"x" * 900_000 + b"\n\n" + STOP, "a", None, id="long-line"),
        pytest.param(chunk(content="é" * 150_000) + STOP, "é" * 150_000, None, id="long-event"),
    ],
)
def test_what_a_stream_may_hold(body: bytes, text: str, code: str | None) -> None:
    outcome = ask_raw(HEAD + body)
    assert outcome.text == text
    assert outcome.code == code
    if outcome.error is not None:
        assert KEY not in outcome.error.message
    if code == "source_refused" and not text:
        assert "I won't." in str(outcome.error)


@fails_loudly
def test_an_unknown_reason_to_finish_is_named_unless_it_is_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    outcome = ask_raw(HEAD + A + chunk("made-up") + DONE)
    assert "made-up" in str(outcome.error)
    assert "finish_reason=made-up" in caplog.text
    outcome = ask_raw(HEAD + A + chunk(f"a sentence with {KEY}") + DONE)
    assert outcome.code == "source_cut"
    assert KEY not in str(outcome.error)


@fails_loudly
@pytest.mark.parametrize(
    ("body", "text", "code", "advice"),
    [
        (b'{"error": {"message": "no", "code": "context_length_exceeded"}}', "", "source_failed", "too long"),
        (b'{\n  "error": {\n    "message": "no",\n    "code": 402\n  }\n}\n', "", "source_rate_limited", "credit"),
        (b'[{\n  "error": {\n    "code": 400\n  }\n}\n]', "", "source_failed", "OPENAI_MODEL"),
        (b'{"error": "model not found"}', "", "source_failed", "reported an error"),
        (b'{"object": "error", "message": "no", "code": 404}', "", "source_failed", "OPENAI_MODEL"),
        (b'{"detail": "Not Found"}', "", "source_invalid", "OPENAI_BASE_URL"),
        (b"Hello!", "", "source_invalid", "OPENAI_BASE_URL"),
        (b'{"response": "a"}\n{"response": "b"}\n', "", "source_invalid", "OPENAI_BASE_URL"),
        (b'{"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}', "a", None, ""),
        (b'{"choices": [{"message": {"content": "a"}, "finish_reason": "length"}]}', "a", "source_length", ""),
    ],
)
def test_an_answer_as_json_with_status_200(body: bytes, text: str, code: str | None, advice: str) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
    outcome = ask_raw(head + body)
    assert (outcome.text, outcome.code) == (text, code)
    assert advice in str(outcome.error)


def test_a_page_instead_of_a_stream_says_which_setting_is_wrong() -> None:
    outcome = ask_raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 9\r\n\r\n<p>Hello!")
    assert outcome.code == "source_invalid"
    assert "OPENAI_BASE_URL" in str(outcome.error)


@fails_loudly
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("9999999999999999999999", "in 86400 s"),
        ("Fri, 31 Dec 9999 23:59:59 GMT", "in 86400 s"),
        ("-5", "in a minute"),
        ("nan", "in a minute"),
        ("Wed, 21 Oct 2015 07:28:00 GMT", "in a minute"),
        ("Wed, 21 Oct 99999 07:28:00 GMT", "in a minute"),
        ("soon", "in a minute"),
    ],
)
def test_a_wait_that_nobody_means_is_not_passed_on(monkeypatch: pytest.MonkeyPatch, asked: str, said: str) -> None:
    monkeypatch.setattr(source_module, "FIRST_WAIT_S", 0.01)
    head = f"HTTP/1.1 429 Too Many\r\nRetry-After: {asked}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

    assert said in str(ask_raw(head.encode()).error)


@fails_loudly
def test_a_failure_is_logged_by_names_and_numbers_alone(caplog: pytest.LogCaptureFixture) -> None:
    error = {"message": "a private matter", "code": "bad_input", "type": "a private matter", "param": "messages[0]"}
    body = json.dumps({"error": error}).encode()
    head = f"HTTP/1.1 422 No\r\nX-Request-Id: req_1\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"

    async def run(answer: bytes) -> None:
        async with Raw(answer).running() as server, opened(settings(server.url)) as source:
            assert (await listen(source, prompt("a private matter"))).code == "source_failed"

    asyncio.run(run(head.encode() + body))
    asyncio.run(run(HEAD + b"data: " + body + b"\n\n"))
    whole, streamed = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert whole == (
        "the model's server failed: UnprocessableEntityError, "
        "status_code=422, request_id=req_1, code=bad_input, param=messages[0]"
    )
    assert streamed == "the model's server failed: an error in the stream, code=bad_input, param=messages[0]"


def test_a_connection_serves_one_reply_after_the_other() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = head + chunked(chunk(content="a")) + chunked(chunk("stop") + DONE) + b"0\r\n\r\n"

    async def run() -> Raw:
        async with Raw(answer, keep=True).running() as server, opened(settings(server.url)) as source:
            for _ in range(3):
                assert (await listen(source, prompt("hello"))).text == "a"
        return server

    server = asyncio.run(run())
    assert (server.connections, server.requests) == (1, 3)


def test_a_server_that_does_not_close_after_the_end_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "DRAIN_S", 0.1)
    monkeypatch.setattr(source_module, "AFTER_FINISH_S", 0.2)

    async def run(end: bytes) -> Outcome:
        async with Raw(HEAD + A + STOP + end, keep=True).running() as server, opened(settings(server.url)) as source:
            return await listen(source, prompt("hello"))

    for end in (DONE, b"", b": ping\n\n"):
        outcome = asyncio.run(run(end))
        assert (outcome.text, outcome.error) == ("a", None)
        assert outcome.seconds < 2


def test_no_compression_is_asked_for_and_a_compressed_stream_is_read() -> None:
    body = gzip.compress(A + B + STOP + DONE)

    async def run() -> tuple[Outcome, bytes]:
        raw = Raw(HEAD[:-2] + b"Content-Encoding: gzip\r\n\r\n" + body)
        async with raw.running() as server, opened(settings(server.url)) as source:
            return await listen(source, prompt("hello")), raw.head

    outcome, head = asyncio.run(run())
    assert outcome.text == "ab"
    assert b"accept-encoding: identity\r\n" in head.lower()


def test_a_read_of_many_events_does_not_hold_up_the_loop() -> None:
    async def run() -> tuple[int, int]:
        count = at_once = longest = 0

        async def tick() -> None:
            nonlocal at_once
            while True:
                at_once = 0
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        async with Raw(HEAD + A * 1000 + STOP + DONE).running() as server, opened(settings(server.url)) as source:
            async for _ in source.reply(prompt("hello")):
                count += 1
                at_once += 1
                longest = max(longest, at_once)
        ticking.cancel()
        return count, longest

    count, longest = asyncio.run(run())
    assert count == 1000
    assert longest <= source_module.EVENTS_AT_ONCE


@fails_loudly
def test_the_body_of_an_error_is_limited() -> None:
    """A server that sends an error without end, or one that grows when it is decompressed."""
    head = b"HTTP/1.1 400 No\r\nContent-Type: application/json\r\n"
    outcome = ask_raw(head + b"Content-Length: 50000000\r\n\r\n" + b" " * 1_000_000)  # and no more comes
    assert outcome.code == "source_failed"
    assert outcome.seconds < 4
    bomb = gzip.compress(b'{"error": {"code": "context_length_exceeded"}}' + b" " * 40_000_000)
    outcome = ask_raw(head + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb)
    assert "(400)" in str(outcome.error), "its body is not looked at"


@fails_loudly
@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"HTTP/1.1 307 Elsewhere\r\nLocation: /v1/again", id="loop"),
        pytest.param(b"HTTP/1.1 307 Elsewhere\r\nLocation: ftp://example.org/", id="other-protocol"),
        pytest.param(b"HTTP/1.1 308 Elsewhere\r\nLocation: http://[", id="no-address"),
        pytest.param(b"HTTP/1.1 301 Elsewhere", id="nowhere"),
        pytest.param(b"HTTP/1.1 304 Not Modified", id="not-modified"),
    ],
)
def test_a_redirect_that_leads_nowhere_is_followed_once_and_says_which_setting_is_wrong(answer: bytes) -> None:
    async def run() -> tuple[Outcome, int]:
        raw = Raw(answer + b"\r\nContent-Length: 0\r\n\r\n", keep=True)
        async with raw.running() as server, opened(settings(server.url)) as source:
            outcome = await listen(source, prompt("hello"))
        return outcome, raw.requests

    outcome, requests = asyncio.run(run())
    assert outcome.code in ("source_unavailable", "source_failed")
    assert "OPENAI_BASE_URL" in str(outcome.error)
    assert requests <= 21, "the client's own limit of redirects, once"


# --- through the server


async def app_on(make_app: MakeApp, llm: LLMock, **changes: Any) -> App:
    return await make_app(source=OpenAI(settings(llm.url, **changes)))


async def failed_turn(app: App) -> tuple[str, dict[str, Any]]:
    """Have a turn that fails; return what was streamed of the reply, and the reply as the history has it."""
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
async def test_a_failure_is_one_error_event_and_what_was_said_is_kept(
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
async def test_a_client_gone_half_way_ends_nothing(make_app: MakeApp, llm: LLMock) -> None:
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


def test_the_process_keeps_the_key_and_what_was_said_to_itself(make_server: Callable[..., Server], llm: LLMock) -> None:
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


# --- how it is chosen


@pytest.mark.parametrize(
    "url",
    [
        "localhost:11434/v1",
        "ftp://example.org",
        "http://",
        "http://localhost:99999",
        "http://x:y",
        "http://[:::]",
        "http://ü..x",
        "http://user:password@ü..x",
        "http://user:password@x:99999",
        "http://user:pass/word@x",
    ],
)
def test_an_address_that_is_none_is_said_at_the_start(url: str) -> None:
    with pytest.raises(SetupError, match="OPENAI_BASE_URL") as raised:
        OpenAI(read_settings({"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url}, Path("none")))
    assert "pass" not in str(raised.value)


@pytest.mark.parametrize("key", ["sk-1\u200b2", "sk-1\n2", "sk-1 2", "sk-1\x7f2", "sk-ü"])
def test_a_key_that_cannot_be_sent_is_said_at_the_start_without_it(key: str) -> None:
    with pytest.raises(SetupError, match="OPENAI_API_KEY") as raised:
        read_settings({"OPENAI_API_KEY": key}, Path("none"))
    assert "sk-" not in str(raised.value)


def test_the_official_server_gets_the_new_name_of_the_largest_length() -> None:
    official = OpenAI(replace(Settings(), openai_api_key=KEY, openai_max_tokens=5))
    assert official._options == {"max_completion_tokens": 5}
    asyncio.run(official.close())


def test_the_sdk_is_imported_only_when_it_is_chosen() -> None:
    program = (
        "import sys\n"
        "from chatserver.settings import Settings\n"
        "from chatserver.sources import make_source\n"
        "source = make_source(Settings(reply_source=sys.argv[1], openai_api_key='sk-x'))\n"
        "print(type(source).__name__, 'openai' in sys.modules, 'httpx2' in sys.modules)\n"
    )

    def run(name: str) -> str:
        done = subprocess.run([sys.executable, "-c", program, name], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert run("simulated") == "Simulated False False"
    assert run("openai") == "OpenAI True True"


def test_the_comment_where_a_turn_picks_its_source_says_what_to_do() -> None:
    code = Path(sys.modules[make_source.__module__].__file__ or "").read_text()
    body = code[code.index("def make_source") :]
    comment = re.findall(r"^ +# ?(.*)", body, re.MULTILINE)
    assert 1 <= len(comment) <= 5
    text = "\n".join(comment)
    for words in ("OPENAI_API_KEY", "uncomment", "REPLY_SOURCE=openai", "sources/openai.py is the complete"):
        assert words in text


# --- the second server that was not written here

FIXTURES: dict[str, dict[str, Any]] = {
    "plain": {"response": {"content": "Café 😀👩‍🚀 ready"}, "chunkSize": 1},
    "unauthorized": {"response": {"error": {"message": f"no {KEY}", "type": "invalid_request_error"}, "status": 401}},
    "busy": {"response": {"error": {"message": "slow down", "type": "rate_limit_error"}, "status": 429}},
    "broken": {"response": {"error": {"message": "oops", "type": "server_error"}, "status": 500}},
    "cut": {"response": {"content": STORY}, "chunkSize": 10, "latency": 20, "truncateAfterChunks": 3},
    "hang": {"response": {"content": STORY}, "chunkSize": 10, "latency": 20_000},
    "malformed": {"response": {"content": STORY}, "chaos": {"malformedRate": 1}},
    "dropped": {"response": {"content": STORY}, "chaos": {"disconnectRate": 1}},
    "filtered": {"response": {"content": "Well", "finishReason": "content_filter"}},
    "too-long": {"response": {"content": "Well", "finishReason": "length"}},
    "empty": {"response": {"content": ""}},
}


@pytest.fixture(scope="module")
def aimock_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    fixtures = [{"match": {"userMessage": name}, **fixture} for name, fixture in FIXTURES.items()]
    file = tmp_path_factory.mktemp("aimock") / "fixtures.json"
    file.write_text(json.dumps({"fixtures": fixtures}))
    command = ["node", str(AIMOCK), "--port", "0", "--fixtures", str(file)]
    yield from started(command, r"listening on (http://127\.0\.0\.1:\d+)", AIMOCK_API_KEYS=KEY)


@fails_loudly
@pytest.mark.needs("node")
@pytest.mark.parametrize(
    ("question", "text", "code"),
    [
        ("plain", "Café 😀👩‍🚀 ready", None),  # in chunks of one UTF-16 unit: each emoji comes in halves
        ("unauthorized", "", "source_authentication"),
        ("busy", "", "source_rate_limited"),
        ("broken", "", "source_unavailable"),
        ("malformed", "", "source_invalid"),
        ("dropped", "", "source_unavailable"),
        ("filtered", "Well", "source_refused"),
        ("too-long", "Well", "source_length"),
        ("empty", "", None),
    ],
)
def test_against_aimock(
    aimock_url: str, monkeypatch: pytest.MonkeyPatch, question: str, text: str, code: str | None
) -> None:
    monkeypatch.setattr(source_module, "FIRST_WAIT_S", 0.02)
    outcome = ask(settings(aimock_url), question)
    assert outcome.text == text
    assert outcome.code == code


@fails_loudly
@pytest.mark.needs("node")
def test_aimock_cuts(aimock_url: str) -> None:
    outcome = ask(settings(aimock_url), "cut")
    assert outcome.code == "source_cut"
    assert outcome.text
    assert STORY.startswith(outcome.text)


@pytest.mark.needs("node")
def test_aimock_hangs(aimock_url: str) -> None:
    outcome = ask(settings(aimock_url, openai_read_timeout_s=0.5), "hang")
    assert outcome.code == "source_timeout"
    assert STORY.startswith(outcome.text)
    assert outcome.seconds < 5


@fails_loudly
@pytest.mark.needs("node")
def test_aimock_refuses_another_key(aimock_url: str) -> None:
    outcome = ask(settings(aimock_url, openai_api_key="sk-another-one"), "plain")
    assert outcome.code == "source_authentication"
