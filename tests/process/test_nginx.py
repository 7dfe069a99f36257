"""Behind a reverse proxy: Debian's nginx, with its default buffering, towards HTTP/1.0 and 1.1 upstreams."""

import asyncio
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.apps import MakeApp
from tests.clients import Client, EventDecoder, RawStream, new_id
from tests.processes import ROOT

pytestmark = [pytest.mark.needs("nginx"), pytest.mark.gen_test]

DEPLOYED = (ROOT / "scripts" / "deploy" / "nginx.conf").read_text()
# What nginx does by itself: HTTP/1.0 towards the upstream, its Host header, a new connection for each request.
PLAIN = """
server {
    listen 80;
    location / { proxy_pass http://127.0.0.1:3000; proxy_read_timeout 60s; }
}
"""


@asynccontextmanager
async def nginx(folder: Path, config: str, upstream: int, read_timeout_s: int) -> AsyncIterator[int]:
    """Run nginx with a configuration, on a port of its own; give the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for was, becomes in (
        ("listen 80;", f"listen 127.0.0.1:{port};"),
        ("127.0.0.1:3000", f"127.0.0.1:{upstream}"),
        ("proxy_read_timeout 60s;", f"proxy_read_timeout {read_timeout_s}s;"),
    ):
        assert was in config
        config = config.replace(was, becomes)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {temporary} {config} }}\n"
    )
    binary = shutil.which("nginx") or "nginx"
    process = subprocess.Popen([binary, "-e", folder / "error.log", "-p", folder, "-c", folder / "nginx.conf"])
    try:
        async with asyncio.timeout(10):
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None, (folder / "error.log").read_text()
                await asyncio.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.parametrize("config", [PLAIN, DEPLOYED], ids=["http-1.0", "deployed"])
async def test_stream_through_nginx_is_as_quick_and_as_whole_as_directly(
    make_app: MakeApp, tmp_path: Path, config: str
) -> None:
    app = await make_app(simulated_token_delay_ms=30, keepalive_s=1.0, allowed_hosts=("chat.example.com",))
    loop = asyncio.get_running_loop()
    conversation_id = new_id()
    async with nginx(tmp_path, config, app.port, read_timeout_s=3) as port:
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
