"""Requests of web pages: which origins may use the API, and that no route forgets to ask."""

import re
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from chatserver.handlers.access import is_cross_site
from chatserver.settings import Settings
from tests.apps import App, MakeApp
from tests.browser import FLAGS, TIMEOUT_MS, chromium
from tests.clients import RawStream, new_id
from tests.http.test_http import assert_problem
from tests.processes import ROOT, Server, until

EVIL = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}


@pytest.mark.parametrize(
    ("site", "origin", "host", "refused"),
    [
        # Sec-Fetch-Site decides, even if a proxy has changed Host.
        ("same-origin", "https://chat.example", "127.0.0.1", False),
        ("same-origin", None, "chat.example", False),
        ("none", None, "chat.example", False),
        ("same-site", "http://127.0.0.1:8000", "127.0.0.1", True),
        ("same-site", None, "chat.example", True),
        ("cross-site", "https://evil.example", "chat.example", True),
        ("cross-site", "https://chat.example", "chat.example", True),
        ("cross-site", None, "chat.example", True),
        ("cross-site", "null", "chat.example", True),
        ("", None, "chat.example", True),
        ("same-origin, cross-site", None, "chat.example", True),
        ("cross-site", "https://friend.example", "chat.example", False),
        # Plain http to a name that is no loopback address: the browser sends Origin alone.
        (None, "http://chat.example:3000", "chat.example", False),
        (None, "https://chat.example", "chat.example", False),
        (None, "http://chat.example", "CHAT.example", False),
        (None, "http://[::1]:3000", "[::1]", False),
        (None, "https://friend.example", "chat.example", False),
        (None, "http://friend.example", "chat.example", True),
        (None, "https://friend.example:444", "chat.example", True),
        (None, "https://evil.example", "chat.example", True),
        (None, "https://chat.example.evil.example", "chat.example", True),
        (None, "http://evil.example/chat.example", "chat.example", True),
        (None, "https://chat.example,https://evil.example", "chat.example", True),
        (None, "moz-extension://chat.example", "chat.example", True),
        (None, "null", "chat.example", True),
        (None, "null", "null", True),
        (None, "", "chat.example", True),
        (None, "http://[", "chat.example", True),
        # No browser.
        (None, None, "chat.example", False),
    ],
)
def test_pages_of_other_sites_are_distinguished_from_our_own(
    site: str | None, origin: str | None, host: str, refused: bool
) -> None:
    headers = {"Sec-Fetch-Site": site, "Origin": origin}
    request = {name: value for name, value in headers.items() if value is not None}
    settings = Settings(cors_origins=("https://friend.example",))
    assert is_cross_site(request, host, settings) is refused


@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
def test_every_origin_may_use_the_api_if_the_setting_says_so(origin: str) -> None:
    request = {"Sec-Fetch-Site": "cross-site", "Origin": origin}
    assert not is_cross_site(request, "chat.example", Settings(cors_origins=("*",)))


def test_origin_may_act_for_a_user_that_the_browser_identifies_only_with_credentials() -> None:
    friend = {"Sec-Fetch-Site": "cross-site", "Origin": "https://friend.example"}
    for credentials, refused in ((False, True), (True, False)):
        settings = Settings(cors_origins=("https://friend.example",), cors_credentials=credentials)
        assert is_cross_site(friend, "chat.example", settings, has_user=True) is refused
        own_page = {"Sec-Fetch-Site": "same-origin", "Origin": "https://friend.example"}
        assert not is_cross_site(own_page, "friend.example", settings, has_user=True)


@pytest.mark.gen_test
async def test_no_route_does_anything_for_a_page_of_another_site(make_app: MakeApp) -> None:
    app = await make_app(cors_origins=("https://friend.example",))
    assert len(app.paths) > 10
    for path in [*app.paths, "/nope"]:
        is_stream = path.startswith("/chat/stream/")
        for method in ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"):
            response = await app.client.http.request(method, path, headers=EVIL)
            if method in ("HEAD", "OPTIONS") or (method == "GET" and not is_stream):
                assert response.status_code != 403, f"{method} {path}"
            else:
                assert_problem(response, 403, "cross_site")
                assert not [name for name in response.headers if name.lower().startswith("access-control")]
    assert app.database.conversations.count_documents({}) == 0 and len(app.streams) == 0


@pytest.mark.gen_test
async def test_page_of_another_site_neither_stops_nor_deletes_nor_watches(app: App) -> None:
    answer, _ = await app.client.turn("hi")
    path = f"/chat/{answer['conversationId']}"
    form = {**EVIL, "Content-Type": "text/plain"}
    assert_problem(await app.client.http.post(f"{path}/stop", content=b"", headers=form), 403, "cross_site")
    assert_problem(await app.client.http.delete(path, headers={"Origin": "null"}), 403, "cross_site")
    raw = await RawStream(
        app.port, f"/chat/stream/{answer['conversationId']}", headers="Sec-Fetch-Site: cross-site\r\n"
    ).open()
    assert " 403 " in raw.head
    raw.close()
    assert (await app.client.history(answer["conversationId"]))["status"] == "idle"


@pytest.mark.gen_test
async def test_page_of_an_allowed_origin_posts_and_watches(make_app: MakeApp) -> None:
    app = await make_app(cors_origins=("https://friend.example",))
    friend = {"Origin": "https://friend.example", "Sec-Fetch-Site": "cross-site"}
    answer = await app.client.http.post("/chat", json={"input": "hi"}, headers=friend)
    assert answer.status_code == 202
    assert answer.headers["Access-Control-Allow-Origin"] == "https://friend.example"
    lines = "".join(f"{name}: {value}\r\n" for name, value in friend.items())
    raw = await RawStream(app.port, f"/chat/stream/{answer.json()['conversationId']}", headers=lines).open()
    assert " 200 " in raw.head and "Access-Control-Allow-Origin: https://friend.example" in raw.head
    raw.close()


# -- in a browser --------------------------------------------------------------------------------------------------


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def other_site(tmp_path: Path) -> Iterator[str]:
    """The origin of another web server, which serves the files of `tmp_path`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.needs("chromium")
def test_page_of_the_readme_works_from_an_allowed_origin_and_from_no_other(
    make_server: Callable[..., Server], other_site: str, tmp_path: Path
) -> None:
    readme = (ROOT / "README.md").read_text()
    page_html = readme.partition("```html\n")[2].partition("```")[0]
    allowing, refusing = make_server(CORS_ORIGINS=other_site).start(), make_server().start()
    (tmp_path / "index.html").write_text(page_html.replace("http://127.0.0.1:3000", allowing.url))
    (tmp_path / "evil.html").write_text(f'<form method="post" action="{refusing.url}/chat/{new_id()}/stop"></form>')
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(TIMEOUT_MS)

        page.goto(f"{other_site}/index.html")
        page.locator("#say").fill("Hello!")
        page.locator("#say").press("Enter")
        expect(page.locator("#log")).to_contain_text("user: Hello!")
        until(lambda: "reply complete" in allowing.output)

        page.goto(f"{other_site}/evil.html")
        with page.expect_navigation() as navigation:
            page.evaluate("document.forms[0].submit()")
        assert navigation.value.status == 403 and navigation.value.json()["code"] == "cross_site"
        # A stream that cannot be read would count against the limits.
        page.goto(f"{other_site}/evil.html")
        page.evaluate(f"new EventSource('{refusing.url}/chat/stream/{new_id()}')")
        until(lambda: bool(re.search("GET /chat/stream/.*cross_site", refusing.output)))
        # A link from elsewhere opens the pages.
        for path in ("/", "/docs"):
            page.goto(f"{other_site}/evil.html")
            with page.expect_navigation() as navigation:
                page.evaluate(f"location.href = '{refusing.url}{path}'")
            assert navigation.value.status == 200
        browser.close()
