"""The keys that verify tokens: the secrets of AUTH_SECRET, or the public keys of an issuer."""

import asyncio
import json
import logging
import time
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from typing import Any, Protocol

import jwt
from tornado.httpclient import AsyncHTTPClient, HTTPClientError
from tornado.iostream import UnsatisfiableReadError

from chatserver import tasks
from chatserver.errors import InvalidToken, KeysUnavailable
from chatserver.settings import is_secure_address
from chatserver.tasks import Tasks

logger = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "PS256", "ES256", "ES384", "EdDSA")
_MAX_BYTES = 512 * 1024


class Keys(Protocol):
    """Finds the keys that may have signed a token."""

    @property
    def is_ready(self) -> bool:
        """Whether keys are known."""

    @property
    def version(self) -> object:
        """An object that is replaced whenever the keys are: a token that one of them has verified stays valid until
        then, or until it expires.
        """

    def start(self, background: Tasks) -> None: ...

    async def close(self) -> None: ...

    async def find(self, key_id: str | None) -> Sequence[jwt.PyJWK]:
        """Return the keys that a token may be signed with; at least one.

        :param key_id: the id that the token names, if it names one
        :raises InvalidToken: if there is no such key
        :raises KeysUnavailable: if no keys are known
        """


class Secrets:
    """Shared secrets (HS256). The key id of a token is ignored: any of the secrets may have signed it.

    :param secrets: newest first
    """

    is_ready = True

    def __init__(self, secrets: Sequence[str]) -> None:
        self._keys = [
            jwt.PyJWK({"kty": "oct", "alg": "HS256", "k": urlsafe_b64encode(secret.encode()).decode()})
            for secret in secrets
        ]
        self.version: object = self._keys

    def start(self, background: Tasks) -> None:
        pass

    async def close(self) -> None:
        pass

    async def find(self, key_id: str | None) -> Sequence[jwt.PyJWK]:
        return self._keys


class IssuerKeys:
    """The public keys of one issuer (JWK set, RFC 7517), fetched in the background.

    Known keys stay valid until the issuer answers with others, also while it is away. A token with an unknown key id
    causes a fetch, since the issuer may have new keys, but at most one in `retry_s`, however many tokens there are. A
    request waits for a fetch that is running, and for at most one.

    :param issuer: where to discover the address of the keys (OpenID Connect Discovery); only used without `url`
    :param url: the address of the keys
    :param refresh_s: seconds after which known keys are fetched again
    :param retry_s: seconds between two fetches if the first one failed, or was caused by an unknown key id
    :param timeout_s: time limit of a fetch, in seconds
    """

    def __init__(
        self,
        *,
        issuer: str | None,
        url: str | None,
        refresh_s: float = 300.0,
        retry_s: float = 10.0,
        timeout_s: float = 3.0,
    ) -> None:
        self._issuer = issuer
        self._url = url
        self._refresh_s = refresh_s
        self._retry_s = retry_s
        self._timeout_s = timeout_s
        self._http: AsyncHTTPClient | None = None
        self._keys: list[jwt.PyJWK] = []
        self._failure: str | None = None
        """Why the last fetch failed; None: it did not."""
        self._fetching: asyncio.Task[None] | None = None
        self._fetched_at = float("-inf")

    @property
    def is_ready(self) -> bool:
        return bool(self._keys)

    @property
    def version(self) -> object:
        return self._keys

    def start(self, background: Tasks) -> None:
        """Fetch the keys, and then again and again, as tasks of `background`."""
        self._background = background
        self._http = AsyncHTTPClient(
            force_instance=True,
            max_body_size=_MAX_BYTES,
            max_buffer_size=_MAX_BYTES,
            defaults={
                "follow_redirects": False,
                # A compressed answer could become larger than the limit.
                "decompress_response": False,
                # Later than the time limit of the fetch, which gives the failure that is logged.
                "request_timeout": self._timeout_s + 1,
            },
        )
        background.spawn(tasks.repeat(self._keep_fresh))

    async def close(self) -> None:
        # Fetch nothing from now on: requests are still answered while the server stops.
        self._fetched_at = float("inf")
        if self._http is not None:
            self._http.close()

    async def find(self, key_id: str | None) -> Sequence[jwt.PyJWK]:
        found = self._matching(key_id)
        if not found and (self._fetching or time.monotonic() - self._fetched_at >= self._retry_s):
            await self._fetch()
            found = self._matching(key_id)
        if found:
            return found
        if not self._keys:
            raise KeysUnavailable
        raise InvalidToken("unknown key")

    def _matching(self, key_id: str | None) -> Sequence[jwt.PyJWK]:
        if key_id is None:
            return self._keys if len(self._keys) == 1 else []
        return [key for key in self._keys if key.key_id == key_id]

    async def _keep_fresh(self) -> None:
        await self._fetch()
        await asyncio.sleep(self._refresh_s if self._failure is None else self._retry_s)

    async def _fetch(self) -> None:
        """Fetch the keys, or wait for the fetch that is running."""
        if self._fetching is None:
            self._fetched_at = time.monotonic()
            self._fetching = self._background.spawn(self._update())
        # Not awaited directly: a request that is cancelled must not cancel the others' fetch.
        await asyncio.wait([self._fetching])

    async def _update(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                keys = await self._download()
        except _FetchError as error:
            self._report(str(error), logging.ERROR if isinstance(error, _WrongIssuer) else logging.WARNING)
        except TimeoutError:
            self._report("no answer in time", logging.WARNING)
        else:
            self._keys = keys
            if self._failure is not None:
                self._failure = None
                logger.info("the issuer's keys are available again")
        finally:
            self._fetching = None

    def _report(self, failure: str, level: int) -> None:
        """Log why the keys cannot be fetched, once for an outage."""
        if failure != self._failure:
            self._failure = failure
            logger.log(level, "the issuer's keys cannot be fetched: %s", failure)

    async def _download(self) -> list[jwt.PyJWK]:
        """Return the issuer's usable keys.

        :raises _FetchError: if there are none
        """
        url = self._url or await self._discover(self._issuer or "")
        jwks = (await self._get(url)).get("keys")
        keys = [key for jwk in jwks if (key := usable_key(jwk)) is not None] if isinstance(jwks, list) else []
        if not keys:
            raise _FetchError("the issuer has no key of a kind that is supported")
        return keys

    async def _discover(self, issuer: str) -> str:
        configuration = await self._get(issuer.removesuffix("/") + "/.well-known/openid-configuration")
        if configuration.get("issuer") != issuer:
            raise _WrongIssuer(f"the issuer calls itself {str(configuration.get('issuer'))[:200]!r}, see AUTH_ISSUER")
        url = configuration.get("jwks_uri")
        if not isinstance(url, str) or not is_secure_address(url):
            raise _FetchError("the issuer's jwks_uri is not an https:// address")
        return url

    async def _get(self, url: str) -> dict[str, Any]:
        """Return the JSON object at an address.

        :raises _FetchError: if there is none
        """
        assert self._http is not None
        shown = url.partition("?")[0]  # the query may have a key of the provider's API
        request = self._http.fetch(url)
        # If this task is cancelled, the request continues, since Tornado logs an error if a cancelled one fails. Then
        # nothing else retrieves its exception.
        request.add_done_callback(lambda done: done.exception())
        try:
            answer = await asyncio.shield(request)
        # UnicodeError: an invalid host name; UnsatisfiableReadError: the head of the answer is too large.
        except (HTTPClientError, OSError, UnicodeError, UnsatisfiableReadError) as error:
            raise _FetchError(f"{shown}: {error}") from None
        try:
            document = json.loads(answer.body)
        except (ValueError, RecursionError):
            raise _FetchError(f"{shown} does not answer with JSON") from None
        if not isinstance(document, dict):
            raise _FetchError(f"{shown} does not answer with a JSON object")
        return document


class _FetchError(Exception):
    """The keys cannot be fetched; the text is for the operator."""


class _WrongIssuer(_FetchError):
    """The issuer at the configured address is another one, so that no later fetch will succeed."""


def usable_key(jwk: object) -> jwt.PyJWK | None:
    """Return a key that verifies signatures by one of `ALGORITHMS`; None if a member of a JWK set is none.

    Symmetric keys have none of them. Private keys are not usable: whoever has read one can sign.
    """
    if not isinstance(jwk, dict) or jwk.get("use", "sig") != "sig" or "d" in jwk:
        return None
    if jwk.get("alg") not in (None, *ALGORITHMS):
        return None
    try:
        key = jwt.PyJWK(jwk)
        key.Algorithm.prepare_key(key.key)  # the curve may not fit the algorithm
    except (jwt.PyJWTError, TypeError, KeyError):  # KeyError: a symmetric key without `k`
        return None
    if key.algorithm_name not in ALGORITHMS or key.Algorithm.check_key_length(key.key) is not None:
        return None
    return key
