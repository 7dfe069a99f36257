"""Delivery is fair to all, and its work is counted, not timed: frames, writes, tasks, database calls, bytes kept."""

import asyncio
import re
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from chatserver.hub import MAX_WRITE
from chatserver.records import PAGE_SIZE
from chatserver.wire import sse
from tests.apps import Database, MakeApp, Script
from tests.clients import Client, RawStream, Transcript, new_id, text_of
from tests.processes import Server, until

pytestmark = pytest.mark.gen_test(timeout=110)


class Stalled:
    """A client that reads its stream's head, and then nothing more."""

    def __init__(self, port: int, path: str) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.connect(("127.0.0.1", port))
        self._socket.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())

    def close(self) -> None:
        self._socket.close()


async def test_frame_is_encoded_once_for_all_and_nothing_is_done_for_each_token(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Semaphore(0)
    app = await make_app(source=Script(*["x"] * 20, gate=gate), checkpoint_ms=60_000, lease_ms=600_000)
    answer = await app.client.say("hi")
    path = f"/chat/stream/{answer['conversationId']}"
    streams = [await RawStream(app.port, path).open() for _ in range(30)]
    await app.until(lambda: app.subscribers == 30)
    encoded: list[int] = []
    calls: list[str] = []
    token_frame = sse.token_frame

    def counted(message_id: str, chars: int, text: str) -> bytes:
        encoded.append(chars)
        return token_frame(message_id, chars, text)

    monkeypatch.setattr(sse, "token_frame", counted)
    app.store.guard.observe = lambda operation, _seconds, _ok: calls.append(operation)
    tasks, writes = len(asyncio.all_tasks()), app.hub.counts.writes
    for number in range(19):
        gate.release()
        for stream in streams:
            await stream.reader.readuntil(b"event: token")
        assert len(asyncio.all_tasks()) == tasks
        # With time to spare each token leaves at once: one write for each subscriber.
        assert app.hub.counts.writes - writes == 30 * (number + 1)
    assert len(encoded) == 19 and calls == []
    gate.release()
    for stream in streams:
        stream.close()


async def test_replies_that_run_are_checkpointed_by_one_write_a_tick(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await make_app(source=Script("x", gate=asyncio.Semaphore(0)), checkpoint_ms=50)
    await asyncio.gather(*(app.client.say("hi") for _ in range(50)))
    collection, sizes = type(app.store.conversations.collection), list[int]()
    bulk_write = collection.bulk_write

    async def counted(self: Any, writes: Any, **options: Any) -> Any:
        sizes.append(len(writes))
        return await bulk_write(self, writes, **options)

    monkeypatch.setattr(collection, "bulk_write", counted)
    await app.until(lambda: len(sizes) >= 3)
    assert set(sizes) == {50}


async def test_pending_tokens_leave_in_one_write(make_app: MakeApp) -> None:
    gate = asyncio.Semaphore(0)
    app = await make_app(source=Script("a", "b", "c", "d", gate=gate))
    answer = await app.client.say("hi")
    raw = await RawStream(app.port, f"/chat/stream/{answer['conversationId']}").open()
    await app.until(lambda: app.subscribers == 1)
    live = app.hub.conversations[0]
    (connection,) = live.subscribers
    # As if its last bytes were still in flight: the subscriber is skipped, and catches up once they are sent.
    connection.pause_writing()  # type: ignore[attr-defined]
    writes, events = app.hub.counts.writes, app.hub.counts.events
    for _ in range(3):
        gate.release()
    await app.until(lambda: live.reply is not None and live.reply.chars == 3)
    await asyncio.sleep(0)
    assert app.hub.counts.writes == writes
    connection.resume_writing()  # type: ignore[attr-defined]
    assert (app.hub.counts.writes - writes, app.hub.counts.events - events) == (1, 3)
    gate.release()
    raw.close()


async def test_client_that_stops_reading_is_disconnected_resumes_and_delays_no_other(make_app: MakeApp) -> None:
    app = await make_app(
        source=Script(*["some words " * 50] * 3000), slow_client_timeout_s=1.0, max_reply_chars=10_000_000
    )
    conversation_id = new_id()
    stalled = Stalled(app.port, f"/chat/stream/{conversation_id}")
    await app.until(lambda: app.subscribers == 1)
    # Kept here: the hub forgets the conversation as soon as the slow client is disconnected, too.
    (live,) = app.hub.conversations
    (slow,) = app.streams.connections
    reader = asyncio.create_task(app.client.events(conversation_id))
    await app.until(lambda: app.subscribers == 2)
    answer = await app.client.say("hi", conversation_id)
    events = await reader
    # The reading client has everything while the stalled one is stuck, and little is buffered for the latter.
    assert events[-1].name == "done" and not live.is_caught_up(slow)
    assert slow.buffered_bytes <= MAX_WRITE
    await app.until(lambda: len(app.streams) == 0)
    stalled.close()
    assert "chatserver_slow_clients_cut_total 1.0" in (await app.client.http.get("/metrics")).text
    history = await app.client.history(conversation_id)
    rest = await app.client.events(conversation_id, f"{answer['replyId']}-1000")
    assert text_of(rest) == history["messages"][-1]["content"][1000:]


async def test_each_write_ends_with_a_whole_frame(make_app: MakeApp) -> None:
    """The next write must begin a frame and a chunk, even if it is a `reset`."""
    gate = asyncio.Semaphore(0)
    source = Script(*["some words " * 80] * 400, "x" * 3 * MAX_WRITE, "end", gate=gate)
    app = await make_app(source=source, max_reply_chars=10_000_000)
    answer = await app.client.say("hi")
    raw = await RawStream(app.port, f"/chat/stream/{answer['conversationId']}").open()
    await app.until(lambda: app.subscribers == 1)
    (live,) = app.hub.conversations
    (connection,) = live.subscribers
    written: list[bytes] = []
    connection.write = written.append  # type: ignore[assignment, method-assign]
    connection.pause_writing()  # type: ignore[attr-defined]
    for _ in range(401):
        gate.release()
    await app.until(lambda: live.reply is not None and live.reply.size > 3 * MAX_WRITE + 400 * 800)
    connection.resume_writing()  # type: ignore[attr-defined]
    assert len(written) > 3 and all(
        re.fullmatch(rb"[0-9a-f]+\r\nevent: .*\n\n\r\n", each, re.DOTALL) for each in written
    )
    assert all(len(each) <= MAX_WRITE + 20 or each.count(b"\n\n") == 1 for each in written)
    raw.close()
    for _ in range(2):
        gate.release()


@pytest.mark.process
async def test_slow_client_that_reads_now_and_then_is_not_disconnected(make_app: MakeApp) -> None:
    app = await make_app(
        source=Script(*["some words " * 50] * 500), slow_client_timeout_s=2.0, max_reply_chars=10_000_000
    )
    answer = await app.client.say("hi")
    raw = await RawStream(
        app.port, f"/chat/stream/{answer['conversationId']}?lastEventId={answer['lastEventId']}"
    ).open()
    raw.writer.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await app.until(lambda: not app.replies.running)
    seen, loop = Transcript(), asyncio.get_running_loop()
    began = loop.time()
    count = 0
    async for event in raw.events():
        seen.take(event)
        count += 1
        if count % 100 == 0:
            await asyncio.sleep(1.2)
        if event.name == "done":
            break
    assert loop.time() - began > 4
    history = await app.client.history(answer["conversationId"])
    assert seen.said[answer["replyId"]] == history["messages"][-1]["content"]
    raw.close()


async def test_client_a_whole_turn_behind_is_disconnected_and_resumes(make_app: MakeApp) -> None:
    app = await make_app(
        source=Script(*["some words " * 50] * 2000), slow_client_timeout_s=60.0, max_reply_chars=10_000_000
    )
    conversation_id = new_id()
    stalled = Stalled(app.port, f"/chat/stream/{conversation_id}")
    await app.until(lambda: app.subscribers == 1)
    await app.client.turn("0", conversation_id)
    live = app.hub.conversations[0]
    turn = live.kept_bytes
    assert turn > 1_000_000
    await app.client.turn("1", conversation_id)
    (slow,) = app.streams.connections
    assert not slow.ready and slow.ending
    # The frames that it lacks are not kept for it.
    assert live.kept_bytes < 1.1 * turn
    stalled.close()
    await app.until_idle()


async def test_missed_messages_are_sent_page_by_page_as_the_client_reads(make_app: MakeApp) -> None:
    app = await make_app()
    conversation_id, time = new_id(), datetime.now(UTC)
    texts = [f"{number} " + "some words " * (20_000 if number % 20 == 1 else 1) for number in range(250)]
    messages = [
        {"_id": ObjectId(), "role": "assistant" if number % 2 else "user", "content": text, "createdAt": time}
        for number, text in enumerate(texts)
    ]
    app.database.conversations.insert_one(
        {"_id": ObjectId(conversation_id), "createdAt": time, "updatedAt": time, "messages": messages}
    )
    start = f"{conversation_id}-0"
    stalled = Stalled(app.port, f"/chat/stream/{conversation_id}?lastEventId={start}")
    reads: list[str] = []
    await app.until(lambda: len(app.streams) == 1)
    (slow,) = app.streams.connections
    await app.until(lambda: slow.paused)
    longest = max(map(len, texts))
    assert slow.backlog_bytes < PAGE_SIZE + 2 * longest

    # Time goes by: no keep-alive lands inside the frame at which the client has stopped.
    def untouched() -> bool:
        before = slow.progress
        slow.tick(0.0, 0.0, 3600.0)
        return slow.progress == before

    await app.until(untouched)
    assert slow.paused and untouched()
    app.store.guard.observe = lambda operation, _seconds, _ok: reads.append(operation)
    seen, last = Transcript(), str(messages[-1]["_id"])
    async for event in app.client.stream(conversation_id, start):
        seen.take(event)
        if last in seen.ended:
            break
    assert list(seen.said.values()) == texts and seen.order == [str(each["_id"]) for each in messages]
    assert reads.count("read") >= sum(map(len, texts)) / (PAGE_SIZE + longest)
    stalled.close()
    await app.until_idle()


async def test_vanished_client_is_disconnected_by_the_kernel(make_app: MakeApp) -> None:
    """Check only the socket's option: dropping packets needs privileges that a test does not have."""
    app = await make_app(slow_client_timeout_s=7.0)
    raw = await RawStream(app.port, f"/chat/stream/{new_id()}").open()
    await app.until(lambda: app.subscribers == 1)
    (connection,) = app.hub.conversations[0].subscribers
    accepted = connection.client_socket  # type: ignore[attr-defined]
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 12_000
    raw.close()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the kernel must be able to")
async def test_client_that_does_not_read_an_ordinary_answer_is_disconnected(
    make_server: Callable[..., Server], database: Database
) -> None:
    """It would hold the whole answer in memory for as long as it likes."""
    server = await asyncio.to_thread(make_server(SLOW_CLIENT_TIMEOUT_S=0.05).start)
    message = {"_id": ObjectId(), "role": "user", "content": "x" * 9_000_000, "createdAt": datetime.now(UTC)}
    conversation = {"_id": ObjectId(), "createdAt": datetime.now(UTC), "updatedAt": datetime.now(UTC)}
    database.conversations.insert_one({**conversation, "messages": [message]})
    stalled = [Stalled(server.port, f"/chat/{conversation['_id']}") for _ in range(3)]
    await asyncio.to_thread(until, lambda: connections(server) == 3)
    await asyncio.to_thread(until, lambda: connections(server) == 0, 30)
    for each in stalled:
        each.close()


@pytest.mark.parametrize(
    "sent",
    ["", "GET /chat HTTP/1.1\r\nHost: local", "POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"],
)
async def test_client_that_sends_its_request_too_slowly_is_disconnected(
    make_server: Callable[..., Server], sent: str
) -> None:
    server = await asyncio.to_thread(make_server(REQUEST_TIMEOUT_S=0.5).start)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(sent.encode())
    await asyncio.wait_for(reader.read(), 5)
    writer.close()


async def test_head_that_is_too_large_is_refused(make_server: Callable[..., Server]) -> None:
    """Up to four times the limit the client gets an answer; beyond, the head is not read to its end."""
    server = await asyncio.to_thread(
        make_server(MAX_HEADER_BYTES=2000, CORS_ORIGINS="https://chat.example", REQUEST_TIMEOUT_S=0.5).start
    )
    for size, words in ((1900, (b" 200 ",)), (2000, (b" 431 ", b"headers_too_large", b"-Origin: https:")), (9000, ())):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nOrigin: https://chat.example\r\nCookie: %b\r\n\r\n"
        writer.write(head % (b"x" * size))
        answer = await asyncio.wait_for(reader.read(), 5)
        assert all(word in answer for word in words) and bool(answer) == bool(words)
        writer.close()


def connections(server: Server) -> int:
    """Return how many connections to a server the kernel holds."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return sum(local.endswith(f":{server.port:04X}") and state == "01" for _, local, _, state, *_ in rows)


def peak_kib(server: Server) -> int:
    assert server.process is not None
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1])


@pytest.mark.alone
@pytest.mark.timeout(180)
@pytest.mark.gen_test(timeout=170)
async def test_stalled_client_costs_no_memory_while_fifty_megabytes_are_streamed(
    make_server: Callable[..., Server],
) -> None:
    """The same reply with and without a client that stops reading at its start."""

    async def peak(stalls: bool) -> int:
        server = await asyncio.to_thread(
            make_server(
                SIMULATED_TOKENS=750_000,
                MAX_REPLY_CHARS=10_000_000,
                SIMULATED_TOKEN_DELAY_MS=0,
                SLOW_CLIENT_TIMEOUT_S=300,
            ).start
        )
        conversation_id, received, tail = new_id(), 0, b""
        stalled = Stalled(server.port, f"/chat/stream/{conversation_id}") if stalls else None
        client = Client(server.url)
        async with client.http.stream("GET", f"/chat/stream/{conversation_id}") as stream:
            chunks = stream.aiter_bytes()
            await anext(chunks)
            await client.say("hi", conversation_id)
            while b"event: done" not in tail:
                chunk = await anext(chunks)
                received += len(chunk)
                tail = tail[-100:] + chunk
            assert received > 50_000_000
            # The stream is still open: it was neither aborted nor ended.
            metrics = (await client.http.get("/metrics")).text
            assert f"chatserver_open_streams {1 + stalls}.0" in metrics
        kib = peak_kib(server)
        await client.close()
        if stalled is not None:
            stalled.close()
        server.kill()
        return kib

    # A busy machine can make either run's peak a few MB higher; what grows for a stalled client grows each time.
    pairs: list[tuple[int, int]] = []
    while len(pairs) < 3 and not any(with_it - without < 8 * 1024 for without, with_it in pairs):
        pairs.append((await peak(stalls=False), await peak(stalls=True)))
    assert any(with_it - without < 8 * 1024 for without, with_it in pairs), pairs
