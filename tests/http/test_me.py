"""The caller's name, and the deletion of all conversations of one owner."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest
from bson import ObjectId

from chatserver.errors import DatabaseUnavailable
from chatserver.handlers.openapi import make_openapi
from chatserver.records import Key
from tests.apps import App, Database, MakeApp
from tests.clients import Client, new_id
from tests.http.conftest import ClientOf, insert
from tests.http.test_http import assert_problem
from tests.http.test_openapi import check
from tests.http.turns import gated, release
from tests.users import USERS, token

pytestmark = pytest.mark.gen_test


def count(database: Database, owner: str | None) -> int:
    found: int = database.conversations.count_documents({"owner": owner or {"$exists": False}})
    return found


async def watch(app: App, client: Client, conversation_id: str) -> "asyncio.Task[list[str]]":
    """Open a stream; return a task that returns its events until the server ends it."""
    subscribers = app.subscribers

    async def names() -> list[str]:
        return [event.name async for event in client.stream(conversation_id)]

    task = asyncio.create_task(names())
    await app.until(lambda: app.subscribers > subscribers)
    return task


# -- who the caller is ---------------------------------------------------------------------------------------------


async def test_me_is_unknown_on_a_server_without_users(app: App) -> None:
    insert(app.database, None, 3)

    for method in ("GET", "DELETE"):
        response = await app.client.http.request(method, "/me")
        assert_problem(response, 404, "not_found")
        assert response.json()["detail"] == "This server has no users; see AUTH."
    assert (await app.client.http.head("/me")).status_code == 404
    assert count(app.database, None) == 3


async def test_me_names_the_caller(make_app: MakeApp, client_of: ClientOf) -> None:
    app = await make_app(**USERS, auth_logout_url="/logout", auth_leeway_s=0.25)
    expires_at = datetime(2100, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()
    forever = {"Authorization": f"Bearer {token('zoë', exp=int(expires_at))}"}

    response = await app.client.http.get("/me", headers=forever)

    assert response.status_code == 200 and response.headers["Cache-Control"] == "no-store"
    check(make_openapi(app.settings), "Me", response.json())
    assert response.json() == {"owner": "zoë", "expiresAt": "2100-01-02T03:04:05.250Z", "logoutUrl": "/logout"}


async def test_time_and_address_that_the_server_does_not_know_are_left_out(make_app: MakeApp) -> None:
    app = await make_app(auth="proxy", trusted_proxies=("127.0.0.1",))

    response = await app.client.http.get("/me", headers={"X-Forwarded-User": "alice"})

    check(make_openapi(app.settings), "Me", response.json())
    assert response.json() == {"owner": "alice"}


@pytest.mark.parametrize("login_url", [None, "https://login.example.com/"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_unauthenticated_caller_learns_where_to_sign_in(
    make_app: MakeApp, login_url: str | None, method: str
) -> None:
    app = await make_app(**USERS, auth_login_url=login_url)
    me, chats = (await app.client.http.request(method, "/me")), (await app.client.http.get("/chat"))

    check(make_openapi(app.settings), "Problem", me.json())
    assert (me.status_code, me.json()["code"]) == (401, "unauthenticated")
    assert me.json().get("loginUrl") == login_url
    assert "loginUrl" not in chats.json()


# -- deleting everything ---------------------------------------------------------------------------------------------


async def test_deletion_ends_replies_and_streams_on_two_servers_and_spares_other_owners(
    make_app: MakeApp, client_of: ClientOf
) -> None:
    app, other = [await make_app(**USERS, source=gated("a")) for _ in range(2)]
    alice, alice_there, bob = client_of(app, "alice"), client_of(other, "alice"), client_of(app, "bob")
    insert(app.database, "alice", 250)
    idle = insert(app.database, "alice", 1)[0]
    insert(app.database, "bob", 20)
    insert(app.database, None, 20)
    here, there, bobs = await alice.say("Hi"), await alice_there.say("Hi"), await bob.say("Hi")
    waiting = new_id()
    streams = [
        await watch(*each)
        for each in (
            (app, alice, here["conversationId"]),
            (app, alice, there["conversationId"]),
            (app, alice, idle),
            (other, alice_there, there["conversationId"]),
            (app, alice, waiting),
            (app, bob, bobs["conversationId"]),
        )
    ]

    assert (await alice.http.delete("/me")).status_code == 204

    assert count(app.database, "alice") == 0
    assert (count(app.database, "bob"), count(app.database, None)) == (21, 20)
    for stream in streams[:2]:
        assert (await stream)[-1] == "reset"
    assert await streams[2] == ["reset"]
    # The other server finds out at its next checkpoint; its clients resume, and get a reset then.
    await other.until(lambda: not other.replies.running)
    await streams[3]
    position = there["lastEventId"]
    assert [event.name async for event in alice_there.stream(there["conversationId"], position)] == ["reset"]

    # The stream that waits for a first message stays, and so do other owners' replies.
    assert not streams[4].done() and not streams[5].done()
    release(app.source, 10)
    await app.until(lambda: not app.replies.running)
    assert (await bob.history(bobs["conversationId"]))["messages"][-1]["status"] == "complete"
    assert (await alice.http.get("/chat")).json() == {"conversations": []}
    assert (await alice.http.delete("/me")).status_code == 204
    await app.end_streams()
    await asyncio.gather(*streams)


async def test_page_of_another_site_deletes_nothing_by_a_cookie(make_app: MakeApp) -> None:
    app = await make_app(**USERS, auth_cookie="token")
    insert(app.database, "alice", 3)
    headers = {"Cookie": f"token={token('alice')}", "Origin": "https://evil.example"}

    assert_problem(await app.client.http.delete("/me", headers=headers), 403, "cross_site")
    assert count(app.database, "alice") == 3
    del headers["Origin"]
    assert (await app.client.http.delete("/me", headers=headers)).status_code == 204


async def test_replies_of_this_server_end_at_once(make_app: MakeApp, client_of: ClientOf) -> None:
    app = await make_app(**USERS, source=gated("a"), checkpoint_ms=60_000, lease_ms=600_000)
    alice = client_of(app, "alice")
    for _ in range(3):
        await alice.say("Hello")

    assert (await alice.http.delete("/me")).status_code == 204

    await app.until_idle()
    assert app.database.conversations.count_documents({}) == 0


@pytest.mark.process
async def test_ten_thousand_conversations_are_deleted_in_bounded_calls(users_app: App, client_of: ClientOf) -> None:
    insert(users_app.database, "alice", 10_000)

    response = await client_of(users_app, "alice").http.delete("/me")

    assert response.status_code == 204 and count(users_app.database, "alice") == 0
    line = 'chatserver_store_operation_duration_seconds_count{operation="delete_all"} '
    calls = users_app.metrics.render().decode().partition(line)[2].partition("\n")[0]
    assert float(calls) == 101


async def test_repeated_deletion_after_a_lost_answer_resets_the_streams(
    users_app: App, client_of: ClientOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice = client_of(users_app, "alice")
    answer, _ = await alice.turn("Hello")
    stream = await watch(users_app, alice, answer["conversationId"])
    delete_all = users_app.store.delete_all

    async def silent(owner: str, conversations: Sequence[Key]) -> None:
        await delete_all(owner, conversations)
        raise DatabaseUnavailable

    monkeypatch.setattr(users_app.store, "delete_all", silent)
    assert_problem(await alice.http.delete("/me"), 503, "database_unavailable")
    monkeypatch.setattr(users_app.store, "delete_all", delete_all)
    assert (await alice.http.delete("/me")).status_code == 204

    assert await stream == ["reset"]


async def test_turns_that_start_during_the_deletion_hang_nowhere(
    make_app: MakeApp, client_of: ClientOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await make_app(**USERS, source=gated("a"))
    alice = client_of(app, "alice")
    idle = insert(app.database, "alice", 3)
    delete_all, answers = app.store.delete_all, []

    async def with_posts(owner: str, conversations: Sequence[Key]) -> None:
        if conversations:
            answers.append(await alice.say("before", idle[0]))
        await delete_all(owner, conversations)
        answers.append(await alice.say("after", idle[1]) if conversations else await alice.say("new"))

    monkeypatch.setattr(app.store, "delete_all", with_posts)
    assert (await alice.http.delete("/me")).status_code == 204
    monkeypatch.undo()
    release(app.source, 10)
    await app.until_idle()

    left = {each["_id"] for each in app.database.conversations.find({"owner": "alice"})}
    assert left == {ObjectId(idle[1])} and len(answers) == 3
    assert all("reply" not in each for each in app.database.conversations.find())
