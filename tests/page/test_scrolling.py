"""Scrolling while an answer grows."""

from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from bson import ObjectId
from playwright.sync_api import BrowserContext, Page, expect

from tests.page.steps import MakeSite, answers, expect_idle, open_page, said, say, words

pytestmark = pytest.mark.needs("chromium")


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
def test_scrolling_up_while_an_answer_streams_is_not_undone(page: Page, make_site: MakeSite, means: str) -> None:
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
    # Once the user returns to the end, the page follows the answer again.
    page.keyboard.press("End")
    expect(latest).to_be_hidden()
    site.say(100)
    expect(answers(page).last).to_contain_text("word495")
    expect(latest).to_be_hidden()
    scroller.evaluate("(box) => new Promise(requestAnimationFrame)")
    assert scroller.evaluate("(box) => box.scrollHeight - box.clientHeight - box.scrollTop") < 2


def test_long_conversation_opens_at_its_very_end(page: Page, make_site: MakeSite) -> None:
    """Messages far from the viewport are not laid out: their heights are estimates."""
    site = make_site([])
    conversation_id = site.run(site.app.client.say("Hello"))["conversationId"]
    site.until(lambda: not site.app.replies.running)
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


def test_growing_and_shrinking_box_keeps_the_end_in_view(page: Page, make_site: MakeSite) -> None:
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


def test_welcome_starts_at_its_top_on_a_low_screen(
    new_context: Callable[..., BrowserContext], make_site: MakeSite
) -> None:
    page = open_page(new_context(viewport={"width": 320, "height": 256}).new_page(), make_site().url)
    assert page.locator("#scroller").evaluate("(scroller) => scroller.scrollTop") == 0
    page.get_by_label("Message", exact=True).fill("\n".join("123456789012"))
    page.evaluate("() => new Promise((resolve) => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
    assert page.locator("#scroller").evaluate("(scroller) => scroller.scrollTop") == 0
    expect(page.get_by_role("button", name="Send")).to_be_in_viewport(ratio=1)
