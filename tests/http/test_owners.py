"""Owners over HTTP: who is let in, what is his, and what nobody else learns of it."""

import asyncio
import itertools
import json
import logging
import random
import re
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

import chatserver.hub.delivery
import chatserver.streams.connection
from chatserver.handlers.base import BaseHandler
from chatserver.records import PAGE_SIZE, Record
from tests.apps import App, Database, MakeApp
from tests.clients import Client, Event, RawStream, new_id, text_of
from tests.http.conftest import insert
from tests.http.test_http import assert_problem
from tests.http.turns import document, gated, release
from tests.users import SECRET, USERS, bearer, token

pytestmark = pytest.mark.gen_test

METRICS_TOKEN = "the token of the metrics in these tests"
COOKIE = "chat_token"
JWT = {**USERS, "auth_cookie": COOKIE, "max_turns_per_minute": 0}
PUBLIC = {"/healthz", "/readyz", "/metrics", "/openapi.json", "/docs", "/", "/web/client.js"}
"""The resources that are the same for everybody."""


class Person(Client):
    """A client with the token of an owner."""

    def __init__(self, app: App, owner: str) -> None:
        super().__init__(app.url)
        self.http.headers.update(bearer(owner))
        self.app, self.owner = app, owner

    async def ask(self, method: str, path: str, **options: Any) -> tuple[int, str, dict[str, str]]:
        """Return status, body and headers of an answer, without what differs from request to request."""
        response = await self.http.request(method, path, **options)
        headers = {name: value for name, value in response.headers.items() if name not in ("x-request-id", "date")}
        body = response.text.replace(response.headers["X-Request-Id"], "REQUEST")
        return response.status_code, body, headers

    async def open(self, conversation_id: str, position: str = "") -> RawStream:
        line = f"Authorization: {self.http.headers['Authorization']}\r\n"
        query = f"?lastEventId={position}" if position else ""
        return await RawStream(self.app.port, f"/chat/stream/{conversation_id}{query}", headers=line).open()


@asynccontextmanager
async def people(app: App) -> AsyncIterator[tuple[Person, Person]]:
    """Yield the clients of Alice and of Bob."""
    alice, bob = Person(app, "alice"), Person(app, "bob")
    try:
        yield alice, bob
    finally:
        await alice.close()
        await bob.close()


async def read_available(stream: RawStream) -> bytes:
    """Return what a stream sends until it is quiet or ends."""
    received = b""
    try:
        while True:
            async with asyncio.timeout(0.1):
                if not (part := await stream.reader.read(65536)):
                    return received + b"END"
            received += part
    except TimeoutError:
        return received


def comparable_head(stream: RawStream) -> str:
    return re.sub("(?m)^(X-Request-Id|Date): .*\r\n", "", stream.head)


# -- credentials ---------------------------------------------------------------------------------------------------


async def test_every_route_but_the_public_ones_requires_a_credential(make_app: MakeApp) -> None:
    app = await make_app(**JWT)
    assert set(app.paths) >= PUBLIC
    for path in app.paths:
        for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"):
            response = await app.client.http.request(method, path)
            if path in PUBLIC:
                assert response.status_code != 401, f"{method} {path}"
            else:
                assert response.status_code == 401, f"{method} {path}"
                assert response.headers["WWW-Authenticate"] == "Bearer"
                assert response.headers["Cache-Control"] == "no-store"
                if method != "HEAD":
                    assert_problem(response, 401, "unauthenticated")
    for path in ("//chat", "/chat/", "/chat/stream", "/CHAT"):
        raw = await RawStream(app.port, path).open()
        assert raw.head.split()[1] in ("401", "404"), path
        raw.close()


async def test_token_is_taken_from_the_header_or_the_cookie_only(make_app: MakeApp) -> None:
    app = await make_app(**JWT)
    alice, bob = token("alice"), token("bob")
    written = (await app.client.http.post("/chat", json={"input": "hi"}, headers=bearer("alice"))).json()
    path = f"/chat/{written['conversationId']}"

    async def status(headers: list[tuple[str, str]], url: str = path, method: str = "GET") -> tuple[int, str | None]:
        response = await app.client.http.request(method, url, headers=headers)
        return response.status_code, response.json().get("code")

    accepted = [
        [("Authorization", f"Bearer {alice}")],
        [("Authorization", f"bearer {alice}")],
        [("Cookie", f"{COOKIE}={alice}")],
        [("Cookie", f"other=1; {COOKIE}={alice}; another=2")],
        [("Authorization", f"Bearer {alice}"), ("Cookie", f"{COOKIE}={bob}")],
        [("Authorization", f"Bearer {alice}"), ("Cookie", f"{COOKIE}=x")],
    ]
    for each in accepted:
        assert (await status(each))[0] == 200, each
    refused = [
        ([("Authorization", "Bearer x"), ("Cookie", f"{COOKIE}={alice}")], "invalid_token"),
        ([("Authorization", f"Basic {alice}"), ("Cookie", f"{COOKIE}={alice}")], "unauthenticated"),
        ([("Authorization", ""), ("Cookie", f"{COOKIE}={alice}")], "unauthenticated"),
        (
            [("Authorization", f"Bearer {token('alice', seconds=-60)}"), ("Cookie", f"{COOKIE}={alice}")],
            "token_expired",
        ),
        ([("Authorization", f"Bearer {alice}"), ("Authorization", f"Bearer {alice}")], "unauthenticated"),
        ([("Cookie", f"{COOKIE}={alice}; {COOKIE}={bob}")], "invalid_token"),
        ([("Cookie", f"{COOKIE}={alice}"), ("Cookie", f"{COOKIE}={alice}")], "invalid_token"),
        ([("Cookie", f"other={alice}")], "unauthenticated"),
        ([("X-Authorization", f"Bearer {alice}")], "unauthenticated"),
        ([("X-Forwarded-User", "alice")], "unauthenticated"),
    ]
    for headers, code in refused:
        assert await status(headers) == (401, code), headers
    for name in ("token", "access_token", "authorization", COOKIE):
        assert (await status([], f"{path}?{name}={alice}"))[0] == 401
        stream = await RawStream(app.port, f"/chat/stream/{written['conversationId']}?{name}={alice}").open()
        assert " 401 " in stream.head
        stream.close()
    form = await app.client.http.post("/chat", data={"access_token": alice, "input": "hi"})
    assert form.status_code == 401
    await app.until_idle()


@pytest.mark.parametrize(("path", "status"), [("/chat", 401), ("/healthz", 405), ("/unknown", 404)])
async def test_body_of_a_request_without_a_credential_is_not_kept(make_app: MakeApp, path: str, status: int) -> None:
    app = await make_app(max_input_chars=2_000_000, **JWT)
    parts = [b"x" * 65_536] * 320

    async def body() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    # The first request imports modules, which take more memory.
    await app.client.post("hi")
    tracemalloc.start()
    try:
        headers = {"Content-Length": str(sum(map(len, parts)))}
        response = await app.client.http.post(path, content=body(), headers=headers)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert response.status_code == status
    assert peak < 5_000_000


@pytest.mark.parametrize(
    "owner", [7, None, ["alice"], {"$gt": ""}, "", "x" * 256, "a\0b", "a\nb", "\ud800", True], ids=repr
)
async def test_claim_that_names_no_owner_is_refused(make_app: MakeApp, owner: object) -> None:
    app = await make_app(**JWT)

    assert_problem(await app.client.http.get("/chat", headers=bearer(owner)), 401, "invalid_token")


@pytest.mark.parametrize("owner", ["$gt", "$$ROOT", "zoë", "x" * 255, "a,b", "a b", "{}", "\U0001f469"])
async def test_owner_is_a_plain_text(make_app: MakeApp, owner: str) -> None:
    app = await make_app(**JWT)
    answer = (await app.client.http.post("/chat", json={"input": "hi"}, headers=bearer(owner))).json()
    await app.until_idle()

    assert document(app, answer["conversationId"])["owner"] == owner
    listed = [await app.client.http.get("/chat", headers=bearer(each)) for each in (owner, "alice")]
    assert [len(each.json()["conversations"]) for each in listed] == [1, 0]


async def test_proxy_must_name_one_owner(make_app: MakeApp) -> None:
    app = await make_app(auth="proxy", trusted_proxies=("127.0.0.1",), max_turns_per_minute=0)
    other = await make_app(auth="proxy", trusted_proxies=("192.0.2.1",))
    name = app.settings.auth_proxy_header

    async def status(server: App, *headers: tuple[str, str]) -> int:
        return (await server.client.http.get("/chat", headers=list(headers))).status_code

    assert await status(app, (name, "alice")) == 200
    for headers in (
        [],
        [(name, "")],
        [(name, "alice"), (name, "alice")],
        [(name, "alice"), (name, "bob")],
        [(name, "alice,bob")],
        [(name.replace("-", "_"), "alice")],
        [("Authorization", f"Bearer {token('alice')}")],
    ):
        assert await status(app, *headers) == 401, headers
    assert await status(other, (name, "alice")) == 401
    assert await status(other, (name, "alice"), ("X-Forwarded-For", "192.0.2.1")) == 401


# -- what is his ---------------------------------------------------------------------------------------------------


async def test_conversation_of_another_owner_is_answered_as_an_unknown_one(make_app: MakeApp) -> None:
    app = await make_app(**JWT)
    async with people(app) as (alice, bob):
        first, _ = await alice.turn("of Alice")
        hers, unknown = first["conversationId"], new_id()
        before = document(app, hers)
        for method, path in (
            ("GET", "/chat/{}"),
            ("HEAD", "/chat/{}"),
            ("GET", "/chat/{}?limit=1"),
            ("GET", f"/chat/{{}}?before={first['replyId']}"),
            ("DELETE", "/chat/{}"),
            ("POST", "/chat/{}/stop"),
            ("POST", "/chat/{}/retry"),
            ("PUT", "/chat/{}"),
            ("GET", "/chat/{}?branches=all"),
            ("HEAD", "/chat/stream/{}"),
            ("GET", "/chat/stream/{}?until=nonsense"),
        ):
            answers = [await bob.ask(method, path.format(each)) for each in (hers, unknown)]

            assert answers[0] == answers[1], f"{method} {path}"
            if "stream" not in path and method != "PUT":
                assert answers[0][0] == 404
        for method, path, body in (
            ("POST", "/chat/{}/retry", {"messageId": first["replyId"]}),
            ("POST", "/chat/{}/retry", {"messageId": first["messageId"]}),
            ("PUT", "/chat/{}/head", {"messageId": first["replyId"]}),
            ("PATCH", "/chat/{}", {"title": "of Bob"}),
            ("PATCH", "/chat/{}", {"title": None}),
        ):
            answers = [await bob.ask(method, path.format(each), json=body) for each in (hers, unknown)]

            assert answers[0] == answers[1] and answers[0][0] == 404, f"{method} {path}"
        for key in (None, "key"):
            for parent in ({}, {"parentId": None}, {"parentId": first["replyId"]}):
                response = await bob.http.post(
                    "/chat",
                    json={"conversationId": hers, "input": "of Bob", **parent},
                    headers={"Idempotency-Key": key} if key else {},
                )
                assert_problem(response, 404, "not_found")
                assert hers not in response.text and "Location" not in response.headers
        assert document(app, hers) == before
        assert (await alice.history(hers))["messages"][0]["content"] == "of Alice"
        assert (await bob.post("of Bob", unknown)).status_code == 202
        await app.until_idle()


@pytest.mark.parametrize("when", ["before", "while it is answered", "after"])
async def test_stream_of_another_owners_conversation_is_that_of_an_unknown_one(make_app: MakeApp, when: str) -> None:
    source = gated("one ", "two")
    app = await make_app(source=source, **JWT)
    async with people(app) as (alice, bob):
        hers, unknown = new_id(), new_id()
        streams = [await bob.open(each) for each in (hers, unknown)] if when == "before" else []
        first = await alice.say("of Alice", hers)
        her_stream = await alice.open(hers, f"{hers}-0")
        release(source)
        if when == "while it is answered":
            streams = [await bob.open(each) for each in (hers, unknown)]
        release(source)
        await app.until(lambda: not app.replies.running)
        streams = streams or [await bob.open(each) for each in (hers, unknown)]
        her_bytes = await read_available(her_stream)
        received = [await read_available(each) for each in streams]
        positions = [f"{first[name]}-{chars}" for name in ("messageId", "replyId") for chars in ("0", "2", "done")]
        resets = [await bob.open(each, position) for each in (hers, unknown) for position in positions]
        reset = {await read_available(each) for each in resets}

        assert b"of Alice" in her_bytes and b"one " in her_bytes and b"two" in her_bytes and b"done" in her_bytes
        assert received[0].replace(hers.encode(), unknown.encode()) == received[1] != b""
        assert b"END" not in received[0] and b"token" not in received[0]
        assert comparable_head(streams[0]) == comparable_head(streams[1])
        assert len(reset) == 1 and b"event: reset" in reset.pop()
        assert len({comparable_head(each) for each in resets}) == 1
        for each in (her_stream, *streams, *resets):
            each.close()
        await app.until_idle()


async def test_other_owner_cannot_act_on_a_running_reply(make_app: MakeApp) -> None:
    source = gated("one ", "two")
    app = await make_app(source=source, **JWT)
    async with people(app) as (alice, bob):
        hers = new_id()
        await alice.say("of Alice", hers)
        her_stream = await alice.open(hers)
        release(source)
        for method, path in (("POST", "/stop"), ("POST", "/retry"), ("DELETE", ""), ("GET", "")):
            assert_problem(await bob.http.request(method, f"/chat/{hers}{path}"), 404, "not_found")
        for method, path, body in (("PUT", "/head", {"messageId": new_id()}), ("PATCH", "", {"title": "of Bob"})):
            assert_problem(await bob.http.request(method, f"/chat/{hers}{path}", json=body), 404, "not_found")
        assert_problem(await bob.post("of Bob", hers), 404, "not_found")
        assert_problem(await bob.post("of Bob", hers, "key"), 404, "not_found")
        release(source)
        await app.until(lambda: not app.replies.running)
        received = await read_available(her_stream)

        assert b"one " in received and b"two" in received and b"event: done" in received and b"reset" not in received
        assert [each["content"] for each in document(app, hers)["messages"]] == ["of Alice", "one two"]
        assert len(source.prompts) == 1
        her_stream.close()
        await app.until_idle()


async def test_same_key_of_two_owners_starts_two_turns(make_app: MakeApp) -> None:
    app = await make_app(**JWT)
    async with people(app) as (alice, bob):
        hers = await alice.say("the same", None, "1")
        his = await bob.say("the same", None, "1")

        assert hers["conversationId"] != his["conversationId"]
        assert await alice.say("the same", None, "1") == hers
        assert await bob.say("the same", None, "1") == his
        assert (await bob.post("another", None, "1")).status_code == 422
        await app.until_idle()


async def test_lists_and_cursors_show_the_owners_conversations_only(make_app: MakeApp) -> None:
    app = await make_app(**JWT)
    async with people(app) as (alice, bob):
        ids: dict[str, list[str]] = {"alice": [], "bob": []}
        for _ in range(3):
            for person in (alice, bob):
                ids[person.owner].insert(0, (await person.turn("hi"))[0]["conversationId"])
        bobs_page = (await bob.http.get("/chat", params={"limit": 1})).json()
        for cursor in (None, bobs_page["nextCursor"]):
            listed: list[str] = []
            after = {"cursor": cursor} if cursor else {}
            while True:
                page = (await alice.http.get("/chat", params={"limit": 2, **after})).json()
                listed += [each["conversationId"] for each in page["conversations"]]
                if "nextCursor" not in page:
                    break
                after = {"cursor": page["nextCursor"]}

            assert listed == ids["alice"][len(ids["alice"]) - len(listed) :]
            assert cursor is not None or len(listed) == 3


async def test_without_auth_only_conversations_without_an_owner_are_seen(make_app: MakeApp) -> None:
    with_users, without = await make_app(**JWT), await make_app()
    async with people(with_users) as (alice, _):
        hers, _ = await alice.turn("of Alice")
        nobodys, _ = await without.client.turn("of nobody")
        assert "owner" not in document(without, nobodys["conversationId"])
        for client, own, others in ((alice, hers, nobodys), (without.client, nobodys, hers)):
            listed = (await client.http.get("/chat")).json()["conversations"]

            assert [each["conversationId"] for each in listed] == [own["conversationId"]]
            assert (await client.http.get(f"/chat/{others['conversationId']}")).status_code == 404
            assert (await client.post("more", others["conversationId"])).status_code == 404


async def test_streams_of_another_owner_do_not_fill_the_limit_of_a_conversation(make_app: MakeApp) -> None:
    app = await make_app(max_streams_per_conversation=2, **JWT)
    async with people(app) as (alice, bob):
        hers = (await alice.turn("of Alice"))[0]["conversationId"]
        streams = [await bob.open(hers) for _ in range(3)] + [await alice.open(hers)]

        assert [each.head.split()[1] for each in streams] == ["200", "200", "429", "200"]
        for each in streams:
            each.close()
        await app.until_idle()


# -- streams and their tokens --------------------------------------------------------------------------------------


async def test_stream_ends_with_its_token_and_a_new_token_resumes_it(make_app: MakeApp) -> None:
    source = gated("one ", "two ", "three")
    app = await make_app(source=source, **{**JWT, "auth_leeway_s": 1.0})
    async with people(app) as (alice, _):
        answer = await alice.say("hi")
        seconds = 1.5
        ends_at = time.time() + seconds + 1.0
        alice.http.headers.update(bearer("alice", seconds=seconds))
        events: list[Event] = []

        async def watch() -> None:
            async for event in alice.stream(answer["conversationId"], answer["lastEventId"]):
                events.append(event)

        release(source)
        async with asyncio.timeout(10):
            await watch()
        ended_at = time.time()
        response = await alice.http.get("/chat")
        release(source, 2)
        await app.until(lambda: not app.replies.running)
        alice.http.headers.update(bearer("alice"))
        rest = await alice.events(answer["conversationId"], events[-1].id)

        assert -0.05 <= ended_at - ends_at <= 1.2
        assert_problem(response, 401, "token_expired")
        assert response.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
        assert text_of(events) == "one " and text_of(rest) == "two three" and rest[-1].name == "done"
        assert document(app, answer["conversationId"])["messages"][-1]["content"] == "one two three"


@pytest.mark.parametrize("seed", range(5))
async def test_streams_that_expire_after_any_character_lose_and_repeat_nothing(make_app: MakeApp, seed: int) -> None:
    """Chunks of random length, several of which may be sent before a token expires, or none."""
    chance = random.Random(seed)
    text = "Wörter 😀 and more words, one after the other. " * 2
    cuts = sorted({0, len(text), *(chance.randrange(len(text)) for _ in range(40))})
    pieces = [text[begin:end] for begin, end in itertools.pairwise(cuts)]
    source = gated(*pieces)
    app = await make_app(source=source, **JWT)
    async with people(app) as (alice, _):
        answer = await alice.say("hi")
        position, events, streams = answer["lastEventId"], list[Event](), 0
        while not (events and events[-1].name == "done"):
            streams += 1
            alice.http.headers.update(bearer("alice", seconds=600 + streams))
            release(source, chance.randrange(4))
            await app.until(lambda: not app.streams.connections)
            expiring = asyncio.create_task(expire_after(app, chance.randrange(3)))
            events += [event async for event in alice.stream(answer["conversationId"], position) if event.id]
            position = events[-1].id if events else position
            await expiring

        assert streams > 5 and text_of(events) == text
        assert document(app, answer["conversationId"])["messages"][-1]["content"] == text


async def expire_after(app: App, tokens: int) -> None:
    """Let the token of the one open stream expire, once the stream had the time to be sent some tokens."""
    await app.until(lambda: any(each.ready for each in app.streams.connections))
    (connection,) = app.streams.connections
    sent = app.hub.counts.events
    with suppress(TimeoutError):
        await app.until(lambda: app.hub.counts.events >= sent + tokens, 0.02)
    connection.valid_until = 0.0
    app.streams.tick()


async def test_stream_that_has_expired_while_the_machine_slept_gets_no_token(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = gated("before ", "after")
    app = await make_app(source=source, **JWT)
    # The timer of the streams would end them as well.
    monkeypatch.setattr(app.streams, "tick", lambda: None)
    async with people(app) as (alice, bob):
        answers = [await each.say("hi") for each in (alice, bob)]
        alice.http.headers.update(bearer("alice", seconds=60))
        streams = [
            await each.open(answer["conversationId"]) for each, answer in zip((alice, bob), answers, strict=True)
        ]
        release(source, 2)
        received = [await read_available(each) for each in streams]
        now = time.time
        for module in (chatserver.hub.delivery, chatserver.streams.connection):
            monkeypatch.setattr(module, "time", lambda: now() + 120)
        release(source, 2)
        await app.until(lambda: not app.replies.running)
        later = [await read_available(each) for each in streams]

        assert all(b"before" in each for each in received)
        assert later[0] == b"END"
        assert b"after" in later[1] and b"event: done" in later[1]
        for each in streams:
            each.close()
        await app.until_idle()


@pytest.mark.parametrize("pages", [0, 1])
async def test_stream_that_expires_during_its_replay_gets_no_further_page(
    make_app: MakeApp, database: Database, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    app = await make_app(**JWT)
    # The timer of the streams would end it as well, but up to a second later.
    monkeypatch.setattr(app.streams, "tick", lambda: None)
    read, now = app.store.read, time.time
    reads = 0

    async def read_until_expired(*arguments: Any, **options: Any) -> Record | None:
        nonlocal reads
        record = await read(*arguments, **options)
        if reads == pages:
            monkeypatch.setattr(chatserver.streams.connection, "time", lambda: now() + 3600)
        reads += 1
        return record

    async with people(app) as (alice, _):
        (conversation_id,) = insert(database, "alice", 1, "x" * 3 * PAGE_SIZE)
        database.conversations.update_one({"owner": "alice"}, {"$set": {"messages.0.role": "assistant"}})
        monkeypatch.setattr(app.store, "read", read_until_expired)
        stream = await alice.open(conversation_id, f"{conversation_id}-0")
        received = await read_available(stream)

        assert received.endswith(b"END") and not stream.reader.ended
        assert received.count(b"x" * PAGE_SIZE) == pages and reads == pages + 1
        stream.close()
        await app.until_idle()


async def test_token_that_never_expires_in_practice_opens_a_stream(make_app: MakeApp) -> None:
    app = await make_app(**JWT)
    headers = f"Authorization: Bearer {token('alice', exp=10**30)}\r\n"
    stream = await RawStream(app.port, f"/chat/stream/{new_id()}", headers=headers).open()

    assert " 200 " in stream.head and b"END" not in await read_available(stream)
    stream.close()
    await app.until_idle()


# -- pages of other sites ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [
        {"Sec-Fetch-Site": "same-site", "Origin": "http://sibling.localhost"},
        {"Sec-Fetch-Site": "cross-site", "Origin": "null"},
        {"Origin": "null"},
        {"Origin": "http://evil.example"},
    ],
    ids=repr,
)
async def test_page_of_another_site_cannot_use_the_cookie(make_app: MakeApp, page: dict[str, str]) -> None:
    app = await make_app(**JWT)
    async with people(app) as (alice, _):
        conversation_id = (await alice.turn("hi"))[0]["conversationId"]
        cookie = {"Cookie": f"{COOKIE}={token('alice')}"}
        for method, path in (
            ("POST", f"/chat/{conversation_id}/stop"),
            ("POST", f"/chat/{conversation_id}/retry"),
            ("PUT", f"/chat/{conversation_id}/head"),
            ("PATCH", f"/chat/{conversation_id}"),
            ("DELETE", f"/chat/{conversation_id}"),
            ("GET", f"/chat/stream/{conversation_id}"),
            ("POST", "/chat"),
            ("DELETE", "/me"),
        ):
            response = await app.client.http.request(method, path, headers=page | cookie)
            assert_problem(response, 403, "cross_site")
        own = {"Sec-Fetch-Site": "same-origin"}
        for headers in (own | cookie, cookie, page | bearer("alice")):
            response = await app.client.http.post(f"/chat/{conversation_id}/stop", headers=headers)
            assert response.status_code == 202, response.text


async def test_refusal_is_readable_by_pages_of_allowed_origins(make_app: MakeApp) -> None:
    origin = "https://friend.example"
    app = await make_app(cors_origins=(origin,), **JWT)
    page = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
    refused = await app.client.http.get("/chat", headers=page)
    asked = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    preflight = await app.client.http.options("/chat", headers=asked)

    assert refused.status_code == 401 and refused.headers["Access-Control-Allow-Origin"] == origin
    assert "WWW-Authenticate" in refused.headers["Access-Control-Expose-Headers"].split(", ")
    assert preflight.status_code == 204 and preflight.headers["Access-Control-Allow-Origin"] == origin
    assert "Authorization" in preflight.headers["Access-Control-Allow-Headers"].split(", ")


# -- secrets -------------------------------------------------------------------------------------------------------


async def test_no_secret_is_in_a_log_an_answer_a_metric_a_document_or_a_prompt(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    source = gated("one ", "two", said=100)
    app = await make_app(source=source, metrics_token=METRICS_TOKEN, **JWT)
    callers: list[BaseHandler] = []
    prepare = BaseHandler.prepare

    async def note(handler: BaseHandler) -> None:
        await prepare(handler)
        callers.append(handler)

    monkeypatch.setattr(BaseHandler, "prepare", note)
    good, expired, forged = token("alice"), token("alice", seconds=-60), token("alice")[:-6] + "AAAAAA"
    answers: list[str] = []
    for credential in (good, expired, forged, f"{good}.more", "short-secret-token"):
        for header in ({"Authorization": f"Bearer {credential}"}, {"Cookie": f"{COOKIE}={credential}"}):
            for method, path in (("GET", "/chat"), ("POST", "/chat"), ("GET", f"/chat/{new_id()}"), ("GET", "/none")):
                body = {"json": {"input": "hi"}} if method == "POST" else {}
                response = await app.client.http.request(method, path, headers=header, **body)  # type: ignore[arg-type]
                answers.append(response.text + repr(response.headers))
    await app.until_idle()
    metrics = await app.client.http.get("/metrics", headers={"Authorization": f"Bearer {METRICS_TOKEN}"})
    answers.append(metrics.text)
    seen = [
        *answers,
        *(json.dumps(vars(record), default=str) for record in caplog.records if "httpx" not in record.name),
        *(str(each) for each in app.database.conversations.find()),
        *map(repr, source.prompts),
        *(repr(each) for each in (app.settings, app.server, app.chat, app.reading, app.streams, *callers)),
        *(repr(each.caller) for each in callers),
    ]

    assert source.prompts and callers and "chatserver_open_streams" in metrics.text
    secrets = [
        SECRET,
        *{part for each in (good, expired, forged) for part in each.split(".")[1:]},
        "short-secret-token",
    ]
    assert not [text for text in seen if any(secret in text for secret in secrets)]
