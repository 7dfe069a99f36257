"""The conversations in MongoDB: the only package that knows the driver.

One document per conversation, in the collection `conversations` (`documents` also reads those of other applications):

    { _id, owner?, createdAt, updatedAt,
      messages: [ { _id, role, content, createdAt, status?, error?: { code, message }, key? } ],
      reply?: { _id, createdAt, content, renewedAt } }

A turn is two atomic writes: its start (`turns`) and its end (`running`). Both can be repeated safely: the start holds
only while `reply` is absent, the end only while `reply` is the started one. Nothing else changes `messages`,
except the status of a superseded reply.

Every call goes through a guard, which bounds it in time (`guard`), and selects documents by a condition that only
`collection` can make. Only methods that Motor's and PyMongo's asynchronous clients share are used.
"""

from chatserver.store.connection import client_options, connect, initiate_replica_set, redact_uri
from chatserver.store.documents import id_for_key, new_id
from chatserver.store.reading import Reading
from chatserver.store.running import RunningReplies
from chatserver.store.turns import Turns

__all__ = ["Store", "client_options", "connect", "id_for_key", "initiate_replica_set", "new_id", "redact_uri"]


class Store(Turns, RunningReplies, Reading):
    """All operations on the conversations of one database."""
