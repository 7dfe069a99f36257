"""A model provider for the tests: llmock, or bytes from a socket; and how to ask it."""

import asyncio
import json
import os
import re
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from chatserver.errors import SourceError
from chatserver.settings import Settings
from chatserver.sources import Message, Prompt
from chatserver.sources.openai import OpenAI

KEY = "sk-test-4f9d2c7b8a1e6035"
fails_loudly = pytest.mark.expects_log("the model provider failed")
STORY = "Once upon a time there was a server that never lost a word, and everybody who listened heard it all."


def settings(url: str, **changes: Any) -> Settings:
    base = Settings(
        reply_source="openai",
        openai_api_key=KEY,
        openai_base_url=f"{url}/v1",
        openai_connect_timeout_s=2,
        openai_read_timeout_s=5,
    )
    return replace(base, **changes)


def prompt(*contents: str) -> Prompt:
    """Return a prompt of which the last content is the user's, the one before it the assistant's, and so on."""
    roles = ("user", "assistant")
    messages = [Message(roles[(len(contents) - 1 - i) % 2], content) for i, content in enumerate(contents)]
    return Prompt(messages, turn=(len(contents) + 1) // 2)


@dataclass
class Outcome:
    pieces: list[str]
    error: SourceError | None
    seconds: float

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def code(self) -> str | None:
        return None if self.error is None else self.error.code


async def listen(source: OpenAI, question: Prompt) -> Outcome:
    """Take a whole reply, as the chat does."""
    pieces: list[str] = []
    error = None
    started = time.monotonic()
    try:
        async with aclosing(source.reply(question)) as reply:
            async for piece in reply:
                pieces.append(piece)
    except SourceError as failure:
        error = failure
    return Outcome(pieces, error, time.monotonic() - started)


@asynccontextmanager
async def opened(chosen: Settings) -> AsyncIterator[OpenAI]:
    source = OpenAI(chosen)
    try:
        yield source
    finally:
        await source.close()


def ask(chosen: Settings, *contents: str) -> Outcome:
    async def run() -> Outcome:
        async with opened(chosen) as source:
            return await listen(source, prompt(*(contents or ("hello",))))

    return asyncio.run(run())


def started(command: list[str], address: str, **environment: str) -> Iterator[str]:
    """Start a server, yield the address that it prints, and end it afterwards."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment
    )
    assert process.stdout is not None
    try:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if found := re.search(address, line):
                yield found[1]
                break
        else:
            pytest.fail("".join(printed))
    finally:
        process.terminate()
        process.communicate(timeout=10)


class LLMock:
    """The control API of llmock."""

    def __init__(self, url: str) -> None:
        self.url = url

    def script(self, *behaviors: dict[str, Any]) -> None:
        httpx.post(f"{self.url}/_llmock/scenario", json={"behaviors": behaviors}).raise_for_status()

    def requests(self) -> list[dict[str, Any]]:
        """Return the requests so far, once none is in flight any more."""
        answer = httpx.get(f"{self.url}/_llmock/requests").raise_for_status().json()
        found: list[dict[str, Any]] = answer["requests"]
        return found

    def verdict(self) -> list[str]:
        """Return what llmock finds wrong with its client's manners."""
        answer = httpx.get(f"{self.url}/_llmock/verdict").raise_for_status().json()
        return [finding["code"] for finding in answer["findings"]]


@dataclass
class Raw:
    """A server that answers each request with the bytes given, then keeps the line open or closes it."""

    answer: bytes
    keep: bool = False
    url: str = ""
    head: bytes = b""
    connections: int = 0
    requests: int = 0
    tasks: set["asyncio.Task[Any] | None"] = field(default_factory=set)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Raw"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self
            await asyncio.gather(*filter(None, self.tasks))  # its clients have left

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.tasks.add(asyncio.current_task())
        try:
            while True:
                self.head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", self.head, re.IGNORECASE)
                assert length is not None
                await reader.readexactly(int(length[1]))
                self.requests += 1
                writer.write(self.answer)
                await writer.drain()
                if not self.keep:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def chunk(finish: str | None = None, **delta: Any) -> bytes:
    data = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
