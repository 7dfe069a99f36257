"""Conversations that the first release stored are read, streamed and continued (tests/fixtures/first_release.json)."""

import itertools
import json
from typing import Any

import pytest
from bson import ObjectId, json_util
from tornado.ioloop import IOLoop

from tests.apps import App, MakeApp
from tests.clients import Event
from tests.http.turns import document
from tests.processes import ROOT

pytestmark = pytest.mark.gen_test

LINEAR, RETRIED, MONGOOSE = (f"6925a1d0c3f04b7e9a1d000{number}" for number in (1, 2, 3))
FIXTURE = (ROOT / "tests" / "fixtures" / "first_release.json").read_text()
CONVERSATIONS = json_util.loads(FIXTURE, json_options=json_util.JSONOptions(tz_aware=True))["conversations"]
STORED = {str(each["_id"]): each["messages"] for each in CONVERSATIONS}
IDS = {name: [str(each["_id"]) for each in messages] for name, messages in STORED.items()}
HELLO, GOOD, STORY, STOPPED, TOLD, ANOTHER, FAILED, STOPPED_AGAIN, TOLD_AGAIN = IDS[RETRIED]


@pytest.fixture
def old_app(io_loop: IOLoop, make_app: MakeApp) -> App:
    """The application on a database that has the conversations of the first release."""
    app: App = io_loop.run_sync(make_app)
    app.database.conversations.insert_many(CONVERSATIONS)
    return app


async def send(app: App, method: str, path: str, body: dict[str, Any] | None = None, **headers: str) -> dict[str, Any]:
    """Return the body of an answer, which must be a success."""
    response = await app.client.http.request(method, f"/chat{path}", json=body, headers=headers)
    assert response.is_success, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def path_of(app: App, conversation_id: str) -> list[str]:
    """Return the ids of the active path."""
    return [each["id"] for each in (await app.client.history(conversation_id))["messages"]]


async def all_events(app: App, conversation_id: str) -> list[Event]:
    """Return the events from the position before the first message to the end of the last one."""
    events = []
    async for event in app.client.stream(conversation_id, f"{conversation_id}-0"):
        events.append(event)
        if event.data.get("messageId") == IDS[conversation_id][-1] and event.name in ("done", "error", "input"):
            break
    return events


def texts(events: list[Event]) -> dict[str, str]:
    """Return the text of each streamed message; the message of a token is in its position."""
    found: dict[str, str] = {}
    for event in events:
        if event.name in ("input", "token", "done", "error"):
            message_id = event.id.rpartition("-")[0]
            found[message_id] = found.get(message_id, "") + event.data.get("text", "")
    return found


def test_fixture_names_every_state_of_a_reply_that_the_first_release_knew() -> None:
    statuses = {each.get("status") for messages in STORED.values() for each in messages}
    assert statuses == {None, "interrupted", "superseded"}
    assert "parent" not in json.dumps(json.loads(FIXTURE)["conversations"])


@pytest.mark.parametrize("conversation_id", [LINEAR, MONGOOSE])
async def test_linear_conversation_is_its_own_path(old_app: App, conversation_id: str) -> None:
    history = await old_app.client.history(conversation_id)

    stored = STORED[conversation_id]
    assert [each["content"] for each in history["messages"]] == [each["content"] for each in stored]
    assert not any("siblings" in each for each in history["messages"])
    assert history["lastEventId"] == f"{IDS[conversation_id][-1]}-done"


async def test_superseded_replies_are_siblings_of_the_replies_that_replaced_them(old_app: App) -> None:
    history = await old_app.client.history(RETRIED)

    assert [(each["id"], each["status"]) for each in history["messages"]] == [
        (message_id, "complete") for message_id in (HELLO, GOOD, STORY, TOLD, ANOTHER, TOLD_AGAIN)
    ]
    assert [each.get("siblings") for each in history["messages"]] == [
        None,
        None,
        None,
        [STOPPED, TOLD],
        None,
        [FAILED, STOPPED_AGAIN, TOLD_AGAIN],
    ]


async def test_superseded_reply_after_thousands_of_messages_is_found(app: App) -> None:
    before = [{"_id": ObjectId(), "role": role, "content": ""} for role in ["user", "assistant"] * 1000]
    question, old, new = (ObjectId() for _ in range(3))
    retried = [
        {"_id": question, "role": "user", "content": "?"},
        {"_id": old, "role": "assistant", "content": "", "status": "superseded"},
        {"_id": new, "role": "assistant", "content": "!"},
    ]
    conversation_id = app.database.conversations.insert_one({"messages": [*before, *retried]}).inserted_id

    history = await app.client.history(str(conversation_id))

    assert [each["id"] for each in history["messages"][-2:]] == [str(question), str(new)]
    assert history["messages"][-1]["siblings"] == [str(old), str(new)]


async def test_all_branches_are_in_the_order_of_the_array(old_app: App) -> None:
    history = await old_app.client.history(RETRIED, branches="all")

    assert [each["id"] for each in history["messages"]] == IDS[RETRIED]
    parents = [each["parentId"] for each in history["messages"]]
    assert parents == [None, HELLO, GOOD, STORY, STORY, TOLD, ANOTHER, ANOTHER, ANOTHER]
    assert history["head"] == TOLD_AGAIN
    superseded = [each["id"] for each in history["messages"] if each["status"] == "superseded"]
    assert superseded == [STOPPED, FAILED, STOPPED_AGAIN]


async def test_list_has_the_first_title_and_counts_all_messages(old_app: App) -> None:
    listed = (await send(old_app, "GET", ""))["conversations"]

    assert {each["conversationId"]: (each["title"], each["messageCount"]) for each in listed} == {
        LINEAR: ("Hello! What can you do?", 6),
        RETRIED: ("Hello!", 9),
        MONGOOSE: ("What is the capital of France?", 4),
    }


async def test_stream_from_the_start_has_all_texts_and_a_head_before_each_retried_reply(old_app: App) -> None:
    events = await all_events(old_app, RETRIED)

    assert texts(events) == {str(each["_id"]): each["content"] for each in STORED[RETRIED]}
    begins = [
        (event.data["messageId"], following.id.rpartition("-")[0])
        for event, following in itertools.pairwise(events)
        if event.name == "head" and event.data["messageId"] is not None
    ]
    assert begins == [(STORY, TOLD), (ANOTHER, STOPPED_AGAIN), (ANOTHER, TOLD_AGAIN)]


async def test_stream_of_a_linear_conversation_has_no_head(old_app: App) -> None:
    events = await all_events(old_app, LINEAR)

    assert "head" not in [event.name for event in events]
    assert texts(events) == {str(each["_id"]): each["content"] for each in STORED[LINEAR]}


@pytest.mark.parametrize("message_id", [HELLO, TOLD])
async def test_position_of_the_first_release_is_valid(old_app: App, message_id: str) -> None:
    events = [event async for event in old_app.client.stream(RETRIED, f"{message_id}-done", until_done=True)]

    assert "reset" not in [event.name for event in events]
    first = next(event for event in events if event.name in ("input", "token"))
    assert first.id.rpartition("-")[0] == IDS[RETRIED][IDS[RETRIED].index(message_id) + 1]


@pytest.mark.parametrize("conversation_id", [LINEAR, RETRIED, MONGOOSE])
async def test_post_continues_the_path_and_rewrites_nothing(old_app: App, conversation_id: str) -> None:
    before = await path_of(old_app, conversation_id)

    answer, _ = await old_app.client.turn("Go on.", conversation_id)

    assert await path_of(old_app, conversation_id) == [*before, answer["messageId"], answer["replyId"]]
    assert document(old_app, conversation_id)["messages"][:-2] == STORED[conversation_id]


async def test_post_with_a_key_of_the_first_release_gets_its_answer_again(old_app: App) -> None:
    body = {"conversationId": LINEAR, "input": "And what else?"}
    answer = await send(old_app, "POST", "", body, **{"Idempotency-Key": "first-2"})

    assert (answer["messageId"], answer["replyId"]) == tuple(IDS[LINEAR][2:4])
    assert document(old_app, LINEAR)["messages"] == STORED[LINEAR]


async def test_retry_of_an_interrupted_reply_leaves_its_status(old_app: App) -> None:
    answer = await send(old_app, "POST", f"/{LINEAR}/retry")
    await old_app.until_idle()

    [*_, question, reply] = (await old_app.client.history(LINEAR))["messages"]
    assert question["id"] == answer["messageId"] == IDS[LINEAR][-2]
    assert reply["siblings"] == [IDS[LINEAR][-1], answer["replyId"]]
    assert document(old_app, LINEAR)["messages"][:-1] == STORED[LINEAR]


async def test_superseded_reply_can_be_retried(old_app: App) -> None:
    answer = await send(old_app, "POST", f"/{RETRIED}/retry", {"messageId": STOPPED})
    await old_app.until_idle()

    history = await old_app.client.history(RETRIED)
    assert answer["messageId"] == STORY
    assert [each["id"] for each in history["messages"]] == [HELLO, GOOD, STORY, answer["replyId"]]
    assert history["messages"][-1]["siblings"] == [STOPPED, TOLD, answer["replyId"]]


async def test_superseded_reply_can_be_shown_and_continued(old_app: App) -> None:
    assert await send(old_app, "PUT", f"/{RETRIED}/head", {"messageId": STOPPED}) == {
        "conversationId": RETRIED,
        "messageId": STOPPED,
    }
    assert await path_of(old_app, RETRIED) == [HELLO, GOOD, STORY, STOPPED]

    answer, events = await old_app.client.turn("Go on.", RETRIED)

    path = [HELLO, GOOD, STORY, STOPPED, answer["messageId"], answer["replyId"]]
    assert await path_of(old_app, RETRIED) == path
    assert events[-1].data == {"messageId": answer["replyId"], "status": "complete"}
    await send(old_app, "PUT", f"/{RETRIED}/head", {"messageId": TOLD})
    assert await path_of(old_app, RETRIED) == [HELLO, GOOD, STORY, TOLD, ANOTHER, TOLD_AGAIN]


async def test_message_of_a_mongoose_application_can_be_edited(old_app: App) -> None:
    first = IDS[MONGOOSE][0]
    body = {"conversationId": MONGOOSE, "input": "What is the capital of Italy?", "parentId": None}
    answer = await send(old_app, "POST", "", body)
    await old_app.until_idle()

    history = await old_app.client.history(MONGOOSE)
    assert [each["id"] for each in history["messages"]] == [answer["messageId"], answer["replyId"]]
    assert history["messages"][0]["siblings"] == [first, answer["messageId"]]
    await send(old_app, "PUT", f"/{MONGOOSE}/head", {"messageId": first})
    assert await path_of(old_app, MONGOOSE) == IDS[MONGOOSE]
