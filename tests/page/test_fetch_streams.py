"""`client.js` with a function for headers: it reads its streams by fetch, with the rules that hold for EventSource."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.apps import MakeApp, Script
from tests.clients import new_id
from tests.processes import ROOT
from tests.proxy import After, CuttingProxy

pytestmark = pytest.mark.needs("node")

NODE = ROOT / "tests" / "node"
TOKEN = 'event: token\ndata: {"text":"%s"}\nid: %s\n\n'
START = f"{'0' * 24}-0"
MESSY = (
    "\ufeffretry: 2000\n: a comment\nfield: unknown\nevent: stream\nid: opened\n\n"
    'event: token\ndata:{"text":\ndata:   "ñ😀"}\nid: first\n\n'
    'event:token\nid:second\ndata\ndata: {"text":" b"}\ndata\n\n'
)


@pytest.fixture
def client(tmp_path: Path) -> Path:
    """A copy of client.js that Node takes for a module."""
    return Path(shutil.copy(ROOT / "chatserver" / "web" / "client.js", tmp_path / "client.mjs"))


async def run(script: str, *arguments: object, given: str = "") -> Any:
    """Run a program of `tests/node`; return the JSON that it prints."""
    command = ("node", NODE / script, *arguments)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*map(str, command), stdin=pipe, stdout=pipe)
    try:
        out, _ = await asyncio.wait_for(process.communicate(given.encode()), 60)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return json.loads(out)


@pytest.mark.gen_test
async def test_events_are_those_of_the_standard_however_the_body_is_divided(client: Path) -> None:
    cases = {
        "line feeds": (MESSY, ["ñ😀 b", "second", 2000]),
        "carriage returns": (MESSY.replace("\n", "\r"), ["ñ😀 b", "second", 2000]),
        "both": (MESSY.replace("\n", "\r\n"), ["ñ😀 b", "second", 2000]),
        "no events": ("", [None, START, None]),
        "event without its blank line": (TOKEN % ("a", "one") + (TOKEN % ("b", "two"))[:-1], ["a", "one", None]),
        "event without data": (TOKEN % ("a", "one") + "event: reset\nid:\n\n", ["a", "one", None]),
        "id of an event without data": ("id: one\n\n" + 'event: token\ndata: {"text":"a"}\n\n', ["a", "one", None]),
        "id with NUL": (TOKEN % ("a", "one") + TOKEN % ("b", "t\0wo"), ["ab", "one", None]),
        "retry that is no number": ("retry: 20e2\n" + TOKEN % ("a", "one"), ["a", "one", None]),
    }

    outcomes = await run("parse.mjs", client, given=json.dumps([body for body, _ in cases.values()]))

    assert dict(zip(cases, outcomes, strict=True)) == {name: [expected] for name, (_, expected) in cases.items()}


def shown(message: dict[str, Any]) -> dict[str, Any]:
    """Return what `follow.mjs` prints of a message."""
    return {name: message[name] for name in ("id", "content", "status", "siblings") if name in message}


class Counter(After):
    """Aborts a connection after a number of bytes, and counts the bytes passed on."""

    passed = 0

    def take(self, data: bytes) -> tuple[bytes, bool]:
        part, cut = super().take(data)
        self.passed += len(part)
        return part, cut


@pytest.mark.gen_test(timeout=60)
async def test_connection_cut_at_every_byte_loses_and_repeats_nothing(client: Path, make_app: MakeApp) -> None:
    # A thousand streams open at once.
    app = await make_app(source=Script("Ça va ", "bien 😀"), database_timeout_s=30.0)
    conversation_id = new_id()
    for text in ("Où\u2028êtes-vous ?", "😀"):
        await app.client.turn(text, conversation_id)
    async with CuttingProxy() as proxy:
        url = f"http://127.0.0.1:{await proxy.start(app.port)}/"
        # The client may open its next stream before it ends: only the first one is whole.
        whole = Counter(10**9)
        counters = iter([whole])
        proxy.cut_by(lambda: next(counters, After(10**9)))
        stored = (await app.client.history(conversation_id))["messages"]
        last = stored[-1]["id"]
        await run("follow.mjs", client, url, conversation_id, 1, last)
        offsets = iter(range(whole.passed))

        proxy.cut_by(lambda: After(next(offsets, 10**9)))
        seen = await run("follow.mjs", client, url, conversation_id, whole.passed, last)

        # Not the number of cuts: a client that has all it waits for may close its connection first.
        assert next(offsets, None) is None and whole.passed > 500
    assert len(stored) == 4
    assert seen == [[shown(each) for each in stored]] * whole.passed


@pytest.mark.gen_test(timeout=60)
async def test_connection_cut_anywhere_in_a_conversation_with_branches(client: Path, make_app: MakeApp) -> None:
    """A reply is regenerated, its question edited, and the first branch continued, which the client must fetch then."""
    app = await make_app(source=Script("Ça va ", "bien 😀"), database_timeout_s=30.0)
    conversation_id = new_id()
    first, _ = await app.client.turn("Où\u2028êtes-vous ?", conversation_id)
    regenerated = (await app.client.http.post(f"/chat/{conversation_id}/retry")).json()
    await app.until(lambda: not app.replies.running)
    second = {"conversationId": conversation_id, "input": "😀", "parentId": None}
    assert (await app.client.http.post("/chat", json=second)).status_code == 202
    await app.until(lambda: not app.replies.running)
    shown_again = {"messageId": regenerated["replyId"]}
    assert (await app.client.http.put(f"/chat/{conversation_id}/head", json=shown_again)).status_code == 200
    third, _ = await app.client.turn("😀", conversation_id)
    stored = (await app.client.history(conversation_id))["messages"]
    last = stored[-1]["id"]
    async with CuttingProxy() as proxy:
        url = f"http://127.0.0.1:{await proxy.start(app.port)}/"
        whole = Counter(10**9)
        counters = iter([whole])
        proxy.cut_by(lambda: next(counters, After(10**9)))
        await run("follow.mjs", client, url, conversation_id, 1, last)
        # At every third byte: a second thousand of clients would add nothing.
        cuts = range(0, whole.passed, 3)
        offsets = iter(cuts)

        proxy.cut_by(lambda: After(next(offsets, 10**9)))
        seen = await run("follow.mjs", client, url, conversation_id, len(cuts), last)

        assert next(offsets, None) is None and len(cuts) > 300
    expected = [first["messageId"], regenerated["replyId"], third["messageId"], third["replyId"]]
    assert [each["id"] for each in stored] == expected
    assert seen == [[shown(each) for each in stored]] * len(cuts)
