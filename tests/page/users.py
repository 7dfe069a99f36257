"""Users of the page: a server with tokens in a cookie, and a browser profile that has one."""

import re
from typing import Any

from playwright.sync_api import BrowserContext, Request

from tests.browser import Site
from tests.users import USERS, bearer, token

COOKIE = "token"
SETTINGS: dict[str, Any] = {**USERS, "auth_cookie": COOKIE, "auth_leeway_s": 0.0}
"""The fields of `Settings` of a server that takes these users' tokens."""


def problem(status: int, code: str, **members: str) -> dict[str, Any]:
    """Return an error's answer, for `Route.fulfill`."""
    body = {"status": status, "code": code, "detail": "This request needs a credential.", **members}
    return {"status": status, "content_type": "application/problem+json", "json": body}


class Users:
    """The users of a browser profile. The test's own client, `site.app.client`, is alice's."""

    def __init__(self, context: BrowserContext, site: Site) -> None:
        self._context = context
        self._site = site
        self.asked: list[str] = []
        """The URLs of the requests to the API so far."""
        context.on("request", self._note)
        site.app.client.http.headers.update(bearer("alice"))

    def sign_in(self, owner: str, seconds: int = 600) -> None:
        """Set the cookie to a token of a user that is valid for a number of seconds."""
        value = token(owner, seconds)
        self._context.add_cookies([{"name": COOKIE, "value": value, "url": self._site.url, "httpOnly": True}])

    def sign_out(self) -> None:
        """Delete the cookie."""
        self._context.clear_cookies()

    def _note(self, request: Request) -> None:
        if re.search("/(chat|me)([/?]|$)", request.url):
            self.asked.append(request.url)
