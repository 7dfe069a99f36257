"""Programs around third-party SSE clients, each used as its documentation shows.

`python -m tests.foreign_clients CLIENT TURNS URL` watches a conversation for TURNS replies, and prints the received
events as JSON. `pooled-CLIENT TURNS SERVER` posts right after the end of each reply's stream, and prints how many posts
were answered 202.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import httpx_sse
import requests
import sseclient
from ld_eventsource import SSEClient
from ld_eventsource.actions import Event, Start
from ld_eventsource.config import ErrorStrategy

from tests.clients import EventDecoder

PAUSE_S = 0.2
"""How long to wait before reopening a stream for a client that does not reconnect by itself."""


@dataclass
class Seen:
    """The events of a stream."""

    turns: int
    opens: int = 0
    inputs: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=lambda: [""])
    ids: list[str] = field(default_factory=list)

    def take(self, name: str, data: str, position: str) -> bool:
        """Take an event; return whether it was the last expected one."""
        if name in ("input", "token", "done", "reset"):
            self.ids.append(position)
        if name == "input":
            self.inputs.append(json.loads(data)["text"])
        elif name == "token":
            self.texts[-1] += json.loads(data)["text"]
        elif name == "done":
            self.texts.append("")
        return len(self.texts) > self.turns


Attempt = Callable[[str, dict[str, str], Seen], Iterator[tuple[str, str, str]]]
"""Opens the stream once, with headers, and yields its events: name, data, id."""


def _httpx_sse(url: str, headers: dict[str, str], seen: Seen) -> Iterator[tuple[str, str, str]]:
    with (
        suppress(httpx.TransportError),
        httpx.Client(trust_env=False, timeout=30) as client,
        httpx_sse.connect_sse(client, "GET", url, headers=headers) as source,
    ):
        seen.opens += 1
        for event in source.iter_sse():
            yield event.event, event.data, event.id


def _requests(url: str, headers: dict[str, str], seen: Seen) -> Iterator[tuple[str, str, str]]:
    with suppress(requests.RequestException):
        response: Any = requests.get(url, stream=True, headers=headers, timeout=30)
        seen.opens += 1
        for event in sseclient.SSEClient(response).events():
            yield event.event, event.data, event.id or ""


def _curl(url: str, headers: dict[str, str], seen: Seen) -> Iterator[tuple[str, str, str]]:
    options = [option for name, value in headers.items() for option in ("-H", f"{name}: {value}")]
    with subprocess.Popen(["curl", "-sN", "--compressed", *options, url], stdout=subprocess.PIPE) as curl:
        seen.opens += 1
        assert curl.stdout is not None
        decoder = EventDecoder()
        try:
            for line in curl.stdout:
                if (event := decoder.feed(line.decode().removesuffix("\n"))) is not None:
                    yield event.name, json.dumps(event.data), event.id
        finally:
            curl.kill()


ATTEMPTS: dict[str, Attempt] = {"httpx-sse": _httpx_sse, "requests": _requests, "curl": _curl}


def watch(client: str, url: str, seen: Seen) -> None:
    """Watch a conversation with a client, which resumes by itself or is restarted with the last id."""
    if client == "launchdarkly":
        for action in SSEClient(url, initial_retry_delay=PAUSE_S, error_strategy=ErrorStrategy.always_continue()).all:
            seen.opens += isinstance(action, Start)
            if isinstance(action, Event) and seen.take(action.event, action.data, action.last_event_id or ""):
                return
    headers: dict[str, str] = {}
    while True:
        for name, data, position in ATTEMPTS[client](url, headers, seen):
            if position:
                headers["Last-Event-ID"] = position
            if seen.take(name, data, position):
                return
        time.sleep(PAUSE_S)


def pooled(session: Any, server: str, turns: int) -> int:
    """Post right after each stream's end, on the connections of a session; return how many posts were answered 202."""

    def post() -> Any:
        return session.post(f"{server}/chat", json={"input": "hi"})

    answers = [post()]
    for _ in range(turns):
        turn = answers[-1].json()
        url = f"{server}/chat/stream/{turn['conversationId']}?until=done&lastEventId={turn['lastEventId']}"
        assert "event: done" in session.get(url).text
        answers.append(post())
    return sum(answer.status_code == 202 for answer in answers[1:])


def main(client: str, turns: int, url: str) -> None:
    """Run one of the programs."""
    if client == "pooled-requests":
        print(pooled(requests.Session(), url, turns))
    elif client == "pooled-httpx":
        print(pooled(httpx.Client(trust_env=False, timeout=30), url, turns))
    else:
        seen = Seen(turns)
        watch(client, url, seen)
        print(json.dumps([asdict(seen)]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
