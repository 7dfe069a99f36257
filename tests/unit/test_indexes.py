"""The indexes: built in the background on a real MongoDB, without a time limit; a failed build is retried."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest

from chatserver.errors import SetupError
from chatserver.store import Store, connect, indexes
from tests.apps import Database
from tests.processes import Server, until

ALL = {"_id_", "reply._id_1", "owner_1_updatedAt_-1__id_-1", "owner_1__id_1"}
FORMER = {"createdAt_-1__id_-1", "updatedAt_-1__id_-1"}


@contextmanager
def failing(database: Database, name: str, mode: Any = "alwaysOn", **data: Any) -> Iterator[None]:
    """Make MongoDB fail inside the block, by one of its fail points."""
    admin = database.db.client.admin
    admin.command("configureFailPoint", name, mode=mode, data=data)
    try:
        yield
    finally:
        admin.command("configureFailPoint", name, mode="off")


def fill(database: Database) -> None:
    """Store conversations and the list's indexes as earlier versions left them."""
    database.conversations.insert_many([{"messages": [], "createdAt": None} for _ in range(10)])
    for field in ("createdAt", "updatedAt"):
        database.conversations.create_index([(field, -1), ("_id", -1)])


def built(database: Database) -> set[str]:
    return set(database.conversations.index_information())


def test_server_serves_and_stops_while_an_index_build_exceeds_the_timeout_of_calls(
    faulty_database: Database, make_server: Callable[..., Server]
) -> None:
    fill(faulty_database)
    server = make_server(MONGODB_URI=faulty_database.uri, DATABASE_TIMEOUT_S=1)
    with failing(faulty_database, "hangAfterStartingIndexBuild"):
        server.start()
        started = time.monotonic()
        until(lambda: "building the index reply._id_1" in server.output)
        response = httpx.post(f"{server.url}/chat", json={"input": "Hello"}, trust_env=False)
        assert response.status_code == 202
        until(lambda: len(httpx.get(f"{server.url}/chat", trust_env=False).json()["conversations"]) == 11)
        until(lambda: time.monotonic() > started + 1.2)
        assert built(faulty_database) > FORMER and "built the index" not in server.output
        assert server.stop() == 0
        assert time.monotonic() < started + 6

        server.start()
        until(lambda: "building the index owner" not in server.output)
    until(lambda: all(f"dropped the index {name}" in server.output for name in FORMER))
    assert built(faulty_database) == ALL
    assert "built the index owner_1_updatedAt_-1__id_-1 in " in server.output
    assert "WARNING" not in server.output


@pytest.mark.gen_test
@pytest.mark.expects_log("the indexes could not be built \\(code 11601\\); next try in 0.01 s")
async def test_failed_build_is_logged_and_retried(
    faulty_database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(faulty_database)
    monkeypatch.setattr(indexes, "_FIRST_WAIT_S", 0.01)
    caplog.set_level(logging.INFO)
    faults = {"failCommands": ["createIndexes"], "errorCode": 11601, "appName": "chatserver indexes"}
    with failing(faulty_database, "failCommand", {"times": 1}, **faults):
        await indexes.build(faulty_database.uri, "unused")
    assert built(faulty_database) == ALL
    assert [each.levelname for each in caplog.records].count("WARNING") == 1


@pytest.mark.gen_test
@pytest.mark.expects_log("the index reply._id_1 exists with other options; it is kept")
async def test_index_of_another_application_is_kept(database: Database) -> None:
    database.conversations.create_index("reply._id", name="reply._id_1")
    await indexes.build(database.uri, "unused")
    assert built(database) == ALL


@pytest.mark.gen_test
@pytest.mark.parametrize("after_ms", [0, 1, 3, 10])
async def test_cancelled_build_returns_at_once(faulty_database: Database, after_ms: int) -> None:
    fill(faulty_database)
    with failing(faulty_database, "hangAfterStartingIndexBuild"):
        building = asyncio.create_task(indexes.build(faulty_database.uri, "unused"))
        await asyncio.sleep(after_ms / 1000)
        building.cancel()
        await asyncio.wait({building}, timeout=3)
        assert building.cancelled()


@pytest.mark.gen_test
async def test_cancellation_that_the_driver_loses_is_repeated(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []

    async def lose_the_first(_: Any) -> None:
        with suppress(asyncio.CancelledError):
            waits.append("first")
            await asyncio.sleep(60)
        waits.append("second")
        await asyncio.sleep(60)

    monkeypatch.setattr(indexes, "_build", lose_the_first)
    building = asyncio.create_task(indexes.build(database.uri, "unused"))
    while not waits:
        await asyncio.sleep(0.001)
    building.cancel()
    await asyncio.wait({building}, timeout=3)
    assert building.cancelled() and waits == ["first", "second"]


@pytest.mark.gen_test
@pytest.mark.expects_log("the database rejected a call \\(prepare\\): code 13 Unauthorized")
async def test_missing_permission_is_a_setup_error(locked: str) -> None:
    store = Store(connect(locked, 4.0), locked, timeout_s=4.0, lease_ms=1000, history=1)
    try:
        with pytest.raises(
            SetupError, match=r"MongoDB refused the connection \(MONGODB_URI\): not authorized on chat-db"
        ):
            await store.prepare()
    finally:
        await store.close()
