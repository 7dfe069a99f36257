"""For the operator: health, readiness and metrics."""

import hmac

from chatserver.auth import find_credential
from chatserver.errors import DatabaseUnavailable, Draining, InvalidToken, KeysUnavailable, NotFound, Unauthenticated
from chatserver.handlers.base import BaseHandler
from chatserver.handlers.problems import raises
from chatserver.metrics import CONTENT_TYPE


class HealthHandler(BaseHandler):
    """`/healthz`"""

    is_public = True

    def get(self) -> None:
        """The process is up."""
        self.send_json({"status": "ok"})

    head = get


class ReadyHandler(BaseHandler):
    """`/readyz`"""

    is_public = True

    @raises(DatabaseUnavailable, Draining, KeysUnavailable)
    async def get(self) -> None:
        """The server accepts turns: MongoDB answers, the users' keys are known, and the server is not shutting down."""
        if not self.services.identity.is_ready:
            raise KeysUnavailable
        await self.services.chat.ping()
        self.send_json({"status": "ready"})

    head = get


class MetricsHandler(BaseHandler):
    """`/metrics`"""

    is_public = True

    @raises(NotFound, Unauthenticated, InvalidToken)
    def get(self) -> None:
        """All metrics in Prometheus's text format."""
        self._check_token()
        self.set_header("Content-Type", CONTENT_TYPE)
        self.finish(self.services.metrics.render())

    head = get

    def _check_token(self) -> None:
        """Check that the request has the bearer token `METRICS_TOKEN`.

        :raises NotFound: if the server has users, but no such token
        :raises Unauthenticated, InvalidToken: if the request has no token, or another one
        """
        token = self.config.metrics_token
        if token is None:
            if self.config.auth == "none":
                return
            raise NotFound
        given = find_credential(self.request.headers, cookie=None).token
        if not hmac.compare_digest(given.encode(), token.encode()):
            raise InvalidToken("not METRICS_TOKEN")
