"""The promise: each client receives each character once, whenever it joins and however often it is disconnected."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx
import httpx_sse
import pytest

from chatserver.errors import SourceError
from chatserver.records import Key
from chatserver.sources import Prompt
from chatserver.streams import Connection
from chatserver.wire import sse
from tests.apps import App, Database, MakeApp, Script, running
from tests.clients import Client, Event, RawStream, Transcript, new_id, text_of

NASTY = [
    "Zwei\n",
    "",
    "Zeilen\r\n",
    "🙂",
    "👩‍👩‍👧",
    "e",
    "\u0301",
    "\r",
    "\u2028",
    "\u2029",
    "\x85",
    '"\\"',
    "\x00",
    "नी",
    " end",
]

pytestmark = pytest.mark.gen_test


class Endless:
    """A source that never ends, as fast as the loop allows."""

    async def reply(self, prompt: Prompt) -> AsyncIterator[str]:
        while True:
            await asyncio.sleep(0)
            yield "x"

    async def close(self) -> None:
        pass


async def resume_at_random(
    client: Client, conversation_id: str, dice: random.Random, replies: int, position: str = ""
) -> Transcript:
    """Watch a conversation, disconnecting at random points and resuming, until `replies` replies have ended."""
    seen, in_query = Transcript(), dice.random() < 0.5
    while len(seen.ended) < replies:
        left = dice.choice([1, 2, 3, 7, 20, 1000])
        stream = client.stream(conversation_id, position, in_query=in_query)
        async for event in stream:
            assert event.name != "reset"
            seen.take(event)
            position = event.id
            left -= 1
            if left == 0 or len(seen.ended) == replies:
                break
        await stream.aclose()  # type: ignore[attr-defined]
    return seen


def our_tasks() -> list[str]:
    """Return the tasks on the loop, except those of connections that the test's own client keeps alive."""
    names = [getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()]
    return sorted(name for name in names if "_server_request_loop" not in name)


def indexes_are_built() -> bool:
    """Return whether the job that builds the indexes, and its client, have ended."""
    return not any("build_indexes" in name or name.startswith("Async") for name in our_tasks())


def stored(history: dict[str, Any]) -> dict[str, str]:
    return {message["id"]: message["content"] for message in history["messages"]}


@pytest.mark.parametrize("delay_ms", [0, 2])
async def test_fifty_clients_disconnected_at_random_points_have_the_stored_text(
    make_app: MakeApp, delay_ms: int
) -> None:
    app = await make_app(simulated_token_delay_ms=delay_ms)
    conversation_id = new_id()
    dice = random.Random(7)

    async def join(after: float, position: str = "") -> Transcript:
        await asyncio.sleep(after)
        return await resume_at_random(app.client, conversation_id, random.Random(dice.random()), 1, position)

    before = [asyncio.create_task(join(0)) for _ in range(25)]
    await app.until(lambda: app.subscribers >= 25)
    answer = await app.client.say("Tell me a story", conversation_id)
    # With a position, since on a busy machine some come when the reply has ended, and would wait for the next one.
    during = [asyncio.create_task(join(dice.random() * 0.2, answer["lastEventId"])) for _ in range(20)]
    seen = await asyncio.gather(*before, *during)
    texts = stored(await app.client.history(conversation_id))
    for transcript in seen:
        assert transcript.said[answer["replyId"]] == texts[answer["replyId"]]
    for transcript in seen[:25]:
        assert transcript.said == texts and transcript.order == list(texts)
    # After the reply: random disconnects, too; and a position of each kind yields exactly the rest.
    for transcript in await asyncio.gather(*(join(0, answer["lastEventId"]) for _ in range(5))):
        assert transcript.said == {answer["replyId"]: texts[answer["replyId"]]}
    reply = texts[answer["replyId"]]
    for chars in (0, 1, len(reply) // 2, len(reply) - 1, len(reply)):
        events = await app.client.events(conversation_id, f"{answer['replyId']}-{chars}")
        assert text_of(events) == reply[chars:] and events[-1].name == "done"


async def test_text_that_is_hard_to_carry_arrives_unchanged(make_app: MakeApp) -> None:
    app = await make_app(source=Script(*NASTY))
    conversation_id = new_id()
    watchers = [
        asyncio.create_task(resume_at_random(app.client, conversation_id, random.Random(n), 1)) for n in range(10)
    ]
    await app.until(lambda: app.subscribers == 10)
    answer = await app.client.say("Zwei\r\nZeilen \u2028 🙂", conversation_id)
    for transcript in await asyncio.gather(*watchers):
        assert transcript.said[answer["replyId"]] == "".join(NASTY)
        assert transcript.said[answer["messageId"]] == "Zwei\r\nZeilen \u2028 🙂"
    assert stored(await app.client.history(conversation_id))[answer["replyId"]] == "".join(NASTY)


@pytest.mark.expects_log("source of replies crashed")
async def test_source_that_cancels_itself_ends_its_reply(make_app: MakeApp) -> None:
    app = await make_app(source=Script("half", asyncio.CancelledError()))
    answer, events = await app.client.turn("hi")
    assert events[-1].data["code"] == "source_failed"
    assert not app.replies.running
    assert (await app.client.history(answer["conversationId"]))["messages"][-1]["status"] == "failed"


async def test_half_a_surrogate_pair_in_a_failure_is_replaced(make_app: MakeApp) -> None:
    app = await make_app(source=Script("half", SourceError("source_refused", "It said: \ud83d")))
    answer, events = await app.client.turn("hi")
    assert events[-1].data["message"] == "It said: \ufffd"
    stored_error = (await app.client.history(answer["conversationId"]))["messages"][-1]["error"]
    assert stored_error == {"code": "source_refused", "message": "It said: \ufffd"}


async def test_half_a_surrogate_pair_from_a_source_is_replaced(make_app: MakeApp) -> None:
    app = await make_app(source=Script("a\ud83d", "b"))
    answer, events = await app.client.turn("hi")
    assert (
        text_of(events) == "a\ufffdb" == stored(await app.client.history(answer["conversationId"]))[answer["replyId"]]
    )


@pytest.mark.parametrize("stops", [1, 2])
async def test_resume_after_a_restart_and_missed_turns(database: Database, stops: int) -> None:
    conversation_id = new_id()
    async with running(App(database, simulated_token_delay_ms=1)) as app:
        first = await app.client.say("one", conversation_id)
        events: list[Event] = []
        async for event in app.client.stream(conversation_id, first["lastEventId"]):
            events.append(event)
            if len(events) == 9:
                break
    # The restart ends the reply; its rest and its end come from MongoDB.
    for _ in range(stops - 1):
        async with running(App(database)) as app:
            await app.client.turn("missed", conversation_id)
    async with running(App(database)) as app:
        last, _ = await app.client.turn("two", conversation_id)
        seen = Transcript()
        for event in events:
            seen.take(event)
        async for event in app.client.stream(conversation_id, events[-1].id):
            seen.take(event)
            if last["replyId"] in seen.ended:
                break
        texts = stored(await app.client.history(conversation_id))
        del texts[first["messageId"]]
        assert seen.said == texts and seen.order == list(texts)
        assert seen.ended[first["replyId"]] == "interrupted"


async def test_history_and_the_stream_from_its_position_make_the_stored_text_at_every_moment(
    make_app: MakeApp,
) -> None:
    gate = asyncio.Semaphore(0)
    app = await make_app(source=Script(*NASTY, gate=gate))
    answer = await app.client.say("hi")
    conversation_id = answer["conversationId"]
    joined = []
    for said in range(len(NASTY)):
        await app.until(lambda: gate.locked())
        history = await app.client.history(conversation_id)
        assert history["status"] == "streaming" and history["messages"][-1]["status"] == "streaming"
        assert history["messages"][-1]["content"] == "".join(NASTY[:said])
        joined.append((history, asyncio.create_task(app.client.events(conversation_id, history["lastEventId"]))))
        await app.until(lambda: app.subscribers == len(joined))
        gate.release()
    for history, events in joined:
        assert history["messages"][-1]["content"] + text_of(await events) == "".join(NASTY)
    history = await app.client.history(conversation_id)
    assert history["status"] == "idle" and history["lastEventId"] == f"{answer['replyId']}-done"


async def test_tokens_leave_one_by_one_when_there_is_time(make_app: MakeApp) -> None:
    app = await make_app(simulated_token_delay_ms=40, simulated_tokens=20)
    conversation_id = new_id()
    raw = await RawStream(app.port, f"/chat/stream/{conversation_id}").open()

    async def tokens_in_each_read() -> list[int]:
        await app.client.say("hi", conversation_id)
        reads = [b""]
        while b"event: done" not in reads[-1]:
            reads.append(await raw.reader.read(65536))
        return [read.count(b"event: token") for read in reads if b"event: token" in read]

    # Once out of three: on a machine that stalls for 40 ms there was no time.
    assert [1] * 20 in [await tokens_in_each_read() for _ in range(3)]
    raw.close()


async def test_headers_and_first_bytes_leave_at_once(app: App) -> None:
    raw = await RawStream(app.port, f"/chat/stream/{new_id()}").open()
    assert (await raw.reader.readline()) == b"retry: 1000\n"
    assert (await raw.reader.readline()).startswith(b":")
    assert (await raw.reader.readuntil(b"\n\n")).startswith(b"event: stream\nid: ")
    assert (await raw.reader.readuntil(b"\n\n")) == b'event: ping\ndata: {"everyS":15}\n\n'
    head = raw.head.split("\r\n")
    assert head[0] == "HTTP/1.1 200 OK"
    for line in (
        "Content-Type: text/event-stream",
        "Cache-Control: no-cache, no-transform",
        "Connection: keep-alive",
        "Transfer-Encoding: chunked",
        "X-Accel-Buffering: no",
    ):
        assert line in head
    assert "Content-Encoding" not in raw.head and "Content-Length" not in raw.head
    raw.close()


async def test_connection_that_the_client_will_close_is_not_kept(app: App) -> None:
    answer, _ = await app.client.turn("hi")
    path = f"/chat/stream/{answer['conversationId']}?until=done&lastEventId={answer['lastEventId']}"
    raw = await RawStream(app.port, path, headers="Connection: close\r\n").open()
    assert "Connection: close" in raw.head.split("\r\n")
    assert [event.name async for event in raw.events()] == ["token", "done"]
    assert raw.reader.ended and await raw.reader.read(1) == b""
    raw.close()


async def test_connection_serves_another_request_after_a_stream_has_ended_in_order(app: App) -> None:
    """Guards: a pooled client sent its next post into a connection that the server was closing."""
    answer, _ = await app.client.turn("hi")
    path = f"/chat/stream/{answer['conversationId']}?until=done&lastEventId={answer['lastEventId']}"
    async with httpx.AsyncClient(base_url=app.url, trust_env=False, limits=httpx.Limits(max_connections=1)) as pooled:
        ports = set()
        for _ in range(200):
            stream = await pooled.get(path)
            post = await pooled.post("/chat", json={"input": "hi"})
            assert stream.status_code == 200 and post.status_code == 202
            ports |= {each.extensions["network_stream"].get_extra_info("client_addr") for each in (stream, post)}
    assert len(ports) == 1
    await app.until(lambda: len(app.streams) == 0)


async def test_stream_until_done_ends_once_though_another_turn_waits_behind_it(make_app: MakeApp) -> None:
    """Guards: a slow client received the next turn's frames, and a second last chunk in its next response."""
    app = await make_app(source=Script("a"))
    cid = new_id()
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    writer.write(f"GET /chat/stream/{cid}?until=done HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    await app.until(lambda: app.subscribers == 1)
    (connection,) = app.hub.conversations[0].subscribers
    await app.until(lambda: connection.ready)
    connection.pause_writing()  # type: ignore[attr-defined]
    for _ in range(2):
        await app.client.turn("hi", cid)
    connection.resume_writing()  # type: ignore[attr-defined]
    async with asyncio.timeout(5):
        stream = (await reader.readuntil(b"\r\n0\r\n\r\n")).decode()
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        following = (await reader.read()).decode()
    assert [stream.count(f"event: {name}\n") for name in ("input", "token", "done")] == [1, 1, 1]
    assert following.startswith("HTTP/1.1 200 OK") and following.count("HTTP/1.1 ") == 1
    writer.close()


async def test_nothing_follows_a_reset(make_app: MakeApp) -> None:
    app = await make_app(source=Script("a", gate=asyncio.Semaphore(0)))
    cid = new_id()
    raw = await RawStream(app.port, f"/chat/stream/{cid}").open()
    await app.until(lambda: app.subscribers == 1)
    await app.client.say("hi", cid)
    (live,) = app.hub.conversations
    (connection,) = live.subscribers
    await app.until(lambda: connection.ready and not live.is_dirty)
    live.append("not yet delivered", 17)
    live.reset()
    assert [event.name async for event in raw.events()][-1] == "reset"
    assert raw.reader.ended
    raw.close()


async def test_connection_that_ends_as_soon_as_it_is_made_is_passed_on_once() -> None:
    """Guards: two readers of one socket, each of which took a part of the client's next requests."""
    kept: list[socket.socket] = []
    ended = asyncio.Event()

    class Brief(Connection):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.end()

    ours, theirs = socket.socketpair()
    connection = Brief(b"", lambda _: ended.set(), stream_format=sse, chunked=True, reuse=kept.append)
    with theirs:
        await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, ours)
        await ended.wait()
        await asyncio.sleep(0)
        assert theirs.recv(100) == b"0\r\n\r\n" and len(kept) == 1
    for each in kept:
        each.close()


async def test_last_chunk_is_sent_only_if_the_client_has_everything(make_app: MakeApp) -> None:
    """Guards: a reply that was truncated by a disconnect looked complete to curl, fetch() and their like."""
    gate = asyncio.Semaphore(0)
    app = await make_app(source=Script("a", "b", "c", gate=gate), stream_max_age_s=0.0)

    async def opened(query: str = "", conversation_id: str = "") -> RawStream:
        return await RawStream(app.port, f"/chat/stream/{conversation_id or answer['conversationId']}{query}").open()

    async def has_last_chunk(stream: RawStream) -> bool:
        async with asyncio.timeout(5):
            while await stream.reader.readline():
                pass
        stream.close()
        return bool(stream.reader.ended)

    answer = await app.client.say("hi")
    aged, aborted, to_the_end = [await opened(), await opened(), await opened("?until=done")]
    await app.until(lambda: app.subscribers == 3)
    gate.release()
    for stream in (aged, aborted):
        await stream.reader.readuntil(b'{"text":"a"}')
    first, second = (each for each in app.hub.conversations[0].subscribers if not each.until_done)
    first.expires_at = 0.0  # type: ignore[attr-defined]
    second.abort()
    assert not await has_last_chunk(aged) and not await has_last_chunk(aborted)
    gate.release()
    gate.release()
    assert await has_last_chunk(to_the_end)
    idle, unknown, reset = await opened(), await opened("", new_id()), await opened("?lastEventId=42")
    await app.until(lambda: app.subscribers == 2)
    assert await has_last_chunk(reset)
    await app.end_streams()
    assert await has_last_chunk(idle) and await has_last_chunk(unknown)


async def test_http_1_0_client_reads_the_stream(app: App) -> None:
    conversation_id = new_id()
    raw = await RawStream(app.port, f"/chat/stream/{conversation_id}?until=done", version="1.0").open()
    assert "Transfer-Encoding" not in raw.head and "keep-alive" not in raw.head
    answer = await app.client.say("hi", conversation_id)
    events = [event async for event in raw.events()]
    assert text_of(events) == stored(await app.client.history(conversation_id))[answer["replyId"]]
    raw.close()


@pytest.mark.parametrize("before", ["GET /healthz", "GET /chat/stream/none", "POST /chat/stream/none"])
@pytest.mark.parametrize("rest", ["", "Content-Length: 4\r\n"])
async def test_stream_opens_on_a_connection_that_was_used_before(app: App, before: str, rest: str) -> None:
    answer, _ = await app.client.turn("hi", new_id())
    cid = answer["conversationId"]
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    stream = f"GET /chat/stream/{cid}?lastEventId={cid}-0&until=done"
    # Pipelined: only the lengths separate the bodies from the requests that follow.
    for request in (before, stream):
        writer.write(f"{request} HTTP/1.1\r\nHost: localhost\r\n{rest}\r\n{'body' if rest else ''}".encode())
    async with asyncio.timeout(5):
        told = (await reader.readuntil(b"\r\n0\r\n\r\n")).decode()
        # Its bytes after the head are not known to the HTTP server, so a connection with a body is closed.
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert (b" 200 OK" in await reader.read()) == (not rest)
    assert told.count("HTTP/1.1 ") == 2 and told.count("HTTP/1.1 200 OK") == 1 + ("/healthz" in before)
    reply_id = answer["replyId"]
    assert f'data: {{"messageId":"{reply_id}","status":"complete"}}\nid: {reply_id}-done\n\n' in told
    assert told.endswith("\r\n0\r\n\r\n")
    writer.close()
    await writer.wait_closed()


async def test_stream_without_a_position_begins_with_the_reply_in_flight(
    make_app: MakeApp,
) -> None:
    gate = asyncio.Semaphore(2)
    app = await make_app(source=Script("a", "b", "c", gate=gate))
    answer = await app.client.say("hi")
    await app.until(lambda: gate.locked())
    events = asyncio.create_task(app.client.events(answer["conversationId"]))
    await app.until(lambda: app.subscribers == 1)
    gate.release()
    gate.release()
    assert [event.name for event in await events] == ["token", "token", "token", "done"]


async def test_quiet_stream_has_a_ping_as_often_as_it_announces(make_app: MakeApp) -> None:
    app = await make_app(keepalive_s=2.0)
    raw = await RawStream(app.port, f"/chat/stream/{new_id()}").open()
    loop = asyncio.get_running_loop()
    times = []
    for _ in range(3):
        await raw.reader.readuntil(b'event: ping\ndata: {"everyS":2}\n\n')
        times.append(loop.time())
    assert 0.9 < times[1] - times[0] < 3 and 0.9 < times[2] - times[1] < 3
    raw.close()


async def test_stream_stays_open_across_turns_and_shows_what_others_say(app: App) -> None:
    conversation_id = new_id()
    seen = Transcript()
    answers = []
    stream = app.client.stream(conversation_id)
    first: asyncio.Future[Event] = asyncio.ensure_future(anext(stream))
    await app.until(lambda: app.subscribers == 1)
    answers.append(await app.client.say("turn 0", conversation_id))
    seen.take(await first)
    async for event in stream:
        seen.take(event)
        if len(seen.ended) == 3:
            break
        if event.name == "done":
            answers.append(await app.client.say(f"turn {len(seen.ended)}", conversation_id))
    texts = stored(await app.client.history(conversation_id))
    assert seen.said == texts and seen.order == list(texts) and len(texts) == 6
    await stream.aclose()  # type: ignore[attr-defined]


async def test_clients_that_resume_together_read_twice_each_at_the_most(app: App) -> None:
    """As after a restart: only the first one's read of the database makes the others' out of date."""
    answer, _ = await app.client.turn("hi")
    reads: list[str] = []
    app.store.guard.observe = lambda operation, _seconds, _ok: reads.append(operation)
    position = answer["replyId"] + "-5"
    several = await asyncio.gather(*(app.client.events(answer["conversationId"], position) for _ in range(60)))
    assert all(text_of(events) == text_of(several[0]) and events[-1].name == "done" for events in several)
    assert reads.count("read") <= 120
    reads.clear()
    path = f"/chat/stream/{answer['conversationId']}"
    streams = await asyncio.gather(*(RawStream(app.port, path).open() for _ in range(60)))
    assert len(reads) <= 30
    for each in streams:
        each.close()


async def test_stream_from_the_start_of_an_unknown_conversation_resumes_without_a_gap(app: App) -> None:
    """Guards: a disconnect before the first event left an EventSource with nothing to resume from."""
    conversation_id = new_id()
    raw = await RawStream(app.port, f"/chat/stream/{conversation_id}").open()
    block = (await raw.reader.readuntil(b"\n\n")).decode()
    raw.close()
    position = block.partition("id: ")[2].strip()
    await app.client.turn("missed", conversation_id)
    seen = Transcript()
    for event in await app.client.events(conversation_id, position):
        seen.take(event)
    assert seen.said == stored(await app.client.history(conversation_id))


@pytest.mark.parametrize("kind", ["malformed", "foreign", "too-far-user", "foreign-start"])
async def test_position_that_does_not_exist_is_answered_by_reset(app: App, kind: str) -> None:
    answer, _ = await app.client.turn("hi")
    conversation_id = answer["conversationId"]
    position = {
        "malformed": "42",
        "foreign": f"{new_id()}-3",
        "too-far-user": f"{answer['messageId']}-1",
        "foreign-start": f"{new_id()}-0",
    }[kind]
    for in_query in (False, True):
        events = [event async for event in app.client.stream(conversation_id, position, in_query=in_query)]
        assert [(event.name, event.id, event.data) for event in events] == [("reset", "", {})]
    assert [event.name async for event in app.client.stream(new_id(), position)] == ["reset"]


async def test_source_that_fails_at_once_notifies_early_and_late_clients(make_app: MakeApp) -> None:
    app = await make_app(source=Script(SourceError("source_failed", "Out of paper.")))
    conversation_id = new_id()
    early = asyncio.create_task(app.client.events(conversation_id))
    await app.until(lambda: app.subscribers == 1)
    answer = await app.client.say("hi", conversation_id)
    expected = {"code": "source_failed", "message": "Out of paper.", "messageId": answer["replyId"]}
    late = await app.client.events(conversation_id, answer["lastEventId"])
    for events in (await early, late):
        assert (events[-1].name, events[-1].data) == ("error", expected)
    message = (await app.client.history(conversation_id))["messages"][-1]
    assert message["status"] == "failed" and message["content"] == ""
    assert message["error"] == {"code": "source_failed", "message": "Out of paper."}


@pytest.mark.expects_log("source of replies crashed")
async def test_source_that_crashes_ends_its_reply(make_app: MakeApp) -> None:
    app = await make_app(source=Script("half", ZeroDivisionError("secret")))
    answer, events = await app.client.turn("hi")
    assert text_of(events) == "half" and events[-1].data["code"] == "source_failed"
    assert "secret" not in str(events)
    assert (await app.client.history(answer["conversationId"]))["messages"][-1]["content"] == "half"


async def test_reply_is_generated_and_stored_without_clients(app: App) -> None:
    answer = await app.client.say("hi")
    await app.until_idle()
    message = (await app.client.history(answer["conversationId"]))["messages"][-1]
    assert message["status"] == "complete" and len(message["content"].split()) > 40


async def test_client_that_goes_away_leaves_nothing_behind(make_app: MakeApp) -> None:
    app = await make_app(simulated_token_delay_ms=2)
    await app.until(indexes_are_built)
    tasks = our_tasks()
    answer = await app.client.say("hi")
    # With a position: on a busy machine the reply may end before all of them are open.
    path = f"/chat/stream/{answer['conversationId']}?lastEventId={answer['lastEventId']}"
    streams = [await RawStream(app.port, path).open() for _ in range(10)]
    for stream in streams:
        await stream.reader.readuntil(b"event: token")
        stream.writer.transport.abort()
    await app.until(lambda: len(app.streams) == 0)
    await app.until_idle()
    assert our_tasks() == tasks


@pytest.mark.process
async def test_hundred_conversations_at_once_keep_their_tokens_apart(make_app: MakeApp) -> None:
    # On a busy machine a hundred posts at once may wait longer for the database than one post should.
    app = await make_app(database_timeout_s=30.0)

    async def chat(number: int) -> None:
        answer, events = await app.client.turn(f"I am number {number:03}.")
        assert text_of(events) == stored(await app.client.history(answer["conversationId"]))[answer["replyId"]]
        assert f"I am number {number:03}." in text_of(events)

    await asyncio.gather(*(chat(number) for number in range(100)))


@pytest.mark.process
@pytest.mark.alone
async def test_others_advance_while_two_hundred_replies_stream_without_delay(
    make_app: MakeApp,
) -> None:
    app = await make_app(source=Endless(), database_timeout_s=30.0, checkpoint_ms=250)
    answers = await asyncio.gather(*(app.client.say(f"n {n}") for n in range(200)))
    lives = [live for answer in answers if (live := app.hub.get(Key(None, answer["conversationId"]))) and live.reply]
    assert len(lives) == 200
    for _ in range(3):
        before = [live.reply.chars for live in lives if live.reply]
        assert (await app.client.http.get("/healthz")).status_code == 200
        assert (await app.client.http.get("/healthz")).status_code == 200
        after = [live.reply.chars for live in lives if live.reply]
        assert len(after) == 200 and all(b > a for a, b in zip(before, after, strict=True))
    stops = (app.client.http.post(f"/chat/{answer['conversationId']}/stop") for answer in answers)
    assert {stop.status_code for stop in await asyncio.gather(*stops)} == {202}
    await app.until_idle()


async def test_httpx_sse_reads_the_stream(app: App) -> None:
    conversation_id = new_id()
    async with (
        httpx.AsyncClient(base_url=app.url, trust_env=False) as http,
        httpx_sse.aconnect_sse(http, "GET", f"/chat/stream/{conversation_id}?until=done") as source,
    ):
        answer = await app.client.say("hi\u2028there", conversation_id)
        events = [event async for event in source.aiter_sse() if event.event not in ("stream", "ping")]
    assert events[0].event == "input" and events[0].json()["text"] == "hi\u2028there"
    text = "".join(event.json()["text"] for event in events if event.event == "token")
    assert text == stored(await app.client.history(conversation_id))[answer["replyId"]]
    assert events[-1].event == "done" and events[-1].id == f"{answer['replyId']}-done"
