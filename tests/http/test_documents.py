"""Documents of other applications in the collection: they can be read, and do not break other conversations."""

import asyncio
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import Binary, Code, Decimal128, Int64, MaxKey, MinKey, ObjectId, Regex, Timestamp, encode
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument

from chatserver.records import Key
from tests.apps import App, MakeApp, Script
from tests.clients import Transcript
from tests.http.test_http import assert_problem
from tests.processes import ROOT
from tests.users import USERS, bearer

pytestmark = pytest.mark.gen_test

TIME = datetime(2025, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
MONGOOSE = ROOT / "tests" / "node" / "mongoose.mjs"
ODD: list[Any] = [
    None,
    True,
    5,
    2.5,
    float("nan"),
    "text",
    "$$ROOT",
    "",
    {},
    {"$ref": 5, "$id": 1},
    {"$ref": "a", "$id": 1},
    {"a": {"b": [1]}},
    [],
    [None],
    ["text"],
    [{}],
    [{"_id": 1}],
    [[{"_id": 1}]],
    ObjectId(),
    Binary(b"\xff"),
    Binary(b"x" * 16, 4),
    Int64(2**60),
    Decimal128("1"),
    Timestamp(1, 1),
    Code("x"),
    Code("x", {"y": 1}),
    Regex("["),
    MinKey(),
    MaxKey(),
    DatetimeMS(2**62),
    DatetimeMS(-(2**62)),
    datetime(1, 1, 1, tzinfo=UTC),
]


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, "createdAt": TIME, **more}


def insert(app: App, **document: Any) -> str:
    """Insert a conversation as another application may; return its id."""
    return str(app.database.conversations.insert_one({"createdAt": TIME, "updatedAt": TIME, **document}).inserted_id)


async def listed(app: App) -> dict[str, Any]:
    response = await app.client.http.get("/chat", params={"limit": "100"})
    assert response.status_code == 200, response.text
    return {each["conversationId"]: each for each in response.json()["conversations"]}


async def replayed(app: App, conversation_id: str, position: str, count: int) -> list[Any]:
    """Return the first `count` events after a position."""
    events: list[Any] = []
    if count:
        async with asyncio.timeout(5):
            async for event in app.client.stream(conversation_id, position):
                events.append(event)
                if len(events) == count:
                    break
    return events


async def check_stream(app: App, conversation_id: str, *, whole: bool = False) -> None:
    """Check that a stream from each position sends the messages that the history has after it.

    :param whole: check only the stream from the beginning
    """
    history = await app.client.history(conversation_id)
    messages = history["messages"]
    expected = [each["content"] for each in messages]
    for index in range(1 if whole else len(messages) + 1):
        position = f"{messages[index - 1]['id']}-done" if index else f"{conversation_id}-0"
        rest = messages[index:]
        count = sum(2 if each["role"] == "assistant" and each["content"] else 1 for each in rest)
        events = await replayed(app, conversation_id, position, count)
        texts: dict[str, str] = {}
        for event in events:
            message_id = event.id.rpartition("-")[0]
            texts[message_id] = texts.get(message_id, "") + event.data.get("text", "")
        assert list(texts) == [each["id"] for each in rest]
        assert list(texts.values()) == expected[index:]
    if messages:
        assert history["lastEventId"] == f"{messages[-1]['id']}-done"


@pytest.mark.parametrize("messages", [{}, {"messages": None}, {"messages": []}], ids=str)
async def test_conversation_without_messages_is_empty_and_can_be_continued(app: App, messages: dict[str, Any]) -> None:
    conversation_id = insert(app, **messages)
    history = await app.client.history(conversation_id)
    assert (history["messages"], history["lastEventId"]) == ([], f"{conversation_id}-0")
    assert (await listed(app))[conversation_id]["messageCount"] == 0
    assert (await app.client.http.post(f"/chat/{conversation_id}/retry")).json()["code"] == "nothing_to_retry"

    answer, _ = await app.client.turn("Hello", conversation_id)
    history = await app.client.history(conversation_id)
    assert [each["id"] for each in history["messages"]] == [answer["messageId"], answer["replyId"]]
    await check_stream(app, conversation_id)
    assert (await listed(app))[conversation_id]["title"] == "Hello"


@pytest.mark.parametrize("first", [{"messages": None}, {}], ids=str)
async def test_key_works_in_a_conversation_without_messages(app: App, first: dict[str, Any]) -> None:
    conversation_id = insert(app, **first)
    answers = [await app.client.say("Hello", conversation_id, "$$ROOT") for _ in range(2)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "ids",
    [
        [..., ..., ..., ..., ...],
        [ObjectId(), ..., ObjectId(), ..., ObjectId()],
        [..., ObjectId(), ObjectId(), ObjectId(), ...],
        ["text", 5, None, {"a": 1}, [ObjectId()]],
    ],
    ids=["none", "some", "inner", "other types"],
)
async def test_message_without_an_objectid_has_a_stable_id(make_app: MakeApp, ids: list[Any]) -> None:
    source = Script("an answer")
    app = await make_app(source=source)
    texts = ["Be kind.", "one", "two words", "three", "four words"]
    roles = ["system", "user", "assistant", "user", "assistant"]
    messages = [
        message(role, text, **({} if id_ is ... else {"_id": id_}))
        for role, text, id_ in zip(roles, texts, ids, strict=True)
    ]
    conversation_id, other = insert(app, messages=messages), insert(app, messages=messages)
    history = await app.client.history(conversation_id)
    found = [each["id"] for each in history["messages"]]
    assert all(re.fullmatch("[0-9a-f]{24}", each) for each in found) and len(set(found)) == 5
    assert [each["content"] for each in history["messages"]] == texts
    assert [str(id_) == each for id_, each in zip(ids, found, strict=True)] == [isinstance(e, ObjectId) for e in ids]
    theirs = [each["id"] for each in (await app.client.history(other))["messages"]]
    assert all(isinstance(id_, ObjectId) or a != b for id_, a, b in zip(ids, theirs, found, strict=True))
    await check_stream(app, conversation_id)

    pages: list[Any] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = await app.client.history(conversation_id, **query)
        pages = page["messages"] + pages
        if not page["hasMore"]:
            break
        query["before"] = page["messages"][0]["id"]
    assert pages == history["messages"]
    (event,) = await replayed(app, conversation_id, f"{found[2]}-4", 1)
    assert event.data["text"] == "words"
    assert (await replayed(app, conversation_id, f"{found[2][:16]}{5:08x}-done", 1))[0].name == "reset"

    answer, _ = await app.client.turn("More", conversation_id)
    after = await app.client.history(conversation_id)
    assert [each["id"] for each in after["messages"]] == [*found, answer["messageId"], answer["replyId"]]
    await check_stream(app, conversation_id)
    assert [each.content for each in source.prompts[-1].messages] == [*texts[1:], "More"]


async def test_stream_from_a_message_without_an_id_receives_a_new_turn(app: App) -> None:
    conversation_id = insert(app, messages=[message("user", "one"), message("assistant", "two")])
    last = (await app.client.history(conversation_id))["lastEventId"]
    transcript = Transcript()

    async def read() -> None:
        for event in await app.client.events(conversation_id, last):
            transcript.take(event)

    reading = asyncio.create_task(read())
    await app.until(lambda: app.subscribers == 1)
    answer = await app.client.say("More", conversation_id)
    await reading
    assert transcript.order == [answer["messageId"], answer["replyId"]]


@pytest.mark.parametrize("id_", [{}, {"_id": "text"}, {"_id": ObjectId()}], ids=["none", "text", "ObjectId"])
@pytest.mark.parametrize("between", [[], [message("tool", "{}")]], ids=["at once", "after a tool"])
async def test_failed_reply_that_another_application_stored_is_retried(
    make_app: MakeApp, id_: dict[str, Any], between: list[Any]
) -> None:
    source = Script("an answer")
    app = await make_app(source=source)
    other_id = {"_id": ObjectId()} if isinstance(id_.get("_id"), ObjectId) else id_
    failed = message("assistant", "half", status="failed", error={"code": "x", "message": "y"}, **other_id)
    conversation_id = insert(app, messages=[message("user", "question", **id_), *between, failed])
    before = await app.client.history(conversation_id)
    response = await app.client.http.post(f"/chat/{conversation_id}/retry")
    assert response.status_code == 202, response.text
    answer = response.json()
    assert answer["messageId"] == before["messages"][0]["id"]
    await app.client.events(conversation_id, f"{before['messages'][-1]['id']}-done")

    after = (await app.client.history(conversation_id))["messages"]
    assert after[:-1] == before["messages"][:-1]
    assert after[-1]["id"] == answer["replyId"] and after[-1]["content"] == "an answer"
    assert after[-1]["siblings"] == [before["messages"][-1]["id"], answer["replyId"]]
    every = (await app.client.history(conversation_id, branches="all"))["messages"]
    assert [each["status"] for each in every[-2:]] == ["failed", "complete"]
    assert [each.content for each in source.prompts[-1].messages] == ["question"]


@pytest.mark.parametrize(
    "messages",
    [
        [message("assistant", "x", status="failed")],
        [message("system", "x", status="failed")],
        [message("user", "x"), message("assistant", "y"), message("assistant", "x", status="failed")],
        [message("user", "x", status="failed")],
    ],
)
async def test_reply_without_a_question_cannot_be_retried(app: App, messages: list[Any]) -> None:
    conversation_id = insert(app, messages=messages)
    response = await app.client.http.post(f"/chat/{conversation_id}/retry")
    assert (response.status_code, response.json()["code"]) == (409, "nothing_to_retry")
    assert len((await app.client.history(conversation_id))["messages"]) == len(messages)


@pytest.mark.parametrize(
    ("document", "message_id", "created_at"),
    [
        ({"createdAt": TIME}, None, "2025-01-02T03:04:05.678Z"),
        ({"createdAt": "2025"}, ObjectId.from_datetime(TIME), "2025-01-02T03:04:05.000Z"),
        ({}, ObjectId.from_datetime(datetime(2009, 12, 31, tzinfo=UTC)), "2024-03-04T00:00:00.000Z"),
        ({}, ObjectId.from_datetime(datetime.now(UTC) + timedelta(days=2)), "2024-03-04T00:00:00.000Z"),
        ({}, 5, "2024-03-04T00:00:00.000Z"),
    ],
)
async def test_missing_time_is_taken_from_the_document_or_an_objectid(
    app: App, document: dict[str, Any], message_id: Any, created_at: str
) -> None:
    _id = ObjectId(ObjectId.from_datetime(datetime(2024, 3, 4, tzinfo=UTC)).binary[:4] + b"12345678")
    messages = [{"_id": message_id, "role": "user", "content": "x"}]
    app.database.conversations.insert_one({"_id": _id, "messages": messages, **document})
    history = await app.client.history(str(_id))
    assert history["messages"][0]["createdAt"] == created_at
    summary = (await listed(app))[str(_id)]
    assert summary["createdAt"] == history["createdAt"] == summary["updatedAt"]


async def test_other_roles_are_shown_and_not_sent_to_the_model(make_app: MakeApp) -> None:
    source = Script("an answer")
    app = await make_app(source=source, history_messages=3)
    roles = ["system", "user", "tool", "assistant", "developer", ""]
    messages = [message(role, f"by {role}", _id=ObjectId()) for role in roles]
    messages.append({"_id": ObjectId(), "content": "by nobody", "role": 5})
    conversation_id = insert(app, messages=messages)
    shown = (await app.client.history(conversation_id))["messages"]
    assert [each["role"] for each in shown] == [*roles, "unknown"]
    assert (await listed(app))[conversation_id]["title"] == "by user"
    await check_stream(app, conversation_id)
    first, *_ = await replayed(app, conversation_id, f"{conversation_id}-0", 1)
    assert (first.name, first.data) == (
        "message",
        {"messageId": shown[0]["id"], "role": "system", "text": "by system", "createdAt": shown[0]["createdAt"]},
    )
    events = await app.client.events(conversation_id, f"{conversation_id}-0")
    assert [each.name for each in events] == ["message", "input", "message", "token", "done"]

    await app.client.turn("More", conversation_id)
    assert [(each.role, each.content) for each in source.prompts[-1].messages] == [
        ("user", "by user"),
        ("assistant", "by assistant"),
        ("user", "More"),
    ]
    assert source.prompts[-1].turn == 2


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ([{"type": "text", "text": "Grüße"}], '[{"type": "text", "text": "Grüße"}]'),
        ({"a": ObjectId("0" * 24)}, '{"a": {"$oid": "000000000000000000000000"}}'),
        (5, "5"),
        (None, "null"),
        (["text"], '["text"]'),
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
async def test_content_that_is_not_a_string_is_shown_as_json_and_not_continued(
    app: App, role: str, content: Any, shown: str
) -> None:
    failed = message("assistant", "x", status="failed")
    conversation_id = insert(app, messages=[message(role, content), message("user", "question"), failed])
    before = await app.client.history(conversation_id)
    assert before["messages"][0]["content"] == shown
    await check_stream(app, conversation_id)
    for response in (
        await app.client.post("More", conversation_id),
        await app.client.post("More", conversation_id, key="k"),
        await app.client.http.post(f"/chat/{conversation_id}/retry"),
    ):
        assert (response.status_code, response.json()["code"]) == (409, "unsupported_conversation")
    assert await app.client.history(conversation_id) == before


def _has_only_arrays(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, list) for each in value)


@pytest.mark.process
async def test_fields_of_unexpected_types_break_no_conversation(app: App) -> None:
    """Each field is tried with each type; all documents of a field are in one list."""
    good, _ = await app.client.turn("Hello")
    whole = await app.client.history(good["conversationId"])
    shapes: list[Callable[[Any], dict[str, Any]]] = [
        lambda odd: {"messages": odd},
        lambda odd: {"messages": [odd]},
        lambda odd: {"messages": [message("user", "x"), odd, message("assistant", "y", _id=ObjectId())]},
        lambda odd: {"createdAt": odd, "messages": []},
        lambda odd: {"updatedAt": odd, "messages": []},
        lambda odd: {"reply": odd, "messages": []},
        lambda odd: {"reply": {"_id": odd}, "messages": []},
        lambda odd: {"messages": [{"role": "assistant", "content": "x", "status": odd, "error": odd}]},
        lambda odd: {"messages": [{"role": "user", "content": "x", "createdAt": odd, "key": odd}]},
        lambda odd: {"messages": [{"role": odd, "content": odd, "_id": odd}]},
        lambda odd: {"messages": [{"role": "assistant", "content": "x", "error": {"code": odd, "message": odd}}]},
    ]
    for shape in shapes:
        # In one batch, as in the batched reads, where one bad document would fail the others.
        ids = [ObjectId() for _ in ODD]
        documents = [{"_id": id_, "updatedAt": TIME, **shape(odd)} for id_, odd in zip(ids, ODD, strict=True)]
        app.database.conversations.insert_many(documents)
        # The list leaves out a conversation whose `updatedAt` is an array without other values than arrays.
        unlisted = {str(each["_id"]) for each in documents if _has_only_arrays(each["updatedAt"])}
        assert {str(each) for each in ids} - unlisted <= set(await listed(app))
        names = [str(each) for each in ids] + [good["conversationId"]]
        records = await asyncio.gather(*(app.store.peek(Key(None, each)) for each in names))
        assert all(record is not None for record in records)
        for document in documents:
            name = str(document["_id"])
            await check_stream(app, name, whole=True)
            response = await app.client.post("More", name)
            assert response.status_code in (202, 409), (document, response.text)
            response = await app.client.http.post(f"/chat/{name}/retry")
            assert response.status_code in (202, 409), (document, response.text)
        await app.until(lambda: not app.replies.running)
        assert await app.store.find_expired([]) == []
        assert await app.client.history(good["conversationId"]) == whole
        app.database.conversations.delete_many({"_id": {"$in": ids}})


@pytest.mark.parametrize("id_", ["0" * 24, 5, {"a": 1}, datetime(2020, 1, 1, tzinfo=UTC)], ids=str)
async def test_conversation_whose_id_is_not_an_objectid_is_not_listed(app: App, id_: Any) -> None:
    good, _ = await app.client.turn("Hello")
    stored = {"_id": id_, "messages": [], "reply": {"_id": ObjectId()}}
    app.database.conversations.insert_many([{**stored, "updatedAt": TIME}, {"_id": ObjectId(), "messages": []}])
    assert len(await listed(app)) == 2
    assert await app.store.find_expired([], sole_server=True) == []
    assert (await app.client.http.get("/chat/" + "0" * 24)).status_code == 404
    await app.client.turn("More", good["conversationId"])


@pytest.mark.expects_log("the database rejected a call \\(list\\)")
async def test_text_that_is_not_utf8_is_read(app: App) -> None:
    good, _ = await app.client.turn("Hello")
    valid = {"_id": ObjectId(), "updatedAt": TIME, "messages": [message("user", "XXXX")]}
    raw = encode(valid).replace(b"XXXX", b"\xff\xfe\xfd\xfc")
    app.database.conversations.insert_one(RawBSONDocument(raw))
    assert (await app.client.history(str(valid["_id"])))["messages"][0]["content"] == "\ufffd" * 4
    titles = {name: each["title"] for name, each in (await listed(app)).items()}
    assert titles == {str(valid["_id"]): "", good["conversationId"]: "Hello"}
    for title in ("Chosen", None):
        renamed = await app.client.http.patch(f"/chat/{valid['_id']}", json={"title": title})
        assert (renamed.status_code, renamed.json().get("title")) == (200, title or "")


@pytest.mark.expects_log("the database rejected a call \\(begin\\): code 121")
async def test_write_that_mongodb_rejects_is_an_internal_error_and_not_an_outage(app: App) -> None:
    conversations = app.database.db.create_collection
    app.database.db.drop_collection("conversations")
    conversations("conversations", validator={"owner": {"$exists": True}})
    response = await app.client.post("Hello")
    assert (response.status_code, response.json()["code"]) == (500, "internal")
    assert "does not answer" not in response.text and "Retry-After" not in response.headers
    assert (await app.client.http.get("/readyz")).status_code == 200
    metrics = (await app.client.http.get("/metrics")).text
    assert 'chatserver_store_errors_total{operation="begin"}' not in metrics


async def test_document_of_16_mb_takes_no_title_and_no_head(app: App) -> None:
    conversation_id, first, last = ObjectId(), ObjectId(), ObjectId()
    messages = [message("user", "", _id=first), message("user", "", _id=last, parent=None)]
    full: dict[str, Any] = {"_id": conversation_id, "createdAt": TIME, "updatedAt": TIME, "messages": messages}
    messages[0]["content"] = "x" * (16 * 1024 * 1024 - len(encode(full)))
    app.database.conversations.insert_one(full)
    path = f"/chat/{conversation_id}"

    renamed = await app.client.http.patch(path, json={"title": "Title"})
    switched = await app.client.http.put(f"{path}/head", json={"messageId": str(first)})

    assert_problem(renamed, 409, "conversation_full")
    assert_problem(switched, 409, "conversation_full")


VARIANTS = ["plain", "timestamps", "timesOfMessages", "withoutIds", "withoutAnything"]
"""The models of `mongoose.mjs`."""


async def mongoose(app: App, action: str, ids: dict[str, str]) -> dict[str, Any]:
    """Run `mongoose.mjs` on a server's database; return what it prints."""
    process = await asyncio.create_subprocess_exec(
        "node", MONGOOSE, app.database.uri, action, json.dumps(ids), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await asyncio.wait_for(process.communicate(), 50)
    answers: dict[str, Any] = json.loads(out)
    return answers


@pytest.mark.needs("node")
async def test_mongoose_models_keep_the_owner_and_create_conversations_of_nobody(make_app: MakeApp) -> None:
    app = await make_app(source=Script("an answer"), **USERS)
    app.client.http.headers.update(bearer("alice"))
    ids = {each: (await app.client.turn("Hello"))[0]["conversationId"] for each in VARIANTS}

    written = await mongoose(app, "write", ids)

    for id_ in ids.values():
        shown = (await app.client.history(id_))["messages"]
        assert [each["content"] for each in shown] == ["Hello", "an answer", "from Mongoose", "indeed"]
        stored = app.database.conversations.find_one({"_id": ObjectId(id_)})
        assert stored is not None and stored["owner"] == "alice"
    assert set(await listed(app)) == set(ids.values())
    for each in written.values():
        assert_problem(await app.client.http.get(f"/chat/{each['created']}"), 404, "not_found")


@pytest.mark.needs("node")
async def test_mongoose_models_read_write_and_share_the_collection(make_app: MakeApp) -> None:
    source = Script("an answer")
    app = await make_app(source=source)
    ids = {each: (await app.client.turn("Hello"))[0]["conversationId"] for each in VARIANTS}
    hello = [["user", "Hello"], ["assistant", "an answer"]]
    more = [["user", "from Mongoose"], ["assistant", "indeed"]]
    written = await mongoose(app, "write", ids)
    for name, id_ in ids.items():
        assert written[name]["seen"] == hello
        shown = (await app.client.history(id_))["messages"]
        assert [[each["role"], each["content"]] for each in shown] == hello + more
        await check_stream(app, id_)
        await app.client.turn("and on", id_)
        assert [each.content for each in source.prompts[-1].messages][-3:] == ["from Mongoose", "indeed", "and on"]
        created = written[name]["created"]
        assert [each["content"] for each in (await app.client.history(created))["messages"]] == ["Be kind.", "created"]
        await app.client.turn("and on", created)
        await check_stream(app, created)
    assert set(await listed(app)) == {*ids.values(), *(each["created"] for each in written.values())}

    onward = [["user", "and on"], ["assistant", "an answer"]]
    again = await mongoose(app, "read", ids)
    assert all(each["seen"] == hello + more + onward for each in again.values())
    created = await mongoose(app, "read", {name: each["created"] for name, each in written.items()})
    assert all(each["seen"] == [["system", "Be kind."], ["user", "created"], *onward] for each in created.values())
