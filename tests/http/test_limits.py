"""The limits of each owner: turns a minute, replies and streams at once."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import http_sf
import httpx
import pytest
from tornado.ioloop import IOLoop

from chatserver.errors import IdTaken, KeyReused
from chatserver.handlers.openapi import make_openapi
from chatserver.settings import Settings
from tests.apps import App, MakeApp, Script
from tests.clients import RawStream, new_id
from tests.http.test_http import assert_problem
from tests.http.test_openapi import check
from tests.http.turns import gated, release
from tests.users import USERS, bearer, token

pytestmark = pytest.mark.gen_test

FAST = {**USERS, "max_replies_per_owner": 0}


class Clock:
    """The clock of a server's limit of turns: it stands still until it is moved."""

    def __init__(self, app: App) -> None:
        self._now = 0
        app.server.turn_limit.clock = lambda: self._now

    def wait(self, seconds: int) -> None:
        self._now += seconds * 1_000_000_000


async def post(
    app: App, owner: str | None, conversation_id: str | None = None, *, key: str | None = None, text: str = "Hello"
) -> httpx.Response:
    body = {"input": text} | ({"conversationId": conversation_id} if conversation_id else {})
    headers = (bearer(owner) if owner is not None else {}) | ({"Idempotency-Key": key} if key else {})
    return await app.client.http.post("/chat", json=body, headers=headers)


async def retry(
    app: App, owner: str | None, conversation_id: str, message_id: str | None = None, key: str | None = None
) -> httpx.Response:
    body = {} if message_id is None else {"messageId": message_id}
    headers = (bearer(owner) if owner is not None else {}) | ({"Idempotency-Key": key} if key else {})
    return await app.client.http.post(f"/chat/{conversation_id}/retry", json=body, headers=headers)


Open = Callable[[App, str | None, str], Awaitable[RawStream]]
"""Opens a stream of a conversation for an owner."""


@pytest.fixture
def open_stream(io_loop: IOLoop) -> Iterator[Open]:
    """Return a function that opens a stream, which is closed after the test."""
    streams: list[RawStream] = []

    async def open_one(app: App, owner: str | None, conversation_id: str) -> RawStream:
        headers = f"Authorization: Bearer {token(owner)}\r\n" if owner is not None else ""
        streams.append(await RawStream(app.port, f"/chat/stream/{conversation_id}", headers=headers).open())
        return streams[-1]

    yield open_one
    for stream in streams:
        stream.close()


def status(stream: RawStream) -> int:
    return int(stream.head.split()[1])


def parsed(response: httpx.Response, name: str) -> dict[str, Any]:
    """Return a header that is a list of strings with parameters: string -> parameters."""
    items: Any = http_sf.parse(response.headers[name].encode(), tltype="list")
    return dict(items)


def assert_quota_exceeded(response: httpx.Response, policy: str) -> int:
    """Check the answer to a turn beyond a limit; return the seconds of `Retry-After`."""
    assert (response.status_code, response.headers["Content-Type"]) == (429, "application/problem+json")
    problem = response.json()
    assert problem["code"] == "quota_exceeded" and problem["status"] == 429
    assert problem["type"] == "https://iana.org/assignments/http-problem-types#quota-exceeded"
    assert problem["violated-policies"] == [policy]
    check(make_openapi(Settings()), "Problem", problem)
    assert parsed(response, "RateLimit")[policy]["r"] == 0
    assert policy in parsed(response, "RateLimit-Policy")
    return int(response.headers["Retry-After"])


# -- turns ---------------------------------------------------------------------------------------------------------


async def test_turn_beyond_the_allowance_is_refused_until_retry_after(make_app: MakeApp) -> None:
    app = await make_app(**FAST)
    clock = Clock(app)
    for left in range(29, -1, -1):
        response = await post(app, "alice")
        assert response.status_code == 202
        assert parsed(response, "RateLimit-Policy") == {"turns": {"q": 30, "w": 60}}
        assert parsed(response, "RateLimit") == {"turns": {"r": left, "t": 2}}

    refused = await post(app, "alice")
    wait = assert_quota_exceeded(refused, "turns")
    assert wait == parsed(refused, "RateLimit")["turns"]["t"] == 2
    assert app.database.conversations.count_documents({}) == 30

    clock.wait(wait - 1)
    assert_quota_exceeded(await post(app, "alice"), "turns")
    clock.wait(1)
    assert (await post(app, "alice")).status_code == 202
    assert_quota_exceeded(await post(app, "alice"), "turns")
    await app.until_idle()


async def test_allowance_of_another_owner_is_untouched(make_app: MakeApp) -> None:
    app = await make_app(**USERS, max_turns_per_minute=1)
    Clock(app)
    assert (await post(app, "alice")).status_code == 202
    assert_quota_exceeded(await post(app, "alice"), "turns")

    response = await post(app, "bob")
    assert response.status_code == 202 and parsed(response, "RateLimit")["turns"]["r"] == 0


async def test_retry_takes_a_turn(make_app: MakeApp) -> None:
    app = await make_app(**USERS, source=Script(), max_turns_per_minute=2)
    Clock(app)
    conversation_id = (await post(app, "alice")).json()["conversationId"]
    await app.until_idle()
    retried = await retry(app, "alice", conversation_id)
    await app.until_idle()

    assert retried.status_code == 202 and parsed(retried, "RateLimit")["turns"]["r"] == 0
    assert_quota_exceeded(await retry(app, "alice", conversation_id), "turns")
    assert_quota_exceeded(await post(app, "alice"), "turns")


async def test_repeated_retry_takes_no_second_turn(make_app: MakeApp) -> None:
    app = await make_app(**USERS, source=Script(), max_turns_per_minute=2)
    Clock(app)
    conversation_id = (await post(app, "alice")).json()["conversationId"]
    await app.until_idle()
    retries = [await retry(app, "alice", conversation_id, key="again") for _ in range(2)]
    await app.until_idle()
    retries.append(await retry(app, "alice", conversation_id, key="again"))

    assert [each.json() for each in retries] == 3 * [retries[0].json()]
    assert_quota_exceeded(await retry(app, "alice", conversation_id, key="other"), "turns")


async def test_turn_that_is_refused_for_another_reason_counts(make_app: MakeApp) -> None:
    app = await make_app(**USERS, max_turns_per_minute=2)
    Clock(app)
    answer = (await post(app, "alice")).json()
    await app.until_idle()
    refused = await retry(app, "alice", answer["conversationId"], answer["messageId"])

    assert_problem(refused, 409, "not_a_reply")
    assert "RateLimit" not in refused.headers
    assert_quota_exceeded(await retry(app, "alice", new_id()), "turns")


async def test_invalid_request_takes_no_turn(make_app: MakeApp) -> None:
    app = await make_app(**USERS, max_turns_per_minute=1)
    Clock(app)
    for body in ("{", "{}", '{"input": ""}'):
        headers = {**bearer("alice"), "Content-Type": "application/json"}
        assert (await app.client.http.post("/chat", content=body, headers=headers)).status_code == 400

    assert (await post(app, "alice")).status_code == 202


@pytest.mark.parametrize("known", [False, True])
async def test_repeated_key_takes_no_turn(make_app: MakeApp, known: bool) -> None:
    app = await make_app(**USERS, max_turns_per_minute=2)
    Clock(app)
    conversation_id = new_id() if known else None
    first = await post(app, "alice", conversation_id, key="k")
    for left in (1, 0):
        again = await post(app, "alice", conversation_id, key="k")
        other = await post(app, "alice", conversation_id, key="k", text="Another text")

        assert (again.status_code, again.json()) == (202, first.json())
        assert parsed(again, "RateLimit")["turns"]["r"] == left
        assert_problem(other, 422, "idempotency_key_reused")
        if left:
            assert (await post(app, "alice")).status_code == 202
    assert_quota_exceeded(await post(app, "alice", conversation_id, key="l"), "turns")


async def test_same_key_at_the_same_time_takes_one_turn_and_is_never_refused(make_app: MakeApp) -> None:
    app = await make_app(**USERS, max_turns_per_minute=1)
    Clock(app)
    responses = await asyncio.gather(*(post(app, "alice", key="k") for _ in range(6)))

    assert [response.status_code for response in responses] == [202] * 6
    assert len({response.text for response in responses}) == 1


async def test_turn_is_given_back_if_another_server_has_just_stored_the_key(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await make_app(**USERS, max_turns_per_minute=2)
    Clock(app)
    start = app.store.start_turn

    async def lose(*arguments: Any, **options: Any) -> Any:
        await start(*arguments, **options)
        raise KeyReused

    monkeypatch.setattr(app.store, "start_turn", lose)
    response = await post(app, "alice", key="k")

    assert response.status_code == 202
    assert parsed(response, "RateLimit")["turns"] == {"r": 2, "t": 0}


async def test_another_choice_of_the_id_takes_no_other_turn(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app = await make_app(**USERS, max_turns_per_minute=1)
    Clock(app)
    start, taken = app.store.start_turn, [IdTaken, IdTaken]

    async def meet(*arguments: Any, **options: Any) -> Any:
        if taken:
            raise taken.pop()
        return await start(*arguments, **options)

    monkeypatch.setattr(app.store, "start_turn", meet)

    assert (await post(app, "alice")).status_code == 202 and not taken


async def test_owner_none_is_never_limited(make_app: MakeApp, open_stream: Open) -> None:
    app = await make_app(
        source=gated("x"), max_turns_per_minute=1, max_replies_per_owner=1, max_streams_per_owner=1, lease_ms=60_000
    )
    Clock(app)
    responses = [await post(app, None) for _ in range(3)]
    streams = [await open_stream(app, None, new_id()) for _ in range(3)]

    assert [response.status_code for response in responses] == [202] * 3
    assert all(not name.lower().startswith("ratelimit") for each in responses for name in each.headers)
    assert [status(stream) for stream in streams] == [200] * 3


async def test_limits_of_zero_are_none(make_app: MakeApp, open_stream: Open) -> None:
    app = await make_app(
        **USERS,
        source=gated("x"),
        max_turns_per_minute=0,
        max_replies_per_owner=0,
        max_streams_per_owner=0,
        lease_ms=60_000,
    )
    responses = [await post(app, "alice") for _ in range(7)]
    streams = [await open_stream(app, "alice", new_id()) for _ in range(3)]

    assert [response.status_code for response in responses] == [202] * 7
    assert "RateLimit" not in responses[0].headers and "RateLimit-Policy" not in responses[0].headers
    assert [status(stream) for stream in streams] == [200] * 3


# -- replies -------------------------------------------------------------------------------------------------------


async def test_reply_beyond_those_at_once_is_refused_until_one_ends(make_app: MakeApp) -> None:
    source = gated("x")
    app = await make_app(**USERS, source=source, max_replies_per_owner=2, max_turns_per_minute=100)
    for left in (1, 0):
        response = await post(app, "alice")
        assert parsed(response, "RateLimit-Policy")["replies"] == {"q": 2, "qu": "concurrent-requests"}
        assert parsed(response, "RateLimit")["replies"] == {"r": left}
    running = response.json()["conversationId"]

    assert assert_quota_exceeded(await post(app, "alice"), "replies") > 0
    assert_problem(await post(app, "alice", running), 409, "reply_in_progress")
    assert (await post(app, "bob")).status_code == 202
    assert app.database.conversations.count_documents({}) == 3
    release(source, 2)
    await app.until(lambda: app.replies.running < 2)
    assert (await post(app, "alice")).status_code == 202
    release(source, 9)
    await app.until_idle()


async def test_reply_that_is_starting_counts(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app = await make_app(**USERS, max_replies_per_owner=1)
    start, gate = app.store.start_turn, asyncio.Event()

    async def wait(*arguments: Any, **options: Any) -> Any:
        await gate.wait()
        return await start(*arguments, **options)

    monkeypatch.setattr(app.store, "start_turn", wait)
    first = asyncio.create_task(post(app, "alice"))
    await app.until(lambda: app.replies.starting == 1)
    refused = await post(app, "alice")
    gate.set()

    assert_quota_exceeded(refused, "replies")
    assert (await first).status_code == 202
    await app.until_idle()
    assert (await post(app, "alice")).status_code == 202
    await app.until_idle()


# -- streams -------------------------------------------------------------------------------------------------------


async def test_stream_beyond_those_at_once_is_refused_until_one_closes(make_app: MakeApp, open_stream: Open) -> None:
    app = await make_app(**USERS, max_streams_per_owner=2)
    first = await open_stream(app, "alice", new_id())
    await open_stream(app, "alice", new_id())
    refused = await open_stream(app, "alice", new_id())

    assert status(refused) == 429 and "Retry-After: 5" in refused.head
    assert (await refused.reader.readline()).endswith(b"}\n")
    assert status(await open_stream(app, "bob", new_id())) == 200
    first.close()
    await app.until(lambda: len(app.streams) == 2)
    assert status(await open_stream(app, "alice", new_id())) == 200
    assert status(await open_stream(app, "alice", new_id())) == 429


async def test_streams_of_another_owner_on_the_same_id_do_not_count(make_app: MakeApp, open_stream: Open) -> None:
    app = await make_app(**USERS, max_streams_per_conversation=2)
    conversation_id = (await post(app, "alice")).json()["conversationId"]
    await app.until_idle()
    bobs = [status(await open_stream(app, "bob", conversation_id)) for _ in range(3)]

    assert bobs == [200, 200, 429]
    assert status(await open_stream(app, "alice", conversation_id)) == 200
