"""`python -m chatserver.token`, which scripts/token runs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chatserver.auth import Credential, key_id, verify
from chatserver.keys import Secrets
from chatserver.settings import Settings
from tests.processes import ROOT

SECRET = "s" * 32


def run(folder: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "chatserver.token", *arguments],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.gen_test
@pytest.mark.parametrize(("options", "minutes"), [((), 60), (("--minutes", "5"), 5)])
async def test_token_is_one_that_the_server_accepts(tmp_path: Path, options: tuple[str, ...], minutes: int) -> None:
    (tmp_path / ".env").write_text(f"AUTH=jwt\nAUTH_SECRET={SECRET},{'o' * 32}\nAUTH_AUDIENCE=chat\n")

    done = run(tmp_path, "alice", *options)

    token = done.stdout.strip()
    settings = Settings(auth_secret=(SECRET,), auth_audience="chat")
    keys = await Secrets(settings.auth_secret).find(key_id(token))
    caller = verify(Credential(token, ambient=False), keys, settings, time.time())
    assert (done.returncode, done.stderr, caller.owner) == (0, "", "alice")
    assert caller.expires_at == pytest.approx(time.time() + 60 * minutes + settings.auth_leeway_s, abs=10)


@pytest.mark.parametrize(
    ("variables", "name", "said"),
    [
        ({}, "alice", "token: AUTH_SECRET is not set: this server cannot sign tokens (see .env.example)\n"),
        ({"AUTH_SECRET": SECRET}, "alice", "token: AUTH is not set, but AUTH_SECRET is."),
        ({"AUTH": "jwt", "AUTH_SECRET": SECRET}, "", "token: an owner has 1 to 255 characters"),
        ({"AUTH": "jwt", "AUTH_SECRET": SECRET}, "a\nb", "token: an owner has 1 to 255 characters"),
    ],
)
def test_token_that_cannot_be_made_is_an_error(tmp_path: Path, variables: dict[str, str], name: str, said: str) -> None:
    done = run(tmp_path, name, **variables)

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(said) and SECRET not in done.stderr
