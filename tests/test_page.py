"""The chat page in a real Chromium: what a person sees, and that it is what is stored."""

import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from bson import ObjectId
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect, sync_playwright

from chatserver.errors import SourceError
from tests.apps import Database
from tests.browser import FLAGS, TIMEOUT_MS, Site, Turns, chromium
from tests.clients import new_id
from tests.proxy import CuttingProxy
from tests.servers import ROOT, Server

pytestmark = pytest.mark.needs("chromium")

MakeSite = Callable[..., Site]
NODE_MODULES = ROOT / "tests" / "node" / "node_modules"
AXE = NODE_MODULES / "axe-core" / "axe.min.js"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, for a module: while Playwright runs, no other event loop can run in this thread."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def make_site(database: Database) -> Iterator[Callable[..., Site]]:
    """Return a function that starts the application; see `Site`."""
    sites: list[Site] = []

    def make(*scripts: list[str | BaseException], **settings: Any) -> Site:
        sites.append(Site(database, Turns(*scripts) if scripts else None, **settings))
        return sites[-1]

    yield make
    for site in sites:
        site.stop()


@pytest.fixture
def make_proxy() -> Iterator[Callable[[Site], CuttingProxy]]:
    """Return a function that puts a proxy before a site."""
    proxies: list[tuple[Site, CuttingProxy]] = []

    def make(site: Site) -> CuttingProxy:
        proxy = CuttingProxy()
        site.run(proxy.start(site.app.port))
        proxies.append((site, proxy))
        return proxy

    yield make
    for site, proxy in proxies:
        site.run(proxy.close())


@pytest.fixture
def new_context(browser: Browser, make_site: MakeSite) -> Iterator[Callable[..., BrowserContext]]:
    """Return a function that makes a browser's profile of its own; a script's error on any page fails the test.

    It comes after the sites, so that it ends before them: no page opens a stream while its site is being stopped.
    """
    contexts: list[BrowserContext] = []
    errors: list[str] = []

    def make(**options: Any) -> BrowserContext:
        context = browser.new_context(**options)
        context.set_default_timeout(TIMEOUT_MS)
        context.on("weberror", lambda error: errors.append(str(error.error)))
        contexts.append(context)
        return context

    yield make
    for context in contexts:
        context.close()
    assert not errors, errors


@pytest.fixture
def context(new_context: Callable[..., BrowserContext]) -> BrowserContext:
    return new_context(viewport={"width": 1200, "height": 800})


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


def words(count: int) -> list[str | BaseException]:
    """Return the pieces of an answer that is one paragraph."""
    return [f"{' ' if number else ''}word{number}" for number in range(count)]


def said(count: int) -> str:
    return " ".join(f"word{number}" for number in range(count))


def said_by_user(page: Page) -> Locator:
    return page.locator(".message.user .body")


def answers(page: Page) -> Locator:
    return page.locator(".message.assistant .body")


def open_page(page: Page, url: str) -> Page:
    """Go there and wait until the stream is open."""
    page.goto(url)
    expect(page.locator("#state")).to_have_text("Live")
    return page


def say(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def expect_idle(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def id_of(page: Page) -> str:
    """Return the id in the address bar, once what was said is taken."""
    page.wait_for_url(re.compile("#[0-9a-f]{24}$"))
    return page.url.partition("#")[2]


def texts(locator: Locator) -> list[str]:
    return [text.strip() for text in locator.all_text_contents()]


def expect_stored(page: Page, site: Site) -> None:
    """Check that the page shows exactly what is stored."""
    stored = site.history(id_of(page))
    expect(said_by_user(page)).to_have_text([each["content"] for each in stored if each["role"] == "user"])
    assert texts(answers(page)) == [each["content"] for each in stored if each["role"] == "assistant"]


# -- a conversation ------------------------------------------------------------------------------------------------


def test_answer_arrives_piece_by_piece(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(3), words(2))
    open_page(page, site.url)
    say(page, "Hello there")
    expect(said_by_user(page)).to_have_text(["Hello there"])
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    for count in (1, 2, 3):
        site.say()
        expect(answers(page)).to_have_text([said(count)])
    expect_idle(page)
    expect(page.get_by_role("heading", level=1)).to_have_text("Hello there")
    expect(page).to_have_title("Hello there · chatserver")
    expect(page.locator("#conversations a")).to_have_text(["Hello there"])
    say(page, "And again")
    site.say(2)
    expect(answers(page)).to_have_text([said(3), said(2)])
    expect_idle(page)
    expect_stored(page, site)


def test_enter_sends_and_shift_enter_breaks_the_line(page: Page, make_site: MakeSite) -> None:
    site = make_site([], [])
    open_page(page, site.url)
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(said_by_user(page)).to_have_text(["one\ntwo"])
    assert site.history(id_of(page))[0]["content"] == "one\ntwo"
    expect_idle(page)
    page.keyboard.type("   ")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message", exact=True)).to_have_value("   ")
    assert len(site.history(id_of(page))) == 2


def test_simulated_answer_is_shown_as_it_is_stored(page: Page, make_site: MakeSite) -> None:
    site = make_site()
    open_page(page, site.url)
    page.get_by_role("button", name="Show me a short program with comments").click()
    page.get_by_role("button", name="Send").click()
    copy = page.get_by_role("button", name="Copy answer")
    expect(copy).to_have_count(1)
    stored = site.history(id_of(page))
    assert copy.get_attribute("data-text") == stored[1]["content"]
    shown = re.findall(r"\w+", answers(page).inner_text())
    # The browser counts a list's items by itself.
    stored_words = re.findall(r"\w+", re.sub(r"(?m)^\d\. ", "", stored[1]["content"]))
    assert [word for word in shown if word != "Copy"] == stored_words


def test_reload_in_mid_answer_loses_nothing(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(12))
    open_page(page, site.url)
    say(page, "Count")
    for count in (0, 1, 5, 11):
        expect(answers(page)).to_have_text([said(count)])
        page.reload()
        expect(answers(page)).to_have_text([said(count)])
        site.say(4 if count else 1)
        if count == 5:
            site.say(2)
    expect(answers(page)).to_have_text([said(12)])
    expect_idle(page)
    expect_stored(page, site)
    page.reload()
    expect(answers(page)).to_have_text([said(12)])
    expect(said_by_user(page)).to_have_text(["Count"])


def test_reload_in_mid_flow_shows_what_is_stored(page: Page, make_site: MakeSite) -> None:
    site = make_site(simulated_tokens=400, simulated_token_delay_ms=3)
    open_page(page, site.url)
    say(page, "Go on and on")
    for _ in range(4):
        shown = answers(page).inner_text()
        page.wait_for_function(
            "(shown) => document.querySelector('.assistant .body').innerText.length > shown", arg=len(shown)
        )
        page.reload()
        expect(answers(page)).to_contain_text("Go on and on")
    copy = page.get_by_role("button", name="Copy answer")
    expect(copy).to_have_count(1)
    assert copy.get_attribute("data-text") == site.history(id_of(page))[1]["content"]
    shown = answers(page).inner_html()
    page.reload()
    expect(copy).to_have_count(1)
    assert answers(page).inner_html() == shown


def test_draft_outlives_a_reload(page: Page, make_site: MakeSite) -> None:
    site = make_site([])
    open_page(page, site.url)
    page.keyboard.type("half a thou")
    page.reload()
    expect(page.get_by_label("Message", exact=True)).to_have_value("half a thou")
    page.keyboard.type("ght")
    page.keyboard.press("Enter")
    expect(said_by_user(page)).to_have_text(["half a thought"])
    page.get_by_role("link", name="New conversation").click()
    expect(page.get_by_label("Message", exact=True)).to_have_value("")


def test_stop_keeps_what_was_said(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(9))
    open_page(page, site.url)
    say(page, "Count")
    site.say(3)
    expect(answers(page)).to_have_text([said(3)])
    say(page, "Impatient")
    expect(page.get_by_role("alert")).to_have_text("The answer is still being written: wait for its end, or stop it.")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".ending")).to_have_text(["Stopped."])
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.get_by_label("Message", exact=True)).to_have_value("Impatient")
    expect_idle(page)
    expect_stored(page, site)
    assert site.history(id_of(page))[1]["status"] == "stopped"


def test_retry_of_a_failed_answer_in_two_tabs(context: BrowserContext, make_site: MakeSite) -> None:
    failure = SourceError("source_unavailable", "The model is away; try again.")
    site = make_site([*words(2), failure], words(4))
    page = open_page(context.new_page(), site.url)
    say(page, "Count")
    site.say(3)
    expect(page.locator(".ending")).to_have_text(["The answer failed. The model is away; try again."])
    other = open_page(context.new_page(), page.url)
    expect(other.locator(".ending")).to_have_text(["The answer failed. The model is away; try again."])
    page.get_by_role("button", name="Retry").press("Enter")
    expect(page.locator(":focus")).to_have_attribute("id", "input")
    site.say(4)
    for each in (page, other):
        expect(answers(each)).to_have_text([said(2), said(4)])
        expect_idle(each)
        expect(answers(each).first).to_be_hidden()
        each.get_by_text("Earlier attempt").click()
        expect(answers(each).first).to_be_visible()
        expect(each.get_by_role("button", name="Retry")).to_have_count(0)
        expect_stored(each, site)
    assert [each["status"] for each in site.history(id_of(page))] == ["complete", "superseded", "complete"]


def test_retry_after_stop_before_the_first_word(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(1), words(2))
    open_page(page, site.url)
    say(page, "Count")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".ending")).to_have_text(["Stopped."])
    page.get_by_role("button", name="Retry").dblclick()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    site.say(2)
    expect(page.locator(".message.assistant:visible .body")).to_have_text([said(2)])
    expect(page.get_by_role("alert")).to_be_hidden()
    expect_idle(page)
    page.reload()
    expect(page.locator(".message.assistant:visible .body")).to_have_text([said(2)])


# -- conversations ---------------------------------------------------------------------------------------------------


def test_conversations_are_listed_opened_and_deleted(page: Page, make_site: MakeSite) -> None:
    site = make_site(["one"], ["two"])
    site.say(2)
    open_page(page, site.url)
    say(page, "First")
    expect(answers(page)).to_have_text(["one"])
    first = id_of(page)
    page.get_by_role("link", name="New conversation").click()
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    assert page.url == site.url
    say(page, "Second")
    expect(answers(page)).to_have_text(["two"])
    listed = page.locator("#conversations a")
    expect(listed).to_have_text(["Second", "First"])
    expect(page.locator("#conversations [aria-current=page]")).to_have_text("Second")

    listed.nth(1).click()
    expect(said_by_user(page)).to_have_text(["First"])
    expect(answers(page)).to_have_text(["one"])
    assert id_of(page) == first
    page.go_back()
    expect(said_by_user(page)).to_have_text(["Second"])
    page.go_forward()
    expect(said_by_user(page)).to_have_text(["First"])

    page.get_by_role("button", name="Delete the conversation: First").click()
    page.get_by_role("button", name="Cancel").click()
    expect(listed).to_have_text(["Second", "First"])
    page.get_by_role("button", name="Delete the conversation: First").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(listed).to_have_text(["Second"])
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    assert httpx.get(f"{site.url}chat/{first}").status_code == 404


def test_older_conversations_are_fetched_page_by_page(page: Page, make_site: MakeSite) -> None:
    site = make_site(*([] for _ in range(40)))
    for number in range(40):
        site.run(site.app.client.say(f"Number {number}"))
    open_page(page, site.url)
    listed = page.locator("#conversations a")
    expect(listed).to_have_text([f"Number {number}" for number in range(39, 9, -1)])
    page.route("**/chat?*", lambda route: route.fulfill(status=503, body="not now"), times=1)
    page.get_by_role("button", name="Show older ones").click()
    expect(page.get_by_role("alert")).to_have_text("The server answered 503.")
    page.get_by_role("button", name="Show older ones").click()
    expect(listed).to_have_text([f"Number {number}" for number in range(39, -1, -1)])
    expect(page.get_by_role("button", name="Show older ones")).to_be_hidden()


def test_question_about_deleting_that_is_asked_again_at_once_is_heard(page: Page, make_site: MakeSite) -> None:
    site = make_site(["one"])
    site.say()
    open_page(page, site.url)
    say(page, "First")
    expect(page.locator("#conversations a")).to_have_text(["First"])
    page.evaluate("""() => {
        const ask = document.querySelector("#conversations button");
        const dialog = document.querySelector("dialog");
        ask.click();
        dialog.close();
        ask.click();
    }""")
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#no-conversations")).to_be_visible()


def test_conversation_deleted_elsewhere_is_said_to_be(context: BrowserContext, make_site: MakeSite) -> None:
    site = make_site(words(9), checkpoint_ms=5000)
    page = open_page(context.new_page(), site.url)
    say(page, "Count")
    site.say(2)
    expect(answers(page)).to_have_text([said(2)])
    page.get_by_label("Message", exact=True).fill("half a thought")
    deleted = site.run(site.app.client.http.delete(f"/chat/{id_of(page)}"))
    assert deleted.status_code == 204
    expect(page.get_by_role("alert")).to_have_text("That conversation has been deleted.")
    expect(page.get_by_label("Message", exact=True)).to_have_value("half a thought")
    page.reload()
    expect(page.get_by_label("Message", exact=True)).to_have_value("half a thought")
    expect(answers(page)).to_have_count(0)
    expect(page.locator("#no-conversations")).to_be_visible()
    assert page.url == site.url
    # There is no way back to what is gone.
    assert page.evaluate("() => history.length") == 2


def test_slow_deletion_leaves_the_reader_where_he_is(page: Page, make_site: MakeSite) -> None:
    site = make_site(["one"], ["two"])
    site.say(2)
    for text in ("First", "Second"):
        site.run(site.app.client.say(text))
        site.until(lambda: not site.app.chat.running)
    open_page(page, site.url)
    page.get_by_role("link", name="First").click()
    expect(answers(page)).to_have_text(["one"])
    first = id_of(page)
    held: list[Route] = []
    page.route(f"**/chat/{first}", lambda route: held.append(route))
    page.get_by_role("button", name="Delete the conversation: First").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    page.get_by_role("link", name="Second").click()
    expect(answers(page)).to_have_text(["two"])
    held[0].continue_()
    expect(page.locator("#conversations a")).to_have_text(["Second"])
    expect(answers(page)).to_have_text(["two"])
    assert id_of(page) != first


def test_conversation_that_is_listed_but_was_deleted_is_said_to_be(page: Page, make_site: MakeSite) -> None:
    site = make_site(["Hi"])
    site.say()
    open_page(page, site.url)
    say(page, "Hello")
    expect_idle(page)
    conversation_id = id_of(page)
    page.get_by_role("link", name="New conversation").click()
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    assert site.run(site.app.client.http.delete(f"/chat/{conversation_id}")).status_code == 204
    page.get_by_role("link", name="Hello").click()
    expect(page.get_by_role("alert")).to_have_text("That conversation has been deleted.")
    expect(page.locator("#no-conversations")).to_be_visible()
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()


def test_message_that_is_too_long_is_refused_and_kept(page: Page, make_site: MakeSite) -> None:
    site = make_site(["Hi"], max_input_chars=20)
    open_page(page, site.url)
    say(page, "x" * 21)
    expect(page.get_by_role("alert")).to_have_text("Your message must have at most 20 characters.")
    expect(page.get_by_label("Message", exact=True)).to_have_value("x" * 21)


def test_half_a_surrogate_pair_is_sent_as_a_replacement_character(page: Page, make_site: MakeSite) -> None:
    """Keyboards, limits of length and other programs cut characters in two; no UTF-8 can carry a half."""
    site = make_site(words(1))
    open_page(page, site.url)
    box = page.get_by_label("Message", exact=True)
    box.evaluate("box => { box.value = 'a\\ud83d b\\ude00 😀'; box.dispatchEvent(new Event('input')); }")
    # As a draft it is kept as it is: the other half may be on its way.
    page.reload()
    assert box.evaluate("box => box.value === 'a\\ud83d b\\ude00 😀'")
    expect(page.locator("#state")).to_have_text("Live")

    page.get_by_role("button", name="Send").click()

    expect(said_by_user(page)).to_have_text(["a\ufffd b\ufffd 😀"])
    expect(box).to_have_value("")
    expect(page.locator("#title")).to_have_text("a\ufffd b\ufffd 😀")
    site.say()
    expect_idle(page)
    expect_stored(page, site)


def test_copied_client_sends_half_a_surrogate_pair_as_a_replacement_character(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(1))
    page.goto(f"{site.url}web/favicon.svg")
    sent = page.evaluate(
        """async (base) => {
          const { Api, Conversation, newId } = await import(`${base}web/client.js`);
          const conversation = new Conversation(new Api(base), newId(), { fresh: true });
          const sent = [];
          conversation.addEventListener("sent", (event) => sent.push(event.detail));
          await conversation.say("\\ud83d");
          const { messages } = await conversation.api.history(conversation.id);
          return [...sent, conversation.unsent, messages[0].content];
        }""",
        site.url,
    )
    assert sent == ["\ufffd", None, "\ufffd"]


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("x" * 79 + "😀😀", "x" * 79 + "😀"),
        ("x" * 78 + "🇩🇪🇩🇪", "x" * 78 + "🇩🇪"),
        ("x" * 79 + "🇩🇪", "x" * 79),
        ("e" + "\u0301" * 99, "e" + "\u0301" * 79),
    ],
    ids=["pair", "flag-fits", "flag", "long-cluster"],
)
def test_title_is_cut_between_characters(page: Page, make_site: MakeSite, text: str, title: str) -> None:
    site = make_site(words(1))
    page.route(re.compile(r"/chat\?"), lambda route: route.abort())
    open_page(page, site.url)
    say(page, text)
    expect(page.locator("#title")).to_have_text(title)
    expect(page).to_have_title(f"{title} · chatserver")


def test_address_of_no_conversation_is_an_empty_one(page: Page, make_site: MakeSite) -> None:
    site = make_site(["Hi"])
    site.say()
    conversation_id = new_id()
    open_page(page, f"{site.url}#{conversation_id}")
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    nothing = page.get_by_text("There is no conversation at this address, or not any more. What you write begins one.")
    expect(nothing).to_be_visible()
    say(page, "Anybody here?")
    expect(answers(page)).to_have_text(["Hi"])
    expect(nothing).to_be_hidden()
    assert id_of(page) == conversation_id
    page.goto(f"{site.url}#<img src=x onerror=alert(1)>")
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    expect(nothing).to_be_hidden()
    assert page.url == site.url


def test_new_conversation_in_a_tab_of_its_own_or_many_times(context: BrowserContext, make_site: MakeSite) -> None:
    site = make_site(["Hi"])
    site.say()
    page = open_page(context.new_page(), site.url)
    say(page, "Hello")
    expect(answers(page)).to_have_text(["Hi"])
    before = page.evaluate("() => history.length")
    new = page.get_by_role("link", name="New conversation")
    for _ in range(3):
        new.click()
        expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    assert page.evaluate("() => history.length") == before + 1
    page.go_back()
    expect(answers(page)).to_have_text(["Hi"])
    with context.expect_page() as opened:
        new.click(modifiers=["ControlOrMeta"])
    expect(opened.value.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    expect(answers(page)).to_have_text(["Hi"])


def test_suggestion_is_added_to_what_was_typed(page: Page, make_site: MakeSite) -> None:
    open_page(page, make_site().url)
    page.keyboard.type("Please:")
    page.get_by_role("button", name="Show me a short program with comments").click()
    page.reload()
    expect(page.get_by_label("Message", exact=True)).to_have_value("Please:\n\nShow me a short program with comments")


def test_title_cannot_turn_around_the_words_beside_it(page: Page, make_site: MakeSite) -> None:
    site = make_site(["Hi"])
    site.say()
    title = "Free \u202e gnp.exe"
    site.run(site.app.client.say(title))
    open_page(page, site.url)
    page.get_by_role("link", name="gnp.exe").hover()
    page.get_by_role("button", name="gnp.exe").click()
    expect(page.locator("#delete-text bdi")).to_have_text(title)
    expect(page.locator("#delete-text")).to_have_text(f"“{title}” and all its messages are deleted for good.")


def test_conversation_without_text_is_named_in_the_list(page: Page, make_site: MakeSite) -> None:
    site = make_site(["Hi"])
    site.app.database.conversations.insert_one({"messages": None})
    open_page(page, site.url)
    expect(page.get_by_role("link", name="Untitled")).to_be_visible()


# -- tabs --------------------------------------------------------------------------------------------------------------


def test_two_tabs_show_the_same_conversation_each_message_once(context: BrowserContext, make_site: MakeSite) -> None:
    site = make_site(words(3), words(2))
    one = open_page(context.new_page(), site.url)
    say(one, "From one")
    site.say()
    two = open_page(context.new_page(), f"{site.url}#{id_of(one)}")
    for each in (one, two):
        expect(answers(each)).to_have_text([said(1)])
    site.say(2)
    for each in (one, two):
        expect(answers(each)).to_have_text([said(3)])
        expect_idle(each)
    say(two, "From two")
    for each in (one, two):
        expect(said_by_user(each)).to_have_text(["From one", "From two"])
        expect(each.get_by_role("button", name="Stop")).to_be_visible()
    site.say(2)
    for each in (one, two):
        expect(answers(each)).to_have_text([said(3), said(2)])
        expect_idle(each)
        expect_stored(each, site)


def test_tenth_tab_works_and_the_first_goes_on_when_it_is_attended(
    context: BrowserContext, make_site: MakeSite
) -> None:
    site = make_site(words(3), words(2))
    pages = [open_page(context.new_page(), site.url)]
    say(pages[0], "From the first")
    site.say()
    pages += [open_page(context.new_page(), f"{site.url}#{id_of(pages[0])}") for _ in range(9)]
    # With one more than six, a browser would let none of them do anything.
    site.until(lambda: site.open_streams() == 4)
    site.say(2)
    for each in pages[6:]:
        expect(answers(each)).to_have_text([said(3)])
        expect_idle(each)
    expect(pages[0].locator("#state")).to_have_text("Paused: click to resume")
    say(pages[9], "From the tenth")
    site.say(2)
    for each in pages[6:]:
        expect(said_by_user(each)).to_have_text(["From the first", "From the tenth"])
        expect(answers(each)).to_have_text([said(3), said(2)])
    for each in pages[:6]:
        each.bring_to_front()
        each.locator("#thread").click()
        expect(answers(each)).to_have_text([said(3), said(2)])
        expect(each.locator("#state")).to_have_text("Live")
        expect_stored(each, site)
    site.until(lambda: site.open_streams() == 4)
    # Those that are closed make room again.
    for each in pages[2:]:
        each.close()
    expect(pages[0].locator("#state")).to_have_text("Live")
    expect(pages[1].locator("#state")).to_have_text("Live")


def test_hidden_tab_lets_go_of_its_stream_and_goes_on_when_it_is_seen(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(5))
    open_page(page, site.url)
    say(page, "Count")
    site.say(2)
    expect(answers(page)).to_have_text([said(2)])
    turn = "(now) => { Object.defineProperty(document, 'visibilityState', {value: now, configurable: true});"
    turn += " document.dispatchEvent(new Event('visibilitychange')); }"
    page.evaluate(turn, "hidden")
    site.until(lambda: site.open_streams() == 0)
    site.say(2)
    page.evaluate(turn, "visible")
    expect(answers(page)).to_have_text([said(4)])
    site.say()
    expect(answers(page)).to_have_text([said(5)])
    expect_stored(page, site)


# -- the plug --------------------------------------------------------------------------------------------------------


def test_server_killed_and_restarted_in_mid_answer(page: Page, make_server: Callable[..., Server]) -> None:
    server = make_server(SIMULATED_TOKENS=150, SIMULATED_TOKEN_DELAY_MS=20, CHECKPOINT_MS=300, LEASE_MS=900).start()
    open_page(page, server.url)
    say(page, "Hold the line")
    expect(answers(page)).to_contain_text("Hold the line")
    server.kill()
    expect(page.locator("#state")).to_have_text("Reconnecting")
    page.get_by_label("Message", exact=True).fill("Still there?")
    server.start()
    expect(page.locator("#state")).to_have_text("Live")
    expect(page.locator(".ending")).to_contain_text("The answer was interrupted.")
    stored = httpx.get(f"{server.url}/chat/{id_of(page)}").json()["messages"]
    assert stored[1]["status"] == "interrupted"
    assert page.get_by_role("button", name="Copy answer").get_attribute("data-text") == stored[1]["content"]
    expect(page.get_by_label("Message", exact=True)).to_have_value("Still there?")

    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect_idle(page)
    stored = httpx.get(f"{server.url}/chat/{id_of(page)}").json()["messages"]
    assert [each["status"] for each in stored] == ["complete", "superseded", "complete"]
    shown = page.get_by_role("button", name="Copy answer")
    expect(shown).to_have_count(1)
    assert shown.get_attribute("data-text") == stored[2]["content"]


def test_offline_and_back(context: BrowserContext, make_site: MakeSite) -> None:
    site = make_site(words(6), words(1))
    page = open_page(context.new_page(), site.url)
    say(page, "Count")
    site.say(2)
    expect(answers(page)).to_have_text([said(2)])
    context.set_offline(True)
    expect(page.locator("#state")).to_have_text("Offline")
    site.say(4)
    conversation_id = id_of(page)
    site.until(lambda: not site.app.chat.running)
    assert answers(page).all_text_contents() == [said(2)]
    context.set_offline(False)
    expect(page.locator("#state")).to_have_text("Live")
    expect(answers(page)).to_have_text([said(6)])
    expect_idle(page)

    context.set_offline(True)
    expect(page.locator("#state")).to_have_text("Offline")
    say(page, "Lost?")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached. Your text is kept")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Lost?")
    context.set_offline(False)
    expect(page.locator("#state")).to_have_text("Live")
    kept = "Your text is kept; sending it again will not post it twice."
    expect(page.get_by_role("alert")).to_have_text(kept)
    page.get_by_label("Message", exact=True).press("Enter")
    expect(said_by_user(page)).to_have_text(["Count", "Lost?"])
    expect(page.get_by_role("alert")).to_be_hidden()
    site.say()
    expect(answers(page)).to_have_text([said(6), said(1)])
    assert [each["content"] for each in site.history(conversation_id)] == ["Count", said(6), "Lost?", said(1)]


def lose_answers(page: Page, taken: bool) -> list[str]:
    """Have the answer to the next post be lost, after the server took it or before; return the keys of all posts."""
    keys: list[str] = []

    def lose(route: Route) -> None:
        if route.request.method != "POST":
            route.continue_()
            return
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) > 1:
            route.continue_()
            return
        if taken:
            route.fetch()
        route.abort("connectionreset")

    page.route("**/chat", lose)
    return keys


def test_send_whose_answer_was_lost_but_that_arrived_leaves_the_box(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(2), words(1))
    open_page(page, site.url)
    keys = lose_answers(page, taken=True)
    say(page, "Once only")
    expect(said_by_user(page)).to_have_text(["Once only"])
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#conversations a")).to_have_text(["Once only"])
    site.say(2)
    expect(answers(page)).to_have_text([said(2)])
    expect_idle(page)
    # The same words once more are new ones.
    say(page, "Once only")
    site.say()
    expect(answers(page)).to_have_text([said(2), said(1)])
    expect(said_by_user(page)).to_have_text(["Once only", "Once only"])
    assert len(keys) == 2 and keys[1] != keys[0]
    expect_stored(page, site)


def test_reload_after_a_send_whose_answer_was_lost_shows_it_once(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(2), words(1))
    open_page(page, site.url)
    is_down = True
    page.route("**/chat/stream/**", lambda route: route.fulfill(status=503) if is_down else route.continue_())
    site.run(site.app.end_streams())
    expect(page.locator("#state")).to_have_text("Reconnecting")
    keys = lose_answers(page, taken=True)
    say(page, "Once only")
    expect(page.get_by_role("alert")).to_have_text(
        "The server cannot be reached. Your text is kept; sending it again will not post it twice."
    )
    expect(page.get_by_label("Message", exact=True)).to_have_value("Once only")
    conversation_id = id_of(page)
    is_down = False
    page.reload()
    expect(said_by_user(page)).to_have_text(["Once only"])
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    expect(page.get_by_role("alert")).to_be_hidden()
    site.say(2)
    expect(answers(page)).to_have_text([said(2)])
    assert len(keys) == 1 and id_of(page) == conversation_id
    expect(page.locator("#conversations a")).to_have_text(["Once only"])
    expect_stored(page, site)


def test_send_that_was_lost_keeps_its_key_over_a_reload(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(1))
    open_page(page, site.url)
    keys = lose_answers(page, taken=False)
    say(page, "Once only")
    kept = "Your text is kept; sending it again will not post it twice."
    expect(page.get_by_role("alert")).to_contain_text(kept)
    page.reload()
    expect(page.locator("#state")).to_have_text("Live")
    expect(page.get_by_role("alert")).to_have_text(kept)
    expect(page.get_by_label("Message", exact=True)).to_have_value("Once only")
    page.get_by_label("Message", exact=True).press("Enter")
    site.say()
    expect(answers(page)).to_have_text([said(1)])
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    expect(page.get_by_role("alert")).to_be_hidden()
    assert len(keys) == 2 and keys[0] == keys[1]
    page.reload()
    expect(answers(page)).to_have_text([said(1)])
    expect(page.get_by_label("Message", exact=True)).to_have_value("")


def test_send_without_an_answer_holds_up_no_other_conversation(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(1))
    site.say()
    open_page(page, site.url)
    held: list[Route] = []
    page.route(
        "**/chat", lambda route: held.append(route) if "Slow" in (route.request.post_data or "") else route.continue_()
    )
    say(page, "Slow")
    slow = id_of(page)
    page.get_by_role("link", name="New conversation").click()
    say(page, "Quick")
    expect(answers(page)).to_have_text([said(1)])
    held[0].abort("connectionreset")
    expect(page.locator("#conversations a")).to_have_text(["Quick"])
    expect(page.get_by_role("alert")).to_be_hidden()
    page.goto(f"{site.url}#{slow}")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Slow")
    expect(page.get_by_role("alert")).to_have_text("Your text is kept; sending it again will not post it twice.")


@pytest.mark.parametrize("what", ["stop", "retry", "delete"])
def test_what_failed_is_said_until_it_is_settled(page: Page, make_site: MakeSite, what: str) -> None:
    site = make_site(words(9), words(2))
    open_page(page, site.url)
    say(page, "Count")
    site.say(3)
    expect(answers(page)).to_have_text([said(3)])
    if what != "stop":
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".ending")).to_have_text(["Stopped."])
    address = f"**/chat/{id_of(page)}" + ("" if what == "delete" else f"/{what}")
    page.route(address, lambda route: route.abort("connectionreset"), times=1)
    page.evaluate(
        """() => {
          const state = document.querySelector("#state");
          window.states = [];
          new MutationObserver(() => states.push(state.textContent)).observe(state, { childList: true });
        }"""
    )

    def act() -> None:
        if what == "delete":
            page.get_by_role("button", name="Delete the conversation: Count").click()
            page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        else:
            page.get_by_role("button", name=what.capitalize()).click()

    act()
    if what != "delete":
        # The line is tried anew; what was said stays.
        page.wait_for_function("() => states.includes('Reconnecting') && states.at(-1) === 'Live'")
    lasting = {
        "stop": "Your stop may not have got through.",
        "retry": "Your retry may not have got through.",
        "delete": "The server cannot be reached. “Count” may not have been deleted.",
    }
    expect(page.get_by_role("alert")).to_have_text(lasting[what])
    act()
    if what == "retry":
        site.say(2)
        expect(answers(page)).to_have_text([said(3), said(2)])
    elif what == "stop":
        expect(page.locator(".ending")).to_have_text(["Stopped."])
    else:
        expect(page.locator("#no-conversations")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()
    assert "Paused: click to resume" not in page.evaluate("() => states")


def test_list_comes_as_soon_as_the_server_can_be_reached(page: Page, make_site: MakeSite) -> None:
    site = make_site([])
    site.run(site.app.client.say("Hello"))
    is_down = True
    page.route(
        re.compile("/chat[?/]"), lambda route: route.fulfill(status=503, body="") if is_down else route.continue_()
    )
    page.goto(site.url)
    expect(page.locator("#state")).to_have_text("Reconnecting")
    expect(page.locator("#no-conversations")).to_be_hidden()
    is_down = False
    expect(page.locator("#conversations a")).to_have_text(["Hello"])


def test_answer_that_is_none_of_ours_breaks_nothing(page: Page, make_site: MakeSite) -> None:
    """A hotel's network answers everything with its login page until one has logged in."""
    site = make_site(words(1), words(1))
    site.say()
    conversation_id = site.run(site.app.client.say("Hello"))["conversationId"]
    site.until(lambda: not site.app.chat.running)
    is_ours = False
    login = {"status": 200, "content_type": "text/html", "body": "<h1>Log in</h1>"}
    page.route(re.compile("/chat"), lambda route: route.continue_() if is_ours else route.fulfill(**login))
    page.goto(f"{site.url}#{conversation_id}")
    expect(page.locator("#state")).to_have_text("Reconnecting")
    expect(page.get_by_role("heading", level=1)).to_have_text("Conversation")
    say(page, "Anybody?")
    expect(page.get_by_role("alert")).to_have_text(
        "The server cannot be reached: something else answered. "
        "Your text is kept; sending it again will not post it twice."
    )
    is_ours = True
    expect(page.locator("#state")).to_have_text("Live")
    page.get_by_label("Message", exact=True).press("Enter")
    site.say()
    expect(answers(page)).to_have_text([said(1), said(1)])
    expect(said_by_user(page)).to_have_text(["Hello", "Anybody?"])


def test_state_tells_offline_from_reconnecting_at_any_time(context: BrowserContext, make_site: MakeSite) -> None:
    site = make_site()
    page = open_page(context.new_page(), site.url)
    page.route("**/chat/stream/**", lambda route: route.fulfill(status=503))
    site.run(site.app.end_streams())
    state = page.locator("#state")
    expect(state).to_have_text("Reconnecting")
    context.set_offline(True)
    expect(state).to_have_text("Offline")
    context.set_offline(False)
    expect(state).to_have_text("Reconnecting")


def test_dead_port_is_tried_less_and_less_often(page: Page, make_site: MakeSite) -> None:
    """A native EventSource would try for ever, every second, and never give up."""
    site = make_site()
    page.add_init_script(
        """window.made = 0;
        window.EventSource = class extends EventSource { constructor(url) { super(url); window.made += 1; } };"""
    )
    open_page(page, site.url)
    page.route("**/chat/stream/**", lambda route: route.abort("connectionrefused"))
    site.run(site.app.end_streams())
    page.wait_for_function("() => made >= 4")
    page.unroute("**/chat/stream/**")
    expect(page.locator("#state")).to_have_text("Live")


def test_browser_without_storage_and_channels_chats_all_the_same(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(2))
    page.add_init_script(
        """delete window.BroadcastChannel;
        const refuse = () => { throw new DOMException("no", "SecurityError"); };
        Object.defineProperty(window, "sessionStorage", { get: refuse });"""
    )
    open_page(page, site.url)
    say(page, "Hello")
    site.say(2)
    expect(answers(page)).to_have_text([said(2)])
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    expect(page.locator("#conversations a")).to_have_text(["Hello"])


def test_refused_send_keeps_the_text_and_says_why(page: Page, make_site: MakeSite) -> None:
    site = make_site([], max_input_chars=20)
    open_page(page, site.url)
    page.route(
        "**/chat",
        lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>", content_type="text/html"),
        times=1,
    )
    page.get_by_label("Message", exact=True).fill("Hello")
    page.get_by_role("button", name="Send").click()
    # Perhaps the server took it, and the proxy lost the answer.
    told = "The server answered 502. Your text is kept; sending it again will not post it twice."
    expect(page.get_by_role("alert")).to_have_text(told)
    expect(page.get_by_label("Message", exact=True)).to_have_value("Hello")
    say(page, "a" * 21)
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_text("Your message must have at most 20 characters.")
    expect(page.get_by_label("Message", exact=True)).to_have_value("a" * 21)
    say(page, "Hello")
    expect(said_by_user(page)).to_have_text(["Hello"])
    expect(page.get_by_role("alert")).to_be_hidden()


def test_stream_that_a_proxy_refuses_is_made_anew_from_its_position(page: Page, make_site: MakeSite) -> None:
    """A native EventSource closes for good at any answer but 200."""
    site = make_site(words(6))
    open_page(page, site.url)
    say(page, "Count")
    site.say(2)
    expect(answers(page)).to_have_text([said(2)])
    refusals = iter([503, 502, 503])
    asked: list[str] = []

    def refuse(route: Route) -> None:
        asked.append(route.request.url)
        status = next(refusals, None)
        if status is None:
            route.continue_()
        else:
            route.fulfill(status=status, body="not now")

    page.route("**/chat/stream/**", refuse)
    site.run(site.app.end_streams())
    site.say(2)
    expect(page.locator("#state")).to_have_text("Reconnecting")
    site.say(2)
    expect(page.locator("#state")).to_have_text("Live")
    expect(answers(page)).to_have_text([said(6)])
    expect_idle(page)
    assert len(asked) == 4
    assert all(re.search(r"lastEventId=[0-9a-f]{24}-", url) for url in asked)
    expect_stored(page, site)


WATCH_STATES = """() => {
  window.states = [];
  const state = document.querySelector("#state");
  new MutationObserver(() => window.states.push(state.textContent)).observe(state, { childList: true });
}"""
"""Records what the page says of its stream from now on in `states`."""


def streams_of(page: Page) -> list[str]:
    """Return a list to which the address of each stream is added that the page opens from now on."""
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url) if "/chat/stream/" in request.url else None)
    return urls


def test_stream_that_died_without_closing_is_opened_again(
    page: Page, make_site: MakeSite, make_proxy: Callable[[Site], CuttingProxy]
) -> None:
    site = make_site(words(2), words(3), keepalive_s=1.0)
    proxy = make_proxy(site)
    open_page(page, f"http://127.0.0.1:{proxy.port}/")
    say(page, "First")
    site.say(2)
    expect(answers(page)).to_have_text([said(2)])
    expect_idle(page)
    page.evaluate(WATCH_STATES)

    assert proxy.mute_streams() == 1
    say(page, "Second")
    site.say(3)

    expect(answers(page)).to_have_text([said(2), said(3)])
    expect_idle(page)
    assert page.evaluate("states") == ["Reconnecting", "Live"]
    assert proxy.streams == 2
    expect_stored(page, site)


def test_silence_is_not_judged_by_the_clock_of_a_computer_that_slept(page: Page, make_site: MakeSite) -> None:
    """Its timers are late, and what the server has sent meanwhile is yet to be read."""
    site = make_site(words(1), keepalive_s=60.0)
    page.clock.install()
    streams = streams_of(page)
    open_page(page, site.url)

    page.clock.fast_forward("08:00:00")
    page.clock.fast_forward("08:00:00")

    say(page, "Good morning")
    site.say()
    expect(answers(page)).to_have_text([said(1)])
    expect(page.locator("#state")).to_have_text("Live")
    assert len(streams) == 1
    # It is still watched: two and a half intervals of the server's 60 s.
    for _ in range(4):
        page.clock.fast_forward(30_000)
    assert len(streams) == 1
    page.clock.fast_forward(30_000)
    expect(page.locator("#state")).to_have_text("Reconnecting")
    page.clock.fast_forward(500)
    expect(page.locator("#state")).to_have_text("Live")
    assert len(streams) == 2
    assert "lastEventId=" in streams[1] and streams[1].endswith("-done")


def test_stream_of_a_server_without_pings_is_left_alone(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(1))
    page.clock.install()
    streams = streams_of(page)
    page.add_init_script("""
      const listen = EventSource.prototype.addEventListener;
      EventSource.prototype.addEventListener = function (name, ...rest) {
        if (name !== "ping") listen.call(this, name, ...rest);
      };
    """)
    open_page(page, site.url)

    for _ in range(20):
        page.clock.fast_forward(7_500)

    say(page, "Still there?")
    site.say()
    expect(answers(page)).to_have_text([said(1)])
    assert len(streams) == 1


def test_stream_that_is_not_answered_is_asked_for_again(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(1))
    page.clock.install()
    held: list[Route] = []
    page.route("**/chat/stream/**", lambda route: held.append(route) if not held else route.continue_())
    page.goto(site.url)
    expect(page.locator("#state")).to_have_text("Connecting")

    for _ in range(5):
        page.clock.fast_forward(7_500)
    expect(page.locator("#state")).to_have_text("Reconnecting")
    page.clock.fast_forward(500)

    expect(page.locator("#state")).to_have_text("Live")
    held[0].abort()


def test_turn_taken_while_the_stream_is_down_is_shown_once_and_in_order(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(1), words(2), words(3))
    site.say(3)
    open_page(page, site.url)
    say(page, "First")
    expect(answers(page)).to_have_text([said(1)])
    expect_idle(page)
    conversation_id = id_of(page)
    is_down = True
    page.route("**/chat/stream/**", lambda route: route.fulfill(status=503) if is_down else route.continue_())
    site.run(site.app.end_streams())
    expect(page.locator("#state")).to_have_text("Reconnecting")
    site.run(site.app.client.say("Second, by somebody else", conversation_id))
    site.until(lambda: not site.app.chat.running)
    say(page, "Third")
    # The page knows that it was taken, but not yet what came before it.
    expect(said_by_user(page)).to_have_text(["First", "Third"])
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    site.say(3)
    site.until(lambda: not site.app.chat.running)
    is_down = False
    expect(answers(page)).to_have_text([said(1), said(2), said(3)])
    expect(said_by_user(page)).to_have_text(["First", "Second, by somebody else", "Third"])
    expect_idle(page)
    expect_stored(page, site)


def test_history_that_is_refused_is_fetched_again(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(2))
    site.say(2)
    conversation_id = site.run(site.app.client.say("Hello"))["conversationId"]
    site.until(lambda: not site.app.chat.running)
    refusals = iter([503, 500])

    def refuse(route: Route) -> None:
        status = next(refusals, None)
        if status is None:
            route.continue_()
        else:
            route.fulfill(status=status, headers={"Retry-After": "1"}, body="not now")

    page.route(f"**/chat/{conversation_id}", refuse)
    page.goto(f"{site.url}#{conversation_id}")
    expect(page.locator("#state")).to_have_text("Reconnecting")
    expect(answers(page)).to_have_text([said(2)])
    expect(page.locator("#state")).to_have_text("Live")
    expect(said_by_user(page)).to_have_text(["Hello"])


def test_conversation_opened_while_the_server_is_away_is_said_to_come(
    page: Page, make_server: Callable[..., Server]
) -> None:
    server = make_server(SIMULATED_TOKENS=5).start()
    open_page(page, server.url)
    say(page, "Hello")
    expect(page.get_by_role("button", name="Copy answer")).to_have_count(1)
    page.get_by_role("link", name="New conversation").click()
    assert server.stop() == 0
    page.get_by_role("link", name="Hello").click()
    awaited = page.get_by_text("This conversation will appear as soon as the server can be reached.")
    expect(awaited).to_be_visible()
    server.start()
    expect(said_by_user(page)).to_have_text(["Hello"])
    expect(awaited).to_be_hidden()


def test_stream_from_a_dead_port_is_made_anew(page: Page, make_server: Callable[..., Server]) -> None:
    server = make_server(SIMULATED_TOKENS=5).start()
    open_page(page, server.url)
    say(page, "Hello")
    expect(page.get_by_role("button", name="Copy answer")).to_have_count(1)
    assert server.stop() == 0
    expect(page.locator("#state")).to_have_text("Reconnecting")
    say(page, "Nobody home")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    server.start()
    expect(page.locator("#state")).to_have_text("Live")
    page.get_by_label("Message", exact=True).press("Enter")
    expect(said_by_user(page)).to_have_text(["Hello", "Nobody home"])
    expect(page.get_by_role("button", name="Copy answer")).to_have_count(2)
    messages = httpx.get(f"{server.url}/chat/{id_of(page)}").json()["messages"]
    assert [each["content"] for each in messages if each["role"] == "user"] == ["Hello", "Nobody home"]


# -- what is written ---------------------------------------------------------------------------------------------------

HOSTILE = """<img src=x onerror="alert(1)"> <script>alert(2)</script>

[one](javascript:alert(3)) [two](JaVaScRiPt:alert(4)) [three](data:text/html,<script>alert(5)</script>)
[four](vbscript:x) [five](//evil.example/) [six](https://good.example/"onclick="alert(6))

```html" onload="alert(7)
<svg onload=alert(8)>
```

- <iframe src="javascript:alert(9)"></iframe>
- `<b>bold</b>`"""


def test_hostile_messages_do_nothing(page: Page, make_site: MakeSite) -> None:
    site = make_site([HOSTILE])
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    open_page(page, site.url)
    page.get_by_label("Message", exact=True).fill(HOSTILE)
    page.get_by_role("button", name="Send").click()
    site.say()
    expect_idle(page)
    expect(said_by_user(page)).to_have_text([HOSTILE])
    expect(answers(page)).to_contain_text('<img src=x onerror="alert(1)"> <script>alert(2)</script>')
    expect(answers(page)).to_contain_text("[one](javascript:alert(3)) [two](JaVaScRiPt:alert(4))")
    expect(answers(page).locator("pre")).to_have_text("<svg onload=alert(8)>")
    expect(answers(page).locator("li").first).to_have_text('<iframe src="javascript:alert(9)"></iframe>')
    expect(page.locator("#thread :is(img, script, iframe, svg, b)")).to_have_count(0)
    addresses = answers(page).locator("a").evaluate_all("(links) => links.map((link) => link.href)")
    assert all(address.startswith("https://good.example/") for address in addresses)
    handlers = "(all) => all.filter((each) => [...each.attributes].some((one) => one.name.startsWith('on'))).length"
    assert page.locator("#thread *").evaluate_all(handlers) == 0
    page.reload()
    expect(answers(page).locator("pre")).to_have_text("<svg onload=alert(8)>")
    assert not dialogs
    assert all(url.startswith(site.url) for url in requested)


def test_content_security_policy_forbids_what_the_page_does_not_need(page: Page, make_site: MakeSite) -> None:
    site = make_site()
    policy = httpx.get(site.url).headers["Content-Security-Policy"]
    assert "unsafe" not in policy and "default-src 'none'" in policy
    violations: list[str] = []
    page.on(
        "console",
        lambda message: violations.append(message.text) if "Content Security Policy" in message.text else None,
    )
    open_page(page, site.url)
    assert not violations
    page.evaluate(
        """() => {
          document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.hacked = 1'>");
          const script = document.createElement("script");
          script.textContent = "window.hacked = 2";
          document.body.append(script);
        }"""
    )
    page.wait_for_function("() => document.querySelector('img').complete")
    assert page.evaluate("() => window.hacked") is None
    assert violations


RENDERED = {
    "one\ntwo\n\nthree": "<p>one\ntwo</p><p>three</p>",
    "**bold** and *it* and ***both*** and _it_": (
        "<p><strong>bold</strong> and <em>it</em> and <strong><em>both</em></strong> and <em>it</em></p>"
    ),
    "**bold with *it* inside** a*b snake_case_name 2 * 3 * 4": (
        "<p><strong>bold with <em>it</em> inside</strong> a*b snake_case_name 2 * 3 * 4</p>"
    ),
    "open **bold": "<p>open **bold</p>",
    "`a <b> *c*` and ``x ` y``": "<p><code>a &lt;b&gt; *c*</code> and <code>x ` y</code></p>",
    r"\*not\* \`code\`": "<p>*not* `code`</p>",
    "# One\n### Two\ntext": "<h3>One</h3><h5>Two</h5><p>text</p>",
    "> quoted\n> **more**\n\nafter": "<blockquote><p>quoted\n<strong>more</strong></p></blockquote><p>after</p>",
    "- a\n- b\n  - c\n  - d\n- e": "<ul><li>a</li><li>b<ul><li>c</li><li>d</li></ul></li><li>e</li></ul>",
    "text\n1. a\n2. b\n\nafter": "<p>text</p><ol><li>a</li><li>b</li></ol><p>after</p>",
    "3) c\n4) d": '<ol start="3"><li>c</li><li>d</li></ol>',
    "1. a\n\n   more\n\n2. b": "<ol><li>a<p>more</p></li><li>b</li></ol>",
    "- a\n\t- b\n\t\t- c\n- d": "<ul><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ul>",
    "## Two ##\n# C#\n### #": "<h4>Two</h4><h3>C#</h3><h5></h5>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "(https://a.example/x_(y)), http://b.example/(z": (
        '<p>(<a href="https://a.example/x_(y)" rel="noopener noreferrer" target="_blank">https://a.example/x_(y)</a>), '
        '<a href="http://b.example/(z" rel="noopener noreferrer" target="_blank">http://b.example/(z</a></p>'
    ),
    "[site](https://a.example/x_(y)?q=1) <http://b.example/>.": (
        '<p><a href="https://a.example/x_(y)?q=1" rel="noopener noreferrer" target="_blank">site</a> '
        '&lt;<a href="http://b.example/" rel="noopener noreferrer" target="_blank">http://b.example/</a>&gt;.</p>'
    ),
    "[me](mailto:a@b.example) [no](/relative) [no](ftp://a.example)": (
        '<p><a href="mailto:a@b.example" rel="noopener noreferrer" target="_blank">me</a> '
        "[no](/relative) [no](ftp://a.example)</p>"
    ),
}


def test_markdown(page: Page, make_site: MakeSite) -> None:
    site = make_site()
    open_page(page, site.url)
    render = """async (texts) => {
      const { render } = await import("./web/markdown.js");
      return texts.map((text) => {
        const element = document.createElement("div");
        render(element, text);
        return element.innerHTML;
      });
    }"""
    assert dict(zip(RENDERED, page.evaluate(render, list(RENDERED)), strict=True)) == RENDERED
    code = page.evaluate(render, ["```js\nlet a = `1`;\n\n  # b\n```\nafter", "~~~\nopen\n```"])
    assert "<pre" in code[0] and "<code>let a = `1`;\n\n  # b</code>" in code[0] and code[0].endswith("<p>after</p>")
    assert "<span>js</span>" in code[0] and "<code>open\n```</code>" in code[1]
    [table] = page.evaluate(render, ["| a | b |\n|---|:-:|\n| 1 | **2** |"])
    assert "<tr><th>a</th><th>b</th></tr><tr><td>1</td><td><strong>2</strong></td></tr>" in table


def test_markdown_that_grows_ends_as_if_it_had_come_at_once(page: Page, make_site: MakeSite) -> None:
    site = make_site()
    open_page(page, site.url)
    text = "\n\n".join([*RENDERED, "```py\nprint('*')\n```", "| a | b |\n|---|---|\n| 1 | 2 |", "**the** `end`"])
    grown = page.evaluate(
        """async (text) => {
          const { render } = await import("./web/markdown.js");
          const whole = document.createElement("div");
          render(whole, text);
          const growing = document.createElement("div");
          let first;
          for (let end = 1; end <= text.length; end += 1) {
            render(growing, text.slice(0, end), true);
            first ??= end > 40 ? growing.firstChild : undefined;
          }
          const open = growing.innerHTML;
          render(growing, text);
          return { whole: whole.innerHTML, grown: growing.innerHTML, kept: growing.firstChild === first, open };
        }""",
        text,
    )
    assert grown["grown"] == grown["whole"]
    assert grown["kept"], "a block that had not changed was made anew"
    growing = """async (texts) => {
      const { render } = await import("./web/markdown.js");
      return texts.map((text) => {
        const element = document.createElement("div");
        render(element, text, true);
        return element.innerHTML;
      });
    }"""
    # What is still open looks as it will when it is closed.
    assert page.evaluate(growing, ["so **bol", "so `co", "so **", "so *it* **b *c"]) == [
        "<p>so <strong>bol</strong></p>",
        "<p>so <code>co</code></p>",
        "<p>so </p>",
        "<p>so <em>it</em> <strong>b <em>c</em></strong></p>",
    ]


def test_what_grows_keeps_its_elements_focus_and_selection(page: Page, make_site: MakeSite) -> None:
    """Nothing but the last line is made anew, so that a long list or table costs no more with each token."""
    open_page(page, make_site().url)
    count, button, selection, text = page.evaluate(
        """async () => {
          const { render } = await import("./web/markdown.js");
          const element = document.createElement("div");
          document.body.append(element);
          const grow = (text, from = 1) => {
            for (let end = from; end <= text.length; end += 1) {
              render(element, text.slice(0, end), true);
            }
          };
          const lines = (line) => Array.from({ length: 50 }, (_, number) => line(number)).join("\\n");
          let added = 0;
          new MutationObserver((records) => {
            for (const record of records) {
              added += record.addedNodes.length;
            }
          }).observe(element, { subtree: true, childList: true });
          const table = "|a|b|\\n|-|-|\\n" + lines((number) => `| ${number} | x |`);
          for (const text of [lines((number) => `- item ${number}`), table]) {
            render(element, "");
            grow(text);
            await null;
          }
          const count = added;

          const code = "1. Do:\\n\\n   ```sh\\n   ls";
          render(element, "");
          grow(code);
          const button = element.querySelector("li button");
          button.focus();
          button.textContent = "Copied";
          grow(`${code} -l\\n   ps`, code.length);
          const sameButton = document.activeElement === button && button.isConnected && button.textContent;

          const paragraph = "Some **bold** words";
          render(element, "");
          grow(paragraph);
          getSelection().selectAllChildren(element.querySelector("strong"));
          getSelection().extend(element.querySelector("p").lastChild, 3);
          grow(`${paragraph} and *more`, paragraph.length);
          return [count, sameButton, getSelection().toString(), element.textContent];
        }"""
    )
    assert count < 600, "rows or items were made anew"
    assert (button, selection, text) == ("Copied", "bold wo", "Some bold words and more")


def test_table_that_grows_is_a_table_all_the_time(page: Page, make_site: MakeSite) -> None:
    open_page(page, make_site().url)
    shown = page.evaluate(
        """async (text) => {
          const { render } = await import("./web/markdown.js");
          const element = document.createElement("div");
          const shown = new Set();
          for (let end = text.indexOf("1"); end <= text.length; end += 1) {
            render(element, text.slice(0, end), true);
            shown.add(Array.from(element.children, (each) => each.className || each.tagName).join());
          }
          return [...shown, element.textContent];
        }""",
        "|a|b|\n|-|-|\n| 1 | one |\n| 2 | two",
    )
    assert shown == ["table", "ab1one2two"]


def test_copy_buttons(new_context: Callable[..., BrowserContext], make_site: MakeSite) -> None:
    answer = "Look:\n\n```js\nlet a = 1;\n\n```\n\n**Done**"
    site = make_site([answer], [answer], allowed_hosts=("chat.test", "127.0.0.1"))
    site.say(2)
    context = new_context()
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site.app.url)
    page = open_page(context.new_page(), site.url)
    say(page, "Code, please")
    clipboard = "() => navigator.clipboard.readText()"
    page.get_by_role("button", name="Copy answer").click()
    expect(page.get_by_role("button", name="Copy answer")).to_have_text("Copied")
    assert page.evaluate(clipboard) == answer
    page.get_by_role("button", name="Copy code").click()
    expect(page.get_by_role("button", name="Copy code")).to_have_text("Copied")
    assert page.evaluate(clipboard) == "let a = 1;\n"
    page.get_by_role("button", name="Copy message").click()
    expect(page.get_by_role("button", name="Copy message")).to_have_text("Copied")
    assert page.evaluate(clipboard) == "Code, please"

    # Plain http in a local network is no secure context: no navigator.clipboard, no crypto.randomUUID.
    plain = open_page(context.new_page(), site.url.replace("127.0.0.1", "chat.test"))
    assert plain.evaluate("() => isSecureContext") is False
    say(plain, "Again")
    plain.get_by_role("button", name="Copy message").click()
    expect(plain.get_by_role("button", name="Copy message")).to_have_text("Copied")
    expect(plain.locator(":focus")).to_have_accessible_name("Copy message")
    page.bring_to_front()
    assert page.evaluate(clipboard) == "Again"


# -- for everybody ---------------------------------------------------------------------------------------------------


def test_scrolls_along_only_at_the_bottom(page: Page, make_site: MakeSite) -> None:
    site = make_site([*(f"Line {number}\n\n" for number in range(60)), "The end"])
    open_page(page, site.url)
    say(page, "Much")
    site.say(40)
    expect(page.get_by_text("Line 39", exact=True)).to_be_in_viewport()
    latest = page.get_by_role("button", name="Latest")
    expect(latest).to_be_hidden()
    page.locator("#scroller").evaluate("(scroller) => scroller.scrollTo(0, 100)")
    expect(latest).to_be_visible()
    site.say(10)
    expect(page.get_by_text("Line 49", exact=True)).to_be_attached()
    assert page.locator("#scroller").evaluate("(scroller) => scroller.scrollTop") == 100
    latest.click()
    expect(page.get_by_text("Line 49", exact=True)).to_be_in_viewport()
    site.say(11)
    expect(page.get_by_text("The end", exact=True)).to_be_in_viewport()
    expect(latest).to_be_hidden()


@pytest.mark.parametrize("means", ["wheel", "keys"])
def test_reader_who_scrolls_up_while_an_answer_streams_is_not_dragged_back(
    page: Page, make_site: MakeSite, means: str
) -> None:
    site = make_site([f"Line {number}\n\n" for number in range(60)], words(5000))
    open_page(page, site.url)
    say(page, "Much")
    site.say(60)
    expect(page.get_by_text("Line 59", exact=True)).to_be_in_viewport()
    expect_idle(page)
    say(page, "More")
    site.say(100)
    expect(answers(page)).to_contain_text(["Line 59", "word99"])
    scroller = page.locator("#scroller")
    latest = page.get_by_role("button", name="Latest")
    expect(latest).to_be_hidden()
    scroller.hover()
    scroller.focus()
    for _ in range(12):
        site.say(8)
        if means == "wheel":
            page.mouse.wheel(0, -5)
        else:
            page.keyboard.press("ArrowUp")
    expect(latest).to_be_visible()
    site.say(200)
    expect(answers(page).last).to_contain_text("word395")
    assert scroller.evaluate("(box) => box.scrollHeight - box.clientHeight - box.scrollTop") > 48
    # Whoever comes back to the end goes along with it again.
    page.keyboard.press("End")
    expect(latest).to_be_hidden()
    site.say(100)
    expect(answers(page).last).to_contain_text("word495")
    expect(latest).to_be_hidden()
    scroller.evaluate("(box) => new Promise(requestAnimationFrame)")
    assert scroller.evaluate("(box) => box.scrollHeight - box.clientHeight - box.scrollTop") < 2


def test_long_conversation_opens_at_its_very_end(page: Page, make_site: MakeSite) -> None:
    """What is far from view is not laid out: its height is a guess."""
    site = make_site([])
    conversation_id = site.run(site.app.client.say("Hello"))["conversationId"]
    site.until(lambda: not site.app.chat.running)
    now = datetime.now(UTC)
    roles = ("user", "assistant") * 200
    messages = [
        {"_id": ObjectId(), "role": role, "content": f"{role} {number}\n\n{said(number)}", "createdAt": now}
        for number, role in enumerate(roles)
    ]
    update = {"$push": {"messages": {"$each": messages}}}
    site.app.database.conversations.update_one({"_id": ObjectId(conversation_id)}, update)
    open_page(page, f"{site.url}#{conversation_id}")
    distance = (
        "(box) => new Promise(requestAnimationFrame).then(() => box.scrollHeight - box.clientHeight - box.scrollTop)"
    )
    scroller = page.locator("#scroller")
    latest = page.get_by_role("button", name="Latest")
    copy = page.get_by_role("button", name="Copy answer").last
    expect(copy).to_be_in_viewport(ratio=1)
    assert scroller.evaluate(distance) < 2
    scroller.focus()
    page.keyboard.press("Home")
    expect(page.get_by_text("user 0", exact=False).first).to_be_in_viewport()
    expect(latest).to_be_visible()
    latest.click()
    expect(copy).to_be_in_viewport(ratio=1)
    assert scroller.evaluate(distance) < 2
    expect(latest).to_be_hidden()


def test_box_that_grows_and_shrinks_leaves_the_reader_at_the_end(page: Page, make_site: MakeSite) -> None:
    site = make_site([f"Line {number}\n\n" for number in range(60)])
    open_page(page, site.url)
    say(page, "Much")
    site.say(60)
    expect(page.get_by_text("Line 59", exact=True)).to_be_in_viewport()
    expect_idle(page)
    for text in ("one\ntwo\nthree\nfour\nfive", "one\ntwo\nthree\nfour\nfive!", "one"):
        page.get_by_label("Message", exact=True).fill(text)
        page.evaluate("() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
        expect(page.get_by_text("Line 59", exact=True)).to_be_in_viewport()
        expect(page.get_by_role("button", name="Latest")).to_be_hidden()
        page.set_viewport_size({"width": 1200, "height": 500 + 10 * len(text)})


def test_welcome_is_read_from_its_beginning_on_a_low_screen(
    new_context: Callable[..., BrowserContext], make_site: MakeSite
) -> None:
    page = open_page(new_context(viewport={"width": 320, "height": 256}).new_page(), make_site().url)
    assert page.locator("#scroller").evaluate("(scroller) => scroller.scrollTop") == 0
    page.get_by_label("Message", exact=True).fill("\n".join("123456789012"))
    page.evaluate("() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
    assert page.locator("#scroller").evaluate("(scroller) => scroller.scrollTop") == 0
    expect(page.get_by_role("button", name="Send")).to_be_in_viewport(ratio=1)


def test_keyboard_only(page: Page, make_site: MakeSite) -> None:
    site = make_site(["One"], words(5))
    open_page(page, site.url)
    focused = page.locator(":focus")
    expect(focused).to_have_attribute("id", "input")
    page.keyboard.type("By keyboard")
    page.keyboard.press("Enter")
    site.say()
    expect(answers(page)).to_have_text(["One"])
    expect_idle(page)
    page.keyboard.press("Shift+Tab")
    expect(focused).to_have_accessible_name("Copy answer")
    page.keyboard.press("Shift+Tab")
    expect(focused).to_have_accessible_name("Copy message")
    page.keyboard.press("Shift+Tab")
    expect(focused).to_have_accessible_name("Conversation")

    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(focused).to_have_attribute("id", "input")
    page.keyboard.type("More")
    page.keyboard.press("Tab")
    expect(focused).to_have_accessible_name("Send")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    # The button that had the focus is gone; the focus is not.
    expect(focused).to_have_attribute("id", "input")
    page.keyboard.press("Tab")
    expect(focused).to_have_accessible_name("Stop")
    page.keyboard.press("Space")
    expect(page.locator(".ending")).to_have_text(["Stopped."])
    expect(focused).to_have_attribute("id", "input")

    page.locator("body").evaluate("() => document.activeElement.blur()")
    page.reload()
    expect(answers(page).first).to_have_text("One")
    expect(page.locator("#conversations a")).to_have_text(["By keyboard"])
    page.locator("#new").focus()
    page.keyboard.press("Tab")
    expect(focused).to_have_text("By keyboard")
    expect(focused).to_have_css("outline-style", "solid")
    page.keyboard.press("Tab")
    expect(focused).to_have_accessible_name("Delete the conversation: By keyboard")
    page.keyboard.press("Enter")
    expect(focused).to_have_accessible_name("Cancel")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(focused).to_have_accessible_name("Delete the conversation: By keyboard")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(focused).to_have_accessible_name("Delete")
    page.keyboard.press("Enter")
    expect(page.locator("#no-conversations")).to_be_visible()
    expect(page.locator("#conversations a")).to_have_count(0)
    expect(focused).to_have_attribute("id", "new")


def test_drawer_on_a_narrow_screen(new_context: Callable[..., BrowserContext], make_site: MakeSite) -> None:
    site = make_site(["One"])
    site.say()
    page = open_page(new_context(viewport={"width": 360, "height": 640}).new_page(), site.url)
    say(page, "A narrow one")
    expect(answers(page)).to_have_text(["One"])
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    link = page.get_by_role("link", name="A narrow one")
    expect(link).to_be_hidden()
    opener = page.get_by_role("button", name="Conversations", exact=True)
    opener.focus()
    page.keyboard.press("Enter")
    expect(link).to_be_visible()
    expect(page.locator(":focus")).to_have_accessible_name("Close the list of conversations")
    page.keyboard.press("Escape")
    expect(link).to_be_hidden()
    expect(page.locator(":focus")).to_have_attribute("id", "open-sidebar")
    opener.click()
    page.get_by_role("link", name="New conversation").click()
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    opener.click()
    link.click()
    expect(answers(page)).to_have_text(["One"])
    expect(link).to_be_hidden()


def test_answer_is_announced_once_as_a_whole(page: Page, make_site: MakeSite) -> None:
    site = make_site(["It is ", "**done**", "."])
    open_page(page, site.url)
    page.evaluate(
        """() => {
          window.announced = [];
          const announcer = document.querySelector("#announcer");
          const observer = new MutationObserver(() => window.announced.push(announcer.textContent));
          observer.observe(announcer, { childList: true });
        }"""
    )
    live = page.locator("[aria-live], [role=status], [role=alert], [role=log]")
    assert live.evaluate_all("(all) => all.map((each) => each.id)") == ["notice", "announcer"]
    say(page, "Are you done?")
    site.say(2)
    expect(answers(page)).to_have_text(["It is done"])
    expect(page.locator(".message.assistant")).to_have_attribute("aria-busy", "true")
    assert page.evaluate("() => window.announced") == []
    site.say()
    expect_idle(page)
    assert page.evaluate("() => window.announced") == ["Answer: It is done."]
    expect(page.locator(".message.assistant")).to_have_attribute("aria-busy", "false")


@pytest.mark.parametrize(("motion", "moving"), [("reduce", 0), ("no-preference", 1)])
def test_drawer_moves_only_for_those_who_like_motion(
    new_context: Callable[..., BrowserContext], make_site: MakeSite, motion: Any, moving: int
) -> None:
    context = new_context(viewport={"width": 390, "height": 700}, reduced_motion=motion)
    page = open_page(context.new_page(), make_site().url)
    moves = """(id) => {
        document.getElementById(id).click();
        const moves = document.getAnimations().filter((each) => each.transitionProperty === "transform");
        moves.forEach((each) => each.finish());
        return moves.length;
    }"""
    assert page.evaluate(moves, "open-sidebar") == moving
    assert page.evaluate(moves, "close-sidebar") == moving


@pytest.mark.needs("node")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_axe_finds_nothing(
    new_context: Callable[..., BrowserContext], make_site: MakeSite, scheme: Any, width: int
) -> None:
    failure = SourceError("source_unavailable", "The model is away.")
    rich = "# Heading\n\n> quote\n\n1. a [link](https://a.example/)\n2. `code`\n\n```js\nlet a;\n```\n\n"
    rich += "|a|b|\n|-|-|\n|1|2|\n\nEnd"
    site = make_site([rich], ["Half", failure], words(3))
    context = new_context(color_scheme=scheme, viewport={"width": width, "height": 800}, reduced_motion="reduce")
    page = open_page(context.new_page(), site.url)
    source = AXE.read_text()

    def check() -> None:
        page.evaluate(source)
        found: list[dict[str, Any]] = page.evaluate("async () => (await axe.run()).violations")
        assert not [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]

    check()
    say(page, "Rich")
    site.say()
    expect(page.get_by_text("End", exact=True)).to_be_visible()
    expect_idle(page)
    say(page, "Fail")
    site.say(2)
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    check()
    page.get_by_role("button", name="Retry").click()
    site.say()
    expect(answers(page)).to_contain_text(["Heading", "Half", "word0"])
    page.get_by_text("Earlier attempt").click()
    context.set_offline(True)
    expect(page.locator("#state")).to_have_text("Offline")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("alert")).to_be_visible()
    check()
    context.set_offline(False)
    if width < 500:
        page.get_by_role("button", name="Conversations", exact=True).click()
        expect(page.get_by_role("link", name="Rich")).to_be_visible()
        check()
    page.get_by_role("link", name="Rich").hover()
    page.get_by_role("button", name="Delete the conversation: Rich").click()
    check()


def test_works_under_a_path_and_asks_nobody_else(page: Page, make_site: MakeSite) -> None:
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
    head = httpx.head(site.url)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Length"] == httpx.get(site.url).headers["Content-Length"]


def test_client_that_is_copied_needs_nothing_else(page: Page, make_site: MakeSite) -> None:
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


@pytest.fixture
def file_server(tmp_path: Path) -> Iterator[str]:
    """Serve the test's folder as `python3 -m http.server --bind 127.0.0.1` does; the origin."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_page_of_the_readme(
    page: Page, make_site: MakeSite, make_proxy: Callable[[Site], CuttingProxy], file_server: str, tmp_path: Path
) -> None:
    readme = (ROOT / "README.md").read_text()
    steps = readme.partition("### A page of your own")[2].partition("\n### ")[0]
    html = re.search(r"```html\n(.*?)```", steps, re.DOTALL)
    assert html and re.findall(r"^\d(?=\.)", steps, re.M) == ["1", "2", "3"]
    # All three steps name the same origin.
    assert steps.count("http://127.0.0.1:8000") == 2 and "http.server 8000 --bind 127.0.0.1" in steps
    site = make_site(words(2), words(3), keepalive_s=1.0, max_input_chars=400, cors_origins=(file_server,))
    proxy = make_proxy(site)
    (tmp_path / "index.html").write_text(html[1].replace("127.0.0.1:3000", f"127.0.0.1:{proxy.port}"))
    log, box, trouble = page.locator("#log"), page.locator("#say"), page.locator("#trouble")
    page.goto(f"{file_server}/")
    site.until(lambda: site.open_streams() == 1)

    # A long line is wrapped.
    box.fill("x" * 400)
    page.keyboard.press("Enter")
    site.say(2)
    expect(log).to_have_text(f"user: {'x' * 400}\nassistant: {said(2)}")
    expect(box).to_have_value("")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # What is refused, and what does not arrive, stays in the box, with the reason.
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


@pytest.mark.needs("node")
def test_types_in_the_comments_hold() -> None:
    """Whoever copies `client.js` gets types that are true."""
    options = "--noEmit --strict --allowJs --checkJs --target es2023 --module esnext --moduleResolution bundler"
    files = sorted((ROOT / "chatserver" / "web").glob("*.js"))
    checked = subprocess.run(
        [NODE_MODULES / ".bin" / "tsc", *options.split(), "--lib", "es2023,dom,dom.iterable", "--types", "", *files],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert checked.returncode == 0, checked.stdout
