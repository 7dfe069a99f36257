"""A client that was not written here: the npm package `eventsource`, with its own reconnects over a line cut often."""

import asyncio
import json

import pytest

from tests.apps import App
from tests.clients import new_id
from tests.proxy import CuttingProxy
from tests.servers import ROOT

WATCH = ROOT / "tests" / "node" / "watch.mjs"


@pytest.mark.needs("node")
@pytest.mark.gen_test
async def test_eventsource_package_has_each_word_once_over_a_line_that_is_cut(app: App) -> None:
    conversation_id = new_id()
    async with CuttingProxy() as proxy:
        port = await proxy.start(app.port)
        # The reply is some 8 KB of frames: each connection carries a part, and breaks in the middle of a frame.
        proxy.cut_after(3001)
        url = f"http://127.0.0.1:{port}/chat/stream/{conversation_id}"
        process = await asyncio.create_subprocess_exec("node", WATCH, url, stdout=asyncio.subprocess.PIPE)
        await app.until(lambda: app.subscribers == 1)
        answer = await app.client.say("Hello\u2028there", conversation_id)
        out, _ = await asyncio.wait_for(process.communicate(), 50)
    seen = json.loads(out)
    history = await app.client.history(conversation_id)
    assert seen["text"] == history["messages"][1]["content"]
    assert seen["inputs"] == ["Hello\u2028there"] and seen["status"] == "complete"
    assert seen["opens"] >= 2 and proxy.cuts >= 1
    assert seen["ids"][-1] == f"{answer['replyId']}-{len(seen['text'])}"
