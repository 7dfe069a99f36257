"""A conversation on the chat page: what a person sees, and that it is what is stored."""

import re

import pytest
from playwright.sync_api import BrowserContext, Page, expect

from chatserver.errors import SourceError
from tests.page.steps import (
    MakeSite,
    answers,
    expect_idle,
    expect_stored,
    id_of,
    open_page,
    said,
    said_by_user,
    say,
    words,
)

pytestmark = pytest.mark.needs("chromium")


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
    expect(page.get_by_role("alert")).to_have_text("The answer is still being written. Wait until it ends, or stop it.")
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
