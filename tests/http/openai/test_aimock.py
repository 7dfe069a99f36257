"""The OpenAI source against aimock, a second mock server from elsewhere."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from chatserver.sources import openai as source_module
from tests.http.openai.provider import KEY, STORY, ask, fails_loudly, settings, started
from tests.processes import ROOT

AIMOCK = ROOT / "tests/node/node_modules/@copilotkit/aimock/dist/cli.js"


FIXTURES: dict[str, dict[str, Any]] = {
    "plain": {"response": {"content": "Café 😀👩‍🚀 ready"}, "chunkSize": 1},
    "unauthorized": {"response": {"error": {"message": f"no {KEY}", "type": "invalid_request_error"}, "status": 401}},
    "busy": {"response": {"error": {"message": "slow down", "type": "rate_limit_error"}, "status": 429}},
    "broken": {"response": {"error": {"message": "oops", "type": "server_error"}, "status": 500}},
    "cut": {"response": {"content": STORY}, "chunkSize": 10, "latency": 20, "truncateAfterChunks": 3},
    "hang": {"response": {"content": STORY}, "chunkSize": 10, "latency": 20_000},
    "malformed": {"response": {"content": STORY}, "chaos": {"malformedRate": 1}},
    "dropped": {"response": {"content": STORY}, "chaos": {"disconnectRate": 1}},
    "filtered": {"response": {"content": "Well", "finishReason": "content_filter"}},
    "too-long": {"response": {"content": "Well", "finishReason": "length"}},
    "empty": {"response": {"content": ""}},
}


@pytest.fixture(scope="module")
def aimock_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    fixtures = [{"match": {"userMessage": name}, **fixture} for name, fixture in FIXTURES.items()]
    file = tmp_path_factory.mktemp("aimock") / "fixtures.json"
    file.write_text(json.dumps({"fixtures": fixtures}))
    command = ["node", str(AIMOCK), "--port", "0", "--fixtures", str(file)]
    yield from started(command, r"listening on (http://127\.0\.0\.1:\d+)", AIMOCK_API_KEYS=KEY)


@fails_loudly
@pytest.mark.needs("node")
@pytest.mark.parametrize(
    ("question", "text", "code"),
    [
        ("plain", "Café 😀👩‍🚀 ready", None),  # in chunks of one UTF-16 unit: each emoji comes in halves
        ("unauthorized", "", "source_authentication"),
        ("busy", "", "source_rate_limited"),
        ("broken", "", "source_unavailable"),
        ("malformed", "", "source_invalid"),
        ("dropped", "", "source_unavailable"),
        ("filtered", "Well", "source_refused"),
        ("too-long", "Well", "source_length"),
        ("empty", "", None),
    ],
)
def test_against_aimock(
    aimock_url: str, monkeypatch: pytest.MonkeyPatch, question: str, text: str, code: str | None
) -> None:
    monkeypatch.setattr(source_module, "FIRST_WAIT_S", 0.02)
    outcome = ask(settings(aimock_url), question)
    assert outcome.text == text
    assert outcome.code == code


@fails_loudly
@pytest.mark.needs("node")
def test_aimock_cuts(aimock_url: str) -> None:
    outcome = ask(settings(aimock_url), "cut")
    assert outcome.code == "source_cut"
    assert outcome.text
    assert STORY.startswith(outcome.text)


@pytest.mark.needs("node")
def test_aimock_hangs(aimock_url: str) -> None:
    outcome = ask(settings(aimock_url, openai_read_timeout_s=0.5), "hang")
    assert outcome.code == "source_timeout"
    assert STORY.startswith(outcome.text)
    assert outcome.seconds < 5


@fails_loudly
@pytest.mark.needs("node")
def test_aimock_refuses_another_key(aimock_url: str) -> None:
    outcome = ask(settings(aimock_url, openai_api_key="sk-another-one"), "plain")
    assert outcome.code == "source_authentication"
