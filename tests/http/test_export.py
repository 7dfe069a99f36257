"""The export: all conversations of one owner as lines of JSON, in flat memory, while conversations change."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import pytest
from bson import ObjectId

import chatserver.handlers.base
from chatserver.errors import NoSuchConversation
from chatserver.reading import History, Part
from chatserver.records import Key
from tests.apps import App, Database, MakeApp
from tests.clients import RawStream, new_id
from tests.http.conftest import TIME, ClientOf, insert
from tests.http.test_delivery import Stalled, peak_kib
from tests.http.test_http import assert_problem
from tests.http.test_long_conversations import until_level
from tests.http.turns import gated
from tests.processes import Server
from tests.users import USERS, bearer

pytestmark = pytest.mark.gen_test


def insert_long(database: Database, owner: str | None, messages: int) -> str:
    """Store a conversation of messages of 100,000 characters; return its id."""
    (conversation_id,) = insert(database, owner, 1)
    message = {"role": "user", "content": "x" * 100_000, "createdAt": TIME}
    update = {"$push": {"messages": {"$each": [{"_id": ObjectId(), **message} for _ in range(messages)]}}}
    database.conversations.update_one({"_id": ObjectId(conversation_id)}, update)
    return conversation_id


def ids_of(lines: str) -> list[str]:
    return [json.loads(line)["conversationId"] for line in lines.splitlines()]


async def test_line_is_the_history_of_a_conversation(make_app: MakeApp, client_of: ClientOf) -> None:
    app = await make_app(**USERS, source=gated("The", " end", said=1))
    alice = client_of(app, "alice")
    insert(app.database, "alice", 4, "one\ntwo\u2028\u0085three")
    insert_long(app.database, "alice", 3)
    await alice.say("running")
    await app.until(lambda: all(live.reply and live.reply.chars for live in app.hub.conversations))
    insert(app.database, "bob", 5)
    insert(app.database, None, 5)

    response = await alice.http.get("/chat/export")

    assert response.status_code == 200
    assert response.headers["Content-Type"] == "application/x-ndjson"
    assert response.headers["Cache-Control"] == "no-store"
    head = await alice.http.head("/chat/export")
    assert (head.status_code, head.content) == (200, b"")
    lines = response.content.decode().split("\n")
    assert lines.pop() == "" and len(lines) == 6
    for line in lines:
        assert f"{line}\n" == (await alice.http.get(f"/chat/{json.loads(line)['conversationId']}?branches=all")).text


async def test_server_without_users_exports_conversations_without_an_owner(app: App) -> None:
    ids = insert(app.database, None, 250)
    insert(app.database, "alice", 5)

    assert ids_of((await app.client.http.get("/chat/export")).text) == sorted(ids)


async def test_export_of_nothing_is_empty(users_app: App, client_of: ClientOf) -> None:
    response = await client_of(users_app, "alice").http.get("/chat/export")

    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["Content-Type"] == "application/x-ndjson"


async def test_each_conversation_comes_once_while_others_begin_continue_and_end(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = sorted(insert(app.database, None, 250))
    history, read, deleted = app.reading.history, 0, {ids[100], ids[200]}

    async def with_changes(conversation: Key, *, all_branches: bool) -> History:
        nonlocal read
        read += 1
        if read == 50:
            for each in (ids[0], ids[150], ids[249]):
                await app.client.turn("moves up", each)
            for each in deleted:
                await app.client.http.delete(f"/chat/{each}")
            for first in "09f":
                await app.client.turn("new", f"{first}{new_id()[1:]}")
        return await history(conversation, all_branches=all_branches)

    monkeypatch.setattr(app.reading, "history", with_changes)
    exported = ids_of((await app.client.http.get("/chat/export")).text)

    assert len(exported) == len(set(exported))
    assert set(ids) - set(exported) == deleted
    assert app.database.conversations.count_documents({}) == 251


@pytest.mark.parametrize("path", ["/chat/export", "/chat/{}"])
async def test_long_answer_is_aborted_when_the_token_expires(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    app = await make_app(**USERS)
    conversation_id = insert_long(app.database, "alice", 150)
    headers = f"Authorization: {bearer('alice')['Authorization']}\r\n"
    raw = await RawStream(app.port, path.format(conversation_id), headers=headers).open()
    received = len(await raw.reader.read(1000))
    now = time.time
    monkeypatch.setattr(chatserver.handlers.base, "time", lambda: now() + 3600)
    while data := await raw.reader.read(1 << 20):
        received += len(data)

    assert not raw.reader.ended and received < 15_000_000
    raw.close()


async def test_deletion_in_the_middle_of_a_line_aborts_the_connection(app: App) -> None:
    conversation_id = insert_long(app.database, None, 150)
    raw = await RawStream(app.port, "/chat/export").open()
    received = len(await raw.reader.read(1000))
    app.database.conversations.delete_one({"_id": ObjectId(conversation_id)})
    with suppress(asyncio.IncompleteReadError):
        while data := await raw.reader.read(1 << 20):
            received += len(data)

    assert not raw.reader.ended and received < 15_000_000
    raw.close()


async def test_deletion_in_the_middle_of_a_short_line_is_answered_503(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert(app.database, None, 1)
    export = app.reading.export

    async def first(parts: AsyncIterator[Part]) -> AsyncIterator[Part]:
        yield await anext(parts)
        raise NoSuchConversation

    async def deleted_meanwhile(owner: str | None) -> AsyncIterator[tuple[Key, History]]:
        async for key, history in export(owner):
            yield key, replace(history, parts=first(history.parts))

    monkeypatch.setattr(app.reading, "export", deleted_meanwhile)
    response = await app.client.http.get("/chat/export")

    assert_problem(response, 503, "database_unavailable")
    assert response.json()["detail"] == "A conversation was deleted while it was being exported. Try again."


@pytest.mark.process
@pytest.mark.alone
async def test_memory_does_not_grow_with_the_export(make_server: Callable[..., Server], database: Database) -> None:
    server = await asyncio.to_thread(make_server().start)

    async def export() -> Sequence[str]:
        raw = await RawStream(server.port, "/chat/export").open()
        ids = []
        while line := await raw.reader.readline():
            ids.append(json.loads(line)["conversationId"])
        assert raw.reader.ended
        raw.close()
        return ids

    insert(database, None, 200)
    insert_long(database, None, 100)
    await export()
    before = peak_kib(server)
    insert(database, None, 2000)
    for _ in range(10):
        insert_long(database, None, 100)
    exported = await export()

    assert exported == sorted(exported) and len(exported) == 2211
    assert peak_kib(server) - before < 4096


@pytest.mark.process
@pytest.mark.alone
async def test_clients_that_do_not_read_cost_one_page_each(
    make_server: Callable[..., Server], database: Database
) -> None:
    server = await asyncio.to_thread(make_server().start)
    for _ in range(5):
        insert_long(database, None, 100)
    stalled = [Stalled(server.port, "/chat/export")]
    await asyncio.to_thread(until_level, server)
    before = peak_kib(server)

    stalled += [Stalled(server.port, "/chat/export") for _ in range(10)]
    await asyncio.to_thread(until_level, server)

    assert peak_kib(server) - before < 10 * 2048
    for each in stalled:
        each.close()
