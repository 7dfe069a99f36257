"""A fuzzer reads the specification and tries to prove it wrong, against the live server."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.processes import Server
from tests.users import SECRET, token

pytestmark = pytest.mark.soak

# However valid a request is: 404, its id does not exist; 409, a reply runs, or there is nothing to retry; 422, its
# key was used before; 429 and 503, the limits of streams and of replies.
EXPECTED = ["2xx", "404", "409", "422", "429", "503"]


def fuzz(server: Server, folder: Path, *options: str, expected: Sequence[str] = EXPECTED) -> int:
    """Have the fuzzer look for a fault; return how many requests it made.

    :param expected: the statuses of answers to valid requests
    """
    (folder / "schemathesis.toml").write_text(f"""
[checks.positive_data_acceptance]
expected-statuses = {json.dumps(expected)}

# OpenAPI cannot say that branches=all excludes limit and before.
[[operations]]
include-path = "/chat/{{conversationId}}"
include-method = "GET"
checks.positive_data_acceptance.expected-statuses = {json.dumps([*expected, "400"])}
""")
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{server.url}/openapi.json",
        f"--url={server.url}",
        "--seed=1",
        "--checks=all",
        "--suppress-health-check=all",
        "--request-timeout=20",
        "--no-color",
        *options,
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert not [line for line in server.stderr if "Traceback" in line]
    found = re.search(r"(\d+) generated", done.stdout)
    assert found is not None, done.stdout
    return int(found[1])


# A stream without a post never ends; a maximum age lets the fuzzer see its end.
LIMITS = {"STREAM_MAX_AGE_S": 0.1, "MAX_INPUT_CHARS": 500, "DATABASE_TIMEOUT_S": 20, "SIMULATED_TOKEN_DELAY_MS": 0}
OF_OWNERS = {"MAX_TURNS_PER_MINUTE": 0, "MAX_REPLIES_PER_OWNER": 0, "MAX_STREAMS_PER_OWNER": 0}


def test_fuzzer_finds_nothing(make_server: Callable[..., Server], tmp_path: Path) -> None:
    server = make_server(**LIMITS).start()
    assert fuzz(server, tmp_path, "--max-examples=25") > 150


def test_fuzzer_finds_nothing_with_a_token(make_server: Callable[..., Server], tmp_path: Path) -> None:
    server = make_server(**LIMITS, **OF_OWNERS, AUTH="jwt", AUTH_SECRET=SECRET, AUTH_COOKIE="chat_token").start()
    assert fuzz(server, tmp_path, "--max-examples=10", f"--header=Authorization: Bearer {token('alice')}") > 60


def test_fuzzer_finds_nothing_without_a_token(make_server: Callable[..., Server], tmp_path: Path) -> None:
    server = make_server(**LIMITS, AUTH="jwt", AUTH_SECRET=SECRET).start()
    assert fuzz(server, tmp_path, "--max-examples=5", expected=[*EXPECTED, "401"]) > 30
    assert not any(" status=202" in line for line in server.stderr)
