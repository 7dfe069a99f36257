"""A fuzzer reads the specification and tries to prove it wrong, against the live server."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import Server

pytestmark = pytest.mark.soak

# However valid a request is: 404, its id does not exist; 409, a reply runs, or there is nothing to retry; 422, its
# key was used before; 429 and 503, the limits of streams and of replies.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "404", "409", "422", "429", "503"]
"""


def test_fuzzer_finds_nothing(make_server: Callable[..., Server], tmp_path: Path) -> None:
    # A stream without a post never ends; a maximum age lets the fuzzer see its end.
    limits = {"STREAM_MAX_AGE_S": 0.1, "MAX_INPUT_CHARS": 500, "DATABASE_TIMEOUT_S": 20}
    server = make_server(SIMULATED_TOKEN_DELAY_MS=0, **limits).start()
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{server.url}/openapi.json",
        f"--url={server.url}",
        "--max-examples=25",
        "--seed=1",
        "--checks=all",
        "--suppress-health-check=all",
        "--request-timeout=20",
        "--no-color",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert (found := re.search(r"(\d+) generated", done.stdout)) and int(found[1]) > 150, done.stdout
    assert not [line for line in server.stderr if "Traceback" in line]
