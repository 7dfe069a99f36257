"""For whoever runs the server: is it up, is it ready."""

from chatserver.handlers.base import BaseHandler


class HealthHandler(BaseHandler):
    """`/healthz`"""

    def get(self) -> None:
        """The process is up."""
        self.answer({"status": "ok"})


class ReadyHandler(BaseHandler):
    """`/readyz`"""

    async def get(self) -> None:
        """New turns can be taken: MongoDB answers, and no shutdown is under way."""
        await self.chat.ping()
        self.answer({"status": "ready"})
