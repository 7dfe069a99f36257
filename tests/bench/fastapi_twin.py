"""The FastAPI twin: sse-starlette on uvicorn with uvloop, a queue per client, Motor if there is a database.

The same routes, events, positions and pace as chatserver's, but no resume and no limits. Each event is encoded once for
all subscribers. With `MONGODB_URI` a turn makes the same two writes with the same write concern, and reads the history
that a source would need. Settings come from the environment: TOKENS_FILE (a JSON array of strings, sent in a loop),
TOKENS (of a reply), DELAY_MS, LATE_MS (0: a late token delays all tokens after it), KEEPALIVE_S, MONGODB_URI.

Run it in its own venv: `python fastapi_twin.py`; it prints its address.
"""

import asyncio
import json
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import uvicorn
from bson import ObjectId
from fastapi import FastAPI
from motor.motor_asyncio import AsyncIOMotorClient, AsyncIOMotorCollection
from pydantic import BaseModel
from pymongo import ReturnDocument
from sse_starlette import EventSourceResponse, ServerSentEvent  # type: ignore[import-not-found, unused-ignore]

HISTORY = 50

texts: list[str] = json.loads(Path(os.environ["TOKENS_FILE"]).read_text(encoding="utf-8"))
tokens = int(os.environ["TOKENS"])
delay_s = int(os.environ["DELAY_MS"]) / 1000
late_s = int(os.environ.get("LATE_MS", "0")) / 1000
keepalive_s = float(os.environ.get("KEEPALIVE_S", "15"))
uri = os.environ.get("MONGODB_URI")

clients: dict[str, set[asyncio.Queue[bytes]]] = {}
replies: set[asyncio.Task[None]] = set()
conversations: AsyncIOMotorCollection[dict[str, Any]] | None = None


class Say(BaseModel):
    """The body of a post."""

    conversationId: str | None = None  # noqa: N815 - the wire's name
    input: str


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
    """Connect to the database, if there is one."""
    global conversations
    if uri:
        client: AsyncIOMotorClient[dict[str, Any]] = AsyncIOMotorClient(uri, w="majority", journal=True, tz_aware=True)
        conversations = client.get_default_database("bench")["conversations"]
    yield


app = FastAPI(lifespan=lifespan)


def broadcast(conversation_id: str, event: str, position: str, data: dict[str, Any]) -> None:
    """Put one encoded event into the queue of each subscriber."""
    if watching := clients.get(conversation_id):
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        encoded = ServerSentEvent(text, event=event, id=position, sep="\n").encode()
        for queue in watching:
            queue.put_nowait(encoded)


async def begin(conversation_id: str, reply_id: ObjectId, text: str) -> list[dict[str, Any]]:
    """Store the user's message and the mark of a running reply; return the newest messages."""
    if conversations is None:
        return []
    now = datetime.now(UTC)
    document = await conversations.find_one_and_update(
        {"_id": ObjectId(conversation_id), "reply": {"$exists": False}},
        {
            "$push": {"messages": {"_id": ObjectId(), "role": "user", "content": text, "createdAt": now}},
            "$setOnInsert": {"createdAt": now},
            "$set": {"updatedAt": now, "reply": {"_id": reply_id, "createdAt": now, "content": "", "renewedAt": now}},
        },
        {"messages": {"$slice": -HISTORY}},
        upsert=True,
        return_document=ReturnDocument.AFTER,
    )
    messages: list[dict[str, Any]] = document["messages"]
    return messages


async def finish(conversation_id: str, reply_id: ObjectId, text: str) -> None:
    """Store the reply as a message."""
    if conversations is None:
        return
    now = datetime.now(UTC)
    message = {"_id": reply_id, "role": "assistant", "content": text, "createdAt": now}
    await conversations.update_one(
        {"_id": ObjectId(conversation_id), "reply._id": reply_id},
        {"$push": {"messages": message}, "$unset": {"reply": ""}, "$set": {"updatedAt": now}},
    )


async def answer(conversation_id: str, reply_id: ObjectId) -> None:
    """Send a reply and store it."""
    clock = asyncio.get_running_loop().time
    chars = 0
    said: list[str] = []
    due = clock()
    for text in islice(cycle(texts), tokens):
        now = clock()
        # By the clock, so that late timers do not add up: tokens that fell due within LATE_MS are sent at once.
        due = max(due + delay_s, now - late_s)
        if due > now or not late_s:
            await asyncio.sleep(due - now)
        chars += len(text)
        said.append(text)
        broadcast(conversation_id, "token", f"{reply_id}-{chars}", {"text": text})
    await finish(conversation_id, reply_id, "".join(said))
    broadcast(conversation_id, "done", f"{reply_id}-done", {"messageId": str(reply_id), "status": "complete"})


@app.post("/chat", status_code=202)
async def say(body: Say) -> dict[str, str]:
    """Store the user's message and start the reply."""
    conversation_id = body.conversationId or str(ObjectId())
    reply_id = ObjectId()
    await begin(conversation_id, reply_id, body.input)
    task = asyncio.create_task(answer(conversation_id, reply_id))
    replies.add(task)
    task.add_done_callback(replies.discard)
    return {"conversationId": conversation_id, "status": "streaming"}


@app.get("/chat/stream/{conversation_id}")
async def stream(conversation_id: str) -> EventSourceResponse:
    """Stream all events from now on."""
    queue: asyncio.Queue[bytes] = asyncio.Queue()
    clients.setdefault(conversation_id, set()).add(queue)

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield await queue.get()
        finally:
            watching = clients[conversation_id]
            watching.discard(queue)
            if not watching:
                del clients[conversation_id]

    return EventSourceResponse(events(), ping=keepalive_s, sep="\n")


if __name__ == "__main__":
    config = uvicorn.Config(app, "127.0.0.1", 0, loop="uvloop", http="httptools", access_log=False, log_level="warning")
    listener = config.bind_socket()
    listener.listen(config.backlog)  # so that clients can connect as soon as the address is printed
    print(f"fastapi listens on http://127.0.0.1:{listener.getsockname()[1]}/", flush=True)
    uvicorn.Server(config).run([listener])
