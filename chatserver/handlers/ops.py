"""For the operator: health, readiness and metrics."""

from chatserver import metrics
from chatserver.chat import Chat
from chatserver.errors import DatabaseUnavailable, Draining, KeysUnavailable
from chatserver.handlers.base import BaseHandler
from chatserver.handlers.identity import Identity
from chatserver.handlers.problems import raises
from chatserver.reading import Reading
from chatserver.settings import Settings


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
        if not self.identity.is_ready:
            raise KeysUnavailable
        await self.chat.ping()
        self.send_json({"status": "ready"})

    head = get


class MetricsHandler(BaseHandler):
    """`/metrics`"""

    is_public = True

    def initialize(  # type: ignore[override]
        self, chat: Chat, reading: Reading, identity: Identity, settings: Settings, metrics: metrics.Metrics
    ) -> None:
        super().initialize(chat, reading, identity, settings)
        self.metrics = metrics

    def get(self) -> None:
        """All metrics in Prometheus's text format."""
        self.set_header("Content-Type", metrics.CONTENT_TYPE)
        self.finish(self.metrics.render())

    head = get
