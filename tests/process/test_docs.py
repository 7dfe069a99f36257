"""The commands and programs in the documents run as they are."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from chatserver.auth import sign
from tests.apps import Database, MakeApp
from tests.processes import ROOT, Server

README = (ROOT / "README.md").read_text()
OPERATING = (ROOT / "docs" / "operating.md").read_text()
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()
EXAMPLE = (ROOT / ".env.example").read_text()
REQUESTS = (ROOT / "requests.http").read_text()
STATUSES = (
    "200 200 202 200 200 200 200 200 404 404 202 200 200 200 200 202 422 202 202 204 404 400 400 415 405 200 204 404 "
    "200 200 200 200"
)
"""The statuses of the answers to requests.http, in order."""


@pytest.mark.needs("curl", "openssl")
def test_commands_of_the_recommended_flow_can_be_pasted(make_server: Callable[..., Server]) -> None:
    server = make_server().start()
    block = README.partition("## The recommended flow")[2].split("```sh")[1].split("```")[0]
    script = block.replace("localhost:3000", f"127.0.0.1:{server.port}")
    done = subprocess.run(["bash", "-e", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "event: input" in done.stdout and '"status":"complete"' in done.stdout
    assert '"status": "streaming"' in done.stdout and '"status": "idle"' in done.stdout


@pytest.mark.needs("node")
def test_retention_deletes_what_is_old_and_idle(database: Database) -> None:
    recipe = OPERATING.partition("**Retention.**")[2].split("```js\n")[1].split("```")[0]
    now = datetime.now(UTC)
    old, new = now - timedelta(days=90, minutes=1), now - timedelta(days=89)
    conversations: dict[str, dict[str, object]] = {
        "old": {"updatedAt": old, "owner": "alice"},
        "old, without an owner": {"updatedAt": old},
        "old, with a running reply": {"updatedAt": old, "reply": {"content": ""}},
        "new": {"updatedAt": new},
        "without a date": {"updatedAt": "2020-01-01"},
    }
    database.conversations.insert_many([{"_id": name, **fields} for name, fields in conversations.items()])

    command = ["node", str(ROOT / "tests" / "node" / "mongosh.mjs"), database.uri]
    done = subprocess.run(command, input=recipe, capture_output=True, text=True, timeout=30, check=True)

    assert json.loads(done.stdout)["deletedCount"] == 2
    left = [each["_id"] for each in database.conversations.find()]
    assert left == ["old, with a running reply", "new", "without a date"]


def test_health_check_of_the_container_finds_a_server_that_has_a_name_of_its_own(
    make_server: Callable[..., Server],
) -> None:
    dockerfile = (ROOT / "scripts" / "deploy" / "Dockerfile").read_text()
    check = re.search(r"^HEALTHCHECK .*? CMD (.*)$", dockerfile, re.M)
    assert check is not None
    server = make_server(HOST="0.0.0.0", ALLOWED_HOSTS="chat.example.com", AUTH="none").start()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for port, code in ((server.port, 0), (1, 1)):
        environment = {"PATH": path, "PORT": str(port)}
        done = subprocess.run(["sh", "-c", check[1]], env=environment, capture_output=True, text=True, timeout=10)
        assert done.returncode == code, done.stderr


def test_example_copied_to_env_unchanged_chats(tmp_path: Path) -> None:
    """The environment overrides the port of the file, so that the test has a free one."""
    (tmp_path / ".env").write_text(EXAMPLE)
    server = Server(tmp_path, {"SIMULATED_TOKEN_DELAY_MS": None, "PORT": 0}).start()
    try:
        command = ["python3", str(ROOT / "scripts" / "demo.py"), "--url", server.url, "--once", "Hello"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "NO_COLOR": "1"})
        assert done.returncode == 0 and "Hello" in done.stdout, done.stderr
        assert server.stop() == 0
    finally:
        server.kill()


@pytest.mark.needs("node")
def test_requests_http_runs_from_top_to_bottom(make_server: Callable[..., Server], tmp_path: Path) -> None:
    server = make_server(SIMULATED_TOKEN_DELAY_MS=20).start()
    (tmp_path / "requests.http").write_text(REQUESTS.replace("localhost:3000", f"127.0.0.1:{server.port}"))
    runner = ROOT / "tests" / "node" / "node_modules" / ".bin" / "httpyac"
    command = [str(runner), "send", "requests.http", "--all", "--output", "response", "--no-color"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    statuses = re.findall(r"^HTTP/1\.1 (\d+)", done.stdout, re.M)
    assert " ".join(statuses) == STATUSES, done.stdout + done.stderr
    assert "event: done" in done.stdout and "event: reset" in done.stdout


def _requests_of_the_rest_client(text: str) -> Iterator[httpx.Request]:
    """Yield the requests of a file as the VS Code REST Client reads it, as far as its syntax is used here.

    Lines of three `#` divide it; other lines that begin with `#` or `//` are comments, in bodies, too; lines of
    variables are skipped before a request; a variable of the file is a plain value.
    """
    variables = dict(re.findall(r"^@(\S+) = (.*)$", text, re.M))
    for block in re.split(r"^###.*$", text, flags=re.M):
        if "# @disabled" in block:
            continue
        lines = [line for line in block.splitlines() if not re.match(r"\s*(#|//)", line)]
        request = "\n".join(line for line in lines if not line.startswith("@")).strip()
        if request:
            request = re.sub(r"\{\{(.*?)\}\}", lambda name: variables[name[1]], request)
            head, _, body = request.partition("\n\n")
            first, *headers = head.split("\n")
            method, url = first.split(" ")
            yield httpx.Request(method, url, headers=dict(line.split(": ", 1) for line in headers), content=body)


@pytest.mark.gen_test
async def test_rest_client_understands_requests_http(make_app: MakeApp) -> None:
    app = await make_app(simulated_token_delay_ms=5)
    answers = [
        await app.client.http.send(request)
        for request in _requests_of_the_rest_client(REQUESTS.replace("http://localhost:3000", app.url))
    ]
    assert " ".join(str(answer.status_code) for answer in answers) == STATUSES
    streams = [answer for answer in answers if "/chat/stream/" in answer.url.path]
    assert ["event: done" in stream.text for stream in streams] == [True, True, True, False]


@pytest.mark.gen_test
async def test_requests_http_works_with_a_token(make_app: MakeApp) -> None:
    app = await make_app(simulated_token_delay_ms=5, auth="jwt", auth_secret=("of-32-characters-or-more-in-tests",))
    token = sign("alice", app.settings, int(time.time()) + 600)
    text = REQUESTS.replace("http://localhost:3000", app.url).replace("@token = none", f"@token = {token}")
    answers = [await app.client.http.send(request) for request in _requests_of_the_rest_client(text)]

    statuses = {f"{answer.request.method} {answer.url.path}": answer.status_code for answer in answers}
    assert 401 not in statuses.values()
    assert statuses["GET /me"] == 200 and statuses["GET /chat/export"] == 200


FOLLOWER = """
import http from "node:http";

const [port, id] = process.argv.slice(2);
let streams = 0;
// Passes on requests with the token; aborts the first stream within an event, and stalls the second one.
const proxy = http.createServer((request, answer) => {
  if (request.headers.authorization !== "Bearer right") return answer.writeHead(401).end();
  const to = { port, path: request.url, method: request.method, headers: request.headers };
  const upstream = http.request(to, (from) => {
    answer.writeHead(from.statusCode, from.headers).flushHeaders();
    streams += 1;
    if (streams === 1) from.once("data", (data) => answer.write(data.subarray(0, 700), () => answer.destroy()));
    if (streams === 3) from.pipe(answer);
  });
  request.pipe(upstream);
}).listen(0, "127.0.0.1", async () => {
  const url = `http://127.0.0.1:${proxy.address().port}/chat/stream/${id}`;
  const refused = await follow(url, async () => "wrong", () => {});
  let text = "";
  await follow(url, async () => "right", (name, data) => {
    if (name === "token") text += data.text;
    if (name !== "done") return;
    throw new TypeError("from the handler");
  }, `${id}-0`).catch((error) => {
    console.log(JSON.stringify({ refused, streams, text, thrown: error.message }));
    process.exit();
  });
});
"""


@pytest.mark.needs("node")
@pytest.mark.gen_test
async def test_stream_is_read_by_fetch_with_a_token(make_app: MakeApp, tmp_path: Path) -> None:
    app = await make_app(keepalive_s=1.0, simulated_token_delay_ms=2)
    [example] = re.findall(r"^```js\n(.*?)^```", PROTOCOL, re.M | re.DOTALL)
    (tmp_path / "follow.mjs").write_text(example + FOLLOWER)
    answer = await app.client.say("Hello!")
    conversation_id = answer["conversationId"]
    await app.until(lambda: not app.replies.running)
    command = ["node", str(tmp_path / "follow.mjs"), str(app.port), conversation_id]

    node = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(node.communicate(), 50)

    reply = (await app.client.history(conversation_id))["messages"][1]
    assert json.loads(output) == {
        "refused": 401,
        "streams": 3,
        "text": reply["content"],
        "thrown": "from the handler",
    }
