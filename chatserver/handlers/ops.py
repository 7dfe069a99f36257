"""For the operator: health, readiness and metrics."""

from chatserver import metrics
from chatserver.chat import Chat
from chatserver.errors import DatabaseUnavailable, Draining
from chatserver.handlers.base import BaseHandler
from chatserver.handlers.problems import raises
from chatserver.reading import Reading
from chatserver.settings import Settings


class HealthHandler(BaseHandler):
    """`/healthz`"""

    def get(self) -> None:
        """The process is up."""
        self.send_json({"status": "ok"})

    head = get


class ReadyHandler(BaseHandler):
    """`/readyz`"""

    @raises(DatabaseUnavailable, Draining)
    async def get(self) -> None:
        """The server accepts turns: MongoDB answers, and the server is not shutting down."""
        await self.chat.ping()
        self.send_json({"status": "ready"})

    head = get


class MetricsHandler(BaseHandler):
    """`/metrics`"""

    def initialize(  # type: ignore[override]
        self, chat: Chat, reading: Reading, settings: Settings, metrics: metrics.Metrics
    ) -> None:
        super().initialize(chat, reading, settings)
        self.metrics = metrics

    def get(self) -> None:
        """All metrics in Prometheus's text format."""
        self.set_header("Content-Type", metrics.CONTENT_TYPE)
        self.finish(self.metrics.render())

    head = get
