"""Who sends a request: pure functions of its headers, of keys and of the time."""

import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jwt
from tornado.httputil import HTTPHeaders

from chatserver.errors import InvalidToken, NoForwardedUser, TokenExpired, Unauthenticated
from chatserver.settings import Settings

_JWS = re.compile(r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+){2}")
_OWNER = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,255}")
_TYPES = ("jwt", "at+jwt")
"""The values of `typ` that access tokens have (RFC 7519, 5.1, and RFC 9068), in lower case."""
_LATEST = 253_402_300_799.0
"""The last second of the year 9999: no later time fits into a date, or into a timer."""
_REASONS: dict[type[jwt.PyJWTError], str] = {
    jwt.InvalidAlgorithmError: "the key has another algorithm",
    jwt.InvalidSignatureError: "wrong signature",
    jwt.InvalidAudienceError: "wrong audience",
    jwt.InvalidIssuerError: "wrong issuer",
}


class Caller(NamedTuple):
    """Who sends a request.

    :ivar owner: the owner of the caller's conversations; None only with AUTH=none
    :ivar ambient: whether a browser adds the credential by itself, so that a page of another site can use it
    :ivar expires_at: when the credential expires, leeway included, in seconds since 1970
    """

    owner: str | None
    ambient: bool
    expires_at: float = math.inf


class Credential(NamedTuple):
    """A token of a request, which is not verified yet.

    :ivar ambient: whether it comes from a cookie
    """

    token: str
    ambient: bool

    def __repr__(self) -> str:
        return f"Credential(token=[hidden], ambient={self.ambient})"


def find_credential(headers: HTTPHeaders, cookie: str | None) -> Credential:
    """Return the token of a request. If there is an Authorization header, the cookie is ignored.

    :param cookie: the name of the cookie that may hold the token; None: no cookie may
    :raises Unauthenticated: if there is no token
    :raises InvalidToken: if the cookie is there more than once, since a page of a sibling domain can add one
    """
    values = headers.get_list("Authorization")
    if len(values) > 1:
        raise Unauthenticated("more than one Authorization header")
    if values:
        scheme, _, token = values[0].partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated("the Authorization header has another scheme than Bearer")
        ambient = False
    else:
        tokens = _cookies(headers, cookie) if cookie is not None else []
        if len(tokens) > 1:
            raise InvalidToken("more than one cookie of that name")
        token = tokens[0] if tokens else ""
        ambient = True
    token = token.lstrip(" ")
    if not token:
        raise Unauthenticated("no token")
    return Credential(token, ambient)


def _cookies(headers: HTTPHeaders, name: str) -> list[str]:
    """Return the values of all the cookies of a name (RFC 6265, 4.2.1)."""
    pairs = [pair.strip().partition("=") for each in headers.get_list("Cookie") for pair in each.split(";")]
    return [value for key, _, value in pairs if key == name]


def key_id(token: str) -> str | None:
    """Return the id of the key that a token names, if it names one. The token is not verified.

    :raises InvalidToken: if it is not a signed token (RFC 7515, 7.1)
    """
    if _JWS.fullmatch(token) is None:
        raise InvalidToken("malformed")
    try:
        kid: str | None = jwt.get_unverified_header(token).get("kid")
    except jwt.PyJWTError as error:
        raise InvalidToken(_reason(error)) from None
    return kid


def verify(credential: Credential, keys: Iterable[jwt.PyJWK], settings: Settings, now: float) -> Caller:
    """Return the caller that a token names, if one of the keys has signed it and all its claims are as configured.

    The keys decide which algorithm is used, never the token. Times are valid with a difference of `AUTH_LEEWAY_S`.

    :param credential: whose token `key_id` has accepted
    :param now: in seconds since 1970
    :raises InvalidToken: if anything is wrong
    :raises TokenExpired: if nothing else is wrong
    """
    header, claims = _decode(credential.token, keys, settings)
    if str(header.get("typ", "jwt")).lower().removeprefix("application/") not in _TYPES:
        raise InvalidToken("another type of token")
    for name, value in settings.auth_required_claims:
        if claims.get(name) != value:
            raise InvalidToken(f"wrong {name}")
    owner = claims[settings.auth_owner_claim]
    if not _is_owner(owner):
        raise InvalidToken(f"{settings.auth_owner_claim} is not a valid owner")
    for name in ("nbf", "iat"):
        if name in claims and _time(claims, name) > now + settings.auth_leeway_s:
            raise InvalidToken(f"{name} is in the future")
    expires_at = min(_time(claims, "exp") + settings.auth_leeway_s, _LATEST)
    if now >= expires_at:
        raise TokenExpired("expired")
    return Caller(owner, credential.ambient, expires_at)


def _decode(token: str, keys: Iterable[jwt.PyJWK], settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the header and the claims of a token that one of the keys has signed.

    PyJWT compares issuer and audience. It does not check times, since it takes `"1700000000"` and `true` for one.
    """
    options: jwt.types.Options = {
        "require": ["exp", settings.auth_owner_claim],
        "verify_aud": settings.auth_audience is not None,
        "verify_exp": False,
        "verify_nbf": False,
        "verify_iat": False,
        "verify_sub": False,
        "verify_jti": False,
        "enforce_minimum_key_length": True,
    }
    reason = "unknown key"
    for key in keys:
        try:
            decoded = jwt.decode_complete(
                token, key, options=options, audience=settings.auth_audience, issuer=settings.auth_issuer
            )
        except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError) as error:
            reason = _reason(error)  # another key may fit
        except jwt.PyJWTError as error:
            raise InvalidToken(_reason(error)) from None
        else:
            return decoded["header"], decoded["payload"]
    raise InvalidToken(reason)


def _reason(error: jwt.PyJWTError) -> str:
    """Return what is wrong with a token. PyJWT's own texts may quote the token."""
    if isinstance(error, jwt.MissingRequiredClaimError):
        return f"no {error.claim}"
    return _REASONS.get(type(error), "malformed")


def _time(claims: dict[str, Any], name: str) -> float:
    """Return a claim that is a time, in seconds since 1970.

    :raises InvalidToken: if it is not a finite number
    """
    value = claims[name]
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            seconds = float(value)
        except OverflowError:  # an integer of more than 308 digits
            seconds = math.inf
        if math.isfinite(seconds):
            return seconds
    raise InvalidToken(f"{name} is not a time")


def forwarded_owner(headers: HTTPHeaders, name: str) -> str:
    """Return the owner that a trusted proxy names in a header.

    A comma is refused: it may be the trace of a second header that was joined to the first one.

    :param name: the header's; a name with `_` in place of `-` is another header
    :raises NoForwardedUser: if the header is not there exactly once, or is not a valid owner in UTF-8
    """
    values = headers.get_list(name)
    if len(values) != 1:
        raise NoForwardedUser(f"{len(values)} headers {name}")
    try:
        owner = values[0].encode("latin-1").decode("utf-8")  # Tornado reads headers as Latin-1
    except UnicodeError:
        raise NoForwardedUser(f"{name} is not valid UTF-8") from None
    if "," in owner or not _is_owner(owner):
        raise NoForwardedUser(f"{name} is not a valid owner")
    return owner


def _is_owner(value: object) -> bool:
    """Return whether a value is a text of 1 to 255 characters without control characters and unpaired surrogates."""
    return isinstance(value, str) and _OWNER.fullmatch(value) is not None


def sign(owner: str, settings: Settings, expires_at: int) -> str:
    """Return a token that `verify` accepts with the same settings, signed with the first secret of `AUTH_SECRET`.

    :param expires_at: in seconds since 1970
    :raises ValueError: if the owner is not valid
    """
    if not _is_owner(owner):
        raise ValueError("an owner has 1 to 255 characters, and no control characters")
    claims: dict[str, Any] = {**dict(settings.auth_required_claims), settings.auth_owner_claim: owner}
    if settings.auth_audience is not None:
        claims["aud"] = settings.auth_audience
    return jwt.encode({**claims, "exp": expires_at}, settings.auth_secret[0], algorithm="HS256")
