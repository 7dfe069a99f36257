"""Behind a reverse proxy: Debian's nginx, with its default buffering, towards HTTP/1.0 and 1.1 upstreams."""

import asyncio
from pathlib import Path

import pytest

from tests.apps import MakeApp
from tests.clients import Client, EventDecoder, RawStream, new_id
from tests.processes import ROOT
from tests.web_servers import nginx

pytestmark = [pytest.mark.needs("nginx"), pytest.mark.gen_test]

DEPLOYED = (ROOT / "scripts" / "deploy" / "nginx.conf").read_text()
# What nginx does by itself: HTTP/1.0 towards the upstream, its Host header, a new connection for each request.
PLAIN = """
server {
    listen 80;
    location / { proxy_pass http://127.0.0.1:3000; proxy_read_timeout 60s; }
}
"""


@pytest.mark.parametrize("config", [PLAIN, DEPLOYED], ids=["http-1.0", "deployed"])
async def test_stream_through_nginx_is_as_quick_and_as_whole_as_directly(
    make_app: MakeApp, tmp_path: Path, config: str
) -> None:
    app = await make_app(simulated_token_delay_ms=30, keepalive_s=1.0, allowed_hosts=("chat.example.com",))
    loop = asyncio.get_running_loop()
    conversation_id = new_id()
    async with nginx(tmp_path, config, app.port, {"proxy_read_timeout 60s;": "proxy_read_timeout 3s;"}) as port:
        path = f"/chat/stream/{conversation_id}"
        direct, proxied = await RawStream(app.port, path).open(), await RawStream(port, path).open()
        # Quiet for longer than nginx's read time-out: the keep-alives hold the line.
        quiet_until = loop.time() + 4.5
        decoder = EventDecoder()
        while loop.time() < quiet_until:
            line = await asyncio.wait_for(proxied.reader.readline(), 3)
            event = decoder.feed(line.decode().rstrip("\r\n"))
            assert line and (event is None or event.name == "ping")

        async def first_token(stream: RawStream) -> float:
            await stream.reader.readuntil(b"event: token")
            return loop.time()

        arrivals = asyncio.gather(first_token(direct), first_token(proxied))
        client = Client(f"http://127.0.0.1:{port}")
        answer = await client.say("Hello", conversation_id)
        times = await arrivals
        assert times[1] - times[0] < 0.25
        # Disconnect in the middle; the rest comes through the proxy from the position.
        proxied.close()
        direct.close()
        events = await client.events(conversation_id, f"{answer['replyId']}-3")
        history = await client.history(conversation_id)
        text = "".join(event.data["text"] for event in events if event.name == "token")
        assert text == history["messages"][-1]["content"][3:]
        assert (await client.http.get("/nope")).json()["code"] == "not_found"
        await client.close()
