"""The React hook of docs/react.md, with React in a real browser."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Page, Route, expect

from chatserver.errors import SourceError
from tests.browser import Site
from tests.page.steps import NODE_MODULES, MakeSite, id_of, said, words
from tests.processes import ROOT
from tests.proxy import CuttingProxy

pytestmark = pytest.mark.needs("chromium", "node")

NAMES = ("useConversation.ts", "Chat.tsx", "main.tsx")
WEB = ROOT / "chatserver" / "web"
HTML = '<link rel="icon" href="data:,"><div id="root"></div><script src="page.js"></script>'
SWITCHING = """
import { StrictMode, useState } from "react";
import { createRoot } from "react-dom/client";
import { Chat } from "./Chat";

function Switch() {
  const [id, show] = useState("");
  Object.assign(window, { show });
  return id && <Chat id={id} fresh={false} />;
}

createRoot(document.getElementById("root") as HTMLElement).render(<StrictMode><Switch /></StrictMode>);
"""
"""Replaces main.tsx: `show(id)` mounts a conversation, `show("")` unmounts it."""

Build = Callable[..., None]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Return a function that makes a page of the document's files, for an API at a port, and checks their types."""

    def build(port: int, main: str = "") -> None:
        blocks = re.findall(r"^ *```tsx?\n(.*?)^ *```", (ROOT / "docs" / "react.md").read_text(), re.M | re.DOTALL)
        files = dict(zip(NAMES, blocks, strict=True))
        files["main.tsx"] = main or files["main.tsx"]
        for name, text in files.items():
            (tmp_path / name).write_text(text.replace("http://127.0.0.1:3000/", f"http://127.0.0.1:{port}/"))
        for name in ("client.js", "client.d.ts"):
            (tmp_path / name).write_text((WEB / name).read_text())
        (tmp_path / "node_modules").symlink_to(NODE_MODULES.resolve())
        (tmp_path / "index.html").write_text(HTML)
        types = "--noEmit --strict --noUnusedLocals --jsx react-jsx --target es2023 --module esnext"
        types += " --moduleResolution bundler --lib es2023,dom,dom.iterable"
        bundle = '--bundle --outfile=page.js --jsx=automatic --define:process.env.NODE_ENV="development"'
        for command in (f"tsc main.tsx {types}", f"esbuild main.tsx {bundle} --log-level=warning"):
            tool, *arguments = command.split()
            done = subprocess.run(
                [NODE_MODULES / ".bin" / tool, *arguments],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=100,
            )
            assert done.returncode == 0, done.stdout + done.stderr

    return build


@pytest.fixture
def complaints(context: BrowserContext) -> list[str]:
    """The warnings and errors that React and the browser write to the console."""
    found: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("warning", "error"):
            found.append(message.text)

    context.on("console", note)
    return found


def messages(page: Page) -> Locator:
    return page.get_by_role("listitem").get_by_role("paragraph")


def say(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def expect_live(page: Page) -> None:
    expect(page.get_by_role("status")).to_have_text("live")


def expect_stored(page: Page, site: Site) -> None:
    """Check that the page shows exactly the stored messages."""
    stored = site.history(id_of(page))
    expect(messages(page)).to_have_text([each["content"] for each in stored])


def test_reload_and_second_tab_show_the_answer_once(
    context: BrowserContext, make_site: MakeSite, build: Build, file_server: str, complaints: list[str]
) -> None:
    site = make_site(words(6), words(2), cors_origins=(file_server,))
    build(site.app.port)
    one = context.new_page()
    one.goto(f"{file_server}/")
    expect_live(one)
    say(one, "Count")
    site.say(2)
    expect(messages(one)).to_have_text(["Count", said(2)])
    two = context.new_page()
    two.goto(one.url)
    expect(messages(two)).to_have_text(["Count", said(2)])

    one.reload()
    for each in (one, two):
        expect_live(each)
        expect(messages(each)).to_have_text(["Count", said(2)])
    site.say(4)
    for each in (one, two):
        expect(messages(each)).to_have_text(["Count", said(6)])
    say(two, "Again")
    site.say(2)

    for each in (one, two):
        expect(messages(each)).to_have_text(["Count", said(6), "Again", said(2)])
        expect(each.get_by_label("Message")).to_have_value("")
        expect(each.get_by_role("button", name="Send")).to_be_enabled()
        expect_stored(each, site)
    assert complaints == []


def test_cut_connections_lose_and_repeat_nothing(
    page: Page,
    make_site: MakeSite,
    make_proxy: Callable[[Site], CuttingProxy],
    build: Build,
    file_server: str,
) -> None:
    site = make_site(words(40), keepalive_s=1.0, cors_origins=(file_server,))
    proxy = make_proxy(site)
    build(proxy.port)
    page.goto(f"{file_server}/")
    expect_live(page)
    say(page, "Count")

    # At once, in the middle of a frame, and without closing.
    site.say(10)
    expect(messages(page)).to_have_text(["Count", said(10)])
    proxy.cut_after(900)
    assert proxy.cut() >= 1
    site.say(10)
    expect(messages(page)).to_have_text(["Count", said(20)])
    proxy.cut_after(None)
    proxy.cut()
    expect_live(page)
    proxy.mute_streams()
    site.say(20)

    expect(messages(page)).to_have_text(["Count", said(40)])
    expect(page.get_by_role("button", name="Send")).to_be_enabled()
    expect_stored(page, site)


def test_message_whose_answer_was_lost_is_sent_once_over_a_reload(
    page: Page, make_site: MakeSite, build: Build, file_server: str
) -> None:
    site = make_site(words(1), words(2), cors_origins=(file_server,))
    build(site.app.port)
    keys: list[str] = []
    losses = iter(["before", "after"])

    def lose(route: Route) -> None:
        if route.request.method != "POST":
            route.continue_()
            return
        keys.append(route.request.headers["idempotency-key"])
        loss = next(losses, None)
        if loss == "after":
            route.fetch()
        route.abort("connectionreset") if loss else route.continue_()

    page.route("**/chat", lose)
    page.goto(f"{file_server}/")
    expect_live(page)
    say(page, "Once only")
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached.")
    page.reload()
    expect(page.get_by_label("Message")).to_have_value("Once only")

    # The server accepts it this time, and the stream shows that.
    page.get_by_role("button", name="Send").click()

    site.say()
    expect(messages(page)).to_have_text(["Once only", said(1)])
    expect(page.get_by_label("Message")).to_have_value("")
    page.reload()
    expect(messages(page)).to_have_text(["Once only", said(1)])
    expect(page.get_by_label("Message")).to_have_value("")
    assert len(keys) == 2 and keys[0] == keys[1]
    expect_stored(page, site)


def test_stop_and_retry(page: Page, make_site: MakeSite, build: Build, file_server: str, complaints: list[str]) -> None:
    failure = SourceError("source_unavailable", "The model is away; try again.")
    site = make_site(words(9), [failure], words(2), cors_origins=(file_server,))
    build(site.app.port)
    page.goto(f"{file_server}/")
    expect_live(page)
    say(page, "Count")
    site.say(3)
    expect(messages(page)).to_have_text(["Count", said(3)])
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    site.say()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    page.get_by_role("button", name="Retry").click()
    site.say(2)
    expect(messages(page)).to_have_text(["Count", said(2)])
    expect(page.get_by_role("button", name="Retry")).to_be_hidden()
    expect_stored(page, site)
    assert complaints == []


def test_edit_regenerate_and_switch(
    context: BrowserContext, make_site: MakeSite, build: Build, file_server: str, complaints: list[str]
) -> None:
    site = make_site(words(1), words(2), words(3), cors_origins=(file_server,))
    build(site.app.port)
    one = context.new_page()
    one.goto(f"{file_server}/")
    expect_live(one)
    say(one, "Count")
    site.say()
    expect(messages(one)).to_have_text(["Count", said(1)])
    two = context.new_page()
    two.goto(one.url)

    one.get_by_role("button", name="Regenerate").click()
    site.say(2)
    for each in (one, two):
        expect(messages(each)).to_have_text(["Count", said(2)])
        expect(each.get_by_role("listitem").last).to_contain_text("2/2")
    two.get_by_role("button", name="Previous version").click()
    for each in (one, two):
        expect(messages(each)).to_have_text(["Count", said(1)])
        expect(each.get_by_role("listitem").last).to_contain_text("1/2")
    one.once("dialog", lambda dialog: dialog.accept("Count on"))
    one.get_by_role("button", name="Edit").click()
    site.say(3)

    for each in (one, two):
        expect(messages(each)).to_have_text(["Count on", said(3)])
        expect(each.get_by_role("listitem").first).to_contain_text("2/2")
        expect_stored(each, site)
    assert complaints == []


def test_edit_whose_answer_was_lost_is_sent_again_as_an_edit(
    page: Page, make_site: MakeSite, build: Build, file_server: str
) -> None:
    site = make_site(words(1), words(2), cors_origins=(file_server,))
    build(site.app.port)
    page.goto(f"{file_server}/")
    expect_live(page)
    say(page, "Count")
    site.say()
    expect(messages(page)).to_have_text(["Count", said(1)])
    page.once("dialog", lambda dialog: dialog.accept("Count on"))
    page.route("**/chat", lambda route: route.abort("connectionreset"), times=1)
    page.get_by_role("button", name="Edit").click()
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached.")
    expect(page.get_by_label("Message")).to_have_value("Count on")

    page.get_by_role("button", name="Send").click()
    site.say(2)

    expect(messages(page)).to_have_text(["Count on", said(2)])
    expect(page.get_by_label("Message")).to_have_value("")
    expect_stored(page, site)


def test_other_id_and_unmount_leave_no_stream_open(
    page: Page, make_site: MakeSite, build: Build, file_server: str, complaints: list[str]
) -> None:
    site = make_site(words(4), words(2), cors_origins=(file_server,))
    build(site.app.port, SWITCHING)
    first = site.run(site.app.client.say("First"))["conversationId"]
    second = site.run(site.app.client.say("Second"))["conversationId"]
    site.say(3)
    page.goto(f"{file_server}/")

    # StrictMode mounts it twice.
    page.evaluate("id => show(id)", first)
    expect_live(page)
    expect(messages(page)).to_contain_text(["First", "word0"])
    site.until(lambda: site.open_streams() == 1)
    page.evaluate("id => show(id)", second)
    expect_live(page)
    expect(messages(page)).to_contain_text(["Second", "word0"])
    site.until(lambda: site.open_streams() == 1)
    site.say(3)
    expect(messages(page)).to_have_text(["Second", said(2)])
    page.evaluate("show('')")
    site.until(lambda: site.open_streams() == 0)
    page.evaluate("id => show(id)", first)

    expect(messages(page)).to_have_text(["First", said(4)])
    expect_live(page)
    assert site.open_streams() == 1
    assert complaints == []


def test_signed_out_user_continues_when_the_window_gets_the_focus(
    page: Page, make_site: MakeSite, build: Build, file_server: str
) -> None:
    site = make_site(words(4), cors_origins=(file_server,))
    build(site.app.port)
    page.goto(f"{file_server}/")
    expect_live(page)
    say(page, "Count")
    site.say(2)
    expect(messages(page)).to_have_text(["Count", said(2)])
    page.get_by_label("Message").fill("Next")
    cors = {"Access-Control-Allow-Origin": file_server}
    page.route(re.compile("/chat/stream/|/me$"), lambda route: route.fulfill(status=401, headers=cors))
    site.run(site.app.end_streams())
    expect(page.get_by_role("status")).to_have_text("signedOut")
    site.say(2)

    page.unroute_all()
    page.evaluate("dispatchEvent(new Event('focus'))")

    expect_live(page)
    expect(messages(page)).to_have_text(["Count", said(4)])
    expect(page.get_by_label("Message")).to_have_value("Next")
