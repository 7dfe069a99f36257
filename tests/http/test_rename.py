"""Titles that users choose."""

from typing import Any

import pytest
from bson import ObjectId

from tests.apps import App, MakeApp
from tests.clients import new_id
from tests.http.branching import ask_rename, everything, following, listed, rename, retry, say
from tests.http.conftest import TIME
from tests.http.test_http import assert_problem
from tests.http.turns import document, gated, insert_conversation, release

pytestmark = pytest.mark.gen_test


async def test_chosen_title_is_shown_until_the_automatic_one_is_chosen(app: App) -> None:
    conversation_id = new_id()
    await say(app, conversation_id, "Hello there")

    summary = await rename(app, conversation_id, "Chosen")

    assert [summary] == await listed(app) and summary["title"] == "Chosen"
    assert (await app.client.history(conversation_id))["title"] == "Chosen"
    assert (await everything(app, conversation_id))["title"] == "Chosen"
    await say(app, conversation_id, "More")
    await retry(app, conversation_id)
    assert (await listed(app))[0]["title"] == "Chosen"

    summary = await rename(app, conversation_id, None)

    assert [summary] == await listed(app) and summary["title"] == "Hello there"
    assert "title" not in await app.client.history(conversation_id)
    assert "title" not in document(app, conversation_id)


@pytest.mark.parametrize(
    "title", ["x", "😀" * 200, " spaces inside and around ", "e\u0301", "$ROOT", "$$REMOVE", "{$ne:1}", "<b>", '"\\']
)
async def test_title_is_kept_as_it_is(app: App, title: str) -> None:
    conversation_id = new_id()
    await say(app, conversation_id, "Hello")

    assert (await rename(app, conversation_id, title))["title"] == title

    assert (await app.client.history(conversation_id))["title"] == title
    async with following(app, conversation_id) as events:
        pass
    assert [(each.name, each.data) for each in events] == [("title", {"title": title})]


@pytest.mark.parametrize(
    "title",
    [
        *("", " ", "\u00a0\u3000", "\t", "\ufeff", "x" * 201, "😀" * 201, 1, True, [], {}),
        *("a\nb", "a\rb", "a\tb", "a\0b", "a\x1fb", "a\x7fb", "a\x85b", "a\x9fb", "a\u2028b", "a\u2029b", "x\n"),
    ],
)
async def test_title_that_is_not_one_line_of_text_is_refused(app: App, title: object) -> None:
    conversation_id = new_id()
    await say(app, conversation_id, "Hello")
    before = document(app, conversation_id)

    problem = assert_problem(await ask_rename(app, conversation_id, title), 400, "invalid_request")

    assert problem["errors"][0]["pointer"] == "/title"
    assert document(app, conversation_id) == before


@pytest.mark.parametrize("body", ["{}", '{"title": "x", "y": 1}', "[]", '{"title": "\\ud800"}', "{"])
async def test_body_of_another_form_is_refused(app: App, body: str) -> None:
    conversation_id = new_id()
    await say(app, conversation_id, "Hello")
    before = document(app, conversation_id)

    headers = {"Content-Type": "application/json"}
    response = await app.client.http.patch(f"/chat/{conversation_id}", content=body, headers=headers)

    assert response.status_code == 400 and response.json()["code"] in ("invalid_request", "invalid_json")
    assert document(app, conversation_id) == before


async def test_unknown_conversation_is_not_renamed(app: App) -> None:
    assert_problem(await ask_rename(app, new_id(), "Title"), 404, "not_found")
    assert_problem(await ask_rename(app, new_id(), None), 404, "not_found")
    assert_problem(await ask_rename(app, "42", "Title"), 400, "invalid_id")
    assert app.database.conversations.count_documents({}) == 0


async def test_rename_is_no_activity(app: App) -> None:
    older, newer = new_id(), new_id()
    await say(app, older, "Older")
    await say(app, newer, "Newer")
    updated_at = document(app, older)["updatedAt"]

    await rename(app, older, "Chosen")

    assert document(app, older)["updatedAt"] == updated_at
    assert [each["conversationId"] for each in await listed(app)] == [newer, older]


async def test_conversation_is_renamed_while_a_reply_runs(make_app: MakeApp) -> None:
    source = gated("one ", "two", said=1)
    app = await make_app(source=source)
    answer = await app.client.say("Hello")
    conversation_id = answer["conversationId"]

    async with following(app, conversation_id, answer["lastEventId"]) as events:
        assert (await rename(app, conversation_id, "Chosen"))["status"] == "streaming"
        release(source)

    assert [each.name for each in events if each.name != "token"] == ["title", "done"]
    assert document(app, conversation_id)["title"] == "Chosen"


async def test_open_streams_receive_each_title_once(app: App) -> None:
    conversation_id = new_id()
    answer = await say(app, conversation_id, "Hello")

    async with following(app, conversation_id, f"{answer['replyId']}-done") as events:
        for title in ("one", "one", "two", None, None):
            await rename(app, conversation_id, title)

    assert [(each.name, each.data["title"]) for each in events] == [("title", "one"), ("title", "two"), ("title", None)]
    assert {each.id for each in events} == {f"{answer['replyId']}-done"}


async def test_stream_of_a_renamed_conversation_opens_with_the_title(app: App) -> None:
    conversation_id = new_id()
    answer = await say(app, conversation_id, "Hello")
    await retry(app, conversation_id)
    await rename(app, conversation_id, "Chosen")

    async with following(app, conversation_id, f"{answer['messageId']}-done") as events:
        pass

    assert [each.name for each in events][:2] == ["title", "head"]
    assert events[0].data == {"title": "Chosen"} and [each.name for each in events].count("title") == 1


async def test_stream_of_the_first_reply_after_a_restart_opens_with_the_title(make_app: MakeApp) -> None:
    """The conversation was in memory since the post, which had not read the title."""
    before = await make_app()
    conversation_id = new_id()
    await say(before, conversation_id, "Hello")
    await rename(before, conversation_id, "Chosen")
    source = gated("text")
    app = await make_app(source=source)
    answer = await app.client.say("More", conversation_id)

    async with following(app, conversation_id, answer["lastEventId"]) as events:
        release(source)

    assert (events[0].name, events[0].data) == ("title", {"title": "Chosen"})


@pytest.mark.parametrize("title", ["a\nb", "", "  ", 5, None, {"a": 1}, ["x"]])
async def test_title_of_another_application_that_is_not_one_is_ignored(app: App, title: Any) -> None:
    message = {"_id": ObjectId(), "role": "user", "content": "Hello", "createdAt": TIME}
    conversation_id = insert_conversation(app, title=title, messages=[message])

    assert (await listed(app))[0]["title"] == "Hello"
    assert "title" not in await app.client.history(conversation_id)
