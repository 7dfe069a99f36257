"""How a conversation looks in MongoDB: pure functions from documents to records, and the expressions that select parts.

Other applications may write the same collection. Whatever a document holds, reading it never fails:

- `messages` that is no array counts as empty;
- a message whose `_id` is no ObjectId has an id derived from its conversation's id and its index;
- a time that is missing or no date is taken from the document, else from an ObjectId;
- content that is no string is shown as JSON.

An expression evaluates a string that begins with `$` as a path, so text from a client always goes through `literal`.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from bson import ObjectId, json_util
from bson.datetime_ms import DatetimeMS

from chatserver.records import (
    PAGE_SIZE,
    After,
    Before,
    Between,
    Message,
    Newest,
    Place,
    Record,
    ReplyError,
    Span,
    Status,
    StoredReply,
    Summary,
)

Document = Mapping[str, Any]
Divided = Literal["all", "replies", "none"]
"""Which messages of a page may be read in parts if they are long."""

PAGE_MESSAGES = 2000
"""The most messages that are read at once; see `records.PAGE_SIZE`."""
BEGINNING_CHARS = 400
"""Code points of the first message that the list reads to make a title of."""
_UNKNOWN = datetime(1970, 1, 1, tzinfo=UTC)
_EARLIEST_ID = datetime(2010, 1, 1, tzinfo=UTC)
"""No chat is older: an ObjectId that names an earlier or a future time was made of random bytes."""
_STORED_STATUSES = frozenset(get_args(Status)) - {"streaming"}

# -- expressions -------------------------------------------------------------------------------------------------------

MESSAGES: Document = {"$cond": [{"$isArray": "$messages"}, "$messages", []]}
COUNT: Document = {"$size": MESSAGES}
PROMPT: Document = {
    "$filter": {
        "input": MESSAGES,
        "cond": {"$and": [{"$in": ["$$this.role", ["user", "assistant"]]}, {"$ne": ["$$this.status", "superseded"]}]},
    }
}
"""The messages that a source may be shown."""
IS_SUPPORTED: Document = {
    "$and": [
        {"$in": [{"$type": "$messages"}, ["array", "missing"]]},
        {"$allElementsTrue": {"$map": {"input": MESSAGES, "in": {"$eq": [{"$type": "$$this.content"}, "string"]}}}},
    ]
}
"""Whether a turn can be appended: a source can be shown text only."""
USERS_TURNS: Document = {"$size": {"$filter": {"input": MESSAGES, "cond": {"$eq": ["$$this.role", "user"]}}}}
_LAST_ID: Document = {"$let": {"vars": {"last": {"$last": MESSAGES}}, "in": "$$last._id"}}
STANDING: Document = {"createdAt": 1, "updatedAt": 1, "reply": 1, "count": COUNT, "last": _LAST_ID}
"""All that `record` needs but `messages` and `expired`."""
SUMMARY: Document = {
    "createdAt": 1,
    "updatedAt": 1,
    "reply._id": 1,
    "count": COUNT,
    "beginning": {
        "$let": {
            "vars": {
                "first": {
                    "$ifNull": [
                        {
                            "$first": {
                                "$filter": {
                                    "input": {"$slice": [MESSAGES, 10]},
                                    "cond": {"$eq": ["$$this.role", "user"]},
                                }
                            }
                        },
                        {"$first": MESSAGES},
                    ]
                }
            },
            "in": {
                "$cond": [
                    {"$eq": [{"$type": "$$first.content"}, "string"]},
                    {"$substrCP": ["$$first.content", 0, BEGINNING_CHARS + 1]},
                    "",
                ]
            },
        }
    },
}


def literal(text: str) -> Document:
    """Return the expression for a text as it is, whatever it begins with."""
    return {"$literal": text}


def index_of(conversation: ObjectId, message_id: str) -> Document:
    """Return the expression for a message's index, -1 if there is none with this id.

    `$messages._id` leaves out messages without an `_id`, so an index into it may be too low: it is checked, and only
    then looked for in a way that costs more.
    """
    wanted = ObjectId(message_id)
    if (index := _derived_index(conversation, message_id)) is not None:
        return {"$cond": [{"$eq": [_id_at(index), None]}, index, -1]}
    with_gaps = {"$map": {"input": MESSAGES, "in": {"$ifNull": ["$$this._id", None]}}}
    return {
        "$let": {
            "vars": {"at": {"$indexOfArray": [{"$let": {"vars": {"all": MESSAGES}, "in": "$$all._id"}}, wanted]}},
            "in": {
                "$cond": [
                    {"$or": [{"$lt": ["$$at", 0]}, {"$eq": [_id_at("$$at"), wanted]}]},
                    "$$at",
                    {"$indexOfArray": [with_gaps, wanted]},
                ]
            },
        }
    }


def _id_at(index: int | str) -> Document:
    """Return the expression for the `_id` of the message at an index: null if no ObjectId, 0 if none is there."""
    message = {"$arrayElemAt": [MESSAGES, index]}
    of_message = {"$cond": [{"$eq": [{"$type": "$$message._id"}, "objectId"]}, "$$message._id", None]}
    is_there = {"$lt": [index, COUNT]}
    return {"$cond": [is_there, {"$let": {"vars": {"message": message}, "in": of_message}}, 0]}


def messages_from(at: Document | int, count: int) -> Document:
    """Return the expression for so many messages from an index on; for none if it is negative."""
    return {
        "$let": {
            "vars": {"at": at},
            "in": {"$cond": [{"$lt": ["$$at", 0]}, [], {"$slice": [MESSAGES, "$$at", count]}]},
        }
    }


def page(conversation: ObjectId, span: Span, divided: Divided) -> Any:
    """Return the expression for the first messages of a span, which `record_with_page` reads."""
    at: Any = 0
    begin: Any = 0
    end: Any = COUNT
    match span:
        case Newest(limit):
            if limit is not None:
                running = {"$cond": [{"$eq": [{"$type": "$reply._id"}, "objectId"]}, 1, 0]}
                begin = {"$add": [{"$subtract": [end, limit]}, running]}
        case Before(message_id, limit):
            at = {"$cond": [{"$eq": ["$reply._id", ObjectId(message_id)]}, end, index_of(conversation, message_id)]}
            end = "$$at"
            if limit is not None:
                begin = {"$subtract": ["$$at", limit]}
        case After(message_id, chars):
            at = index_of(conversation, message_id)
            begin = {"$add": ["$$at", 1]} if chars is None else "$$at"
        case Between():
            begin, end = span.begin, span.end
    skipped = _chars(span)
    most = 1 if skipped else PAGE_MESSAGES
    number = {"$max": [0, {"$min": [most, {"$subtract": ["$$end", "$$begin"]}]}]}
    candidates = {"$cond": [{"$gt": ["$$count", 0]}, {"$slice": [MESSAGES, "$$begin", "$$count"]}, []]}

    def is_divided(message: str) -> Any:
        is_text = {"$eq": [{"$type": f"{message}.content"}, "string"]}
        if skipped or divided == "none":
            return is_text if skipped else False
        is_long = {"$gt": [{"$bsonSize": {"message": message}}, PAGE_SIZE]}
        return {"$and": [is_text, is_long, divided == "all" or {"$eq": [f"{message}.role", "assistant"]}]}

    part = {"$substrCP": ["$$this.content", skipped, PAGE_SIZE]}
    return _let(
        {"at": at},
        {"begin": {"$max": [0, begin]}, "end": {"$cond": [{"$lt": ["$$at", 0]}, 0, end]}},
        {"count": number},
        {"candidates": candidates},
        {"chosen": {"$slice": ["$$candidates", _fitting("$$candidates", _SIZE, PAGE_SIZE)]}},
        {"last": {"$last": "$$chosen"}},
        result={
            "begin": "$$begin",
            "end": "$$end",
            "found": {"$gte": ["$$at", 0]},
            "messages": {
                "$map": {
                    "input": "$$chosen",
                    "in": {"$cond": [is_divided("$$this"), {"$mergeObjects": ["$$this", {"content": part}]}, "$$this"]},
                }
            },
            "length": {"$cond": [is_divided("$$last"), {"$strLenCP": "$$last.content"}, None]},
        },
    )


def newest_within(messages: Document, most_bytes: int) -> Any:
    """Return the expression for the newest of some messages: the last, and those before until they have so many bytes.

    A turn keeps them while its reply runs, so that a long conversation would cost all its text for each.
    """
    fitting = _fitting({"$reverseArray": "$$messages"}, _SIZE, most_bytes)
    return _let({"messages": messages}, result={"$slice": ["$$messages", {"$multiply": [-1, fitting]}]})


_SIZE: Document = {"$bsonSize": {"message": "$$this"}}


def _chars(span: Span) -> int:
    """Return how many code points of its first message a span leaves out."""
    return (span.chars or 0) if isinstance(span, After | Between) else 0


def _let(*steps: Document, result: Any) -> Any:
    """Return the expression for a result, made of variables of which each may use those before it."""
    for variables in reversed(steps):
        result = {"$let": {"vars": variables, "in": result}}
    return result


def _fitting(messages: Any, size: Document, most_bytes: int) -> Document:
    """Return the expression for how many messages begin within so many bytes; at least 1.

    :param size: the expression for the bytes of `$$this`
    """
    counted = {
        "$reduce": {
            "input": messages,
            "initialValue": {"count": 0, "bytes": 0},
            "in": {
                "$cond": [
                    {"$gt": ["$$value.bytes", most_bytes]},
                    "$$value",
                    {"count": {"$add": ["$$value.count", 1]}, "bytes": {"$add": ["$$value.bytes", size]}},
                ]
            },
        }
    }
    return {"$max": [1, _let({"counted": counted}, result="$$counted.count")]}


def last_ids(count: int) -> Document:
    """Return the expression for the `_id`s of the last messages, null for those that have none."""
    return {"$map": {"input": {"$slice": [MESSAGES, -count]}, "in": {"$ifNull": ["$$this._id", None]}}}


def asked_index(prompt: str) -> Document:
    """Return the expression for the index of the last user message if its `_id` is no ObjectId, else null.

    :param prompt: the variable that holds `PROMPT`
    """
    is_users = {
        "$eq": [{"$let": {"vars": {"message": {"$arrayElemAt": [MESSAGES, "$$this"]}}, "in": "$$message.role"}}, "user"]
    }
    indexes = {"$filter": {"input": {"$range": [0, COUNT]}, "cond": is_users}}
    return {
        "$let": {
            "vars": {"asked": {"$last": prompt}},
            "in": {"$cond": [{"$eq": [{"$type": "$$asked._id"}, "objectId"]}, None, {"$max": indexes}]},
        }
    }


# -- ids and times -----------------------------------------------------------------------------------------------------


def message_id(conversation: ObjectId, index: int, stored: object) -> str:
    """Return a message's id: the stored one if it is an ObjectId, else the one derived from its index."""
    return str(stored) if isinstance(stored, ObjectId) else f"{_derived_prefix(conversation)}{index:08x}"


def _derived_prefix(conversation: ObjectId) -> str:
    return hashlib.sha256(b"chatserver message\0" + conversation.binary).hexdigest()[:16]


def _derived_index(conversation: ObjectId, message_id: str) -> int | None:
    """Return the index that an id was derived from, or None if it was not derived."""
    index = int(message_id[16:], 16)
    return index if message_id.startswith(_derived_prefix(conversation)) and index < 2**31 else None


def time_of(*candidates: object) -> datetime:
    """Return the first time among values: a date, or the one in an ObjectId if that is plausible; else the epoch."""
    for each in candidates:
        if isinstance(each, datetime):
            return each
        if isinstance(each, ObjectId) and _EARLIEST_ID <= each.generation_time <= datetime.now(UTC):
            return each.generation_time
    return _UNKNOWN


# -- records -----------------------------------------------------------------------------------------------------------


def message(value: object, document: Document, index: int) -> Message:
    """Return one element of `messages`.

    :param document: the conversation's; its `_id` and its times
    """
    stored = value if isinstance(value, dict) else {"content": value}
    get = stored.get
    id_, role, content, time, status = get("_id"), get("role"), get("content"), get("createdAt"), get("status")
    if not isinstance(time, datetime):
        time = time_of(document.get("createdAt"), id_, document["_id"], document.get("updatedAt"))
    return Message(
        str(id_) if isinstance(id_, ObjectId) else message_id(document["_id"], index, id_),
        # Not `isinstance`: BSON's type for code is a subclass.
        role if type(role) is str else "unknown",
        content if type(content) is str else _as_json(content),
        time,
        "complete" if status is None else _status(status),
        _error(get("error")) if "error" in stored else None,
    )


def _status(value: object) -> Status:
    return value if type(value) is str and value in _STORED_STATUSES else "complete"  # type: ignore[return-value]


def _as_json(value: object) -> str:
    """Return a BSON value as JSON, what JSON does not know as MongoDB's extended JSON."""
    return json_util.dumps(value, json_options=json_util.RELAXED_JSON_OPTIONS, ensure_ascii=False)


def _error(value: object) -> ReplyError | None:
    match value:
        case {"code": str(code), "message": str(text)}:
            return ReplyError(str(code), str(text))
    return None


def reply(document: Document, *, expired: bool) -> StoredReply | None:
    """Return the running reply, None if there is none of ours."""
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
    )


def record(document: Document, *, older: int) -> Record:
    """Return a conversation.

    :param document: with the fields of `STANDING`, `expired`, and if need be `messages` and `at`
    :param older: the index of the first message in `messages`
    """
    messages = document.get("messages")
    count = document["count"]
    return Record(
        created_at=time_of(document.get("createdAt"), document["_id"], document.get("updatedAt")),
        updated_at=time_of(document.get("updatedAt"), document.get("createdAt"), document["_id"]),
        messages=[message(each, document, index) for index, each in enumerate(_list(messages), older)],
        reply=reply(document, expired=bool(document["expired"])),
        last_id=message_id(document["_id"], count - 1, document.get("last")) if count else None,
        older=older,
        found=document.get("at", 0) >= 0,
    )


def record_with_page(document: Document, span: Span) -> Record:
    """Return a conversation with the first messages of a span.

    :param document: with the fields of `STANDING`, `expired`, and `page` as the expression of that name makes it
    """
    page = document["page"]
    begin, end, length = page["begin"], page["end"], page["length"]
    at = 0 if page["found"] else -1
    found = record({**document, "messages": page["messages"], "at": at}, older=begin)
    read = begin + len(found.messages)
    following = Between(read, end) if read < end else None
    if length is not None and (chars := _chars(span) + len(found.messages[-1].content)) < length:
        following = Between(read - 1, end, chars)
    return replace(found, following=following, length=length)


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else ()


def summary(document: Document) -> Summary:
    """Return a conversation in the list, from the fields of `SUMMARY`."""
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
        beginning=beginning[:BEGINNING_CHARS],
        is_cut=len(beginning) > BEGINNING_CHARS,
        created_at=time_of(document.get("createdAt"), document["_id"], updated_at),
        updated_at=time_of(updated_at, document.get("createdAt"), document["_id"]),
        message_count=document["count"] + streaming,
        streaming=streaming,
        place=Place(updated_ms, str(document["_id"])),
    )
