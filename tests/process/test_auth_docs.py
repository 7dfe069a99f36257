"""The commands and programs of docs/auth.md, and of the README's section on users, run as they are."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from chatserver.settings import read_settings
from tests.apps import App, MakeApp
from tests.processes import ROOT, Server
from tests.users import SECRET, USERS

AUTH = (ROOT / "docs" / "auth.md").read_text()
README = (ROOT / "README.md").read_text().partition("## Users")[2].partition("\n## ")[0]


def blocks(language: str, text: str = AUTH) -> list[str]:
    """Return the blocks of a document in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.DOTALL)


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("text", [AUTH, README], ids=["auth.md", "README.md"])
def test_first_command_writes_valid_settings(tmp_path: Path, text: str) -> None:
    subprocess.run(["bash", "-ec", blocks("sh", text)[0]], cwd=tmp_path, timeout=20, check=True)

    settings = read_settings({}, tmp_path / ".env")
    assert settings.auth == "jwt" and len(settings.auth_secret) == 1


@pytest.mark.needs("curl")
@pytest.mark.parametrize("text", [AUTH, README], ids=["auth.md", "README.md"])
def test_commands_with_a_token_can_be_pasted(make_server: Callable[..., Server], text: str) -> None:
    server = make_server(AUTH="jwt", AUTH_SECRET=SECRET).start()
    script = blocks("sh", text)[1].replace("localhost:3000", f"127.0.0.1:{server.port}")
    script = script.replace("scripts/token", f"{sys.executable} -m chatserver.token")
    script = script.replace("scripts/demo.py", f"scripts/demo.py --url {server.url}")
    environment = {"PATH": os.environ["PATH"], "AUTH": "jwt", "AUTH_SECRET": SECRET}
    done = subprocess.run(
        ["bash", "-ec", script], cwd=ROOT, env=environment, input="Hi\n", capture_output=True, text=True, timeout=60
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert '"conversations"' in done.stdout
    assert ("you › Hi\nbot › " in done.stdout) if text == AUTH else ("> Who am I?" in done.stdout), done.stdout


@pytest.mark.parametrize("block", [each for each in blocks("sh") if re.match("AUTH=", each)])
def test_settings_of_an_example_are_valid(tmp_path: Path, block: str) -> None:
    (tmp_path / ".env").write_text(block)

    assert read_settings({}, tmp_path / ".env").auth in ("jwt", "proxy")


async def owner_by(app: App, token: str) -> str:
    """Start a turn with a token; return the owner of its conversation."""
    headers = {"Authorization": f"Bearer {token}"}
    answer = await app.client.http.post("/chat", json={"input": "Hello"}, headers=headers)
    assert answer.status_code == 202, answer.text
    [document] = app.database.conversations.find()
    return str(document["owner"])


EXPRESS = """
function requireUser(request, response, next) {
  request.user = { id: "alice" };
  next();
}
const server = app.listen(0, "127.0.0.1", async () => {
  const address = `http://127.0.0.1:${server.address().port}/chat-token`;
  const response = await fetch(address, { method: "POST" });
  console.log(JSON.stringify({ cookie: response.headers.get("set-cookie"), body: await response.text() }));
  server.close();
});
"""


async def token_of_express(folder: Path, *code: str) -> dict[str, Any]:
    """Run an application of the document; return its answer to a request for a token."""
    program = folder / "backend.mjs"
    program.write_text("\n".join(code) + EXPRESS)
    (folder / "node_modules").symlink_to(ROOT / "tests" / "node" / "node_modules")
    process = await asyncio.create_subprocess_exec(
        "node", program, env={"PATH": os.environ["PATH"], "AUTH_SECRET": SECRET}, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    answer: dict[str, Any] = json.loads(output)
    return answer


@pytest.mark.needs("node")
@pytest.mark.gen_test
async def test_token_of_the_express_backend_is_accepted(make_app: MakeApp, tmp_path: Path) -> None:
    app = await make_app(**USERS)
    answer = await token_of_express(tmp_path, blocks("js")[0])

    assert await owner_by(app, json.loads(answer["body"])["token"]) == "alice"


@pytest.mark.needs("node")
@pytest.mark.gen_test
async def test_cookie_of_the_express_backend_is_accepted(make_app: MakeApp, tmp_path: Path) -> None:
    app = await make_app(**USERS, auth_cookie="__Host-chat")
    beginning = blocks("js")[0].partition("app.post")[0]
    [route] = [block for block in blocks("js") if "response.cookie" in block]
    answer = await token_of_express(tmp_path, beginning, route)

    cookie, *attributes = answer["cookie"].split("; ")
    assert {"HttpOnly", "Secure", "Path=/", "SameSite=Lax", "Max-Age=600"} <= set(attributes)
    assert (await app.client.http.get("/chat", headers={"Cookie": cookie})).status_code == 200


@pytest.mark.gen_test
async def test_token_of_the_python_backend_is_accepted(make_app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    app = await make_app(**USERS)
    monkeypatch.setenv("AUTH_SECRET", SECRET)
    fastapi: Any = ModuleType("fastapi")  # a large package for a decorator
    fastapi.FastAPI = lambda: SimpleNamespace(post=lambda _: lambda route: route)
    fastapi.Depends = lambda dependency: dependency
    monkeypatch.setitem(sys.modules, "fastapi", fastapi)
    backend: dict[str, Any] = {"User": SimpleNamespace, "require_user": None}
    [code] = blocks("python")
    exec(code, backend)

    assert await owner_by(app, backend["chat_token"](SimpleNamespace(id="alice"))["token"]) == "alice"
