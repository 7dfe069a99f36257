"""Take screenshots of the chat page, with a private server and database; see `scripts/screenshots`."""

import tempfile
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.browser import FLAGS, TIMEOUT_MS, chromium
from tests.processes import ROOT, Server

IMAGES = ROOT / "docs" / "images"
EARLIER = ("What should I bring to the picnic?", "Which cities were visited most?", "Where are my messages kept?")
QUESTIONS = ("How does a stream survive a reload?", "What makes a chat server reliable?")


def main() -> None:
    """Write light.png (in mid-answer), dark.png and narrow.png."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = Server(Path(folder), {"SIMULATED_TOKEN_DELAY_MS": 15})
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        try:
            server.start()
            _take(browser, server.url)
        finally:
            browser.close()
            server.kill()


def _take(browser: Browser, url: str) -> None:
    page = _open(browser, url, "light", 1200, 800)
    for question in EARLIER:
        _say(page, question)
        _wait(page, 1)
        page.get_by_role("link", name="New conversation").click()
    _say(page, QUESTIONS[0])
    _wait(page, 1)
    _say(page, QUESTIONS[1])
    expect(page.locator("pre").last).to_contain_text("output.append")
    _save(page, "light")
    _wait(page, 2)
    address = page.url
    _save(_open(browser, address, "dark", 1200, 800), "dark")
    _save(_open(browser, address, "light", 390, 780), "narrow")


def _open(browser: Browser, url: str, scheme: str, width: int, height: int) -> Page:
    context = browser.new_context(
        color_scheme="dark" if scheme == "dark" else "light",
        viewport={"width": width, "height": height},
        has_touch=width < 500,
    )
    page = context.new_page()
    page.goto(url)
    expect(page.locator("#state")).to_have_text("Live", timeout=TIMEOUT_MS)
    return page


def _say(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def _wait(page: Page, answers: int) -> None:
    """Wait until `answers` answers are complete."""
    expect(page.get_by_role("button", name="Copy answer")).to_have_count(answers, timeout=TIMEOUT_MS)


def _save(page: Page, name: str) -> None:
    expect(page.locator("#conversations a")).to_have_count(len(EARLIER) + 1)
    page.mouse.move(0, 0)
    page.screenshot(path=IMAGES / f"{name}.png", animations="disabled")


if __name__ == "__main__":
    main()
