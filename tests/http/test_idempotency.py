"""Idempotency keys: the same answer for the same request."""

import asyncio
from typing import Any

import pytest

from chatserver.errors import KeyReused
from tests.apps import App, Database, running
from tests.clients import new_id
from tests.http.turns import document, gated, release

pytestmark = pytest.mark.gen_test


@pytest.mark.parametrize("known", [False, True])
async def test_same_key_always_gets_the_first_answer(database: Database, known: bool) -> None:
    conversation_id = new_id() if known else None
    source = gated("x", "y")
    async with running(App(database, source=source)) as app:
        responses = await asyncio.gather(*(app.client.post("Hello", conversation_id, "key") for _ in range(6)))
        assert [response.status_code for response in responses] == [202] * 6
        first = responses[0].json()
        assert all(response.json() == first for response in responses)
        assert (await app.client.post("Other", conversation_id, "key")).status_code == 422
        release(source, 2)
        await app.until_idle()
        assert await app.client.say("Hello", conversation_id, "key") == first
        app.replies.refuse_turns()
        assert await app.client.say("Hello", conversation_id, "key") == first
    async with running(App(database)) as app:
        await app.client.turn("And?", first["conversationId"])
        assert await app.client.say("Hello", conversation_id, "key") == first
        assert database.conversations.count_documents({}) == 1
        assert len(document(app, first["conversationId"])["messages"]) == 4


async def test_key_belongs_to_its_conversation(app: App) -> None:
    answers = [await app.client.say("Hello", conversation_id, "key") for conversation_id in (None, new_id(), new_id())]
    assert len({answer["conversationId"] for answer in answers}) == 3
    response = await app.client.http.post("/chat", json={"input": "x"}, headers={"Idempotency-Key": "not visible"})
    assert response.status_code == 400


@pytest.mark.parametrize("key", ["$", "$$", "$a", "$$ROOT", "$$NOW", "$$REMOVE", "$messages.key", "$a..b", "{$ne:1}"])
async def test_key_is_never_read_as_an_operator(app: App, key: str) -> None:
    for conversation_id in (new_id(), None):
        first = await app.client.say(f"the {key}", conversation_id, key)
        await app.until_idle()
        again = await app.client.say(f"the {key}", conversation_id, key)
        other = await app.client.post("another text", conversation_id, key)

        assert again == first
        assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


@pytest.mark.parametrize("deletions", [1, 3])
async def test_key_whose_conversation_is_deleted_between_write_and_lookup_is_retried(
    app: App, monkeypatch: pytest.MonkeyPatch, deletions: int
) -> None:
    conversation_id = new_id()
    begin, left = app.store.start_turn, deletions

    async def meet_another_attempt(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise KeyReused  # by an attempt whose conversation is deleted before the lookup
        return await begin(*arguments, **options)

    monkeypatch.setattr(app.store, "start_turn", meet_another_attempt)
    answer = await app.client.say("Hello", conversation_id, key="k")
    await app.until_idle()

    assert str(document(app, conversation_id)["messages"][0]["_id"]) == answer["messageId"]


async def test_key_lives_as_long_as_its_conversation(app: App) -> None:
    first = await app.client.say("Hello", None, "key")
    await app.until_idle()
    assert (await app.client.http.delete(f"/chat/{first['conversationId']}")).status_code == 204
    second = await app.client.say("Hello again", None, "key")
    assert second["messageId"] != first["messageId"]
