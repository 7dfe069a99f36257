"""Documents and records: pure functions from BSON to the values of `chatserver.records`.

Other applications may write the same collection. Reading never fails, even if a document has another form:

- `messages` counts as empty if it is not an array;
- a message whose `_id` is not an ObjectId gets an id derived from its conversation's id and its index;
- a missing or invalid time is taken from the document, else from an ObjectId;
- content that is not a string is shown as JSON.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, get_args

from bson import ObjectId, json_util
from bson.datetime_ms import DatetimeMS

from chatserver.branches import Node, Parent, Tree
from chatserver.records import Key, Message, Place, Record, ReplyError, Status, StoredReply, Summary, View

Document = Mapping[str, Any]

BEGINNING_CHARS = 400
"""Code points of the first message that the list reads for the title."""
_UNKNOWN = datetime(1970, 1, 1, tzinfo=UTC)
_EARLIEST_ID = datetime(2010, 1, 1, tzinfo=UTC)
"""No chat is older. An ObjectId with an earlier or a future time was made of random bytes."""
_STORED_STATUSES = frozenset(get_args(Status)) - {"streaming"}

# -- ids and times -----------------------------------------------------------------------------------------------------


def new_id() -> str:
    """Return a fresh id, 24 hex digits. It is random, so that nobody can predict the id of another's conversation."""
    return secrets.token_hex(12)


def id_for_key(owner: str | None, key: str) -> str:
    """Return the id of the conversation that a post with an idempotency key, but without a conversation, creates.

    The id depends on the owner and the key alone, so that two attempts meet at one document, by the index on `_id`.
    No two pairs of an owner and a key have the same id.
    """
    name = f"conversation\0{key}" if owner is None else f"owned conversation\0{json.dumps([owner, key])}"
    return hashlib.sha256(f"chatserver {name}".encode()).hexdigest()[:24]


def now() -> datetime:
    """Return the time in UTC, in milliseconds, the precision of BSON."""
    time = datetime.now(UTC)
    return time.replace(microsecond=time.microsecond // 1000 * 1000)


def message_id(conversation: ObjectId, index: int, stored: object) -> str:
    """Return a message's id: the stored one if it is an ObjectId, else the one derived from its index."""
    return str(stored) if isinstance(stored, ObjectId) else f"{_derived_prefix(conversation)}{index:08x}"


def _derived_prefix(conversation: ObjectId) -> str:
    return hashlib.sha256(b"chatserver message\0" + conversation.binary).hexdigest()[:16]


def derived_index(conversation: ObjectId, message_id: str) -> int | None:
    """Return the index in a derived id; None if the id was not derived."""
    index = int(message_id[16:], 16)
    return index if message_id.startswith(_derived_prefix(conversation)) and index < 2**31 else None


def time_of(*candidates: object) -> datetime:
    """Return the first time among values: a date, or the one in an ObjectId if that is plausible; else the epoch.

    :param candidates: dates without a time zone are in UTC, as BSON's are
    """
    for each in candidates:
        if isinstance(each, datetime):
            return each.replace(tzinfo=UTC)
        if isinstance(each, ObjectId) and _EARLIEST_ID <= each.generation_time <= datetime.now(UTC):
            return each.generation_time
    return _UNKNOWN


def key(document: Document) -> Key | None:
    """Return a conversation's key; None if another application stored an owner that is not text."""
    if "owner" not in document:
        return Key(None, str(document["_id"]))
    owner = document["owner"]
    return Key(owner, str(document["_id"])) if type(owner) is str else None


# -- records -----------------------------------------------------------------------------------------------------------


def message(value: object, document: Document, index: int) -> Message:
    """Return one element of `messages`.

    :param document: the conversation's; its `_id` and its times
    """
    stored = _fields(value)
    get = stored.get
    id_, role, content, time, status = get("_id"), get("role"), get("content"), get("createdAt"), get("status")
    if isinstance(time, datetime):
        time = time.replace(tzinfo=UTC)
    else:
        time = time_of(document.get("createdAt"), id_, document["_id"], document.get("updatedAt"))
    return Message(
        str(id_) if isinstance(id_, ObjectId) else message_id(document["_id"], index, id_),
        # Not `isinstance`: BSON's code type is a subclass of str.
        role if type(role) is str else "unknown",
        content if type(content) is str else _as_json(content),
        time,
        "complete" if status is None else _status(status),
        _error(get("error")) if "error" in stored else None,
        _parent(stored["parent"]) if "parent" in stored else None,
    )


def _fields(message: object) -> Document:
    """Return the fields of an element of `messages`; one that is no document counts as a message's content."""
    return message if isinstance(message, dict) else {"content": message}


def _status(value: object) -> Status:
    return value if type(value) is str and value in _STORED_STATUSES else "complete"  # type: ignore[return-value]


def _as_json(value: object) -> str:
    """Return a BSON value as JSON; types that JSON lacks become MongoDB's extended JSON."""
    return json_util.dumps(value, json_options=json_util.RELAXED_JSON_OPTIONS, ensure_ascii=False)


def _error(value: object) -> ReplyError | None:
    match value:
        case {"code": str(code), "message": str(text)}:
            return ReplyError(str(code), str(text))
    return None


def reply(document: Document, *, expired: bool) -> StoredReply | None:
    """Return the running reply; None if the document has none that a chatserver wrote."""
    stored = document.get("reply")
    if not isinstance(stored, dict) or not isinstance(stored.get("_id"), ObjectId):
        return None
    content = stored.get("content")
    return StoredReply(
        str(stored["_id"]),
        content if type(content) is str else "",
        time_of(stored.get("createdAt"), stored["_id"]),
        stored.get("renewedAt"),
        expired,
        _parent(stored["parent"]) if "parent" in stored else None,
        retry_key if type(retry_key := stored.get("key")) is str else None,
    )


def _parent(value: object) -> Parent | None:
    """Return a stored parent; None if another application stored a value that cannot be one."""
    return Parent(None if value is None else str(value)) if value is None or isinstance(value, ObjectId) else None


def tree(document: Document) -> Tree:
    """Return the tree of a conversation, a running reply included.

    :param document: with the fields of `expressions.WITH_TREE`; `tree` may be the messages themselves
    """
    nodes = [
        Node(
            message_id(document["_id"], index, each.get("_id")),
            role if type(role := each.get("role")) is str else "unknown",
            _parent(each["parent"]) if "parent" in each else None,
            each.get("status") == "superseded",
        )
        for index, each in enumerate(_fields(value) for value in document["tree"])
    ]
    running = reply(document, expired=False)
    if running is None:
        return Tree(nodes, _head(document))
    return Tree([*nodes, Node(running.id, "assistant", running.parent)])


def _head(document: Document) -> str | None:
    """Return the id of the stored head; None if there is none, or if messages were stored after it."""
    match document.get("head"):
        case {"_id": ObjectId() as id_, "length": length} if length == document["count"]:
            return str(id_)
    return None


def stored_head(message_id: ObjectId, length: int) -> Document:
    """Return the head as it is stored: a message, and the length of the array for which it is the head."""
    return {"_id": message_id, "length": length}


def title(document: Document) -> str | None:
    """Return the title that a user chose; None if there is none, or not a text of one line."""
    value = document.get("title")
    return value if type(value) is str and value.strip() and len(value.splitlines()) == 1 else None


def record(document: Document, indexes: Sequence[int]) -> Record:
    """Return a conversation.

    :param document: with the fields of `expressions.OVERVIEW`, `expired`, and if need be `messages` and `at`
    :param indexes: of `messages`
    """
    messages = document.get("messages")
    count = document["count"]
    last_id = message_id(document["_id"], count - 1, document.get("last")) if count else None
    return Record(
        created_at=time_of(document.get("createdAt"), document["_id"], document.get("updatedAt")),
        updated_at=time_of(document.get("updatedAt"), document.get("createdAt"), document["_id"]),
        messages=[message(each, document, index) for index, each in zip(indexes, _list(messages), strict=True)],
        reply=reply(document, expired=bool(document["expired"])),
        last_id=last_id,
        older=0,
        view=View(_head(document) or last_id, has_branches=document.get("head") is not None, title=title(document)),
        found=document.get("at", 0) >= 0,
    )


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else ()


def summary(document: Document) -> Summary:
    """Return a conversation in the list, from the fields of `expressions.summary`."""
    updated_at = document.get("updatedAt")
    match updated_at:
        case datetime():
            updated_ms: int | None = int(DatetimeMS(updated_at))
        case DatetimeMS():  # a date that Python's datetime cannot hold
            updated_ms = int(updated_at)
        case _:
            updated_ms = None
    streaming = reply(document, expired=False) is not None
    beginning = document["beginning"]
    return Summary(
        id=str(document["_id"]),
        title=title(document),
        beginning=beginning[:BEGINNING_CHARS],
        is_truncated=len(beginning) > BEGINNING_CHARS,
        created_at=time_of(document.get("createdAt"), document["_id"], updated_at),
        updated_at=time_of(updated_at, document.get("createdAt"), document["_id"]),
        message_count=document["count"] + streaming,
        streaming=streaming,
        place=Place(updated_ms, str(document["_id"])),
    )
