"""Access rules for host names, origins and proxies: pure functions of a request's headers."""

import ipaddress
from collections.abc import Mapping, Sequence
from functools import lru_cache
from urllib.parse import urlsplit

from chatserver.settings import Settings

_ANY_ADDRESS = ("", "0.0.0.0", "::")
_EXPOSED_HEADERS = "RateLimit, RateLimit-Policy, Retry-After, WWW-Authenticate, X-Request-Id"
"""The headers of answers that pages of other origins may read, beside those that they always may."""


@lru_cache(maxsize=1000)
def host_is_allowed(name: str, allowed: tuple[str, ...], bound: str) -> bool:
    """Return whether the server serves a host name (without port).

    A web page whose own name resolves to this server (DNS rebinding) sends that name and is refused. `localhost` and
    loopback addresses are always allowed, as no other site can use them. By default the bound host is allowed as well,
    and any IP address if the server is bound to all of them.

    :param allowed: the configured names, possibly none; `*` allows all
    :param bound: the host that the server is bound to
    """
    name = name.lower().strip("[]")
    if name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback):
        return True
    if allowed:
        return "*" in allowed or name in (each.strip("[]") for each in allowed)
    return name == bound.lower() or (bound in _ANY_ADDRESS and _is_address(name))


def is_cross_site(request: Mapping[str, str], host: str, settings: Settings, *, has_user: bool = False) -> bool:
    """Return whether a web page of another site sent a request that it may not send.

    Origins in `CORS_ORIGINS` may; in the name of a user that a cookie or a proxy identifies, only with
    `CORS_CREDENTIALS`.

    Such a page cannot read the answer, but the request would take effect: the loopback address, or the user's session
    at a proxy, admits it. Browsers send `Sec-Fetch-Site` to https and loopback addresses only. Elsewhere `Origin` is
    compared with the host name, without ports, as proxies often drop the port in `Host`. A request with neither header
    was not sent by a page.

    :param request: its headers
    :param host: the name in its `Host` header, without the port
    :param has_user: whether the browser identified a user by itself
    """
    origin = request.get("Origin")
    if origin is not None and _is_allowed_origin(origin, settings) and (settings.cors_credentials or not has_user):
        return False
    if (site := request.get("Sec-Fetch-Site")) is not None:
        return site not in ("same-origin", "none")
    return origin is not None and _host_of(origin) != host.lower().strip("[]")


def _is_allowed_origin(origin: str, settings: Settings) -> bool:
    return origin in settings.cors_origins or "*" in settings.cors_origins


def _host_of(origin: str) -> str | None:
    """Return the host name of an origin; None if it has none, or is not a web page's (`null`, an extension)."""
    try:
        url = urlsplit(origin)
    except ValueError:
        return None
    return url.hostname if url.scheme in ("http", "https") else None


def cors_headers(request: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """Return the headers that let pages of a request's origin read the answer (Fetch standard, "CORS protocol")."""
    if not settings.cors_origins:
        return {}
    origin = request.get("Origin")
    headers = {"Vary": "Origin"}
    if origin is not None and _is_allowed_origin(origin, settings):
        headers["Access-Control-Allow-Origin"] = origin
        headers["Access-Control-Expose-Headers"] = _EXPOSED_HEADERS
        if settings.cors_credentials:
            headers["Access-Control-Allow-Credentials"] = "true"
    return headers


def client_address(peer: str, request: Mapping[str, str], proxies: Sequence[str]) -> str:
    """Return a client's address: the peer's, or the last address in `X-Forwarded-For` that is not a trusted proxy.

    :param request: its headers
    :param proxies: trusted addresses or networks
    """
    if not proxies:
        return peer
    address = peer
    forwarded = request.get("X-Forwarded-For", "")
    for hop in reversed([each.strip() for each in forwarded.split(",") if each.strip()]):
        if not is_one_of(address, proxies) or not _is_address(hop):
            break
        address = hop
    return address


def is_one_of(address: str, networks: Sequence[str]) -> bool:
    """Return whether an address is one of the addresses, or in one of the networks; False if it is none at all."""
    return _is_address(address) and any(
        ipaddress.ip_address(address) in ipaddress.ip_network(network) for network in networks
    )


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
