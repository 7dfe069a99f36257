"""Streams of conversations with branches: heads, from every position, on several servers, of long conversations."""

import asyncio
from typing import Any

import pytest
from bson import ObjectId

from tests.apps import App, MakeApp, Script
from tests.clients import Event, RawStream, new_id, text_of
from tests.http.branching import (
    ask_retry,
    everything,
    following,
    gated_tree,
    path,
    post,
    rename,
    retry,
    say,
    show,
    tree,
)
from tests.http.conftest import TIME
from tests.http.turns import document, gated, insert_conversation, release, said
from tests.trees import View, at_position, expected_events, names_of, path_to, shown

pytestmark = pytest.mark.gen_test


def heads(events: list[Event]) -> list[str | None]:
    return [each.data["messageId"] for each in events if each.name == "head"]


async def events_from(app: App, conversation_id: str, position: str) -> list[Event]:
    """Return all events of a stream that is opened at a position while no reply runs."""
    async with following(app, conversation_id, position) as events:
        pass
    return events


def positions_of(history: dict[str, Any]) -> list[tuple[int, int | None]]:
    """Return every position of a history: the index of a message, and how much of it was received."""
    found: list[tuple[int, int | None]] = [(-1, None)]
    for index, each in enumerate(history["messages"]):
        chars = range(len(each["content"]) + 1) if each["role"] == "assistant" else [0]
        found += [(index, number) for number in chars]
        found += [(index, None)] if each["status"] != "streaming" else []
    return found


def text_at(history: dict[str, Any], index: int, chars: int | None) -> str:
    if index < 0:
        return f"{history['conversationId']}-0"
    return f"{history['messages'][index]['id']}-{'done' if chars is None else chars}"


async def assert_streams_from_everywhere_lead_to_the_history(app: App, conversation_id: str) -> None:
    """Open a stream at each position: its events are the expected ones, and the client then shows the history."""
    whole, plain = await everything(app, conversation_id), await app.client.history(conversation_id)
    expected_view = [shown(each).values for each in plain["messages"]]
    for index, chars in positions_of(whole):
        expected = expected_events(whole, index, chars)
        events: list[Event] = []
        async for event in app.client.stream(conversation_id, text_at(whole, index, chars)):
            events.append(event)
            if names_of(events) == expected and event.id == plain["lastEventId"]:
                break
            assert len(events) < 100, (index, chars, names_of(events), expected)
        view = at_position(whole, index, chars)
        view.open()
        for event in events:
            view.take(event)
        if view.is_stale:
            # It was sent a head that it had dropped.
            assert heads(events)[-1] in [each["id"] for each in whole["messages"]]
            view.load(plain)
        if view.running is not None and view.running.id is None:
            view.running.id = plain["messages"][-1]["id"]
        assert view.values == expected_view, (index, chars)


@pytest.mark.parametrize("at", ["a5", "a4", "a3", "a2'"])
@pytest.mark.parametrize("in_memory", [True, False])
async def test_stream_from_every_position_leads_to_the_history(make_app: MakeApp, at: str, in_memory: bool) -> None:
    """Also where the last turns are still in memory, for a subscriber that does not read."""
    app = await make_app(source=Script("Once ", "😀"))
    conversation_id, ids = await tree(app)
    slow = RawStream(app.port, f"/chat/stream/{conversation_id}")
    if in_memory:
        await slow.open()
        await app.until(lambda: app.subscribers == 1)
        (connection,) = app.streams.connections
        connection.ready = False
        await retry(app, conversation_id, ids["a1"])
        await say(app, conversation_id, "More", parentId=ids["a3"])
    await show(app, conversation_id, ids[at])

    await assert_streams_from_everywhere_lead_to_the_history(app, conversation_id)

    if in_memory:
        slow.close()


@pytest.mark.parametrize("what", ["post", "edit", "retry"])
async def test_stream_from_every_position_leads_to_the_running_reply(make_app: MakeApp, what: str) -> None:
    source = Script("Once ", "upon ", "a")
    app, other = await make_app(source=source, checkpoint_ms=20), await make_app(checkpoint_ms=20)
    conversation_id, ids = await tree(app)
    source.gate = asyncio.Semaphore(2)
    if what == "retry":
        await ask_retry(app, conversation_id, ids["a2"])
    else:
        await post(app, conversation_id, "More", **({"parentId": ids["a1"]} if what == "edit" else {}))
    await said(app, conversation_id, 10)
    await app.until(lambda: document(app, conversation_id)["reply"]["content"] == "Once upon ")

    for each in (app, other):
        await assert_streams_from_everywhere_lead_to_the_history(each, conversation_id)

    release(source)
    await app.until_idle()


async def test_stream_of_a_conversation_without_branches_has_no_head(app: App) -> None:
    conversation_id = new_id()
    await say(app, conversation_id, "one")
    async with following(app, conversation_id, f"{conversation_id}-0") as events:
        await say(app, conversation_id, "two")

    assert not heads(events) and [each.name for each in events if each.name != "token"] == ["input", "done"] * 2


async def test_stream_opens_with_preamble_ping_title_and_head(app: App) -> None:
    conversation_id, ids = await tree(app)
    await rename(app, conversation_id, "Chosen")
    await show(app, conversation_id, ids["a4"])
    stream = await RawStream(app.port, f"/chat/stream/{conversation_id}?lastEventId={ids['a5']}-done").open()

    blocks = [(await stream.reader.readuntil(b"\n\n")).decode() for _ in range(4)]

    assert [block.split("\n")[:-2] for block in blocks] == [
        ["retry: 1000", ": chatserver", "event: stream", f"id: {ids['a5']}-done"],
        ["event: ping", 'data: {"everyS":15}'],
        ["event: title", 'data: {"title":"Chosen"}'],
        ["event: head", f'data: {{"messageId":"{ids["a4"]}"}}'],
    ]
    stream.close()


async def test_open_stream_receives_the_head_before_each_branch(app: App) -> None:
    conversation_id = new_id()
    async with following(app, conversation_id, f"{conversation_id}-0") as events:
        first = await say(app, conversation_id, "one")
        second = await retry(app, conversation_id)
        third = await say(app, conversation_id, "two")
        edited = await say(app, conversation_id, "edited", parentId=second["replyId"])
        top = await say(app, conversation_id, "top", parentId=None)

    assert names_of(events) == [
        *(("input", first["messageId"]), ("token", first["replyId"]), ("end", first["replyId"])),
        *(("head", first["messageId"]), ("token", second["replyId"]), ("end", second["replyId"])),
        *(("input", third["messageId"]), ("token", third["replyId"]), ("end", third["replyId"])),
        *(("head", second["replyId"]), ("input", edited["messageId"])),
        *(("token", edited["replyId"]), ("end", edited["replyId"])),
        *(("head", None), ("input", top["messageId"]), ("token", top["replyId"]), ("end", top["replyId"])),
    ]
    view = View()
    for event in events:
        view.take(event)
    history = await app.client.history(conversation_id)
    assert not view.is_stale and view.values == [shown(each).values for each in history["messages"]]


async def test_head_leaves_the_position(app: App) -> None:
    conversation_id, ids = await tree(app)
    end = f"{ids['a5']}-done"
    async with following(app, conversation_id, end) as events:
        for each in ("a4", "a3", "a3", "a5"):
            await show(app, conversation_id, ids[each])

    assert heads(events) == [ids[each] for each in ("a5", "a4", "a3", "a5")]
    assert {each.id for each in events} == {end}


async def test_first_switch_reaches_open_streams(app: App) -> None:
    """Of a conversation whose branches another application stored."""
    conversation_id, ids = await tree(app)
    app.database.conversations.update_one({"_id": ObjectId(conversation_id)}, {"$unset": {"head": ""}})

    async with following(app, conversation_id, f"{ids['a5']}-done") as events:
        await show(app, conversation_id, ids["a4"])

    assert heads(events)[-1] == ids["a4"]
    assert heads(await events_from(app, conversation_id, f"{ids['a5']}-done")) == [ids["a4"]]


@pytest.mark.parametrize("source", [(), ("text",)])
async def test_regenerated_reply_ends_with_its_head_before_it(make_app: MakeApp, source: tuple[str, ...]) -> None:
    """A reply without text has nothing but its end, which must not follow the reply before it."""
    script = Script(*source)
    app = await make_app(source=script)
    conversation_id = new_id()
    first = await say(app, conversation_id, "Hello")

    async with following(app, conversation_id, f"{first['replyId']}-done") as events:
        second = await retry(app, conversation_id)

    tokens = [("token", second["replyId"])] if source else []
    assert names_of(events) == [("head", first["messageId"]), *tokens, ("end", second["replyId"])]


async def test_stream_until_done_ends_after_a_regenerated_reply(make_app: MakeApp) -> None:
    app, source, conversation_id, ids = await gated_tree(make_app)
    answer = (await ask_retry(app, conversation_id, ids["a2"])).json()
    following_reply = asyncio.create_task(app.client.events(conversation_id, answer["lastEventId"]))
    await app.until(lambda: app.subscribers == 1)
    release(source)

    assert names_of(await following_reply) == [
        ("head", ids["q2"]),
        ("token", answer["replyId"]),
        ("end", answer["replyId"]),
    ]
    await app.until_idle()
    # A stored reply, likewise.
    again = await app.client.events(conversation_id, answer["lastEventId"])
    assert names_of(again)[0] == ("head", ids["q2"]) and again[-1].name == "done"


async def test_stream_without_a_position_opens_with_the_head(app: App) -> None:
    conversation_id, ids = await tree(app)
    await show(app, conversation_id, ids["a4"])

    events = await events_from(app, conversation_id, "")

    assert names_of(events) == [("head", ids["a4"])]


# -- several servers -----------------------------------------------------------------------------------------------


async def test_branch_shown_on_another_server_is_shown_to_new_streams(make_app: MakeApp) -> None:
    here, there = await make_app(), await make_app()
    conversation_id, ids = await tree(here)
    end = f"{ids['a5']}-done"
    async with following(there, conversation_id, end) as older:
        await show(here, conversation_id, ids["a4"])
        await rename(here, conversation_id, "Chosen")

        async with following(there, conversation_id, end) as newer:
            pass

    assert [each.name for each in newer] == ["title", "head"] and heads(newer) == [ids["a4"]]
    # The stream that was open there learns of it as well.
    assert heads(older) == [ids["a5"], ids["a4"]]
    assert [each.data["title"] for each in older if each.name == "title"] == ["Chosen"]


async def test_branch_begun_on_another_server_is_followed(make_app: MakeApp) -> None:
    source = Script("one ", "two")
    writer, other = await make_app(source=source, checkpoint_ms=20), await make_app(checkpoint_ms=20)
    conversation_id, ids = await tree(writer)
    end = f"{ids['a5']}-done"
    source.gate = asyncio.Semaphore(1)
    answer = (await ask_retry(writer, conversation_id, ids["a2"])).json()
    await writer.until(lambda: document(writer, conversation_id)["reply"]["content"] == "one ")

    following_reply = asyncio.create_task(other.client.events(conversation_id, end))
    await said(other, conversation_id, 4)
    inside = asyncio.create_task(other.client.events(conversation_id, f"{answer['replyId']}-2"))
    ahead = asyncio.create_task(other.client.events(conversation_id, f"{answer['replyId']}-6"))
    await other.until(lambda: sum(len(live.all_subscribers) for live in other.hub.conversations) == 3)
    release(source)

    assert names_of(await following_reply) == [
        ("head", ids["q2"]),
        ("token", answer["replyId"]),
        ("end", answer["replyId"]),
    ]
    for each, text in ((await inside, "e two"), (await ahead, "o")):
        assert heads(each) == [answer["replyId"]] and text_of(each) == text and each[-1].name == "done"


# -- long conversations --------------------------------------------------------------------------------------------


def insert_tree(app: App, name: str, head: int = -1) -> tuple[str, list[int | None]]:
    """Store a conversation of `LONG` in which questions and replies alternate along each path.

    :param head: the index of the message at the end of the active path
    :return: its id, and the index of each message's parent
    """
    texts, parents = LONG[name]
    ids = [ObjectId() for _ in texts]
    roles: list[str] = []
    messages: list[dict[str, Any]] = []
    for index, (text, parent) in enumerate(zip(texts, parents, strict=True)):
        roles.append("assistant" if parent is not None and roles[parent] == "user" else "user")
        stored = {"_id": ids[index], "role": roles[index], "content": text, "createdAt": TIME}
        messages.append({**stored, "parent": None if parent is None else ids[parent]})
    shown_head = {"_id": ids[head], "length": len(ids)}
    return insert_conversation(app, messages=messages, head=shown_head), parents


def linear_but(count: int, *branches: tuple[int, int | None]) -> list[int | None]:
    """Return the parents of some messages: each continues the one before it, but for some."""
    return [dict(branches).get(index, index - 1 if index else None) for index in range(count)]


LONG: dict[str, tuple[list[str], list[int | None]]] = {
    # The texts, and the index of each message's parent.
    "many": ([f"{number}" for number in range(4500)], linear_but(4500, (10, None), (2050, 2047), (4400, 4397))),
    "large": (["😀" * 20_000] * 40, [None, None, *range(38)]),
    "divided": (["q", "é" * 300_000, "z" * 300_000, "q", "x" * 400_000], [None, 0, 0, 2, 3]),
    "around the limit": (["q", "x" * 131_000, "y" * 131_000, "z" * 20], [None, 0, 0, 0]),
}


@pytest.mark.parametrize("name", LONG)
async def test_long_conversation_with_branches_is_complete(app: App, name: str) -> None:
    texts = LONG[name][0]
    conversation_id, parents = insert_tree(app, name)
    along = []
    index: int | None = len(texts) - 1
    while index is not None:
        along.append(texts[index])
        index = parents[index]

    history, whole = await app.client.history(conversation_id), await everything(app, conversation_id)

    assert [each["content"] for each in history["messages"]] == along[::-1]
    assert [each["content"] for each in whole["messages"]] == texts
    ids = [each["id"] for each in whole["messages"]]
    assert [each["parentId"] for each in whole["messages"]] == [None if at is None else ids[at] for at in parents]
    assert whole["head"] == ids[-1] and history["lastEventId"] == whole["lastEventId"]
    page = await app.client.history(conversation_id, limit=2)
    assert page["messages"] == history["messages"][-2:]
    older = await app.client.history(conversation_id, limit=1000, before=page["messages"][-1]["id"])
    assert older["messages"] == history["messages"][-1001:-1]


@pytest.mark.parametrize("name", LONG)
async def test_stream_of_a_long_conversation_with_branches_leads_to_its_history(app: App, name: str) -> None:
    conversation_id, _ = insert_tree(app, name, head=-2)
    history, whole = await app.client.history(conversation_id), await everything(app, conversation_id)
    ids = [each["id"] for each in whole["messages"]]

    events = await events_from(app, conversation_id, f"{conversation_id}-0")

    # No head in the middle of a reply: it would name a reply whose id the client does not know yet.
    assert names_of(events) == expected_events(whole, -1, None)
    view = View()
    view.open()
    for event in events:
        view.take(event)
        if view.is_stale:
            # It had dropped this branch. A client fetches the history; this one has it as the stream has.
            view.load({"messages": path_to(whole["messages"], event.data["messageId"])})
    assert [each.text for each in view.messages] == [each["content"] for each in history["messages"]]
    middle = await events_from(app, conversation_id, f"{ids[-1]}-1")
    assert names_of(middle)[0] == ("head", ids[-1]) and heads(middle)[-1] == whole["head"]


async def test_long_conversation_with_branches_continues(make_app: MakeApp) -> None:
    source = gated("text", said=99)
    app = await make_app(source=source)
    conversation_id, _ = insert_tree(app, "many")
    before = await path(app, conversation_id)
    other = (await everything(app, conversation_id))["messages"][4399]["id"]

    answer = await say(app, conversation_id, "More")

    assert await path(app, conversation_id) == [*before, answer["messageId"], answer["replyId"]]
    assert source.prompts[-1].turn == len(before) // 2 + 1
    await show(app, conversation_id, other)
    assert (await path(app, conversation_id))[-1] == other
    assert len(document(app, conversation_id)["messages"]) == 4502
