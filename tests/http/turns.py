"""Steps that the tests of turns share."""

import asyncio
from datetime import UTC, datetime
from typing import Any

from bson import ObjectId

from chatserver.records import Key
from tests.apps import App, Script
from tests.http.conftest import TIME

AGES_AGO = {"$set": {"reply.renewedAt": datetime(2020, 1, 1, tzinfo=UTC)}}
"""An update after which a lease has expired."""


def gated(*pieces: str | BaseException, said: int = 0) -> Script:
    """Return a source that sends the first `said` chunks at once and waits at its gate before each further one."""
    return Script(*pieces, gate=asyncio.Semaphore(said))


def release(source: Script, count: int = 1) -> None:
    assert source.gate is not None
    for _ in range(count):
        source.gate.release()


def document(app: App, conversation_id: str) -> dict[str, Any]:
    found: dict[str, Any] = app.database.conversations.find_one({"_id": ObjectId(conversation_id)})
    return found


def insert_conversation(app: App, **fields: Any) -> str:
    """Insert a document as another application may; return its id."""
    return str(app.database.conversations.insert_one({"createdAt": TIME, "updatedAt": TIME, **fields}).inserted_id)


async def said(app: App, conversation_id: str, chars: int) -> None:
    """Wait until a reply has at least `chars` characters."""

    def reached() -> bool:
        live = app.hub.get(Key(None, conversation_id))
        return live is not None and live.reply is not None and live.reply.chars >= chars

    await app.until(reached)


async def event_names(app: App, conversation_id: str) -> list[str]:
    """Return the events of a stream without a position, until the server ends it."""
    return [event.name async for event in app.client.stream(conversation_id)]
