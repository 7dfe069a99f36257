"""Branches: the messages of a conversation as a tree. Pure: no I/O, no clock.

`messages` is an array that only grows. A message continues its *parent*, an earlier message, or is a first message. The
*head* is the message at the end of the active path, which is what a reader sees. Messages with the same parent are
*siblings*: versions of one another.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple


class Parent(NamedTuple):
    """The message that a message continues, as stored.

    :ivar id: None for a first message
    """

    id: str | None


class Node(NamedTuple):
    """One message, as stored.

    :ivar parent: None if none is stored
    :ivar superseded: whether version 1 retried this reply: messages without a stored parent do not continue it
    """

    id: str
    role: str
    parent: Parent | None = None
    superseded: bool = False


class Tree:
    """The messages of a conversation with their parents. Indexes count from the first message.

    A message without a stored parent continues the nearest earlier message that is not superseded. So does one whose
    stored parent is no earlier message: a parent always has the lower index, and there are no cycles.

    :param nodes: in the order of the array
    :param head: the id of the message at the end of the active path; None or an unknown id for the last message
    """

    def __init__(self, nodes: Sequence[Node], head: str | None = None) -> None:
        self.nodes = nodes
        self._index: dict[str, int] = {}
        """Id -> index."""
        self._parents: list[int | None] = []
        """The index of each message's parent."""
        current: int | None = None
        for index, node in enumerate(nodes):
            if node.parent is None:
                parent = current
            else:
                parent = None if node.parent.id is None else self._index.get(node.parent.id, current)
            self._parents.append(parent)
            self._index[node.id] = index
            if not node.superseded:
                current = index
        self.next_parent = self._id(current)
        """The id of the message that the next one without a stored parent continues; None if it is a first message."""
        last = len(nodes) - 1 if nodes else None
        self._head = last if head is None else self._index.get(head, last)

    @property
    def head(self) -> str | None:
        """The id of the message at the end of the active path; None if there are no messages."""
        return self._id(self._head)

    def __contains__(self, message_id: str) -> bool:
        return message_id in self._index

    def node(self, message_id: str) -> Node:
        """Return a message; raises `KeyError` if it is unknown."""
        return self.nodes[self._index[message_id]]

    def parent(self, message_id: str) -> str | None:
        """Return the id of a message's parent; None for a first message."""
        return self._id(self._parents[self._index[message_id]])

    def path(self, message_id: str | None) -> list[int]:
        """Return the indexes from a first message to a message; none for None."""
        index = None if message_id is None else self._index[message_id]
        path = []
        while index is not None:
            path.append(index)
            index = self._parents[index]
        return path[::-1]

    def siblings(self, message_id: str) -> Sequence[str]:
        """Return the ids of the messages with the same parent, including this one, the oldest first."""
        return [self.nodes[each].id for each in self._children[self._parents[self._index[message_id]]]]

    def leaf(self, message_id: str) -> str:
        """Return the end of the path from a message to its newest child, that one's newest child, and so on."""
        index = self._index[message_id]
        while children := self._children.get(index):
            index = children[-1]
        return self.nodes[index].id

    @cached_property
    def _children(self) -> dict[int | None, list[int]]:
        """The indexes of each message's children; of the first messages under None."""
        children: dict[int | None, list[int]] = {}
        for index, parent in enumerate(self._parents):
            children.setdefault(parent, []).append(index)
        return children

    def _id(self, index: int | None) -> str | None:
        return None if index is None else self.nodes[index].id
