"""The page of a server with users: signed out, signed in again, another user."""

import re
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, Route, expect

from tests.page.steps import (
    MakeSite,
    answers,
    expect_idle,
    expect_stored,
    open_page,
    said,
    said_by_user,
    say,
    streams_of,
    words,
)
from tests.page.users import SETTINGS, Users, problem

pytestmark = pytest.mark.needs("chromium")

# Later, because the page may be loaded again.
FOCUS = "void setTimeout(() => dispatchEvent(new Event('focus')), 100)"
SHOW_TAB = """(now) => {
  Object.defineProperty(document, "visibilityState", { value: now, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""
VISIBLE = "void setTimeout(() => document.dispatchEvent(new Event('visibilitychange')), 100)"
DRAFTS = "Object.keys(sessionStorage).filter((key) => key.startsWith('chatserver-typed-'))"


def expect_signed_out(page: Page) -> None:
    expect(page.locator("#signed-out")).to_be_visible()
    expect(page.locator("#state")).to_have_text("Signed out")


def expect_signed_in(page: Page) -> None:
    expect(page.locator("#signed-out")).to_be_hidden()
    expect(page.locator("#state")).to_have_text("Live")


# -- signed out ------------------------------------------------------------------------------------------------------


def test_signed_out_at_load_keeps_what_is_typed_and_goes_on_after_the_login(
    context: BrowserContext, make_site: MakeSite
) -> None:
    site = make_site(words(1), auth_login_url="/login?to={page}&x=1", **SETTINGS)
    users = Users(context, site)
    site.say()
    site.run(site.app.client.say("Earlier"))
    page = context.new_page()
    page.goto(site.url)
    expect_signed_out(page)
    expect(page.locator("#signed-out")).to_have_text("You are signed out. Sign in", use_inner_text=True)
    expect(page.locator("#announcer")).to_have_text("You are signed out.")
    box = page.get_by_label("Message", exact=True)
    box.fill("Not sent yet")
    page.reload()
    expect_signed_out(page)
    expect(box).to_have_value("Not sent yet")

    users.sign_in("alice")
    page.evaluate(FOCUS)

    expect_signed_in(page)
    expect(page.locator("#conversations a")).to_have_text(["Earlier"])
    expect(box).to_have_value("Not sent yet")
    expect(page.locator("#announcer")).to_have_text("You are signed in again.")


def test_link_to_sign_in_has_the_address_of_the_conversation(context: BrowserContext, make_site: MakeSite) -> None:
    site = make_site(words(1), auth_login_url="/login?to={page}&x=1", **SETTINGS)
    Users(context, site)
    context.route("**/login**", lambda route: route.fulfill(body="<h1>Log in</h1>", content_type="text/html"))
    page = context.new_page()
    page.goto(site.url)
    expect_signed_out(page)
    # The address changes when a message is sent.
    say(page, "Hello?")
    page.wait_for_url(re.compile("#[0-9a-f]{24}$"))
    address = page.url

    page.get_by_role("link", name="Sign in").click()

    expect(page.get_by_role("heading")).to_have_text("Log in")
    there = page.evaluate("[...new URL(location.href).searchParams]")
    assert there == [["to", address], ["x", "1"]]
    page.goto(address)
    expect(page.get_by_label("Message", exact=True)).to_have_value("Hello?")


@pytest.mark.parametrize("url", ["", "javascript:alert(1)", "data:text/html,hi", "http://[", "java\nscript:alert(1)"])
def test_url_that_a_link_must_not_have_makes_no_link(context: BrowserContext, make_site: MakeSite, url: str) -> None:
    site = make_site(auth_login_url=url, auth_logout_url=url, **SETTINGS)
    users = Users(context, site)
    page = context.new_page()
    page.goto(site.url)
    expect_signed_out(page)
    expect(page.locator("#signed-out")).to_have_text(
        "You are signed out. Sign in with the application that this server belongs to.", use_inner_text=True
    )
    assert page.locator("#sign-in").get_attribute("href") is None

    users.sign_in("alice")
    page.evaluate(FOCUS)

    expect(page.locator("#account")).to_have_text("alice", use_inner_text=True)
    expect(page.locator("#sign-out")).to_be_hidden()
    assert page.locator("#sign-out").get_attribute("href") is None


def test_signed_out_in_mid_answer_asks_nothing_more_and_goes_on_where_it_was(
    context: BrowserContext, make_site: MakeSite
) -> None:
    site = make_site(words(4), auth_login_url="/login", **SETTINGS)
    users = Users(context, site)
    users.sign_in("alice")
    page = context.new_page()
    page.clock.install()
    open_page(page, site.url)
    say(page, "Count")
    site.say(2)
    expect(answers(page)).to_have_text([said(2)])
    page.get_by_label("Message", exact=True).fill("Meanwhile")

    users.sign_out()
    site.run(site.app.end_streams())
    expect_signed_out(page)
    page.wait_for_timeout(200)
    n_asked = len(users.asked)
    for _ in range(4):
        page.clock.fast_forward("00:30:00")
    site.say(2)
    site.until(lambda: not site.app.replies.running)
    assert users.asked[n_asked:] == []
    expect(answers(page)).to_have_text([said(2)])
    page.evaluate(SHOW_TAB, "hidden")
    page.evaluate(SHOW_TAB, "visible")
    page.wait_for_timeout(500)
    assert {url.rpartition("/")[2].partition("?")[0] for url in users.asked[n_asked:]} <= {"me", "chat"}
    expect_signed_out(page)

    users.sign_in("alice")
    page.evaluate(VISIBLE)
    expect_signed_in(page)
    expect(answers(page)).to_have_text([said(4)])
    expect_idle(page)
    expect(page.get_by_label("Message", exact=True)).to_have_value("Meanwhile")
    expect_stored(page, site)


def test_cookie_that_is_renewed_in_time_keeps_the_stream_through_its_expiries(
    context: BrowserContext, make_site: MakeSite
) -> None:
    site = make_site(words(40), auth_login_url="/login", **SETTINGS)
    users = Users(context, site)
    users.sign_in("alice", seconds=3)
    page = open_page(context.new_page(), site.url)
    streams = streams_of(page)
    page.evaluate(
        """() => {
          const state = document.querySelector("#state");
          window.states = new Set();
          new MutationObserver(() => states.add(state.textContent)).observe(state, { childList: true });
        }"""
    )
    say(page, "Count")
    n_words = 0
    while len(streams) < 3:
        users.sign_in("alice", seconds=3)
        n_words += 1
        site.say()
        expect(answers(page)).to_have_text([said(n_words)])
        page.wait_for_timeout(200)
    assert sorted(page.evaluate("[...states]")) == ["Live", "Reconnecting"]

    # Not renewed any more.
    expect_signed_out(page)
    site.say(40 - n_words)
    site.until(lambda: not site.app.replies.running)
    users.sign_in("alice")
    page.evaluate(FOCUS)

    expect_signed_in(page)
    expect(answers(page)).to_have_text([said(40)])
    expect_idle(page)


def test_message_refused_because_the_user_is_signed_out_is_sent_once_after_the_login(
    context: BrowserContext, make_site: MakeSite
) -> None:
    site = make_site(words(1), auth_login_url="/login", **SETTINGS)
    site.say()
    users = Users(context, site)
    users.sign_in("alice")
    page = open_page(context.new_page(), site.url)
    keys: list[str] = []
    page.on("request", lambda each: keys.append(each.headers["idempotency-key"]) if each.method == "POST" else None)
    users.sign_out()
    say(page, "Once only")
    expect_signed_out(page)
    expect(page.get_by_role("alert")).to_have_text("You are signed out. Sign in, then try again.")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Once only")

    users.sign_in("alice")
    page.evaluate(FOCUS)
    expect_signed_in(page)
    expect(page.get_by_role("alert")).to_be_hidden()
    page.get_by_label("Message", exact=True).press("Enter")

    expect(answers(page)).to_have_text([said(1)])
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    assert len(keys) == 2 and keys[0] == keys[1]
    expect_stored(page, site)


def test_accepted_message_hides_the_bar(context: BrowserContext, make_site: MakeSite) -> None:
    site = make_site(words(1), auth_login_url="/login", **SETTINGS)
    site.say()
    users = Users(context, site)
    page = context.new_page()
    page.goto(site.url)
    expect_signed_out(page)
    # In a frame or by another program: the window does not get the focus.
    users.sign_in("alice")

    say(page, "Hello")

    expect(answers(page)).to_have_text([said(1)])
    expect_signed_in(page)
    expect(page.locator("#owner")).to_have_text("alice")


def test_list_that_is_refused_shows_the_bar(context: BrowserContext, make_site: MakeSite) -> None:
    site = make_site(auth_login_url="/login", **SETTINGS)
    users = Users(context, site)
    users.sign_in("alice")
    page = open_page(context.new_page(), site.url)
    users.sign_out()
    # Another window has changed the list.
    page.evaluate("new BroadcastChannel('chatserver').postMessage({ list: true })")
    expect(page.locator("#signed-out")).to_be_visible()
    expect(page.locator("#state")).to_have_text("Live")


def test_conversation_opened_while_signed_out_is_shown_after_the_login(
    context: BrowserContext, make_site: MakeSite
) -> None:
    site = make_site(words(2), auth_login_url="/login", **SETTINGS)
    users = Users(context, site)
    site.say(2)
    conversation_id = site.run(site.app.client.say("Hello"))["conversationId"]
    page = context.new_page()
    page.goto(f"{site.url}#{conversation_id}")
    expect_signed_out(page)
    expect(said_by_user(page)).to_have_count(0)

    users.sign_in("alice")
    # In another window: this one is not focused.
    open_page(context.new_page(), site.url)

    expect_signed_in(page)
    expect(answers(page)).to_have_text([said(2)])
    expect(said_by_user(page)).to_have_text(["Hello"])


# -- signed in -------------------------------------------------------------------------------------------------------


def test_name_and_link_to_sign_out_are_shown(context: BrowserContext, make_site: MakeSite) -> None:
    site = make_site(auth_logout_url="/logout?a=b", **SETTINGS)
    users = Users(context, site)
    users.sign_in("auth0|" + "x" * 200)
    # The answer leaves the page as it is.
    context.route("**/logout?a=b", lambda route: route.fulfill(status=204))
    page = open_page(context.new_page(), site.url)
    expect(page.locator("#owner")).to_have_text("auth0|" + "x" * 200)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_label("Message", exact=True).fill("A draft")
    assert page.evaluate(DRAFTS) == ["chatserver-typed-new"]

    with context.expect_event("request", lambda request: request.url.endswith("/logout?a=b")):
        page.get_by_role("link", name="Sign out").click()

    assert page.evaluate(DRAFTS) == []
    page.get_by_label("Message", exact=True).fill("Another draft")
    assert page.evaluate(DRAFTS) == []


def test_page_that_the_browser_shows_again_after_the_logout_is_loaded_anew(
    context: BrowserContext, make_site: MakeSite
) -> None:
    site = make_site(words(1), **SETTINGS)
    site.say()
    users = Users(context, site)
    users.sign_in("alice")
    page = open_page(context.new_page(), site.url)
    say(page, "Secret")
    expect(answers(page)).to_have_text([said(1)])
    users.sign_out()

    with page.expect_navigation():
        page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")

    expect_signed_out(page)
    expect(said_by_user(page)).to_have_count(0)
    expect(page.locator("#conversations a")).to_have_count(0)


def test_server_without_users_is_asked_once_and_the_page_does_not_wait(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(1))
    site.say()
    held: list[Route] = []
    page.route("**/me", lambda route: held.append(route))
    open_page(page, site.url)
    say(page, "Hello")
    expect(answers(page)).to_have_text([said(1)])

    held[0].fulfill(status=404, body="")
    page.evaluate(FOCUS)
    page.evaluate(VISIBLE)
    site.run(site.app.end_streams())
    expect(page.locator("#state")).to_have_text("Live")

    assert len(held) == 1
    expect(page.locator("#signed-out")).to_be_hidden()
    expect(page.locator("#account")).to_be_hidden()


# -- another user ----------------------------------------------------------------------------------------------------


def talk(page: Page) -> str:
    """Have a conversation, and leave a draft that may have been sent; return the URL."""
    say(page, "Alice's message")
    expect(answers(page)).to_have_text([said(1)])
    expect_idle(page)
    expect(page.locator("#conversations a")).to_have_text(["Alice's message"])
    page.route("**/chat", lambda route: route.abort("connectionreset"), times=1)
    say(page, "Alice's draft")
    expect(page.get_by_role("alert")).to_be_visible()
    # The stream that the failure reopened is followed by a check; do not leave one under way.
    page.reload()
    expect(page.locator("#owner")).to_have_text("alice")
    expect(page.locator("#state")).to_have_text("Live")
    expect(page.locator("#conversations a")).to_have_text(["Alice's message"])
    expect(page.get_by_label("Message", exact=True)).to_have_value("Alice's draft")
    return page.url


def expect_nothing_of_alice(page: Page) -> None:
    expect(page.locator("#owner")).to_have_text("bob")
    expect_signed_in(page)
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    expect(page.get_by_role("heading", level=1)).to_have_text("New conversation")
    expect(page.locator("#no-conversations")).to_be_visible()
    assert "Alice" not in page.content() + page.title()
    assert page.evaluate(DRAFTS) == []
    assert "#" not in page.url


def test_other_user_who_opens_the_window_again_sees_nothing_of_the_last_one(
    context: BrowserContext, make_site: MakeSite
) -> None:
    site = make_site(words(1), **SETTINGS)
    site.say()
    users = Users(context, site)
    users.sign_in("alice")
    page = open_page(context.new_page(), site.url)
    address = talk(page)
    page.goto("about:blank")
    users.sign_in("bob")
    held: list[Route] = []
    page.route("**/me", lambda route: route.fallback() if held else held.append(route))

    page.goto(address)

    expect(page.locator("#main")).to_have_js_property("inert", True)
    site.until(lambda: len(held) == 1)
    page.wait_for_timeout(500)
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    assert "Alice" not in page.content() + page.title()
    held[0].continue_()
    expect_nothing_of_alice(page)


@pytest.mark.parametrize("event", [FOCUS, VISIBLE])
def test_other_user_who_returns_to_the_window_sees_nothing_of_the_last_one(
    context: BrowserContext, make_site: MakeSite, event: str
) -> None:
    site = make_site(words(1), **SETTINGS)
    site.say()
    users = Users(context, site)
    users.sign_in("alice")
    page = open_page(context.new_page(), site.url)
    address = talk(page)
    users.sign_in("bob")

    page.evaluate(event)

    expect_nothing_of_alice(page)
    page.goto(address)
    expect(page.locator("#state")).to_have_text("Live")
    expect(said_by_user(page)).to_have_count(0)
    expect(page.get_by_label("Message", exact=True)).to_have_value("")


def test_other_windows_learn_of_another_user(context: BrowserContext, make_site: MakeSite) -> None:
    site = make_site(words(1), **SETTINGS)
    site.say()
    users = Users(context, site)
    users.sign_in("alice")
    page = open_page(context.new_page(), site.url)
    talk(page)

    users.sign_in("bob")
    open_page(context.new_page(), site.url)

    expect_nothing_of_alice(page)


def test_draft_of_a_user_survives_what_names_no_other_one(context: BrowserContext, make_site: MakeSite) -> None:
    site = make_site(words(1), **SETTINGS)
    users = Users(context, site)
    users.sign_in("alice")
    page = open_page(context.new_page(), site.url)
    box = page.get_by_label("Message", exact=True)
    box.fill("Alice's draft")

    answer: dict[str, Any] = {"status": 503, "body": "not now"}
    page.route("**/me", lambda route: route.fulfill(**answer))
    page.reload()
    expect(box).to_have_value("Alice's draft")
    answer = problem(401, "token_expired")
    page.evaluate(FOCUS)
    expect(page.locator("#signed-out")).to_be_visible()
    page.reload()
    expect(box).to_have_value("Alice's draft")
    page.unroute("**/me")
    page.evaluate(FOCUS)
    expect(page.locator("#owner")).to_have_text("alice")

    expect(box).to_have_value("Alice's draft")


def test_server_that_has_no_users_any_more_removes_what_the_last_one_left(
    context: BrowserContext, make_site: MakeSite
) -> None:
    site = make_site(words(1), **SETTINGS)
    users = Users(context, site)
    users.sign_in("alice")
    page = open_page(context.new_page(), site.url)
    page.get_by_label("Message", exact=True).fill("Alice's draft")
    page.route("**/me", lambda route: route.fulfill(status=404, body=""))
    page.reload()
    expect(page.locator("#state")).to_have_text("Live")
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    expect(page.locator("#account")).to_be_hidden()
    assert page.evaluate("sessionStorage.length") == 0


def test_message_to_a_conversation_of_another_user_becomes_the_draft_of_a_new_one(
    context: BrowserContext, make_site: MakeSite
) -> None:
    site = make_site(words(1), words(2), **SETTINGS)
    users = Users(context, site)
    site.say(3)
    conversation_id = site.run(site.app.client.say("Alice's message"))["conversationId"]
    users.sign_in("bob")
    page = open_page(context.new_page(), f"{site.url}#{conversation_id}")
    expect(said_by_user(page)).to_have_count(0)

    say(page, "Hello?")

    expect(page.get_by_role("alert")).to_have_text(
        "That conversation is not yours. Your message has not been sent; you can send it in this new conversation."
    )
    expect(page.get_by_label("Message", exact=True)).to_have_value("Hello?")
    assert page.url == site.url
    page.get_by_label("Message", exact=True).press("Enter")
    expect(answers(page)).to_have_text([said(2)])
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    assert len(site.history(conversation_id)) == 2
