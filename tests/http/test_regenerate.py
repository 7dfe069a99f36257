"""Regenerating: another version of a reply, once for each idempotency key."""

import asyncio
from typing import Any

import pytest
from bson import ObjectId

from chatserver.errors import OutcomeUnknown, SourceError
from chatserver.records import StartedTurn
from tests.apps import App, MakeApp, Script
from tests.clients import new_id
from tests.http.branching import (
    ask_retry,
    everything,
    gated_tree,
    lost_retry,
    path,
    post,
    retry,
    say,
    tree,
)
from tests.http.conftest import TIME
from tests.http.test_http import assert_problem
from tests.http.turns import document, gated, insert_conversation, release

pytestmark = pytest.mark.gen_test


async def ended(app: App) -> None:
    await app.until(lambda: not app.replies.running)


@pytest.mark.parametrize("status", ["complete", "failed", "stopped", "interrupted"])
async def test_reply_of_any_status_is_regenerated_and_keeps_it(make_app: MakeApp, status: str) -> None:
    ends: dict[str, tuple[Any, ...]] = {"failed": (SourceError("source_failed", "no"),), "complete": ()}
    source = Script("text", *ends.get(status, ("never",)), gate=asyncio.Semaphore(1 if status not in ends else 9))
    app = await make_app(source=source)
    first = await app.client.say("Hello")
    conversation_id = first["conversationId"]
    if status == "stopped":
        await app.client.http.post(f"/chat/{conversation_id}/stop")
    elif status == "interrupted":
        await app.replies.drain()
        app = await make_app(source=source)
    await ended(app)
    source.pieces, source.gate = ("again",), None

    second = await retry(app, conversation_id)

    assert second["conversationId"] == conversation_id and second["status"] == "streaming"
    assert second["messageId"] == first["messageId"] and second["lastEventId"] == f"{second['replyId']}-0"
    question, before, after = document(app, conversation_id)["messages"]
    assert before.get("status", "complete") == status and "parent" not in before
    assert (after["parent"], after["content"], after.get("status")) == (question["_id"], "again", None)
    assert await path(app, conversation_id) == [first["messageId"], second["replyId"]]


async def test_retry_without_a_body_regenerates_the_last_reply_of_the_path(app: App) -> None:
    conversation_id, ids = await tree(app)

    response = await app.client.http.post(f"/chat/{conversation_id}/retry")

    assert response.status_code == 202 and response.json()["messageId"] == ids["q5"]
    await ended(app)
    assert (await path(app, conversation_id))[-2:] == [ids["q5"], response.json()["replyId"]]


@pytest.mark.parametrize("reply", ["a1", "a2", "a2'", "a3", "a4", "a5"])
async def test_retry_of_any_reply_shows_the_new_one(app: App, reply: str) -> None:
    conversation_id, ids = await tree(app)
    parents = {each["id"]: each["parentId"] for each in (await everything(app, conversation_id))["messages"]}
    question = parents[ids[reply]]

    answer = await retry(app, conversation_id, ids[reply].upper())

    assert answer["messageId"] == question
    history = await app.client.history(conversation_id)
    assert [each["id"] for each in history["messages"]][-2:] == [question, answer["replyId"]]
    older = [each for each, parent in parents.items() if parent == question]
    assert history["messages"][-1]["siblings"] == [*older, answer["replyId"]]


async def test_default_is_the_last_reply_even_if_a_users_message_follows(app: App) -> None:
    conversation_id = new_id()
    first = await say(app, conversation_id, "Hello")
    foreign = {"_id": ObjectId(), "role": "user", "content": "from Mongoose", "createdAt": TIME}
    app.database.conversations.update_one({"_id": ObjectId(conversation_id)}, {"$push": {"messages": foreign}})

    answer = await retry(app, conversation_id)

    assert answer["messageId"] == first["messageId"]
    assert await path(app, conversation_id) == [first["messageId"], answer["replyId"]]


async def test_retry_of_a_users_message_is_refused(app: App) -> None:
    conversation_id, ids = await tree(app)
    before = document(app, conversation_id)

    for message in ("q1", "q2", "q5"):
        assert_problem(await ask_retry(app, conversation_id, ids[message]), 409, "not_a_reply")

    assert document(app, conversation_id) == before


async def test_retry_of_what_is_not_there_is_refused(app: App) -> None:
    conversation_id, ids = await tree(app)
    other = await say(app, new_id(), "Hello")
    before = document(app, conversation_id)

    for message_id in (new_id(), other["replyId"], conversation_id):
        assert_problem(await ask_retry(app, conversation_id, message_id), 404, "not_found")
        assert_problem(await ask_retry(app, conversation_id, message_id, "key"), 404, "not_found")
    assert_problem(await ask_retry(app, new_id()), 404, "not_found")
    assert_problem(await ask_retry(app, new_id(), ids["a1"], "key"), 404, "not_found")
    assert document(app, conversation_id) == before


@pytest.mark.parametrize("roles", [[], ["user"], ["assistant"], ["user", "assistant", "assistant"], ["system"]])
async def test_nothing_to_retry(app: App, roles: list[str]) -> None:
    messages = [{"_id": ObjectId(), "role": each, "content": "x", "createdAt": TIME} for each in roles]
    conversation_id = insert_conversation(app, messages=messages)
    before = document(app, conversation_id)

    assert_problem(await ask_retry(app, conversation_id), 409, "nothing_to_retry")

    assert document(app, conversation_id) == before


async def test_reply_after_a_message_of_another_role_is_regenerated(app: App) -> None:
    roles = ["user", "tool", "assistant"]
    messages = [{"_id": ObjectId(), "role": each, "content": "x", "createdAt": TIME} for each in roles]
    conversation_id = insert_conversation(app, messages=messages)

    answer = await retry(app, conversation_id)

    question, tool, _ = (str(each["_id"]) for each in messages)
    assert answer["messageId"] == question
    assert await path(app, conversation_id) == [question, tool, answer["replyId"]]


async def test_retry_while_a_reply_runs_is_refused(make_app: MakeApp) -> None:
    source = gated("text")
    app = await make_app(source=source)
    first = await app.client.say("Hello")

    for message_id in (None, first["replyId"]):
        assert_problem(await ask_retry(app, first["conversationId"], message_id), 409, "reply_in_progress")
        assert_problem(await ask_retry(app, first["conversationId"], message_id, "key"), 409, "reply_in_progress")
    release(source)
    await app.until_idle()


@pytest.mark.parametrize("body", [{"messageId": None}, {"messageId": "x"}, {"messageId": 1}, {"x": 1}, [], "x"])
async def test_retry_with_another_body_is_refused(app: App, body: object) -> None:
    conversation_id, _ = await tree(app)

    response = await app.client.http.post(f"/chat/{conversation_id}/retry", json=body)

    assert_problem(response, 400, "invalid_request")


# -- idempotency keys ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True])
async def test_same_key_always_gets_the_first_retry(make_app: MakeApp, named: bool) -> None:
    app, source, conversation_id, ids = await gated_tree(make_app)
    other = await make_app()
    message_id = ids["a2"] if named else None

    answers = await asyncio.gather(*(ask_retry(app, conversation_id, message_id, "key") for _ in range(5)))
    first = answers[0].json()
    answers.append(await ask_retry(other, conversation_id, message_id, "key"))
    release(source, 3)
    await app.until_idle()
    answers.append(await ask_retry(app, conversation_id, message_id, "key"))
    await say(app, conversation_id, "More")
    answers.append(await ask_retry(other, conversation_id, message_id, "key"))

    assert [each.status_code for each in answers] == [202] * 8
    assert all(each.json() == first for each in answers)
    assert len(document(app, conversation_id)["messages"]) == 11 + 1 + 2
    another = await ask_retry(app, conversation_id, message_id, "another")
    assert another.status_code == 202, another.text
    assert another.json()["replyId"] != first["replyId"]
    await ended(app)


async def test_key_of_a_retry_belongs_to_all_versions_of_the_reply(app: App) -> None:
    conversation_id, ids = await tree(app)
    first = await ask_retry(app, conversation_id, ids["a2"], "key")
    await ended(app)

    again = [await ask_retry(app, conversation_id, each, "key") for each in (ids["a2'"], first.json()["replyId"], None)]

    assert [each.json() for each in again] == [first.json()] * 3


async def test_key_of_a_retry_of_another_message_is_refused(make_app: MakeApp) -> None:
    app, source, conversation_id, ids = await gated_tree(make_app)
    await ask_retry(app, conversation_id, ids["a2"], "key")

    running = [await ask_retry(app, conversation_id, ids[each], "key") for each in ("a1", "a3")]
    release(source)
    await app.until_idle()
    stored = [await ask_retry(app, conversation_id, each, "key") for each in (ids["a1"], ids["q2"], new_id())]

    for response in (*running, *stored):
        assert_problem(response, 422, "idempotency_key_reused")
    assert len(document(app, conversation_id)["messages"]) == 12


async def test_key_of_a_post_is_not_a_retrys_and_the_other_way_round(make_app: MakeApp) -> None:
    source = Script("text")
    app = await make_app(source=source)
    conversation_id = new_id()
    await post(app, conversation_id, "Hello", "post")
    await ended(app)
    assert_problem(await ask_retry(app, conversation_id, None, "post"), 422, "idempotency_key_reused")
    source.gate = asyncio.Semaphore(0)
    await ask_retry(app, conversation_id, None, "retry")
    while_running = await post(app, conversation_id, "text", "retry")
    release(source)
    await app.until_idle()

    # Also a post of the very text that the reply has.
    afterwards = [await post(app, conversation_id, text, "retry") for text in ("text", "other")]

    for response in (while_running, *afterwards):
        assert_problem(response, 422, "idempotency_key_reused")
    assert len(document(app, conversation_id)["messages"]) == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [], "reply": {"_id": "theirs", "key": "key"}},
        {"messages": [{"content": "Hello", "role": "assistant"}], "reply": {"_id": "theirs", "key": "key"}},
        {"messages": {"key": "key"}},
        {"messages": [{"content": "?", "role": "user", "key": ["key"]}, {"content": "!", "role": "assistant"}]},
    ],
)
async def test_key_that_another_application_stored_elsewhere_is_no_retrys(app: App, fields: dict[str, Any]) -> None:
    inserted = app.database.conversations.insert_one({"createdAt": TIME, "updatedAt": TIME, **fields}).inserted_id
    before = document(app, str(inserted))

    assert_problem(await ask_retry(app, str(inserted), None, "key"), 422, "idempotency_key_reused")

    assert document(app, str(inserted)) == before


async def test_same_key_on_two_servers_starts_one_reply(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second server searched for the key before the first one had stored it."""
    source = gated("text")
    here, there = await make_app(), await make_app(source=source)
    conversation_id, _ = await tree(here)
    find, searched = here.store.find_retry, asyncio.Event()

    async def finds_nothing_at_first(*arguments: Any) -> Any:
        found = await find(*arguments)
        if not searched.is_set():
            searched.set()
            assert (await ask_retry(there, conversation_id, None, "key")).status_code == 202
        return found

    monkeypatch.setattr(here.store, "find_retry", finds_nothing_at_first)

    response = await ask_retry(here, conversation_id, None, "key")

    assert response.status_code == 202, response.text
    assert response.json() == (await ask_retry(there, conversation_id, None, "key")).json()
    release(source)
    await there.until_idle()
    assert len(document(here, conversation_id)["messages"]) == 12


async def test_retry_whose_answer_is_lost_is_written_once(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app = await make_app(source=gated("text", said=99))
    conversation_id, ids = await tree(app)
    start = app.store.start_retry
    lost: list[StartedTurn] = []

    async def stored_but_lost(*arguments: Any) -> Any:
        started = await start(*arguments)
        if not lost:
            lost.append(started)
            raise OutcomeUnknown
        return started

    monkeypatch.setattr(app.store, "start_retry", stored_but_lost)

    response = await ask_retry(app, conversation_id, ids["a2"], "key")
    again = await ask_retry(app, conversation_id, ids["a2"], "key")

    assert_problem(response, 503, "database_unavailable")
    assert again.status_code == 202 and again.json()["replyId"] == lost[0].turn.reply_id
    await app.until(lambda: not app.replies.starting and not app.replies.running)
    messages = document(app, conversation_id)["messages"]
    assert len(messages) == 12
    assert (str(messages[-1]["parent"]), messages[-1]["key"]) == (ids["q2"], "key")


@pytest.mark.expects_log("could not be stored")
async def test_key_is_kept_with_a_reply_that_a_sweep_ends(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app, conversation_id, ids, first = await lost_retry(make_app, monkeypatch)

    again = await ask_retry(app, conversation_id, ids["a2"], "key")

    assert again.status_code == 202 and again.json() == first
    history = await app.client.history(conversation_id)
    last = history["messages"][-1]
    assert (last["id"], last["status"]) == (first["replyId"], "interrupted")
    assert last["siblings"] == [ids["a2"], ids["a2'"], first["replyId"]]
