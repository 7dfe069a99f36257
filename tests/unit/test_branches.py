"""The tree of a conversation's messages: parents, path, siblings and leaves, from tables."""

from collections.abc import Sequence

import pytest
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st

from chatserver.branches import Node, Parent, Tree
from chatserver.store import documents

FIRST = Parent(None)


def user(id_: str, parent: Parent | None = None) -> Node:
    return Node(id_, "user", parent)


def reply(id_: str, parent: Parent | None = None) -> Node:
    return Node(id_, "assistant", parent)


def retried(id_: str, parent: Parent | None = None) -> Node:
    """Return a reply that version 1 retried."""
    return Node(id_, "assistant", parent, superseded=True)


NODES: dict[str, tuple[list[Node], dict[str, str | None], str | None]] = {
    # name: the nodes, the parent of each, and the parent of the next message without a stored one
    "empty": ([], {}, None),
    "linear": (
        [user("q1"), reply("a1"), user("q2"), reply("a2")],
        {"q1": None, "a1": "q1", "q2": "a1", "a2": "q2"},
        "a2",
    ),
    "superseded": (
        [user("q1"), retried("a1"), reply("a2"), user("q2")],
        {"q1": None, "a1": "q1", "a2": "q1", "q2": "a2"},
        "q2",
    ),
    "superseded chain": (
        [user("q1"), retried("a1"), retried("a2"), retried("a3"), reply("a4")],
        {"q1": None, "a1": "q1", "a2": "q1", "a3": "q1", "a4": "q1"},
        "a4",
    ),
    "superseded at the end": ([user("q1"), retried("a1")], {"q1": None, "a1": "q1"}, "q1"),
    "superseded first": ([retried("a1"), reply("a2")], {"a1": None, "a2": None}, "a2"),
    "superseded with a stored parent": (
        [user("q1"), reply("a1"), retried("a2", Parent("q1")), user("q2")],
        {"q1": None, "a1": "q1", "a2": "q1", "q2": "a1"},
        "q2",
    ),
    "child of a superseded reply": (
        [user("q1"), retried("a1"), reply("a2"), user("q2", Parent("a1"))],
        {"q1": None, "a1": "q1", "a2": "q1", "q2": "a1"},
        "q2",
    ),
    "regenerated": (
        [user("q1"), reply("a1"), reply("a2", Parent("q1"))],
        {"q1": None, "a1": "q1", "a2": "q1"},
        "a2",
    ),
    "edited": (
        [user("q1"), reply("a1"), user("q2"), reply("a2"), user("q3", Parent("a1")), reply("a3", Parent("q3"))],
        {"q1": None, "a1": "q1", "q2": "a1", "a2": "q2", "q3": "a1", "a3": "q3"},
        "a3",
    ),
    "second first message": (
        [user("q1"), reply("a1"), user("q2", FIRST), reply("a2", Parent("q2"))],
        {"q1": None, "a1": "q1", "q2": None, "a2": "q2"},
        "a2",
    ),
    "message of another application after branches": (
        [user("q1"), reply("a1"), reply("a2", Parent("q1")), user("q2")],
        {"q1": None, "a1": "q1", "a2": "q1", "q2": "a2"},
        "q2",
    ),
    "unknown parent": ([user("q1"), reply("a1", Parent("?"))], {"q1": None, "a1": "q1"}, "a1"),
    "unknown parent after a superseded reply": (
        [user("q1"), retried("a1"), reply("a2", Parent("?"))],
        {"q1": None, "a1": "q1", "a2": "q1"},
        "a2",
    ),
    "unknown parent of the first message": ([user("q1", Parent("?"))], {"q1": None}, "q1"),
    "later parent": (
        [user("q1"), reply("a1", Parent("q2")), user("q2")],
        {"q1": None, "a1": "q1", "q2": "a1"},
        "q2",
    ),
    "own parent": ([user("q1"), reply("a1", Parent("a1"))], {"q1": None, "a1": "q1"}, "a1"),
    "cycle": (
        [user("q1", Parent("a1")), reply("a1", Parent("q1"))],
        {"q1": None, "a1": "q1"},
        "a1",
    ),
}


@pytest.mark.parametrize("name", NODES)
def test_parent_of_each_message(name: str) -> None:
    nodes, parents, next_parent = NODES[name]

    tree = Tree(nodes)

    assert {each.id: tree.parent(each.id) for each in nodes} == parents
    assert tree.next_parent == next_parent
    assert tree.head == (nodes[-1].id if nodes else None)
    assert all(each.id in tree and tree.node(each.id) == each for each in nodes)


TALL = [
    user("q1"),  # 0
    reply("a1"),  # 1
    user("q2"),  # 2
    reply("a2"),  # 3
    reply("a2'", Parent("q2")),  # 4
    user("q2'", Parent("a1")),  # 5
    reply("a3", Parent("q2'")),  # 6
    user("q3", Parent("a2")),  # 7
    user("q1'", FIRST),  # 8
    reply("a4", Parent("q1'")),  # 9
]
"""
q1 ── a1 ─┬─ q2 ─┬─ a2 ── q3
          │      └─ a2'
          └─ q2' ── a3
q1' ── a4
"""


@pytest.mark.parametrize(
    ("message_id", "path", "siblings", "leaf"),
    [
        ("q1", [0], ["q1", "q1'"], "a3"),
        ("a1", [0, 1], ["a1"], "a3"),
        ("q2", [0, 1, 2], ["q2", "q2'"], "a2'"),
        ("a2", [0, 1, 2, 3], ["a2", "a2'"], "q3"),
        ("a2'", [0, 1, 2, 4], ["a2", "a2'"], "a2'"),
        ("q2'", [0, 1, 5], ["q2", "q2'"], "a3"),
        ("a3", [0, 1, 5, 6], ["a3"], "a3"),
        ("q3", [0, 1, 2, 3, 7], ["q3"], "q3"),
        ("q1'", [8], ["q1", "q1'"], "a4"),
        ("a4", [8, 9], ["a4"], "a4"),
    ],
)
def test_path_siblings_and_leaf_of_each_message(
    message_id: str, path: Sequence[int], siblings: Sequence[str], leaf: str
) -> None:
    tree = Tree(TALL)

    assert tree.path(message_id) == path
    assert tree.siblings(message_id) == siblings
    assert tree.leaf(message_id) == leaf


def test_path_to_nothing_is_empty() -> None:
    assert Tree([]).path(None) == Tree(TALL).path(None) == []
    assert Tree([]).head is None and "q1" not in Tree([])


@pytest.mark.parametrize("ask", [Tree.node, Tree.parent, Tree.path, Tree.siblings, Tree.leaf])
def test_unknown_message_is_an_error(ask: object) -> None:
    with pytest.raises(KeyError):
        ask(Tree(TALL), "unknown")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("stored", "head"), [("a3", "a3"), ("a1", "a1"), ("a4", "a4"), ("unknown", "a4"), (None, "a4")]
)
def test_head_is_the_stored_message_else_the_last_one(stored: str | None, head: str) -> None:
    tree = Tree(TALL, stored)

    assert tree.head == head
    # The next message of another application continues the last one, whatever is shown.
    assert tree.next_parent == "a4"


@given(st.data())
def test_any_stored_parents_make_a_tree(data: st.DataObject) -> None:
    """Whatever another application stores: a parent comes before its children, and each message has one path."""
    ids = [f"{number}" for number in range(data.draw(st.integers(0, 12)))]
    parents = st.none() | st.builds(Parent, st.none() | st.sampled_from([*ids, "unknown"]))
    nodes = [Node(each, "assistant", data.draw(parents), data.draw(st.booleans())) for each in ids]
    tree = Tree(nodes, data.draw(st.none() | st.sampled_from([*ids, "unknown"])))
    for index, each in enumerate(ids):
        path = tree.path(each)
        assert path == sorted(set(path)) and path[-1] == index
        assert [nodes[at].id for at in path[:-1]][-1:] == [parent for parent in [tree.parent(each)] if parent]
        siblings = tree.siblings(each)
        assert each in siblings and siblings == [other for other in ids if tree.parent(other) == tree.parent(each)]
        leaf = tree.leaf(each)
        assert index in tree.path(leaf) and all(tree.parent(other) != leaf for other in ids)


# -- the tree of a document ----------------------------------------------------------------------------------------

CONVERSATION = ObjectId("c" * 24)
Q1, A1, A2, RUNNING = (ObjectId(f"{number:024x}") for number in range(1, 5))


def tree_of(messages: Sequence[dict[str, object]], **fields: object) -> Tree:
    return documents.tree({"_id": CONVERSATION, "tree": messages, "count": len(messages), **fields})


def test_running_reply_is_the_head_and_continues_its_parent() -> None:
    messages: list[dict[str, object]] = [{"_id": Q1, "role": "user"}, {"_id": A1, "role": "assistant"}]
    old = {"_id": A1, "length": 2}

    regenerating = tree_of(messages, reply={"_id": RUNNING, "parent": Q1}, head=old)
    continuing = tree_of(messages, reply={"_id": RUNNING}, head=old)

    assert regenerating.head == continuing.head == str(RUNNING)
    assert regenerating.path(str(RUNNING)) == [0, 2] and continuing.path(str(RUNNING)) == [0, 1, 2]
    assert regenerating.siblings(str(A1)) == [str(A1), str(RUNNING)]


def test_head_counts_only_for_the_length_it_was_stored_with() -> None:
    messages: list[dict[str, object]] = [
        {"_id": Q1, "role": "user"},
        {"_id": A1, "role": "assistant"},
        {"_id": A2, "role": "assistant", "parent": Q1},
    ]

    assert tree_of(messages, head={"_id": A1, "length": 3}).head == str(A1)
    assert tree_of(messages, head={"_id": A1, "length": 2}).head == str(A2)


@pytest.mark.parametrize(
    "head", [None, 3, "a1", {}, {"_id": A1}, {"length": 2}, {"_id": "a1", "length": 2}, {"_id": RUNNING, "length": 2}]
)
def test_head_of_another_form_or_of_an_unknown_message_is_ignored(head: object) -> None:
    messages: list[dict[str, object]] = [{"_id": Q1, "role": "user"}, {"_id": A1, "role": "assistant"}]

    assert tree_of(messages, head=head).head == str(A1)


def test_messages_without_ids_have_derived_ones_in_the_tree() -> None:
    tree = tree_of([{"role": "user"}, {"_id": 7, "role": "assistant"}, {"_id": A2, "role": "assistant"}])

    derived = [documents.message_id(CONVERSATION, index, None) for index in range(2)]
    assert [each.id for each in tree.nodes] == [*derived, str(A2)]
    assert tree.path(str(A2)) == [0, 1, 2]


def test_derived_id_is_a_parent() -> None:
    """A regeneration of a message without an `_id` stores the derived id."""
    derived = ObjectId(documents.message_id(CONVERSATION, 0, None))
    tree = tree_of([{"role": "user"}, {"role": "assistant"}, {"_id": A2, "role": "assistant", "parent": derived}])

    assert tree.path(str(A2)) == [0, 2]
    assert tree.siblings(str(A2)) == [documents.message_id(CONVERSATION, 1, None), str(A2)]


@pytest.mark.parametrize("parent", ["text", 5, {"_id": Q1}, [], True])
def test_parent_of_another_type_is_ignored(parent: object) -> None:
    tree = tree_of([{"_id": Q1, "role": "user"}, {"_id": A1, "role": "assistant", "parent": parent}])

    assert tree.parent(str(A1)) == str(Q1)
