"""Branches of a conversation on the chat page: regenerate, edit, step between versions; and renaming."""

import json
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect

from tests.browser import Site
from tests.page.steps import (
    STREAMS,
    MakeSite,
    answers,
    break_streams,
    expect_idle,
    expect_stored,
    id_of,
    lose_answer,
    open_page,
    said,
    said_by_user,
    say,
    words,
)
from tests.proxy import CuttingProxy

pytestmark = pytest.mark.needs("chromium")

KEPT = "Your text is kept. Sending it again will not post it twice."


def versions(page: Page, of: str = "answer") -> Locator:
    return page.get_by_role("group", name=f"Versions of the {of}")


def press(page: Page, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).last.press("Enter")


def ask(page: Page, site: Site, text: str, answer: str, tokens: int = 1) -> None:
    """Send a message, and wait until its answer of some tokens has ended."""
    say(page, text)
    site.say(tokens)
    expect(answers(page).last).to_have_text(answer)
    expect_idle(page)


def begin(page: Page, make_site: MakeSite, *later: list[str | BaseException]) -> Site:
    """Open a site, and have "First" answered by "One" in a new conversation; return the site.

    :param later: the tokens of the answers that follow
    """
    site = make_site(["One"], *later)
    open_page(page, site.url)
    ask(page, site, "First", "One")
    return site


def edit(page: Page, text: str) -> None:
    """Send another version of the last message of the user."""
    press(page, "Edit")
    say(page, text)


def test_complete_answer_is_regenerated_in_two_tabs(context: BrowserContext, make_site: MakeSite) -> None:
    site = make_site(words(2), words(4), words(1))
    page = open_page(context.new_page(), site.url)
    ask(page, site, "Count", said(2), tokens=2)
    other = open_page(context.new_page(), page.url)

    press(page, "Regenerate")

    expect(page.locator(":focus")).to_have_attribute("id", "input")
    site.say(2)
    for each in (page, other):
        expect(answers(each)).to_have_text([said(2)])
        expect(each.get_by_role("button", name="Stop")).to_be_visible()
        expect(each.get_by_role("button", name="Edit")).to_have_attribute("aria-disabled", "true")
    site.say(2)
    for each in (page, other):
        expect(answers(each)).to_have_text([said(4)])
        expect_idle(each)
        expect(versions(each)).to_have_text("‹2/2›")
        expect_stored(each, site)
    press(other, "Regenerate")
    site.say()
    for each in (page, other):
        expect(answers(each)).to_have_text([said(1)])
        expect(versions(each)).to_have_text("‹3/3›")
        each.reload()
        expect(versions(each)).to_have_text("‹3/3›")


def test_edit_begins_a_branch_and_both_can_be_shown(page: Page, make_site: MakeSite) -> None:
    site = begin(page, make_site, ["Two"], ["Three"])
    ask(page, site, "Second", "Two")
    box = page.get_by_label("Message", exact=True)
    box.fill("half a thought")

    press(page, "Edit")
    expect(box).to_be_focused()
    expect(box).to_have_value("Second")
    expect(box).to_have_accessible_description(re.compile("^You are editing a message"))
    box.fill("Second, better")
    page.keyboard.press("Enter")

    expect(said_by_user(page)).to_have_text(["First", "Second, better"])
    expect(box).to_have_value("half a thought")
    expect(page.locator("#editing")).to_be_hidden()
    site.say()
    expect(answers(page)).to_have_text(["One", "Three"])
    expect_idle(page)
    expect(versions(page, "message")).to_have_text("‹2/2›")
    expect_stored(page, site)
    expect(page.get_by_role("button", name="Next version")).to_have_attribute("aria-disabled", "true")

    page.get_by_role("button", name="Previous version").press("Enter")

    expect(said_by_user(page)).to_have_text(["First", "Second"])
    expect(answers(page)).to_have_text(["One", "Two"])
    expect(versions(page, "message")).to_have_text("‹1/2›")
    expect(page.locator(":focus")).to_have_accessible_name("Previous version")
    expect_stored(page, site)
    page.get_by_role("button", name="Next version").press("Enter")
    expect(answers(page)).to_have_text(["One", "Three"])
    expect(page.locator(":focus")).to_have_accessible_name("Next version")
    expect(box).to_have_value("half a thought")


def test_first_message_is_edited_and_the_title_is_that_of_the_branch(page: Page, make_site: MakeSite) -> None:
    site = begin(page, make_site, ["Two"])

    edit(page, "Another first")
    site.say()

    expect(said_by_user(page)).to_have_text(["Another first"])
    expect(answers(page)).to_have_text(["Two"])
    expect_idle(page)
    expect(page.locator("#conversations a")).to_have_text(["Another first"])
    expect(page.get_by_role("heading", level=1)).to_have_text("Another first")
    press(page, "Previous version")
    expect(answers(page)).to_have_text(["One"])
    expect(page.locator("#conversations a")).to_have_text(["First"])
    expect(page.get_by_role("heading", level=1)).to_have_text("First")


def test_edit_is_cancelled_and_survives_a_reload(page: Page, make_site: MakeSite) -> None:
    site = begin(page, make_site)
    box = page.get_by_label("Message", exact=True)
    box.fill("half a thought")
    press(page, "Edit")
    box.fill("First, better")

    page.reload()
    expect(box).to_have_value("First, better")
    expect(page.locator("#editing")).to_be_visible()
    box.press("Escape")

    expect(box).to_have_value("half a thought")
    expect(page.locator("#editing")).to_be_hidden()
    page.reload()
    expect(box).to_have_value("half a thought")
    press(page, "Edit")
    expect(box).to_have_value("First")
    page.get_by_role("button", name="Cancel").click()
    expect(box).to_have_value("half a thought")
    assert len(site.history(id_of(page))) == 2


def test_other_version_is_shown_in_another_tab(context: BrowserContext, make_site: MakeSite) -> None:
    page = context.new_page()
    site = begin(page, make_site, ["Two"], ["Three"])
    press(page, "Regenerate")
    site.say()
    expect(answers(page)).to_have_text(["Two"])
    expect_idle(page)
    other = open_page(context.new_page(), page.url)
    expect(answers(other)).to_have_text(["Two"])

    press(other, "Previous version")

    for each in (page, other):
        expect(answers(each)).to_have_text(["One"])
        expect(versions(each)).to_have_text("‹1/2›")
    say(page, "Go on")
    site.say()
    for each in (page, other):
        expect(answers(each)).to_have_text(["One", "Three"])
        expect_idle(each)
        expect_stored(each, site)


def test_message_edited_while_another_tab_shows_another_branch_is_not_lost(
    context: BrowserContext, make_site: MakeSite
) -> None:
    page = context.new_page()
    site = begin(page, make_site, ["Two"])
    edit(page, "Second")
    site.say()
    expect(answers(page)).to_have_text(["Two"])
    expect_idle(page)
    other = open_page(context.new_page(), page.url)
    press(page, "Edit")
    box = page.get_by_label("Message", exact=True)
    box.fill("Second, better")

    press(other, "Previous version")
    expect(answers(page)).to_have_text(["One"])
    box.press("Enter")

    gone = "The message that you were editing is not shown any more. Your text is kept."
    expect(page.get_by_role("alert")).to_have_text(gone)
    expect(box).to_have_value("Second, better")
    expect(page.locator("#editing")).to_be_hidden()


def test_connection_cut_in_the_middle_of_a_regeneration(
    page: Page, make_site: MakeSite, make_proxy: Callable[[Site], CuttingProxy]
) -> None:
    site = make_site(words(2), words(9))
    proxy = make_proxy(site)
    open_page(page, f"http://127.0.0.1:{proxy.port}/")
    ask(page, site, "Count", said(2), tokens=2)
    press(page, "Regenerate")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()

    # Before the first word, and after some.
    assert proxy.cut() >= 1
    site.say(4)
    expect(answers(page)).to_have_text([said(4)])
    assert proxy.cut() >= 1
    site.say(5)

    expect(answers(page)).to_have_text([said(9)])
    expect_idle(page)
    expect(versions(page)).to_have_text("‹2/2›")
    expect_stored(page, site)


def test_other_tab_is_cut_in_the_middle_of_a_regeneration(
    context: BrowserContext, make_site: MakeSite, make_proxy: Callable[[Site], CuttingProxy]
) -> None:
    """It does not know the id of the running reply."""
    site = make_site(words(2), words(9))
    proxy = make_proxy(site)
    page = open_page(context.new_page(), f"http://127.0.0.1:{proxy.port}/")
    ask(page, site, "Count", said(2), tokens=2)
    conversation_id = id_of(page)
    shown = "document.querySelector('.assistant .body')"
    page.evaluate(f"window.body = {shown}")
    stored = site.history(conversation_id)
    retry = site.app.client.http.post(f"/chat/{conversation_id}/retry", json={"messageId": stored[1]["id"]})
    assert site.run(retry).status_code == 202
    site.say(4)
    expect(answers(page)).to_have_text([said(4)])
    page.evaluate(f"window.body = {shown}")

    assert proxy.cut() >= 1
    site.say(5)

    expect(answers(page)).to_have_text([said(9)])
    expect_idle(page)
    expect(versions(page)).to_have_text("‹2/2›")
    # It is the same element: a selection survives.
    assert page.evaluate(f"body === {shown}")
    expect_stored(page, site)


@pytest.mark.parametrize("taken", [True, False], ids=["taken", "not-taken"])
def test_regeneration_whose_answer_was_lost_makes_one_reply(page: Page, make_site: MakeSite, taken: bool) -> None:
    site = begin(page, make_site, ["Two"], ["Three"])
    keys = lose_answer(page, "**/retry", taken=taken)

    press(page, "Regenerate")

    if not taken:
        expect(page.get_by_role("alert")).to_have_text("Your retry may not have arrived.")
        press(page, "Regenerate")
    site.say()
    expect(answers(page)).to_have_text(["Two"])
    expect_idle(page)
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(versions(page)).to_have_text("‹2/2›")
    assert len(set(keys)) == 1
    # Another regeneration has another key.
    press(page, "Previous version")
    expect(answers(page)).to_have_text(["One"])
    press(page, "Regenerate")
    site.say()
    expect(answers(page)).to_have_text(["Three"])
    expect(versions(page)).to_have_text("‹3/3›")
    assert len(set(keys)) == 2


def test_regeneration_repeated_while_the_stream_is_down_makes_one_reply(page: Page, make_site: MakeSite) -> None:
    site = begin(page, make_site, ["Two"])
    break_streams(page, site)
    keys = lose_answer(page, "**/retry", taken=True)
    press(page, "Regenerate")
    expect(page.get_by_role("alert")).to_contain_text("Your retry may not have arrived.")
    site.say()
    site.until(lambda: not site.app.replies.running)

    press(page, "Regenerate")

    # The stream is still down: the history has it.
    expect(answers(page)).to_have_text(["Two"])
    expect_idle(page)
    page.unroute(STREAMS)
    expect(page.locator("#state")).to_have_text("Live")
    expect(versions(page)).to_have_text("‹2/2›")
    assert len(keys) == 2 and keys[0] == keys[1]
    expect_stored(page, site)


@pytest.mark.parametrize("text", ["First, better", "First"], ids=["other-text", "same-text"])
def test_edit_that_arrived_leaves_the_box_although_its_answer_was_lost(
    page: Page, make_site: MakeSite, text: str
) -> None:
    site = begin(page, make_site, ["Two"])
    page.get_by_label("Message", exact=True).fill("half a thought")
    keys = lose_answer(page, "**/chat", taken=True)

    edit(page, text)

    expect(page.get_by_label("Message", exact=True)).to_have_value("half a thought")
    expect(page.get_by_role("alert")).to_be_hidden()
    site.say()
    expect(answers(page)).to_have_text(["Two"])
    expect(said_by_user(page)).to_have_text([text])
    expect(versions(page, "message")).to_have_text("‹2/2›")
    expect_idle(page)
    assert len(keys) == 1
    expect_stored(page, site)


@pytest.mark.parametrize("text", ["First, better", "First"], ids=["other-text", "same-text"])
@pytest.mark.parametrize("taken", [True, False], ids=["taken", "not-taken"])
def test_edit_is_recognised_after_a_reload(page: Page, make_site: MakeSite, text: str, taken: bool) -> None:
    site = begin(page, make_site, ["Two"])
    box = page.get_by_label("Message", exact=True)
    box.fill("half a thought")
    break_streams(page, site)
    keys = lose_answer(page, "**/chat", taken=taken)
    edit(page, text)
    expect(page.get_by_role("alert")).to_contain_text(KEPT)

    page.unroute(STREAMS)
    page.reload()

    if not taken:
        expect(answers(page)).to_have_text(["One"])
        expect(page.get_by_role("alert")).to_have_text(KEPT)
        expect(box).to_have_value(text)
        box.press("Enter")
    expect(box).to_have_value("half a thought")
    expect(page.get_by_role("alert")).to_be_hidden()
    site.say()
    expect(answers(page)).to_have_text(["Two"])
    expect(said_by_user(page)).to_have_text([text])
    expect_idle(page)
    assert len(set(keys)) == 1
    expect(versions(page, "message")).to_have_text("‹2/2›")
    expect_stored(page, site)


def test_message_on_another_branch_is_not_taken_for_the_unsent_one(page: Page, make_site: MakeSite) -> None:
    """The same text stands on a longer branch, which is shown when the page has been loaded again."""
    site = begin(page, make_site, ["Two"], ["Three"])
    ask(page, site, "Yes", "Two")
    edit(page, "No")
    site.say()
    expect(answers(page)).to_have_text(["One", "Three"])
    expect_idle(page)
    conversation_id = id_of(page)
    unsent = {"text": "Yes", "key": "k", "after": site.history(conversation_id)[-1]["id"]}
    press(page, "Previous version")
    expect(answers(page)).to_have_text(["One", "Two"])
    page.evaluate(
        "([id, draft]) => sessionStorage.setItem(`chatserver-typed-${id}`, draft)",
        [conversation_id, json.dumps({"text": "Yes", "unsent": unsent})],
    )

    page.reload()

    expect(said_by_user(page)).to_have_text(["First", "Yes"])
    expect(page.get_by_role("alert")).to_have_text(KEPT)
    expect(page.get_by_label("Message", exact=True)).to_have_value("Yes")


@pytest.mark.parametrize("status", [0, 409])
def test_switch_that_fails_is_reported_and_can_be_repeated(page: Page, make_site: MakeSite, status: int) -> None:
    site = begin(page, make_site, ["Two"])
    press(page, "Regenerate")
    site.say()
    expect(versions(page)).to_have_text("‹2/2›")
    expect_idle(page)
    problem = {"code": "reply_in_progress", "detail": "A reply is running.", "status": 409}
    refusal = {"status": 409, "content_type": "application/problem+json", "body": json.dumps(problem)}
    page.route(
        "**/head",
        lambda route: route.fulfill(**refusal) if status else route.abort("connectionreset"),
        times=1,
    )

    press(page, "Previous version")

    reason = "A reply is running." if status else "The other version may not be shown."
    expect(page.get_by_role("alert")).to_contain_text(reason)
    expect(answers(page)).to_have_text(["Two"])
    press(page, "Previous version")
    expect(answers(page)).to_have_text(["One"])
    expect(page.get_by_role("alert")).to_be_hidden()


def test_selection_survives_what_happens_to_other_messages(page: Page, make_site: MakeSite) -> None:
    site = begin(page, make_site, words(3))
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.user .body'))")

    # By another client: here, the focus would move to the message box.
    assert site.run(site.app.client.http.post(f"/chat/{id_of(page)}/retry")).status_code == 202
    site.say(3)
    expect(answers(page)).to_have_text([said(3)])
    expect_idle(page)

    assert page.evaluate("getSelection().toString()") == "First"


def rename(page: Page, old: str, title: str) -> None:
    page.get_by_role("link", name=old).hover()
    page.get_by_role("button", name=f"Rename the conversation: {old}", exact=True).click()
    page.get_by_label("Title", exact=True).fill(title)
    page.keyboard.press("Enter")


def test_conversation_is_renamed_in_all_tabs(
    new_context: Callable[..., BrowserContext], context: BrowserContext, make_site: MakeSite
) -> None:
    page = context.new_page()
    begin(page, make_site)
    # Another browser, which only the server can tell.
    other = open_page(new_context().new_page(), page.url)
    expect(answers(other)).to_have_text(["One"])

    rename(page, "First", "Of ducks")

    for each in (page, other):
        expect(each.get_by_role("heading", level=1)).to_have_text("Of ducks")
        expect(each).to_have_title("Of ducks · chatserver")
        expect(each.locator("#conversations a")).to_have_text(["Of ducks"])
    page.reload()
    expect(page.get_by_role("heading", level=1)).to_have_text("Of ducks")
    rename(page, "Of ducks", "  ")
    for each in (page, other):
        expect(each.get_by_role("heading", level=1)).to_have_text("First")
        expect(each.locator("#conversations a")).to_have_text(["First"])


def test_conversation_that_is_not_open_is_renamed(page: Page, make_site: MakeSite) -> None:
    site = make_site(["One"])
    site.say()
    site.run(site.app.client.say("First"))
    open_page(page, site.url)

    rename(page, "First", "Of ducks")

    expect(page.locator("#conversations a")).to_have_text(["Of ducks"])
    expect(page.get_by_role("heading", level=1)).to_have_text("New conversation")
    page.get_by_role("link", name="Of ducks").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Of ducks")


def test_title_that_is_not_changed_stays_automatic(page: Page, make_site: MakeSite) -> None:
    begin(page, make_site)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.method))

    rename(page, "First", "First")

    expect(page.get_by_role("dialog")).to_be_hidden()
    assert "PATCH" not in asked


def test_title_that_is_refused_is_reported(page: Page, make_site: MakeSite) -> None:
    begin(page, make_site)

    rename(page, "First", "a\tb")

    expect(page.get_by_role("alert")).to_contain_text("The title ")
    expect(page.get_by_role("heading", level=1)).to_have_text("First")
