"""Conversations of up to 15 MB: the memory per client, and the time for which a request blocks the event loop."""

import asyncio
import asyncio.events
import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from tests.apps import App, Database, MakeApp, Script
from tests.clients import Transcript, text_of
from tests.http.test_delivery import Stalled, peak_kib
from tests.processes import Server

pytestmark = [pytest.mark.gen_test, pytest.mark.process, pytest.mark.alone]

TIME = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
MIXED = 'a"\\\n\u0001é中😀'
SHAPES: dict[str, Callable[[], list[str]]] = {
    "tiny": lambda: [f"{number}" for number in range(30_000)],
    "large": lambda: ["😀" * 31_000] * 118,
    "few": lambda: [MIXED * 150_000] * 6,
    "one": lambda: ["", "z" * 15_000_000],
}


def insert(database: Database, texts: list[str], **fields: Any) -> str:
    """Store a conversation in which users' messages and replies alternate; return its id."""
    messages = [
        {"_id": ObjectId(), "role": "assistant" if number % 2 else "user", "content": text, "createdAt": TIME}
        for number, text in enumerate(texts)
    ]
    conversation = {"_id": ObjectId(), "createdAt": TIME, "updatedAt": TIME, "messages": messages, **fields}
    database.conversations.insert_one(conversation)
    return str(conversation["_id"])


def fetch(app: App, method: str, path: str, body: str | None = None, end: bytes | None = None) -> tuple[Any, bytes]:
    """Return a response and its body, of a stream only the bytes up to `end`. It blocks: call it in a thread."""
    connection = HTTPConnection("127.0.0.1", app.port, timeout=50)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    received = bytearray()
    while data := response.read1(1 << 20):
        received += data
        if end is not None and end in received[-4096:]:
            break
    connection.close()
    return response, bytes(received)


@pytest.fixture
def holds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Return a list that gets the CPU time of each callback of the event loop, in seconds."""
    measured: list[float] = []
    run = asyncio.events.Handle._run

    def timed(handle: asyncio.events.Handle) -> None:
        before = time.thread_time()
        run(handle)
        measured.append(time.thread_time() - before)

    monkeypatch.setattr(asyncio.events.Handle, "_run", timed)
    # As in the server: the garbage collector skips the objects of earlier tests.
    gc.collect()
    gc.freeze()
    yield measured
    gc.unfreeze()


@pytest.mark.parametrize("shape", SHAPES)
async def test_no_request_holds_the_event_loop_however_long_the_conversation(
    make_app: MakeApp, holds: list[float], shape: str
) -> None:
    app = await make_app(checkpoint_ms=250)
    texts = SHAPES[shape]()
    conversation_id = await asyncio.to_thread(insert, app.database, texts)
    path, last = f"/chat/{conversation_id}", app.database.conversations.find_one()["messages"][-1]["_id"]
    position = f"{last}-14000000" if shape == "one" else f"{conversation_id}-0"
    body = json.dumps({"conversationId": conversation_id, "input": "hi"})
    await asyncio.sleep(0)
    holds.clear()

    response, answer = await asyncio.to_thread(fetch, app, "GET", path)
    _, newest = await asyncio.to_thread(fetch, app, "GET", f"{path}?limit=1000")
    stream = f"/chat/stream/{conversation_id}?lastEventId={position}"
    await asyncio.to_thread(fetch, app, "GET", stream, None, f'"messageId":"{last}"'.encode())
    await asyncio.to_thread(fetch, app, "POST", "/chat", body)
    await app.until(lambda: not app.replies.running)

    assert max(holds) < 0.05
    assert response.getheader("Transfer-Encoding") == "chunked"
    history = await asyncio.to_thread(json.loads, answer)
    assert [each["content"] for each in history["messages"]] == texts
    assert history["lastEventId"] == f"{last}-done"
    assert [each["content"] for each in json.loads(newest)["messages"]] == texts[-1000:]


@pytest.mark.parametrize(("conversations", "messages"), [(100, 1000), (1, 40_000)])
async def test_branches_do_not_hold_the_event_loop(
    make_app: MakeApp, holds: list[float], conversations: int, messages: int
) -> None:
    app = await make_app()
    head = {"_id": ObjectId(), "length": messages}
    for _ in range(conversations):
        conversation_id = await asyncio.to_thread(insert, app.database, ["x"] * messages, head=head)
    path, first = f"/chat/{conversation_id}", app.database.conversations.find_one()["messages"][0]["_id"]
    await asyncio.sleep(0)
    holds.clear()

    await asyncio.to_thread(fetch, app, "GET", "/chat?limit=100")
    await asyncio.to_thread(fetch, app, "GET", f"{path}?limit=50")
    await asyncio.to_thread(fetch, app, "PUT", f"{path}/head", json.dumps({"messageId": str(first)}))
    await asyncio.to_thread(fetch, app, "POST", f"{path}/retry")
    await app.until(lambda: not app.replies.running)

    assert max(holds) < 0.05


@pytest.mark.parametrize("shape", ["tiny", "large"])
async def test_clients_that_do_not_read_cost_little_memory(
    make_server: Callable[..., Server], database: Database, shape: str
) -> None:
    server = await asyncio.to_thread(make_server().start)
    conversation_id = await asyncio.to_thread(insert, database, SHAPES[shape]())
    paths = [f"/chat/{conversation_id}", f"/chat/stream/{conversation_id}?lastEventId={conversation_id}-0"]
    stalled = [Stalled(server.port, path) for path in paths]
    await asyncio.to_thread(until_level, server)
    before = peak_kib(server)

    stalled += [Stalled(server.port, path) for path in paths for _ in range(10)]
    await asyncio.to_thread(until_level, server)

    assert peak_kib(server) - before < 20 * 2048
    for each in stalled:
        each.close()


def cpu_s(server: Server) -> float:
    """Return the seconds of CPU that a server has used."""
    assert server.process is not None
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def until_level(server: Server) -> None:
    """Wait until the server uses no more CPU, because it has nothing more to deliver."""
    before = -1.0
    while (used := cpu_s(server)) != before:
        before = used
        time.sleep(0.5)


async def test_long_text_is_sent_in_parts_that_join(make_app: MakeApp) -> None:
    app = await make_app()
    texts = ["hi", "short", MIXED * 60_000, "x" * 300_000, "", MIXED * 100_000]
    error = {"code": "source_failed", "message": '", "createdAt": "content": "'}
    conversation_id = insert(app.database, texts)
    app.database.conversations.update_one({}, {"$set": {"messages.5.error": error, "messages.5.status": "failed"}})
    ids = [str(each["_id"]) for each in app.database.conversations.find_one()["messages"]]

    history = await app.client.history(conversation_id)
    assert [each["content"] for each in history["messages"]] == texts
    assert [each["id"] for each in history["messages"]] == ids
    assert history["messages"][5]["error"] == error and history["lastEventId"] == f"{ids[5]}-done"
    before = await app.client.history(conversation_id, before=ids[4], limit=2)
    assert [each["content"] for each in before["messages"]] == texts[2:4]
    assert before["hasMore"] is True and before["lastEventId"] == f"{ids[3]}-done"

    # A stream sends a user's message as one event, and a long reply as several.
    seen = Transcript()
    async for event in app.client.stream(conversation_id, f"{conversation_id}-0"):
        seen.take(event)
        if ids[5] in seen.ended:
            break
    assert list(seen.said.values()) == texts
    for chars in (1, 150_000, 299_999, 300_000):
        events = await app.client.events(conversation_id, f"{ids[3]}-{chars}")
        assert text_of(events) == texts[3][chars:] and events[-1].id == f"{ids[3]}-done"
    assert [event.name for event in await app.client.events(conversation_id, f"{ids[3]}-300001")] == ["reset"]
    assert [event.name for event in await app.client.events(conversation_id, f"{ids[5]}-999999")] == ["error"]


async def test_long_history_has_the_position_of_its_running_reply(make_app: MakeApp) -> None:
    gate = asyncio.Semaphore(0)
    app = await make_app(source=Script("😀" * 200_000, " and on", gate=gate))
    conversation_id = insert(app.database, ["x" * 100_000] * 20)
    answer = await app.client.say("hi", conversation_id)
    gate.release()
    await app.until(lambda: app.hub.counts.tokens == 1)
    # The reply continues while the client reads.
    stalled = app.client.http.stream("GET", f"/chat/{conversation_id}")
    async with stalled as response:
        gate.release()
        await app.client.events(conversation_id, answer["lastEventId"])
        history = json.loads(await response.aread())
    *stored, reply = history["messages"]
    assert len(stored) == 21 and history["status"] == reply["status"] == "streaming"
    assert reply["content"] == "😀" * 200_000 and history["lastEventId"] == f"{answer['replyId']}-200000"
    newest = await app.client.history(conversation_id, limit=2)
    assert [each["status"] for each in newest["messages"]] == ["complete", "complete"]


async def test_short_history_has_its_length_and_a_long_one_is_chunked(app: App) -> None:
    short, long = insert(app.database, ["hi", "there"]), insert(app.database, ["hi", "x" * 2_000_000])
    for conversation_id in (short, long):
        (whole, body), (head, nothing) = [
            await asyncio.to_thread(fetch, app, method, f"/chat/{conversation_id}") for method in ("GET", "HEAD")
        ]
        is_short = conversation_id == short
        assert (whole.getheader("Content-Length") == str(len(body))) is is_short
        assert head.getheader("Content-Length") == whole.getheader("Content-Length") and nothing == b""
        assert head.getheader("Content-Type") == whole.getheader("Content-Type") == "application/json"
        # With HTTP/1.0 the connection's end marks the end of a long body, even if the client asks to keep it alive.
        reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
        writer.write(f"GET /chat/{conversation_id} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".encode())
        old_head, old_body = await reader.readuntil(b"\r\n\r\n"), await reader.readexactly(len(body))
        assert old_body == body and (b"Connection: Keep-Alive" in old_head) is is_short
        if not is_short:
            assert b"chunked" not in old_head and await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("recreated", [False, True])
async def test_history_is_aborted_if_its_conversation_is_deleted(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, recreated: bool
) -> None:
    app = await make_app()
    conversation_id = insert(app.database, ["x" * 100_000] * 100)
    read, reads = app.store.read, 0

    async def read_and_delete(*arguments: Any, **options: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads == 3:
            app.database.conversations.delete_one({"_id": ObjectId(conversation_id)})
            if recreated:
                fields = {"_id": ObjectId(conversation_id), "createdAt": TIME + timedelta(seconds=1)}
                insert(app.database, ["y" * 100_000] * 100, **fields)
        return await read(*arguments, **options)

    monkeypatch.setattr(app.store, "read", read_and_delete)
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    writer.write(f"GET /chat/{conversation_id} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    received = await reader.read()

    assert received.startswith(b"HTTP/1.1 200") and not received.endswith(b"0\r\n\r\n") and b"yy" not in received
    writer.close()


async def test_client_that_stops_reading_a_history_is_disconnected(make_app: MakeApp, caplog: Any) -> None:
    app = await make_app(slow_client_timeout_s=0.3)
    conversation_id = insert(app.database, ["x" * 100_000] * 100)
    stalled = Stalled(app.port, f"/chat/{conversation_id}")
    with caplog.at_level("INFO", "chatserver"):
        await app.until(lambda: "slow client disconnected" in caplog.messages)
    stalled.close()


async def test_turn_keeps_no_more_of_a_long_conversation_than_its_source_uses(make_app: MakeApp) -> None:
    source = Script("done")
    app = await make_app(source=source, openai_history_chars=1000)
    conversation_id = insert(app.database, ["é" * 500, "😀" * 400, "x" * 200_000, "y" * 300, "z" * 300])
    await app.client.turn("hi", conversation_id)
    assert [each.content[0] for each in source.prompts[0].messages] == ["x", "y", "z", "h"]
