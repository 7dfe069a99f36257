"""Who may read the metrics."""

from typing import Any

import pytest

from tests.apps import MakeApp
from tests.http.conftest import ClientOf
from tests.http.test_http import assert_problem
from tests.users import USERS, bearer, token

pytestmark = pytest.mark.gen_test


WITH_USERS = [USERS, {"auth": "proxy", "trusted_proxies": ("127.0.0.1",)}]


@pytest.mark.parametrize("settings", [{"auth": "none"}, *WITH_USERS])
async def test_metrics_need_the_token_if_it_is_set(make_app: MakeApp, settings: dict[str, Any]) -> None:
    app = await make_app(**settings, metrics_token="T0ken!")
    metrics = app.client.http

    for good in ("Bearer T0ken!", "bearer  T0ken!"):
        response = await metrics.get("/metrics", headers={"Authorization": good})
        assert response.status_code == 200 and "chatserver_open_streams" in response.text
    for bad in ("Bearer T0ken", "Bearer T0ken!!", "Bearer zo\xeb", f"Bearer {token('alice')}"):
        response = await metrics.get("/metrics", headers={b"Authorization": bad.encode("latin-1")})
        assert_problem(response, 401, "invalid_token")
        assert response.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    for none in ("Bearer", "T0ken!", "Basic T0ken!", ""):
        response = await metrics.get("/metrics", headers={"Authorization": none})
        assert_problem(response, 401, "unauthenticated")
        assert response.headers["WWW-Authenticate"] == "Bearer"
    assert_problem(await metrics.get("/metrics?token=T0ken!"), 401, "unauthenticated")
    assert (await metrics.head("/metrics")).status_code == 401


async def test_token_that_comes_twice_is_refused(make_app: MakeApp) -> None:
    app = await make_app(metrics_token="T0ken!")
    headers = [("Authorization", "Bearer T0ken!"), ("Authorization", "Bearer other")]

    assert (await app.client.http.get("/metrics", headers=headers)).status_code == 401


@pytest.mark.parametrize("settings", WITH_USERS)
async def test_server_with_users_has_no_metrics_without_a_token(make_app: MakeApp, settings: dict[str, Any]) -> None:
    app = await make_app(**settings)

    for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer None"}, bearer("alice")):
        assert_problem(await app.client.http.get("/metrics", headers=headers), 404, "not_found")


async def test_no_metric_names_an_owner(make_app: MakeApp, client_of: ClientOf) -> None:
    app = await make_app(**USERS, metrics_token="T0ken!")
    alice = client_of(app, "alice-in-chains")
    await alice.turn("Hello")
    await alice.http.get("/chat/export")
    await alice.http.delete("/me")

    metrics = await alice.http.get("/metrics", headers={"Authorization": "Bearer T0ken!"})
    assert metrics.status_code == 200 and "alice" not in metrics.text
