"""The store and the shape of its documents, with Motor and PyMongo, on a replica set and a standalone server."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pymongo
import pytest
from bson import ObjectId, encode
from motor.motor_asyncio import AsyncIOMotorClient
from pymongo.errors import BulkWriteError, OperationFailure
from pymongo.monitoring import CommandListener

from chatserver import store as store_package
from chatserver.branches import Parent
from chatserver.errors import (
    ConversationFull,
    DatabaseUnavailable,
    KeyReused,
    NoSuchConversation,
    NoSuchMessage,
    NotAReply,
    NothingToRetry,
    ReplyInProgress,
)
from chatserver.records import (
    INTERRUPTED,
    PAGE_SIZE,
    After,
    All,
    Along,
    Before,
    Between,
    Key,
    Message,
    Newest,
    ReplyError,
    Span,
    StartedTurn,
    Turn,
)
from chatserver.store import Store, client_options, collection, connect, documents, new_id, redact_uri
from chatserver.store.running import Unsaved
from chatserver.store.turns import DOCUMENT_BYTES, REPLY_ROOM
from tests.apps import Database

pytestmark = pytest.mark.gen_test

STORE = Path(store_package.__file__).parent

CLIENTS: dict[str, Callable[[str], Any]] = {
    "motor": lambda uri: connect(uri, 4.0),
    "pymongo": lambda uri: pymongo.AsyncMongoClient(uri, **client_options(4.0)),
}


class Stores:
    """Opens stores on the test's database, by one of the clients."""

    def __init__(self, database: Database, client: str) -> None:
        self.database, self._client = database, client

    @asynccontextmanager
    async def open(self, **options: Any) -> AsyncIterator[Store]:
        client = CLIENTS[self._client](self.database.uri)
        store = Store(client, self.database.uri, **{"timeout_s": 4.0, "lease_ms": 10_000, "history": 50, **options})
        await store.prepare()
        await store.build_indexes()
        try:
            yield store
        finally:
            await store.close()


@pytest.fixture(params=["motor", "pymongo"])
def client(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["database", "standalone_database"])
def stores(request: pytest.FixtureRequest, client: str) -> Stores:
    return Stores(request.getfixturevalue(request.param), client)


def turn(conversation: Key | None = None) -> Turn:
    return Turn(conversation or Key(None, new_id()), new_id(), new_id())


def reply_of(turn: Turn, content: str, **options: Any) -> Message:
    return Message(turn.reply_id, "assistant", content, datetime.now(UTC), **options)


def ended(started: StartedTurn, content: str, **options: Any) -> Message:
    """Return the end of a started turn, with what must be stored with its reply."""
    return reply_of(started.turn, content, parent=started.parent, key=started.key, **options)


async def test_turn_is_stored_as_the_contract_says(stores: Stores) -> None:
    async with stores.open() as store:
        assert store.conversations.collection.write_concern.document == {"w": "majority", "j": True}
        assert store.conversations.collection.read_concern.level == "majority"
        first = turn()
        started = await store.start_turn(first, "Hello", None, new=True)
        assert (started.number, started.previous_id, started.turn) == (1, None, first)
        document = stores.database.conversations.find_one()
        assert set(document) == {"_id", "createdAt", "updatedAt", "messages", "reply"}
        assert set(document["reply"]) == {"_id", "createdAt", "content", "renewedAt"}
        assert isinstance(document["reply"]["renewedAt"], datetime)
        await store.checkpoint({first.reply_id: (first.conversation, "He")})
        assert stores.database.conversations.find_one()["reply"]["content"] == "He"
        message = reply_of(first, "Hey")
        earlier = datetime(2020, 1, 1, tzinfo=UTC)
        stores.database.conversations.update_one({}, {"$set": {"updatedAt": earlier}})
        assert await store.finish(first.conversation, message) == message
        document = stores.database.conversations.find_one()
        assert document["updatedAt"] > earlier
        assert set(document) == {"_id", "createdAt", "updatedAt", "messages"}
        user, reply = document["messages"]
        assert set(user) == set(reply) == {"_id", "role", "content", "createdAt"}
        for each in (document, user, reply):
            assert isinstance(each["_id"], ObjectId) and isinstance(each["createdAt"], datetime)
        assert (user["role"], reply["role"], reply["content"]) == ("user", "assistant", "Hey")
        second = turn(first.conversation)
        started = await store.start_turn(second, "More", None)
        assert (started.number, started.previous_id) == (2, first.reply_id)
        assert [each.content for each in started.messages] == ["Hello", "Hey", "More"]


async def test_finish_can_be_repeated_and_stores_one_message(stores: Stores) -> None:
    async with stores.open() as store:
        first = turn()
        await store.start_turn(first, "Hello", None)
        message = reply_of(first, "Hey")
        await store.finish(first.conversation, message)
        other = reply_of(first, "Other", status="interrupted", error=INTERRUPTED)
        assert (await store.finish(first.conversation, other)).content == "Hey"  # type: ignore[union-attr]
        assert len(stores.database.conversations.find_one()["messages"]) == 2
        await store.delete(first.conversation)
        assert await store.finish(first.conversation, message) is None
        assert stores.database.conversations.count_documents({}) == 0


@pytest.mark.parametrize("known", [True, False])
async def test_one_of_concurrent_posts_starts_a_turn(stores: Stores, known: bool) -> None:
    async with stores.open() as store:
        conversation = Key(None, new_id())
        if known:
            first = turn(conversation)
            await store.start_turn(first, "Hello", None)
            await store.finish(conversation, reply_of(first, "Hey"))
        results = await asyncio.gather(
            *(store.start_turn(turn(conversation), f"{n}", None) for n in range(10)), return_exceptions=True
        )
        assert sum(isinstance(each, ReplyInProgress) for each in results) == 9
        messages = stores.database.conversations.find_one()["messages"]
        assert len(messages) == (3 if known else 1)


async def test_key_names_its_first_turn_and_is_never_used_twice(stores: Stores) -> None:
    async with stores.open() as store:
        first = turn()
        await store.start_turn(first, "Hello", "k")
        assert await store.find_by_key(first.conversation, "k", "Hello") == first
        with pytest.raises(KeyReused):
            await store.find_by_key(first.conversation, "k", "Other")
        await store.finish(first.conversation, reply_of(first, "Hey", status="failed"))
        retried = await store.start_retry(first.conversation, new_id())
        assert await store.find_by_key(first.conversation, "k", "Hello") == first
        await store.finish(first.conversation, reply_of(retried.turn, "Hey again"))
        with pytest.raises(KeyReused):
            await store.start_turn(turn(first.conversation), "Hello", "k")
        assert await store.find_by_key(first.conversation, "other", "Hello") is None
        assert await store.find_by_key(Key(None, new_id()), "k", "Hello") is None
        elsewhere = turn()
        await store.start_turn(elsewhere, "Hello", "k")
        assert await store.find_by_key(elsewhere.conversation, "k", "Hello") == elsewhere


class Commands(CommandListener):
    """Records the commands that are sent to MongoDB, and how many bytes each of its answers has."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.received: list[int] = []

    def started(self, event: Any) -> None:
        self.sent.append(event.command)

    def succeeded(self, event: Any) -> None:
        self.received.append(len(encode(event.reply)))

    def failed(self, event: Any) -> None: ...


@asynccontextmanager
async def recorded(database: Database, **options: Any) -> AsyncIterator[tuple[Store, Commands]]:
    """Yield a store, and the commands that it sends."""
    commands = Commands()
    client: Any = AsyncIOMotorClient(database.uri, event_listeners=[commands], **client_options(4.0))
    store = Store(client, database.uri, timeout_s=4.0, lease_ms=10_000, history=50, **options)
    try:
        yield store, commands
    finally:
        await store.close()


def texts(value: Any, *, evaluated: bool = False) -> Iterator[tuple[str, bool]]:
    """Yield every text in a command, and whether MongoDB evaluates it as an expression if it begins with a dollar."""
    if isinstance(value, str):
        yield value, evaluated
    elif isinstance(value, Mapping):
        for name, each in value.items():
            is_pipeline = name in ("u", "update", "pipeline") and isinstance(each, list)
            is_expression = is_pipeline or name in ("projection", "fields", "$expr")
            yield from texts(each, evaluated=name != "$literal" and (evaluated or is_expression))
    elif isinstance(value, list):
        for each in value:
            yield from texts(each, evaluated=evaluated)


async def commands_of_all_operations(database: Database, text: str, owner: str | None = None) -> list[Any]:
    """Return the commands that MongoDB receives when each operation of a store is called.

    :param text: every text of a client, key or source
    :param owner: the owner of the conversations
    """
    calls: set[str] = set()
    async with recorded(database, observe=lambda operation, *_: calls.add(operation)) as (store, commands):
        await call_all_operations(store, text, owner)
    named = re.findall(r'\.call\("(\w+)"', "".join(path.read_text() for path in STORE.glob("*.py")))
    assert calls == set(named)  # none was left out
    return commands.sent


async def call_all_operations(store: Store, text: str, owner: str | None) -> None:
    first = turn(Key(owner, new_id()))
    await store.prepare()
    await store.start_turn(first, text, text)
    await store.checkpoint({first.reply_id: (first.conversation, text)})
    await store.finish(first.conversation, reply_of(first, text, status="failed", error=ReplyError(text, text)))
    more = await store.start_turn(turn(first.conversation), text, f"{text} 2")
    assert await store.find_started(first.conversation, more.turn.reply_id) is not None
    await read_all_spans(store, first)
    await store.finish(first.conversation, reply_of(more.turn, text))
    retried = await store.start_retry(first.conversation, new_id(), first.reply_id, f"{text} 3")
    assert await store.find_retry(first.conversation, f"{text} 3", None) == retried.turn
    await store.finish(first.conversation, ended(retried, text))
    await store.finish(first.conversation, ended(retried, text))
    unsaved = await store.checkpoint({retried.turn.reply_id: (first.conversation, text)})
    assert unsaved.ended == {retried.turn.reply_id}
    assert await store.find_by_key(first.conversation, text, text) == first
    assert await store.find_retry(first.conversation, f"{text} 3", first.reply_id) == retried.turn
    for parent in (None, Parent(None)):
        with pytest.raises(KeyReused):
            await store.start_turn(turn(first.conversation), text, text, parent=parent)
    with pytest.raises(NoSuchMessage):
        await store.start_turn(turn(Key(owner, new_id())), text, text, parent=Parent(first.message_id))
    edited = await store.start_turn(turn(first.conversation), text, f"{text} 4", parent=Parent(None))
    assert await store.find_started(first.conversation, edited.turn.reply_id) is not None
    await store.find_expired([edited.turn.reply_id])
    assert await store.request_stop(first.conversation, edited.turn.reply_id)
    await store.finish(first.conversation, ended(edited, text))
    assert await store.show(first.conversation, first.reply_id) == more.turn.reply_id
    assert await store.rename(first.conversation, text) is not None
    assert await store.rename(first.conversation, None) is not None
    await read_all_spans(store, first)
    await store.peek(first.conversation)
    (summary,) = await store.summaries(owner, 1, None)
    await store.summaries(owner, 1, summary.place)
    await store.ping()
    await store.keys(owner, 1)
    await store.keys(owner, 1, first.conversation)
    await store.delete(first.conversation)
    some_owner = owner or text
    await store.delete_all(some_owner, [Key(some_owner, new_id())])


async def read_all_spans(store: Store, turn: Turn) -> None:
    """Read each kind of span of a conversation, given by its first turn."""
    spans: list[Span] = [
        Newest(),
        Newest(1),
        Before(turn.reply_id),
        Before(turn.reply_id, 1),
        All(),
        All(with_tree=True),
    ]
    for span in [*spans, After(turn.message_id, 0), After(turn.message_id, None), Between(0, 1), Along([0])]:
        assert await store.read(turn.conversation, span) is not None


async def test_conversation_without_branches_costs_no_additional_command(database: Database) -> None:
    async with recorded(database) as (store, commands):
        await count_commands(store, commands)


async def count_commands(store: Store, commands: Commands) -> None:
    first, text = turn(), "x" * 10_000

    async def sent(call: Awaitable[Any]) -> tuple[Any, list[str]]:
        """Return the result of a call, and the names of its commands."""
        commands.sent.clear()
        return await call, [next(iter(each)) for each in commands.sent]

    async def add(**options: Any) -> list[str]:
        """Add a turn; return the commands of its start."""
        started, names = await sent(store.start_turn(turn(first.conversation), text, None, **options))
        await store.finish(first.conversation, ended(started, text))
        return names

    async def read(span: Span) -> list[str]:
        record, names = await sent(store.read(first.conversation, span))
        assert record.messages
        return names

    await store.start_turn(first, "Hello", None, new=True)
    assert (await sent(store.finish(first.conversation, reply_of(first, "Hi"))))[1] == ["update"]
    assert await add() == ["findAndModify"]
    spans: list[Span] = [
        Newest(),
        Newest(1),
        Before(first.reply_id),
        Before(first.reply_id, 1),
        After(first.message_id, 0),
    ]
    for span in spans:
        assert await read(span) == ["find"], span

    # From here on there are branches. A document that fits one read is still read at once.
    assert await add(parent=Parent(None)) == ["find", "findAndModify"]
    for span in spans[:3]:
        assert await read(span) == ["find"], span
    assert await add() == ["findAndModify", "update", "find", "findAndModify"]
    while len(await read(Newest())) < 2:
        await add()
    record = await store.read(first.conversation, Newest())
    assert record is not None and len(record.messages) * len(text) > PAGE_SIZE - 2 * len(text)
    assert await read(Newest()) == ["find", "find"]


async def test_refused_turn_in_a_long_conversation_reads_little(database: Database) -> None:
    async with recorded(database) as (store, commands):
        first = turn()
        await store.start_turn(first, "Hello", None, new=True)
        messages = [{"_id": ObjectId(), "role": "user", "content": ""} for _ in range(1000)]
        database.conversations.update_one({}, {"$push": {"messages": {"$each": messages}}})
        commands.received.clear()

        for refused in (
            store.start_turn(turn(first.conversation), "Hello", "key"),
            store.start_turn(turn(first.conversation), "Hello", None, parent=Parent(None)),
            store.start_retry(first.conversation, new_id(), first.message_id),
            store.show(first.conversation, first.message_id),
        ):
            with pytest.raises(ReplyInProgress):
                await refused

        assert max(commands.received) < 2000


async def test_text_of_a_client_is_never_evaluated_as_an_expression(database: Database) -> None:
    mark = "$$ROOT.mark"
    sent = await commands_of_all_operations(database, mark)
    found = [(text, evaluated) for command in sent for text, evaluated in texts(command) if mark in text]
    assert len(found) > 10 and not any(evaluated for _, evaluated in found)


def filters(command: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the filters of a command on a collection."""
    match next(iter(command)):
        case "find":
            return [command["filter"]]
        case "findAndModify":
            return [command["query"]]
        case "update":
            return [each["q"] for each in command["updates"]]
        case "delete":
            return [each["q"] for each in command["deletes"]]
        case name:
            raise AssertionError(f"{name}: how does it select documents?")


async def test_every_command_selects_by_a_condition_of_the_collection(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule added to each condition, such as the conversation's owner, reaches MongoDB with each command."""
    monkeypatch.setattr(collection, "Condition", lambda selected: {**selected, "$comment": "the rule"})
    sent = await commands_of_all_operations(database, "Hello")
    on_collection = [each for each in sent if next(iter(each.values())) == "conversations"]
    assert {next(iter(each)) for each in on_collection} == {"find", "findAndModify", "update", "delete"}
    for command in on_collection:
        assert all(each.get("$comment") == "the rule" for each in filters(command)), command


def is_for_all_owners(command: Mapping[str, Any]) -> bool:
    """Return whether a command is a batched read of conversations by id, or the search for expired replies.

    Their results include the owners, and are compared with them or passed on with them.
    """
    if next(iter(command)) != "find" or command["projection"].get("owner") != 1:
        return False
    match command["filter"]:
        case {"_id": {"$in": [*_]}, **others}:
            return not others
        case {"reply._id": _, "$expr": _, **others}:
            return not others
    return False


@pytest.mark.parametrize("owner", ["alice", None])
async def test_every_command_names_the_owner(database: Database, owner: str | None) -> None:
    sent = await commands_of_all_operations(database, "Hello", owner)
    on_collection = [each for each in sent if next(iter(each.values())) == "conversations"]
    # Not the first, by which `prepare` checks that the database accepts writes. It selects no conversation.
    named = [each for each in on_collection[1:] if not is_for_all_owners(each)]

    # Without users only `delete_all`, which always has an owner, names the one that the commands were made with.
    expected = [owner] if owner is not None else [{"$exists": False}, "Hello"]
    assert [each for each in named if any(selected.get("owner") not in expected for selected in filters(each))] == []
    assert len(on_collection) - 1 - len(named) == 3  # `peek`, `find_expired`, and `checkpoint` of an ended reply
    assert not any("owner" in text for command in named for text in changed_fields(command))


def changed_fields(command: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of the fields that a command changes."""
    changes = [each["u"] for each in command.get("updates", [])] + [command.get("update", {})]
    for change in changes:
        if isinstance(change, Mapping):
            for fields in change.values():
                yield from fields


async def test_retried_replies_keep_their_status_and_become_siblings(stores: Stores) -> None:
    async with stores.open(history=1) as store:
        first = turn()
        started = await store.start_turn(first, "Hello", None)
        for status in ("failed", "stopped", "interrupted", "complete"):
            last = ended(started, status, status=status)
            await store.finish(first.conversation, last)
            started = await store.start_retry(first.conversation, new_id())
            assert started.new_message is None and started.number == 1 and started.previous_id == last.id
            assert [(each.role, each.content) for each in started.messages] == [("user", "Hello")]
            assert started.turn.message_id == first.message_id and started.parent == Parent(first.message_id)
        with pytest.raises(ReplyInProgress):
            await store.start_retry(first.conversation, new_id())
        await store.finish(first.conversation, ended(started, "done"))

        document = stores.database.conversations.find_one()
        statuses = [each.get("status") for each in document["messages"]]
        assert statuses == [None, "failed", "stopped", "interrupted", None, None]
        parents = [each.get("parent") for each in document["messages"]]
        assert parents == [None, None, *4 * [ObjectId(first.message_id)]]
        assert document["head"] == {"_id": ObjectId(started.turn.reply_id), "length": 6}
        record = await store.read(first.conversation, Newest())
        assert record is not None and record.tree is not None
        assert [each.content for each in record.messages] == ["Hello", "done"]
        assert record.tree.siblings(started.turn.reply_id) == [str(each["_id"]) for each in document["messages"][1:]]


async def test_retry_names_a_reply_to_a_users_message(stores: Stores) -> None:
    async with stores.open() as store:
        first = turn()
        with pytest.raises(NoSuchConversation):
            await store.start_retry(first.conversation, new_id())
        await store.start_turn(first, "Hello", None)
        await store.finish(first.conversation, reply_of(first, "Hey"))
        before = stores.database.conversations.find_one()
        with pytest.raises(NotAReply):
            await store.start_retry(first.conversation, new_id(), first.message_id)
        with pytest.raises(NoSuchMessage):
            await store.start_retry(first.conversation, new_id(), new_id())
        greeting = {"_id": ObjectId(), "role": "assistant", "content": "Welcome", "createdAt": datetime.now(UTC)}
        greeted = Key(None, str(stores.database.conversations.insert_one({"messages": [greeting]}).inserted_id))
        for message_id in (None, str(greeting["_id"])):
            with pytest.raises(NothingToRetry):
                await store.start_retry(greeted, new_id(), message_id)

        assert stores.database.conversations.find_one({"_id": before["_id"]}) == before


async def test_key_of_a_retry_names_it_while_it_runs_and_afterwards(stores: Stores) -> None:
    async with stores.open() as store:
        first = turn()
        await store.start_turn(first, "Hello", "post")
        await store.finish(first.conversation, reply_of(first, "Hey"))
        retried = await store.start_retry(first.conversation, new_id(), None, "k")
        for _ in range(2):
            for message_id in (None, first.reply_id, retried.turn.reply_id):
                assert await store.find_retry(first.conversation, "k", message_id) == retried.turn
            for message_id in (first.message_id, new_id()):
                with pytest.raises(KeyReused):
                    await store.find_retry(first.conversation, "k", message_id)
            with pytest.raises(KeyReused):
                await store.find_retry(first.conversation, "post", None)
            assert await store.find_retry(first.conversation, "other", None) is None
            assert await store.find_retry(Key(None, new_id()), "k", None) is None
            await store.finish(first.conversation, ended(retried, "Hey again"))
        with pytest.raises(KeyReused):
            await store.find_by_key(first.conversation, "k", "Hello")
        with pytest.raises(KeyReused):
            await store.start_retry(first.conversation, new_id(), None, "k")


async def test_expired_replies_are_found_except_our_own(stores: Stores) -> None:
    async with stores.open(lease_ms=1000) as store:
        ours, theirs, alive = turn(), turn(), turn()
        for each in (ours, theirs, alive):
            await store.start_turn(each, "Hello", None)
        assert await store.find_expired([]) == []
        assert len(await store.find_expired([], sole_server=True)) == 3
        async with asyncio.timeout(5):
            while not (expired := await store.find_expired([ours.reply_id])):
                await store.checkpoint({alive.reply_id: (alive.conversation, "alive")})
                await asyncio.sleep(0.02)
        assert [conversation for conversation, _ in expired] == [theirs.conversation]
        message = reply_of(theirs, expired[0][1].content, status="interrupted", error=INTERRUPTED)
        await store.checkpoint({theirs.reply_id: (theirs.conversation, "renewed")})
        assert await store.finish(theirs.conversation, message, if_renewed_at=expired[0][1].renewed_at) is None
        assert "reply" in stores.database.conversations.find_one({"_id": ObjectId(theirs.conversation.id)})


async def test_checkpoint_returns_the_replies_that_no_longer_run(stores: Stores) -> None:
    async with stores.open() as store:
        kept, ended = turn(), turn()
        for each in (kept, ended):
            await store.start_turn(each, "Hello", None)
        await store.finish(ended.conversation, reply_of(ended, "taken over"))
        replies = {each.reply_id: (each.conversation, "text") for each in (kept, ended)}
        assert await store.checkpoint(replies) == Unsaved({ended.reply_id}, set())


async def test_reply_that_is_to_be_stopped_is_not_saved_but_can_be_ended(stores: Stores) -> None:
    async with stores.open() as store:
        kept, stopped, failing, mine = [turn() for _ in range(4)]
        for each in (kept, stopped, failing, mine):
            await store.start_turn(each, "Hello", None)
        replies = {each.reply_id: (each.conversation, "text") for each in (kept, stopped)}

        for each in (stopped, failing, mine):
            assert await store.request_stop(each.conversation, each.reply_id)
        assert await store.checkpoint(replies) == Unsaved(set(), {stopped.reply_id})

        # It was complete before the server knew: then it is stopped nevertheless, as the client was answered.
        for _ in range(2):
            message = await store.finish(stopped.conversation, reply_of(stopped, "all of it"))
            assert message is not None and (message.content, message.status) == ("all of it", "stopped")
        for each, ending in ((failing, {"status": "failed", "error": INTERRUPTED}), (mine, {"status": "stopped"})):
            message = reply_of(each, "all", **ending)
            assert await store.finish(each.conversation, message) == message
        assert not await store.request_stop(stopped.conversation, stopped.reply_id)
        assert not await store.request_stop(kept.conversation, new_id())
        assert await store.checkpoint(replies) == Unsaved({stopped.reply_id}, set())


async def test_stop_request_ends_with_its_reply(stores: Stores) -> None:
    async with stores.open() as store:
        first = turn()
        await store.start_turn(first, "Hello", None)
        await store.request_stop(first.conversation, first.reply_id)
        await store.finish(first.conversation, reply_of(first, "", status="stopped"))
        second = turn(first.conversation)
        await store.start_turn(second, "More", None)
        assert not (await store.checkpoint({second.reply_id: (second.conversation, "text")})).stopping


async def test_turn_is_refused_in_a_full_conversation(stores: Stores) -> None:
    async with stores.open() as store:
        first = turn()
        await store.start_turn(first, "Hello", None)
        await store.finish(first.conversation, reply_of(first, "x" * (DOCUMENT_BYTES - REPLY_ROOM - 20_000)))
        second = turn(first.conversation)
        started = await store.start_turn(second, "fits", None)
        assert REPLY_ROOM <= started.reply_room < REPLY_ROOM + 20_000
        # A reply of exactly that size can be checkpointed and stored.
        await store.checkpoint({second.reply_id: (second.conversation, "y" * started.reply_room)})
        failed = reply_of(second, "y" * started.reply_room, status="failed", error=INTERRUPTED)
        assert await store.finish(second.conversation, failed) == failed
        with pytest.raises(ConversationFull):
            await store.start_turn(turn(first.conversation), "no more", None)
        with pytest.raises(ConversationFull):
            await store.start_retry(first.conversation, new_id())
        assert len(stores.database.conversations.find_one()["messages"]) == 4


async def test_only_the_requested_messages_are_read(stores: Stores) -> None:
    async with stores.open() as store:
        conversation = Key(None, new_id())
        ids = []
        for number in range(3):
            each = turn(conversation)
            await store.start_turn(each, f"u{number}", None)
            await store.finish(conversation, reply_of(each, f"a{number}"))
            ids += [each.message_id, each.reply_id]

        async def read(span: Span) -> tuple[list[str], int, bool]:
            record = await store.read(conversation, span)
            assert record is not None and record.following is None and record.length is None
            assert record.last_id == ids[-1]
            return [message.content for message in record.messages], record.older, record.found

        assert await read(Newest()) == (["u0", "a0", "u1", "a1", "u2", "a2"], 0, True)
        assert await read(After(ids[1], 0)) == (["a0", "u1", "a1", "u2", "a2"], 1, True)
        assert await read(After(ids[3], None)) == (["u2", "a2"], 4, True)
        assert await read(After(ids[5], None)) == ([], 6, True)
        assert await read(After(new_id(), 0)) == ([], 0, False)
        assert await read(After(new_id(), None)) == ([], 0, False)
        assert await read(Newest(2)) == (["u2", "a2"], 4, True)
        assert await read(Newest(100)) == (["u0", "a0", "u1", "a1", "u2", "a2"], 0, True)
        assert await read(Before(ids[3], 2)) == (["a0", "u1"], 1, True)
        assert await read(Before(ids[1], 5)) == (["u0"], 0, True)
        assert await read(Before(ids[0], 5)) == ([], 0, True)
        assert await read(Before(ids[3])) == (["u0", "a0", "u1"], 0, True)
        assert (await read(Before(new_id(), 5)))[2] is False
        assert await read(Between(1, 3)) == (["a0", "u1"], 1, True)
        assert await store.read(Key(None, new_id()), Newest()) is None


async def test_concurrent_peeks_share_one_query(stores: Stores) -> None:
    async with stores.open() as store:
        turns = [turn() for _ in range(150)]
        for each in turns[:120]:
            await store.start_turn(each, "hello", None, new=True)
        await store.finish(turns[0].conversation, reply_of(turns[0], "hi"))
        queries: list[str] = []
        store.guard.observe = lambda operation, _seconds, _ok: queries.append(operation)
        records = await asyncio.gather(*(store.peek(each.conversation) for each in [*turns, *turns]))
        assert queries == ["peek"] and records[:150] == records[150:]
        assert [record is None for record in records[:150]] == [False] * 120 + [True] * 30
        first, second = records[:2]
        assert first is not None and first.reply is None and first.last_id == turns[0].reply_id
        assert not first.messages and first.last_id is not None
        assert second is not None and second.reply is not None and second.reply.id == turns[1].reply_id
        # A call during a query is answered by the next query.
        early = asyncio.create_task(store.peek(turns[1].conversation))
        while store.peeks.waiting or not store.peeks.is_calling:
            await asyncio.sleep(0)
        await store.finish(turns[1].conversation, reply_of(turns[1], "hi"))
        late = await store.peek(turns[1].conversation)
        assert await early is not None and late is not None and late.reply is None
        assert queries == ["peek", "peek", "finish", "peek"] or queries == ["peek", "finish", "peek", "peek"]


@pytest.mark.expects_log("MongoDB rejected 1 of 30 writes")
async def test_replies_that_end_together_share_one_bulk_write(stores: Stores) -> None:
    async with stores.open() as store:
        turns = [turn() for _ in range(90)]
        for each in turns:
            await store.start_turn(each, "hello", None, new=True)
        writes: list[str] = []
        store.guard.observe = lambda operation, _seconds, _ok: writes.append(operation)
        whole, ended, full = turns[:30], turns[30:60], turns[60:]

        async def finish(turns: list[Turn]) -> list[Any]:
            messages = [(each.conversation, reply_of(each, "hi" * 500)) for each in turns]
            stored = await asyncio.gather(*(store.finish(*each) for each in messages), return_exceptions=True)
            return [each.content if isinstance(each, Message) else each for each in stored]

        assert await finish(whole) == 30 * ["hi" * 500]
        assert writes == ["finish"]
        # A reply ended by another server and a deleted one get their own results, and the others are stored.
        await store.finish(ended[0].conversation, reply_of(ended[0], "mine", status="interrupted"))
        await store.delete(ended[1].conversation)
        assert await finish(ended) == ["mine", None, *28 * ["hi" * 500]]
        # A reply without room does not prevent the others.
        filler = {
            "_id": ObjectId(),
            "role": "user",
            "content": "x" * (DOCUMENT_BYTES - 900),
            "createdAt": datetime.now(UTC),
        }
        of_the_first = {"_id": ObjectId(full[0].conversation.id)}
        stores.database.conversations.update_one(of_the_first, {"$push": {"messages": filler}})
        refused, *others = await finish(full)
        assert isinstance(refused, RuntimeError) and others == 29 * ["hi" * 500]


async def test_reply_that_cannot_be_encoded_fails_alone(stores: Stores) -> None:
    async with stores.open() as store:
        turns = [turn() for _ in range(3)]
        for each in turns:
            await store.start_turn(each, "hello", None, new=True)
        texts = ["one", "half \ud83d", "three"]
        messages = [(each.conversation, reply_of(each, text)) for each, text in zip(turns, texts, strict=True)]
        first, bad, third = await asyncio.gather(*(store.finish(*each) for each in messages), return_exceptions=True)
        assert isinstance(bad, UnicodeEncodeError)
        assert (first, third) == (messages[0][1], messages[2][1])


@pytest.mark.parametrize("hours", [-5, 5])
async def test_lease_is_set_and_checked_by_the_database_clock(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    now = documents.now
    monkeypatch.setattr(documents, "now", lambda: now() + timedelta(hours=hours))
    async with stores.open() as store:
        for new in (True, False):
            mine = turn()
            await store.start_turn(mine, "hello", None, new=new)
            assert abs(stores.database.conversations.find_one({})["updatedAt"] - datetime.now(UTC)).seconds > 3600
            assert await store.find_expired([]) == []
            await store.checkpoint({mine.reply_id: (mine.conversation, "hel")})
            assert await store.find_expired([]) == []
            record = await store.peek(mine.conversation)
            assert record is not None and record.reply is not None and not record.reply.expired


async def test_lease_in_the_future_has_expired(stores: Stores) -> None:
    """The database's clock was set back after the last renewal."""
    async with stores.open() as store:
        mine = turn()
        await store.start_turn(mine, "hello", None, new=True)
        assert await store.find_expired([]) == []
        ahead = {"$set": {"reply.renewedAt": datetime.now(UTC) + timedelta(hours=1)}}
        stores.database.conversations.update_one({"_id": ObjectId(mine.conversation.id)}, ahead)
        ((found, _),) = await store.find_expired([])
        record = await store.peek(mine.conversation)
        assert found == mine.conversation and record is not None and record.reply is not None
        assert record.reply.expired


async def test_call_whose_timeout_expires_in_the_queue_is_unavailable(database: Database) -> None:
    """For example, the process was paused after the call had left the queue."""
    async with Stores(database, "motor").open() as store:
        for _ in range(10):
            await store.guard.slots.acquire()
        waiting = asyncio.create_task(store.ping())
        await asyncio.sleep(0.01)
        for _ in range(10):
            store.guard.slots.release()
        store.guard.timeout_s = 0.0
        with pytest.raises(DatabaseUnavailable):
            await waiting


@pytest.mark.expects_log("MongoDB rejected 1 of 1 writes: .388.")
async def test_write_that_mongodb_rejects_for_now_can_be_repeated(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, the storage engine's cache was full."""
    async with stores.open() as store:
        mine = turn()
        await store.start_turn(mine, "hello", None, new=True)
        reply = reply_of(mine, "hi")

        async def refuse(*_: Any, **__: Any) -> None:
            raise BulkWriteError({"writeErrors": [{"index": 0, "code": 388}], "nMatched": 0})

        monkeypatch.setattr(type(store.conversations.collection), "bulk_write", refuse)
        with pytest.raises(DatabaseUnavailable):
            await store.finish(mine.conversation, reply)
        monkeypatch.undo()
        assert await store.finish(mine.conversation, reply) == reply


async def test_document_of_a_mongoose_model_is_read(stores: Stores) -> None:
    """Other applications may write conversations of the same shape."""
    time = datetime(2025, 1, 2, 3, 4, 5, 678000, tzinfo=UTC)
    message = {"_id": ObjectId(), "role": "user", "content": "from Node", "createdAt": time}
    conversation = {"_id": ObjectId(), "createdAt": time, "updatedAt": time, "messages": [message], "__v": 0}
    key = Key(None, str(conversation["_id"]))
    stores.database.conversations.insert_one(conversation)
    async with stores.open() as store:
        record = await store.read(key, Newest())
        assert record is not None and record.messages[0].content == "from Node" and record.created_at == time
        started = await store.start_turn(turn(key), "from Python", None)
        assert started.number == 2


async def test_every_query_uses_an_index(database: Database) -> None:
    """Measured by MongoDB's profiler: a page of the list reads the documents on it and no others."""
    async with Stores(database, "motor").open() as store:
        turns = [turn() for _ in range(30)]
        for each in turns:
            await store.start_turn(each, "Hello", "k")
        *_, middle = await store.summaries(None, 15, None)
        database.db.command("profile", 2)
        await store.summaries(None, 2, None)
        await store.summaries(None, 2, middle.place)
        await store.find_expired([each.reply_id for each in turns])
        await store.find_by_key(turns[0].conversation, "k", "Hello")
        await store.find_retry(turns[0].conversation, "other", None)
        await store.peek(turns[0].conversation)
        await store.read(turns[0].conversation, Newest())
        database.db.command("profile", 0)
    profile = list(database.db["system.profile"].find({"op": "query"}))
    assert len(profile) == 8
    for query in profile:
        assert re.match("IXSCAN|IDHACK", query["planSummary"]) and not query.get("hasSortStage"), query
    assert all(query["docsExamined"] <= 3 for query in profile if "sort" in query["command"])


@pytest.mark.expects_log("the database rejected a call \\(begin\\): code 8000")
async def test_database_that_rejects_a_call_is_unavailable(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example, by a quota or a rate limit. The next call succeeds."""
    async with Stores(database, "motor").open() as store:

        async def refuse(*_: Any, **__: Any) -> None:
            raise OperationFailure("you are over your space quota", 8000)

        monkeypatch.setattr(type(store.conversations.collection), "update_one", refuse)
        with pytest.raises(DatabaseUnavailable):
            await store.start_turn(turn(), "hello", None, new=True)
        monkeypatch.undo()
        await store.start_turn(turn(), "hello", None, new=True)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("mongodb://h", "mongodb://h/chat-db"),
        ("mongodb://u:p@h:1,i:2/db?tls=true", "mongodb://u@h:1,i:2/db?tls=true"),
        ("mongodb://u:p#ss@h/db", "mongodb://u@h/db"),
        ("mongodb://h/?tlsCertificateKeyFilePassword=p&tls=true", "mongodb://h/chat-db?tls=true"),
        ("mongodb+srv://u:p@h/?authMechanismProperties=AWS_SESSION_TOKEN:p", "mongodb+srv://u@h/chat-db"),
    ],
)
async def test_uri_is_shown_without_secrets(uri: str, shown: str) -> None:
    assert redact_uri(uri) == shown


@pytest.mark.expects_log("database does not answer")
async def test_calls_to_a_silent_database_fail_within_the_timeout_and_then_at_once() -> None:
    uri = "mongodb://127.0.0.1:1/?directConnection=true"
    store = Store(connect(uri, 1.0), uri, timeout_s=1.0, lease_ms=1000, history=1)
    loop = asyncio.get_running_loop()
    started = loop.time()
    results = await asyncio.gather(*(store.ping() for _ in range(100)), return_exceptions=True)
    assert all(isinstance(each, DatabaseUnavailable) for each in results)
    assert loop.time() - started < 5
    await store.close()
