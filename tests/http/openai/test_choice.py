"""How the OpenAI source is chosen and configured."""

import asyncio
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from chatserver.errors import SetupError
from chatserver.settings import Settings, read_settings
from chatserver.sources import make_source
from chatserver.sources.openai import OpenAI
from tests.http.openai.provider import (
    KEY,
)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:11434/v1",
        "ftp://example.org",
        "http://",
        "http://localhost:99999",
        "http://x:y",
        "http://[:::]",
        "http://ü..x",
        "http://user:password@ü..x",
        "http://user:password@x:99999",
        "http://user:pass/word@x",
    ],
)
def test_an_invalid_base_url_is_reported_at_start_up(url: str) -> None:
    with pytest.raises(SetupError, match="OPENAI_BASE_URL") as raised:
        OpenAI(read_settings({"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url}, Path("none")))
    assert "pass" not in str(raised.value)


@pytest.mark.parametrize("key", ["sk-1\u200b2", "sk-1\n2", "sk-1 2", "sk-1\x7f2", "sk-ü"])
def test_an_unsendable_key_is_reported_at_start_up_without_its_value(key: str) -> None:
    with pytest.raises(SetupError, match="OPENAI_API_KEY") as raised:
        read_settings({"OPENAI_API_KEY": key}, Path("none"))
    assert "sk-" not in str(raised.value)


def test_the_official_server_gets_the_new_name_of_the_largest_length() -> None:
    official = OpenAI(replace(Settings(), openai_api_key=KEY, openai_max_tokens=5))
    assert official._options == {"max_completion_tokens": 5}
    asyncio.run(official.close())


def test_the_sdk_is_imported_only_when_it_is_chosen() -> None:
    program = (
        "import sys\n"
        "from chatserver.settings import Settings\n"
        "from chatserver.sources import make_source\n"
        "source = make_source(Settings(reply_source=sys.argv[1], openai_api_key='sk-x'))\n"
        "print(type(source).__name__, 'openai' in sys.modules, 'httpx2' in sys.modules)\n"
    )

    def run(name: str) -> str:
        done = subprocess.run([sys.executable, "-c", program, name], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert run("simulated") == "Simulated False False"
    assert run("openai") == "OpenAI True True"


def test_the_comment_where_a_turn_picks_its_source_says_what_to_do() -> None:
    code = Path(sys.modules[make_source.__module__].__file__ or "").read_text()
    body = code[code.index("def make_source") :]
    comment = re.findall(r"^ +# ?(.*)", body, re.MULTILINE)
    assert 1 <= len(comment) <= 5
    text = "\n".join(comment)
    for words in ("OPENAI_API_KEY", "uncomment", "REPLY_SOURCE=openai", "sources/openai.py is the complete"):
        assert words in text
