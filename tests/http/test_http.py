"""Requests and responses: validation, errors in one shape, access, limits."""

import asyncio
import json
import logging
from http.client import HTTPConnection
from typing import Any

import pytest

from chatserver.errors import HostNotAllowed
from chatserver.handlers.base import BaseHandler
from chatserver.handlers.body import DISCARDED_BYTES
from chatserver.records import Key
from chatserver.wire import sse
from tests.apps import App, MakeApp, Script
from tests.clients import RawStream

pytestmark = pytest.mark.gen_test

JSON = {"Content-Type": "application/json"}
ID = "0123456789abcdef01234567"


def assert_problem(response: Any, status: int, code: str) -> dict[str, Any]:
    """Check the one shape of all errors."""
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "code", "requestId"} <= set(problem) <= {
        "type", "title", "status", "detail", "code", "requestId", "errors"
    }  # fmt: skip
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["requestId"] == response.headers["X-Request-Id"]
    return problem


@pytest.mark.parametrize(
    ("body", "code", "pointer"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b'{"input": NaN}', "invalid_json", None),
        (b'{"input": Infinity}', "invalid_json", None),
        (b'{"input": "\xff"}', "invalid_json", None),
        (b'{"input": "\\ud800"}', "invalid_json", None),
        (b'{"input": "\\ude00\\ud83d"}', "invalid_json", None),
        (b'{"\\ud800": 1, "input": "x"}', "invalid_json", None),
        (b"[" * 100_000, "invalid_json", None),
        (b'{"input": ' + b"1" * 5000 + b"}", "invalid_json", None),
        (b"[]", "invalid_request", ""),
        (b"null", "invalid_request", ""),
        (b'"text"', "invalid_request", ""),
        (b"{}", "invalid_request", "/input"),
        (b'{"input": ""}', "invalid_request", "/input"),
        (b'{"input": " \\n\\t\\u2003"}', "invalid_request", "/input"),
        (b'{"input": "\\u001f\\u0085\\ufeff"}', "invalid_request", "/input"),
        (b'{"input": 1}', "invalid_request", "/input"),
        (b'{"input": null}', "invalid_request", "/input"),
        (b'{"input": "a\\u0000b"}', "invalid_request", "/input"),
        (b'{"input": "' + b"x" * 101 + b'"}', "invalid_request", "/input"),
        (b'{"input": "x", "more": 1}', "invalid_request", "/more"),
        (b'{"input": "x", "a/b~c": 1}', "invalid_request", "/a~1b~0c"),
        (b'{"input": "x", "conversationId": "42"}', "invalid_request", "/conversationId"),
        (b'{"input": "x", "conversationId": "' + ID.encode() + b'\\n"}', "invalid_request", "/conversationId"),
        (b'{"input": "x", "conversationId": null}', "invalid_request", "/conversationId"),
    ],
)
async def test_bad_body_is_named_and_nothing_is_stored(
    make_app: MakeApp, body: bytes, code: str, pointer: str | None
) -> None:
    app = await make_app(max_input_chars=100)
    response = await app.client.http.post("/chat", content=body, headers=JSON)
    if len(body) > app.settings.max_body_bytes:
        assert_problem(response, 413, "payload_too_large")
    else:
        problem = assert_problem(response, 400, code)
        assert [error["pointer"] for error in problem.get("errors", [])][:1] == ([] if pointer is None else [pointer])
    assert app.database.conversations.count_documents({}) == 0


async def test_longest_input_fits_whatever_its_characters_and_escapes(make_app: MakeApp) -> None:
    app = await make_app(max_input_chars=100, source=Script("ok"))
    text = "🙂" * 100
    body = json.dumps({"input": text, "conversationId": ID})
    assert body.count("\\u") == 200
    response = await app.client.http.post("/chat", content=body, headers=JSON)
    assert response.status_code == 202
    assert (await app.client.history(ID))["messages"][0]["content"] == text
    assert_problem(await app.client.post(text + "x"), 400, "invalid_request")


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/json; charset=latin-1",
        "application/json; x=1; CHARSET=utf-16",
        "application/json; charset*=utf-8''utf-16",
        "application/json, text/plain",
        "application/json/x",
    ],
)
async def test_body_that_is_not_json_is_refused(app: App, content_type: str) -> None:
    response = await app.client.http.post("/chat", content=b'{"input": "x"}', headers={"Content-Type": content_type})
    assert_problem(response, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "content_type",
    [
        'Application/JSON; charset="UTF-8"',
        "application/json;CHARSET=utf-8; profile=x",
        'application/json; profile="charset=utf-16; x"',
    ],
)
async def test_content_type_may_have_parameters(app: App, content_type: str) -> None:
    headers = {"Content-Type": content_type}
    assert (await app.client.http.post("/chat", content=b'{"input": "x"}', headers=headers)).status_code == 202


@pytest.mark.parametrize(("encoding", "status"), [("identity", 202), ("gzip", 415)])
async def test_body_is_not_compressed(app: App, encoding: str, status: int) -> None:
    headers = {**JSON, "Content-Encoding": encoding}
    response = await app.client.http.post("/chat", content=b'{"input": "x"}', headers=headers)
    assert response.status_code == status, response.text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"input": ' + b"1" * 5000 + b"}", "has a number with too many digits."),
        (b'{"input": -Infinity}', "is not valid JSON: -Infinity is not allowed."),
        (b'{"input": }', "is not valid JSON: Expecting value, line 1 column 11."),
    ],
)
async def test_invalid_body_is_described_in_our_own_words(app: App, body: bytes, words: str) -> None:
    response = await app.client.http.post("/chat", content=body, headers=JSON)
    assert assert_problem(response, 400, "invalid_json")["detail"] == f"The body {words}"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("path", "status"), [("/chat", 413), (f"/chat/{ID}/stop", 413), ("/nope", 404)])
async def test_client_that_sends_too_much_before_it_reads_finds_its_answer(
    app: App, path: str, status: int, chunked: bool
) -> None:
    """A connection closed with bytes unread is reset, and the answer with it."""

    def send() -> tuple[int, Any]:
        connection = HTTPConnection("127.0.0.1", app.port, timeout=10)
        body = b"x" * 5_000_000
        for _ in range(2):  # the connection goes on
            connection.request("POST", path, iter([body]) if chunked else body, JSON, encode_chunked=chunked)
            answer = connection.getresponse()
            problem = json.loads(answer.read())
        connection.close()
        return answer.status, problem["status"]

    for _ in range(5):
        assert await asyncio.to_thread(send) == (status, status)


@pytest.mark.parametrize("chunked", [False, True])
async def test_large_body_is_refused_before_it_is_read(app: App, chunked: bool) -> None:
    """The client says it sends 1 GB, or never says how much; the answer comes while it still sends."""
    length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 1000000000"
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    writer.write(
        f"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{length}\r\n\r\n".encode()
    )
    piece = b"x" * 65536
    # No more than the server reads: unread bytes reset the connection, and a write may fail before the answer is read.
    for _ in range((DISCARDED_BYTES + app.settings.max_body_bytes) // len(piece) + 1 if chunked else 1):
        writer.write(b"10000\r\n%b\r\n" % piece if chunked else piece)
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert b" 413 " in head.splitlines()[0]
    writer.close()


@pytest.mark.parametrize(
    "path",
    [f"/chat/{bad}{rest}" for bad in ("42", ID + "0", ID[:-1] + "g", "%00", "%ff", "") for rest in ("", "/stop")],
)
async def test_wrong_id_is_a_clear_error(app: App, path: str) -> None:
    response = await (app.client.http.post(path) if path.endswith("stop") else app.client.http.get(path))
    assert 400 <= response.status_code < 500
    assert_problem(response, response.status_code, response.json()["code"])
    if "%" not in path:
        assert response.json()["code"] == "invalid_id"


async def test_id_in_capitals_is_the_same_conversation(app: App) -> None:
    await app.client.turn("hi", ID.upper())
    assert (await app.client.history(ID))["conversationId"] == ID
    assert len((await app.client.history(ID.upper()))["messages"]) == 2


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=-1",
        "limit=x",
        "limit=1001",
        "limit=1.5",
        "limit=",
        "limit=1&limit=1",
        "before=x",
        f"before={ID}0",
    ],
)
async def test_wrong_parameters_are_named(app: App, query: str) -> None:
    await app.client.turn("hi", ID)
    problem = assert_problem(await app.client.http.get(f"/chat/{ID}?{query}"), 400, "invalid_request")
    assert problem["errors"][0]["pointer"] == "/" + query.split("=")[0]


async def test_unknown_and_unsupported_have_the_one_shape(app: App) -> None:
    http = app.client.http
    for path in ("/nope", "/chat/x/y/z", "/web/nothing.js", "/favicon.ico", "/web/../app.py", "/web/%2e%2e/app.py"):
        response = await http.get(path)
        assert response.status_code in (400, 404), path
        assert_problem(response, response.status_code, response.json()["code"])
    allowed = {
        "/chat": {"GET", "HEAD", "POST", "OPTIONS"},
        f"/chat/{ID}": {"GET", "HEAD", "PATCH", "DELETE", "OPTIONS"},
        f"/chat/stream/{ID}": {"GET", "OPTIONS"},
        f"/chat/{ID}/stop": {"POST", "OPTIONS"},
        f"/chat/{ID}/retry": {"POST", "OPTIONS"},
        f"/chat/{ID}/head": {"PUT", "OPTIONS"},
        "/healthz": {"GET", "HEAD", "OPTIONS"},
    }
    for path, methods in allowed.items():
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - methods:
            response = await http.request(method, path)
            assert_problem(response, 405, "method_not_allowed")
            assert set(response.headers["Allow"].split(", ")) == methods
    for path in (f"/chat/{ID}", f"/chat/{ID}/stop", f"/chat/{ID}/retry"):
        method = "POST" if path[-1] in "py" else "GET"
        assert_problem(await http.request(method, path), 404, "not_found")
    assert_problem(await http.delete(f"/chat/{ID}"), 404, "not_found")
    assert_problem(await http.patch(f"/chat/{ID}", json={"title": "New"}), 404, "not_found")
    assert_problem(await http.put(f"/chat/{ID}/head", json={"messageId": ID}), 404, "not_found")


@pytest.mark.expects_log("unexpected error")
async def test_unexpected_error_is_logged_with_its_trace_and_reveals_nothing(
    app: App, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a secret of ours")

    monkeypatch.setattr(app.chat, "say", crash)
    response = await app.client.post("hi")
    assert_problem(response, 500, "internal")
    assert "secret" not in response.text and "Traceback" not in response.text
    record = next(record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.exc_info and "a secret of ours" in str(record.exc_info[1])
    assert record.__dict__["request"] == response.json()["requestId"]


async def test_no_route_or_method_bypasses_the_base_of_all_handlers(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base will check who sends a request; a handler that does not await its `prepare` would serve every client."""

    async def refuse(_handler: BaseHandler) -> None:
        await asyncio.sleep(0)
        raise HostNotAllowed

    monkeypatch.setattr(BaseHandler, "prepare", refuse)
    assert {"/", "/chat", "/metrics", "/openapi.json", "/web/client.js"} <= set(app.paths)

    for path in [*app.paths, "/nope"]:
        for method in BaseHandler.SUPPORTED_METHODS:
            async with asyncio.timeout(5):
                response = await app.client.http.request(method, path)

            assert response.status_code == 421, (method, path)
            assert response.headers["Content-Type"] == "application/problem+json"
    assert not app.subscribers and not len(app.streams)


async def test_request_id_is_taken_over_or_made(app: App) -> None:
    response = await app.client.http.get("/nope", headers={"X-Request-Id": "mine-1"})
    assert assert_problem(response, 404, "not_found")["requestId"] == "mine-1"
    response = await app.client.http.get("/nope", headers={"X-Request-Id": "not mine"})
    assert assert_problem(response, 404, "not_found")["requestId"] not in ("", "not mine")
    raw = await RawStream(app.port, f"/chat/stream/{ID}", headers="X-Request-Id: mine-2\r\n").open()
    assert "X-Request-Id: mine-2" in raw.head
    raw.close()


async def test_access_log_names_the_conversation_the_reply_and_the_problem(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "chatserver.handlers"):
        answer = await app.client.say("hi")
        conversation_id = answer["conversationId"]
        await app.client.events(conversation_id, answer["lastEventId"])
        again = (await app.client.http.post(f"/chat/{conversation_id.upper()}/retry")).json()
        await app.until_idle()
        named = {"messageId": answer["messageId"].upper()}
        await app.client.http.post(f"/chat/{conversation_id.upper()}/retry", json=named)
        await app.client.http.get("/nope")
    fields = ("status", "conversation", "reply", "code")
    assert [tuple(record.__dict__.get(name) for name in fields) for record in caplog.records] == [
        (202, conversation_id, answer["replyId"], None),
        (200, conversation_id, None, None),
        (202, conversation_id, again["replyId"], None),
        (409, conversation_id, None, "not_a_reply"),
        (404, None, None, "not_found"),
    ]


async def test_access_log_writes_no_control_characters(app: App, caplog: pytest.LogCaptureFixture) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    with caplog.at_level(logging.INFO, "chatserver.handlers"):
        writer.write(b"GET /\x9b31m%9b\x85~\xff HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
    assert caplog.messages == ["GET /%9B31m%9b%85~%FF"]
    writer.close()


async def test_logs_have_no_text_and_no_key(app: App, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "chatserver"):
        await app.client.say("a private matter", ID, key="a-private-key")
        await app.until_idle()
        await app.client.history(ID)
    lines = [f"{record.getMessage()} {record.__dict__}" for record in caplog.records if record.name[:4] == "chat"]
    assert any(ID in line for line in lines)
    assert not any("private" in line for line in lines)


# -- who may talk to it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:3000", True),
        ("127.0.0.1:3000", True),
        ("[::1]:3000", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("10.0.0.1", False),
    ],
)
async def test_only_our_own_host_names_are_answered(app: App, host: str, allowed: bool) -> None:
    response = await app.client.http.get("/healthz", headers={"Host": host})
    if allowed:
        assert response.status_code == 200
    else:
        assert_problem(response, 421, "host_not_allowed")


async def test_server_that_is_bound_to_every_address_answers_to_addresses_and_to_no_foreign_name(
    make_app: MakeApp,
) -> None:
    """Guards against DNS rebinding: a page's own name, made to resolve to this server."""
    app = await make_app(host="0.0.0.0")
    for host, status in (("10.0.0.1", 200), ("[fe80::1]:3000", 200), ("localhost", 200), ("evil.example", 421)):
        assert (await app.client.http.get("/healthz", headers={"Host": host})).status_code == status, host


@pytest.mark.parametrize("path", ["/", "/docs", "/web/docs.css"])
async def test_pages_say_what_a_browser_may_do_with_them(app: App, path: str) -> None:
    headers = (await app.client.http.get(path)).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert "default-src 'none'" in headers["Content-Security-Policy"]


async def test_host_names_are_a_setting(make_app: MakeApp) -> None:
    app = await make_app(allowed_hosts=("chat.example",))
    for host, status in (("chat.example", 200), ("localhost", 200), ("127.0.0.1", 200), ("other.example", 421)):
        assert (await app.client.http.get("/healthz", headers={"Host": host})).status_code == status


async def test_origins_are_sent_only_if_they_are_allowed(make_app: MakeApp) -> None:
    app = await make_app(cors_origins=("https://chat.example",), cors_credentials=True)
    http, good, bad = app.client.http, {"Origin": "https://chat.example"}, {"Origin": "https://evil.example"}
    preflight = {**good, "Access-Control-Request-Method": "POST"}
    response = await http.options("/chat", headers=preflight)
    assert response.status_code == 204
    assert response.headers["Access-Control-Allow-Origin"] == "https://chat.example"
    assert response.headers["Access-Control-Allow-Credentials"] == "true"
    assert "POST" in response.headers["Access-Control-Allow-Methods"]
    wanted = {"Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "X-Request-Id"}
    assert set(response.headers["Access-Control-Allow-Headers"].split(", ")) == wanted
    for path in ("/chat", "/nope", f"/chat/{ID}"):
        response = await http.get(path, headers=good)
        assert response.headers["Access-Control-Allow-Origin"] == "https://chat.example"
        assert response.headers["Access-Control-Expose-Headers"] == (
            "RateLimit, RateLimit-Policy, Retry-After, WWW-Authenticate, X-Request-Id"
        )
        assert response.headers["Vary"] == "Origin"
        assert "Access-Control-Allow-Origin" not in (await http.get(path, headers=bad)).headers
    raw = await RawStream(app.port, f"/chat/stream/{ID}", headers="Origin: https://chat.example\r\n").open()
    assert "Access-Control-Allow-Origin: https://chat.example" in raw.head
    raw.close()


async def test_without_a_setting_no_origin_is_sent(app: App) -> None:
    response = await app.client.http.options("/chat", headers={"Origin": "https://chat.example"})
    assert not [name for name in response.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    ("proxies", "forwarded", "address"),
    [
        ((), "1.2.3.4", "127.0.0.1"),
        (("127.0.0.1",), "1.2.3.4", "1.2.3.4"),
        (("127.0.0.0/8", "10.0.0.0/8"), "6.6.6.6, 1.2.3.4, 10.1.1.1", "1.2.3.4"),
        (("127.0.0.1",), "nonsense", "127.0.0.1"),
        (("10.0.0.1",), "1.2.3.4", "127.0.0.1"),
    ],
)
async def test_client_address_is_taken_from_a_proxy_that_is_named(
    make_app: MakeApp,
    caplog: pytest.LogCaptureFixture,
    proxies: tuple[str, ...],
    forwarded: str,
    address: str,
) -> None:
    app = await make_app(trusted_proxies=proxies)
    with caplog.at_level(logging.INFO, "chatserver"):
        await app.client.http.get("/healthz", headers={"X-Forwarded-For": forwarded})
    assert [record.__dict__["address"] for record in caplog.records if hasattr(record, "address")] == [address]


# -- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit", [{"max_streams": 2}, {"max_streams_per_conversation": 2}, {"max_streams_per_address": 2}]
)
async def test_too_many_streams_are_refused_until_one_goes(make_app: MakeApp, limit: dict[str, int]) -> None:
    app = await make_app(**limit)
    streams = [await RawStream(app.port, f"/chat/stream/{ID}").open() for _ in range(2)]
    response = await app.client.http.get(f"/chat/stream/{ID}")
    assert_problem(response, 429, "too_many_streams")
    assert int(response.headers["Retry-After"]) > 0
    streams[0].close()
    await app.until(lambda: len(app.streams) == 1)
    streams.append(await RawStream(app.port, f"/chat/stream/{ID}").open())
    assert "200 OK" in streams[-1].head
    for stream in streams:
        stream.close()


async def test_stream_that_comes_when_all_are_being_ended_is_refused(app: App) -> None:
    await app.streams.close()
    assert_problem(await app.client.http.get(f"/chat/stream/{ID}"), 503, "draining")


async def test_too_many_replies_are_refused_and_store_nothing(make_app: MakeApp) -> None:
    gate = asyncio.Semaphore(0)
    app = await make_app(source=Script("x", gate=gate), max_replies=1)
    first = await app.client.say("hi")
    response = await app.client.post("me, too")
    assert_problem(response, 503, "too_many_replies")
    assert int(response.headers["Retry-After"]) > 0
    assert_problem(await app.client.post("again", first["conversationId"]), 409, "reply_in_progress")
    assert app.database.conversations.count_documents({}) == 1
    gate.release()
    await app.client.events(first["conversationId"], first["lastEventId"])
    gate.release()
    await app.client.turn("now")


async def test_stream_ends_at_its_age_and_is_resumed(make_app: MakeApp) -> None:
    app = await make_app(stream_max_age_s=0.2)
    answer, _ = await app.client.turn("hi", ID)
    async with asyncio.timeout(5):
        events = [event async for event in app.client.stream(ID, answer["lastEventId"])]
    assert events[-1].name == "done"


async def test_streams_that_open_together_do_not_end_together(make_app: MakeApp) -> None:
    app = await make_app(stream_max_age_s=1000)
    connections = [app.streams.open(Key(None, ID), "address", b"", stream_format=sse, chunked=True) for _ in range(30)]
    now = asyncio.get_running_loop().time()
    ages = [each.expires_at - now for each in connections if each.expires_at is not None]
    for each in connections:
        each.release()
    assert len(ages) == 30 and 499 < min(ages) < max(ages) - 200 < 1300


async def test_path_with_a_nul_is_not_found(app: App) -> None:
    assert_problem(await app.client.http.get("/web/%00"), 404, "not_found")


@pytest.mark.parametrize("length", ["9" * 5000, "9" * 18])
async def test_length_beyond_all_measure_is_too_large(app: App, length: str) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    writer.write(f"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode())
    assert (await reader.readline()).split()[1] == b"413"
    writer.close()
    await writer.wait_closed()


async def test_head_is_allowed_wherever_get_is(app: App) -> None:
    await app.client.turn("hi", ID)
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/", "/chat", f"/chat/{ID}"):
        whole, head = await app.client.http.get(path), await app.client.http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert set(head.headers) == set(whole.headers) and int(head.headers["Content-Length"]) > 0
    assert (await app.client.http.head(f"/chat/{ID[::-1]}")).status_code == 404


async def test_health_readiness_and_metrics(app: App) -> None:
    http = app.client.http
    await app.client.turn("hi", ID)
    assert (await http.get("/healthz")).json() == {"status": "ok"}
    assert (await http.get("/readyz")).json() == {"status": "ready"}
    app.replies.refuse_turns()
    assert_problem(await http.get("/readyz"), 503, "draining")
    response = await app.client.post("hi")
    assert_problem(response, 503, "draining")
    assert int(response.headers["Retry-After"]) > 0


async def test_metrics_count_what_happened(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatserver.server._LAG_INTERVAL_S", 0.01)
    app = await make_app()
    await app.client.turn("hi", ID)
    app.store.guard.away_until = float("inf")
    assert_problem(await app.client.http.get("/chat"), 503, "database_unavailable")
    app.store.guard.away_until = 0.0
    await app.until(lambda: app.server.loop_lag._sum.get() > 0)
    assert [event.name async for event in app.client.stream(ID, "gone")] == ["reset"]
    text = (await app.client.http.get("/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    events = app.hub.counts.events
    assert events > 10 and float(values["chatserver_events_sent_total"]) == events
    assert float(values["chatserver_tokens_total"]) == app.hub.counts.tokens
    for name, value in {
        "chatserver_open_streams": 0,
        "chatserver_running_replies": 0,
        "chatserver_live_conversations": 0,
        "chatserver_resumes_total": 1,
        "chatserver_resets_total": 1,
        "chatserver_slow_clients_cut_total": 0,
        "chatserver_time_to_first_token_seconds_count": 1,
        'chatserver_reply_duration_seconds_count{status="complete"}': 1,
        'chatserver_store_operation_duration_seconds_count{operation="begin"}': 1,
        'chatserver_store_operation_duration_seconds_count{operation="list"}': 1,
        'chatserver_store_errors_total{operation="list"}': 1,
    }.items():
        assert float(values[name]) == value, name
    for name in (
        "chatserver_tasks",
        "chatserver_stream_writes_total",
        "chatserver_time_to_first_token_seconds_sum",
        'chatserver_reply_duration_seconds_sum{status="complete"}',
        'chatserver_store_operation_duration_seconds_sum{operation="begin"}',
        "chatserver_event_loop_lag_seconds_sum",
    ):
        assert float(values[name]) > 0, name
    assert "_created" not in text and ID not in text


async def test_refused_turn_is_no_error_of_the_database_in_the_metrics(make_app: MakeApp) -> None:
    gate = asyncio.Semaphore(0)
    app = await make_app(source=Script("x", gate=gate))
    answer = await app.client.say("hi")
    assert_problem(await app.client.post("me, too", answer["conversationId"]), 409, "reply_in_progress")
    assert "chatserver_store_errors_total{" not in (await app.client.http.get("/metrics")).text
    gate.release()
    await app.client.events(answer["conversationId"], answer["lastEventId"])
