"""The examples for deployment: their limits fit the settings, and the tools that read them accept them."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from chatserver.errors import SetupError
from chatserver.settings import Settings, read_settings
from tests.processes import ROOT

DEPLOY = ROOT / "scripts" / "deploy"


def test_image_stops_within_the_grace_of_docker() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    variables = dict(
        word.split("=") for line in lines if line.startswith("ENV ") for word in line.removeprefix("ENV ").split()
    )
    # `docker stop` kills after 10 s, and the server needs time to store the replies that still run.
    assert float(variables["DRAIN_S"]) + Settings.database_timeout_s + 1 <= 10
    user = next(line for line in lines if line.startswith("USER "))
    assert re.fullmatch("USER [1-9][0-9]*:[1-9][0-9]*", user)
    assert set(variables) - {"PYTHONUNBUFFERED"} <= {name.upper() for name in Settings.__dataclass_fields__}
    # The operator chooses: a server that listens on all addresses does not start without it.
    assert variables["HOST"] == "0.0.0.0" and "AUTH" not in variables


def test_image_is_made_of_what_the_context_holds() -> None:
    """The context contains nothing but the files that the image copies: no `.env` with its keys."""
    rules = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith(("#", "**"))
    ]
    copied = re.findall("^COPY ([^ ]+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert rules[0] == "*" and sorted(rules[1:]) == sorted(f"!{name}" for name in copied)


def test_composition_has_a_replica_set_of_one_and_time_to_stop() -> None:
    services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    chatserver, mongo = services["chatserver"], services["mongo"]
    assert chatserver["stop_grace_period"] == "40s"
    assert float(chatserver["environment"]["DRAIN_S"]) + Settings.database_timeout_s + 1 < 40
    assert (DEPLOY / chatserver["build"]["context"]).resolve() == ROOT
    assert (ROOT / chatserver["build"]["dockerfile"]).is_file()
    uri = re.fullmatch(r"mongodb://(\w+):27017/[\w-]+\?replicaSet=(\w+)", chatserver["environment"]["MONGODB_URI"])
    assert uri is not None and uri[1] in services
    assert mongo["command"][:3] == ["mongod", "--replSet", uri[2]] and "ports" not in mongo
    initiate = mongo["healthcheck"]["test"][-1]
    assert f'_id: "{uri[2]}"' in initiate and f'host: "{uri[1]}:27017"' in initiate
    assert chatserver["depends_on"][uri[1]]["condition"] == "service_healthy"
    assert set(chatserver["environment"]) <= {name.upper() for name in Settings.__dataclass_fields__}


@pytest.mark.needs("docker-compose")
def test_docker_compose_starts_nothing_without_auth() -> None:
    command = ["docker-compose", "--file", str(DEPLOY / "compose.yaml"), "config"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUTH")}

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=60)

    refused = run()
    accepted = run(AUTH="jwt", AUTH_SECRET="a" * 32)

    assert refused.returncode != 0 and "docs/auth.md" in refused.stderr
    assert accepted.returncode == 0, accepted.stderr
    given = yaml.safe_load(accepted.stdout)["services"]["chatserver"]["environment"]
    assert read_settings(given, Path("none")).auth_secret == ("a" * 32,)


def test_unit_starts_nothing_without_the_keys_of_auth() -> None:
    text = (DEPLOY / "chatserver.service").read_text()
    given = dict(re.findall(r"^Environment=(\w+)=(.*)$", text, re.MULTILINE))
    with pytest.raises(SetupError, match="AUTH_SECRET"):
        read_settings(given, Path("none"))


def test_nginx_names_no_user_for_a_server_that_trusts_it() -> None:
    text = (DEPLOY / "nginx.conf").read_text()
    given = dict(re.findall(r"\b([A-Z_]+)=([\w.]+)", text.partition("upstream")[0]))
    assert set(given) >= {"ALLOWED_HOSTS", "TRUSTED_PROXIES", "AUTH"}
    settings = read_settings(given | {"AUTH_SECRET": "a" * 32, "AUTH": "jwt"}, Path("none"))
    assert settings.trusted_proxies == ("127.0.0.1",)
    assert 'proxy_set_header X-Forwarded-User "";' in text


@pytest.mark.needs("systemd-analyze")
def test_unit_is_valid_and_hardened(tmp_path: Path) -> None:
    unit = tmp_path / "chatserver.service"
    text = (DEPLOY / "chatserver.service").read_text()
    unit.write_text(text.replace("/opt/chatserver/.venv/bin/python", sys.executable))
    verify = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert (verify.returncode, verify.stdout + verify.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=40", str(unit)]
    security = subprocess.run(command, capture_output=True, text=True, timeout=60)
    found = re.search(r"Overall exposure level for chatserver\.service: ([0-9.]+)", security.stdout)
    assert found is not None and float(found[1]) < 4.0 and security.returncode == 0


def test_unit_gives_the_server_its_state_folder_and_time_to_stop() -> None:
    lines = (DEPLOY / "chatserver.service").read_text().splitlines()
    entries = dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line) and "Environment=" not in line)
    variables = dict(line.removeprefix("Environment=").split("=") for line in lines if line.startswith("Environment="))
    assert variables["CHAT_DATA_DIR"] == f"/var/lib/{entries['StateDirectory']}"
    assert set(variables) <= {name.upper() for name in Settings.__dataclass_fields__}
    assert Settings.drain_s + Settings.database_timeout_s + 1 + 20 <= float(entries["TimeoutStopSec"])
    # The private MongoDB's JavaScript engine makes code at run time.
    assert "MemoryDenyWriteExecute" not in entries
