"""Several tabs with one conversation."""

import pytest
from playwright.sync_api import BrowserContext, Page, expect

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


def test_tenth_tab_works_and_the_first_resumes_when_it_is_used(context: BrowserContext, make_site: MakeSite) -> None:
    site = make_site(words(3), words(2))
    pages = [open_page(context.new_page(), site.url)]
    say(pages[0], "From the first")
    site.say()
    pages += [open_page(context.new_page(), f"{site.url}#{id_of(pages[0])}") for _ in range(9)]
    # With more than six streams, the browser would block every further request.
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
    # Closed tabs free their streams.
    for each in pages[2:]:
        each.close()
    expect(pages[0].locator("#state")).to_have_text("Live")
    expect(pages[1].locator("#state")).to_have_text("Live")


def test_hidden_tab_closes_its_stream_and_resumes_when_it_is_visible(page: Page, make_site: MakeSite) -> None:
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
