"""Servers with users, their clients, and their conversations."""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

import pytest
from bson import ObjectId
from tornado.ioloop import IOLoop

from tests.apps import App, Database, MakeApp
from tests.clients import Client, new_id
from tests.users import USERS, bearer

TIME = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)

ClientOf = Callable[[App, str], Client]
"""Makes a client of a server for an owner; see the fixture `client_of`."""


@pytest.fixture
def users_app(io_loop: IOLoop, make_app: MakeApp) -> App:
    """The application with users, but without delays."""
    app: App = io_loop.run_sync(lambda: make_app(**USERS))
    return app


@pytest.fixture
def client_of(io_loop: IOLoop) -> Iterator[ClientOf]:
    """Return a function that makes a client of a server for an owner."""
    clients: list[Client] = []

    def make(app: App, owner: str) -> Client:
        client = Client(app.url)
        client.http.headers.update(bearer(owner))
        clients.append(client)
        return client

    yield make
    for client in clients:
        io_loop.run_sync(client.close)


def insert(database: Database, owner: str | None, count: int, text: str = "Hello") -> Sequence[str]:
    """Store idle conversations of an owner, each with one message; return their ids."""
    ids = [ObjectId(new_id()) for _ in range(count)]
    message = {"_id": ObjectId(), "role": "user", "content": text, "createdAt": TIME}
    fields = {"createdAt": TIME, "updatedAt": TIME, "messages": [message], **({"owner": owner} if owner else {})}
    database.conversations.insert_many([{"_id": each, **fields} for each in ids])
    return [str(each) for each in ids]
