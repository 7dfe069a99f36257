"""Answers that neither mock gives, from a socket."""

import asyncio
import gzip
import json
from typing import Any

import pytest

from chatserver.sources import openai as source_module
from tests.http.openai.provider import (
    DONE,
    HEAD,
    KEY,
    Outcome,
    Raw,
    chunk,
    fails_loudly,
    listen,
    opened,
    prompt,
    settings,
)


def ask_raw(answer: bytes, **changes: Any) -> Outcome:
    """Return the outcome of a reply by a server that answers each request with these bytes."""

    async def run() -> Outcome:
        async with Raw(answer).running() as server, opened(settings(server.url, **changes)) as source:
            return await listen(source, prompt("hello"))

    return asyncio.run(run())


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


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
            id="error-with-text",
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
def test_an_implausible_retry_after_is_not_passed_on(monkeypatch: pytest.MonkeyPatch, asked: str, said: str) -> None:
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
        "the model provider failed: UnprocessableEntityError, "
        "status_code=422, request_id=req_1, code=bad_input, param=messages[0]"
    )
    assert streamed == "the model provider failed: an error in the stream, code=bad_input, param=messages[0]"


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


def test_a_server_that_keeps_the_connection_open_after_the_end_delays_no_reply(monkeypatch: pytest.MonkeyPatch) -> None:
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
    """The provider sends an endless error, or an error that grows when it is decompressed."""
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
