"""The keys of an issuer: fetched in the background, kept in an outage, replaced when they rotate."""

import asyncio
import gzip
import json
import logging
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from hypothesis import given
from hypothesis import strategies as st
from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPHeaders
from tornado.ioloop import IOLoop
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

from chatserver.errors import InvalidToken, KeysUnavailable
from chatserver.handlers.identity import TokenIdentity, make_identity
from chatserver.keys import ALGORITHMS, IssuerKeys, usable_key
from chatserver.settings import Settings
from chatserver.tasks import Tasks
from tests.processes import ROOT

OUTAGE = "the issuer's keys cannot be fetched"
RSA = rsa.generate_private_key(65537, 2048)


def jwk_of(key: Any, **members: object) -> dict[str, Any]:
    algorithm = {rsa.RSAPrivateKey: "RS256", ec.EllipticCurvePrivateKey: "ES256", ed448.Ed448PrivateKey: "EdDSA"}
    name = next(name for kind, name in algorithm.items() if isinstance(key, kind))
    return {**json.loads(jwt.get_algorithm_by_name(name).to_jwk(key.public_key())), "kid": "1", **members}


JWK = jwk_of(RSA)


class Issuer:
    """An identity provider on a socket of this process.

    :ivar body: the answer to a request for the keys
    :ivar asked: the number of these requests
    """

    def __init__(self) -> None:
        self.body: str | bytes = json.dumps({"keys": [JWK]})
        self.status = 200
        self.headers: dict[str, str] = {}
        self.configuration: object = None
        self.asked = 0
        self.gate = asyncio.Event()
        self.gate.set()
        issuer = self

        class Keys(RequestHandler):
            async def get(self) -> None:
                issuer.asked += 1
                await issuer.gate.wait()
                self.set_status(issuer.status)
                for name, value in issuer.headers.items():
                    self.set_header(name, value)
                self.finish(issuer.body)

        class Configuration(RequestHandler):
            def get(self) -> None:
                self.finish(json.dumps(issuer.configuration))

        self.server = HTTPServer(
            Application(
                [
                    ("/keys", Keys),
                    ("/tenant/.well-known/openid-configuration", Configuration),
                ],
                log_function=lambda _: None,
            )
        )
        sock, port = bind_unused_port()
        self.server.add_socket(sock)
        self.url = f"http://127.0.0.1:{port}/keys"
        self.name = f"http://127.0.0.1:{port}/tenant/"
        self.configuration = {"issuer": self.name, "jwks_uri": self.url}

    def publish(self, *jwks: object) -> None:
        self.body = json.dumps({"keys": jwks})


@pytest.fixture
def issuer(io_loop: IOLoop) -> Iterator[Issuer]:
    issuer = io_loop.run_sync(_make_issuer)
    yield issuer
    issuer.gate.set()
    issuer.server.stop()
    io_loop.run_sync(issuer.server.close_all_connections)


async def _make_issuer() -> Issuer:
    return Issuer()


MakeKeys = Callable[..., IssuerKeys]


@pytest.fixture
def make_keys(io_loop: IOLoop) -> Iterator[MakeKeys]:
    """Return a function that starts keys; without a background fetch after the first one, unless a test wants some."""
    started: list[tuple[IssuerKeys, Tasks]] = []

    def make(url: str | None = None, issuer: str | None = None, **intervals: float) -> IssuerKeys:
        keys = IssuerKeys(issuer=issuer, url=url, **{"refresh_s": 60.0, "retry_s": 60.0, "timeout_s": 5.0, **intervals})
        started.append((keys, Tasks()))
        keys.start(started[-1][1])
        return keys

    yield make
    for keys, background in started:
        io_loop.run_sync(background.close)
        io_loop.run_sync(keys.close)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def until_raises(error: type[Exception], find: Callable[[], Awaitable[object]]) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                await find()
            except error:
                return
            await asyncio.sleep(0.005)


# -- start -----------------------------------------------------------------------------------------------------------


@pytest.mark.gen_test
async def test_many_requests_at_a_cold_start_wait_for_one_fetch(issuer: Issuer, make_keys: MakeKeys) -> None:
    issuer.gate.clear()
    keys = make_keys(issuer.url)
    finding = [asyncio.create_task(_find(keys)) for _ in range(100)]
    await until(lambda: issuer.asked > 0)
    assert not keys.is_ready
    issuer.gate.set()

    assert await asyncio.gather(*finding) == ["1"] * 100
    assert issuer.asked == 1 and keys.is_ready


async def _find(keys: IssuerKeys, key_id: str | None = "1") -> str | None:
    (found,) = await keys.find(key_id)
    return found.key_id


@pytest.mark.gen_test
async def test_request_that_is_cancelled_does_not_cancel_the_fetch(issuer: Issuer, make_keys: MakeKeys) -> None:
    issuer.gate.clear()
    keys = make_keys(issuer.url)
    first, second = (asyncio.create_task(_find(keys)) for _ in range(2))
    await until(lambda: issuer.asked > 0)

    first.cancel()
    await asyncio.sleep(0)
    issuer.gate.set()

    assert await second == "1" and issuer.asked == 1


@pytest.mark.gen_test
@pytest.mark.expects_log(OUTAGE)
async def test_issuer_that_has_never_answered_is_tried_until_it_does(
    issuer: Issuer, make_keys: MakeKeys, caplog: pytest.LogCaptureFixture
) -> None:
    issuer.status = 503
    keys = make_keys(issuer.url, retry_s=0.01)
    with pytest.raises(KeysUnavailable):
        await keys.find("1")
    await until(lambda: issuer.asked > 3)
    assert not keys.is_ready
    issuer.status = 200

    await until(lambda: keys.is_ready)

    # Once for an outage, not for each attempt.
    assert [record.getMessage() for record in caplog.records if OUTAGE in record.getMessage()] == [
        f"{OUTAGE}: {issuer.url}: HTTP 503: Service Unavailable"
    ]
    assert await _find(keys) == "1"


@pytest.mark.gen_test
@pytest.mark.expects_log(OUTAGE)
async def test_requests_between_two_attempts_are_refused_at_once(issuer: Issuer, make_keys: MakeKeys) -> None:
    issuer.status = 404
    keys = make_keys(issuer.url)

    for _ in range(5):
        with pytest.raises(KeysUnavailable):
            await keys.find("1")

    assert issuer.asked == 1


@pytest.mark.gen_test
@pytest.mark.expects_log(OUTAGE)
async def test_port_that_nobody_listens_on_is_an_outage(make_keys: MakeKeys) -> None:
    sock, port = bind_unused_port()
    sock.close()

    with pytest.raises(KeysUnavailable):
        await make_keys(f"http://127.0.0.1:{port}/").find("1")


# -- rotation --------------------------------------------------------------------------------------------------------


@pytest.mark.gen_test
@pytest.mark.parametrize(("status", "body"), [(500, ""), (200, "{"), (200, "[]")])
@pytest.mark.expects_log(OUTAGE)
async def test_query_of_the_address_is_not_logged(
    issuer: Issuer, make_keys: MakeKeys, caplog: pytest.LogCaptureFixture, status: int, body: str
) -> None:
    issuer.status, issuer.body = status, body

    with pytest.raises(KeysUnavailable):
        await make_keys(f"{issuer.url}?apikey=secret").find("1")

    assert issuer.url in caplog.text and "secret" not in caplog.text


@pytest.mark.gen_test
async def test_new_key_is_found_by_the_first_token_that_names_it(issuer: Issuer, make_keys: MakeKeys) -> None:
    keys = make_keys(issuer.url, retry_s=0)
    await _find(keys)
    issuer.publish(JWK, {**JWK, "kid": "2"})

    assert await _find(keys, "2") == "2"
    assert await _find(keys, "1") == "1" and issuer.asked == 2


@pytest.mark.gen_test
async def test_flood_of_unknown_key_ids_causes_one_fetch_in_a_period(issuer: Issuer, make_keys: MakeKeys) -> None:
    keys = make_keys(issuer.url, retry_s=60)
    await _find(keys)

    for number in range(1000):
        with pytest.raises(InvalidToken):
            await keys.find(f"invented-{number}")

    assert issuer.asked == 1 and await _find(keys) == "1"


@pytest.mark.gen_test
async def test_unknown_key_id_causes_no_fetch_once_the_keys_are_closed(issuer: Issuer) -> None:
    keys, background = IssuerKeys(issuer=None, url=issuer.url, retry_s=0), Tasks()
    keys.start(background)
    assert await _find(keys) == "1"
    await background.close()
    await keys.close()

    with pytest.raises(InvalidToken):
        await keys.find("unknown")

    assert issuer.asked == 1


@pytest.mark.gen_test
async def test_simultaneous_unknown_key_ids_cause_one_fetch(issuer: Issuer, make_keys: MakeKeys) -> None:
    keys = make_keys(issuer.url, retry_s=0)
    await _find(keys)

    results = await asyncio.gather(*(keys.find(f"invented-{n}") for n in range(100)), return_exceptions=True)

    assert all(isinstance(result, InvalidToken) for result in results) and issuer.asked == 2


@pytest.mark.gen_test
async def test_key_that_the_issuer_has_removed_is_refused_after_the_next_refresh(
    issuer: Issuer, make_keys: MakeKeys
) -> None:
    keys = make_keys(issuer.url, refresh_s=0.02)
    await _find(keys)
    issuer.publish({**JWK, "kid": "2"})

    await until_raises(InvalidToken, lambda: keys.find("1"))

    assert await _find(keys, "2") == "2"


@pytest.mark.gen_test
@pytest.mark.parametrize(("status", "body"), [(500, "{}"), (200, '{"keys": []}'), (200, "<html>"), (302, "")])
@pytest.mark.expects_log(OUTAGE)
async def test_known_keys_are_kept_in_an_outage(
    issuer: Issuer, make_keys: MakeKeys, caplog: pytest.LogCaptureFixture, status: int, body: str
) -> None:
    keys = make_keys(issuer.url, refresh_s=0.01, retry_s=0.01)
    await _find(keys)
    caplog.set_level(logging.INFO)

    issuer.status, issuer.body = status, body
    await until(lambda: OUTAGE in caplog.text)

    assert await _find(keys) == "1" and keys.is_ready
    with pytest.raises(InvalidToken):
        await keys.find("2")
    issuer.status = 200
    issuer.publish({**JWK, "kid": "3"})
    await until(lambda: "available again" in caplog.text)
    assert await _find(keys, "3") == "3"


@pytest.mark.gen_test
async def test_token_without_a_key_id_is_accepted_only_if_there_is_one_key(issuer: Issuer, make_keys: MakeKeys) -> None:
    keys = make_keys(issuer.url, retry_s=0)
    assert await _find(keys, None) == "1"

    issuer.publish(JWK, {**JWK, "kid": "2"})
    await _find(keys, "2")

    with pytest.raises(InvalidToken):
        await keys.find(None)


# -- issuers that misbehave ------------------------------------------------------------------------------------------


@asynccontextmanager
async def raw_server(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[str]:
    """Serve each connection by a function that may break HTTP; yield the address."""
    serving: set[asyncio.Task[None] | None] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        try:
            await serve(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    server.close()
    for task in serving:
        assert task is not None
        task.cancel()
    await asyncio.gather(*(task for task in serving if task is not None), return_exceptions=True)


@pytest.mark.gen_test
@pytest.mark.expects_log(f"{OUTAGE}: no answer in time")
async def test_silent_issuer_delays_requests_by_one_time_limit(make_keys: MakeKeys) -> None:
    connections = 0

    async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read(-1)

    async with raw_server(be_silent) as url:
        keys = make_keys(url, timeout_s=0.3)
        loop = asyncio.get_running_loop()
        began = loop.time()

        results = await asyncio.gather(*(keys.find("1") for _ in range(50)), return_exceptions=True)

        assert all(isinstance(result, KeysUnavailable) for result in results)
        assert connections == 1 and loop.time() - began < 1


@pytest.mark.gen_test
@pytest.mark.parametrize("head", ["", "Content-Length: 1000000000\r\n", "Transfer-Encoding: chunked\r\n"])
@pytest.mark.expects_log(OUTAGE)
async def test_endless_answer_is_aborted_at_its_limit(make_keys: MakeKeys, head: str) -> None:
    sent = 0

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\n{head}\r\n".encode())
        while True:
            writer.write(b"8000\r\n" + b" " * 0x8000 + b"\r\n" if "chunked" in head else b" " * 0x8000)
            sent += 0x8000
            await writer.drain()

    async with raw_server(send) as url:
        with pytest.raises(KeysUnavailable):
            await make_keys(url, timeout_s=10).find("1")

    # The kernel's buffers and this server's own hold some more.
    assert sent < 16_000_000


@pytest.mark.gen_test
@pytest.mark.expects_log(f"{OUTAGE}: .* not found within")
async def test_endless_head_of_an_answer_is_an_outage(make_keys: MakeKeys) -> None:
    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nX: ")
        while True:
            writer.write(b"x" * 0x8000)
            await writer.drain()

    async with raw_server(send) as url:
        with pytest.raises(KeysUnavailable):
            await make_keys(url, timeout_s=10).find("1")


@pytest.mark.gen_test
@pytest.mark.expects_log(f"{OUTAGE}: .* does not answer with JSON")
async def test_compressed_answer_is_not_decompressed(issuer: Issuer, make_keys: MakeKeys) -> None:
    issuer.body = gzip.compress(json.dumps({"keys": [JWK]}).encode())
    issuer.headers = {"Content-Encoding": "gzip"}

    with pytest.raises(KeysUnavailable):
        await make_keys(issuer.url).find("1")


@pytest.mark.gen_test
@pytest.mark.parametrize("body", ["", "[]", "1", "{", '{"keys": 1}', '{"keys": {}}', "[" * 100_000, b"\xff", '"'])
@pytest.mark.expects_log(OUTAGE)
async def test_answer_that_is_no_key_set_is_an_outage(issuer: Issuer, make_keys: MakeKeys, body: str | bytes) -> None:
    issuer.body = body

    with pytest.raises(KeysUnavailable):
        await make_keys(issuer.url).find("1")


@pytest.mark.gen_test
@pytest.mark.expects_log(f"{OUTAGE}: .* 302")
async def test_redirect_is_not_followed(issuer: Issuer, make_keys: MakeKeys) -> None:
    issuer.status, issuer.headers = 302, {"Location": issuer.url}

    with pytest.raises(KeysUnavailable):
        await make_keys(issuer.url).find("1")

    assert issuer.asked == 1


P384 = ec.generate_private_key(ec.SECP384R1())
UNUSABLE = {
    "for encryption": {**JWK, "use": "enc"},
    "symmetric": {"kty": "oct", "k": "a" * 43, "alg": "HS256", "kid": "1"},
    "symmetric without alg": {"kty": "oct", "k": "a" * 43, "kid": "1"},
    "symmetric without k": {"kty": "oct", "kid": "1"},
    "private": {**JWK, **json.loads(jwt.get_algorithm_by_name("RS256").to_jwk(RSA))},
    "unknown curve": {"kty": "EC", "crv": "P-192", "x": "AAAA", "y": "AAAA", "kid": "1"},
    "curve that is not supported": jwk_of(ec.generate_private_key(ec.SECP256K1())),
    "curve of another algorithm": jwk_of(P384, alg="ES256"),
    "point that is not on the curve": {**jwk_of(P384), "x": "A" * 64},
    "short": jwk_of(rsa.generate_private_key(65537, 1024)),
    "algorithm that is not supported": {**JWK, "alg": "RS512"},
    "algorithm of another kind of key": {**JWK, "alg": "ES256"},
    "algorithm HS256": {**JWK, "alg": "HS256"},
    "algorithm none": {**JWK, "alg": "none"},
    "algorithm unknown": {**JWK, "alg": "X"},
    "algorithm a list": {**JWK, "alg": ["RS256"]},
    "modulus a number": {**JWK, "n": 7},
    "modulus absent": {key: value for key, value in JWK.items() if key != "n"},
    "kind unknown": {"kty": "X", "kid": "1"},
    "kind absent": {"kid": "1"},
    "kind a list": {**JWK, "kty": ["RSA"]},
    "not an object": "RSA",
    "null": None,
}


@pytest.mark.gen_test
@pytest.mark.parametrize("jwk", UNUSABLE.values(), ids=UNUSABLE)
@pytest.mark.expects_log(f"{OUTAGE}: the issuer has no key of a kind that is supported")
async def test_key_that_is_unusable_is_skipped(issuer: Issuer, make_keys: MakeKeys, jwk: object) -> None:
    issuer.publish(jwk, {**JWK, "kid": "2"})
    keys = make_keys(issuer.url)
    assert await _find(keys, "2") == "2"
    with pytest.raises(InvalidToken):
        await keys.find("1")

    issuer.publish(jwk)
    with pytest.raises(KeysUnavailable):
        await make_keys(issuer.url).find("1")


@pytest.mark.gen_test
@pytest.mark.parametrize(
    "jwk",
    [
        {**JWK, "use": "sig"},
        {**JWK, "alg": "PS256"},
        jwk_of(P384),
        jwk_of(P384, alg="ES384"),
        jwk_of(ec.generate_private_key(ec.SECP256R1()), x5t="unknown members are ignored"),
    ],
)
async def test_key_of_a_supported_kind_is_used(issuer: Issuer, make_keys: MakeKeys, jwk: object) -> None:
    issuer.publish(jwk)

    assert await _find(make_keys(issuer.url)) == "1"


jwk_members = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(),
    st.lists(st.text(), max_size=2),
    st.sampled_from(["P-256", "EC", "OKP", "oct"]),
)


@given(
    st.sampled_from([JWK, jwk_of(P384), {"kty": "OKP", "crv": "Ed25519", "x": "A" * 43}]),
    st.dictionaries(
        st.sampled_from(["kty", "alg", "use", "crv", "x", "y", "n", "e", "d", "k", "kid", "oth"]), jwk_members
    ),
)
def test_any_members_of_a_key_are_used_or_skipped(jwk: dict[str, object], members: dict[str, object]) -> None:
    key = usable_key({**jwk, **members})

    assert key is None or key.algorithm_name in ALGORITHMS


# -- discovery -------------------------------------------------------------------------------------------------------


@pytest.mark.gen_test
async def test_address_of_the_keys_is_discovered(issuer: Issuer, make_keys: MakeKeys) -> None:
    assert await _find(make_keys(issuer=issuer.name)) == "1"


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("change", "failure"),
    [
        (
            {"issuer": "https://evil.example.com/"},
            "the issuer calls itself 'https://evil.example.com/', see AUTH_ISSUER",
        ),
        ({"issuer": None}, "the issuer calls itself 'None'"),
        ({"jwks_uri": "http://keys.example.com/"}, "the issuer's jwks_uri is not an https:// address"),
        ({"jwks_uri": "file:///etc/passwd"}, "the issuer's jwks_uri is not an https:// address"),
        ({"jwks_uri": "https://keys.example.com/\x1b[2J"}, "the issuer's jwks_uri is not an https:// address"),
        ({"jwks_uri": ["x"]}, "the issuer's jwks_uri is not an https:// address"),
    ],
)
@pytest.mark.expects_log(OUTAGE)
async def test_discovery_that_does_not_fit_is_refused(
    issuer: Issuer,
    make_keys: MakeKeys,
    caplog: pytest.LogCaptureFixture,
    change: dict[str, object],
    failure: str,
) -> None:
    issuer.configuration = {"issuer": issuer.name, "jwks_uri": issuer.url, **change}

    with pytest.raises(KeysUnavailable):
        await make_keys(issuer=issuer.name).find("1")

    (record,) = [record for record in caplog.records if OUTAGE in record.getMessage()]
    assert failure in record.getMessage() and issuer.asked == 0
    assert record.levelno == (logging.ERROR if "issuer" in change else logging.WARNING)


@pytest.mark.gen_test
async def test_issuer_differs_if_only_its_last_slash_does(
    issuer: Issuer, make_keys: MakeKeys, caplog: pytest.LogCaptureFixture
) -> None:
    issuer.configuration = {"issuer": issuer.name.rstrip("/"), "jwks_uri": issuer.url}

    assert await _find(make_keys(issuer=issuer.name.rstrip("/"))) == "1"


# -- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.gen_test
async def test_address_of_keys_in_a_token_is_not_contacted(issuer: Issuer, io_loop: IOLoop) -> None:
    contacted = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal contacted
        contacted += 1

    identity = make_identity(Settings(auth="jwt", auth_jwks_url=issuer.url, auth_audience="chat"))
    background = Tasks()
    identity.start(background)
    claims = {"sub": "alice", "aud": "chat", "exp": 2**40}
    foreign = rsa.generate_private_key(65537, 2048)
    async with raw_server(count) as url:
        for kid in ("1", "2"):
            header = {"kid": kid, "jku": url, "x5u": url, "jwk": jwk_of(foreign)}
            token = jwt.encode(claims, foreign, "RS256", header)
            with pytest.raises(InvalidToken):
                await identity.identify(HTTPHeaders({"Authorization": f"Bearer {token}"}), "")
    good = jwt.encode(claims, RSA, "RS256", {"kid": "1"})
    caller = await identity.identify(HTTPHeaders({"Authorization": f"Bearer {good}"}), "")
    await background.close()
    await identity.close()

    assert contacted == 0 and identity.is_ready and caller.owner == "alice"


# -- a real identity provider ----------------------------------------------------------------------------------------


class Provider:
    """`tests/node/oauth2.mjs`: an identity provider whose keys a test rotates."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        addresses = json.loads(process.stdout.readline())
        self.issuer: str = addresses["issuer"]
        self._control: str = addresses["control"]

    def command(self, path: str, body: object) -> Any:
        return httpx.post(f"{self._control}{path}", json=body, trust_env=False).json()


@pytest.fixture
def provider() -> Iterator[Provider]:
    command = ["node", str(ROOT / "tests" / "node" / "oauth2.mjs")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Provider(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.gen_test
@pytest.mark.needs("node")
async def test_tokens_of_an_identity_provider_are_accepted_before_and_after_a_rotation(
    provider: Provider, make_keys: MakeKeys
) -> None:
    settings = Settings(auth="jwt", auth_issuer=provider.issuer, auth_audience="chat")
    identity = TokenIdentity(settings, make_keys(issuer=provider.issuer, retry_s=0))

    async def owner_of(token: str) -> str | None:
        return (await identity.identify(HTTPHeaders({"Authorization": f"Bearer {token}"}), "")).owner

    claims = {"sub": "alice", "aud": "chat"}
    first = provider.command("/token", {"claims": claims})["token"]
    assert await asyncio.gather(*(owner_of(first) for _ in range(100))) == ["alice"] * 100

    for alg in ("ES256", "PS256", "EdDSA", "ES384"):
        kid = provider.command("/key", {"alg": alg})["kid"]
        token = provider.command("/token", {"kid": kid, "claims": {**claims, "sub": alg}})["token"]
        assert await owner_of(token) == alg and await owner_of(first) == "alice"

    with pytest.raises(InvalidToken):
        await owner_of(provider.command("/token", {"claims": {**claims, "aud": "other"}})["token"])
