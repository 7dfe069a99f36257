"""A plain client for the tests: it follows the protocol, keeps its position and assembles the replies."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx


def new_id() -> str:
    """Return an id that a client chooses."""
    return secrets.token_hex(12)


@dataclass(frozen=True)
class Event:
    """A received event: `data` is the decoded JSON."""

    name: str
    id: str
    data: dict[str, Any]


class EventDecoder:
    """Turns lines into events, as in the HTML standard's section "Server-sent events"; keeps the last event id."""

    def __init__(self, last_event_id: str = "") -> None:
        self.last_event_id = last_event_id
        self._fields: dict[str, str] = {}

    def feed(self, line: str) -> Event | None:
        """Take a line without its line feed; return the event that it completes, if any."""
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
    """The messages of a conversation that a client has assembled from events."""

    said: dict[str, str] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    def take(self, event: Event) -> None:
        """Take the next event; the message of a token is the part of its id before the last `-`."""
        message_id = event.data.get("messageId") or event.id.rpartition("-")[0]
        if event.name == "token":
            self._begin(message_id)
            assert message_id not in self.ended, "a token after the end of its reply"
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
    """A client of the server at a base URL."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        # Plain HTTP: to load the certificates of authorities would take 35 ms for each client.
        self.http = httpx.AsyncClient(base_url=url, timeout=30, limits=limits, trust_env=False, verify=False)

    async def close(self) -> None:
        await self.http.aclose()

    async def post(self, text: str, conversation_id: str | None = None, key: str | None = None) -> httpx.Response:
        body = {"input": text} | ({"conversationId": conversation_id} if conversation_id else {})
        return await self.http.post("/chat", json=body, headers={"Idempotency-Key": key} if key else {})

    async def say(self, text: str, conversation_id: str | None = None, key: str | None = None) -> dict[str, str]:
        """Post a text; return the body of the answer, which must be a 202."""
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
        """Yield events, without keep-alives, until the response ends, cleanly or not.

        Repeats the request while the server answers 503.
        """
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
                with suppress(httpx.RemoteProtocolError):  # without the last chunk: the client is expected to resume
                    async for event in _events(response):
                        if event.name != "ping":
                            yield event
                return

    async def events(self, conversation_id: str, position: str = "", **options: Any) -> list[Event]:
        """Return the events up to the first end of a reply."""
        return [event async for event in self.stream(conversation_id, position, until_done=True, **options)]

    async def turn(self, text: str, conversation_id: str | None = None) -> tuple[dict[str, str], list[Event]]:
        """Post a text; return the answer and the events of the reply."""
        answer = await self.say(text, conversation_id)
        return answer, await self.events(answer["conversationId"], answer["lastEventId"])


class ChunkedBody:
    """The body of a chunked response (RFC 9112, 7.1), with a `StreamReader`'s methods; it never reads ahead."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.ended = False
        """Whether the last chunk was read."""
        self._reader = reader
        self._decoded = bytearray()

    async def read(self, size: int) -> bytes:
        """Return up to `size` bytes, at least one unless the body has ended."""
        if not self._decoded:
            await self._read_chunk()
        return self._take(min(size, len(self._decoded)))

    async def readline(self) -> bytes:
        return await self._read_until(b"\n")

    async def readuntil(self, separator: bytes) -> bytes:
        found = await self._read_until(separator)
        if not found.endswith(separator):
            raise asyncio.IncompleteReadError(found, None)
        return found

    async def _read_until(self, separator: bytes) -> bytes:
        while (at := self._decoded.find(separator)) < 0:
            if not await self._read_chunk():
                return self._take(len(self._decoded))
        return self._take(at + len(separator))

    async def _read_chunk(self) -> bool:
        line = await self._reader.readline()
        if not line:
            return False
        size = int(line, 16)
        data = await self._reader.readexactly(size + 2)
        assert data.endswith(b"\r\n")
        self._decoded += data[:-2]
        self.ended = size == 0
        return not self.ended

    def _take(self, size: int) -> bytes:
        taken = bytes(self._decoded[:size])
        del self._decoded[:size]
        return taken


class RawStream:
    """A stream over a bare socket, for tests below HTTP; `reader` reads its body."""

    def __init__(self, port: int, path: str, *, version: str = "1.1", headers: str = "") -> None:
        self._request = f"GET {path} HTTP/{version}\r\nHost: localhost\r\n{headers}\r\n"
        self._port = port

    async def open(self) -> "RawStream":
        reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        self.writer.write(self._request.encode())
        self.head = (await reader.readuntil(b"\r\n\r\n")).decode()
        is_chunked = "Transfer-Encoding: chunked" in self.head
        self.reader: Any = ChunkedBody(reader) if is_chunked else reader
        return self

    async def events(self) -> AsyncIterator[Event]:
        """Yield the events, without keep-alives."""
        decoder = EventDecoder()
        while line := await self.reader.readline():
            event = decoder.feed(line.decode().removesuffix("\n"))
            if event is not None and event.name != "ping":
                yield event

    def close(self) -> None:
        self.writer.close()


def text_of(events: list[Event]) -> str:
    """Return the text of all token events."""
    return "".join(event.data["text"] for event in events if event.name == "token")


async def _events(response: httpx.Response) -> AsyncIterator[Event]:
    decoder = EventDecoder()
    # Not aiter_lines: it also splits at U+2028 and the like, which end no line in an event stream.
    rest = ""
    async for chunk in response.aiter_text():
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            if (event := decoder.feed(line)) is not None:
                yield event
