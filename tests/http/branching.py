"""Steps that the tests of conversations with branches share."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from bson import ObjectId

from chatserver.replies.leases import Leases
from tests.apps import App, MakeApp, Script
from tests.clients import Event, new_id
from tests.http.turns import AGES_AGO, document, release


async def post(app: App, conversation_id: str | None, text: str, key: str | None = None, **body: Any) -> httpx.Response:
    """Post a message; `parentId` may be among the other fields of the body."""
    known = {} if conversation_id is None else {"conversationId": conversation_id}
    headers = {} if key is None else {"Idempotency-Key": key}
    return await app.client.http.post("/chat", json={"input": text, **known, **body}, headers=headers)


async def say(app: App, conversation_id: str, text: str, **body: Any) -> dict[str, str]:
    """Post a message, and wait until its reply has ended; return the answer."""
    return await _ended(app, await post(app, conversation_id, text, **body))


async def ask_retry(app: App, conversation_id: str, message_id: str | None = None, key: str | None = None) -> Any:
    headers = {} if key is None else {"Idempotency-Key": key}
    body = {} if message_id is None else {"messageId": message_id}
    return await app.client.http.post(f"/chat/{conversation_id}/retry", json=body, headers=headers)


async def retry(app: App, conversation_id: str, message_id: str | None = None) -> dict[str, str]:
    """Retry a reply, and wait until the new one has ended; return the answer."""
    return await _ended(app, await ask_retry(app, conversation_id, message_id))


async def _ended(app: App, response: httpx.Response) -> dict[str, str]:
    assert response.status_code == 202, response.text
    await app.until(lambda: not app.replies.running)
    answer: dict[str, str] = response.json()
    return answer


async def ask_show(app: App, conversation_id: str, message_id: str) -> httpx.Response:
    return await app.client.http.put(f"/chat/{conversation_id}/head", json={"messageId": message_id})


async def show(app: App, conversation_id: str, message_id: str) -> str:
    """Show another branch; return the new head."""
    response = await ask_show(app, conversation_id, message_id)
    assert response.status_code == 200, response.text
    assert response.json()["conversationId"] == conversation_id
    head: str = response.json()["messageId"]
    return head


async def ask_rename(app: App, conversation_id: str, title: object) -> httpx.Response:
    return await app.client.http.patch(f"/chat/{conversation_id}", json={"title": title})


async def rename(app: App, conversation_id: str, title: str | None) -> dict[str, Any]:
    response = await ask_rename(app, conversation_id, title)
    assert response.status_code == 200, response.text
    summary: dict[str, Any] = response.json()
    return summary


async def everything(app: App, conversation_id: str) -> dict[str, Any]:
    """Return all messages of all branches."""
    return await app.client.history(conversation_id, branches="all")


async def path(app: App, conversation_id: str, **query: Any) -> list[str]:
    """Return the ids of the active path, or of a page of it."""
    return [each["id"] for each in (await app.client.history(conversation_id, **query))["messages"]]


async def listed(app: App) -> list[dict[str, Any]]:
    conversations: list[dict[str, Any]] = (await app.client.http.get("/chat")).json()["conversations"]
    return conversations


@asynccontextmanager
async def following(app: App, conversation_id: str, position: str = "") -> AsyncIterator[list[Event]]:
    """Yield a list that receives the events of an open stream; it has all of them after the block."""
    events: list[Event] = []

    async def follow() -> None:
        async for event in app.client.stream(conversation_id, position):
            events.append(event)

    before = app.subscribers
    stream = asyncio.create_task(follow())
    await app.until(lambda: app.subscribers > before or stream.done())
    yield events
    await app.until(lambda: not app.replies.running and not any(live.is_dirty for live in app.hub.conversations))
    await app.end_streams()
    await stream


async def tree(app: App) -> tuple[str, dict[str, str]]:
    """Make a conversation with branches; return its id, and the ids of its messages by short names.

        q1 ── a1 ─┬─ q2 ─┬─ a2 ── q5 ── a5
                  │      └─ a2'
                  └─ q3 ── a3
        q4 ── a4

    In the array: q1 a1 q2 a2 a2' q3 a3 q4 a4 q5 a5. The head is a5.
    """
    conversation_id = new_id()
    ids: dict[str, str] = {}

    async def add(number: int, **body: Any) -> None:
        answer = await say(app, conversation_id, f"question {number}", **body)
        ids[f"q{number}"], ids[f"a{number}"] = answer["messageId"], answer["replyId"]

    await add(1)
    await add(2)
    ids["a2'"] = (await retry(app, conversation_id))["replyId"]
    await add(3, parentId=ids["a1"])
    await add(4, parentId=None)
    await show(app, conversation_id, ids["a2"])
    await add(5)
    return conversation_id, ids


async def gated_tree(make_app: MakeApp) -> tuple[App, Script, str, dict[str, str]]:
    """Make a `tree` on a server whose source waits at its gate from then on; return server, source, id and ids."""
    source = Script("text")
    app = await make_app(source=source)
    conversation_id, ids = await tree(app)
    source.gate = asyncio.Semaphore(0)
    return app, source, conversation_id, ids


async def lost_retry(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> tuple[App, str, dict[str, str], dict[str, str]]:
    """Retry `a2` of a `tree` with the key "key" on a server that stops at "kept"; the lease of the reply has expired.

    :return: another server, which ends no expired reply unasked, the conversation's id, the ids, the retry's answer
    """
    monkeypatch.setattr(Leases, "sweep", lambda _: asyncio.sleep(3600))
    lost, source, conversation_id, ids = await gated_tree(make_app)
    source.pieces = ("kept", "lost")
    release(source)
    answer = (await ask_retry(lost, conversation_id, ids["a2"], "key")).json()
    await lost.until(lambda: document(lost, conversation_id)["reply"]["content"] == "kept")
    await lost.server.background.close()
    lost.database.conversations.update_one({"_id": ObjectId(conversation_id)}, AGES_AGO)
    return await make_app(), conversation_id, ids, answer


ORDER = ["q1", "a1", "q2", "a2", "a2'", "q3", "a3", "q4", "a4", "q5", "a5"]
"""The messages of `tree` in the order of the array."""
PARENTS = {
    "q1": None,
    "a1": "q1",
    "q2": "a1",
    "a2": "q2",
    "a2'": "q2",
    "q3": "a1",
    "a3": "q3",
    "q4": None,
    "a4": "q4",
    "q5": "a2",
    "a5": "q5",
}
PATH = ["q1", "a1", "q2", "a2", "q5", "a5"]
"""The active path of `tree`."""
