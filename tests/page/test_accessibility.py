"""Accessibility of the page: keyboard, narrow screens, screen readers, axe."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from chatserver.errors import SourceError
from tests.page.steps import AXE, MakeSite, answers, expect_idle, open_page, say, words
from tests.page.users import SETTINGS, Users

pytestmark = pytest.mark.needs("chromium")


def expect_accessible(page: Page) -> None:
    page.evaluate(AXE.read_text())
    found: list[dict[str, Any]] = page.evaluate("async () => (await axe.run()).violations")
    assert not [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]


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
    for name in ("Copy answer", "Regenerate", "Copy message", "Edit", "Conversation"):
        expect(focused).to_have_accessible_name(name)
        page.keyboard.press("Shift+Tab")

    page.locator("#input").focus()
    expect(focused).to_have_attribute("id", "input")
    page.keyboard.type("More")
    page.keyboard.press("Tab")
    expect(focused).to_have_accessible_name("Send")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    # The focused button has been removed; the focus has moved, not vanished.
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
    expect(focused).to_have_accessible_name("Rename the conversation: By keyboard")
    page.keyboard.press("Enter")
    expect(focused).to_have_accessible_name("Title")
    page.keyboard.press("Escape")
    expect(focused).to_have_accessible_name("Rename the conversation: By keyboard")
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
def test_drawer_is_animated_unless_reduced_motion_is_preferred(
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
    check = partial(expect_accessible, page)
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
    expect(answers(page)).to_contain_text(["Heading", "word0"])
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
    page.get_by_role("button", name="Rename the conversation: Rich").click()
    check()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Delete the conversation: Rich").click()
    check()


@pytest.mark.needs("node")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_axe_finds_nothing_in_versions_and_an_edit(
    new_context: Callable[..., BrowserContext], make_site: MakeSite, scheme: Any, width: int
) -> None:
    site = make_site(["One"], ["Two"], words(3))
    site.say(2)
    context = new_context(color_scheme=scheme, viewport={"width": width, "height": 800}, reduced_motion="reduce")
    page = open_page(context.new_page(), site.url)
    say(page, "Hello")
    page.get_by_role("button", name="Regenerate").click()
    expect(answers(page)).to_have_text(["Two"])
    page.get_by_role("button", name="Edit").click()
    expect_accessible(page)

    page.get_by_label("Message", exact=True).press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.get_by_role("group", name="Versions of the message")).to_be_visible()
    expect_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.needs("node")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_axe_finds_nothing_in_the_bar_and_the_account(
    new_context: Callable[..., BrowserContext], make_site: MakeSite, scheme: Any, width: int
) -> None:
    site = make_site(auth_login_url="/login", auth_logout_url="/logout", **SETTINGS)
    context = new_context(color_scheme=scheme, viewport={"width": width, "height": 800}, reduced_motion="reduce")
    users = Users(context, site)
    page = context.new_page()
    page.goto(site.url)
    expect(page.locator("#signed-out")).to_be_visible()
    say(page, "Hello")
    expect(page.get_by_role("alert")).to_be_visible()
    expect_accessible(page)

    users.sign_in("auth0|" + "x" * 40)
    page.reload()
    expect(page.locator("#state")).to_have_text("Live")
    if width < 500:
        page.get_by_role("button", name="Conversations", exact=True).click()
    expect(page.get_by_role("link", name="Sign out")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    expect_accessible(page)


def test_bar_is_announced_and_reached_by_keyboard(context: BrowserContext, make_site: MakeSite) -> None:
    site = make_site(auth_login_url="/login", **SETTINGS)
    users = Users(context, site)
    page = context.new_page()
    page.goto(site.url)
    expect(page.locator("#announcer")).to_have_text("You are signed out.")
    expect(page.locator("#state")).to_have_text("Signed out")
    focused = page.locator(":focus")
    expect(focused).to_have_attribute("id", "input")

    page.locator("#scroller").focus()
    page.keyboard.press("Shift+Tab")
    expect(focused).to_have_accessible_name("Sign in")
    expect(focused).to_have_css("outline-style", "solid")
    users.sign_in("alice")
    page.evaluate("dispatchEvent(new Event('focus'))")

    # The focused link has been removed; the focus has moved, not vanished.
    expect(focused).to_have_attribute("id", "input")
    expect(page.locator("#announcer")).to_have_text("You are signed in again.")
