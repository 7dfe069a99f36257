"""The collection `conversations`, and the conditions that select documents of it.

Every command takes a `Condition`, and only the functions here make one: here a conversation's owner is required.
"""

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NewType

from bson import ObjectId
from bson.codec_options import CodecOptions, DatetimeConversion
from pymongo import ReturnDocument, UpdateOne
from pymongo.errors import BulkWriteError

from chatserver.errors import DatabaseUnavailable
from chatserver.records import Key
from chatserver.store.connection import DEFAULT_DATABASE
from chatserver.store.documents import Document
from chatserver.store.guard import BUSY

logger = logging.getLogger(__name__)

Condition = NewType("Condition", Document)
"""Selects documents of the collection; made by `one`, `several`, `owned` and `every` alone."""


def one(conversation: Key, also: Document | None = None) -> Condition:
    """Return the condition for one conversation.

    :param also: further conditions
    """
    return Condition({**(also or {}), "_id": ObjectId(conversation.id), "owner": _owner(conversation.owner)})


def several(conversations: Iterable[Key]) -> Condition:
    """Return a condition that selects some conversations, and others' conversations with the same ids.

    The caller must compare the `documents.key` of each document that it finds.
    """
    return Condition({"_id": {"$in": [ObjectId(each.id) for each in conversations]}})


def owned(owner: str | None, also: Document) -> Condition:
    """Return the condition for all conversations of one owner that the API can name; see `every`.

    :param also: further conditions, without `$expr`
    """
    return Condition({**every(also), "owner": _owner(owner)})


def every(also: Document, *expressions: Document) -> Condition:
    """Return the condition for all owners' conversations that the API can name; others have no ObjectId as `_id`.

    The type is an expression, so that MongoDB does not choose the index on `_id` for it.

    :param also: further conditions, without `$expr`
    :param expressions: aggregation expressions that must be true
    """
    return Condition({**also, "$expr": {"$and": [{"$eq": [{"$type": "$_id"}, "objectId"]}, *expressions]}})


def _owner(owner: str | None) -> object:
    # Not None, which would be stored when a conversation is created.
    return {"$exists": False} if owner is None else owner


class Conversations:
    """The commands on the collection. Call them inside `Guard.call`; they raise the driver's errors.

    :param client: a Motor client, or PyMongo's AsyncMongoClient
    """

    def __init__(self, client: Any) -> None:
        self.collection = client.get_default_database(DEFAULT_DATABASE).get_collection(
            "conversations",
            # One date or text of another application that Python cannot hold must not make a whole batch unreadable.
            # Dates are without a time zone: the driver takes 1.4 us for each that has one. See `documents.time_of`.
            codec_options=CodecOptions(
                datetime_conversion=DatetimeConversion.DATETIME_AUTO,
                unicode_decode_error_handler="replace",
            ),
        )
        """The driver's collection."""

    async def find_one(self, condition: Condition, projection: Document) -> dict[str, Any] | None:
        """Return one document, or None."""
        found: dict[str, Any] | None = await self.collection.find_one(condition, projection)
        return found

    def find(self, condition: Condition, projection: Document) -> Any:
        """Return the driver's cursor over documents."""
        return self.collection.find(condition, projection)

    async def update_one(self, condition: Condition, change: Document, *, upsert: bool = False) -> bool:
        """Change one document, or insert it if none matches and `upsert` is set; return whether one matched."""
        return bool((await self.collection.update_one(condition, change, upsert=upsert)).matched_count)

    async def find_changed(self, condition: Condition, change: Document, projection: Document) -> Any:
        """Change one document and return its new state; None if none matches."""
        return await self.collection.find_one_and_update(
            condition, change, projection=projection, return_document=ReturnDocument.AFTER
        )

    async def update_all(self, changes: Sequence[tuple[Condition, Document]]) -> int:
        """Change one document for each condition in one bulk write; return how many conditions selected one.

        A change that MongoDB rejects does not prevent the others.

        :raises DatabaseUnavailable: if MongoDB rejects one for now
        """
        writes = [UpdateOne(condition, change) for condition, change in changes]
        try:
            return int((await self.collection.bulk_write(writes, ordered=False)).matched_count)
        except BulkWriteError as error:
            details: Any = error.details
            if not details["writeErrors"]:
                raise
            codes = {each["code"] for each in details["writeErrors"]}
            logger.error("MongoDB rejected %d of %d writes: %s", len(details["writeErrors"]), len(writes), codes)
            if codes & BUSY:
                raise DatabaseUnavailable from error
            return int(details["nMatched"])

    async def delete_one(self, condition: Condition) -> bool:
        """Delete one document; return whether there was one."""
        return bool((await self.collection.delete_one(condition)).deleted_count)

    async def delete_many(self, condition: Condition) -> None:
        """Delete all documents that match."""
        await self.collection.delete_many(condition)
