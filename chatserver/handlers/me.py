"""The caller's name, and the deletion of everything that belongs to the caller."""

from datetime import UTC, datetime
from math import inf

from chatserver.errors import ChatError, DatabaseUnavailable, NotFound
from chatserver.handlers.base import BaseHandler
from chatserver.handlers.problems import raises
from chatserver.wire import iso


class MeHandler(BaseHandler):
    """`/me`"""

    @raises(NotFound)
    def get(self) -> None:
        """Return who the caller is."""
        value = {"owner": self._name()}
        if self.caller.expires_at < inf:
            value["expiresAt"] = iso(datetime.fromtimestamp(self.caller.expires_at, UTC))
        if self.config.auth_logout_url is not None:
            value["logoutUrl"] = self.config.auth_logout_url
        self.send_json(value)

    head = get

    @raises(NotFound, DatabaseUnavailable)
    async def delete(self) -> None:
        """Delete all conversations of the caller."""
        await self.services.chat.delete_all(self._name())
        self.set_status(204)
        self.finish()

    def problem_document(self, problem: ChatError) -> dict[str, object]:
        """Return the body of an error; of a 401 with the address at which users sign in, for the chat page."""
        document = super().problem_document(problem)
        if problem.status == 401 and self.config.auth_login_url is not None:
            document["loginUrl"] = self.config.auth_login_url
        return document

    def _name(self) -> str:
        """Return the caller's name.

        :raises NotFound: if the server has no users
        """
        if self.caller.owner is None:
            raise NotFound("This server has no users; see AUTH.")
        return self.caller.owner
