"""The examples and tables of docs/protocol.md, and the metrics of docs/operating.md, match the server."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from chatserver.errors import ChatError, ReplyCode, SourceError
from chatserver.handlers.openapi import problem_codes
from chatserver.schemas import load
from chatserver.sources import Prompt
from tests.apps import App, MakeApp, Script
from tests.processes import ROOT

PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()
_TOKEN = re.compile(r"([0-9a-f]{32}|[0-9a-f]{24}|\d{4}-\d\d-\d\dT[\d:.]+Z)")
"""Ids of requests, ids of conversations and messages, times: they differ from run to run."""
_ANY = "…"


@dataclass
class Exchange:
    """One block of the page: a request, its response, or both."""

    request: list[str]
    response: list[str]

    @classmethod
    def parse(cls, block: str) -> "Exchange":
        lines: dict[str, list[str]] = {">": [], "<": []}
        for line in block.splitlines():
            if line:
                lines[line[0]].append(line[2:])
        return cls(lines[">"], lines["<"])


@dataclass
class Bindings:
    """The ids and times of the page, and their counterparts in this run."""

    actual: dict[str, str] = field(default_factory=dict)

    def in_request(self, text: str) -> str:
        """Return a request's text with the ids of this run; an unknown id is the client's choice."""
        return _TOKEN.sub(lambda token: self.actual.setdefault(token[0], token[0]), text)

    def match(self, shown: str, received: str) -> None:
        """Assert that a text is the one shown, except for ids and times, which must be used consistently."""
        pattern, names = "", []
        for number, part in enumerate(_TOKEN.split(shown)):
            if number % 2:
                pattern += _TOKEN.pattern
                names.append(part)
            else:
                pattern += re.escape(part).replace(_ANY, '[^"]+')
        found = re.fullmatch(pattern, received)
        assert found, f"expected:\n{shown}\nreceived:\n{received}"
        for name, value in zip(names, found.groups(), strict=True):
            assert self.actual.setdefault(name, value) == value, f"{name} is not used consistently in\n{received}"

    def check_ids_are_distinct(self) -> None:
        ids = [value for name, value in self.actual.items() if re.fullmatch("[0-9a-f]+", name)]
        assert len(ids) == len(set(ids))


class Scripts:
    """A source whose replies follow one script each."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts = iter(scripts)

    def reply(self, prompt: Prompt) -> AsyncIterator[str]:
        return next(self._scripts).reply(prompt)

    async def close(self) -> None:
        pass


def _exchanges() -> Iterator[Exchange]:
    for block in re.findall(r"^```http\n(.*?)^```", PROTOCOL, re.M | re.DOTALL):
        yield Exchange.parse(block)


def _split(lines: list[str]) -> tuple[str, dict[str, str], list[str]]:
    """Return the first line, the headers and the lines of the body."""
    end = lines.index("") if "" in lines else len(lines)
    return lines[0], dict(line.split(": ", 1) for line in lines[1:end]), lines[end + 1 :]


async def _send(app: App, lines: list[str], bindings: Bindings) -> httpx.Response:
    first, headers, body = _split([bindings.in_request(line) for line in lines])
    method, path = first.split(" ")
    return await app.client.http.request(method, path, headers=headers, content="\n".join(body))


def _check(lines: list[str], response: httpx.Response, bindings: Bindings) -> None:
    status, headers, body = _split(lines)
    assert str(response.status_code) == status, response.text
    for name, value in headers.items():
        assert response.headers[name] == value
    if response.headers.get("Content-Type", "").startswith("text/event-stream"):
        bindings.match("\n".join([*body, ""]), response.text)
    else:
        bindings.match(_one_line("\n".join(body)), _one_line(response.text))


def _one_line(text: str) -> str:
    return json.dumps(json.loads(text), ensure_ascii=False) if text else ""


@pytest.mark.gen_test
async def test_examples_of_the_protocol_are_what_the_server_does(make_app: MakeApp) -> None:
    unavailable = SourceError("source_unavailable", "The model provider cannot be reached. Try again later.")
    never = Script("Once", " upon a time", " there was", gate=asyncio.Semaphore(2))
    colours = Script("Blue."), Script("A cat."), Script("Red.")
    app = await make_app(source=Scripts(Script("Good", " morning", "!"), *colours, Script("Once", unavailable), never))
    bindings = Bindings()
    waiting: asyncio.Task[httpx.Response] | None = None
    count = 0

    for exchange in _exchanges():
        count += 1
        if exchange.request and not exchange.response:
            # A stream that is open while the next requests are sent.
            waiting = asyncio.create_task(_send(app, exchange.request, bindings))
            await app.until(lambda: app.subscribers == 1)
        elif exchange.request:
            if waiting is None:
                await app.until(lambda: app.replies.running or not app.hub.conversations)
            _check(exchange.response, await _send(app, exchange.request, bindings), bindings)
        else:
            assert waiting is not None
            _check(exchange.response, await waiting, bindings)
            waiting = None

    assert count == len(re.findall("^```http$", PROTOCOL, re.M)) > 15
    assert waiting is None
    bindings.check_ids_are_distinct()


def _rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its head."""
    section = re.split(rf"^#+ {heading}$", PROTOCOL, flags=re.M)[1]
    table = re.search(r"^\|.*\n\| --- .*\n((?:\|.*\n)+)", section, re.M)
    assert table is not None
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table[1].splitlines()]


def test_table_of_problems_is_complete() -> None:
    documented = {code.strip("`"): int(status) for code, status, _ in _rows("A request that is refused")}
    assert documented == {code: status for code, (status, _) in problem_codes().items()}
    for kind in ChatError.__subclasses__():
        assert documented[kind.code] == kind.status


def test_table_of_the_codes_of_replies_is_complete() -> None:
    assert [code.strip("`") for code, _ in _rows("Codes of replies")] == list(ReplyCode)


def test_table_of_events_is_complete() -> None:
    rows = {event.strip("`"): data.strip("`") for event, data, _ in _rows("Events")}
    schemas = load("events")["properties"]
    assert set(rows) == set(schemas)
    for name, data in rows.items():
        assert re.findall(r'"(\w+)"', data) == list(schemas[name]["properties"])


def test_table_of_statuses_is_complete() -> None:
    statuses = load("message")["properties"]["status"]["enum"]
    assert {status.strip("`") for status, *_ in _rows("Statuses of a message")} == set(statuses)


@pytest.mark.gen_test
async def test_every_metric_is_documented(app: App) -> None:
    section = (ROOT / "docs" / "operating.md").read_text().partition("## Health and metrics")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)` \|", section, re.M)
    text = (await app.client.http.get("/metrics")).text
    kinds = dict(re.findall(r"^# TYPE (chatserver_\w+) (\w+)$", text, re.M))
    assert sorted(documented) == sorted(kinds)
