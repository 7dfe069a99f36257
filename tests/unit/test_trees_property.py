"""Branches, for whatever hypothesis comes up with: every client, the history and the record are those of a model.

The machine is the one of `test_positions_property`, with conversations that are trees: messages are posted after any
other message, replies are regenerated, branches are switched, conversations are renamed, and another application
appends messages. Its clients know the protocol, and nothing but what they were sent.
"""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
from bson import ObjectId
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from chatserver.branches import Parent
from chatserver.errors import NoSuchConversation, NotAReply, NotFound, NothingToRetry, ReplyInProgress
from chatserver.reading import History
from chatserver.records import Message
from chatserver.records import Turn as StoredTurn
from tests.clients import EventDecoder, new_id
from tests.trees import Shown, View
from tests.unit.test_positions_property import (
    CLIENTS,
    MEANWHILE,
    PIECES,
    SERVERS,
    WINDOWS,
    Client,
    Conversation,
    Server,
    Turn,
    World,
    world,
)

__all__ = ["world"]

MESSAGES = st.integers(0, 30)
"""Chooses one of the messages."""
TITLES = st.none() | st.sampled_from(["One", "Two"])


class Keyed(NamedTuple):
    """A retry with an idempotency key: what was asked for, and what was started."""

    key: str
    message_id: str | None
    turn: StoredTurn


class TreeClient(Client):
    """A client that shows one branch, and fetches the history if it is sent a head that it does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.view = View()

    def take(self, data: bytes) -> None:
        self.feed(data)
        for event in self.events:
            was_stale = self.view.is_stale
            self.view.take(event)
            self.was_reset |= event.name == "reset"
            if event.name == "token" and not was_stale and (reply := self.view.running) is not None:
                assert len(reply.text) == int(event.id.rpartition("-")[2]), "a token that does not follow"
        self.events.clear()

    def begin_with(self, history: dict[str, str], ended: dict[str, str], position: str) -> None:
        assert not history and not ended
        self.view = View()
        self.decoder = EventDecoder(position)
        self.was_reset = False


class TreeConversation(Conversation):
    """One conversation on two servers; see `Conversation`.

    Each item of `record` has the id, the role, the parent's id, the content and the status of a message.
    """

    make_client = TreeClient
    record: list[Any]
    clients: list[TreeClient]  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.head: str | None = None
        """The message at the end of the active path; the running reply, if there is one."""
        self.title: str | None = None
        self.parent: str | None = None
        """The parent of the running reply."""
        self.keyed: list[Keyed] = []
        self.current: set[Server] = set()
        """The servers whose subscribers must have been sent everything but later text of a reply."""
        self.titled: set[Server] = set()
        """The servers whose subscribers must have been sent the title."""
        self.steps = 0

    @initialize(branched=st.booleans())
    def start(self, branched: bool = False) -> None:
        super().start()
        for number in range(len(self.servers)):
            self.come(number=number, begins="start", window=400)
        if branched:
            self.converse(number=0, text="one", place="head", which=0, pieces=["first"], how="complete")
            self.regenerate(number=0, which=None, keyed=True)
            self.append(pieces=["second"], saved=True)
            self.end(how="complete")

    # -- the model -------------------------------------------------------------------------------------------------

    def stored(self) -> list[Any]:
        document = self.world.conversations.find_one({"_id": ObjectId(self.id)}) or {"messages": []}
        found: list[Any] = []
        before = None
        for each in document["messages"]:
            parent = each.get("parent", before)
            before = each["_id"]
            values = (each["role"], parent and str(parent), each["content"], each.get("status", "complete"))
            found.append((str(each["_id"]), *values))
        return found

    @property
    def parents(self) -> dict[str, str | None]:
        """The id of each message -> its parent's, in the order of the array; a running reply included."""
        parents = {message_id: parent for message_id, _, parent, *_ in self.record}
        if self.turn is not None:
            parents[self.turn.reply_id] = self.parent
        return parents

    def path(self, message_id: str | None) -> list[str]:
        parents, path = self.parents, []
        while message_id is not None:
            path.append(message_id)
            message_id = parents[message_id]
        return path[::-1]

    def siblings(self, message_id: str) -> list[str]:
        parents = self.parents
        return [each for each, parent in parents.items() if parent == parents[message_id]]

    def leaf(self, message_id: str) -> str:
        while children := [each for each, parent in self.parents.items() if parent == message_id]:
            message_id = children[-1]
        return message_id

    def role(self, message_id: str) -> str:
        return next((role for each, role, *_ in self.record if each == message_id), "assistant")

    def shown(self, said: str = "") -> list[Shown]:
        """Return the active path.

        :param said: the text of the running reply, if there is one
        """
        messages = {each: Shown(each, role, content, status) for each, role, _, content, status in self.record}
        if self.turn is not None:
            messages[self.turn.reply_id] = Shown(self.turn.reply_id, "assistant", said, "streaming")
        return [messages[each] for each in self.path(self.head)]

    def answered(self, reply_id: str) -> str | None:
        """Return the user's message that a reply answers, if any: the nearest one that is not of another role."""
        before = [each for each in self.path(reply_id)[:-1] if self.role(each) in ("user", "assistant")]
        return before[-1] if before and self.role(before[-1]) == "user" else None

    def choose(self, which: int) -> str:
        message_id: str = self.record[which % len(self.record)][0]
        return message_id

    def is_settled(self, server: Server) -> bool:
        """Return whether no reply runs at a server, not even one that another server has ended."""
        live = server.hub.get(self.key)
        return live is None or live.reply is None

    # -- comparing -------------------------------------------------------------------------------------------------

    def look(self, *allowed: tuple[str, str]) -> None:
        turn = self.turn
        super().look(*allowed)
        if turn is not None and self.turn is None:
            assert self.record[-1][2] == self.parent, "the reply has lost its parent"
            self.current = {turn.server} if turn.server in self.servers and self.ended_at is not None else set()
        self.steps += 1
        self.run(self.compare_history(self.servers[self.steps % 2]))
        self.compare_views()

    async def compare_history(self, server: Server) -> None:
        """Compare the history, and that of all branches, with the model."""
        if not self.record:
            with pytest.raises(NoSuchConversation):
                await server.reading.history(self.key)
            return
        plain = await server.reading.history(self.key)
        messages = await all_of(plain)
        turn = self.turn
        running = messages[-1].content if turn is not None else ""
        assert turn is None or (running.startswith(turn.saved) and turn.said.startswith(running))
        shown = [(each.id, each.role, each.content, each.status) for each in messages]
        assert shown == [each.values for each in self.shown(running)]
        siblings = {each.id: self.siblings(each.id) for each in messages}
        if plain.tree is None:
            assert all(len(each) == 1 for each in siblings.values())
        else:
            assert {each: plain.tree.siblings(each) for each in siblings} == siblings
        assert plain.view.title == self.title
        whole = await server.reading.history(self.key, all_branches=True)
        assert whole.tree is not None and whole.tree.head == self.head
        assert {each.id: whole.tree.parent(each.id) for each in await all_of(whole)} == self.parents
        if turn is None:
            page = await server.reading.history(self.key, limit=2)
            assert [each.id for each in await all_of(page)] == self.path(self.head)[-2:]

    def compare_views(self) -> None:
        """Compare what clients show that must have been sent everything."""
        turn = self.turn
        for client in self.clients:
            line, server = client.line, client.server
            if line is None or line.stalled or client.view.is_stale:
                continue
            if server in self.titled:
                assert client.view.title == self.title
            if server in self.current and (turn is None or turn.server is server):
                self.compare_view(client.view, turn.said if turn else "")

    def compare_view(self, view: View, said: str = "") -> None:
        expected = self.shown(said)
        if self.turn is not None and not said and view.running is None:
            expected.pop()  # clients learn of a reply with its first text
        if (running := view.running) is not None and running.id is None and expected:
            expected[-1].id = None
        assert view.values == [each.values for each in expected]

    # -- changes of the tree ---------------------------------------------------------------------------------------

    def begin(self, server: Server, work: Any, meanwhile: tuple[int, int] | None) -> StoredTurn:
        """Start a turn; return it once its source is asked."""
        started: list[StoredTurn] = []

        async def start() -> None:
            food = server.source.food
            started.append(await work)
            while server.source.food is food:
                await asyncio.sleep(0)

        self.run(start(), meanwhile)
        return started[0]

    def began(self, server: Server, turn: StoredTurn, parent: str | None) -> None:
        self.turn, self.parent, self.head = Turn(turn.reply_id, server), parent, turn.reply_id
        self.current = {server}
        self.titled.add(server)
        self.look()

    @precondition(lambda self: self.turn is None)
    @rule(
        number=SERVERS,
        text=PIECES,
        place=st.sampled_from(["head", "head", "message", "message", "first"]),
        which=MESSAGES,
        meanwhile=MEANWHILE,
    )
    def say(self, number: int, text: str, place: str, which: int, meanwhile: tuple[int, int] | None = None) -> None:
        server = self.servers[number]
        parent = self.head
        if place == "first":
            parent = None
        elif place == "message" and self.record:
            parent = self.choose(which)
        named = None if place == "head" else Parent(parent)
        turn = self.begin(server, server.chat.say(None, self.id, text, parent=named), meanwhile)
        self.record.append((turn.message_id, "user", parent, text, "complete"))
        self.began(server, turn, turn.message_id)

    @precondition(lambda self: self.turn is None)
    @rule(
        number=SERVERS,
        text=PIECES,
        place=st.sampled_from(["head", "message", "first"]),
        which=MESSAGES,
        pieces=st.lists(PIECES, min_size=1, max_size=3),
        how=st.sampled_from(["complete", "failed", "stopped"]),
    )
    def converse(self, number: int, text: str, place: str, which: int, pieces: list[str], how: str) -> None:
        """Play a whole turn, so that trees grow within a few steps."""
        self.say(number=number, text=text, place=place, which=which)
        self.append(pieces=pieces, saved=False)
        self.end(how=how)

    @precondition(lambda self: self.turn is None and self.record)
    @rule(number=SERVERS, which=st.none() | MESSAGES, keyed=st.booleans(), meanwhile=MEANWHILE)
    def regenerate(self, number: int, which: int | None, keyed: bool, meanwhile: tuple[int, int] | None = None) -> None:
        server = self.servers[number]
        message_id = None if which is None else self.choose(which)
        replies = [each for each in self.path(self.head) if self.role(each) == "assistant"]
        if message_id is None and replies:
            retried: str | None = replies[-1]
        else:
            retried = message_id
        key = new_id() if keyed else None
        work = server.chat.retry(self.key, message_id, key)
        if retried is None or self.role(retried) != "assistant":
            self.refused(work, NothingToRetry if retried is None else NotAReply)
        elif (question := self.answered(retried)) is None:
            self.refused(work, NothingToRetry)
        else:
            turn = self.begin(server, work, meanwhile)
            assert turn.message_id == question
            if key is not None:
                self.keyed.append(Keyed(key, message_id, turn))
            self.began(server, turn, self.parents[retried])

    def refused(self, work: Any, error: type[Exception]) -> None:
        async def ask() -> None:
            with pytest.raises(error):
                await work

        self.run(ask())
        self.look()

    @precondition(lambda self: self.keyed)
    @rule(number=SERVERS, which=MESSAGES)
    def repeat(self, number: int, which: int) -> None:
        """Repeat a retry with its key: nothing happens."""
        keyed = self.keyed[which % len(self.keyed)]

        async def repeat() -> None:
            assert await self.servers[number].chat.retry(self.key, keyed.message_id, keyed.key) == keyed.turn

        self.run(repeat())
        self.look()

    @precondition(lambda self: self.record)
    @rule(number=SERVERS, which=MESSAGES, meanwhile=MEANWHILE)
    def show(self, number: int, which: int, meanwhile: tuple[int, int] | None = None) -> None:
        server, message_id = self.servers[number], self.choose(which)

        async def show() -> None:
            if self.turn is not None:
                with pytest.raises(ReplyInProgress):
                    await server.chat.show(self.key, message_id)
                return
            head = self.leaf(message_id)
            assert await server.chat.show(self.key, message_id) == head
            self.head = head

        self.run(show(), meanwhile)
        if self.turn is None:
            self.current = {server} if self.is_settled(server) else set()
        self.look()

    @precondition(lambda self: self.record)
    @rule(number=SERVERS, title=TITLES)
    def rename(self, number: int, title: str | None) -> None:
        server = self.servers[number]

        async def rename() -> None:
            assert (await server.chat.rename(self.key, title)).title == title

        self.run(rename())
        self.titled = {server} if title != self.title else self.titled | {server}
        self.title = title
        self.look()

    @precondition(lambda self: self.turn is None)
    @rule(number=SERVERS, what=st.sampled_from(["post", "retry", "show"]))
    def name_what_is_not_there(self, number: int, what: str) -> None:
        chat, unknown = self.servers[number].chat, new_id()

        async def ask() -> None:
            with pytest.raises(NotFound):
                match what:
                    case "post":
                        await chat.say(None, self.id, "Hello", parent=Parent(unknown))
                    case "retry":
                        await chat.retry(self.key, unknown)
                    case "show":
                        await chat.show(self.key, unknown)

        self.run(ask())
        self.look()

    @precondition(lambda self: self.turn is None and self.record)
    @rule(role=st.sampled_from(["user", "assistant", "system"]), text=PIECES)
    def append_elsewhere(self, role: str, text: str) -> None:
        """Let another application append a message, as Mongoose does."""
        message = {"_id": ObjectId(), "role": role, "content": text, "createdAt": datetime.now(UTC)}
        self.world.conversations.update_one({"_id": ObjectId(self.id)}, {"$push": {"messages": message}})
        self.record.append((str(message["_id"]), role, self.record[-1][0], text, "complete"))
        self.head = str(message["_id"])
        self.current.clear()
        self.look()

    # -- clients ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.clients) < 5)
    @rule(number=SERVERS, begins=st.sampled_from(["start", "history"]), window=WINDOWS)
    def come(self, number: int, begins: str, window: int) -> None:
        # A client that begins nowhere does not show the whole path.
        super().come(number=number, begins=begins if self.record else "start", window=window)

    @precondition(lambda self: self.clients and self.turn is not None and self.turn.server is not None)
    @rule(which=CLIENTS, number=SERVERS, pieces=st.lists(PIECES, min_size=2, max_size=4), ended=st.booleans())
    def miss(self, which: int, number: int, pieces: list[str], ended: bool) -> None:
        """Let a client miss the rest of a reply, or a part of it, and resume in the middle."""
        assert self.turn is not None and self.turn.server is not None
        self.cut(which=which, share=1.0, number=self.servers.index(self.turn.server), window=100)
        self.append(pieces=pieces[:1], saved=True)
        self.cut(which=which, share=1.0, number=None, window=100)
        self.append(pieces=pieces[1:], saved=True)
        if ended:
            self.end(how="complete")
        self.cut(which=which, share=1.0, number=number, window=100)

    def come_to_rest(self) -> None:
        super().come_to_rest()
        for which in range(len(self.keyed)):
            self.repeat(number=which % 2, which=which)

    async def connect(self, client: Client, server: Server, window: int) -> None:
        assert isinstance(client, TreeClient)
        client.view.open()
        await super().connect(client, server, window)
        if self.turn is None and self.is_settled(server):
            self.current.add(server)
            self.titled.add(server)

    async def settle(self) -> None:
        await super().settle()
        while stale := [each for each in self.clients if each.view.is_stale]:
            for client in stale:
                server = client.server if client.server in self.servers else self.servers[0]
                assert server is not None
                if client.line is not None:
                    client.line.connection.connection_lost(None)
                    client.lose_line()
                await self.begin_with_history(client, server)
                await self.connect(client, server, 100)
            await super().settle()

    async def begin_with_history(self, client: Client, server: Server) -> None:
        assert isinstance(client, TreeClient)
        history = await server.reading.history(self.key)
        parts = [part async for part in history.parts]
        client.begin_with({}, {}, str(parts[-1].position))
        for each in [message for part in parts for message in part.messages]:
            client.view.messages.append(Shown(each.id, each.role, each.content, each.status))
        client.view.title = history.view.title

    async def catch_up(self) -> None:
        """Have all clients resume, on any server; a new one on each reads the whole conversation."""
        for _ in self.servers:
            client = TreeClient()
            client.begin_with({}, {}, f"{self.id}-0")
            self.clients.append(client)
        for index, client in enumerate(self.clients):
            if client.line is not None:
                client.line.cut(client, 1.0)
                client.lose_line()
            await self.connect(client, self.servers[index % 2], 100)
        await self.settle()

    def compare(self) -> None:
        end = f"{self.record[-1][0]}-done" if self.record else f"{self.id}-0"
        for client in self.clients:
            assert client.position == end, "a client was left behind"
            self.compare_view(client.view)
            assert client.view.title == self.title


async def all_of(history: History) -> Sequence[Message]:
    """Return all messages of a history."""
    return [message async for part in history.parts for message in part.messages]


@pytest.fixture
def machine(world: World) -> type[TreeConversation]:
    return type("ThisConversation", (TreeConversation,), {"world": world})


def play(machine: type[TreeConversation], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # to make a failing sequence shorter takes minutes, since much of it is waiting
        ),
    )


def test_play_with_each_kind_of_step(machine: type[TreeConversation]) -> None:
    """A short play that does not depend on chance."""
    tree = machine()
    tree.start(branched=True)
    tree.show(number=0, which=1)
    tree.show(number=0, which=2)
    tree.say(number=0, text="two", place="message", which=1)
    tree.miss(which=0, number=0, pieces=["one ", "two ", "three"], ended=False)
    tree.miss(which=1, number=1, pieces=["four ", "five ", "six"], ended=True)
    tree.converse(number=1, text="top", place="first", which=0, pieces=["text"], how="stopped")
    tree.show(number=1, which=0)
    tree.append_elsewhere(role="user", text="elsewhere")
    tree.regenerate(number=0, which=1, keyed=True)
    tree.append(pieces=["kept"], saved=True)
    tree.rename(number=0, title="One")
    tree.run_out_of_lease(number=1)
    tree.repeat(number=1, which=1)
    tree.show(number=1, which=0)
    tree.teardown()


def test_client_of_a_server_whose_reply_was_ended_elsewhere_is_shown_another_branch(
    machine: type[TreeConversation],
) -> None:
    """It was sent the head of the reply again and again, and fetched the history each time."""
    tree = machine()
    tree.start(branched=True)
    tree.regenerate(number=0, which=1, keyed=False)
    tree.run_out_of_lease(number=1)
    tree.show(number=0, which=1)
    tree.come(number=0, begins="history", window=100)
    tree.converse(number=1, text="later", place="head", which=0, pieces=["text"], how="complete")
    tree.show(number=0, which=2)
    tree.come(number=0, begins="history", window=100)
    tree.teardown()


def test_clients_history_and_record_are_those_of_the_tree(machine: type[TreeConversation]) -> None:
    play(machine, examples=20, steps=25)


@pytest.mark.soak
def test_clients_history_and_record_are_those_of_the_tree_after_many_steps(machine: type[TreeConversation]) -> None:
    play(machine, examples=100, steps=50)
