"""Requests that do not show who sends them: the answer and the log."""

import logging

import httpx
import pytest
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application

from chatserver.errors import InvalidToken, KeysUnavailable, NoForwardedUser, TokenExpired, Unauthenticated
from chatserver.handlers.problems import ProblemHandler, log_request

REFUSALS = {
    "/none": Unauthenticated("no token"),
    "/invalid": InvalidToken("wrong audience"),
    "/expired": TokenExpired("exp has passed"),
    "/proxy": NoForwardedUser("0 headers X-Forwarded-User"),
}


class Refusing(ProblemHandler):
    def initialize(self) -> None:
        self.request_id, self.address, self.log_fields = "r", "a", {}

    def get(self) -> None:
        raise REFUSALS.get(self.request.path) or KeysUnavailable()


@pytest.mark.gen_test
@pytest.mark.parametrize(
    ("path", "code", "challenge"),
    [
        ("/none", "unauthenticated", "Bearer"),
        ("/invalid", "invalid_token", 'Bearer error="invalid_token"'),
        ("/expired", "token_expired", 'Bearer error="invalid_token"'),
        ("/proxy", "unauthenticated", "External"),
    ],
)
async def test_refusal_has_a_challenge_and_its_reason_is_in_the_log_only(
    caplog: pytest.LogCaptureFixture, path: str, code: str, challenge: str
) -> None:
    caplog.set_level(logging.INFO)

    response = await answer(path)

    assert (response.status_code, response.json()["code"]) == (401, code)
    assert response.headers["WWW-Authenticate"] == challenge
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Content-Type"] == "application/problem+json"
    reason = REFUSALS[path].reason
    assert reason not in response.text
    (record,) = [record for record in caplog.records if record.name == "chatserver.handlers.problems"]
    assert (record.levelno, vars(record)["reason"], vars(record)["code"]) == (logging.INFO, reason, code)


@pytest.mark.gen_test
async def test_absent_keys_are_a_503_with_a_time_to_wait() -> None:
    response = await answer("/keys")

    assert (response.status_code, response.json()["code"]) == (503, "keys_unavailable")
    assert response.headers["Retry-After"] == "10" and "WWW-Authenticate" not in response.headers


async def answer(path: str) -> httpx.Response:
    server = HTTPServer(Application([("/.*", Refusing)], log_function=log_request))
    sock, port = bind_unused_port()
    server.add_socket(sock)
    try:
        async with httpx.AsyncClient(trust_env=False) as client:
            return await client.get(f"http://127.0.0.1:{port}{path}")
    finally:
        server.stop()
        await server.close_all_connections()
