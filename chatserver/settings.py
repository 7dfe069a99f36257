"""The settings: the one reader of the environment and of `.env`.

Each field of `Settings` is one variable, its name in capitals. An empty value counts as unset.
"""

import ipaddress
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from dotenv import dotenv_values
from dotenv.parser import parse_stream

from chatserver.errors import SetupError

PLACEHOLDER_KEY = "your_api_key_here"
_NAME = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\.?"  # as in the Host and Origin headers: other alphabets as xn--...
_HOST = rf"\*|{_NAME}|\[?[0-9a-f]*:[0-9a-f]*:[0-9a-f:.]*\]?"
_DEFAULT_PORT = "http:.*:80$|https:.*:443$"  # browsers omit it
_COOKIE_NAME = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"  # RFC 9110, 5.6.2
_ORIGIN = rf"\*|(?!{_DEFAULT_PORT})[a-z][a-z0-9+.-]*://(?:{_NAME}|\[[0-9a-f:.]+\])(?::[0-9]+)?"


# Stricter than int() and float(), which accept 1_000, +80, the digits of other alphabets, and inf.
def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch("-?[0-9]+", text):
            raise ValueError("not a whole number")
        _check_between(low, int(text), high)
        return int(text)

    return parse


def _decimal(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        if not re.fullmatch(r"-?[0-9]*\.?[0-9]+", text):
            raise ValueError("not a number")
        _check_between(low, float(text), high)
        return float(text)

    return parse


def _check_between(low: float, number: float, high: float) -> None:
    if not low <= number <= high:
        raise ValueError(f"not between {low} and {high}")


def _choice(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"not one of {', '.join(names)}")
        return text

    return parse


def _flag(text: str) -> bool:
    return _choice("true", "false")(text.lower()) == "true"


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _all_like(pattern: str, what: str) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = _names(text.lower())
        for name in names:
            if not re.fullmatch(pattern, name):
                raise ValueError(f"{name!r} is not {what}")
        return names

    return parse


def _web_address(text: str) -> str:
    with suppress(ValueError):  # its message for a wrong host or port may quote a password
        url = urlsplit(text)
        if url.scheme in ("http", "https") and url.hostname and url.port != 0:
            return text
    raise ValueError("not an address that begins with http:// or https://")


def is_secure_address(text: str) -> bool:
    """Return whether nobody on the network can read or change what an address answers: https, or http to loopback.

    An address with a user name, a password or a fragment is not accepted, nor one with characters that a URL cannot
    have: an issuer chooses the address of its keys, and a control character would reach the operator's terminal.
    """
    try:
        url = urlsplit(text)
        valid = bool(url.hostname) and url.port != 0 and not re.search("[#@]|[^!-~]", text)
    except ValueError:
        return False
    return valid and (url.scheme == "https" or (url.scheme == "http" and _is_loopback(url.hostname or "")))


def _secure_address(text: str) -> str:
    if not is_secure_address(text):
        raise ValueError("not an https:// address (http:// is allowed to loopback addresses only)")
    return text


def _issuer(text: str) -> str:
    if "?" in text:  # OpenID Connect Discovery, 3
        raise ValueError("not an issuer, whose address has no query")
    return _secure_address(text)


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _link(text: str) -> str:
    if re.fullmatch("/(?!/)[!-~]*", text):
        return text
    try:
        return _web_address(text)
    except ValueError:
        raise ValueError("not an address that begins with http://, https:// or /") from None


def _like(pattern: str, what: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"not {what}")
        return text

    return parse


def _secrets(text: str) -> tuple[str, ...]:
    secrets = _names(text)
    if not all(re.fullmatch("[!-~]{32,}", secret) for secret in secrets):
        raise ValueError(
            "not made of secrets of 32 or more visible ASCII characters, separated by commas; "
            "`openssl rand -base64 48` prints one"
        )
    return secrets


def _claims(text: str) -> tuple[tuple[str, str], ...]:
    pairs = [(name.strip(), value.strip()) for name, _, value in (each.partition("=") for each in _names(text))]
    if not all(name and value for name, value in pairs):
        raise ValueError("not a list like azp=web,token_use=access")
    return tuple(pairs)


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~name of an unknown user
        raise ValueError(str(error)) from None


def _networks(text: str) -> tuple[str, ...]:
    for name in _names(text):
        ipaddress.ip_network(name)
    return _names(text)


def _setting(default: Any, parse: Callable[[str], Any] = str, *, secret: bool = False) -> Any:
    return field(default=default, repr=not secret, metadata={"parse": parse})


_PROXY_STREAM_MAX_AGE_S = 900.0
"""The default of `STREAM_MAX_AGE_S` with AUTH=proxy: a proxy checks a stream only when it opens."""
_SECONDS = _decimal(0.05, 86_400)
_COUNT = _whole(1, 10_000_000)
_LIMIT = _whole(0, 10_000_000)  # 0: no limit
_VISIBLE = _like("[!-~]+", "made of visible ASCII characters only")


@dataclass(frozen=True)
class Settings:
    """The settings of one server. Secrets do not appear in the repr."""

    host: str = _setting("127.0.0.1")
    port: int = _setting(3000, _whole(0, 65535))
    allowed_hosts: tuple[str, ...] = _setting((), _all_like(_HOST, "a host name without a port"))
    trusted_proxies: tuple[str, ...] = _setting((), _networks)
    cors_origins: tuple[str, ...] = _setting(
        (), _all_like(_ORIGIN, "an origin as browsers send it: https://www.example.com")
    )
    cors_credentials: bool = _setting(False, _flag)
    log_format: str = _setting("human", _choice("human", "json"))
    log_level: str = _setting("info", _choice("debug", "info", "warning", "error"))

    auth: str = _setting("none", _choice("none", "jwt", "proxy"))
    auth_secret: tuple[str, ...] = _setting((), _secrets, secret=True)
    auth_issuer: str | None = _setting(None, _issuer)
    auth_jwks_url: str | None = _setting(None, _secure_address)
    auth_audience: str | None = _setting(None)
    auth_required_claims: tuple[tuple[str, str], ...] = _setting((), _claims)
    auth_owner_claim: str = _setting("sub")
    auth_cookie: str | None = _setting(None, _like(_COOKIE_NAME, "a name of a cookie"))
    auth_leeway_s: float = _setting(30.0, _decimal(0, 600))
    auth_proxy_header: str = _setting("X-Forwarded-User", _like("[A-Za-z0-9-]+", "letters, digits and hyphens only"))
    auth_login_url: str | None = _setting(None, _link)
    auth_logout_url: str | None = _setting(None, _link)
    metrics_token: str | None = _setting(None, _VISIBLE, secret=True)

    mongodb_uri: str | None = _setting(None, secret=True)
    chat_data_dir: Path = _setting(Path(".data"), _path)
    database_timeout_s: float = _setting(3.0, _SECONDS)
    checkpoint_ms: int = _setting(250, _whole(10, 60_000))
    lease_ms: int = _setting(10_000, _whole(100, 3_600_000))

    reply_source: str = _setting("simulated", _choice("simulated", "openai"))
    history_messages: int = _setting(50, _whole(1, 10_000))
    simulated_token_delay_ms: int = _setting(40, _whole(0, 60_000))
    simulated_tokens: int | None = _setting(None, _COUNT)
    openai_api_key: str | None = _setting(None, _VISIBLE, secret=True)
    openai_model: str = _setting("gpt-4.1-mini")
    openai_base_url: str | None = _setting(None, _web_address)
    openai_system_prompt: str | None = _setting(None)
    openai_temperature: float | None = _setting(None, _decimal(0, 2))
    openai_max_tokens: int | None = _setting(None, _COUNT)
    openai_history_chars: int = _setting(48_000, _COUNT)
    openai_connect_timeout_s: float = _setting(5.0, _SECONDS)
    openai_read_timeout_s: float = _setting(60.0, _SECONDS)

    max_input_chars: int = _setting(32_000, _whole(1, 2_000_000))
    max_reply_chars: int = _setting(400_000, _COUNT)
    max_header_bytes: int = _setting(16_384, _whole(1024, 1_048_576))
    request_timeout_s: float = _setting(30.0, _SECONDS)
    max_connections: int | None = _setting(None, _COUNT)
    max_streams: int = _setting(10_000, _COUNT)
    max_streams_per_conversation: int = _setting(2_000, _COUNT)
    max_streams_per_address: int = _setting(0, _LIMIT)
    max_streams_per_owner: int = _setting(50, _LIMIT)
    max_replies: int = _setting(1_000, _COUNT)
    max_replies_per_owner: int = _setting(5, _LIMIT)
    max_turns_per_minute: int = _setting(30, _LIMIT)
    keepalive_s: float = _setting(15.0, _decimal(1, 86_400))
    slow_client_timeout_s: float = _setting(30.0, _SECONDS)
    stream_max_age_s: float = _setting(0.0, _decimal(0, 604_800))
    drain_s: float = _setting(10.0, _decimal(0, 3600))

    @property
    def max_body_bytes(self) -> int:
        """The size of the largest request body: every character escaped as a surrogate pair, and the JSON around it."""
        return 12 * self.max_input_chars + 1024


def read_settings(environment: Mapping[str, str] = os.environ, dotenv: Path = Path(".env")) -> Settings:
    """Return the settings: the environment first, then the `.env` file, then the defaults.

    :raises SetupError: naming each wrong variable with its value (secrets are hidden), the line of the file, or the
        variables that conflict
    """
    file = _read_file(dotenv)
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for setting in fields(Settings):
        name = setting.name.upper()
        text = (environment.get(name) or file.get(name) or "").strip()
        if not text:
            continue
        try:
            values[setting.name] = setting.metadata["parse"](text)
        except ValueError as error:
            shown = repr(re.sub(".*@", "[hidden]@", text)) if setting.repr else "[hidden]"
            wrong.append(f"{name} is {shown}: {error}")
    if wrong:
        raise SetupError("\n".join(wrong))
    if values.get("auth") == "proxy":
        values.setdefault("stream_max_age_s", _PROXY_STREAM_MAX_AGE_S)
    settings = Settings(**values)
    if "auth" not in values and (reason := _why_auth_must_be_set(settings)) is not None:
        raise SetupError(
            f"AUTH is not set, but {reason}. Set AUTH to jwt (tokens of your identity provider or backend), "
            "proxy (a header of a proxy in TRUSTED_PROXIES) or none (every caller reads and writes every conversation)"
        )
    for is_wrong, message in _CONFLICTS:
        if is_wrong(settings):
            raise SetupError(message.format(settings))
    return settings


def _why_auth_must_be_set(settings: Settings) -> str | None:
    """Return what suggests that others than this machine's user reach the server, or that users are wanted."""
    if not _is_loopback(settings.host):
        return f"HOST is {settings.host!r}, not a loopback address"
    for name in ("allowed_hosts", "trusted_proxies", "auth_secret", "auth_issuer", "auth_jwks_url"):
        if getattr(settings, name):
            return f"{name.upper()} is"
    return None


_CONFLICTS: list[tuple[Callable[[Settings], bool], str]] = [
    (
        lambda s: s.reply_source == "openai" and s.openai_api_key in (None, PLACEHOLDER_KEY),
        "REPLY_SOURCE is 'openai', but OPENAI_API_KEY is not set to a real key (see .env.example)",
    ),
    (
        lambda s: s.cors_credentials and "*" in s.cors_origins,
        "CORS_CREDENTIALS is 'true', but CORS_ORIGINS is '*': name the origins that may use credentials",
    ),
    (
        lambda s: s.lease_ms < 3 * s.checkpoint_ms,
        "LEASE_MS is '{0.lease_ms}': less than three times CHECKPOINT_MS ({0.checkpoint_ms})",
    ),
    (
        lambda s: s.auth == "jwt" and not (s.auth_secret or s.auth_issuer or s.auth_jwks_url),
        "AUTH is 'jwt', but nothing verifies tokens: set AUTH_SECRET, AUTH_ISSUER or AUTH_JWKS_URL",
    ),
    (
        lambda s: s.auth == "jwt" and bool(s.auth_secret and (s.auth_issuer or s.auth_jwks_url)),
        "AUTH_SECRET is set together with AUTH_ISSUER or AUTH_JWKS_URL: remove one, since only one can verify tokens",
    ),
    (
        lambda s: s.auth == "jwt" and not (s.auth_secret or s.auth_audience or s.auth_required_claims),
        "AUTH is 'jwt', but neither AUTH_AUDIENCE nor AUTH_REQUIRED_CLAIMS is set: the issuer's tokens for any other "
        "application would be accepted",
    ),
    (
        lambda s: s.auth == "jwt" and s.auth_cookie is not None and "*" in s.cors_origins,
        "AUTH_COOKIE is set, but CORS_ORIGINS is '*': name the origins that may use the cookie",
    ),
    (
        lambda s: s.auth == "proxy" and not s.trusted_proxies,
        "AUTH is 'proxy', but TRUSTED_PROXIES is not set: name the addresses of the proxies that may name the user",
    ),
    (
        lambda s: s.auth == "proxy" and any(ipaddress.ip_network(each).prefixlen == 0 for each in s.trusted_proxies),
        "AUTH is 'proxy', but TRUSTED_PROXIES has all addresses: every client could name any user",
    ),
]
"""Combinations of settings that cannot work, each with its message; `{0}` stands for the settings."""


def _read_file(dotenv: Path) -> dict[str, str | None]:
    try:
        # Editors on Windows start it with a byte order mark, which would become part of the first name.
        text = dotenv.read_text("utf-8-sig") if os.path.lexists(dotenv) else ""
    except OSError as error:
        raise SetupError(f"{dotenv} cannot be read: {error.strerror}; repair it, or move it away") from None
    except UnicodeDecodeError:
        raise SetupError(f"{dotenv} is not valid UTF-8: save it as UTF-8, or move it away") from None
    if (damage := re.search(r"[\x00-\x08\x0e-\x1f\x7f]", text)) is not None:
        line = text.count("\n", 0, damage.start()) + 1
        raise SetupError(f"{dotenv}, line {line}, has a control character: write that line again")
    for binding in parse_stream(StringIO(text)):
        if binding.error:
            raise SetupError(f"{dotenv}, line {binding.original.line}, is neither NAME=value nor a comment")
    return dotenv_values(stream=StringIO(text))
