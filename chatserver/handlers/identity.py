"""Who sends a request, for each value of AUTH."""

import hashlib
import logging
import time
from typing import Protocol

from tornado.httputil import HTTPHeaders

from chatserver.auth import Caller, find_credential, forwarded_owner, key_id, verify
from chatserver.errors import NoForwardedUser
from chatserver.handlers.access import is_one_of
from chatserver.keys import IssuerKeys, Keys, Secrets
from chatserver.settings import Settings
from chatserver.tasks import Tasks

logger = logging.getLogger(__name__)

_MAX_VERIFIED = 10_000
"""The number of tokens that are remembered, each with some 400 bytes."""


class Identity(Protocol):
    """Finds out who sends a request."""

    @property
    def is_ready(self) -> bool:
        """Whether `identify` can accept requests."""

    def start(self, background: Tasks) -> None:
        """Start what `identify` needs, as tasks of `background`."""

    async def close(self) -> None:
        """Release what `start` has opened. The tasks must have ended."""

    async def identify(self, headers: HTTPHeaders, peer: str) -> Caller:
        """Return who sends a request.

        :param peer: the address of the socket's other end, whatever the headers say
        :raises Unauthenticated: if the request does not show it
        :raises KeysUnavailable: if the keys are not known yet
        """


def make_identity(settings: Settings) -> Identity:
    """Return what AUTH configures."""
    if settings.auth == "jwt":
        return TokenIdentity(settings, _make_keys(settings))
    if settings.auth == "proxy":
        return ProxyIdentity(settings)
    return NoIdentity()


def _make_keys(settings: Settings) -> Keys:
    if settings.auth_secret:
        return Secrets(settings.auth_secret)
    return IssuerKeys(issuer=settings.auth_issuer, url=settings.auth_jwks_url)


class NoIdentity:
    """AUTH=none: all callers are the same."""

    is_ready = True

    def start(self, background: Tasks) -> None:
        pass

    async def close(self) -> None:
        pass

    async def identify(self, headers: HTTPHeaders, peer: str) -> Caller:
        return Caller(None, ambient=True)


class TokenIdentity:
    """AUTH=jwt: a signed token names the owner.

    Verified tokens are remembered until the keys change, since to verify one takes as long as a third of all other work
    to open a stream.
    """

    def __init__(self, settings: Settings, keys: Keys) -> None:
        self._settings = settings
        self._keys = keys
        self._verified: dict[bytes, Caller] = {}
        """SHA-256 of a token -> its caller, the oldest first."""
        self._verified_with: object = None
        """The version of the keys that have verified them."""

    @property
    def is_ready(self) -> bool:
        return self._keys.is_ready

    def start(self, background: Tasks) -> None:
        self._keys.start(background)

    async def close(self) -> None:
        await self._keys.close()

    async def identify(self, headers: HTTPHeaders, peer: str) -> Caller:
        credential = find_credential(headers, self._settings.auth_cookie)
        # Not the token itself, which would be a secret in memory for longer than its request.
        digest = hashlib.sha256(credential.token.encode()).digest()
        known = self._verified.get(digest) if self._verified_with is self._keys.version else None
        if known is None or known.expires_at <= time.time():
            keys = await self._keys.find(key_id(credential.token))
            known = verify(credential, keys, self._settings, time.time())
            self._remember(digest, known)
        return known._replace(ambient=credential.ambient)

    def _remember(self, digest: bytes, caller: Caller) -> None:
        if self._verified_with is not self._keys.version:
            self._verified.clear()
            self._verified_with = self._keys.version
        elif len(self._verified) >= _MAX_VERIFIED:
            del self._verified[next(iter(self._verified))]
        self._verified[digest] = caller


class ProxyIdentity:
    """AUTH=proxy: a header of a trusted proxy names the owner."""

    is_ready = True

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def start(self, background: Tasks) -> None:
        logger.info(
            "the header %s names the user, if it comes from %s",
            self._settings.auth_proxy_header,
            ", ".join(self._settings.trusted_proxies),
        )

    async def close(self) -> None:
        pass

    async def identify(self, headers: HTTPHeaders, peer: str) -> Caller:
        if not is_one_of(peer, self._settings.trusted_proxies):
            raise NoForwardedUser("not from TRUSTED_PROXIES")
        owner = forwarded_owner(headers, self._settings.auth_proxy_header)
        return Caller(owner, ambient=True)
