"""The files of the page, and clients that use them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, Route, expect

from tests.browser import Site
from tests.page.steps import (
    MakeSite,
    answers,
    expect_idle,
    id_of,
    open_page,
    said,
    say,
    words,
)
from tests.processes import ROOT
from tests.proxy import CuttingProxy

pytestmark = pytest.mark.needs("chromium")


def test_works_under_a_path_and_requests_nothing_else(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(3))
    prefix = f"{site.url}some/where/"
    asked: list[str] = []

    def pass_on(route: Route) -> None:
        asked.append(route.request.url)
        route.continue_(url=route.request.url.replace(prefix, site.url))

    page.route("**/*", pass_on)
    open_page(page, prefix)
    say(page, "Here?")
    site.say(3)
    expect(answers(page)).to_have_text([said(3)])
    expect_idle(page)
    page.reload()
    expect(answers(page)).to_have_text([said(3)])
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith(prefix)] == []


def test_files_are_whole_and_at_one_address(make_site: MakeSite) -> None:
    site = make_site()
    for path in ("web/", "web/./", "web/index.html", "web/client.js/"):
        answer = httpx.get(site.url + path)
        assert (answer.status_code, answer.headers["Content-Type"]) == (404, "application/problem+json"), path
    whole = httpx.get(f"{site.url}web/client.js")
    for part in ("bytes=999999-", "bytes=0-9", "bytes=5-2"):
        answer = httpx.get(f"{site.url}web/client.js", headers={"Range": part})
        assert (answer.status_code, answer.content) == (200, whole.content)
    assert "Accept-Ranges" not in whole.headers
    types = httpx.get(f"{site.url}web/client.d.ts")
    assert (types.headers["Content-Type"], types.headers["Cache-Control"]) == ("text/plain", "no-cache")
    assert "ETag" in types.headers and types.content == (ROOT / "chatserver" / "web" / "client.d.ts").read_bytes()
    head = httpx.head(site.url)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Length"] == httpx.get(site.url).headers["Content-Length"]


def test_copied_client_needs_no_other_file(page: Page, make_site: MakeSite) -> None:
    """`client.js` is one file, and its own example works."""
    site = make_site(words(2))
    site.say(2)
    source = httpx.get(f"{site.url}web/client.js").text
    assert "import " not in re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    page.goto(f"{site.url}web/favicon.svg")
    shown = page.evaluate(
        """async (base) => {
          const { Api, Conversation, newId } = await import(`${base}web/client.js`);
          const conversation = new Conversation(new Api(base), newId(), { fresh: true });
          const ended = new Promise((resolve) => conversation.addEventListener("end", resolve));
          conversation.open();
          await conversation.say("Hello!");
          await ended;
          conversation.pause();
          const { messages: [answer] } = await conversation.api.history(conversation.id, { limit: 1 });
          const part = await conversation.api.history(conversation.id, { before: answer.id });
          if (answer.content !== "word0 word1" || part.messages[0].content !== "Hello!") {
            throw new Error("parts of the history are not told apart");
          }
          return JSON.stringify([conversation.id, conversation.state, conversation.busy, conversation.messages]);
        }""",
        site.url,
    )
    conversation_id, state, busy, messages = json.loads(shown)
    names = {"user": ("id", "role", "content", "status", "createdAt"), "assistant": ("id", "role", "content", "status")}
    stored = [{name: each[name] for name in names[each["role"]]} for each in site.history(conversation_id)]
    assert (state, busy, messages) == ("paused", False, stored)


def page_of_the_readme(port: int) -> str:
    readme = (ROOT / "README.md").read_text()
    html = re.search(r"```html\n(.*?)```", readme.partition("### A page of your own")[2], re.DOTALL)
    assert html
    return html[1].replace("127.0.0.1:3000", f"127.0.0.1:{port}")


def test_page_of_the_readme(
    page: Page, make_site: MakeSite, make_proxy: Callable[[Site], CuttingProxy], file_server: str, tmp_path: Path
) -> None:
    readme = (ROOT / "README.md").read_text()
    steps = readme.partition("### A page of your own")[2].partition("\n### ")[0]
    assert re.findall(r"^\d(?=\.)", steps, re.M) == ["1", "2", "3"]
    # All three steps use the same origin.
    assert steps.count("http://127.0.0.1:8000") == 2 and "http.server 8000 --bind 127.0.0.1" in steps
    site = make_site(words(2), words(3), keepalive_s=1.0, max_input_chars=400, cors_origins=(file_server,))
    proxy = make_proxy(site)
    (tmp_path / "index.html").write_text(page_of_the_readme(proxy.port))
    log, box, trouble = page.locator("#log"), page.locator("#say"), page.locator("#trouble")
    streams: list[Route] = []
    page.route("**/chat/stream/**", lambda route: streams.append(route), times=1)
    page.goto(f"{file_server}/")

    # The first message is stored before the stream is open, and shown.
    box.fill("x" * 400)
    page.keyboard.press("Enter")
    expect(box).to_have_value("")
    while not streams:
        page.wait_for_timeout(10)
    streams.pop().continue_()
    site.say(2)
    expect(log).to_have_text(f"user: {'x' * 400}\nassistant: {said(2)}")
    # A long line is wrapped.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # A refused or unsent message stays in the box, and the reason is shown.
    box.fill("y" * 401)
    page.get_by_role("button").click()
    expect(trouble).to_have_text("Not sent: /input must have at most 400 characters.")
    expect(box).to_have_value("y" * 401)
    page.route("**/chat", lambda route: route.abort(), times=1)
    box.fill("Second")
    page.keyboard.press("Enter")
    expect(trouble).to_have_text("Not sent: Failed to fetch")
    expect(box).to_have_value("Second")
    # A stream that has died without closing is opened again from its position.
    assert proxy.mute_streams() == 1
    page.keyboard.press("Enter")
    site.say(3)
    whole = f"user: {'x' * 400}\nassistant: {said(2)}\nuser: Second\nassistant: {said(3)}"
    expect(log).to_have_text(whole)
    expect(trouble).to_have_text("")
    page.reload()
    expect(log).to_have_text(whole)
    # The page shows the history before its stream is open.
    site.until(lambda: proxy.streams >= 3)
    site.until(lambda: site.open_streams() == 1)
    assert proxy.streams == 3
    assert [each["content"] for each in site.history(id_of(page))] == ["x" * 400, said(2), "Second", said(3)]


def test_page_of_the_readme_shows_another_branch(
    page: Page, make_site: MakeSite, file_server: str, tmp_path: Path
) -> None:
    site = make_site(words(2), words(3), words(4), cors_origins=(file_server,))
    (tmp_path / "index.html").write_text(page_of_the_readme(site.app.port))
    log, box = page.locator("#log"), page.locator("#say")
    loads: list[Page] = []
    page.on("domcontentloaded", lambda page: loads.append(page))
    page.goto(f"{file_server}/")
    box.fill("Hello")
    page.keyboard.press("Enter")
    site.say(2)
    expect(log).to_have_text(f"user: Hello\nassistant: {said(2)}")
    conversation_id = id_of(page)
    first = site.history(conversation_id)[1]["id"]
    assert len(loads) == 1

    httpx.post(f"{site.url}chat/{conversation_id}/retry").raise_for_status()
    site.say(3)
    expect(log).to_have_text(f"user: Hello\nassistant: {said(3)}")
    site.until(lambda: not site.app.replies.running)

    loads.clear()
    with page.expect_event("domcontentloaded"):
        httpx.put(f"{site.url}chat/{conversation_id}/head", json={"messageId": first}).raise_for_status()
    expect(log).to_have_text(f"user: Hello\nassistant: {said(2)}")

    # The visible conversation is continued without a reload; a reload shows a reply that has no text yet.
    box.fill("Go on")
    page.keyboard.press("Enter")
    expect(log).to_have_text(f"user: Hello\nassistant: {said(2)}\nuser: Go on\nassistant: ")
    page.reload()
    site.say(4)
    expect(log).to_have_text(f"user: Hello\nassistant: {said(2)}\nuser: Go on\nassistant: {said(4)}")
    site.until(lambda: site.open_streams() == 1)
    assert len(loads) == 2
