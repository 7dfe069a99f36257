"""The page while the server or the network is unavailable."""

import re
from collections.abc import Callable

import httpx
import pytest
from playwright.sync_api import BrowserContext, Page, Route, expect

from tests.browser import Site
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
    streams_of,
    words,
)
from tests.processes import Server
from tests.proxy import CuttingProxy

pytestmark = pytest.mark.needs("chromium")


def test_server_killed_and_restarted_in_mid_answer(page: Page, make_server: Callable[..., Server]) -> None:
    server = make_server(SIMULATED_TOKENS=150, SIMULATED_TOKEN_DELAY_MS=20, CHECKPOINT_MS=300, LEASE_MS=900).start()
    open_page(page, server.url)
    say(page, "Hold the line")
    expect(answers(page)).to_contain_text("Hold the line")
    server.kill()
    expect(page.locator("#state")).to_have_text("Reconnecting")
    page.get_by_label("Message", exact=True).fill("Still there?")
    server.start()
    expect(page.locator("#state")).to_have_text("Live")
    expect(page.locator(".ending")).to_contain_text("The answer was interrupted.")
    stored = httpx.get(f"{server.url}/chat/{id_of(page)}").json()["messages"]
    assert stored[1]["status"] == "interrupted"
    assert page.get_by_role("button", name="Copy answer").get_attribute("data-text") == stored[1]["content"]
    expect(page.get_by_label("Message", exact=True)).to_have_value("Still there?")

    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect_idle(page)
    stored = httpx.get(f"{server.url}/chat/{id_of(page)}").json()["messages"]
    assert [each["status"] for each in stored] == ["complete", "complete"]
    shown = page.get_by_role("button", name="Copy answer")
    expect(shown).to_have_count(1)
    assert shown.get_attribute("data-text") == stored[1]["content"]


def test_offline_and_back(context: BrowserContext, make_site: MakeSite) -> None:
    site = make_site(words(6), words(1))
    page = open_page(context.new_page(), site.url)
    say(page, "Count")
    site.say(2)
    expect(answers(page)).to_have_text([said(2)])
    context.set_offline(True)
    expect(page.locator("#state")).to_have_text("Offline")
    site.say(4)
    conversation_id = id_of(page)
    site.until(lambda: not site.app.replies.running)
    assert answers(page).all_text_contents() == [said(2)]
    context.set_offline(False)
    expect(page.locator("#state")).to_have_text("Live")
    expect(answers(page)).to_have_text([said(6)])
    expect_idle(page)

    context.set_offline(True)
    expect(page.locator("#state")).to_have_text("Offline")
    say(page, "Lost?")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached. Your text is kept")
    expect(page.get_by_label("Message", exact=True)).to_have_value("Lost?")
    context.set_offline(False)
    expect(page.locator("#state")).to_have_text("Live")
    kept = "Your text is kept. Sending it again will not post it twice."
    expect(page.get_by_role("alert")).to_have_text(kept)
    page.get_by_label("Message", exact=True).press("Enter")
    expect(said_by_user(page)).to_have_text(["Count", "Lost?"])
    expect(page.get_by_role("alert")).to_be_hidden()
    site.say()
    expect(answers(page)).to_have_text([said(6), said(1)])
    assert [each["content"] for each in site.history(conversation_id)] == ["Count", said(6), "Lost?", said(1)]


def test_list_appears_as_soon_as_the_server_can_be_reached(page: Page, make_site: MakeSite) -> None:
    site = make_site([])
    site.run(site.app.client.say("Hello"))
    is_down = True
    page.route(
        re.compile("/chat[?/]"), lambda route: route.fulfill(status=503, body="") if is_down else route.continue_()
    )
    page.goto(site.url)
    expect(page.locator("#state")).to_have_text("Reconnecting")
    expect(page.locator("#no-conversations")).to_be_hidden()
    is_down = False
    expect(page.locator("#conversations a")).to_have_text(["Hello"])


def test_state_distinguishes_offline_from_reconnecting_at_any_time(
    context: BrowserContext, make_site: MakeSite
) -> None:
    site = make_site()
    page = open_page(context.new_page(), site.url)
    page.route("**/chat/stream/**", lambda route: route.fulfill(status=503))
    site.run(site.app.end_streams())
    state = page.locator("#state")
    expect(state).to_have_text("Reconnecting")
    context.set_offline(True)
    expect(state).to_have_text("Offline")
    context.set_offline(False)
    expect(state).to_have_text("Reconnecting")


def test_reconnects_to_a_dead_port_become_less_frequent(page: Page, make_site: MakeSite) -> None:
    """A native EventSource would retry every second forever."""
    site = make_site()
    page.add_init_script(
        """window.made = 0;
        window.EventSource = class extends EventSource { constructor(url) { super(url); window.made += 1; } };"""
    )
    open_page(page, site.url)
    page.route("**/chat/stream/**", lambda route: route.abort("connectionrefused"))
    site.run(site.app.end_streams())
    page.wait_for_function("() => made >= 4")
    page.unroute("**/chat/stream/**")
    expect(page.locator("#state")).to_have_text("Live")


def test_browser_without_storage_and_channels_can_chat(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(2))
    page.add_init_script(
        """delete window.BroadcastChannel;
        const refuse = () => { throw new DOMException("no", "SecurityError"); };
        Object.defineProperty(window, "sessionStorage", { get: refuse });"""
    )
    open_page(page, site.url)
    say(page, "Hello")
    site.say(2)
    expect(answers(page)).to_have_text([said(2)])
    expect(page.get_by_label("Message", exact=True)).to_have_value("")
    expect(page.locator("#conversations a")).to_have_text(["Hello"])


def test_stream_refused_by_a_proxy_resumes_from_its_position(page: Page, make_site: MakeSite) -> None:
    """A native EventSource closes permanently after any status but 200."""
    site = make_site(words(6))
    open_page(page, site.url)
    say(page, "Count")
    site.say(2)
    expect(answers(page)).to_have_text([said(2)])
    refusals = iter([503, 502, 503])
    asked: list[str] = []

    def refuse(route: Route) -> None:
        asked.append(route.request.url)
        status = next(refusals, None)
        if status is None:
            route.continue_()
        else:
            route.fulfill(status=status, body="not now")

    page.route("**/chat/stream/**", refuse)
    site.run(site.app.end_streams())
    site.say(2)
    expect(page.locator("#state")).to_have_text("Reconnecting")
    site.say(2)
    expect(page.locator("#state")).to_have_text("Live")
    expect(answers(page)).to_have_text([said(6)])
    expect_idle(page)
    assert len(asked) == 4
    assert all(re.search(r"lastEventId=[0-9a-f]{24}-", url) for url in asked)
    expect_stored(page, site)


WATCH_STATES = """() => {
  window.states = [];
  const state = document.querySelector("#state");
  new MutationObserver(() => window.states.push(state.textContent)).observe(state, { childList: true });
}"""
"""Records the states that the page shows from now on, in `states`."""


def test_stream_that_died_without_closing_is_reopened(
    page: Page, make_site: MakeSite, make_proxy: Callable[[Site], CuttingProxy]
) -> None:
    site = make_site(words(2), words(3), keepalive_s=1.0)
    proxy = make_proxy(site)
    open_page(page, f"http://127.0.0.1:{proxy.port}/")
    say(page, "First")
    site.say(2)
    expect(answers(page)).to_have_text([said(2)])
    expect_idle(page)
    page.evaluate(WATCH_STATES)

    assert proxy.mute_streams() == 1
    say(page, "Second")
    site.say(3)

    expect(answers(page)).to_have_text([said(2), said(3)])
    expect_idle(page)
    assert page.evaluate("states") == ["Reconnecting", "Live"]
    assert proxy.streams == 2
    expect_stored(page, site)


def test_silence_is_not_judged_by_the_clock_of_a_computer_that_slept(page: Page, make_site: MakeSite) -> None:
    """Its timers run late, and the data that arrived during the sleep has not been read yet."""
    site = make_site(words(1), keepalive_s=60.0)
    page.clock.install()
    streams = streams_of(page)
    open_page(page, site.url)

    page.clock.fast_forward("08:00:00")
    page.clock.fast_forward("08:00:00")

    say(page, "Good morning")
    site.say()
    expect(answers(page)).to_have_text([said(1)])
    expect(page.locator("#state")).to_have_text("Live")
    expect_idle(page)  # the end of the reply has arrived, and with it its position
    assert len(streams) == 1
    # The watchdog still runs: it waits two and a half intervals of the server's 60 s.
    for _ in range(4):
        page.clock.fast_forward(30_000)
    assert len(streams) == 1
    page.clock.fast_forward(30_000)
    expect(page.locator("#state")).to_have_text("Reconnecting")
    page.clock.fast_forward(500)
    expect(page.locator("#state")).to_have_text("Live")
    assert len(streams) == 2
    assert "lastEventId=" in streams[1] and streams[1].endswith("-done")


def test_stream_of_a_server_without_pings_is_left_alone(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(1))
    page.clock.install()
    streams = streams_of(page)
    page.add_init_script("""
      const listen = EventSource.prototype.addEventListener;
      EventSource.prototype.addEventListener = function (name, ...rest) {
        if (name !== "ping") listen.call(this, name, ...rest);
      };
    """)
    open_page(page, site.url)

    for _ in range(20):
        page.clock.fast_forward(7_500)

    say(page, "Still there?")
    site.say()
    expect(answers(page)).to_have_text([said(1)])
    assert len(streams) == 1


def test_stream_request_without_an_answer_is_repeated(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(1))
    page.clock.install()
    held: list[Route] = []
    page.route("**/chat/stream/**", lambda route: held.append(route) if not held else route.continue_())
    page.goto(site.url)
    expect(page.locator("#state")).to_have_text("Connecting")

    for _ in range(5):
        page.clock.fast_forward(7_500)
    expect(page.locator("#state")).to_have_text("Reconnecting")
    page.clock.fast_forward(500)

    expect(page.locator("#state")).to_have_text("Live")
    held[0].abort()


def test_turn_accepted_while_the_stream_is_down_is_shown_once_and_in_order(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(1), words(2), words(3))
    site.say(3)
    open_page(page, site.url)
    say(page, "First")
    expect(answers(page)).to_have_text([said(1)])
    expect_idle(page)
    conversation_id = id_of(page)
    is_down = True
    page.route("**/chat/stream/**", lambda route: route.fulfill(status=503) if is_down else route.continue_())
    site.run(site.app.end_streams())
    expect(page.locator("#state")).to_have_text("Reconnecting")
    site.run(site.app.client.say("Second, by somebody else", conversation_id))
    site.until(lambda: not site.app.replies.running)
    say(page, "Third")
    # The page knows that it was accepted, but not yet the message before it.
    expect(said_by_user(page)).to_have_text(["First", "Third"])
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    site.say(3)
    site.until(lambda: not site.app.replies.running)
    is_down = False
    expect(answers(page)).to_have_text([said(1), said(2), said(3)])
    expect(said_by_user(page)).to_have_text(["First", "Second, by somebody else", "Third"])
    expect_idle(page)
    expect_stored(page, site)


def test_history_that_is_refused_is_fetched_again(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(2))
    site.say(2)
    conversation_id = site.run(site.app.client.say("Hello"))["conversationId"]
    site.until(lambda: not site.app.replies.running)
    refusals = iter([503, 500])

    def refuse(route: Route) -> None:
        status = next(refusals, None)
        if status is None:
            route.continue_()
        else:
            route.fulfill(status=status, headers={"Retry-After": "1"}, body="not now")

    page.route(f"**/chat/{conversation_id}", refuse)
    page.goto(f"{site.url}#{conversation_id}")
    expect(page.locator("#state")).to_have_text("Reconnecting")
    expect(answers(page)).to_have_text([said(2)])
    expect(page.locator("#state")).to_have_text("Live")
    expect(said_by_user(page)).to_have_text(["Hello"])


def test_conversation_opened_while_the_server_is_down_is_announced(
    page: Page, make_server: Callable[..., Server]
) -> None:
    server = make_server(SIMULATED_TOKENS=5).start()
    open_page(page, server.url)
    say(page, "Hello")
    expect(page.get_by_role("button", name="Copy answer")).to_have_count(1)
    page.get_by_role("link", name="New conversation").click()
    assert server.stop() == 0
    page.get_by_role("link", name="Hello").click()
    awaited = page.get_by_text("This conversation will appear as soon as the server can be reached.")
    expect(awaited).to_be_visible()
    server.start()
    expect(said_by_user(page)).to_have_text(["Hello"])
    expect(awaited).to_be_hidden()


def test_stream_from_a_dead_port_is_reopened(page: Page, make_server: Callable[..., Server]) -> None:
    server = make_server(SIMULATED_TOKENS=5).start()
    open_page(page, server.url)
    say(page, "Hello")
    expect(page.get_by_role("button", name="Copy answer")).to_have_count(1)
    assert server.stop() == 0
    expect(page.locator("#state")).to_have_text("Reconnecting")
    say(page, "Nobody home")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    server.start()
    expect(page.locator("#state")).to_have_text("Live")
    page.get_by_label("Message", exact=True).press("Enter")
    expect(said_by_user(page)).to_have_text(["Hello", "Nobody home"])
    expect(page.get_by_role("button", name="Copy answer")).to_have_count(2)
    messages = httpx.get(f"{server.url}/chat/{id_of(page)}").json()["messages"]
    assert [each["content"] for each in messages if each["role"] == "user"] == ["Hello", "Nobody home"]
