"""Who sends a request: good, odd and forged credentials, without a server."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from hypothesis import given
from hypothesis import strategies as st
from tornado.httputil import HTTPHeaders

from chatserver.auth import Caller, Credential, find_credential, forwarded_owner, key_id, sign, verify
from chatserver.errors import InvalidToken, NoForwardedUser, TokenExpired, Unauthenticated
from chatserver.handlers.identity import TokenIdentity, make_identity
from chatserver.keys import Secrets
from chatserver.settings import Settings

NOW = 1_800_000_000
ISSUER = "https://login.example.com/"
SETTINGS = Settings(auth="jwt", auth_issuer=ISSUER, auth_audience="chat")
CLAIMS = {"iss": ISSUER, "aud": "chat", "sub": "alice", "exp": NOW + 600}

# -- tokens ----------------------------------------------------------------------------------------------------------

RSA = rsa.generate_private_key(65537, 2048)
WEAK = rsa.generate_private_key(65537, 1024)
FOREIGN = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
HEADER = {"alg": "RS256", "kid": "rsa"}


def public_jwk(key: Any, kid: str, alg: str) -> dict[str, Any]:
    algorithm = jwt.get_algorithm_by_name(alg)
    jwk: dict[str, Any] = json.loads(algorithm.to_jwk(key.public_key()))
    return {**jwk, "kid": kid, "alg": alg}


@cache
def keys() -> list[jwt.PyJWK]:
    return [
        jwt.PyJWK(public_jwk(RSA, "rsa", "RS256")),
        jwt.PyJWK(public_jwk(RSA, "pss", "PS256")),
        jwt.PyJWK(public_jwk(EC, "ec", "ES256")),
        jwt.PyJWK(public_jwk(ED, "ed", "EdDSA")),
        jwt.PyJWK(public_jwk(WEAK, "weak", "RS256")),
    ]


def encode(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(claims: object, header: object = HEADER, key: rsa.RSAPrivateKey = RSA) -> str:
    """Return a token with a right RS256 signature, whatever it holds; bytes are taken as they are."""
    text = f"{encode(header)}.{encode(claims)}"
    return f"{text}.{encode(key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA256()))}"


def with_mac(secret: bytes, header: dict[str, Any], claims: object = CLAIMS) -> str:
    text = f"{encode(header)}.{encode(claims)}"
    return f"{text}.{encode(hmac.new(secret, text.encode(), hashlib.sha256).digest())}"


def changed(**claims: object) -> str:
    return signed({**CLAIMS, **claims})


def without(name: str) -> str:
    return signed({key: value for key, value in CLAIMS.items() if key != name})


def text_claim(name: str, text: str) -> str:
    """Return a token with a claim whose value is a JSON text."""
    return signed(f"{json.dumps(CLAIMS)[:-1]}, {json.dumps(name)}: {text}}}".encode())


def caller_of(token: str, settings: Settings = SETTINGS, now: float = NOW) -> Caller:
    named = key_id(token)
    return verify(Credential(token, ambient=False), [key for key in keys() if key.key_id == named], settings, now)


PEM = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
MODULUS = base64.urlsafe_b64decode(public_jwk(RSA, "", "RS256")["n"] + "==")
FOREIGN_JWK = public_jwk(FOREIGN, "rsa", "RS256")
UNSIGNED = f"{encode(HEADER)}.{encode(CLAIMS)}."

ACCEPTED: dict[str, str] = {
    "RS256": signed(CLAIMS),
    "PS256": jwt.encode(CLAIMS, RSA, "PS256", {"kid": "pss"}),
    "ES256": jwt.encode(CLAIMS, EC, "ES256", {"kid": "ec"}),
    "EdDSA": jwt.encode(CLAIMS, ED, "EdDSA", {"kid": "ed"}),
    "several audiences": changed(aud=["other", "chat"]),
    "exp with a fraction": changed(exp=NOW + 600.5),
    "exp of 30 digits": changed(exp=10**30),
    "exp of 300 digits": changed(exp=10**300),
    "nbf in the past": changed(nbf=NOW - 1, iat=NOW - 1),
    "type JWT": signed(CLAIMS, {**HEADER, "typ": "JWT"}),
    "type at+jwt": signed(CLAIMS, {**HEADER, "typ": "at+jwt"}),
    "type application/at+JWT": signed(CLAIMS, {**HEADER, "typ": "application/at+JWT"}),
    "unknown claims": changed(scope="all", roles=[{}]),
    "sub twice: the last one": signed(
        json.dumps(CLAIMS).replace('"sub"', '"sub": "bob", "sub"').encode(),
    ),
    # The addresses of keys in a token are ignored.
    "jku of a token that our key has signed": signed(CLAIMS, {**HEADER, "jku": "http://127.0.0.1:1/", "x5u": "x"}),
}

REFUSED: dict[str, tuple[str, str]] = {
    # the signature
    "alg none": (f"{encode({'alg': 'none', 'kid': 'rsa'})}.{encode(CLAIMS)}.", "malformed"),
    "alg none, and a signature": (f"{encode({'alg': 'none', 'kid': 'rsa'})}.{encode(CLAIMS)}.AAAA", "algorithm"),
    "alg None": (signed(CLAIMS, {**HEADER, "alg": "None"}), "algorithm"),
    "alg rs256": (signed(CLAIMS, {**HEADER, "alg": "rs256"}), "algorithm"),
    "alg absent": (signed(CLAIMS, {"kid": "rsa"}), "algorithm"),
    "alg a list": (signed(CLAIMS, {**HEADER, "alg": ["RS256"]}), "algorithm"),
    "alg an object": (signed(CLAIMS, {**HEADER, "alg": {}}), "algorithm"),
    "HS256 with the public key in PEM": (with_mac(PEM, {"alg": "HS256", "kid": "rsa"}), "algorithm"),
    "HS256 with the modulus": (with_mac(MODULUS, {"alg": "HS256", "kid": "rsa"}), "algorithm"),
    "RS256 with an EC key's id": (signed(CLAIMS, {**HEADER, "kid": "ec"}), "algorithm"),
    "RS256 with a PS256 key's id": (signed(CLAIMS, {**HEADER, "kid": "pss"}), "algorithm"),
    "foreign key": (signed(CLAIMS, key=FOREIGN), "signature"),
    "foreign key in the header": (signed(CLAIMS, {**HEADER, "jwk": FOREIGN_JWK}, FOREIGN), "signature"),
    "address of a foreign key": (signed(CLAIMS, {**HEADER, "jku": "http://127.0.0.1:1/"}, FOREIGN), "signature"),
    "certificate's address": (signed(CLAIMS, {**HEADER, "x5u": "http://127.0.0.1:1/"}, FOREIGN), "signature"),
    "key of 1,024 bits": (signed(CLAIMS, {**HEADER, "kid": "weak"}, WEAK), "malformed"),
    "other claims under a signature": (
        f"{encode(HEADER)}.{encode({**CLAIMS, 'sub': 'bob'})}.{signed(CLAIMS).rpartition('.')[2]}",
        "signature",
    ),
    "no signature": (UNSIGNED, "malformed"),
    "signature of zeros": (
        f"{encode({'alg': 'ES256', 'kid': 'ec'})}.{encode(CLAIMS)}.{encode(bytes(64))}",
        "signature",
    ),
    "short EC signature": (f"{encode({'alg': 'ES256', 'kid': 'ec'})}.{encode(CLAIMS)}.AAAA", "signature"),
    "short RSA signature": (f"{UNSIGNED}AAAA", "signature"),
    "short EdDSA signature": (f"{encode({'alg': 'EdDSA', 'kid': 'ed'})}.{encode(CLAIMS)}.AAAA", "signature"),
    "unknown kid": (signed(CLAIMS, {**HEADER, "kid": "other"}), "unknown key"),
    "kid a path": (signed(CLAIMS, {**HEADER, "kid": "../../dev/null"}), "unknown key"),
    "kid empty": (signed(CLAIMS, {**HEADER, "kid": ""}), "unknown key"),
    "kid a number": (signed(CLAIMS, {**HEADER, "kid": 1}), "malformed"),
    "kid null": (signed(CLAIMS, {**HEADER, "kid": None}), "malformed"),
    "kid a list": (signed(CLAIMS, {**HEADER, "kid": ["rsa"]}), "malformed"),
    "kid an object": (signed(CLAIMS, {**HEADER, "kid": {}}), "malformed"),
    "unknown critical extension": (signed(CLAIMS, {**HEADER, "crit": ["x"], "x": 1}), "malformed"),
    "critical extensions of an odd kind": (signed(CLAIMS, {**HEADER, "crit": [[]]}), "malformed"),
    "payload that is not encoded": (signed(CLAIMS, {**HEADER, "crit": ["b64"], "b64": False}), "malformed"),
    "type logout+jwt": (signed(CLAIMS, {**HEADER, "typ": "logout+jwt"}), "type"),
    "type a list": (signed(CLAIMS, {**HEADER, "typ": ["JWT"]}), "type"),
    # the form
    "empty": ("", "malformed"),
    "dots": ("..", "malformed"),
    "no dot": ("token", "malformed"),
    "two parts": (signed(CLAIMS).rpartition(".")[0], "malformed"),
    "four parts": (signed(CLAIMS) + ".AAAA", "malformed"),
    "five parts (JWE)": ("a.b.c.d.e", "malformed"),
    "space before": (" " + signed(CLAIMS), "malformed"),
    "line break behind": (signed(CLAIMS) + "\n", "malformed"),
    "padding": (signed(CLAIMS) + "==", "malformed"),
    "not ASCII": (signed(CLAIMS) + "é", "malformed"),
    "half a surrogate pair": (signed(CLAIMS) + "\ud800", "malformed"),
    "two tokens": (f"{signed(CLAIMS)}, Bearer {signed(CLAIMS)}", "malformed"),
    "header not JSON": (signed(CLAIMS, b"x"), "malformed"),
    "header a list": (signed(CLAIMS, [1]), "malformed"),
    "header deep": (signed(CLAIMS, b"[" * 5000 + b"]" * 5000), "malformed"),
    "header not UTF-8": (signed(CLAIMS, b'{"alg": "\xff"}'), "malformed"),
    "claims not JSON": (signed(b"x"), "malformed"),
    "claims a list": (signed([1]), "malformed"),
    "claims not UTF-8": (signed(b'{"sub": "\xff"}'), "malformed"),
    "claims deep": (signed(b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}"), "malformed"),
    # the times
    "exp absent": (without("exp"), "no exp"),
    "exp null": (changed(exp=None), "no exp"),
    "exp a text": (changed(exp=str(NOW + 600)), "exp is not a time"),
    "exp true": (changed(exp=True), "exp is not a time"),
    "exp a list": (changed(exp=[NOW + 600]), "exp is not a time"),
    "exp NaN": (text_claim("exp", "NaN"), "exp is not a time"),
    "exp infinite": (text_claim("exp", "1e400"), "exp is not a time"),
    "exp of 400 digits": (changed(exp=10**400), "exp is not a time"),
    "exp of 5,000 digits": (text_claim("exp", "9" * 5000), "malformed"),
    "nbf in an hour": (changed(nbf=NOW + 3600), "nbf is in the future"),
    "nbf a text": (changed(nbf="x"), "nbf is not a time"),
    "nbf null": (changed(nbf=None), "nbf is not a time"),
    "iat in an hour": (changed(iat=NOW + 3600), "iat is in the future"),
    "iat a text": (changed(iat="x"), "iat is not a time"),
    # issuer and audience
    "iss other": (changed(iss="https://login.example.org/"), "wrong issuer"),
    "iss without the slash": (changed(iss=ISSUER[:-1]), "wrong issuer"),
    "iss empty": (changed(iss=""), "wrong issuer"),
    "iss a list": (changed(iss=[ISSUER]), "wrong issuer"),
    "iss absent": (without("iss"), "no iss"),
    "aud other": (changed(aud="other"), "wrong audience"),
    "aud longer": (changed(aud="chatty"), "wrong audience"),
    "aud a part": (changed(aud=["ch"]), "wrong audience"),
    "aud a number": (changed(aud=1), "wrong audience"),
    "aud with a number": (changed(aud=["chat", 1]), "wrong audience"),
    "aud absent": (without("aud"), "no aud"),
    "aud empty": (changed(aud=[]), "no aud"),
    # the owner
    "sub absent": (without("sub"), "no sub"),
    "sub null": (changed(sub=None), "no sub"),
    "sub a number": (changed(sub=7), "sub is not a valid owner"),
    "sub true": (changed(sub=True), "sub is not a valid owner"),
    "sub a list": (changed(sub=["alice"]), "sub is not a valid owner"),
    "sub an object": (changed(sub={"$ne": None}), "sub is not a valid owner"),
    "sub empty": (changed(sub=""), "sub is not a valid owner"),
    "sub of 256 characters": (changed(sub="a" * 256), "sub is not a valid owner"),
    "sub with NUL": (changed(sub="alice\0"), "sub is not a valid owner"),
    "sub with a line break": (changed(sub="alice\n"), "sub is not a valid owner"),
    "sub with a control character of Latin-1": (changed(sub="alice\x85"), "sub is not a valid owner"),
    "sub with half a surrogate pair": (changed(sub="alice\ud800"), "sub is not a valid owner"),
}


@pytest.mark.parametrize("token", ACCEPTED.values(), ids=ACCEPTED)
def test_token_is_accepted(token: str) -> None:
    caller = caller_of(token)

    assert caller.owner == "alice" and not caller.ambient
    assert NOW + 600 < caller.expires_at < 2**40


@pytest.mark.parametrize(("token", "reason"), REFUSED.values(), ids=REFUSED)
def test_token_is_refused_with_a_reason_that_does_not_quote_it(token: str, reason: str) -> None:
    with pytest.raises(InvalidToken) as raised:
        caller_of(token)

    assert reason in raised.value.reason and len(raised.value.reason) < 60
    assert raised.value.detail == InvalidToken.default_detail


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["RS256", "rsa", "chat", ISSUER]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jwk", "zip"]), json_values),
    st.dictionaries(st.sampled_from(["iss", "aud", "sub", "exp", "nbf", "iat", "jti"]), json_values),
    st.booleans(),
)
def test_any_header_and_claims_are_accepted_or_refused(
    header: dict[str, Any], claims: dict[str, Any], keep: bool
) -> None:
    token = signed({**CLAIMS, **claims}, {**HEADER, **header} if keep else header)

    try:
        caller = caller_of(token)
    except (InvalidToken, TokenExpired):
        return
    assert caller.owner


@given(st.text())
def test_any_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidToken):
        caller_of(text)


@pytest.mark.parametrize("owner", ["$gt", "a.b", "zoë", "王", "😀", "a b", "auth0|1", "a" * 255, "{}", "null"])
def test_owner_is_taken_as_it_is(owner: str) -> None:
    assert caller_of(changed(sub=owner)).owner == owner


def test_configured_claim_names_the_owner() -> None:
    settings = Settings(auth="jwt", auth_audience="chat", auth_owner_claim="oid")

    assert caller_of(changed(oid="1-2", sub=7), settings).owner == "1-2"
    with pytest.raises(InvalidToken):
        caller_of(changed(), settings)


@pytest.mark.parametrize(
    ("claims", "accepted"),
    [
        ({"azp": "web", "use": "access"}, True),
        ({"azp": "web", "use": "id"}, False),
        ({"azp": "web"}, False),
        ({"azp": ["web"], "use": "access"}, False),
    ],
)
def test_required_claims_are_compared(claims: dict[str, object], accepted: bool) -> None:
    settings = Settings(auth="jwt", auth_issuer=ISSUER, auth_required_claims=(("azp", "web"), ("use", "access")))

    # Without AUTH_AUDIENCE the audience does not matter.
    if accepted:
        assert caller_of(changed(aud="other", **claims), settings).owner == "alice"
    else:
        with pytest.raises(InvalidToken) as raised:
            caller_of(changed(**claims), settings)
        assert raised.value.reason in ("wrong azp", "wrong use")


# -- the time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "accepted"), [(-600, True), (29, True), (29.9, True), (30, False), (31, False)])
def test_token_expires_after_the_leeway(seconds: float, accepted: bool) -> None:
    token = changed(exp=NOW)

    if accepted:
        assert caller_of(token, now=NOW + seconds).expires_at == NOW + 30
    else:
        with pytest.raises(TokenExpired):
            caller_of(token, now=NOW + seconds)


@pytest.mark.parametrize("claim", ["nbf", "iat"])
def test_token_is_valid_before_its_time_within_the_leeway(claim: str) -> None:
    token = changed(**{claim: NOW})

    assert caller_of(token, now=NOW - 30).owner == "alice"
    with pytest.raises(InvalidToken):
        caller_of(token, now=NOW - 31)


def test_expired_token_is_only_called_expired_if_nothing_else_is_wrong() -> None:
    for wrong in ({"aud": "other"}, {"sub": ""}, {"nbf": NOW + 3600}, {"iss": "x"}):
        with pytest.raises(InvalidToken):
            caller_of(changed(exp=NOW - 60, **wrong))
    with pytest.raises(InvalidToken):
        caller_of(signed({**CLAIMS, "exp": NOW - 60}, key=FOREIGN))


# -- secrets ---------------------------------------------------------------------------------------------------------

SECRETS = ("n" * 32, "o" * 40)
BY_SECRET = Settings(auth="jwt", auth_secret=SECRETS)


async def secret_caller(token: str, settings: Settings = BY_SECRET) -> Caller:
    keys = await Secrets(settings.auth_secret).find(key_id(token))
    return verify(Credential(token, ambient=False), keys, settings, NOW)


@pytest.mark.gen_test
async def test_each_of_the_secrets_verifies_tokens() -> None:
    for secret in SECRETS:
        token = jwt.encode({"sub": "alice", "exp": NOW + 1}, secret, "HS256", {"kid": "any"})
        assert await secret_caller(token) == Caller("alice", ambient=False, expires_at=NOW + 31.0)


@pytest.mark.gen_test
@pytest.mark.parametrize(
    "token",
    [
        jwt.encode(CLAIMS, "another secret of 32 characters!!", "HS256"),
        jwt.encode(CLAIMS, "n" * 64, "HS512"),
        jwt.encode(CLAIMS, SECRETS[0] + SECRETS[1], "HS256"),
        jwt.encode(CLAIMS, ",".join(SECRETS), "HS256"),
        with_mac(b"", {"alg": "HS256"}),
        with_mac(SECRETS[0].encode(), {"alg": "HS384"}),
        f"{encode({'alg': 'none'})}.{encode(CLAIMS)}.AAAA",
        signed(CLAIMS),
    ],
)
async def test_secrets_verify_nothing_but_hs256(token: str) -> None:
    with pytest.raises(InvalidToken):
        await secret_caller(token)


@pytest.mark.gen_test
async def test_signed_token_is_accepted_with_the_same_settings() -> None:
    settings = Settings(
        auth="jwt",
        auth_secret=SECRETS,
        auth_audience="chat",
        auth_owner_claim="uid",
        auth_required_claims=(("a", "b"),),
    )

    assert await secret_caller(sign("zoë", settings, NOW + 60), settings) == Caller(
        "zoë", ambient=False, expires_at=NOW + 90.0
    )


# -- where the token is ----------------------------------------------------------------------------------------------


def headers(*lines: tuple[str, str]) -> HTTPHeaders:
    found = HTTPHeaders()
    for name, value in lines:
        found.add(name, value)
    return found


BEARER, COOKIE = ("Authorization", "Bearer h.h.h"), ("Cookie", "a=b; __Host-token=c.c.c; d")


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([BEARER], Credential("h.h.h", ambient=False)),
        ([("authorization", "bEARER   h.h.h")], Credential("h.h.h", ambient=False)),
        ([COOKIE], Credential("c.c.c", ambient=True)),
        ([BEARER, COOKIE], Credential("h.h.h", ambient=False)),
        ([("Authorization", "Bearer bad"), COOKIE], Credential("bad", ambient=False)),
        ([("Cookie", "a=b"), ("Cookie", "__Host-token=c.c.c")], Credential("c.c.c", ambient=True)),
        ([("Cookie", '__Host-token="c.c.c"')], Credential('"c.c.c"', ambient=True)),
    ],
)
def test_credential_is_found(lines: list[tuple[str, str]], found: Credential) -> None:
    assert find_credential(headers(*lines), "__Host-token") == found


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([], Unauthenticated),
        ([BEARER, BEARER], Unauthenticated),
        ([("Authorization", "")], Unauthenticated),
        ([("Authorization", "Bearer")], Unauthenticated),
        ([("Authorization", "Basic YTpi")], Unauthenticated),
        ([("Authorization", "Basic YTpi"), COOKIE], Unauthenticated),
        ([("Authorization", ""), COOKIE], Unauthenticated),
        ([("Authorization", "h.h.h"), COOKIE], Unauthenticated),
        (
            [("X-Authorization", "Bearer h.h.h"), ("Token", "h.h.h"), ("X_Authorization", "Bearer h.h.h")],
            Unauthenticated,
        ),
        ([("Cookie", "__Host-token=")], Unauthenticated),
        ([("Cookie", "__host-token=c.c.c; token=c.c.c")], Unauthenticated),
        ([("Cookie", "__Host-token=c.c.c; __Host-token=c.c.c")], InvalidToken),
        ([("Cookie", "__Host-token=c.c.c; __Host-token=")], InvalidToken),
        ([COOKIE, COOKIE], InvalidToken),
    ],
)
def test_no_credential_is_found(lines: list[tuple[str, str]], error: type[Unauthenticated]) -> None:
    with pytest.raises(error) as raised:
        find_credential(headers(*lines), "__Host-token")

    assert type(raised.value) is error and "h.h.h" not in raised.value.reason


def test_cookie_is_ignored_if_none_is_configured() -> None:
    with pytest.raises(Unauthenticated):
        find_credential(headers(COOKIE), None)


def test_repr_of_a_credential_hides_the_token() -> None:
    assert "h.h.h" not in repr(find_credential(headers(BEARER), None))


# -- a proxy ---------------------------------------------------------------------------------------------------------

USER = "X-Forwarded-User"


@pytest.mark.parametrize(
    ("value", "owner"),
    [
        ("alice", "alice"),
        ("zoë".encode().decode("latin-1"), "zoë"),
        ("a@example.com", "a@example.com"),
        ("a" * 255,) * 2,
    ],
)
def test_proxy_names_the_owner(value: str, owner: str) -> None:
    assert forwarded_owner(headers((USER.lower(), value), ("X_Forwarded_User", "bob")), USER) == owner


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [(USER, "")],
        [(USER, "alice"), (USER, "bob")],
        [(USER, "alice"), (USER, "alice")],
        [(USER, "alice,bob")],
        [(USER, "alice, bob")],
        [("X_Forwarded_User", "bob")],
        [("X-Forwarded-User-Id", "bob"), ("X-Forwarded-Email", "bob"), ("Authorization", "Bearer bob")],
        [(USER, "a" * 256)],
        [(USER, "a\tb")],
        [(USER, "zo\xeb")],
        [(USER, "a\x85")],
    ],
)
def test_proxy_names_no_owner(lines: list[tuple[str, str]]) -> None:
    with pytest.raises(NoForwardedUser):
        forwarded_owner(headers(*lines), USER)


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("peer", "trusted"),
    [("10.1.2.3", True), ("127.0.0.1", True), ("::1", True), ("10.2.0.1", False), ("", False), ("localhost", False)],
)
async def test_only_a_trusted_peer_names_the_owner(peer: str, trusted: bool) -> None:
    identity = make_identity(Settings(auth="proxy", trusted_proxies=("127.0.0.1", "10.1.0.0/16", "::1")))
    request = headers((USER, "alice"), ("X-Forwarded-For", "127.0.0.1"), ("X-Real-Ip", "127.0.0.1"))

    if trusted:
        assert await identity.identify(request, peer) == Caller("alice", ambient=True)
    else:
        with pytest.raises(NoForwardedUser):
            await identity.identify(request, peer)


@pytest.mark.gen_test
async def test_without_auth_all_callers_are_the_same() -> None:
    identity = make_identity(Settings())

    assert identity.is_ready
    assert await identity.identify(headers(BEARER, (USER, "alice")), "10.0.0.1") == Caller(None, ambient=True)


@pytest.mark.gen_test
async def test_cookie_counts_as_ambient_and_the_header_does_not() -> None:
    identity = make_identity(Settings(auth="jwt", auth_secret=SECRETS, auth_cookie="token"))
    token = sign("alice", BY_SECRET, 2**40)

    assert (await identity.identify(headers(("Cookie", f"token={token}")), "")).ambient
    assert not (await identity.identify(headers(("Authorization", f"Bearer {token}")), "")).ambient


class CountedKeys(Secrets):
    """Secrets that can be replaced, and count how often they are asked for."""

    def __init__(self) -> None:
        super().__init__(SECRETS)
        self.finds = 0

    async def find(self, key_id: str | None) -> Sequence[jwt.PyJWK]:
        self.finds += 1
        return await super().find(key_id)

    def replace(self, *secrets: str) -> None:
        super().__init__(secrets)


def bearer(token: str) -> HTTPHeaders:
    return headers(("Authorization", f"Bearer {token}"))


@pytest.mark.gen_test
async def test_verified_token_is_not_verified_again_until_the_keys_change() -> None:
    keys = CountedKeys()
    identity = TokenIdentity(BY_SECRET, keys)
    token = sign("alice", BY_SECRET, 2**40)
    for _ in range(3):
        assert (await identity.identify(bearer(token), "")).owner == "alice"
    assert keys.finds == 1
    assert (await identity.identify(bearer(sign("bob", BY_SECRET, 2**40)), "")).owner == "bob"
    forged = token[:-10] + ("B" if token[-10] == "A" else "A") + token[-9:]
    with pytest.raises(InvalidToken):
        await identity.identify(bearer(forged), "")
    assert keys.finds == 3

    keys.replace("x" * 32)

    with pytest.raises(InvalidToken):
        await identity.identify(bearer(token), "")


@pytest.mark.gen_test
async def test_remembered_token_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = TokenIdentity(BY_SECRET, CountedKeys())
    token = sign("alice", BY_SECRET, NOW)
    for now in (NOW, NOW + 29.9):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        assert (await identity.identify(bearer(token), "")).expires_at == NOW + 30
    monkeypatch.setattr(time, "time", lambda: NOW + 30.0)
    with pytest.raises(TokenExpired):
        await identity.identify(bearer(token), "")


@pytest.mark.gen_test
async def test_number_of_remembered_tokens_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatserver.handlers.identity._MAX_VERIFIED", 2)
    keys = CountedKeys()
    identity = TokenIdentity(BY_SECRET, keys)
    tokens = [sign(f"owner {number}", BY_SECRET, 2**40) for number in range(3)]
    for token in (*tokens, tokens[1], tokens[2]):
        await identity.identify(bearer(token), "")
    assert keys.finds == 3 and len(identity._verified) == 2


def test_repr_of_the_parts_hides_the_secrets() -> None:
    identity = make_identity(BY_SECRET)

    assert SECRETS[0] not in repr([identity, vars(identity), Secrets(SECRETS), vars(Secrets(SECRETS))])
