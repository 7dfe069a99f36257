"""Clients and proxies of others' making have every word once, however their connections end."""

import asyncio
import json
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import async_playwright

from chatserver.records import Key
from tests import proxy
from tests.apps import App, MakeApp
from tests.browser import FLAGS, chromium
from tests.clients import new_id
from tests.process.test_nginx import DEPLOYED, PLAIN
from tests.processes import ROOT, Server
from tests.proxy import CuttingProxy
from tests.web_servers import nginx

pytestmark = pytest.mark.gen_test(timeout=110)

NODE = ROOT / "tests" / "node"
TURNS = 2
INPUT = "Hello\u2028there"
PYTHON_CLIENTS = ["httpx-sse", "requests", "launchdarkly", "curl"]
NODE_CLIENTS = ["eventsource", "eventsource2", "fetch-event-source"]
EAGER_CLIENTS = ["eventsource2", "fetch-event-source"]
"""They store an id as soon as its line has arrived, before its event is dispatched."""
FAMILIES = [
    pytest.param(PYTHON_CLIENTS, id="python", marks=pytest.mark.needs("curl")),
    pytest.param(NODE_CLIENTS, id="node", marks=pytest.mark.needs("node")),
]
# Chromium's EventSource, put together as the other clients' programs do it.
WATCH = """
async ([url, turns]) => {
  const seen = { opens: 0, inputs: [], texts: [""], ids: [] };
  const source = new EventSource(url);
  source.onopen = () => (seen.opens += 1);
  await new Promise((resolve) => {
    for (const name of ["input", "token", "done", "reset"]) {
      source.addEventListener(name, (event) => {
        seen.ids.push(event.lastEventId);
        if (name === "input") seen.inputs.push(JSON.parse(event.data).text);
        if (name === "token") seen.texts[seen.texts.length - 1] += JSON.parse(event.data).text;
        if (name === "done" && seen.texts.push("") > turns) resolve();
      });
    }
  });
  source.close();
  return seen;
}
"""


async def together(*jobs: Coroutine[Any, Any, Any]) -> list[Any]:
    """Return the results of jobs; if one fails, the others are cancelled, so that no client's process is left."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(job) for job in jobs]
    return [task.result() for task in tasks]


async def run(*command: object) -> Any:
    """Run a program; return the JSON that it prints."""
    process = await asyncio.create_subprocess_exec(*map(str, command), cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    try:
        out, _ = await asyncio.wait_for(process.communicate(), 90)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return json.loads(out)


async def watch(client: str, *urls: str) -> list[dict[str, Any]]:
    """Watch conversations with a client until each has had its turns; return the events of each stream."""
    if client in NODE_CLIENTS:
        seen: list[dict[str, Any]] = await run("node", NODE / "watch.mjs", client, TURNS, *urls)
    else:
        found = await together(
            *(run(sys.executable, "-m", "tests.foreign_clients", client, TURNS, each) for each in urls)
        )
        seen = [stream for streams in found for stream in streams]
    return seen


async def converse(app: App, conversation_id: str) -> None:
    """Once the conversation's stream is open, have two turns in it."""
    await app.until(lambda: (live := app.hub.get(Key(None, conversation_id))) is not None and live.subscribers, 30)
    for _ in range(TURNS):
        await app.client.say(INPUT, conversation_id)
        await app.until(lambda: (live := app.hub.get(Key(None, conversation_id))) is None or live.reply is None, 60)


async def compare(app: App, conversation_id: str, seen: dict[str, Any]) -> str:
    """Return the difference between a client's view of a conversation and the stored one; "" if there is none."""
    messages = (await app.client.history(conversation_id))["messages"]
    replies = [each["content"] for each in messages if each["role"] == "assistant"]
    assert len(replies) == TURNS and all(len(each) > 100 for each in replies)
    if seen["inputs"] != [INPUT] * TURNS:
        return f"inputs {seen['inputs']}"
    if seen["texts"][:TURNS] != replies:
        return f"texts {seen['texts']} instead of {replies}"
    last = f"{messages[-1]['id']}-done"
    return "" if seen["ids"][-1] == last else f"last id {seen['ids'][-1]} instead of {last}"


class After(proxy.After):
    """Aborts a connection after a number of bytes, and keeps the last of them."""

    tail = b""

    def take(self, data: bytes) -> tuple[bytes, bool]:
        part, cut = super().take(data)
        self.tail = (self.tail + part)[-100:]
        return part, cut


class Cuts:
    """The aborts at one offset of each connection to an application."""

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.made: list[After] = []

    def cutter(self) -> After:
        self.made.append(After(self.offset))
        return self.made[-1]

    @property
    def is_between_id_and_dispatch(self) -> bool:
        """Whether one of them was right before the line break that ends a frame."""
        return any(re.search(rb"\nid: [0-9a-f]{24}-\w+\n\Z", each.tail) for each in self.made)


@asynccontextmanager
async def cutting(app: App, cuts: Cuts, *, reset: bool) -> AsyncIterator[CuttingProxy]:
    """Put a proxy that aborts each connection at an offset before an application."""
    async with CuttingProxy() as proxy:
        await proxy.start(app.port)
        proxy.resets = reset
        proxy.cut_by(cuts.cutter)
        yield proxy


@pytest.mark.parametrize("clients", FAMILIES)
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
async def test_client_has_each_word_once_over_aborted_connections(
    make_app: MakeApp, clients: Sequence[str], reset: bool
) -> None:
    app = await make_app(simulated_token_delay_ms=2)
    differing: dict[str, str] = {}

    async def check(client: str) -> None:
        conversation_id = new_id()
        cuts = Cuts(3001)  # the frames of two replies are some 8 KB or more: each connection carries a part of them
        async with cutting(app, cuts, reset=reset) as proxy:
            watching = watch(client, f"http://127.0.0.1:{proxy.port}/chat/stream/{conversation_id}")
            (seen,), _ = await together(watching, converse(app, conversation_id))
            assert proxy.cuts >= 1 and seen["opens"] >= 2, client
        difference = await compare(app, conversation_id, seen)
        if difference and not (client in EAGER_CLIENTS and cuts.is_between_id_and_dispatch):
            differing[client] = difference

    await together(*map(check, clients))
    assert not differing


@pytest.mark.needs("chromium")
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
async def test_chromium_has_each_word_once_over_aborted_connections(make_app: MakeApp, reset: bool) -> None:
    app = await make_app(simulated_token_delay_ms=2)
    conversation_id = new_id()
    async with async_playwright() as playwright, cutting(app, Cuts(3001), reset=reset) as proxy:
        browser = await playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = await browser.new_page()
        await page.goto(f"http://127.0.0.1:{proxy.port}/healthz")
        watching = page.evaluate(WATCH, [f"/chat/stream/{conversation_id}", TURNS])
        seen, _ = await together(watching, converse(app, conversation_id))
        await browser.close()
        assert proxy.cuts >= 1 and seen["opens"] >= 2
    assert await compare(app, conversation_id, seen) == ""


@pytest.mark.needs("node")
@pytest.mark.parametrize("client", EAGER_CLIENTS)
@pytest.mark.parametrize("reset", [False, True], ids=["FIN", "RST"])
async def test_cut_at_any_byte_of_a_frame_but_the_last_loses_nothing(
    make_app: MakeApp, client: str, reset: bool
) -> None:
    """Guards: clients that store an id as soon as its line has arrived skipped the rest of its frame.

    One place in a frame is left, which no order of lines avoids: between the end of the id's line and the line break
    that ends the frame, such a client has the id and not the event.
    """
    app = await make_app(simulated_token_delay_ms=2)
    # A frame of a short token is some 90 bytes with its chunk's size.
    cuts = [Cuts(offset) for offset in range(5000, 5100)]
    conversations = [new_id() for _ in cuts]
    async with AsyncExitStack() as stack:
        ports = [(await stack.enter_async_context(cutting(app, each, reset=reset))).port for each in cuts]
        urls = [
            f"http://127.0.0.1:{port}/chat/stream/{conversation}"
            for port, conversation in zip(ports, conversations, strict=True)
        ]
        seen, *_ = await together(watch(client, *urls), *(converse(app, each) for each in conversations))
    differences = await together(*(compare(app, *each) for each in zip(conversations, seen, strict=True)))
    harmed = [each for each, difference in zip(cuts, differences, strict=True) if difference]
    assert [each.offset for each in harmed if not each.is_between_id_and_dispatch] == []
    assert len(harmed) < 10


@asynccontextmanager
async def compressing(target: str) -> AsyncIterator[int]:
    """Run an Express proxy with compression; yield its port."""
    process = await asyncio.create_subprocess_exec(
        "node", str(NODE / "compressing_proxy.mjs"), target, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield int(await asyncio.wait_for(process.stdout.readline(), 20))
    finally:
        process.kill()
        await process.wait()


@pytest.mark.parametrize("clients", FAMILIES)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("nginx as it comes", marks=pytest.mark.needs("nginx")),
        pytest.param("nginx as deployed", marks=pytest.mark.needs("nginx")),
        pytest.param("express", marks=pytest.mark.needs("node")),
    ],
)
async def test_client_has_each_word_through_a_proxy(
    make_app: MakeApp, tmp_path: Path, clients: Sequence[str], kind: str
) -> None:
    app = await make_app(simulated_token_delay_ms=2, allowed_hosts=("localhost",))
    config = PLAIN if kind == "nginx as it comes" else DEPLOYED
    proxy = compressing(app.url) if kind == "express" else nginx(tmp_path, config, app.port)
    conversations = {client: new_id() for client in clients}
    async with proxy as port:
        url = f"http://127.0.0.1:{port}/chat/stream/"
        watching = (watch(client, url + conversation) for client, conversation in conversations.items())
        seen, *_ = await together(together(*watching), *(converse(app, each) for each in conversations.values()))
    for client, (streams, conversation) in zip(clients, zip(seen, conversations.values(), strict=True), strict=True):
        assert await compare(app, conversation, streams[0]) == "", client
        assert streams[0]["opens"] == 1, client


@pytest.mark.needs("node", "nginx")
async def test_post_right_after_a_stream_has_ended_is_accepted(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    """Guards: a client with a connection pool sent the post into a connection that the server was closing."""
    turns = 1000
    server = make_server(SIMULATED_TOKENS=2, SIMULATED_TOKEN_DELAY_MS=0, LOG_LEVEL="warning")
    await asyncio.to_thread(server.start)
    python = (sys.executable, "-m", "tests.foreign_clients")
    async with nginx(tmp_path, DEPLOYED, server.port) as port:
        accepted = await together(
            run(*python, "pooled-requests", turns, server.url),
            run(*python, "pooled-httpx", turns, server.url),
            run("node", NODE / "pooled.mjs", "agent", server.url, turns),
            run("node", NODE / "pooled.mjs", "fetch", server.url, turns),
            run("node", NODE / "pooled.mjs", "agent", f"http://127.0.0.1:{port}", turns),
        )
    assert list(accepted) == [turns] * 5


@pytest.mark.needs("curl", "node")
async def test_clients_report_a_reply_that_was_truncated_by_a_kill(make_server: Callable[..., Server]) -> None:
    """Guards: a reply that ended with its server looked complete, since the body had neither a length nor chunks."""
    server = make_server(SIMULATED_TOKEN_DELAY_MS=50)
    await asyncio.to_thread(server.start)
    url = f"{server.url}/chat/stream/{new_id()}"
    curl = await asyncio.create_subprocess_exec("curl", "-sN", url, stdout=asyncio.subprocess.PIPE)
    fetching = asyncio.ensure_future(run("node", NODE / "watch.mjs", "fetch", TURNS, url))
    assert curl.stdout is not None
    await curl.stdout.readuntil(b"event: ping\n")
    while b"chatserver_open_streams 2.0" not in await _metrics(server):
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)  # a stream counts before its first bytes are sent
    server.signal(signal.SIGKILL)
    await curl.stdout.read()
    assert await curl.wait() == 18
    assert (await fetching)[0]["error"] == "terminated"


async def _metrics(server: Server) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\n\r\n")
    text = await reader.read()
    writer.close()
    await writer.wait_closed()
    return text
