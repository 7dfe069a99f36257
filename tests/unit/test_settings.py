"""The settings of users: what must be chosen, and which combinations are refused."""

import re
from pathlib import Path

import pytest

from chatserver.errors import SetupError
from chatserver.settings import Settings, is_secure_address, read_settings

SECRET = "s" * 32
ISSUER = {"AUTH": "jwt", "AUTH_ISSUER": "https://login.example.com/"}


def read(**variables: str) -> Settings:
    return read_settings(variables, Path("none"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_auth_is_none_where_nobody_else_reaches_the_server(host: str) -> None:
    assert read(HOST=host).auth == "none"


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"HOST": "0.0.0.0"}, "HOST is '0.0.0.0', not a loopback address"),
        ({"HOST": "::"}, "HOST is '::', not a loopback address"),
        ({"HOST": "10.0.0.1"}, "HOST is '10.0.0.1', not a loopback address"),
        ({"HOST": "chat.example.com"}, "HOST is 'chat.example.com', not a loopback address"),
        ({"ALLOWED_HOSTS": "chat.example.com"}, "ALLOWED_HOSTS is"),
        ({"TRUSTED_PROXIES": "127.0.0.1"}, "TRUSTED_PROXIES is"),
        ({"AUTH_SECRET": SECRET}, "AUTH_SECRET is"),
        ({"AUTH_ISSUER": "https://login.example.com"}, "AUTH_ISSUER is"),
        ({"AUTH_JWKS_URL": "https://login.example.com/keys"}, "AUTH_JWKS_URL is"),
    ],
)
def test_auth_must_be_set_elsewhere(variables: dict[str, str], reason: str) -> None:
    with pytest.raises(SetupError) as raised:
        read(**variables)

    said = str(raised.value)
    assert said.startswith(f"AUTH is not set, but {reason}. ") and SECRET not in said
    assert all(f"{choice} (" in said for choice in ("jwt", "proxy", "none"))
    assert read(**variables, AUTH="none").auth == "none"


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({"AUTH": "jwt"}, "AUTH_SECRET, AUTH_ISSUER or AUTH_JWKS_URL"),
        ({**ISSUER, "AUTH_SECRET": SECRET, "AUTH_AUDIENCE": "chat"}, "AUTH_SECRET is set together with AUTH_ISSUER"),
        (
            {"AUTH": "jwt", "AUTH_SECRET": SECRET, "AUTH_JWKS_URL": "https://x/keys", "AUTH_AUDIENCE": "chat"},
            "AUTH_SECRET is set together with AUTH_ISSUER or AUTH_JWKS_URL",
        ),
        (ISSUER, "neither AUTH_AUDIENCE nor AUTH_REQUIRED_CLAIMS is set"),
        ({"AUTH": "jwt", "AUTH_JWKS_URL": "https://x/keys"}, "neither AUTH_AUDIENCE nor AUTH_REQUIRED_CLAIMS is set"),
        (
            {"AUTH": "jwt", "AUTH_SECRET": SECRET, "AUTH_COOKIE": "token", "CORS_ORIGINS": "*"},
            "AUTH_COOKIE is set, but CORS_ORIGINS is '*'",
        ),
        ({"AUTH": "proxy"}, "AUTH is 'proxy', but TRUSTED_PROXIES is not set"),
        ({"AUTH": "proxy", "TRUSTED_PROXIES": "10.0.0.1, 0.0.0.0/0"}, "every client could name any user"),
        ({"AUTH": "proxy", "TRUSTED_PROXIES": "::/0"}, "every client could name any user"),
    ],
)
def test_combination_that_cannot_work_is_refused(variables: dict[str, str], names: str) -> None:
    with pytest.raises(SetupError, match=re.escape(names)):
        read(**variables)


@pytest.mark.parametrize(
    "variables",
    [
        {"AUTH": "jwt", "AUTH_SECRET": SECRET},
        {"AUTH": "jwt", "AUTH_SECRET": SECRET, "AUTH_COOKIE": "__Host-token", "CORS_ORIGINS": "https://a.example"},
        {**ISSUER, "AUTH_AUDIENCE": "chat"},
        {**ISSUER, "AUTH_REQUIRED_CLAIMS": "azp=web"},
        {**ISSUER, "AUTH_AUDIENCE": "chat", "AUTH_JWKS_URL": "https://login.example.com/keys"},
        {"AUTH": "jwt", "AUTH_JWKS_URL": "http://[::1]:8080/keys", "AUTH_AUDIENCE": "chat", "HOST": "0.0.0.0"},
        {"AUTH": "jwt", "AUTH_JWKS_URL": "https://login.example.com/keys?p=policy", "AUTH_AUDIENCE": "chat"},
        {"AUTH": "proxy", "TRUSTED_PROXIES": "10.0.0.0/8", "AUTH_PROXY_HEADER": "X-Remote-User"},
    ],
)
def test_combination_that_works_is_accepted(variables: dict[str, str]) -> None:
    assert read(**variables).auth == variables["AUTH"]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("AUTH", ["basic", "JWT", "none,jwt"]),
        (
            "AUTH_ISSUER",
            [
                "http://login.example.com",
                "http://10.0.0.1",
                "http://localhost.example.com",
                "http://127.0.0.1.example.com",
                "login.example.com",
                "https://",
                "https://x:0",
                "https://x:port",
                "https://x/?tenant=1",
                "https://x/#a",
                "file:///etc/passwd",
                "https://[x",
            ],
        ),
        ("AUTH_JWKS_URL", ["http://keys.example.com/", "/keys"]),
        ("AUTH_REQUIRED_CLAIMS", ["azp", "azp=", "=web", "azp=web,use"]),
        ("AUTH_COOKIE", ["a b", "a=b", "a;b", "é", '"a"']),
        ("AUTH_PROXY_HEADER", ["X_Forwarded_User", "X Forwarded", "X:", "é"]),
        ("AUTH_LOGIN_URL", ["javascript:alert(1)", "login", "//evil.example.com", "/a b"]),
        ("AUTH_LOGOUT_URL", ["javascript:alert(1)", "data:text/html,x"]),
        ("AUTH_LEEWAY_S", ["-1", "601", "x"]),
        ("MAX_TURNS_PER_MINUTE", ["-1", "1.5"]),
        ("MAX_REPLIES_PER_OWNER", ["-1"]),
        ("MAX_STREAMS_PER_OWNER", ["-1"]),
    ],
)
def test_value_that_could_never_work_is_refused(name: str, values: list[str]) -> None:
    for value in values:
        with pytest.raises(SetupError, match=rf"^{name} is {re.escape(repr(value))}: "):
            read(**{name: value})


@pytest.mark.parametrize(
    "value", ["short", f"{SECRET},short", "s" * 31, "s" * 31 + "é", "-----BEGIN PUBLIC KEY----- " * 3]
)
def test_secret_that_is_weak_is_refused_and_not_shown(value: str) -> None:
    with pytest.raises(SetupError) as raised:
        read(AUTH_SECRET=value)

    assert value not in str(raised.value) and "AUTH_SECRET is [hidden]: not made of secrets of 32" in str(raised.value)


def test_password_in_the_address_of_an_issuer_is_refused_and_not_shown() -> None:
    with pytest.raises(SetupError) as raised:
        read(AUTH_ISSUER="https://user:password@login.example.com")

    assert "password" not in str(raised.value)


def test_secrets_are_not_in_the_repr() -> None:
    settings = read(AUTH="jwt", AUTH_SECRET=f"{SECRET}, {'t' * 40}", METRICS_TOKEN="metrics-token")

    assert settings.auth_secret == (SECRET, "t" * 40)
    assert SECRET not in repr(settings) and "ttt" not in repr(settings) and "metrics-token" not in repr(settings)


def test_required_claims_are_pairs() -> None:
    settings = read(**ISSUER, AUTH_REQUIRED_CLAIMS="azp=web, token_use=access=1")

    assert settings.auth_required_claims == (("azp", "web"), ("token_use", "access=1"))


def test_streams_live_15_minutes_with_a_proxy_unless_configured() -> None:
    proxy = {"AUTH": "proxy", "TRUSTED_PROXIES": "127.0.0.1"}

    assert read(**proxy).stream_max_age_s == 900
    assert read(**proxy, STREAM_MAX_AGE_S="0").stream_max_age_s == 0
    assert read(AUTH="none").stream_max_age_s == read(AUTH="jwt", AUTH_SECRET=SECRET).stream_max_age_s == 0


@pytest.mark.parametrize(
    "address", ["https://x", "HTTPS://x/y", "http://localhost:80", "http://127.0.0.1", "http://[::1]:8/k"]
)
def test_address_is_secure(address: str) -> None:
    assert is_secure_address(address)
