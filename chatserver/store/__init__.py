"""The conversations in MongoDB: the only module that knows the driver.

One document a conversation, in the collection `conversations` (see `documents` for what other applications may write):

    { _id, createdAt, updatedAt,
      messages: [ { _id, role, content, createdAt, status?, error?: { code, message }, key? } ],
      reply?: { _id, createdAt, content, renewedAt } }

A turn is two atomic writes, *begin* and *finish*; both may be repeated safely, since each holds only while `reply` is
absent, or is still the one that was begun. Nothing else changes `messages`, but for the mark on a superseded reply.
Every call is bounded in time and raises `DatabaseUnavailable` if MongoDB does not answer; while it is known to be away,
calls fail at once, but for one every `_PROBE_S` that looks whether it is back. If MongoDB answers with an error, calls
raise `DatabaseRefused`.

The calls used are those that Motor's and PyMongo's asynchronous clients share.
"""

import asyncio
import hashlib
import inspect
import logging
import re
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from time import monotonic
from typing import Any

import pymongo
from bson import ObjectId
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.datetime_ms import DatetimeMS
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo import ReturnDocument, UpdateOne
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    DuplicateKeyError,
    ExecutionTimeout,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
    WriteConcernError,
)

from chatserver.errors import (
    ChatError,
    ConversationFull,
    DatabaseRefused,
    DatabaseUnavailable,
    KeyReused,
    NoSuchConversation,
    NothingToRetry,
    OutcomeUnknown,
    ReplyInProgress,
    SetupError,
    UnsupportedConversation,
)
from chatserver.records import Message, Place, Record, Span, StartedTurn, StoredReply, Summary, Turn
from chatserver.store import documents, indexes
from chatserver.store.batcher import Batcher
from chatserver.store.documents import Divided, Document

logger = logging.getLogger(__name__)

DEFAULT_DATABASE = "chat-db"
DOCUMENT_BYTES = 16 * 1024 * 1024
REPLY_ROOM = 1024 * 1024
"""Bytes kept free for a reply: a turn that would leave less is refused before it starts."""
_MARGIN = 4096
"""Bytes for the fields around two messages, an error and the document's own."""
_PROBE_S = 0.5
_BUSY = {24, 112, 262, 365, 388, 462}
"""LockTimeout, WriteConflict, ExceededTimeLimit, TemporarilyUnavailable, TransactionTooLargeForCache,
IngressRequestRateLimitExceeded: an operation is refused for now."""
_OUT_OF_REACH = {6, 7, 89, 133, 134, 9001}
"""HostUnreachable, HostNotFound, NetworkTimeout, FailedToSatisfyReadPreference, ReadConcernMajorityNotAvailableYet,
SocketException: what a `mongos` answers while it does not reach a shard."""
_NO_SUCH_INDEX = 2
"""BadValue: the hint names an index that does not exist, or is still being built."""
_CONCURRENT_CALLS = 10
"""Motor runs each call on a thread of a pool of five a core: what waits shall wait here, where it can time out."""

_RETRIED = ("stopped", "failed", "interrupted")
_SECRET_OPTION = re.compile("[^=]*password|authMechanismProperties", re.IGNORECASE)


def new_id() -> str:
    """Return a fresh id, 24 hex digits."""
    return str(ObjectId())


def id_for_key(key: str) -> str:
    """Return the id of the conversation that an idempotency key without a conversation stands for.

    So two attempts meet at one document, by the index on `_id`, even at the same moment.
    """
    return hashlib.sha256(b"chatserver conversation\0" + key.encode()).hexdigest()[:24]


def now() -> datetime:
    """Return the time in UTC, to the millisecond, as BSON keeps it."""
    time = datetime.now(UTC)
    return time.replace(microsecond=time.microsecond // 1000 * 1000)


def redact_uri(uri: str) -> str:
    """Return a valid MongoDB URI with the database's name and without secrets, as it may be shown and pasted."""
    scheme, _, rest = uri.partition("://")
    address, _, query = rest.partition("?")
    # Not as URLs in general: what PyMongo takes for a password may hold a `#`.
    authority, _, database = address.partition("/")
    user, at, hosts = authority.rpartition("@")
    options = "&".join(each for each in query.split("&") if each and not _SECRET_OPTION.match(each))
    shown = f"{scheme}://{user.partition(':')[0]}{at}{hosts}/{database or DEFAULT_DATABASE}"
    return f"{shown}?{options}" if options else shown


def connect(uri: str, timeout_s: float) -> "AsyncIOMotorClient[Any]":
    """Return the one database client of a process.

    :raises SetupError: if the URI is wrong
    """
    if not uri.startswith(("mongodb://", "mongodb+srv://")):
        raise SetupError("MONGODB_URI is not a MongoDB URI: it must begin with mongodb:// or mongodb+srv://")
    try:
        client: AsyncIOMotorClient[Any] = AsyncIOMotorClient(uri, **client_options(timeout_s))
    except (InvalidURI, ConfigurationError, ValueError) as error:
        raise SetupError(f"MONGODB_URI is not a MongoDB URI: {error}") from None
    return client


def client_options(timeout_s: float) -> dict[str, Any]:
    """Return what a client needs for the promises made here: majority, journaled, bounded in time (seconds)."""
    return {
        "w": "majority",
        "journal": True,
        "readConcernLevel": "majority",
        "tz_aware": True,
        "appname": "chatserver",
        "serverSelectionTimeoutMS": int(timeout_s * 500),
        "connectTimeoutMS": int(timeout_s * 500),
        "heartbeatFrequencyMS": 2000,
    }


async def initiate_replica_set(uri: str, host: str) -> None:
    """Make a lone `mongod` the primary of a replica set of one, under the address it has now; repeatable.

    :raises SetupError: if it does not become primary within 20 seconds
    """
    client: AsyncIOMotorClient[Any] = AsyncIOMotorClient(uri, directConnection=True, serverSelectionTimeoutMS=5000)
    config = {"_id": "rs0", "members": [{"_id": 0, "host": host}]}
    try:
        try:
            await client.admin.command("replSetInitiate", config)
        except OperationFailure as error:
            if error.code != 23:  # AlreadyInitialized
                raise
            current = (await client.admin.command("replSetGetConfig"))["config"]
            if current["members"][0]["host"] != host:
                current["members"] = config["members"]
                current["version"] += 1
                await client.admin.command("replSetReconfig", current, force=True)
        async with asyncio.timeout(20):
            while not (await client.admin.command("hello"))["isWritablePrimary"]:
                await asyncio.sleep(0.02)
    except (PyMongoError, TimeoutError) as error:
        raise SetupError(f"The private MongoDB server did not become ready: {error}") from error
    finally:
        client.close()


class Store:
    """The conversations of one database.

    :param client: a Motor client, or PyMongo's AsyncMongoClient
    :param uri: the same database's, for the connection that builds the indexes
    :param timeout_s: the longest that a call may take, in seconds
    :param lease_ms: how long after its last renewal a reply's server is taken for lost
    :param history: how many of the newest messages a turn brings along
    :param history_chars: how much of them a source uses: older messages than these code points may be left out
    """

    def __init__(
        self, client: Any, uri: str, *, timeout_s: float, lease_ms: int, history: int, history_chars: int = 48_000
    ) -> None:
        self._client = client
        self._uri = uri
        self._conversations = client.get_default_database(DEFAULT_DATABASE).get_collection(
            "conversations",
            # Another application's date or text that Python cannot hold must not make a whole batch unreadable.
            codec_options=CodecOptions(
                tz_aware=True,
                tzinfo=UTC,
                datetime_conversion=DatetimeConversion.DATETIME_AUTO,
                unicode_decode_error_handler="replace",
            ),
        )
        self._timeout_s = timeout_s
        self._slots = asyncio.Semaphore(_CONCURRENT_CALLS)
        self._away_until = 0.0
        self._peeks = Batcher(self._peek_at)
        self._finishes = Batcher(self._finish_all)
        self.observe: Callable[[str, float, bool], None] = lambda _operation, _seconds, _ok: None
        """Called after each call: its name, its duration in seconds, whether the database answered."""
        self._turn_projection = {
            "reply._id": 1,
            "reply.createdAt": 1,
            "size": {"$bsonSize": "$$ROOT"},
            "turns": documents.USERS_TURNS,
            "count": documents.COUNT,
            "last": documents.last_ids(2),
            "prompt": {
                "$let": {
                    "vars": {"prompt": documents.PROMPT},
                    "in": {
                        "messages": documents.newest_within({"$slice": ["$$prompt", -history]}, 4 * history_chars),
                        "asked": documents.asked_index("$$prompt"),
                    },
                }
            },
        }
        """What a new turn needs, instead of the whole document; `prompt.messages` ends with the user's."""
        lost = [
            {"$lt": ["$reply.renewedAt", {"$subtract": ["$$NOW", lease_ms]}]},
            # The database's clock was put back: its server renews such a lease at its next checkpoint, if it lives.
            {"$gt": ["$reply.renewedAt", {"$add": ["$$NOW", lease_ms]}]},
        ]
        self._standing = {**documents.STANDING, "expired": {"$or": lost}}
        """All that a `Record` has but the messages."""

    async def prepare(self) -> None:
        """Check that the database takes writes from us.

        :raises SetupError: if the database refuses us
        """
        try:
            async with self._call("prepare"):
                await self._conversations.update_one({"_id": ObjectId()}, {"$unset": {"reply": ""}})
        except ConfigurationError as error:
            raise SetupError(f"MONGODB_URI cannot be resolved: {error}") from None
        except DatabaseRefused as error:
            assert isinstance(error.__cause__, OperationFailure)
            said = (error.__cause__.details or {}).get("errmsg", "unknown error")
            raise SetupError(f"MongoDB refused the connection (MONGODB_URI): {said}") from None

    async def build_indexes(self) -> None:
        """Build the indexes, however long it takes; see `indexes.build`."""
        await indexes.build(self._uri, DEFAULT_DATABASE)

    async def ping(self) -> None:
        """Check that the database answers.

        :raises DatabaseUnavailable: if it does not
        """
        async with self._call("ping"):
            await self._client.admin.command("ping")

    async def close(self) -> None:
        """Close the client, once no call is on its way; each is bounded in time."""
        for _ in range(_CONCURRENT_CALLS):
            await self._slots.acquire()
        closing = self._client.close()
        if inspect.isawaitable(closing):
            await closing

    # -- a turn --------------------------------------------------------------------------------------------------

    async def start_turn(self, turn: Turn, content: str, key: str | None, *, new: bool = False) -> StartedTurn:
        """Store what the user said and that a reply to it runs.

        :param new: whether the conversation's id was just made, so that it need not be looked for
        :raises ReplyInProgress, ConversationFull: and nothing is stored
        :raises KeyReused: if a message with this key exists already; see `find_by_key`
        :raises UnsupportedConversation: if another application stored what a turn cannot be appended to
        :raises OutcomeUnknown: if the database fell silent in the middle; see `find_started`
        """
        time = now()
        message = {"_id": ObjectId(turn.message_id), "role": "user", "content": content, "createdAt": time}
        condition: dict[str, Any] = {"_id": ObjectId(turn.conversation_id), "reply": {"$exists": False}}
        if key is not None:
            message["key"] = key
            condition["messages.key"] = {"$ne": key}
        update = {
            "$push": {"messages": message},
            "$setOnInsert": {"createdAt": time},
            **_reply_starts(turn.reply_id, time),
        }
        needed = len(content.encode()) + _MARGIN + REPLY_ROOM
        async with self._call("begin", write=True):
            for _ in range(3):
                if not new and (begun := await self._insert_turn(condition, update, needed)):
                    return begun
                try:
                    unknown = {"_id": condition["_id"], "messages": {"$exists": False}, "reply": {"$exists": False}}
                    await self._conversations.update_one(unknown, update, upsert=True)
                except DuplicateKeyError:
                    new = False
                    await self._refuse(condition["_id"], key, needed)
                    continue
                said = Message(turn.message_id, "user", content, time)
                return StartedTurn(
                    turn=turn,
                    said=said,
                    messages=[said],
                    number=1,
                    previous_id=None,
                    created_at=time,
                    reply_room=DOCUMENT_BYTES - len(content.encode()) - 2 * _MARGIN,
                )
            raise ReplyInProgress

    async def start_retry(self, conversation_id: str, reply_id: str) -> StartedTurn:
        """Supersede a stopped, failed or interrupted reply at the conversation's end by a new one.

        :raises NotFound, NothingToRetry, ReplyInProgress, ConversationFull, OutcomeUnknown: as `begin`
        """
        conversation = ObjectId(conversation_id)
        needed = _MARGIN + REPLY_ROOM
        async with self._call("begin", write=True):
            document = await self._conversations.find_one(
                {"_id": conversation},
                {
                    "reply._id": 1,
                    "count": documents.COUNT,
                    "last": {"$last": documents.MESSAGES},
                    "prompt": {"$map": {"input": {"$slice": [documents.PROMPT, -2]}, "in": {"role": "$$this.role"}}},
                    "supported": documents.IS_SUPPORTED,
                },
            )
            if document is None:
                raise NoSuchConversation
            if documents.reply(document, expired=False) is not None:
                raise ReplyInProgress
            if document["count"] == 0:
                raise NothingToRetry
            if not document["supported"]:
                raise UnsupportedConversation
            last = document["last"]
            is_answer = [each["role"] for each in document["prompt"]] == ["user", "assistant"]
            if last.get("role") != "assistant" or last.get("status") not in _RETRIED or not is_answer:
                raise NothingToRetry
            at = f"messages.{document['count'] - 1}"
            condition = {"_id": conversation, "reply": {"$exists": False}, f"{at}.status": last["status"]}
            update = _reply_starts(reply_id, now())
            update["$set"][f"{at}.status"] = "superseded"
            still_last = {"$eq": [documents.COUNT, document["count"]]}
            if begun := await self._insert_turn(condition, update, needed, still_last):
                return begun
            await self._refuse(conversation, None, needed)
            raise ReplyInProgress

    async def find_started(self, conversation_id: str, reply_id: str) -> StartedTurn | None:
        """Return a turn whose begin had an unknown outcome, if it was done and its reply still runs."""
        async with self._call("find_started"):
            document = await self._conversations.find_one(
                {"_id": ObjectId(conversation_id), "reply._id": ObjectId(reply_id)}, self._turn_projection
            )
        return _started_turn(document) if document else None

    async def _insert_turn(
        self, condition: Document, update: Document, needed: int, *also: Document
    ) -> StartedTurn | None:
        fits = {"$lte": [{"$bsonSize": "$$ROOT"}, DOCUMENT_BYTES - needed]}
        document = await self._conversations.find_one_and_update(
            {**condition, "$expr": {"$and": [fits, documents.IS_SUPPORTED, *also]}},
            update,
            projection=self._turn_projection,
            return_document=ReturnDocument.AFTER,
        )
        if document is not None and "last" not in document:
            # The driver sent the write again after the line broke, and the server answered with the image that it had
            # kept of the first one, to which it does not apply the projection.
            try:
                document = await self._conversations.find_one({"_id": condition["_id"]}, self._turn_projection)
            except (ServerSelectionTimeoutError, OperationFailure) as error:
                raise AutoReconnect("after the turn was stored") from error
        return _started_turn(document) if document else None

    async def _refuse(self, conversation: ObjectId, key: str | None, needed: int) -> None:
        """Raise why a turn could not begin; return if that no longer holds."""
        projection: dict[str, Any] = {
            "reply._id": 1,
            "size": {"$bsonSize": "$$ROOT"},
            "supported": documents.IS_SUPPORTED,
            "is_null": {"$eq": [{"$type": "$messages"}, "null"]},
        }
        if key is not None:
            keys = {"$map": {"input": documents.MESSAGES, "in": "$$this.key"}}
            projection["keyed"] = {"$in": [documents.literal(key), keys]}
        document = await self._conversations.find_one({"_id": conversation}, projection)
        if document is None:
            return
        if document.get("keyed"):
            raise KeyReused
        if "reply" in document:
            raise ReplyInProgress if documents.reply(document, expired=False) else UnsupportedConversation
        if document["is_null"]:
            # Nothing can be pushed to null.
            is_null = {"$expr": {"$eq": [{"$type": "$messages"}, "null"]}}
            await self._conversations.update_one({"_id": conversation, **is_null}, {"$set": {"messages": []}})
        elif not document["supported"]:
            raise UnsupportedConversation
        elif document["size"] > DOCUMENT_BYTES - needed:
            raise ConversationFull

    async def find_by_key(self, conversation_id: str, key: str, content: str) -> Turn | None:
        """Return the turn that was begun with an idempotency key, or None.

        :raises KeyReused: if it was begun with another content
        """
        keys = {"$map": {"input": documents.MESSAGES, "in": {"$ifNull": ["$$this.key", None]}}}
        at = {"$indexOfArray": [keys, documents.literal(key)]}
        async with self._call("find_by_key"):
            document = await self._conversations.find_one(
                {"_id": ObjectId(conversation_id), "messages.key": key},
                {"at": at, "messages": documents.messages_from(at, count=2), "reply._id": 1},
            )
        if document is None:
            return None
        asked, *replies = (
            documents.message(each, document, index) for index, each in enumerate(document["messages"], document["at"])
        )
        reply = replies[0] if replies else documents.reply(document, expired=False)
        if asked.content != content or reply is None:
            raise KeyReused
        return Turn(conversation_id, asked.id, reply.id)

    async def checkpoint(self, replies: Mapping[str, tuple[str, str]]) -> Collection[str]:
        """Save what running replies have said so far and renew their leases, in one bulk write.

        :param replies: reply id -> conversation id, content
        :return: the ids of the replies that are no longer ours
        """
        writes = [
            UpdateOne(
                {"_id": ObjectId(conversation_id), "reply._id": ObjectId(reply_id)},
                {"$set": {"reply.content": content}, "$currentDate": {"reply.renewedAt": True}},
            )
            for reply_id, (conversation_id, content) in replies.items()
        ]
        async with self._call("checkpoint"):
            if await self._write_all(writes) == len(writes):
                return ()
            ids = [ObjectId(conversation_id) for conversation_id, _ in replies.values()]
            held = await self._conversations.find({"_id": {"$in": ids}}, {"reply._id": 1}).to_list(None)
        running = (documents.reply(each, expired=False) for each in held)
        return set(replies) - {each.id for each in running if each is not None}

    async def finish(self, conversation_id: str, message: Message, *, if_renewed_at: object = None) -> Message | None:
        """Store a reply as a message and end it, if it still runs.

        Replies that end in one moment are stored in one bulk write.

        :param if_renewed_at: only if its lease was not renewed since
        :return: the message as the database has it now, whoever stored it; None if it has none
        :raises RuntimeError: if MongoDB refuses to store it
        """
        stored: dict[str, Any] = {
            "_id": ObjectId(message.id),
            "role": message.role,
            "content": message.content,
            "createdAt": message.created_at,
        }
        if message.status != "complete":
            stored["status"] = message.status
        if message.error is not None:
            stored["error"] = message.error._asdict()
        condition = {"_id": ObjectId(conversation_id), "reply._id": stored["_id"]}
        if if_renewed_at is not None:
            condition["reply.renewedAt"] = if_renewed_at
        update = {"$push": {"messages": stored}, "$unset": {"reply": ""}, "$max": {"updatedAt": now()}}
        if await self._finishes.submit(UpdateOne(condition, update)):
            return message
        async with self._call("finish"):
            document = await self._conversations.find_one(
                {"_id": condition["_id"]}, {"messages": {"$elemMatch": {"_id": stored["_id"]}}, "reply._id": 1}
            )
        if document and document.get("messages"):
            return documents.message(document["messages"][0], document, 0)
        if document and if_renewed_at is None and document.get("reply") == {"_id": stored["_id"]}:
            raise RuntimeError("MongoDB refuses to store the reply")
        return None

    async def _finish_all(self, finishes: Sequence[UpdateOne]) -> Sequence[bool]:
        """Return for each whether it is known to be done."""
        async with self._call("finish"):
            done = await self._write_all(finishes) == len(finishes)
        return [done] * len(finishes)

    async def _write_all(self, writes: Sequence[UpdateOne]) -> int:
        """Write in bulk; return how many found what they change. One that MongoDB refuses stops none of the others."""
        try:
            return int((await self._conversations.bulk_write(writes, ordered=False)).matched_count)
        except BulkWriteError as error:
            details: Any = error.details
            if not details["writeErrors"]:
                raise
            codes = {each["code"] for each in details["writeErrors"]}
            logger.error("MongoDB refuses %d of %d writes: %s", len(details["writeErrors"]), len(writes), codes)
            if codes & _BUSY:
                raise DatabaseUnavailable from error
            return int(details["nMatched"])

    async def find_expired(
        self, own: Collection[str], *, sole_server: bool = False
    ) -> Sequence[tuple[str, StoredReply]]:
        """Return conversation id and reply of up to 1,000 replies whose lease has run out, but for our `own`.

        :param sole_server: whether no other server can be alive, so that every lease has run out
        """
        is_id = {"$type": "objectId"}
        condition: dict[str, Any] = {"_id": is_id, "reply._id": {**is_id, "$nin": [ObjectId(each) for each in own]}}
        if not sole_server:
            condition["$expr"] = self._standing["expired"]
        async with self._call("find_expired"):
            cursor = self._conversations.find(condition, {"reply": 1}).hint(indexes.RUNNING_REPLIES)
            try:
                found = await cursor.to_list(1000)
            except OperationFailure as error:
                if error.code != _NO_SUCH_INDEX:
                    raise
                # Scanning all conversations would exceed a call's time limit; the next read of one settles it.
                return ()
        replies = ((str(each["_id"]), documents.reply(each, expired=True)) for each in found)
        return [(conversation_id, reply) for conversation_id, reply in replies if reply is not None]

    # -- reading -------------------------------------------------------------------------------------------------

    async def read(
        self,
        conversation_id: str,
        span: Span,
        *,
        divided: Divided = "all",
    ) -> Record | None:
        """Return a conversation (None if unknown) and the first of some messages; see `Record`.

        Messages are only ever appended, so that what `Record.following` says can be read later, unless the conversation
        is deleted meanwhile; another one with the same id has another `created_at`.

        :param span: which messages
        :param divided: which of them are read in parts if they are long
        """
        conversation = ObjectId(conversation_id)
        projection = {**self._standing, "page": documents.page(conversation, span, divided)}
        async with self._call("read"):
            document = await self._conversations.find_one({"_id": conversation}, projection)
        return documents.record_with_page(document, span) if document else None

    async def peek(self, conversation_id: str) -> Record | None:
        """Return a conversation without its messages (None if unknown): where it stands, and the reply that runs.

        All that are asked for in one moment are read by one query.
        """
        return await self._peeks.submit(ObjectId(conversation_id))

    async def _peek_at(self, ids: Sequence[ObjectId]) -> Sequence[Record | None]:
        async with self._call("peek"):
            found = await self._conversations.find({"_id": {"$in": ids}}, self._standing).to_list(None)
        records = {each["_id"]: documents.record(each, older=each["count"]) for each in found}
        return [records.get(each) for each in ids]

    async def summaries(self, limit: int, after: Place | None) -> Sequence[Summary]:
        """Return up to `limit` conversations that come after a place of the list (None: from its beginning)."""
        try:
            found = await self._list(limit, after, documents.SUMMARY)
        except DatabaseRefused:
            # One of them holds text that is not UTF-8, which MongoDB refuses to cut: it alone has no title.
            found = await self._list(limit, after, {**documents.SUMMARY, "beginning": documents.literal("")})
            for each in found:
                with suppress(DatabaseRefused):
                    async with self._call("list"):
                        titled = await self._conversations.find_one({"_id": each["_id"]}, documents.SUMMARY)
                    each.update(titled or {})
        return [documents.summary(each) for each in found]

    async def _list(self, limit: int, after: Place | None, projection: Document) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        # One call, since the process may end between two.
        async with self._call("list"):
            if after is None or after.updated_ms is not None:
                found = await self._find(_dated_after(after), projection, indexes.LIST, limit)
                after = None
            if len(found) < limit:
                condition: dict[str, Any] = {"updatedAt": {"$not": {"$type": "date"}}}
                if after is not None:
                    condition["_id"] = {"$lt": ObjectId(after.id)}
                found += await self._find(condition, projection, [("_id", -1)], limit - len(found))
        return found

    async def _find(
        self, condition: Document, projection: Document, order: Sequence[tuple[str, int]], limit: int
    ) -> list[dict[str, Any]]:
        # The API cannot name conversations of other ids. As an expression, so that no index on `_id` is chosen for it.
        is_ours = {"$expr": {"$eq": [{"$type": "$_id"}, "objectId"]}}
        cursor = self._conversations.find({**condition, **is_ours}, projection)
        return list(await cursor.sort(order).limit(limit).to_list(limit))

    async def delete(self, conversation_id: str) -> bool:
        """Delete a conversation; return whether there was one."""
        async with self._call("delete"):
            result = await self._conversations.delete_one({"_id": ObjectId(conversation_id)})
        return bool(result.deleted_count)

    # -- how calls are made --------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _call(self, operation: str, *, write: bool = False) -> AsyncIterator[None]:
        """Bound a call in time and number, and turn the driver's words for a silent database into ours.

        :param write: whether its outcome matters to the caller when the database falls silent
        """
        started = monotonic()
        answered = False
        try:
            try:
                async with asyncio.timeout(self._timeout_s / 2):
                    await self._slots.acquire()
            except TimeoutError:
                raise DatabaseUnavailable from None
            try:
                left_s = started + self._timeout_s - monotonic()
                if left_s <= 0 or monotonic() < self._away_until:
                    raise DatabaseUnavailable
                with pymongo.timeout(left_s):
                    yield
                answered = True
            except DatabaseUnavailable:
                raise
            except ChatError:
                answered = True
                raise
            finally:
                self._slots.release()
        except (ConnectionFailure, WriteConcernError, BulkWriteError) as error:
            if monotonic() >= self._away_until:
                logger.warning("the database does not answer (%s): %s", operation, type(error).__name__)
            self._away_until = monotonic() + _PROBE_S
            never_sent = isinstance(error, ServerSelectionTimeoutError)
            raise OutcomeUnknown if write and not never_sent else DatabaseUnavailable from error
        except OperationFailure as error:
            # Without its message, which may quote what a document holds.
            code, name = error.code or 0, (error.details or {}).get("codeName", type(error).__name__)
            logger.warning("the database refuses (%s): code %s %s", operation, code, name)
            if code in _BUSY or isinstance(error, ExecutionTimeout):
                busy = "The database is busy; try again in a moment."
                raise (OutcomeUnknown if write else DatabaseUnavailable)(busy) from error
            if code in _OUT_OF_REACH:
                raise OutcomeUnknown if write else DatabaseUnavailable from error
            answered = True
            raise DatabaseRefused from error
        finally:
            self.observe(operation, monotonic() - started, answered)


def _started_turn(document: Document) -> StartedTurn:
    conversation, count = document["_id"], document["count"]
    messages = [documents.message(each, document, 0) for each in document["prompt"]["messages"]]
    if (asked_at := document["prompt"]["asked"]) is not None:
        messages[-1] = replace(messages[-1], id=documents.message_id(conversation, asked_at, None))
    asked, reply = messages[-1], documents.reply(document, expired=False)
    assert reply is not None
    last = [
        documents.message_id(conversation, index, each)
        for index, each in enumerate(document["last"], count - len(document["last"]))
    ]
    said = asked if last[-1] == asked.id else None
    before = last[:-1] if said else last
    return StartedTurn(
        turn=Turn(str(conversation), asked.id, reply.id),
        said=said,
        messages=messages,
        number=document["turns"],
        previous_id=before[-1] if before else None,
        created_at=reply.created_at,
        reply_room=DOCUMENT_BYTES - document["size"] - _MARGIN,
    )


def _reply_starts(reply_id: str, time: datetime) -> dict[str, Any]:
    return {
        # `$max`: a clock that was put back would move a conversation down the list, and a walk would meet it twice.
        "$max": {"updatedAt": time},
        "$set": {"reply._id": ObjectId(reply_id), "reply.createdAt": time, "reply.content": ""},
        "$currentDate": {"reply.renewedAt": True},
    }


def _dated_after(place: Place | None) -> Document:
    """Return the condition for the conversations with a date in `updatedAt` that come after a place of the list."""
    if place is None or place.updated_ms is None:
        return {"updatedAt": {"$type": "date"}}
    time = DatetimeMS(place.updated_ms)
    return {
        "updatedAt": {"$lte": time},
        "$or": [{"updatedAt": {"$lt": time}}, {"_id": {"$lt": ObjectId(place.id)}}],
    }
