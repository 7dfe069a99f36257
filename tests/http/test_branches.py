"""Conversations with branches: edit, regenerate, switch; the history and the list of such conversations."""

import asyncio
import json
from typing import Any

import pytest
from bson import ObjectId

from chatserver.errors import SourceError
from chatserver.store import documents
from tests.apps import App, MakeApp, Script
from tests.clients import new_id
from tests.http.branching import (
    ORDER,
    PARENTS,
    PATH,
    ask_retry,
    ask_show,
    everything,
    gated_tree,
    listed,
    lost_retry,
    path,
    post,
    rename,
    retry,
    say,
    show,
    tree,
)
from tests.http.conftest import TIME, ClientOf
from tests.http.test_http import assert_problem
from tests.http.turns import document, gated, insert_conversation, release, said
from tests.trees import path_to

pytestmark = pytest.mark.gen_test


# -- the tree ------------------------------------------------------------------------------------------------------


async def test_history_shows_the_active_path_with_siblings(app: App) -> None:
    conversation_id, ids = await tree(app)

    history = await app.client.history(conversation_id)

    assert [each["id"] for each in history["messages"]] == [ids[each] for each in PATH]
    siblings = {each["id"]: each["siblings"] for each in history["messages"] if "siblings" in each}
    assert siblings == {
        ids["q1"]: [ids["q1"], ids["q4"]],
        ids["q2"]: [ids["q2"], ids["q3"]],
        ids["a2"]: [ids["a2"], ids["a2'"]],
    }
    assert not any("parentId" in each for each in history["messages"]) and "head" not in history
    assert history["lastEventId"] == f"{ids['a5']}-done"


async def test_all_branches_are_returned_in_the_order_of_the_array(app: App) -> None:
    conversation_id, ids = await tree(app)

    history = await everything(app, conversation_id)

    assert [each["id"] for each in history["messages"]] == [ids[each] for each in ORDER]
    parents = {ids[each]: None if parent is None else ids[parent] for each, parent in PARENTS.items()}
    assert {each["id"]: each["parentId"] for each in history["messages"]} == parents
    assert history["head"] == ids["a5"] and history["lastEventId"] == f"{ids['a5']}-done"
    assert not any("siblings" in each for each in history["messages"])


async def test_conversation_without_branches_has_its_tree_too(app: App) -> None:
    conversation_id = new_id()
    first = await say(app, conversation_id, "one")
    second = await say(app, conversation_id, "two")

    history, plain = await everything(app, conversation_id), await app.client.history(conversation_id)

    ids = [first["messageId"], first["replyId"], second["messageId"], second["replyId"]]
    assert [(each["id"], each["parentId"]) for each in history["messages"]] == list(
        zip(ids, [None, *ids], strict=False)
    )
    assert history["head"] == ids[-1]
    assert not any({"siblings", "parentId"} & set(each) for each in plain["messages"])
    assert "head" not in document(app, conversation_id)


async def test_empty_conversation_has_no_head(app: App) -> None:
    conversation_id = insert_conversation(app)

    history = await everything(app, conversation_id)

    assert (history["messages"], history["head"]) == ([], None)


async def test_running_reply_is_in_the_tree(make_app: MakeApp) -> None:
    source = Script("first")
    app = await make_app(source=source)
    conversation_id = new_id()
    first = await say(app, conversation_id, "Hello")
    source.pieces, source.gate = ("sec", "ond"), asyncio.Semaphore(1)
    second = (await ask_retry(app, conversation_id)).json()
    await said(app, conversation_id, 3)

    plain, whole = await app.client.history(conversation_id), await everything(app, conversation_id)

    versions = [first["replyId"], second["replyId"]]
    question, running = plain["messages"]
    assert (question["id"], running["id"]) == (first["messageId"], second["replyId"])
    assert (running["siblings"], running["content"], running["status"]) == (versions, "sec", "streaming")
    assert [(each["id"], each["parentId"]) for each in whole["messages"]] == [
        (first["messageId"], None),
        (first["replyId"], first["messageId"]),
        (second["replyId"], first["messageId"]),
    ]
    assert whole["head"] == second["replyId"]
    assert plain["lastEventId"] == whole["lastEventId"] == f"{second['replyId']}-3"
    assert (await listed(app))[0]["messageCount"] == 3
    release(source)
    await app.until_idle()


@pytest.mark.parametrize("query", [{"limit": 2}, {"before": "0" * 24}, {"limit": 1, "before": "0" * 24}])
async def test_all_branches_are_not_paged(app: App, query: dict[str, Any]) -> None:
    conversation_id, _ = await tree(app)

    response = await app.client.http.get(f"/chat/{conversation_id}", params={**query, "branches": "all"})

    assert_problem(response, 400, "invalid_request")


async def test_other_value_of_branches_is_refused(app: App) -> None:
    response = await app.client.http.get(f"/chat/{new_id()}", params={"branches": "some"})

    assert_problem(response, 400, "invalid_request")


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 6, 7])
async def test_pages_follow_the_active_path(app: App, limit: int) -> None:
    conversation_id, ids = await tree(app)
    whole = await app.client.history(conversation_id)

    page = await app.client.history(conversation_id, limit=limit)

    assert page["lastEventId"] == whole["lastEventId"]
    messages = page["messages"]
    while page["hasMore"]:
        page = await app.client.history(conversation_id, limit=limit, before=messages[0]["id"])
        assert len(page["messages"]) <= limit
        assert page["lastEventId"] == f"{page['messages'][-1]['id']}-done"
        messages = page["messages"] + messages
    assert messages == whole["messages"]
    assert [each["id"] for each in messages] == [ids[each] for each in PATH]


async def test_page_before_a_message_of_another_branch_follows_the_path_to_it(app: App) -> None:
    conversation_id, ids = await tree(app)

    page = await app.client.history(conversation_id, before=ids["a3"], limit=2)

    assert [each["id"] for each in page["messages"]] == [ids["a1"], ids["q3"]] and page["hasMore"]
    assert await path(app, conversation_id, before=ids["a4"]) == [ids["q4"]]
    response = await app.client.http.get(f"/chat/{conversation_id}", params={"before": new_id()})
    assert_problem(response, 404, "not_found")


async def test_pages_count_the_running_reply_on_the_path(make_app: MakeApp) -> None:
    app, source, conversation_id, ids = await gated_tree(make_app)
    running = (await ask_retry(app, conversation_id, ids["a2"])).json()["replyId"]

    page = await app.client.history(conversation_id, limit=2)
    before = await app.client.history(conversation_id, limit=2, before=running)

    assert [each["id"] for each in page["messages"]] == [ids["q2"], running] and page["hasMore"]
    assert page["messages"][1]["siblings"] == [ids["a2"], ids["a2'"], running]
    assert [each["id"] for each in before["messages"]] == [ids["a1"], ids["q2"]] and before["hasMore"]
    assert [each["id"] for each in (await app.client.history(conversation_id, limit=1))["messages"]] == [running]
    release(source)
    await app.until_idle()


# -- posts ---------------------------------------------------------------------------------------------------------


async def test_post_without_a_parent_continues_from_the_head(app: App) -> None:
    conversation_id, ids = await tree(app)
    await show(app, conversation_id, ids["a3"])

    answer = await say(app, conversation_id, "More")

    expected = [ids["q1"], ids["a1"], ids["q3"], ids["a3"], answer["messageId"], answer["replyId"]]
    assert await path(app, conversation_id) == expected


@pytest.mark.parametrize("parent", [*ORDER, None])
async def test_post_continues_from_any_message(app: App, parent: str | None) -> None:
    conversation_id, ids = await tree(app)
    parent_id = None if parent is None else ids[parent]

    answer = await say(app, conversation_id, "More", parentId=parent_id and parent_id.upper())

    history = await everything(app, conversation_id)
    expected = [each["id"] for each in path_to(history["messages"], parent_id)]
    assert await path(app, conversation_id) == [*expected, answer["messageId"], answer["replyId"]]
    assert history["head"] == answer["replyId"]


async def test_parent_at_the_end_of_a_conversation_makes_no_branch(app: App) -> None:
    conversation_id = new_id()
    await say(app, conversation_id, "one", parentId=None)
    first = await say(app, conversation_id, "two")
    await say(app, conversation_id, "three", parentId=first["replyId"])

    assert "head" not in document(app, conversation_id)
    assert not any("parent" in each for each in document(app, conversation_id)["messages"])
    assert len(await path(app, conversation_id)) == 6


async def test_parent_that_is_not_in_the_conversation_is_refused(app: App) -> None:
    conversation_id, other_id = new_id(), new_id()
    await say(app, conversation_id, "Hello")
    other = await say(app, other_id, "Hello")
    before = document(app, conversation_id)

    responses = [
        await post(app, known, "More", parentId=parent)
        for known in (conversation_id, new_id(), None)
        for parent in (new_id(), other["replyId"], conversation_id)
    ]

    for response in responses:
        assert_problem(response, 404, "not_found")
    assert document(app, conversation_id) == before
    assert app.database.conversations.count_documents({}) == 2


@pytest.mark.parametrize("parent", ["", "x" * 24, "0" * 23, "0" * 25, 1, [], {}, True])
async def test_parent_of_another_form_is_refused(app: App, parent: object) -> None:
    problem = assert_problem(await post(app, new_id(), "Hello", parentId=parent), 400, "invalid_request")

    assert problem["errors"][0]["pointer"] == "/parentId"


async def test_edit_while_a_reply_runs_is_refused(make_app: MakeApp) -> None:
    source = gated("text")
    app = await make_app(source=source)
    answer = await app.client.say("Hello")

    for parent in (None, answer["messageId"], answer["replyId"]):
        response = await post(app, answer["conversationId"], "More", parentId=parent)
        assert_problem(response, 409, "reply_in_progress")
    release(source)
    await app.until_idle()
    assert len(document(app, answer["conversationId"])["messages"]) == 2


async def test_simultaneous_edits_start_one_reply(app: App) -> None:
    conversation_id, ids = await tree(app)
    responses = await asyncio.gather(*(post(app, conversation_id, "x", parentId=ids["a1"]) for _ in range(5)))

    await app.until_idle()
    accepted = sum(response.status_code == 202 for response in responses)
    assert accepted >= 1 and {response.status_code for response in responses} <= {202, 409}
    assert len(document(app, conversation_id)["messages"]) == len(ORDER) + 2 * accepted


async def test_repeated_edit_with_a_key_is_stored_once(app: App) -> None:
    conversation_id, ids = await tree(app)

    answers = [await post(app, conversation_id, "edited", "key", parentId=ids["a1"]) for _ in range(2)]
    await app.until_idle()
    answers.append(await post(app, conversation_id, "edited", "key", parentId=ids["a1"]))

    assert [each.status_code for each in answers] == [202] * 3
    assert answers[0].json() == answers[1].json() == answers[2].json()
    assert len(document(app, conversation_id)["messages"]) == len(ORDER) + 2
    assert_problem(await post(app, conversation_id, "other", "key", parentId=ids["a1"]), 422, "idempotency_key_reused")


async def test_key_of_a_post_with_another_parent_is_refused(app: App) -> None:
    conversation_id = new_id()
    first = await post(app, conversation_id, "Hello", "first", parentId=None)
    await app.until_idle()
    reply = first.json()["replyId"]
    second = await post(app, conversation_id, "edited", "second", parentId=None)
    await app.until_idle()

    for text, key, parent in [("Hello", "first", reply), ("edited", "second", reply), ("edited", "second", new_id())]:
        refused = await post(app, conversation_id, text, key, parentId=parent)
        assert_problem(refused, 422, "idempotency_key_reused")
    assert (await post(app, conversation_id, "Hello", "first", parentId=None)).json() == first.json()
    assert (await post(app, conversation_id, "edited", "second", parentId=None)).json() == second.json()
    assert len(document(app, conversation_id)["messages"]) == 4


async def test_source_is_shown_the_active_path(make_app: MakeApp) -> None:
    source = Script("text")
    app = await make_app(source=source)
    conversation_id, ids = await tree(app)
    await show(app, conversation_id, ids["a3"])
    await say(app, conversation_id, "question 6")
    continued = source.prompts[-1]
    await retry(app, conversation_id, ids["a2"])
    regenerated = source.prompts[-1]
    await say(app, conversation_id, "question 7", parentId=None)
    new = source.prompts[-1]

    questions = [[each.content for each in prompt.messages if each.role == "user"] for prompt in source.prompts[-3:]]
    assert questions == [
        ["question 1", "question 3", "question 6"],
        ["question 1", "question 2"],
        ["question 7"],
    ]
    assert [len(each.messages) for each in (continued, regenerated, new)] == [5, 3, 1]
    assert [each.turn for each in (continued, regenerated, new)] == [3, 2, 1]
    assert [each.turn for each in source.prompts] == [1, 2, 2, 2, 1, 3, 3, 2, 1]


# -- switching -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "head"),
    [("q1", "a3"), ("a1", "a3"), ("q2", "a2'"), ("a2", "a5"), ("a2'", "a2'"), ("q3", "a3"), ("q4", "a4"), ("a5", "a5")],
)
async def test_switch_follows_the_newest_child(app: App, message: str, head: str) -> None:
    conversation_id, ids = await tree(app)

    shown = await show(app, conversation_id, ids[message].upper())

    assert shown == ids[head]
    history = await everything(app, conversation_id)
    assert history["head"] == ids[head]
    assert await path(app, conversation_id) == [each["id"] for each in path_to(history["messages"], ids[head])]
    assert history["lastEventId"] == f"{ids['a5']}-done"


async def test_switch_is_no_activity(app: App) -> None:
    conversation_id, ids = await tree(app)
    await say(app, new_id(), "Newer")
    before = [{**each, "title": None} for each in await listed(app)]
    updated_at = document(app, conversation_id)["updatedAt"]

    await show(app, conversation_id, ids["a4"])

    assert document(app, conversation_id)["updatedAt"] == updated_at
    assert [{**each, "title": None} for each in await listed(app)] == before


async def test_switch_to_the_shown_branch_changes_nothing(app: App) -> None:
    conversation_id = new_id()
    answer = await say(app, conversation_id, "Hello")
    before = document(app, conversation_id)

    assert await show(app, conversation_id, answer["messageId"]) == answer["replyId"]

    assert document(app, conversation_id) == before


async def test_switch_to_what_is_not_there_is_refused(app: App) -> None:
    conversation_id, _ = await tree(app)
    other = await say(app, new_id(), "Hello")
    before = document(app, conversation_id)

    for message_id in (new_id(), other["replyId"], conversation_id):
        assert_problem(await ask_show(app, conversation_id, message_id), 404, "not_found")
    assert_problem(await ask_show(app, new_id(), other["replyId"]), 404, "not_found")
    assert_problem(await ask_show(app, "42", other["replyId"]), 400, "invalid_id")
    assert document(app, conversation_id) == before


@pytest.mark.parametrize("body", [{}, {"messageId": None}, {"messageId": "x"}, {"messageId": "0" * 24, "x": 1}, []])
async def test_switch_with_another_body_is_refused(app: App, body: object) -> None:
    conversation_id, _ = await tree(app)

    response = await app.client.http.put(f"/chat/{conversation_id}/head", json=body)

    assert_problem(response, 400, "invalid_request")


async def test_switch_while_a_reply_runs_is_refused(make_app: MakeApp) -> None:
    app, source, conversation_id, ids = await gated_tree(make_app)
    await post(app, conversation_id, "More")
    before = document(app, conversation_id).get("head")

    for message_id in (ids["a4"], ids["a5"]):
        assert_problem(await ask_show(app, conversation_id, message_id), 409, "reply_in_progress")

    assert document(app, conversation_id)["head"] == before
    release(source)
    await app.until_idle()
    assert (await everything(app, conversation_id))["head"] == str(before["_id"])
    await show(app, conversation_id, ids["a4"])


@pytest.mark.expects_log("could not be stored")
async def test_switch_ends_a_reply_whose_lease_has_expired(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app, conversation_id, ids, running = await lost_retry(make_app, monkeypatch)

    await show(app, conversation_id, ids["a4"])

    message = document(app, conversation_id)["messages"][-1]
    assert (str(message["_id"]), message["status"], message["content"]) == (running["replyId"], "interrupted", "kept")
    assert (str(message["parent"]), message["key"]) == (ids["q2"], "key")
    assert (await everything(app, conversation_id))["head"] == ids["a4"]


async def test_message_of_another_application_becomes_the_head(app: App) -> None:
    conversation_id, ids = await tree(app)
    await show(app, conversation_id, ids["a4"])
    foreign = {"_id": ObjectId(), "role": "user", "content": "from Mongoose", "createdAt": TIME}
    app.database.conversations.update_one({"_id": ObjectId(conversation_id)}, {"$push": {"messages": foreign}})

    # It continues the message before it in the array.
    expected = [*(ids[each] for each in PATH), str(foreign["_id"])]
    assert await path(app, conversation_id) == expected
    history = await everything(app, conversation_id)
    assert history["head"] == str(foreign["_id"]) and history["messages"][-1]["parentId"] == ids["a5"]

    answer = await say(app, conversation_id, "More")
    assert await path(app, conversation_id) == [*expected, answer["messageId"], answer["replyId"]]
    assert await show(app, conversation_id, ids["q4"]) == ids["a4"]


# -- the list and the export ---------------------------------------------------------------------------------------


async def test_list_has_the_title_of_the_active_path_and_counts_all_branches(app: App) -> None:
    conversation_id, ids = await tree(app)
    linear = new_id()
    await say(app, linear, "Linear")
    (_, before) = await listed(app)
    await show(app, conversation_id, ids["a4"])

    (first, second) = await listed(app)

    assert (before["title"], before["messageCount"]) == ("question 1", 11)
    assert (second["title"], second["messageCount"]) == ("question 4", 11)
    assert first["title"] == "Linear"
    await rename(app, conversation_id, "Chosen")
    assert [each["title"] for each in await listed(app)] == ["Linear", "Chosen"]


async def test_export_has_every_branch(app: App) -> None:
    conversation_id, ids = await tree(app)
    await rename(app, conversation_id, "Chosen")
    linear = new_id()
    await say(app, linear, "Linear")

    response = await app.client.http.get("/chat/export")

    lines = {json.loads(line)["conversationId"]: line for line in response.text.splitlines()}
    for each in (conversation_id, linear):
        alone = await app.client.http.get(f"/chat/{each}", params={"branches": "all"})
        assert alone.text == lines[each] + "\n"
    exported = json.loads(lines[conversation_id])
    assert exported["title"] == "Chosen" and exported["head"] == ids["a5"] and len(exported["messages"]) == len(ORDER)


# -- other owners --------------------------------------------------------------------------------------------------


async def test_conversation_of_another_owner_does_not_exist(users_app: App, client_of: ClientOf) -> None:
    app = users_app
    alice, bob = client_of(app, "alice"), client_of(app, "bob")
    answer = await alice.say("Hello")
    conversation_id, message_id = answer["conversationId"], answer["replyId"]
    await app.until(lambda: not app.replies.running)
    before = document(app, conversation_id)

    responses = [
        await bob.http.put(f"/chat/{conversation_id}/head", json={"messageId": message_id}),
        await bob.http.patch(f"/chat/{conversation_id}", json={"title": "Mine"}),
        await bob.http.post(f"/chat/{conversation_id}/retry", json={"messageId": message_id}),
        await bob.http.post(f"/chat/{conversation_id}/retry", headers={"Idempotency-Key": "key"}),
        await bob.http.get(f"/chat/{conversation_id}", params={"branches": "all"}),
        await bob.http.post("/chat", json={"conversationId": conversation_id, "input": "x", "parentId": message_id}),
        await bob.http.post("/chat", json={"conversationId": conversation_id, "input": "x", "parentId": None}),
    ]

    for response in responses:
        assert_problem(response, 404, "not_found")
    assert document(app, conversation_id) == before


# -- documents of other origins ------------------------------------------------------------------------------------


async def test_messages_without_ids_have_branches_too(app: App) -> None:
    messages = [{"role": role, "content": f"{number}"} for number, role in enumerate(["user", "assistant"] * 2)]
    known = insert_conversation(app, messages=messages)
    q1, a1, q2, a2 = (documents.message_id(ObjectId(known), index, None) for index in range(4))
    assert await path(app, known) == [q1, a1, q2, a2]

    regenerated = await retry(app, known, a2)
    edited = await say(app, known, "edited", parentId=a1)
    first = await retry(app, known, a1)

    assert (regenerated["messageId"], first["messageId"]) == (q2, q1)
    history = await everything(app, known)
    assert [(each["id"], each["parentId"]) for each in history["messages"]] == [
        *[(q1, None), (a1, q1), (q2, a1), (a2, q2)],
        *[(regenerated["replyId"], q2), (edited["messageId"], a1), (edited["replyId"], edited["messageId"])],
        (first["replyId"], q1),
    ]
    assert await show(app, known, a2) == a2
    assert await path(app, known) == [q1, a1, q2, a2]
    more = await say(app, known, "more")
    assert await path(app, known) == [q1, a1, q2, a2, more["messageId"], more["replyId"]]
    assert await path(app, known, before=a2, limit=2) == [a1, q2]


async def test_conversation_that_version_1_retried_continues(app: App) -> None:
    ids = [ObjectId() for _ in range(5)]
    error = {"code": "source_failed", "message": "no"}
    roles = ["user", "assistant", "assistant", "user", "assistant"]
    messages: list[dict[str, Any]] = [
        {"_id": each, "role": role, "content": f"{number}", "createdAt": TIME}
        for number, (each, role) in enumerate(zip(ids, roles, strict=True))
    ]
    messages[1] |= {"status": "superseded", "error": error}
    known = insert_conversation(app, messages=messages)
    q1, a1, a2, q2, a3 = map(str, ids)

    history = await app.client.history(known)
    assert [each["id"] for each in history["messages"]] == [q1, a2, q2, a3]
    assert history["messages"][1]["siblings"] == [a1, a2]
    whole = await everything(app, known)
    assert [each["parentId"] for each in whole["messages"]] == [None, q1, q1, a2, q2]
    assert whole["messages"][1]["status"] == "superseded" and whole["head"] == a3

    more = await say(app, known, "more")
    assert "head" not in document(app, known)
    assert await path(app, known) == [q1, a2, q2, a3, more["messageId"], more["replyId"]]
    assert await show(app, known, a1) == a1
    assert await path(app, known) == [q1, a1]
    again = await say(app, known, "after the old reply")
    assert await path(app, known) == [q1, a1, again["messageId"], again["replyId"]]


async def test_retry_of_a_reply_that_failed_keeps_its_status(make_app: MakeApp) -> None:
    source = Script("half", SourceError("source_failed", "no"))
    app = await make_app(source=source)
    conversation_id = new_id()
    failed = await say(app, conversation_id, "Hello")
    source.pieces = ("whole",)

    again = await retry(app, conversation_id)

    stored = document(app, conversation_id)["messages"]
    assert [each.get("status") for each in stored] == [None, "failed", None]
    history = await app.client.history(conversation_id)
    assert [each["id"] for each in history["messages"]] == [failed["messageId"], again["replyId"]]
