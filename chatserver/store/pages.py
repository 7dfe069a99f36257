"""Pages of a conversation: the expression that selects one, and the record made of it; pure."""

from dataclasses import replace
from typing import Any, Literal

from bson import ObjectId

from chatserver.records import PAGE_SIZE, After, Before, Between, Newest, Record, Span
from chatserver.store.documents import Document, record
from chatserver.store.expressions import COUNT, MESSAGES, SIZE, fitting, index_of, let

Divided = Literal["all", "replies", "none"]
"""Which messages of a page may be read in parts if they are long."""
PAGE_MESSAGES = 2000
"""The most messages in one page; see `records.PAGE_SIZE`."""


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
    return let(
        {"at": at},
        {"begin": {"$max": [0, begin]}, "end": {"$cond": [{"$lt": ["$$at", 0]}, 0, end]}},
        {"count": number},
        {"candidates": candidates},
        {"chosen": {"$slice": ["$$candidates", fitting("$$candidates", SIZE, PAGE_SIZE)]}},
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


def record_with_page(document: Document, span: Span) -> Record:
    """Return a conversation with the first messages of a span.

    :param document: with the fields of `expressions.OVERVIEW`, `expired`, and `page` as the expression
        `page` makes it
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


def _chars(span: Span) -> int:
    """Return how many code points of its first message a span leaves out."""
    return (span.chars or 0) if isinstance(span, After | Between) else 0
