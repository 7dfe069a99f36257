"""Who may talk to this server, from where: host names, origins, proxies. Pure functions of a request's headers."""

import ipaddress
from collections.abc import Mapping, Sequence
from functools import lru_cache
from urllib.parse import urlsplit

from chatserver.settings import Settings

_ANY_ADDRESS = ("", "0.0.0.0", "::")


@lru_cache(maxsize=1000)
def host_is_allowed(name: str, allowed: tuple[str, ...], bound: str) -> bool:
    """Return whether the server answers under a host name (without port).

    A web page that has its own name resolve to this server (DNS rebinding) comes with that name and is refused.
    `localhost` and loopback addresses are always right, as no page can come with them from elsewhere; by default the
    bound host is, too, and one that is bound to every address answers to any address.

    :param allowed: the names of the settings, if there are any; `*` for all
    :param bound: the host that the server is bound to
    """
    name = name.lower().strip("[]")
    if name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback):
        return True
    if allowed:
        return "*" in allowed or name in (each.strip("[]") for each in allowed)
    return name == bound.lower() or (bound in _ANY_ADDRESS and _is_address(name))


def is_cross_site(request: Mapping[str, str], host: str, settings: Settings) -> bool:
    """Return whether a web page of another site sent a request, and its origin is not in `CORS_ORIGINS`.

    Such a page cannot read the answer, but the request would have its effect: the server's loopback address, or a
    session that the user has at a proxy, admits it. Browsers send `Sec-Fetch-Site` to https and loopback addresses
    only; elsewhere `Origin` is compared with the host's name, without ports, as proxies often drop the one in `Host`. A
    request that has neither header was not sent by a page.

    :param request: its headers
    :param host: the name in its `Host` header, without the port
    """
    origin = request.get("Origin")
    # Once a cookie of ours is a credential, a request that carries it will need CORS_CREDENTIALS as well.
    if origin is not None and _is_allowed_origin(origin, settings):
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
        headers["Access-Control-Expose-Headers"] = "Retry-After, X-Request-Id"
        if settings.cors_credentials:
            headers["Access-Control-Allow-Credentials"] = "true"
    return headers


def client_address(peer: str, request: Mapping[str, str], proxies: Sequence[str]) -> str:
    """Return a client's address: the peer's, or the last one in `X-Forwarded-For` that is none of our proxies.

    :param request: its headers
    :param proxies: addresses or networks whose word is taken
    """
    if not proxies:
        return peer
    address = peer
    forwarded = request.get("X-Forwarded-For", "")
    for said in reversed([each.strip() for each in forwarded.split(",") if each.strip()]):
        if not _is_one_of(address, proxies) or not _is_address(said):
            break
        address = said
    return address


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_one_of(address: str, networks: Sequence[str]) -> bool:
    return _is_address(address) and any(
        ipaddress.ip_address(address) in ipaddress.ip_network(network) for network in networks
    )
