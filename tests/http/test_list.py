"""The list of conversations: its order, its pages while conversations move, its cursors, its titles."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import ObjectId, datetime_ms

from chatserver.store import documents
from tests.apps import App, MakeApp, Script
from tests.clients import new_id

pytestmark = pytest.mark.gen_test


def document(app: App, conversation_id: str) -> Any:
    return app.database.conversations.find_one({"_id": ObjectId(conversation_id)})


async def walk(app: App, limit: int = 2, between: Callable[[], Any] | None = None) -> list[str]:
    """Return the ids of the list, page by page; `between` is awaited after each page."""
    seen: list[str] = []
    query: dict[str, str] = {"limit": str(limit)}
    while True:
        response = await app.client.http.get("/chat", params=query)
        assert response.status_code == 200, response.text
        page = response.json()
        seen += [each["conversationId"] for each in page["conversations"]]
        if (cursor := page.get("nextCursor")) is None:
            return seen
        query["cursor"] = cursor
        if between is not None:
            await between()


async def test_walk_shows_no_conversation_twice_while_some_move_up(app: App) -> None:
    ids = [(await app.client.say(f"Number {n}, and more than fits into a title of at most sixty characters"))[
        "conversationId"
    ] for n in range(7)]  # fmt: skip
    await app.until_idle()
    # Some have the same time, so that the order must not depend on it alone.
    time = document(app, ids[3])["updatedAt"]
    app.database.conversations.update_many(
        {"_id": {"$in": [ObjectId(each) for each in ids[2:5]]}}, {"$set": {"updatedAt": time}}
    )

    async def move() -> None:
        await app.client.say("a new one")
        await app.until_idle()
        await app.client.turn("touched", ids[1])
        await app.client.turn("touched", ids[6])

    seen = await walk(app, between=move)
    assert len(seen) == len(set(seen))
    assert set(ids) - set(seen) == {ids[1]}  # it moved up before its page was read

    page = (await app.client.http.get("/chat", params={"limit": "3"})).json()["conversations"]
    assert [each["conversationId"] for each in page][:2] == [ids[6], ids[1]]
    whole = (await app.client.http.get("/chat", params={"limit": "100"})).json()["conversations"]
    assert [each["updatedAt"] for each in whole] == sorted((each["updatedAt"] for each in whole), reverse=True)
    assert page[1]["title"] == "Number 1, and more than fits into a title of at most sixty…"
    assert page[1]["status"] == "idle" and page[1]["messageCount"] == len(document(app, ids[1])["messages"])


async def test_order_changes_only_when_a_turn_starts_or_ends(make_app: MakeApp) -> None:
    source = Script("one ", "two", gate=asyncio.Semaphore(0))
    app = await make_app(source=source)
    first, second = new_id(), new_id()
    await app.client.say("Hello", first)
    await asyncio.sleep(0.002)
    await app.client.say("Hello", second)
    assert await walk(app) == [second, first]

    assert source.gate is not None
    source.gate.release()
    await app.until(lambda: document(app, first)["reply"]["content"] == "one ")
    assert await walk(app) == [second, first]  # a checkpoint does not count as activity

    source.gate.release()
    await app.client.http.post(f"/chat/{second}/stop")
    source.gate.release()
    await app.until(lambda: "reply" not in document(app, second))
    ended = document(app, second)["updatedAt"]
    await asyncio.sleep(0.002)
    await app.client.http.post(f"/chat/{first}/stop")
    await app.until_idle()
    assert document(app, first)["updatedAt"] > ended
    assert await walk(app) == [first, second]


async def test_conversation_does_not_move_down_when_the_clock_is_set_back(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation_id = new_id()
    await app.client.turn("Hello", conversation_id)
    before = document(app, conversation_id)["updatedAt"]
    monkeypatch.setattr(documents, "now", lambda: before - timedelta(hours=1))
    await app.client.turn("More", conversation_id)

    assert len(document(app, conversation_id)["messages"]) == 4
    assert document(app, conversation_id)["updatedAt"] == before


async def test_conversations_without_a_time_are_listed_last(app: App) -> None:
    time = datetime(2026, 1, 1, tzinfo=UTC)
    dated = [{"_id": ObjectId(), "updatedAt": time + timedelta(seconds=n // 2), "messages": []} for n in range(4)]
    beyond_python = datetime_ms.DatetimeMS(2**62)
    odd = [None, "2026-01-01T00:00:00Z", 5, {"a": 1}, True]
    undated = [{"_id": ObjectId(), "messages": []}, *({"_id": ObjectId(), "updatedAt": each} for each in odd)]
    app.database.conversations.insert_many([*undated, *dated])
    dated = [{"_id": ObjectId(), "updatedAt": beyond_python, "messages": []}, *dated]
    app.database.conversations.insert_one(dated[0])
    expected = [dated[0], *sorted(dated[1:], key=lambda each: (each["updatedAt"], each["_id"]), reverse=True)]
    expected += sorted(undated, key=lambda each: each["_id"], reverse=True)  # type: ignore[arg-type, return-value]
    for limit in (1, 3, 4, 5, 100):
        assert await walk(app, limit) == [str(each["_id"]) for each in expected]


async def test_invalid_cursor_is_refused_with_a_clear_detail(app: App) -> None:
    former = f"{1790000000000:014}-{new_id()}"
    for cursor in (former, "x", "1-2", f"u-{new_id()}", f"m{0:016}-{new_id()}", f"u{10**16}-{new_id()}"):
        response = await app.client.http.get("/chat", params={"cursor": cursor})
        assert response.status_code == 400, cursor
        assert "/cursor must be the nextCursor of a page of this list" in response.json()["detail"]
    response = await app.client.http.get("/chat", params={"cursor": f"u{0:016}-{new_id()}\n"})
    assert response.status_code == 400


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("\U0001f469\u200d\U0001f469\u200d\U0001f467" * 61, "\U0001f469\u200d\U0001f469\u200d\U0001f467" * 60 + "…"),
        ("e\u0301" * 61, "e\u0301" * 60 + "…"),
        ("\U0001f1e9\U0001f1ea" * 60, "\U0001f1e9\U0001f1ea" * 60),
        ("x" * 59 + " \U0001f44d\U0001f3fd" * 2, "x" * 59 + "…"),
        ("a" + "\u0301" * 500, "…"),
        ("  one\r\n two\t", "one two"),
        ("x" * 400, "x" * 60 + "…"),
    ],
)
async def test_title_is_truncated_between_grapheme_clusters(app: App, text: str, title: str) -> None:
    await app.client.say(text)
    (only,) = (await app.client.http.get("/chat")).json()["conversations"]
    assert only["title"] == title
