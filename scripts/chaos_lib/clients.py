"""The clients: those who talk post with keys and post again; those who watch reconnect with their positions."""

import asyncio
import random
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import httpx_sse

from scripts.chaos_lib.ledger import Ledger, Post, Seen

READ_S = 6.0
"""A stream that says nothing for so long, not even a comment, is opened anew."""


@dataclass
class Conversation:
    """One conversation: who watches it, and the ends that were seen of its replies, by any client."""

    id: str
    ended: set[str] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, message_id: str) -> None:
        self.ended.add(message_id)
        self.changed.set()

    async def wait_for_end(self, message_id: str) -> None:
        while message_id not in self.ended:
            self.changed.clear()
            await self.changed.wait()


class Talker:
    """Says one thing after the other, each with a key, until told to stop; asks again whenever an answer is missing."""

    def __init__(
        self, http: httpx.AsyncClient, conversation: Conversation, ledger: Ledger, dice: random.Random
    ) -> None:
        self._http, self._conversation, self._ledger, self._dice = http, conversation, ledger, dice
        self.stopping = False

    async def run(self) -> None:
        number = 0
        while not self.stopping:
            number += 1
            key, text = f"key-{number}", f"This is message {number} of {self._conversation.id}: {self._dice.random()}"
            answer = await self._post(key, text)
            if self._dice.random() < 0.3:
                self._ledger.retried += 1
                await self._post(key, text)
            await self._conversation.wait_for_end(answer["replyId"])

    async def _post(self, key: str, text: str) -> dict[str, Any]:
        """Post until it is answered 202; return the answer."""
        body = {"conversationId": self._conversation.id, "input": text}
        while True:
            try:
                response = await self._http.post("/chat", json=body, headers={"Idempotency-Key": key}, timeout=8)
            except httpx.TransportError:
                self._ledger.retried += 1
                await asyncio.sleep(0.1)
                continue
            if response.status_code == 202:
                answer: dict[str, Any] = response.json()
                self._ledger.posts.append(Post(self._conversation.id, key, text, answer, time.monotonic()))
                return answer
            if response.status_code not in (409, 503):
                raise RuntimeError(f"a post was answered {response.status_code}: {response.text}")
            self._ledger.retried += 1
            await asyncio.sleep(0.2)


class Watcher:
    """Watches a conversation, going on from its position whenever the stream ends, however it ends."""

    def __init__(
        self, http: httpx.AsyncClient, conversation: Conversation, number: int, ledger: Ledger, dice: random.Random
    ) -> None:
        self._http, self._conversation, self._ledger, self._dice = http, conversation, ledger, dice
        self._seen = ledger.seen.setdefault((conversation.id, number), [])
        self.position = ""

    async def run(self) -> None:
        while True:
            with suppress(httpx.TransportError, httpx_sse.SSEError):
                await self._watch()
            self._ledger.reconnects += 1
            await asyncio.sleep(0.05 + 0.2 * self._dice.random())

    async def _watch(self) -> None:
        headers = {"Last-Event-ID": self.position} if self.position else {}
        url = f"/chat/stream/{self._conversation.id}"
        timeout = httpx.Timeout(READ_S)
        async with httpx_sse.aconnect_sse(self._http, "GET", url, headers=headers, timeout=timeout) as source:
            if source.response.status_code != 200:
                return
            async for event in source.aiter_sse():
                if event.event == "reset":
                    await self._start_over()
                    return
                self.position = event.id or self.position
                if event.data:
                    self._take(event.event, event.id, event.json())

    def _take(self, kind: str, position: str, data: dict[str, Any]) -> None:
        self._seen.append(Seen(time.monotonic(), kind, position, data))
        if kind in ("done", "error"):
            self._conversation.end(data["messageId"])

    async def _start_over(self) -> None:
        """Fetch the history, as a reset demands, and go on from there; not there: begin at the beginning."""
        while True:
            try:
                response = await self._http.get(f"/chat/{self._conversation.id}", timeout=8)
            except httpx.TransportError:
                await asyncio.sleep(0.1)
                continue
            if response.status_code in (200, 404):
                break
            await asyncio.sleep(0.2)
        history: dict[str, Any] = {"messages": [], "lastEventId": ""}
        if response.status_code == 200:
            history = response.json()
        self.position = history["lastEventId"]
        self._take("history", self.position, history)
        for message in history["messages"]:
            if message["status"] != "streaming":
                self._conversation.end(message["id"])
