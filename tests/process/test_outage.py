"""A real MongoDB at a fixed address that is frozen, killed, or disconnected in the middle of writes."""

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pymongo
import pytest

from chatserver.replies.writer import Stage
from tests.apps import App, Database, running
from tests.clients import new_id, text_of
from tests.processes import MongoServer, Server, steady_port, until
from tests.proxy import CuttingProxy

pytestmark = [
    pytest.mark.soak,
    pytest.mark.gen_test(timeout=100),
    pytest.mark.expects_log("database does not answer"),
    pytest.mark.expects_log("the indexes could not be built"),
]


@pytest.fixture
def mongod(tmp_path: Path) -> Iterator[MongoServer]:
    mongod = MongoServer(tmp_path / "db", port=steady_port())
    asyncio.run(mongod.start())
    yield mongod
    mongod.signal(signal.SIGCONT)
    mongod.remove()


def database(mongod: MongoServer, uri: str | None = None) -> Database:
    client = pymongo.MongoClient[dict[str, Any]](mongod.uri, tz_aware=True, connect=False)
    return Database(uri or mongod.database_uri("chaos"), client["chaos"])


def breaks(mongod: MongoServer, how: str) -> None:
    if how == "frozen":
        mongod.signal(signal.SIGSTOP)
    elif how == "killed":
        mongod.kill()
    else:
        mongod.signal(signal.SIGTERM)


async def mends(mongod: MongoServer, how: str) -> None:
    if how == "frozen":
        mongod.signal(signal.SIGCONT)
    else:
        mongod.kill()
        await mongod.start()


@pytest.mark.parametrize("how", ["frozen", "killed", "stopped"])
async def test_new_turns_are_refused_in_time_and_running_ones_continue(mongod: MongoServer, how: str) -> None:
    db = database(mongod)
    async with running(App(db, simulated_token_delay_ms=5, lease_ms=1000, checkpoint_ms=100)) as app:
        answer = await app.client.say("before")
        watcher = asyncio.create_task(app.client.events(answer["conversationId"], answer["lastEventId"]))
        await app.until(lambda: app.subscribers == 1)
        breaks(mongod, how)
        loop = asyncio.get_running_loop()

        async def post(number: int) -> float:
            began = loop.time()
            response = await app.client.post(f"number {number}", None, f"key-{number}")
            assert response.status_code == 503, response.text
            assert response.json()["code"] == "database_unavailable" and int(response.headers["Retry-After"]) > 0
            return loop.time() - began

        assert max(await asyncio.gather(*(post(number) for number in range(100)))) < 5
        assert (await app.client.http.get("/healthz")).status_code == 200
        assert (await app.client.http.get("/readyz")).status_code == 503
        writer = app.replies.writer(answer["replyId"])
        assert writer is not None
        # The text is complete and waits to be stored: no `done` yet.
        await app.until(lambda: writer.stage is Stage.STORING)
        assert not watcher.done() and writer.live.reply is writer.reply
        await mends(mongod, how)
        events = await watcher
        assert events[-1].name == "done"
        stored = (await app.client.history(answer["conversationId"]))["messages"]
        assert text_of(events) == stored[-1]["content"] and stored[-1]["status"] == "complete"

        # Without a restart everything works again; each key is stored once, whether its first post got through or not.
        async def again(number: int) -> dict[str, str]:
            async with asyncio.timeout(30):
                while (response := await app.client.post(f"number {number}", None, f"key-{number}")).status_code != 202:
                    assert response.status_code == 503, response.text
                    await asyncio.sleep(0.2)
            return dict(response.json())

        answers = await asyncio.gather(*(again(number) for number in range(100)))
        assert await asyncio.gather(*(again(number) for number in range(100))) == answers
        await app.until(lambda: not app.replies.running and not app.replies.starting, 60)
        assert db.conversations.count_documents({}) == 101
        for document in db.conversations.find():
            assert [message["role"] for message in document["messages"]] == ["user", "assistant"]
            assert "status" not in document["messages"][1] and "reply" not in document
    db.db.client.close()


async def test_disconnects_from_the_database_during_writes_lose_and_double_nothing(mongod: MongoServer) -> None:
    async with CuttingProxy() as proxy:
        port = await proxy.start(int(mongod.host.partition(":")[2]))
        db = database(mongod, f"mongodb://127.0.0.1:{port}/chaos?directConnection=true")
        async with running(App(db, simulated_token_delay_ms=1, checkpoint_ms=30, lease_ms=60_000)) as app:
            cutting = asyncio.create_task(cut_now_and_then(proxy))

            async def talk(conversation_id: str) -> None:
                for number in range(4):
                    async with asyncio.timeout(60):
                        while True:
                            response = await app.client.post(f"number {number}", conversation_id, f"key-{number}")
                            if response.status_code == 202:
                                break
                            assert response.status_code in (503, 409), response.text
                            await asyncio.sleep(0.05)
                    answer = response.json()
                    events = await app.client.events(conversation_id, answer["lastEventId"])
                    assert events[-1].name == "done"
                    texts[answer["replyId"]] = text_of(events)

            texts: dict[str, str] = {}
            ids = [new_id() for _ in range(10)]
            await asyncio.gather(*(talk(each) for each in ids))
            cutting.cancel()
            await asyncio.gather(cutting, return_exceptions=True)
            assert proxy.cuts > 10
            assert db.conversations.count_documents({}) == len(ids)
            for document in db.conversations.find():
                users, replies = document["messages"][::2], document["messages"][1::2]
                assert [each["content"] for each in users] == [f"number {number}" for number in range(4)]
                assert {str(each["_id"]): each["content"] for each in replies}.items() <= texts.items()
        db.db.client.close()


async def cut_now_and_then(proxy: CuttingProxy) -> None:
    while True:
        await asyncio.sleep(0.05)
        proxy.cut()


def test_request_on_its_way_is_answered_before_the_server_ends(
    mongod: MongoServer, make_server: Callable[..., Server]
) -> None:
    server = make_server(MONGODB_URI=mongod.database_uri("chaos")).start()
    breaks(mongod, "frozen")
    with socket.create_connection(("127.0.0.1", server.port)) as line:
        line.sendall(b"GET /chat HTTP/1.0\r\n\r\n")
        assert httpx.get(f"{server.url}/healthz", trust_env=False).is_success
        server.signal(signal.SIGTERM)
        until(lambda: "shutting down" in server.output)
        asyncio.run(mends(mongod, "frozen"))
        with line.makefile() as answer:
            assert answer.read().endswith('{"conversations": []}\n')
    assert server.wait() == 0
