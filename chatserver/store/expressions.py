"""Aggregation expressions over a conversation's document; pure.

MongoDB evaluates a string that begins with `$` as a path, so text from a client always goes through `literal`.
"""

from collections.abc import Sequence
from typing import Any

from bson import ObjectId

from chatserver.store.documents import BEGINNING_CHARS, Document, derived_index

SIZE: Document = {"$bsonSize": {"message": "$$this"}}
"""The bytes of the message `$$this`."""
MESSAGES: Document = {"$cond": [{"$isArray": "$messages"}, "$messages", []]}
COUNT: Document = {"$size": MESSAGES}
IS_SUPPORTED: Document = {
    "$and": [
        {"$in": [{"$type": "$messages"}, ["array", "missing"]]},
        {"$allElementsTrue": {"$map": {"input": MESSAGES, "in": {"$eq": [{"$type": "$$this.content"}, "string"]}}}},
    ]
}
"""Whether a turn can be appended: a prompt can contain text only."""
HAS_BRANCHES: Document = {"$ne": [{"$ifNull": ["$head", None]}, None]}
"""Whether chatserver has stored branches. Those of other origins are found where they are read; see `is_branching`."""
TREE: Document = {
    "$map": {
        "input": MESSAGES,
        "in": {"_id": "$$this._id", "role": "$$this.role", "parent": "$$this.parent", "status": "$$this.status"},
    }
}
"""What `documents.tree` needs of each message."""
WITH_TREE: Document = {
    "head": 1,
    "reply._id": 1,
    "reply.parent": 1,
    "reply.key": 1,
    "count": COUNT,
    "tree": TREE,
}
"""The fields that `documents.tree` needs, and the running reply's key."""
WITH_TREE_IF_IDLE: Document = {
    **WITH_TREE,
    "tree": {"$cond": [{"$eq": [{"$type": "$reply._id"}, "missing"]}, TREE, None]},
}
"""The same, but without the tree while a reply runs: what needs it is refused then."""
_LAST_ID: Document = {"$let": {"vars": {"last": {"$last": MESSAGES}}, "in": "$$last._id"}}
OVERVIEW: Document = {
    "owner": 1,
    "createdAt": 1,
    "updatedAt": 1,
    "title": 1,
    "head": 1,
    "reply": 1,
    "count": COUNT,
    "last": _LAST_ID,
}
"""The fields that `documents.record` and `documents.key` need, except `messages` and `expired`."""


def summary(messages: Any) -> Document:
    """Return the projection of the fields that `documents.summary` needs.

    :param messages: the messages of the active path; at least the first ten
    """
    users = {"$filter": {"input": {"$slice": [messages, 10]}, "cond": {"$eq": ["$$this.role", "user"]}}}
    beginning = {
        "$cond": [
            {"$eq": [{"$type": "$$first.content"}, "string"]},
            {"$substrCP": ["$$first.content", 0, BEGINNING_CHARS + 1]},
            "",
        ]
    }
    return {
        "createdAt": 1,
        "updatedAt": 1,
        "title": 1,
        "head": 1,
        "reply._id": 1,
        "reply.parent": 1,
        "count": COUNT,
        "tree": {"$cond": [HAS_BRANCHES, TREE, None]},
        "beginning": let({"first": {"$ifNull": [{"$first": users}, {"$first": messages}]}}, result=beginning),
    }


def along(indexes: Any) -> Any:
    """Return the expression for the messages with some indexes."""
    chosen = {"$map": {"input": indexes, "in": {"$arrayElemAt": ["$$all", "$$this"]}}}
    return let({"all": MESSAGES}, result=chosen)


def is_branching(begin: Any, count: Any) -> Document:
    """Return the expression for whether some messages, or the one before them, are not simply a part of the path.

    That is, whether one is superseded or has a stored parent.

    :param begin: the index of the first one
    """
    from_ = {"$max": [0, {"$subtract": [begin, 1]}]}
    has_parent = {"$in": [{"$type": "$$this.parent"}, ["objectId", "null"]]}
    branches = {"$or": [{"$eq": ["$$this.status", "superseded"]}, has_parent]}
    window = {"$slice": [MESSAGES, from_, {"$add": [count, 1]}]}
    return {"$anyElementTrue": [{"$map": {"input": window, "in": branches}}]}


def literal(value: str | None) -> Document:
    """Return the expression for a value; a text may begin with `$`."""
    return {"$literal": value}


def index_of_key(key: str) -> Document:
    """Return the expression for the index of the message with an idempotency key, -1 if there is none."""
    return {"$indexOfArray": [{"$map": {"input": MESSAGES, "in": {"$ifNull": ["$$this.key", None]}}}, literal(key)]}


def index_of(conversation: ObjectId, message_id: str) -> Document:
    """Return the expression for a message's index, -1 if no message has this id.

    `$messages._id` omits messages without an `_id`, so an index into it may be too low. It is checked, and the more
    expensive search follows only if it is wrong.
    """
    wanted = ObjectId(message_id)
    if (index := derived_index(conversation, message_id)) is not None:
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
    """Return the expression for the `_id` of the message at an index: null if no ObjectId, 0 without a message."""
    message = {"$arrayElemAt": [MESSAGES, index]}
    of_message = {"$cond": [{"$eq": [{"$type": "$$message._id"}, "objectId"]}, "$$message._id", None]}
    exists = {"$lt": [index, COUNT]}
    return {"$cond": [exists, {"$let": {"vars": {"message": message}, "in": of_message}}, 0]}


def messages_from(at: Document | int, count: int) -> Document:
    """Return the expression for `count` messages from an index on; for none if the index is negative."""
    return {
        "$let": {
            "vars": {"at": at},
            "in": {"$cond": [{"$lt": ["$$at", 0]}, [], {"$slice": [MESSAGES, "$$at", count]}]},
        }
    }


def last_ids(count: int) -> Document:
    """Return the expression for the `_id`s of the last messages, null for messages without one."""
    return {"$map": {"input": {"$slice": [MESSAGES, -count]}, "in": {"$ifNull": ["$$this._id", None]}}}


def _question_index(prompt: str, indexes: Any) -> Document:
    """Return the expression for the index of the last user message if its `_id` is no ObjectId, else null.

    :param prompt: the variable that holds the messages that may be part of a prompt
    :param indexes: of the active path
    """
    is_users = {
        "$eq": [{"$let": {"vars": {"message": {"$arrayElemAt": [MESSAGES, "$$this"]}}, "in": "$$message.role"}}, "user"]
    }
    users = {"$filter": {"input": indexes, "cond": is_users}}
    return {
        "$let": {
            "vars": {"question": {"$last": prompt}},
            "in": {"$cond": [{"$eq": [{"$type": "$$question._id"}, "objectId"]}, None, {"$max": users}]},
        }
    }


def newest_within(messages: Document, most_bytes: int) -> Any:
    """Return the expression for the newest of some messages, at least one, which begin within `most_bytes`.

    A turn keeps its prompt in memory while the reply runs: without a limit, each would hold a long conversation.
    """
    count = fitting({"$reverseArray": "$$messages"}, SIZE, most_bytes)
    return let({"messages": messages}, result={"$slice": ["$$messages", {"$multiply": [-1, count]}]})


def let(*steps: Document, result: Any) -> Any:
    """Return the expression for a result that uses variables; each step may use those before it."""
    for variables in reversed(steps):
        result = {"$let": {"vars": variables, "in": result}}
    return result


def fitting(messages: Any, size: Document, most_bytes: int) -> Document:
    """Return the expression for how many messages, at least 1, begin within `most_bytes`.

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
    return {"$max": [1, let({"counted": counted}, result="$$counted.count")]}


def is_expired(lease_ms: int) -> Document:
    """Return the expression for whether the running reply's lease has expired."""
    return {
        "$or": [
            {"$lt": ["$reply.renewedAt", {"$subtract": ["$$NOW", lease_ms]}]},
            # The database's clock was set back: a server that is alive renews such a lease at its next checkpoint.
            {"$gt": ["$reply.renewedAt", {"$add": ["$$NOW", lease_ms]}]},
        ]
    }


def turn(history: int, history_chars: int, path: Sequence[int] | None = None) -> Document:
    """Return the projection of the fields that a new turn needs, instead of the whole document.

    :param history: how many of the newest messages
    :param history_chars: messages before these newest code points may be left out
    :param path: the indexes of the active path; None if the conversation has no branches
    """
    indexes = {"$range": [0, COUNT]} if path is None else list(path)
    messages = MESSAGES if path is None else along(indexes)
    in_prompt: Any = [{"$in": ["$$this.role", ["user", "assistant"]]}]
    if path is None:
        in_prompt.append({"$ne": ["$$this.status", "superseded"]})
    prompt = {"$filter": {"input": messages, "cond": {"$and": in_prompt}}}
    return {
        "title": 1,
        "head": 1,
        "reply._id": 1,
        "reply.createdAt": 1,
        "reply.parent": 1,
        "reply.key": 1,
        "size": {"$bsonSize": "$$ROOT"},
        "turns": {"$size": {"$filter": {"input": messages, "cond": {"$eq": ["$$this.role", "user"]}}}},
        "count": COUNT,
        "last": last_ids(2),
        "prompt": let(
            {"prompt": prompt},
            result={
                # 4 bytes are the most that a code point takes.
                "messages": newest_within({"$slice": ["$$prompt", -history]}, 4 * history_chars),
                "question_index": _question_index("$$prompt", indexes),
            },
        ),
    }
