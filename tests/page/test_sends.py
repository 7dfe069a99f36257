"""Posts from the page that fail, or whose answers are lost."""

import re

import pytest
from playwright.sync_api import Page, Route, expect

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

pytestmark = pytest.mark.needs("chromium")


def test_message_that_arrived_leaves_the_box_although_its_answer_was_lost(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(2), words(1))
    open_page(page, site.url)
    keys = lose_answer(page, "**/chat", taken=True)
    say(page, "Once only")
    expect(said_by_user(page)).to_have_text(["Once only"])
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#conversations a")).to_have_text(["Once only"])
    site.say(2)
    expect(answers(page)).to_have_text([said(2)])
    expect_idle(page)
    # The same text again is a new message.
    say(page, "Once only")
    site.say()
    expect(answers(page)).to_have_text([said(2), said(1)])
    expect(said_by_user(page)).to_have_text(["Once only", "Once only"])
    assert len(keys) == 2 and keys[1] != keys[0]
    expect_stored(page, site)


def test_reload_after_a_lost_answer_shows_the_message_once(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(2), words(1))
    open_page(page, site.url)
    break_streams(page, site)
    keys = lose_answer(page, "**/chat", taken=True)
    say(page, "Once only")
    expect(page.get_by_role("alert")).to_have_text(
        "The server cannot be reached. Your text is kept. Sending it again will not post it twice."
    )
    expect(page.get_by_label("Message", exact=True)).to_have_value("Once only")
    conversation_id = id_of(page)
    page.unroute(STREAMS)
    page.reload()
    expect(said_by_user(page)).to_have_text(["Once only"])
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    expect(page.get_by_role("alert")).to_be_hidden()
    site.say(2)
    expect(answers(page)).to_have_text([said(2)])
    assert len(keys) == 1 and id_of(page) == conversation_id
    expect(page.locator("#conversations a")).to_have_text(["Once only"])
    expect_stored(page, site)


def test_lost_message_keeps_its_key_over_a_reload(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(1))
    open_page(page, site.url)
    keys = lose_answer(page, "**/chat", taken=False)
    say(page, "Once only")
    kept = "Your text is kept. Sending it again will not post it twice."
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


def test_unanswered_message_does_not_block_another_conversation(page: Page, make_site: MakeSite) -> None:
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
    expect(page.get_by_role("alert")).to_have_text("Your text is kept. Sending it again will not post it twice.")


@pytest.mark.parametrize("what", ["stop", "retry", "delete"])
def test_failure_notice_stays_until_it_is_resolved(page: Page, make_site: MakeSite, what: str) -> None:
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
        # The page reconnects; the notice stays.
        page.wait_for_function("() => states.includes('Reconnecting') && states.at(-1) === 'Live'")
    lasting = {
        "stop": "Your stop may not have arrived.",
        "retry": "Your retry may not have arrived.",
        "delete": "The server cannot be reached. “Count” may not have been deleted.",
    }
    expect(page.get_by_role("alert")).to_have_text(lasting[what])
    act()
    if what == "retry":
        site.say(2)
        expect(answers(page)).to_have_text([said(2)])
    elif what == "stop":
        expect(page.locator(".ending")).to_have_text(["Stopped."])
    else:
        expect(page.locator("#no-conversations")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()
    assert "Paused: click to resume" not in page.evaluate("() => states")


def test_foreign_answers_break_nothing(page: Page, make_site: MakeSite) -> None:
    """A hotel's network answers every request with its login page until the user has logged in."""
    site = make_site(words(1), words(1))
    site.say()
    conversation_id = site.run(site.app.client.say("Hello"))["conversationId"]
    site.until(lambda: not site.app.replies.running)
    is_ours = False
    login = {"status": 200, "content_type": "text/html", "body": "<h1>Log in</h1>"}
    page.route(re.compile("/chat"), lambda route: route.continue_() if is_ours else route.fulfill(**login))
    page.goto(f"{site.url}#{conversation_id}")
    expect(page.locator("#state")).to_have_text("Reconnecting")
    expect(page.get_by_role("heading", level=1)).to_have_text("Conversation")
    say(page, "Anybody?")
    expect(page.get_by_role("alert")).to_have_text(
        "The server cannot be reached: something else answered. "
        "Your text is kept. Sending it again will not post it twice."
    )
    is_ours = True
    expect(page.locator("#state")).to_have_text("Live")
    page.get_by_label("Message", exact=True).press("Enter")
    site.say()
    expect(answers(page)).to_have_text([said(1), said(1)])
    expect(said_by_user(page)).to_have_text(["Hello", "Anybody?"])


def test_refused_message_keeps_the_text_and_shows_the_reason(page: Page, make_site: MakeSite) -> None:
    site = make_site([], max_input_chars=20)
    open_page(page, site.url)
    page.route(
        "**/chat",
        lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>", content_type="text/html"),
        times=1,
    )
    page.get_by_label("Message", exact=True).fill("Hello")
    page.get_by_role("button", name="Send").click()
    # The server may have accepted it, and the proxy may have lost the answer.
    told = "The server answered 502. Your text is kept. Sending it again will not post it twice."
    expect(page.get_by_role("alert")).to_have_text(told)
    expect(page.get_by_label("Message", exact=True)).to_have_value("Hello")
    say(page, "a" * 21)
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_text("Your message must have at most 20 characters.")
    expect(page.get_by_label("Message", exact=True)).to_have_value("a" * 21)
    say(page, "Hello")
    expect(said_by_user(page)).to_have_text(["Hello"])
    expect(page.get_by_role("alert")).to_be_hidden()
