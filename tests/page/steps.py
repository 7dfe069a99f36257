"""Steps shared by the tests of the page."""

import re
from collections.abc import Callable

from playwright.sync_api import Locator, Page, Route, expect

from tests.browser import Site
from tests.processes import ROOT

MakeSite = Callable[..., Site]
STREAMS = "**/chat/stream/**"
"""The addresses of streams, as a pattern of Playwright."""
NODE_MODULES = ROOT / "tests" / "node" / "node_modules"
AXE = NODE_MODULES / "axe-core" / "axe.min.js"


def words(count: int) -> list[str | BaseException]:
    """Return the tokens of an answer of one paragraph."""
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
    """Return the id in the address bar, once a message has been sent."""
    page.wait_for_url(re.compile("#[0-9a-f]{24}$"))
    return page.url.partition("#")[2]


def texts(locator: Locator) -> list[str]:
    return [text.strip() for text in locator.all_text_contents()]


def expect_stored(page: Page, site: Site) -> None:
    """Check that the page shows exactly the stored messages."""
    stored = site.history(id_of(page))
    expect(said_by_user(page)).to_have_text([each["content"] for each in stored if each["role"] == "user"])
    assert texts(answers(page)) == [each["content"] for each in stored if each["role"] == "assistant"]


def streams_of(page: Page) -> list[str]:
    """Return a list that collects the URL of each stream that the page opens from now on."""
    urls: list[str] = []
    page.on("request", lambda request: urls.append(request.url) if "/chat/stream/" in request.url else None)
    return urls


def break_streams(page: Page, site: Site) -> None:
    """End the open stream, and answer 503 to every further one, until `page.unroute(STREAMS)`."""
    page.route(STREAMS, lambda route: route.fulfill(status=503))
    site.run(site.app.end_streams())
    expect(page.locator("#state")).to_have_text("Reconnecting")


def lose_answer(page: Page, address: str, *, taken: bool) -> list[str]:
    """Lose the answer to the next post to an address, after the server carried it out or before.

    :return: a list that collects the idempotency keys of all posts to the address
    """
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

    page.route(address, lose)
    return keys
