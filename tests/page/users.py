"""Users of the page: who is signed in, in one browser profile."""

import re
from typing import Any

from playwright.sync_api import BrowserContext, Route


def problem(status: int, code: str, **members: str) -> dict[str, Any]:
    """Return an error's answer, for `Route.fulfill`."""
    body = {"status": status, "code": code, "detail": "This request needs a credential.", **members}
    return {"status": status, "content_type": "application/problem+json", "json": body}


class Users:
    """A server's users.

    :param login_url: the `loginUrl` of `/me`; so `logout_url`
    """

    def __init__(self, context: BrowserContext, *, login_url: str = "", logout_url: str = "") -> None:
        self.owner: str | None = None
        self.login = {"loginUrl": login_url} if login_url else {}
        self.logout = {"logoutUrl": logout_url} if logout_url else {}
        self.asked: list[str] = []
        """The paths of the requests so far."""
        context.route(re.compile("/(chat|me)([/?]|$)"), self._answer)

    def sign_in(self, owner: str) -> None:
        self.owner = owner

    def sign_out(self) -> None:
        self.owner = None

    def _answer(self, route: Route) -> None:
        path = "/" + route.request.url.split("/", 3)[3]
        self.asked.append(path)
        if self.owner is None:
            route.fulfill(**problem(401, "unauthenticated", **(self.login if path == "/me" else {})))
        elif path == "/me":
            route.fulfill(json={"owner": self.owner, **self.logout})
        elif self.owner == "alice" or route.request.method == "POST":
            route.continue_()
        elif path.startswith("/chat?"):
            route.fulfill(json={"conversations": []})
        elif path.startswith("/chat/stream/"):
            route.continue_(url=re.sub("stream/[0-9a-f]{24}.*", f"stream/{'0' * 24}", route.request.url))
        else:
            route.fulfill(**problem(404, "not_found"))
