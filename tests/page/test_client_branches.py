"""How `client.js` follows the events `head` and `title`, with streams and histories that the tests make up."""

import json
import re
from typing import Any

import pytest
from playwright.sync_api import Page, Route

from tests.page.steps import MakeSite

pytestmark = pytest.mark.needs("chromium")

CONVERSATION = "c" * 24
U1, A1, U2, A2, A3, U3 = (f"{number}" * 24 for number in range(1, 7))
START = """async ([history]) => {
  const { Api, Conversation } = await import("./client.js");
  const api = new Api(new URL("..", location.href), { headers: async () => ({}) });
  const conversation = new Conversation(api, CONVERSATION, { fresh: !history });
  Object.assign(window, { conversation, titles: [], first: null });
  conversation.addEventListener("change", () => {
    first ??= conversation.messages[0];
    if (titles.at(-1) !== conversation.title) titles.push(conversation.title);
  });
  conversation.open();
}""".replace("CONVERSATION", json.dumps(CONVERSATION))
PREAMBLE = 'retry: 1000\n: chatserver\nevent: stream\nid: {}\n\nevent: ping\ndata: {{"everyS":15}}\n\n'


def frame(event: str, position: str = "", /, **data: Any) -> str:
    tail = f"id: {position}\n" if position else ""
    return f"event: {event}\ndata: {json.dumps(data)}\n{tail}\n"


def head(message_id: str | None) -> str:
    return frame("head", messageId=message_id)


def said_by_user(message_id: str, text: str) -> str:
    return frame("input", f"{message_id}-done", messageId=message_id, text=text, createdAt="2026-11-27T00:00:00.000Z")


def token(position: str, text: str) -> str:
    return frame("token", position, text=text)


def done(message_id: str) -> str:
    return frame("done", f"{message_id}-done", messageId=message_id, status="complete")


def turn(question: str, answer: str) -> str:
    return said_by_user(question, f"text of {question[0]}") + token(f"{answer}-1", "x") + done(answer)


def message(message_id: str, **more: Any) -> dict[str, Any]:
    role = "user" if message_id in (U1, U2, U3) else "assistant"
    return {"id": message_id, "role": role, "content": "x", "status": "complete", **more}


END = frame("title", title="end")
"""The end of the last stream of a test."""


class Server:
    """Answers the requests of a page: each stream with the next body, each history with the next one."""

    def __init__(self, page: Page, *streams: str, histories: list[list[dict[str, Any]]] | None = None) -> None:
        self.asked: list[str] = []
        self._streams = list(streams)
        self._histories = histories or []
        page.route(re.compile("/chat"), self._answer)

    def _answer(self, route: Route) -> None:
        path = route.request.url.partition(CONVERSATION)[2]
        if not path.startswith("?"):
            self.asked.append("history")
            route.fulfill(json={"messages": self._histories.pop(0), "lastEventId": "from-history"})
        elif self._streams:
            position = path.partition("=")[2]
            self.asked.append(position)
            route.fulfill(body=PREAMBLE.format(position) + self._streams.pop(0), content_type="text/event-stream")
        else:
            route.abort()


def follow(page: Page, url: str, *, history: bool = False) -> list[Any]:
    """Let a client follow a conversation to the end of the last stream; return the ids and siblings that it has."""
    page.goto(f"{url}web/favicon.svg")
    page.evaluate(START, [history])
    page.wait_for_function("() => conversation.title === 'end'")
    page.evaluate("conversation.pause()")
    messages = json.loads(page.evaluate("JSON.stringify(conversation.messages)"))
    return [(each["id"], each.get("siblings")) for each in messages]


def test_regenerated_reply_takes_the_place_of_the_first_one(page: Page, make_site: MakeSite) -> None:
    again = head(U1) + token(f"{A2}-1", "y") + done(A2) + head(U1) + token(f"{A3}-1", "z") + done(A3)
    server = Server(page, turn(U1, A1) + again + END)

    assert follow(page, make_site().url) == [(U1, None), (A3, [A1, A2, A3])]
    assert server.asked == [f"{CONVERSATION}-0"]


def test_reply_that_fails_without_text_is_another_version(page: Page, make_site: MakeSite) -> None:
    failed = frame("error", f"{A2}-done", code="source_failed", message="It failed.", messageId=A2)
    Server(page, turn(U1, A1) + head(U1) + failed + END)

    assert follow(page, make_site().url) == [(U1, None), (A2, [A1, A2])]


def test_edited_first_message_takes_the_place_of_all(page: Page, make_site: MakeSite) -> None:
    Server(page, turn(U1, A1) + turn(U2, A2) + head(None) + turn(U3, A3) + END)

    assert follow(page, make_site().url) == [(U3, [U1, U3]), (A3, None)]


def test_edited_message_follows_the_same_reply(page: Page, make_site: MakeSite) -> None:
    Server(page, turn(U1, A1) + turn(U2, A2) + head(A1) + turn(U3, A3) + END)

    assert follow(page, make_site().url) == [(U1, None), (A1, None), (U3, [U2, U3]), (A3, None)]


def test_branch_that_is_not_held_is_fetched_and_known_messages_keep_their_objects(
    page: Page, make_site: MakeSite
) -> None:
    branch = [message(U1), message(A2, siblings=[A1, A2]), message(U3), message(A3)]
    server = Server(page, turn(U1, A1) + head(A3), head(A3) + END, histories=[branch])
    page.goto(f"{make_site().url}web/favicon.svg")
    page.evaluate(START, [False])
    page.wait_for_function("() => conversation.title === 'end'")

    assert [each["id"] for each in page.evaluate("conversation.messages")] == [U1, A2, U3, A3]
    assert page.evaluate("conversation.messages[0] === first")
    assert server.asked == [f"{CONVERSATION}-0", "history", "from-history"]


def test_history_that_lacks_the_branch_is_fetched_once(page: Page, make_site: MakeSite) -> None:
    stale = [message(U1), message(A1)]
    server = Server(page, turn(U1, A1) + head(A3), head(A3), head(A3) + END, histories=[stale])

    assert follow(page, make_site().url) == [(U1, None), (A1, None)]
    assert server.asked == [f"{CONVERSATION}-0", "history", "from-history", "from-history"]


def test_disconnect_between_head_and_the_new_reply_loses_no_version(page: Page, make_site: MakeSite) -> None:
    server = Server(page, turn(U1, A1) + head(U1), head(U1) + token(f"{A2}-1", "y") + done(A2) + END)

    assert follow(page, make_site().url) == [(U1, None), (A2, [A1, A2])]
    assert server.asked == [f"{CONVERSATION}-0", f"{A1}-done"]


def test_disconnect_inside_a_new_reply_names_it(page: Page, make_site: MakeSite) -> None:
    first = turn(U1, A1) + head(U1) + token(f"{A2}-1", "y")
    server = Server(page, first, head(A2) + token(f"{A2}-2", "z") + done(A2) + END)

    assert follow(page, make_site().url) == [(U1, None), (A2, [A1, A2])]
    assert page.evaluate("conversation.messages[1].content") == "yz"
    assert server.asked == [f"{CONVERSATION}-0", f"{A2}-1"]


def test_reply_without_text_stays_when_the_stream_begins_again_at_its_question(page: Page, make_site: MakeSite) -> None:
    first = turn(U1, A1) + head(None) + said_by_user(U2, "two")
    Server(page, first, head(U2) + token(f"{A2}-1", "y") + done(A2) + END)

    assert follow(page, make_site().url) == [(U2, [U1, U2]), (A2, None)]


def test_running_reply_of_the_history_keeps_its_versions(page: Page, make_site: MakeSite) -> None:
    running = message(A2, status="streaming", siblings=[A1, A2])
    Server(page, head(A2) + token(f"{A2}-2", "y") + done(A2) + END, histories=[[message(U1), running]])

    assert follow(page, make_site().url, history=True) == [(U1, None), (A2, [A1, A2])]
    assert page.evaluate("conversation.messages[1].content") == "xy"


def test_stream_without_a_title_means_that_the_chosen_one_was_removed(page: Page, make_site: MakeSite) -> None:
    site = make_site()
    Server(page, frame("title", title="One") + turn(U1, A1), turn(U2, A2) + END)
    page.goto(f"{site.url}web/favicon.svg")
    page.evaluate(START, [False])

    page.wait_for_function("() => conversation.title === 'end'")

    assert page.evaluate("titles")[-3:] == ["One", None, "end"]
