"""AUTH=proxy behind a real nginx and a real Apache, with the configurations of docs/auth.md.

The user who is signed in is Zoë. Mallory's name is only ever sent by clients.
"""

import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlencode

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

from tests.apps import App, MakeApp
from tests.clients import new_id
from tests.processes import ROOT
from tests.web_servers import apache, nginx

pytestmark = pytest.mark.gen_test

DOCUMENT = (ROOT / "docs" / "auth.md").read_text()
DEPLOYED = (ROOT / "scripts" / "deploy" / "nginx.conf").read_text()
OWNER = "zoë"
FORGED = ({"X-Forwarded-User": "mallory"}, {"X_Forwarded_User": "mallory"}, {"x-forwarded-user": "mallory"})
DROPPED = {"Connection": "close, X-Forwarded-User"}
"""Asks the proxy to remove its own header (RFC 9110, 7.6.1)."""


def example(language: str) -> str:
    """Return the one block of docs/auth.md in a language."""
    [block] = re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT, re.M | re.DOTALL)
    return str(block)


@contextmanager
def served(*routes: tuple[str, type[RequestHandler]]) -> Iterator[str]:
    """Serve handlers; give the address, without a slash at the end."""
    server = HTTPServer(Application(list(routes), log_function=lambda _: None))
    sock, port = bind_unused_port()
    server.add_socket(sock)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()


class Check(RequestHandler):
    """Decides for nginx who is signed in, as oauth2-proxy does: here the cookie is the name."""

    def get(self) -> None:
        user = self.get_cookie("session")
        self.set_status(202 if user else 401)
        if user:
            # Tornado writes headers as Latin-1.
            self.set_header("X-Auth-Request-User", unquote(user).encode().decode("latin-1"))


@asynccontextmanager
async def behind_nginx(app: App, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Give a client that is signed in, behind the nginx of the document."""
    with served(("/oauth2/auth", Check)) as check:
        async with (
            nginx(folder, example("nginx"), app.port, {"http://127.0.0.1:4180": check}) as port,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", cookies={"session": quote(OWNER)}) as client,
        ):
            yield client


def provider_routes() -> tuple[tuple[str, type[RequestHandler]], ...]:
    """Return an OpenID Connect provider where everybody is Zoë, and signed in already."""
    key = rsa.generate_private_key(65537, 2048)
    nonces: dict[str, str] = {}

    class Configuration(RequestHandler):
        def get(self) -> None:
            issuer = f"http://{self.request.host}"
            addresses = {
                name: f"{issuer}/{path}"
                for name, path in (
                    ("authorization_endpoint", "authorize"),
                    ("token_endpoint", "token"),
                    ("jwks_uri", "keys"),
                )
            }
            self.finish({"issuer": issuer, **addresses})

    class Authorize(RequestHandler):
        def get(self) -> None:
            code = secrets.token_hex()
            nonces[code] = self.get_argument("nonce")
            answer = urlencode({"code": code, "state": self.get_argument("state")})
            self.redirect(f"{self.get_argument('redirect_uri')}?{answer}")

    class Token(RequestHandler):
        def check_xsrf_cookie(self) -> None:
            pass

        def post(self) -> None:
            now = int(time.time())
            claims = {
                "iss": f"http://{self.request.host}",
                "aud": "chat",
                "sub": OWNER,
                "iat": now,
                "exp": now + 600,
                "nonce": nonces.pop(self.get_argument("code")),
            }
            token = jwt.encode(claims, key, algorithm="RS256", headers={"kid": "1"})
            self.finish({"access_token": "opaque", "token_type": "Bearer", "id_token": token})

    class Keys(RequestHandler):
        def get(self) -> None:
            jwk = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key()))
            self.finish({"keys": [{**jwk, "kid": "1", "use": "sig"}]})

    return (
        ("/.well-known/openid-configuration", Configuration),
        ("/authorize", Authorize),
        ("/token", Token),
        ("/keys", Keys),
    )


@asynccontextmanager
async def behind_apache(app: App, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Give a client that is signed in, behind the Apache of the document."""
    (folder / "passphrase").write_text(secrets.token_hex())
    with served(*provider_routes()) as provider:
        changes = {"https://login.example.com": provider, "/etc/apache2/oidc-passphrase": f"{folder}/passphrase"}
        async with (
            apache(folder, example("apache"), app.port, changes) as port,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
        ):
            # The page sends the browser to the provider and back.
            page = await client.get("/", follow_redirects=True)
            assert page.status_code == 200 and len(page.history) == 3, page.text
            yield client


Behind = Callable[[App, Path], AbstractAsyncContextManager[httpx.AsyncClient]]
both_proxies = pytest.mark.parametrize(
    "behind",
    [
        pytest.param(behind_nginx, marks=pytest.mark.needs("nginx"), id="nginx"),
        pytest.param(behind_apache, marks=pytest.mark.needs("apache2"), id="apache"),
    ],
)


async def make_trusting_app(make_app: MakeApp) -> App:
    return await make_app(auth="proxy", trusted_proxies=("127.0.0.1",))


def owners(app: App) -> list[str]:
    """Return the owners of all stored conversations."""
    return [document["owner"] for document in app.database.conversations.find()]


async def say(client: httpx.AsyncClient, conversation_id: str | None = None, **headers: Any) -> httpx.Response:
    body = {"input": "Hello"} | ({"conversationId": conversation_id} if conversation_id else {})
    return await client.post("/chat", json=body, **headers)


@both_proxies
async def test_conversation_belongs_to_the_user_whom_the_proxy_names(
    make_app: MakeApp, tmp_path: Path, behind: Behind
) -> None:
    app = await make_trusting_app(make_app)
    conversation_id = new_id()
    async with behind(app, tmp_path) as client:
        accepted = await say(client, conversation_id)
        stream = await client.get(f"/chat/stream/{conversation_id}?until=done&lastEventId={conversation_id}-0")
        history = (await client.get(f"/chat/{conversation_id}")).json()

    assert accepted.status_code == 202
    assert "event: done" in stream.text
    assert [message["role"] for message in history["messages"]] == ["user", "assistant"]
    assert owners(app) == [OWNER]


@both_proxies
async def test_header_of_the_client_is_overwritten(make_app: MakeApp, tmp_path: Path, behind: Behind) -> None:
    app = await make_trusting_app(make_app)
    async with behind(app, tmp_path) as client:
        answers = [await say(client, headers=headers) for headers in FORGED]
        dropped = await say(client, headers=DROPPED)
        dropped_and_forged = await say(client, headers={**DROPPED, "X-Forwarded-User": "mallory"})

    assert [answer.status_code for answer in answers] == [202] * len(FORGED)
    # nginx does not obey `Connection`; Apache does, and then nobody is named.
    assert {dropped.status_code, dropped_and_forged.status_code} == {202 if behind is behind_nginx else 401}
    assert set(owners(app)) == {OWNER}


@both_proxies
async def test_request_without_a_session_is_refused_and_not_redirected(
    make_app: MakeApp, tmp_path: Path, behind: Behind
) -> None:
    app = await make_trusting_app(make_app)
    conversation_id = new_id()
    async with behind(app, tmp_path) as client:
        client.cookies.clear()
        answers = [
            await client.request(method, path, headers=headers, content=content)
            for headers in ({}, *FORGED, DROPPED, {**DROPPED, "X-Forwarded-User": "mallory"})
            for method, path, content in (
                ("GET", "/chat", None),
                ("POST", "/chat", '{"input": "Hello"}'),
                ("GET", f"/chat/stream/{conversation_id}?until=done", None),
                ("DELETE", f"/chat/{conversation_id}", None),
                ("GET", "/me", None),
                ("DELETE", "/me", None),
            )
        ]

    assert {answer.status_code for answer in answers} == {401}
    assert owners(app) == []


@both_proxies
async def test_page_learns_who_is_signed_in_and_where_to_sign_in(
    make_app: MakeApp, tmp_path: Path, behind: Behind
) -> None:
    app = await make_app(auth="proxy", trusted_proxies=("127.0.0.1",), auth_login_url="/login?to={page}")
    async with behind(app, tmp_path) as client:
        signed_in = await client.get("/me")
        client.cookies.clear()
        signed_out = await client.get("/me")

    assert signed_in.json()["owner"] == OWNER
    assert (signed_out.status_code, signed_out.json()["loginUrl"]) == (401, "/login?to={page}")


@pytest.mark.needs("nginx")
async def test_nginx_that_names_nobody_lets_nobody_in(make_app: MakeApp, tmp_path: Path) -> None:
    app = await make_app(auth="proxy", trusted_proxies=("127.0.0.1",), allowed_hosts=("chat.example.com",))
    async with (
        nginx(tmp_path, DEPLOYED, app.port) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        statuses = [(await say(client, headers=headers)).status_code for headers in ({}, *FORGED)]

    assert statuses == [401] * 4
    assert owners(app) == []


async def test_address_that_is_not_a_trusted_proxy_names_nobody(make_app: MakeApp) -> None:
    app = await make_trusting_app(make_app)
    transport = httpx.AsyncHTTPTransport(local_address="127.0.0.2")
    async with httpx.AsyncClient(base_url=app.url, transport=transport) as client:
        answers = [
            await say(client, headers={"X-Forwarded-User": "mallory", **headers})
            for headers in ({}, {"X-Forwarded-For": "127.0.0.1"}, {"Forwarded": "for=127.0.0.1"})
        ]

    assert {answer.status_code for answer in answers} == {401}
    assert owners(app) == []
