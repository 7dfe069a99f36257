"""`client.js` with a function for headers, in a page that has nothing else."""

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, Request

from tests.browser import Site
from tests.page.steps import MakeSite, said, words
from tests.page.users import problem
from tests.proxy import CuttingProxy

pytestmark = pytest.mark.needs("chromium")

SIGNED_OUT = problem(401, "token_expired", loginUrl="/login")
NUMBERED = "(() => { let count = 0; return async () => ({ Authorization: `Bearer t${++count}` }); })()"
"""Headers with a new token for each request."""
START = """async () => {
  const { Api, ApiError, Conversation, newId } = await import("./client.js");
  const api = new Api(new URL("..", location.href), { headers: HEADERS });
  const states = [];
  const conversation = new Conversation(api, newId(), { fresh: true });
  conversation.addEventListener("state", () => states.push(conversation.state));
  conversation.open();
  Object.assign(window, { conversation, states });
}"""


def start(page: Page, url: str, headers: str = NUMBERED) -> list[Request]:
    """Open a conversation on a page without scripts; return a list that collects the requests to the API.

    :param headers: JavaScript for the function that makes headers
    """
    page.goto(f"{url}web/favicon.svg")
    requests: list[Request] = []
    page.on("request", lambda request: requests.append(request) if re.search("/chat|/me", request.url) else None)
    page.evaluate(START.replace("HEADERS", headers))
    return requests


def wait_for_state(page: Page, state: str) -> None:
    page.wait_for_function("state => conversation.state === state", arg=state)


def wait_for_answer(page: Page, text: str) -> None:
    page.wait_for_function("text => conversation.messages.at(-1)?.content === text", arg=text)


def test_each_request_has_headers_of_its_own_and_a_stream_resumes(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(6))
    requests = start(page, site.url)
    wait_for_state(page, "live")
    page.evaluate("conversation.say('Count')")
    site.say(2)
    wait_for_answer(page, said(2))

    site.run(site.app.end_streams())
    site.say(4)
    wait_for_answer(page, said(6))

    page.wait_for_function("!conversation.busy")
    assert [request.headers.get("authorization") for request in requests] == ["Bearer t1", "Bearer t2", "Bearer t3"]
    assert requests[2].url.endswith(f"-{len(said(2))}")
    assert page.evaluate("states") == ["connecting", "live", "reconnecting", "live"]


def test_stream_that_died_without_closing_is_reopened(
    page: Page, make_site: MakeSite, make_proxy: Callable[[Site], CuttingProxy]
) -> None:
    site = make_site(words(3), keepalive_s=1.0)
    proxy = make_proxy(site)
    start(page, f"http://127.0.0.1:{proxy.port}/")
    wait_for_state(page, "live")

    assert proxy.mute_streams() == 1
    page.evaluate("conversation.say('Count')")
    site.say(3)

    wait_for_answer(page, said(3))
    assert page.evaluate("states") == ["connecting", "live", "reconnecting", "live"]
    assert proxy.streams == 2


def test_refusal_in_mid_stream_signs_out_until_the_conversation_is_opened(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(4))
    page.clock.install()
    requests = start(page, site.url)
    wait_for_state(page, "live")
    page.evaluate("conversation.say('Count')")
    site.say(2)
    wait_for_answer(page, said(2))
    page.route("**/chat/stream/**", lambda route: route.fulfill(**SIGNED_OUT))
    page.route("**/me", lambda route: route.fulfill(**SIGNED_OUT))
    site.run(site.app.end_streams())
    page.wait_for_function("states.includes('reconnecting')")
    page.clock.fast_forward(1000)
    wait_for_state(page, "signedOut")
    assert page.evaluate("conversation.loginUrl") == "/login"
    n_requests = len(requests)

    page.clock.fast_forward("02:00:00")
    page.evaluate("dispatchEvent(new Event('online'))")
    site.say(2)
    site.until(lambda: not site.app.replies.running)
    assert len(requests) == n_requests

    page.unroute("**/chat/stream/**")
    page.evaluate("conversation.open()")
    wait_for_answer(page, said(4))
    page.wait_for_function("!conversation.busy")


def test_post_that_is_accepted_again_opens_the_conversation(page: Page, make_site: MakeSite) -> None:
    site = make_site(words(2))
    page.route(re.compile("/chat|/me"), lambda route: route.fulfill(**SIGNED_OUT))
    start(page, site.url)
    wait_for_state(page, "signedOut")
    say = "conversation.say('Count').catch((error) => [error.isUnauthenticated, error.code])"
    assert page.evaluate(say) == [True, "token_expired"]
    assert page.evaluate("conversation.state") == "signedOut"
    assert page.evaluate("conversation.unsent.text") == "Count"
    page.unroute_all()

    page.evaluate("conversation.say('Count')")

    site.say(2)
    wait_for_answer(page, said(2))
    assert page.evaluate("conversation.unsent") is None


def test_refused_post_signs_out_although_the_stream_is_open(page: Page, make_site: MakeSite) -> None:
    site = make_site([])
    start(page, site.url)
    wait_for_state(page, "live")
    page.route(re.compile("/chat$|/me"), lambda route: route.fulfill(**SIGNED_OUT))

    page.evaluate("conversation.say('Count').catch(() => {})")

    wait_for_state(page, "signedOut")
    site.until(lambda: site.open_streams() == 0)


def test_refused_post_to_a_paused_conversation_opens_nothing(page: Page, make_site: MakeSite) -> None:
    site = make_site([])
    requests = start(page, site.url)
    wait_for_state(page, "live")
    page.evaluate("conversation.pause()")
    page.route(re.compile("/chat$|/me"), lambda route: route.fulfill(**SIGNED_OUT))

    page.evaluate("conversation.say('Count').catch(() => {})")
    page.wait_for_timeout(200)

    assert page.evaluate("conversation.state") == "paused"
    assert len(requests) == 2


def test_event_after_the_one_that_closed_the_stream_is_dropped(page: Page, make_site: MakeSite) -> None:
    site = make_site([])
    requests = start(page, site.url)
    wait_for_state(page, "live")
    token = 'event: token\ndata: {"text":"%s"}\nid: %s\n\n'
    body = token % ("a", "first") + token % ("b", "second")
    page.route("**/chat/stream/**", lambda route: route.fulfill(body=body, content_type="text/event-stream"), times=1)
    page.evaluate("conversation.addEventListener('change', () => conversation.pause())")
    site.run(site.app.end_streams())
    wait_for_state(page, "paused")
    assert page.evaluate("conversation.messages[0].content") == "a"

    page.evaluate("conversation.open()")

    site.until(lambda: len(requests) == 3)
    assert requests[2].url.endswith("lastEventId=first")


def test_refused_stream_of_a_user_who_is_signed_in_is_tried_again(page: Page, make_site: MakeSite) -> None:
    site = make_site([])
    page.route("**/chat/stream/**", lambda route: route.fulfill(**SIGNED_OUT), times=2)
    page.route("**/me", lambda route: route.fulfill(json={"owner": "alice"}))

    start(page, site.url)

    wait_for_state(page, "live")
    assert page.evaluate("states") == ["connecting", "reconnecting", "live"]
    assert page.evaluate("conversation.api.me()") == {"owner": "alice"}


def test_stream_over_a_limit_is_tried_again_after_the_time_that_the_server_asks_for(
    page: Page, make_site: MakeSite
) -> None:
    site = make_site([])
    page.clock.install()
    page.route("**/chat/stream/**", lambda route: route.fulfill(status=429, headers={"Retry-After": "7"}), times=1)
    requests = start(page, site.url)
    wait_for_state(page, "reconnecting")

    page.clock.fast_forward(5_000)
    assert len(requests) == 1
    page.clock.fast_forward(2_000)

    wait_for_state(page, "live")
    # The status is known, so that nobody has to be asked for it.
    assert len(requests) == 2


def test_headers_that_cannot_be_made_count_as_no_answer(page: Page, make_site: MakeSite) -> None:
    site = make_site([])
    failing = "async () => { if (++n < 3) throw new TypeError('Failed to fetch'); return {}; }"
    requests = start(page, site.url, f"(() => {{ let n = 0; return {failing}; }})()")
    wait_for_state(page, "live")
    assert page.evaluate("states") == ["connecting", "reconnecting", "live"]
    assert len(requests) == 1


def test_function_for_headers_can_tell_that_the_user_is_signed_out(page: Page, make_site: MakeSite) -> None:
    site = make_site([])
    requests = start(page, site.url, "async () => { throw new ApiError(401, 'signed_out', 'Sign in.', 0, '/in'); }")
    wait_for_state(page, "signedOut")
    assert page.evaluate("conversation.loginUrl") == "/in"
    assert requests == []


def test_answer_that_is_no_stream_is_tried_again(page: Page, make_site: MakeSite) -> None:
    site = make_site([])
    page.route(
        "**/chat/stream/**", lambda route: route.fulfill(body="<h1>Log in</h1>", content_type="text/html"), times=1
    )
    start(page, site.url)
    wait_for_state(page, "live")
    assert page.evaluate("states") == ["connecting", "reconnecting", "live"]


def test_native_stream_that_is_refused_signs_out_too(page: Page, make_site: MakeSite) -> None:
    """EventSource hides the status, so `/me` tells it."""
    site = make_site([])
    page.clock.install()
    requests = start(page, site.url, "undefined")
    wait_for_state(page, "live")
    page.route(re.compile("/chat/stream/|/me$"), lambda route: route.fulfill(**SIGNED_OUT))

    site.run(site.app.end_streams())

    wait_for_state(page, "signedOut")
    n_requests = len(requests)
    page.clock.fast_forward("02:00:00")
    assert len(requests) == n_requests
    page.unroute_all()
    page.evaluate("conversation.open()")
    wait_for_state(page, "live")
