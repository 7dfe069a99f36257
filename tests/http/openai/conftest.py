"""Fixtures: llmock, and a check that the API key is never logged."""

import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from chatserver.sources import openai as source_module
from tests.http.openai.provider import KEY, LLMock, started


@pytest.fixture(scope="module")
def llmock_url() -> Iterator[str]:
    command = [str(Path(sys.executable).with_name("llmock")), "serve", "--port", "0", "--stream-chunk-delay-ms", "10"]
    yield from started(command, r"running on (http://127\.0\.0\.1:\d+)")


@pytest.fixture
def llm(llmock_url: str, monkeypatch: pytest.MonkeyPatch) -> LLMock:
    monkeypatch.setattr(source_module, "FIRST_WAIT_S", 0.1)
    httpx.post(f"{llmock_url}/_llmock/reset").raise_for_status()
    return LLMock(llmock_url)


@pytest.fixture(autouse=True)
def never_the_key(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Hold every test to it: the key is in no log record."""
    caplog.set_level("INFO")
    yield
    assert KEY not in "\n".join(record.getMessage() for record in caplog.get_records("call"))
