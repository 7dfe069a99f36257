"""The conversations in MongoDB: the only package that knows the driver.

One document per conversation, in the collection `conversations` (`documents` also reads those of other applications):

    { _id, owner?, createdAt, updatedAt, title?, head?: { _id, length },
      messages: [ { _id, role, content, createdAt, status?, error?: { code, message }, parent?, key? } ],
      reply?: { _id, createdAt, content, renewedAt, stop?, parent?, key? } }

A turn is two atomic writes: its start (`turns`, `retries`) and its end (`running`). Both can be repeated safely: the
start holds only while `reply` is absent, the end only while `reply` is the started one. Nothing else changes
`messages`.

The first retry, edit or switch stores a `head`, which remains from then on: a conversation with one has branches, and
all that chatserver adds to it has a `parent`. A conversation without one has none, unless another application or
version 1 (`superseded`) stored some. They are noticed in the messages that are read.

Every call goes through a guard, which bounds it in time (`guard`), and selects documents by a condition that only
`collection` can make. Only methods that Motor's and PyMongo's asynchronous clients share are used.
"""

from chatserver.store.connection import client_options, connect, initiate_replica_set, redact_uri
from chatserver.store.documents import id_for_key, new_id
from chatserver.store.idempotency import IdempotencyKeys
from chatserver.store.reading import Reading
from chatserver.store.retries import Retries
from chatserver.store.running import RunningReplies
from chatserver.store.views import Views

__all__ = ["Store", "client_options", "connect", "id_for_key", "initiate_replica_set", "new_id", "redact_uri"]


class Store(Retries, IdempotencyKeys, RunningReplies, Reading, Views):
    """All operations on the conversations of one database."""
