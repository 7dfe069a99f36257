"""The clients: talkers post, stop, retry, switch and delete; watchers read streams and resume from their positions."""

import asyncio
import random
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import httpx_sse

from tests.chaos.ledger import Deletion, Ledger, Post, Retry, Seen
from tests.clients import Event, EventDecoder

READ_S = 6.0
"""A watcher reopens a stream that has sent nothing, not even a keep-alive, for this time."""


def new_id() -> str:
    return secrets.token_hex(12)


@dataclass
class Conversation:
    """A conversation that a talker and its watchers share, until it is deleted and the next one takes its place.

    `ended` maps the ids of the ended replies to whether they are complete, as any client has received it.
    """

    id: str = field(default_factory=new_id)
    watchers: list["Watcher"] = field(default_factory=list)
    ended: dict[str, bool] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, message_id: str, *, complete: bool) -> None:
        self.ended[message_id] = complete
        self.changed.set()

    async def wait_for_end(self, message_id: str) -> bool:
        """Wait until a reply has ended; return whether it is complete."""
        while message_id not in self.ended:
            self.changed.clear()
            await self.changed.wait()
        return self.ended[message_id]

    async def wait_for_watchers(self) -> None:
        """Wait until every watcher has an open stream, so that each receives all events."""
        while not all(each.id == self.id and each.position for each in self.watchers):
            await asyncio.sleep(0.05)

    @property
    def has_been_read(self) -> bool:
        """Whether every watcher has the position of a message, which becomes unknown with the conversation."""
        return all(each.position[:24] not in ("", self.id) for each in self.watchers)


class Talker:
    """Posts one message after the other, each with an idempotency key, and repeats requests without an answer.

    It stops some replies, retries some, continues from earlier replies, shows other branches and deletes some
    conversations. It ends once `stopping` is set.
    """

    def __init__(
        self, http: httpx.AsyncClient, conversation: Conversation, ledger: Ledger, dice: random.Random
    ) -> None:
        self._http, self._conversation, self._ledger, self._dice = http, conversation, ledger, dice
        self._number = 0
        self._replies: list[str] = []
        """The ended replies of the conversation."""
        self.stopping = False

    async def run(self) -> None:
        while not self.stopping:
            await self._conversation.wait_for_watchers()
            if self._conversation.has_been_read and self._dice.random() < 0.1:
                await self._delete()
                continue
            if self._replies and self._dice.random() < 0.05:
                await self._show(self._dice.choice(self._replies))
            parent = self._dice.choice([None, *self._replies])
            answer = await (self._say() if self._dice.random() < 0.9 else self._say(parentId=parent))
            if self._dice.random() < 0.1:
                await asyncio.sleep(self._dice.random())
                await self._stop()
            reply_id = answer["replyId"]
            while self._dice.random() < (0.25 if await self._conversation.wait_for_end(reply_id) else 0.5):
                self._replies.append(reply_id)
                reply_id = await self._retry(reply_id)
            self._replies.append(reply_id)

    async def _say(self, **parent: str | None) -> dict[str, Any]:
        """Post the next message, sometimes twice; return the answer.

        :param parent: the `parentId`, if there is to be one
        """
        self._number += 1
        self._ledger.branches += bool(parent)
        conversation_id, key = self._conversation.id, f"key-{self._number}"
        text = f"This is message {self._number} of {conversation_id}: {self._dice.random()}"
        body = {"conversationId": conversation_id, "input": text, **parent}
        while True:
            response = await self._ask("POST", "/chat", 202, json=body, headers={"Idempotency-Key": key})
            answer: dict[str, Any] = response.json()
            self._ledger.posts.append(Post(conversation_id, key, answer))
            if self._dice.random() >= 0.3:
                return answer
            self._ledger.resent += 1

    async def _show(self, message_id: str) -> None:
        """Show the branch of a message."""
        self._ledger.branches += 1
        await self._ask("PUT", f"/chat/{self._conversation.id}/head", 200, json={"messageId": message_id})

    async def _stop(self) -> None:
        response = await self._ask("POST", f"/chat/{self._conversation.id}/stop", 202)
        if reply_id := response.json().get("messageId"):
            self._ledger.stops.append((self._conversation.id, reply_id))

    async def _retry(self, reply_id: str) -> str:
        """Retry a reply, sometimes with two requests; return the id of the new one."""
        self._number += 1
        path, key = f"/chat/{self._conversation.id}/retry", f"key-{self._number}"
        request = {"json": {"messageId": reply_id}, "headers": {"Idempotency-Key": key}}
        while True:
            response = await self._ask("POST", path, 202, **request)
            new_id: str = response.json()["replyId"]
            self._ledger.retries.append(Retry(self._conversation.id, key, reply_id, new_id))
            if self._dice.random() >= 0.3:
                return new_id
            self._ledger.resent += 1

    async def _delete(self) -> None:
        """Delete the conversation while a reply runs, sometimes while it is stopped; continue in a new one."""
        conversation_id = self._conversation.id
        history = await self._ask("GET", f"/chat/{conversation_id}?branches=all", 200)
        await self._say()
        await asyncio.sleep(self._dice.random())
        doomed = [asyncio.create_task(self._ask("DELETE", f"/chat/{conversation_id}", 204, 404))]
        if self._dice.random() < 0.5:
            doomed.append(asyncio.create_task(self._ask("POST", f"/chat/{conversation_id}/stop", 202, 404)))
        await asyncio.gather(*doomed)
        messages = [
            {**each, "_id": each["id"], "parent": each["parentId"]}
            for each in history.json()["messages"]
            if each["status"] != "streaming"
        ]
        self._ledger.deletions[conversation_id] = Deletion(time.monotonic(), messages)
        self._conversation.id = new_id()
        self._replies.clear()

    async def _ask(self, method: str, path: str, *wanted: int, **body: Any) -> httpx.Response:
        """Send a request until its answer has one of the wanted status codes; return the answer."""
        while True:
            response = await self._try(method, path, **body)
            if response is not None:
                if response.status_code in wanted:
                    return response
                if response.status_code not in (409, 503):
                    raise RuntimeError(f"{method} {path} was answered {response.status_code}: {response.text}")
            self._ledger.resent += "headers" in body
            await asyncio.sleep(0.1 if response is None else 0.2)

    async def _try(self, method: str, path: str, **body: Any) -> httpx.Response | None:
        """Send a request; return the answer, or None if the connection fails."""
        with suppress(httpx.TransportError):
            return await self._http.request(method, path, timeout=8, **body)
        return None


class Watcher:
    """Watches a conversation, and resumes from its position whenever the stream ends.

    :param eager: whether to store a position before its frame is complete, as npm `eventsource` 2 and
        `@microsoft/fetch-event-source` do, rather than with its event, as the standard requires
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        conversation: Conversation,
        number: int,
        ledger: Ledger,
        dice: random.Random,
        *,
        eager: bool = False,
    ) -> None:
        self._http, self._conversation, self._ledger, self._dice = http, conversation, ledger, dice
        self._eager = eager
        self.number = number
        conversation.watchers.append(self)
        self._begin()

    def _begin(self) -> None:
        self.id, self.position = self._conversation.id, ""
        self._seen = self._ledger.seen.setdefault((self.id, self.number), [])

    async def run(self) -> None:
        while True:
            with suppress(httpx.TransportError, httpx_sse.SSEError):
                await self.watch()
            self._ledger.reconnects += 1
            await asyncio.sleep(0.05 + 0.2 * self._dice.random())

    async def watch(self) -> None:
        """Open a stream and read its events to the end.

        :raises httpx.TransportError: if the connection is aborted
        """
        headers = {"Last-Event-ID": self.position} if self.position else {}
        url, timeout = f"/chat/stream/{self.id}", httpx.Timeout(READ_S)
        async with httpx_sse.aconnect_sse(self._http, "GET", url, headers=headers, timeout=timeout) as source:
            if source.response.status_code != 200:
                return
            if await self._read(source):
                await self._start_over()

    async def _read(self, source: httpx_sse.EventSource) -> bool:
        """Take the events of a stream; return whether it ended with a reset."""
        left = {"opened": time.monotonic(), "clean": False}
        try:
            async with aclosing(self._eagerly(source.response) if self._eager else _by_the_book(source)) as events:
                async for event in events:
                    if event.name == "reset":
                        return True
                    self.position = event.id or self.position
                    if event.data and event.name != "ping":
                        self._take(event.name, event.id, event.data)
            # Without the last chunk, httpx raises an error; a body without chunks has no such mark.
            left["clean"] = source.response.headers.get("Transfer-Encoding") == "chunked"
            return False
        finally:
            self._take("left", self.position, left)

    async def _eagerly(self, response: httpx.Response) -> AsyncGenerator[Event, None]:
        """Yield the events of a stream, and store the position of each before its frame is complete.

        The position is stored as soon as the line after the `id` begins. A client that stores it at the end of the `id`
        line loses the frame if the connection is aborted at the one byte in between, in any order of the lines.
        """
        decoder, line, position = EventDecoder(), "", ""
        async for text in response.aiter_text():
            *lines, line = (line + text).split("\n")
            for each in lines:
                self.position = position or self.position
                position = each.removeprefix("id: ") if each.startswith("id: ") else ""
                if (event := decoder.feed(each)) is not None:
                    yield event

    def _take(self, kind: str, position: str, data: dict[str, Any]) -> None:
        self._seen.append(Seen(time.monotonic(), kind, position, data))
        if kind in ("done", "error"):
            self._conversation.end(data["messageId"], complete=data.get("status") == "complete")

    async def _start_over(self) -> None:
        """After a reset, continue from the history; if it is deleted, continue in the next conversation.

        The position follows the array, so that the history must have all branches.
        """
        while True:
            with suppress(httpx.TransportError):
                response = await self._http.get(f"/chat/{self.id}?branches=all", timeout=8)
                if response.status_code in (200, 404):
                    break
            await asyncio.sleep(0.2)
        if response.status_code == 404:
            self._take("gone", self.position, {})
            while self._conversation.id == self.id:
                await asyncio.sleep(0.05)
            self._begin()
            return
        history = response.json()
        self.position = history["lastEventId"]
        self._take("history", self.position, history)
        for message in history["messages"]:
            if message["status"] != "streaming":
                self._conversation.end(message["id"], complete=message["status"] == "complete")


async def _by_the_book(source: httpx_sse.EventSource) -> AsyncGenerator[Event, None]:
    async for event in source.aiter_sse():
        yield Event(event.event, event.id, event.json() if event.data else {})
