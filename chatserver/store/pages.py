"""Pages of a conversation: the expression that selects one, and the record made of it; pure."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from bson import ObjectId

from chatserver.branches import Tree
from chatserver.records import PAGE_SIZE, After, Along, Before, Between, Newest, Record, Rest, Span
from chatserver.store.documents import Document, record
from chatserver.store.expressions import COUNT, MESSAGES, SIZE, TREE, along, fitting, index_of, is_branching, let

Divided = Literal["all", "replies", "none"]
"""Which messages of a page may be read in parts if they are long."""
PAGE_MESSAGES = 2000
"""The most messages in one page; see `records.PAGE_SIZE`."""


def page(conversation: ObjectId, span: Span, divided: Divided, has_branches: Any) -> Any:
    """Return the expression for the first messages of a span, which `record_with_page` reads.

    They are chosen as if there were no branches; see `page_along_path`. The tree is included if its value is needed:
    if messages follow, apart from one that is read in part.

    :param has_branches: an expression; True for a tree in any case
    """
    messages: Any = MESSAGES
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
        case Along(indexes):
            # No more indexes than messages of a page are sent.
            messages, end = along(indexes[:PAGE_MESSAGES]), len(indexes)
    skipped = _chars(span)
    most = 1 if skipped else PAGE_MESSAGES
    number = {"$max": [0, {"$min": [most, {"$subtract": ["$$end", "$$begin"]}]}]}
    candidates = {"$cond": [{"$gt": ["$$count", 0]}, {"$slice": [messages, "$$begin", "$$count"]}, []]}

    def is_divided(message: str) -> Any:
        is_text = {"$eq": [{"$type": f"{message}.content"}, "string"]}
        if skipped or divided == "none":
            return is_text if skipped else False
        is_long = {"$gt": [{"$bsonSize": {"message": message}}, PAGE_SIZE]}
        return {"$and": [is_text, is_long, divided == "all" or {"$eq": [f"{message}.role", "assistant"]}]}

    part = {"$substrCP": ["$$this.content", skipped, PAGE_SIZE]}
    # The reads after the first one of a history do not look for branches: the first one looks at all its messages.
    checked = {"$max": [0, {"$subtract": ["$$end", "$$begin"]}]} if is_along_path(span) else "$$count"
    tree: Any = TREE
    if isinstance(span, Rest):
        tree = None
    elif has_branches is not True:
        follows = {"$gt": [{"$subtract": ["$$end", "$$begin"]}, 1 if skipped else 0]}
        tree = {"$cond": [{"$and": [has_branches, follows]}, TREE, None]}
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
            "tree": tree,
            "branching": False if isinstance(span, Rest) else is_branching("$$begin", checked),
            "messages": {
                "$map": {
                    "input": "$$chosen",
                    "in": {"$cond": [is_divided("$$this"), {"$mergeObjects": ["$$this", {"content": part}]}, "$$this"]},
                }
            },
            "length": {"$cond": [is_divided("$$last"), {"$strLenCP": "$$last.content"}, None]},
        },
    )


def is_along_path(span: Span) -> bool:
    """Return whether a span follows the active path, or else the array."""
    return isinstance(span, Newest | Before)


def page_along_path() -> Any:
    """Return the expression for the tree, whose elements are the messages themselves in a document that fits one read.

    The path is computed in Python; `chosen` takes its messages, and in a longer document a second query reads them.
    """
    fits = {"$lte": [{"$bsonSize": "$$ROOT"}, PAGE_SIZE]}
    return {"tree": {"$cond": [fits, MESSAGES, TREE]}, "has_messages": fits}


def along_path(span: Span, tree: Tree, stored: int) -> tuple[int, Sequence[int] | None]:
    """Return how many messages of the path come before a span that follows it, and the indexes of the span's messages.

    :param tree: a running reply included
    :param stored: the number of stored messages
    :return: None instead of the indexes if the message that the span names does not exist
    """
    assert isinstance(span, Newest | Before)
    if isinstance(span, Newest):
        path = tree.path(tree.head)
    elif span.message_id in tree:
        path = tree.path(span.message_id)[:-1]
    else:
        return 0, None
    begin = 0 if span.limit is None else max(0, len(path) - span.limit)
    return begin, [index for index in path[begin:] if index < stored]


def chosen(page: Document, indexes: Sequence[int] | None) -> Document | None:
    """Return the page of some messages, from that of `page_along_path`; None if it does not have the messages.

    :param indexes: None if they do not exist
    """
    if indexes and not page["has_messages"]:
        return None
    messages = [page["tree"][index] for index in indexes or ()]
    return {"begin": 0, "end": len(messages), "found": indexes is not None, "messages": messages, "length": None}


def record_with_page(document: Document, span: Span) -> Record:
    """Return a conversation with the first messages of a span.

    :param document: with the fields of `expressions.OVERVIEW`, `expired`, and `page` as the expression `page` makes it
    """
    page = document["page"]
    begin, end, length = page["begin"], page["end"], page["length"]
    read = begin + len(page["messages"])
    indexes = span.indexes if isinstance(span, Along) else range(end)
    found = record({**document, "messages": page["messages"], "at": 0 if page["found"] else -1}, indexes[begin:read])
    following = _rest(span, read, end) if read < end else None
    if length is not None and (chars := _chars(span) + len(found.messages[-1].content)) < length:
        following = _rest(span, read - 1, end, chars)
    return replace(found, older=begin, following=following, length=length)


def _rest(span: Span, begin: int, end: int, chars: int = 0) -> Rest:
    return Along(span.indexes[begin:], chars) if isinstance(span, Along) else Between(begin, end, chars)


def _chars(span: Span) -> int:
    """Return how many code points of its first message a span leaves out."""
    return (span.chars or 0) if isinstance(span, After | Rest) else 0
