"""The list of conversations on the chat page."""

import re

import httpx
import pytest
from playwright.sync_api import BrowserContext, Page, Route, expect

from tests.clients import new_id
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
    page.get_by_role("button", name="Show older conversations").click()
    expect(page.get_by_role("alert")).to_have_text("The server answered 503.")
    page.get_by_role("button", name="Show older conversations").click()
    expect(listed).to_have_text([f"Number {number}" for number in range(39, -1, -1)])
    expect(page.get_by_role("button", name="Show older conversations")).to_be_hidden()


def test_deletion_can_be_confirmed_right_after_the_dialog_was_closed(page: Page, make_site: MakeSite) -> None:
    site = make_site(["one"])
    site.say()
    open_page(page, site.url)
    say(page, "First")
    expect(page.locator("#conversations a")).to_have_text(["First"])
    page.evaluate("""() => {
        const ask = document.querySelector("#conversations .delete");
        const dialog = document.querySelector("dialog");
        ask.click();
        dialog.close();
        ask.click();
    }""")
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#no-conversations")).to_be_visible()


def test_conversation_deleted_elsewhere_is_reported(context: BrowserContext, make_site: MakeSite) -> None:
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
    # No entry of the browser's history leads back to the deleted conversation.
    assert page.evaluate("() => history.length") == 2


def test_slow_deletion_does_not_leave_another_conversation(page: Page, make_site: MakeSite) -> None:
    site = make_site(["one"], ["two"])
    site.say(2)
    for text in ("First", "Second"):
        site.run(site.app.client.say(text))
        site.until(lambda: not site.app.replies.running)
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


def test_listed_conversation_that_was_deleted_is_reported(page: Page, make_site: MakeSite) -> None:
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
    """Keyboards, length limits and other programs split surrogate pairs; UTF-8 cannot encode one half."""
    site = make_site(words(1))
    open_page(page, site.url)
    box = page.get_by_label("Message", exact=True)
    box.evaluate("box => { box.value = 'a\\ud83d b\\ude00 😀'; box.dispatchEvent(new Event('input')); }")
    # The draft is kept unchanged: the other half may follow.
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


def test_address_of_an_unknown_conversation_shows_an_empty_one(page: Page, make_site: MakeSite) -> None:
    site = make_site(["Hi"])
    site.say()
    conversation_id = new_id()
    open_page(page, f"{site.url}#{conversation_id}")
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    nothing = page.get_by_text(
        "No conversation has this address, or it has been deleted. Your message starts a new one."
    )
    expect(nothing).to_be_visible()
    say(page, "Anybody here?")
    expect(answers(page)).to_have_text(["Hi"])
    expect(nothing).to_be_hidden()
    assert id_of(page) == conversation_id
    page.goto(f"{site.url}#<img src=x onerror=alert(1)>")
    expect(page.get_by_role("heading", name="What is on your mind?")).to_be_visible()
    expect(nothing).to_be_hidden()
    assert page.url == site.url


def test_new_conversation_in_another_tab_or_many_times(context: BrowserContext, make_site: MakeSite) -> None:
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


def test_suggestion_is_added_to_the_draft(page: Page, make_site: MakeSite) -> None:
    open_page(page, make_site().url)
    page.keyboard.type("Please:")
    page.get_by_role("button", name="Show me a short program with comments").click()
    page.reload()
    expect(page.get_by_label("Message", exact=True)).to_have_value("Please:\n\nShow me a short program with comments")


def test_title_cannot_reorder_the_sentence_around_it(page: Page, make_site: MakeSite) -> None:
    site = make_site(["Hi"])
    site.say()
    title = "Free \u202e gnp.exe"
    site.run(site.app.client.say(title))
    open_page(page, site.url)
    page.get_by_role("link", name="gnp.exe").hover()
    page.get_by_role("button", name=re.compile("^Delete.*gnp.exe")).click()
    expect(page.locator("#delete-text bdi")).to_have_text(title)
    expect(page.locator("#delete-text")).to_have_text(f"“{title}” and all its messages will be deleted permanently.")


def test_conversation_without_text_is_named_in_the_list(page: Page, make_site: MakeSite) -> None:
    site = make_site(["Hi"])
    site.app.database.conversations.insert_one({"messages": None})
    open_page(page, site.url)
    expect(page.get_by_role("link", name="Untitled")).to_be_visible()
