"""A plain client for the tests: it follows the contract, keeps its position and puts the replies together."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx


def new_id() -> str:
    """Return an id that a client chooses."""
    return secrets.token_hex(12)


@dataclass(frozen=True)
class Event:
    """An event as it came: `data` is the decoded JSON."""

    name: str
    id: str
    data: dict[str, Any]


class EventDecoder:
    """Turns lines into events, as the HTML standard's section "Server-sent events" says; keeps the last event id."""

    def __init__(self, last_event_id: str = "") -> None:
        self.last_event_id = last_event_id
        self._fields: dict[str, str] = {}

    def feed(self, line: str) -> Event | None:
        """Take a line without its end; return the event that it ends, if any."""
        if line:
            name, _, value = line.partition(":")
            if name:
                self._fields[name] = value.removeprefix(" ")
            return None
        fields, self._fields = self._fields, {}
        self.last_event_id = fields.get("id", self.last_event_id)
        if "data" not in fields:
            return None
        return Event(fields.get("event", "message"), self.last_event_id, json.loads(fields["data"]))


@dataclass
class Transcript:
    """What a client has put together of a conversation, message by message."""

    said: dict[str, str] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def take(self, event: Event) -> None:
        """Take the next event; the message of a token is the part of its id before the last `-`."""
        message_id = event.data.get("messageId") or event.id.rpartition("-")[0]
        if event.name == "token":
            self._begin(message_id)
            assert message_id not in self.ended, "a token after its reply's end"
            self.said[message_id] += event.data["text"]
        elif event.name == "input":
            assert message_id not in self.said, "an input twice"
            self._begin(message_id)
            self.said[message_id] = event.data["text"]
        elif event.name in ("done", "error"):
            self._begin(message_id)
            assert message_id not in self.ended, "an end twice"
            self.ended[message_id] = event.data.get("status") or event.data["code"]

    def _begin(self, message_id: str) -> None:
        if message_id not in self.said:
            self.said[message_id] = ""
            self.order.append(message_id)


class Client:
    """Speaks to a server at a base URL."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        self.http = httpx.AsyncClient(base_url=url, timeout=30, limits=limits, trust_env=False)

    async def close(self) -> None:
        await self.http.aclose()

    async def post(self, text: str, conversation_id: str | None = None, key: str | None = None) -> httpx.Response:
        body = {"input": text} | ({"conversationId": conversation_id} if conversation_id else {})
        return await self.http.post("/chat", json=body, headers={"Idempotency-Key": key} if key else {})

    async def say(self, text: str, conversation_id: str | None = None, key: str | None = None) -> dict[str, str]:
        """Post and return the 202's body."""
        response = await self.post(text, conversation_id, key)
        assert response.status_code == 202, response.text
        answer: dict[str, str] = response.json()
        return answer

    async def history(self, conversation_id: str, **query: Any) -> dict[str, Any]:
        response = await self.http.get(f"/chat/{conversation_id}", params=query)
        assert response.status_code == 200, response.text
        history: dict[str, Any] = response.json()
        return history

    async def stream(
        self, conversation_id: str, position: str = "", *, until_done: bool = False, in_query: bool = False
    ) -> AsyncIterator[Event]:
        """Yield events until the server ends the stream; come again while it says that it cannot answer now."""
        query = {"until": "done"} if until_done else {}
        headers = {}
        if position and in_query:
            query["lastEventId"] = position
        elif position:
            headers["Last-Event-ID"] = position
        url = f"/chat/stream/{conversation_id}"
        while True:
            async with self.http.stream("GET", url, params=query, headers=headers) as response:
                if response.status_code == 503:
                    await asyncio.sleep(0.1)
                    continue
                assert response.status_code == 200, await response.aread()
                async for event in _events(response):
                    yield event
                return

    async def events(self, conversation_id: str, position: str = "", **options: Any) -> list[Event]:
        """Return the events up to the first end of a reply."""
        return [event async for event in self.stream(conversation_id, position, until_done=True, **options)]

    async def turn(self, text: str, conversation_id: str | None = None) -> tuple[dict[str, str], list[Event]]:
        """Say something and return the answer and the reply's events."""
        answer = await self.say(text, conversation_id)
        return answer, await self.events(answer["conversationId"], answer["lastEventId"])


class RawStream:
    """A stream over a bare socket, for what happens below HTTP."""

    def __init__(self, port: int, path: str, *, version: str = "1.1", headers: str = "") -> None:
        self._request = f"GET {path} HTTP/{version}\r\nHost: localhost\r\n{headers}\r\n"
        self._port = port

    async def open(self) -> "RawStream":
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        self.writer.write(self._request.encode())
        self.head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
        return self

    async def events(self) -> AsyncIterator[Event]:
        decoder = EventDecoder()
        while line := await self.reader.readline():
            if (event := decoder.feed(line.decode().removesuffix("\n"))) is not None:
                yield event

    def close(self) -> None:
        self.writer.close()


def text_of(events: list[Event]) -> str:
    """Return the text of all token events."""
    return "".join(event.data["text"] for event in events if event.name == "token")


async def _events(response: httpx.Response) -> AsyncIterator[Event]:
    decoder = EventDecoder()
    # Not aiter_lines: it also splits at U+2028 and its like, which is no line's end in an event stream.
    rest = ""
    async for chunk in response.aiter_text():
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            if (event := decoder.feed(line)) is not None:
                yield event
