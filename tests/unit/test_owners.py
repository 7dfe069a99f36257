"""Conversations belong to their owners: ids, the store and the use cases, below HTTP."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import pytest
from bson import Code, ObjectId

from chatserver import store as store_package
from chatserver.branches import Parent
from chatserver.errors import ChatError, IdTaken, KeyReused, NoSuchConversation, ReplyInProgress, TooManyStreams
from chatserver.metrics import Metrics
from chatserver.records import After, All, Along, Before, Key, Newest, Turn
from chatserver.settings import Settings
from chatserver.store import Store, id_for_key, new_id
from chatserver.streams import Connection, Streams
from chatserver.wire import sse
from tests.apps import App, Database, MakeApp, Script
from tests.http.turns import AGES_AGO, gated, release
from tests.unit.recorder import Recorder
from tests.unit.test_store import Stores, reply_of, turn

pytestmark = pytest.mark.gen_test

OWNERS = ["alice", "bob", None]
NOBODY: dict[str, object] = {
    "null": None,
    "number": 7,
    "object": {"alice": "alice"},
    "empty": "",
    "code": Code("alice"),
}
"""Values of the field `owner` that no owner has, but that other applications may store."""


@pytest.fixture
def stores(database: Database) -> Stores:
    return Stores(database, "motor")


async def stored_turn(store: Store, conversation: Key) -> Turn:
    """Store a turn with the reply "Hey", which can be retried; return it."""
    started = turn(conversation)
    await store.start_turn(started, "Hello", "k")
    await store.finish(conversation, reply_of(started, "Hey", status="stopped"))
    return started


def document(database: Database, conversation_id: str) -> dict[str, Any]:
    found: dict[str, Any] = database.conversations.find_one({"_id": ObjectId(conversation_id)})
    return found


def give(database: Database, conversation_id: str, owner: object) -> None:
    """Store a conversation's owner: a value, or `...` for none."""
    change = {"$unset": {"owner": ""}} if owner is ... else {"$set": {"owner": owner}}
    database.conversations.update_one({"_id": ObjectId(conversation_id)}, change)


async def outcome(call: Awaitable[Any]) -> Any:
    """Return what a call returns, or the type and the text of its error."""
    try:
        return await call
    except ChatError as error:
        return type(error), str(error)


# -- ids -----------------------------------------------------------------------------------------------------------


def test_ids_are_random_in_every_digit() -> None:
    ids = [new_id() for _ in range(10_000)]

    assert len(set(ids)) == 10_000
    assert [len(set(digits)) for digits in zip(*ids, strict=True)] == [16] * 24


def test_ids_do_not_depend_on_the_seed_of_the_process() -> None:
    ids = set()
    for _ in range(2):
        random.seed(1)
        ids.add(new_id())

    assert len(ids) == 2


async def test_ids_of_a_turn_are_random(app: App) -> None:
    ids: list[str] = []
    for number in range(20):
        started = await app.chat.say(f"owner {number}", None, "Hello")
        ids += [started.conversation.id, started.message_id, started.reply_id]

    assert all(len(set(digits)) > 4 for digits in zip(*ids, strict=True))
    await app.until_idle()


@pytest.mark.parametrize("taken_by", OWNERS)
@pytest.mark.parametrize("recreated", [False, True])
async def test_server_chooses_another_id_instead_of_appending(
    app: App, monkeypatch: pytest.MonkeyPatch, taken_by: str | None, recreated: bool
) -> None:
    taken = Key(taken_by, new_id())
    if recreated:
        await stored_turn(app.store, Key("bob", taken.id))
        await app.store.delete(Key("bob", taken.id))
    await stored_turn(app.store, taken)
    before = document(app.database, taken.id)
    ids = iter([taken.id, new_id(), new_id(), *(new_id() for _ in range(3))])
    monkeypatch.setattr(store_package, "new_id", lambda: next(ids))

    started = await app.chat.say("alice", None, "of Alice")

    assert started.conversation.id != taken.id
    assert document(app.database, taken.id) == before
    stored = document(app.database, started.conversation.id)
    assert (stored["owner"], stored["messages"][0]["content"]) == ("alice", "of Alice")
    await app.until_idle()


async def test_fresh_id_is_given_to_one_of_concurrent_posts(stores: Stores) -> None:
    async with stores.open() as store:
        conversation_id = new_id()
        turns = [turn(Key(owner, conversation_id)) for owner in 4 * OWNERS]
        results = await asyncio.gather(
            *(store.start_turn(each, "Hello", None, new=True) for each in turns), return_exceptions=True
        )

        assert sum(isinstance(each, IdTaken) for each in results) == len(turns) - 1
        assert len(document(stores.database, conversation_id)["messages"]) == 1


async def test_known_id_is_given_to_one_owner_of_concurrent_posts(stores: Stores) -> None:
    async with stores.open() as store:
        conversation_id = new_id()
        turns = [turn(Key(owner, conversation_id)) for owner in 4 * OWNERS]
        results = await asyncio.gather(
            *(store.start_turn(each, "Hello", None) for each in turns), return_exceptions=True
        )

        stored = document(stores.database, conversation_id)
        holder = stored.get("owner")
        for each, result in zip(turns, results, strict=True):
            if isinstance(result, Exception):
                expected = ReplyInProgress if each.conversation.owner == holder else NoSuchConversation
                assert type(result) is expected
        assert sum(isinstance(each, Exception) for each in results) == len(turns) - 1
        assert len(stored["messages"]) == 1


async def test_order_does_not_depend_on_ids(stores: Stores) -> None:
    """Messages keep the order of the turns, and the list that of the last activity."""
    async with stores.open() as store:
        ids = sorted((new_id() for _ in range(18)), reverse=True)
        conversations, messages = ids[:6], ids[6:]
        random.shuffle(conversations)
        time = datetime(2026, 1, 1, tzinfo=UTC)
        for number, each in enumerate(conversations):
            await stored_turn(store, Key("alice", each))
            updated = {"$set": {"updatedAt": time + timedelta(seconds=number)}}
            stores.database.conversations.update_one({"_id": ObjectId(each)}, updated)

        listed: list[str] = []
        place = None
        while page := await store.summaries("alice", 2, place):
            listed += [each.id for each in page]
            place = page[-1].place

        assert listed == conversations[::-1]

        conversation = Key("alice", new_id())
        for number in range(0, len(messages), 2):
            started = Turn(conversation, messages[number], messages[number + 1])
            await store.start_turn(started, "Hello", None)
            await store.finish(conversation, reply_of(started, "Hey"))

        async def read(span: Any) -> list[str]:
            record = await store.read(conversation, span)
            assert record is not None
            return [each.id for each in record.messages]

        assert await read(Newest()) == messages
        assert await read(After(messages[3], None)) == messages[4:]
        assert await read(Before(messages[3], 2)) == messages[1:3]


# -- idempotency keys ----------------------------------------------------------------------------------------------


def test_each_owner_and_key_has_an_id_of_its_own() -> None:
    parts = ["", "a", "ab", "b", "bc", "c", "null", "None", '["a"', '["a","b"]', '["a", "b"]', '"', "\\", ","]
    for separator in ("\0", "_", "/", ",", '", "', "\\"):
        parts += [f"a{separator}b", f"a{separator}", f"{separator}b", separator]
    pairs = list(product([*dict.fromkeys(parts), None], dict.fromkeys(parts)))

    assert len({id_for_key(owner, key) for owner, key in pairs}) == len(pairs)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("alice", "1"), ("bob", "1")),
        (("alice", "1"), (None, "1")),
        (("a", "bc"), ("ab", "c")),
        (("a\0b", "c"), ("a", "b\0c")),
        (("a_b", "c"), ("a", "b_c")),
        (("a/b", "c"), ("a", "b/c")),
        (("a", "b"), (None, '["a", "b"]')),
    ],
)
@pytest.mark.parametrize("text", ["the same", "another"])
async def test_key_of_another_owner_starts_a_turn_of_its_own(
    app: App, first: tuple[str, str], second: tuple[str | None, str], text: str
) -> None:
    one = await app.chat.say(first[0], None, "the same", first[1])
    other = await app.chat.say(second[0], None, text, second[1])
    await app.until_idle()

    assert one.conversation.id != other.conversation.id
    assert await app.chat.say(first[0], None, "the same", first[1]) == one
    assert await app.chat.say(second[0], None, text, second[1]) == other


async def test_key_in_a_conversation_of_another_owner_is_not_found(app: App) -> None:
    hers = Key("alice", new_id())
    first = await app.chat.say(hers.owner, hers.id, "the same", "1")
    await app.until_idle()
    for text in ("the same", "another"):
        with pytest.raises(NoSuchConversation):
            await app.chat.say("bob", hers.id, text, "1")

    assert await app.chat.say(hers.owner, hers.id, "the same", "1") == first
    with pytest.raises(KeyReused):
        await app.store.find_by_key(hers, "1", "another")


# -- the store -----------------------------------------------------------------------------------------------------


def operations(store: Store, conversation: Key, named: Turn) -> dict[str, Callable[[], Awaitable[Any]]]:
    """Return each operation on a conversation, with the ids of a turn."""
    reply = reply_of(named, "Hey")
    return {
        "read": lambda: store.read(conversation, Newest()),
        "read after": lambda: store.read(conversation, After(named.reply_id, 0)),
        "read all": lambda: store.read(conversation, All(with_tree=True)),
        "read along": lambda: store.read(conversation, Along([0])),
        "read before": lambda: store.read(conversation, Before(named.reply_id)),
        "peek": lambda: store.peek(conversation),
        "find_by_key": lambda: store.find_by_key(conversation, "k", "Hello"),
        "find_by_key, another text": lambda: store.find_by_key(conversation, "k", "Other"),
        "find_started": lambda: store.find_started(conversation, named.reply_id),
        "start_turn after": lambda: store.start_turn(
            Turn(conversation, new_id(), new_id()), "Hello", None, parent=Parent(named.reply_id)
        ),
        "start_retry": lambda: store.start_retry(conversation, new_id()),
        "start_retry, named": lambda: store.start_retry(conversation, new_id(), named.reply_id, "again"),
        "find_retry": lambda: store.find_retry(conversation, "k", named.reply_id),
        "show": lambda: store.show(conversation, named.message_id),
        "rename": lambda: store.rename(conversation, "mine"),
        "checkpoint": lambda: store.checkpoint({named.reply_id: (conversation, "mine")}),
        "request_stop": lambda: store.request_stop(conversation, named.reply_id),
        "finish": lambda: store.finish(conversation, reply),
        "finish, expired": lambda: store.finish(conversation, reply, if_renewed_at=datetime.now(UTC)),
        "delete": lambda: store.delete(conversation),
        "summaries": lambda: store.summaries(conversation.owner, 10, None),
    }


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize(
    ("owner", "others"),
    [
        ("alice", "bob"),
        ("alice", ...),
        (None, "alice"),
        *[(owner, value) for owner in ("alice", None) for value in NOBODY.values()],
    ],
)
async def test_conversation_of_others_is_as_unknown(
    stores: Stores, owner: str | None, others: object, running: bool
) -> None:
    async with stores.open() as store:
        taken, unknown = Key(owner, new_id()), Key(owner, new_id())
        started = await stored_turn(store, Key("somebody", taken.id))
        if running:
            started = turn(Key("somebody", taken.id))
            await store.start_turn(started, "Hello", "k2")
        give(stores.database, taken.id, others)
        before = document(stores.database, taken.id)
        expected = {name: await outcome(call()) for name, call in operations(store, unknown, started).items()}
        answers = {name: await outcome(call()) for name, call in operations(store, taken, started).items()}

        assert answers == expected
        for key in (None, "k", "k2"):
            with pytest.raises(NoSuchConversation):
                await store.start_turn(turn(taken), "Hello", key)
        with pytest.raises(IdTaken):
            await store.start_turn(turn(taken), "Hello", None, new=True)
        assert document(stores.database, taken.id) == before
        assert stores.database.conversations.count_documents({}) == 1


@pytest.mark.parametrize("new", [True, False])
async def test_owner_is_stored_with_the_first_turn_and_kept(stores: Stores, new: bool) -> None:
    async with stores.open() as store:
        for owner in OWNERS:
            conversation = Key(owner, new_id())
            for turns in (1, 2):
                started = turn(conversation)
                await store.start_turn(started, "Hello", None, new=new and turns == 1)
                await store.finish(conversation, reply_of(started, "Hey"))
                stored = document(stores.database, conversation.id)

                assert ("owner" in stored, stored.get("owner")) == (owner is not None, owner)
                assert len(stored["messages"]) == 2 * turns


async def test_owner_may_be_any_text(stores: Stores) -> None:
    async with stores.open() as store:
        owners = ["$gt", "$$ROOT", "{$ne:1}", "a.b", "\0", "zoë", "\U0001f469", "alice ", "Alice", "alice"]
        keys = [Key(owner, new_id()) for owner in owners]
        for each in keys:
            await stored_turn(store, each)

        for each in keys:
            assert [found.id for found in await store.summaries(each.owner, 100, None)] == [each.id]
            assert await store.read(each, Newest()) is not None


async def test_peeks_of_several_owners_share_a_query_but_no_answer(stores: Stores) -> None:
    async with stores.open() as store:
        started = {owner: turn(Key(owner, new_id())) for owner in OWNERS}
        for each in started.values():
            await store.start_turn(each, "Hello", None)
        nobodys = [new_id() for _ in NOBODY]
        for conversation_id, value in zip(nobodys, NOBODY.values(), strict=True):
            await stored_turn(store, Key("somebody", conversation_id))
            give(stores.database, conversation_id, value)
        ids = [each.conversation.id for each in started.values()] + nobodys
        asked = [Key(owner, conversation_id) for owner in OWNERS for conversation_id in ids]
        queries: list[str] = []
        store.guard.observe = lambda operation, _seconds, _ok: queries.append(operation)

        records = await asyncio.gather(*map(store.peek, asked))

        assert queries == ["peek"]
        found = {key: record.reply and record.reply.id for key, record in zip(asked, records, strict=True) if record}
        assert found == {each.conversation: each.reply_id for each in started.values()}


async def test_checkpoint_reports_a_reply_that_runs_for_another_owner_only(stores: Stores) -> None:
    """For example, an operator has given the conversation to another owner meanwhile."""
    async with stores.open() as store:
        kept, given = turn(Key("alice", new_id())), turn(Key("alice", new_id()))
        for each in (kept, given):
            await store.start_turn(each, "Hello", None)
        give(stores.database, given.conversation.id, "bob")

        unsaved = await store.checkpoint({each.reply_id: (each.conversation, "text") for each in (kept, given)})

        assert unsaved.ended == {given.reply_id}
        contents = [document(stores.database, each.conversation.id)["reply"]["content"] for each in (kept, given)]
        assert contents == ["text", ""]


async def test_expired_replies_are_found_with_their_owners(stores: Stores) -> None:
    async with stores.open() as store:
        started = [turn(Key(owner, new_id())) for owner in OWNERS]
        for each in started:
            await store.start_turn(each, "Hello", None)
        for value in (None, 7, {"alice": "alice"}):
            nobodys = turn(Key("somebody", new_id()))
            await store.start_turn(nobodys, "Hello", None)
            give(stores.database, nobodys.conversation.id, value)
        stores.database.conversations.update_many({}, AGES_AGO)

        found = {(key, reply.id) for key, reply in await store.find_expired([])}

        assert found == {(each.conversation, each.reply_id) for each in started}


async def test_lists_and_their_cursors_are_the_owners_own(stores: Stores) -> None:
    async with stores.open() as store:
        ids: dict[str | None, list[str]] = {owner: [] for owner in OWNERS}
        for _ in range(4):
            for owner in OWNERS:
                ids[owner].append((await stored_turn(store, Key(owner, new_id()))).conversation.id)
        undated = new_id()
        await stored_turn(store, Key("bob", undated))
        stores.database.conversations.update_one({"_id": ObjectId(undated)}, {"$unset": {"updatedAt": ""}})
        for value in NOBODY.values():
            conversation_id = new_id()
            await stored_turn(store, Key("somebody", conversation_id))
            give(stores.database, conversation_id, value)
        listed_by_all = [await store.summaries(owner, 100, None) for owner in OWNERS]
        places = [None, *(each.place for listed in listed_by_all for each in listed)]
        for owner, place in product(("alice", None), places):
            listed = [each.id for each in await store.summaries(owner, 100, place)]

            assert listed == ids[owner][::-1][len(ids[owner]) - len(listed) :]
            assert place is not None or len(listed) == 4


# -- the use cases -------------------------------------------------------------------------------------------------


async def subscribe(app: App, conversation: Key, position: str = "") -> Recorder:
    recorder = await Recorder().subscribe(app.reading, app.hub.unsubscribe, conversation, position)
    await asyncio.sleep(0.01)
    return recorder


async def messages(app: App, conversation: Key) -> list[tuple[str, str]]:
    history = await app.reading.history(conversation)
    return [(each.content, each.status) async for part in history.parts for each in part.messages]


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_other_owners_have_no_effect_on_a_running_reply(make_app: MakeApp, elsewhere: bool) -> None:
    """Neither on the server that writes it, nor on another one."""
    source, others_source = gated("one ", "two"), Script("nothing")
    app = await make_app(source=source)
    other = await make_app(source=others_source) if elsewhere else app
    hers = Key("alice", new_id())
    bobs, unknown = Key("bob", hers.id), Key("bob", new_id())
    early = await subscribe(other, bobs)
    started = await app.chat.say(hers.owner, hers.id, "Hello")
    her_stream = await subscribe(app, hers)
    release(source)
    await app.until(lambda: b"one " in her_stream.received)
    late = [await subscribe(other, each) for each in (bobs, unknown)]
    positions = (f"{started.message_id}-done", f"{started.reply_id}-0", f"{started.reply_id}-2")
    resets = [await subscribe(other, each, position) for each in (bobs, unknown) for position in positions]
    acts: list[Callable[[Key], Awaitable[Any]]] = [other.chat.stop, other.chat.delete, other.reading.history]
    acts += [other.chat.retry, lambda key: other.chat.retry(key, started.reply_id, "key")]
    acts += [lambda key: other.chat.show(key, started.message_id), lambda key: other.chat.rename(key, "of Bob")]
    for act in acts:
        assert await outcome(act(bobs)) == await outcome(act(unknown))
    for key in (None, "key"):
        for parent in (None, Parent(None)):
            answer = await outcome(other.chat.say("bob", hers.id, "of Bob", key, parent))
            assert answer[0] is NoSuchConversation
    release(source)
    await app.until(lambda: b"event: done" in her_stream.received)

    assert b"reset" not in her_stream.received and not her_stream.ended
    assert b"one " in her_stream.received and b"two" in her_stream.received
    assert await messages(app, hers) == [("Hello", "complete"), ("one two", "complete")]
    assert len(source.prompts) == 1 and not others_source.prompts
    silent = (early, late[0])
    assert {each.received.replace(hers.id.encode(), unknown.id.encode()) for each in silent} == {late[1].received}
    assert late[1].received.count(b"event:") == 2  # the position, and a ping
    assert {each.received for each in resets} == {sse.RESET}
    for each in (early, her_stream, *late):
        each.leave()
    await app.until_idle()


async def test_stream_opened_before_the_conversation_waits_for_its_owners_turn(app: App) -> None:
    conversation_id = new_id()
    streams = {owner: await subscribe(app, Key(owner, conversation_id)) for owner in ("alice", "bob")}
    await app.chat.say("alice", conversation_id, "of Alice")
    await app.until(lambda: b"event: done" in streams["alice"].received)
    await app.chat.delete(Key("alice", conversation_id))
    await app.chat.say("bob", conversation_id, "of Bob")
    await app.until(lambda: b"event: done" in streams["bob"].received)

    assert streams["alice"].received.endswith(sse.RESET) and b"of Bob" not in streams["alice"].received
    assert b"of Bob" in streams["bob"].received and b"of Alice" not in streams["bob"].received
    streams["bob"].leave()
    await app.until_idle()


@pytest.mark.expects_log("could not be stored")
async def test_expired_replies_of_several_owners_are_ended_by_another_server(make_app: MakeApp) -> None:
    source = gated("kept", "lost")
    lost = await make_app(source=source)
    keys = [Key(owner, new_id()) for owner in OWNERS]
    for each in keys:
        await lost.chat.say(each.owner, each.id, "Hello")
    await lost.until(lambda: len(source.prompts) == len(keys))
    release(source, len(keys))
    await lost.until(lambda: all(document(lost.database, each.id)["reply"]["content"] == "kept" for each in keys))
    await lost.server.background.close()
    lost.database.conversations.update_many({}, AGES_AGO)
    app = await make_app()

    for each in keys:
        assert await messages(app, each) == [("Hello", "complete"), ("kept", "interrupted")]
        assert document(app.database, each.id).get("owner", None) == each.owner
    assert app.database.conversations.count_documents({}) == len(keys)


async def test_streams_of_one_owner_do_not_fill_another_owners_limit() -> None:
    opened: list[Connection] = []
    streams = Streams(Settings(max_streams_per_conversation=2), Metrics(), on_close=opened.remove)
    conversation_id = new_id()

    def open_stream(owner: str | None) -> None:
        opened.append(streams.open(Key(owner, conversation_id), "127.0.0.1", b"", stream_format=sse))

    for owner in OWNERS:
        for _ in range(2):
            open_stream(owner)
        with pytest.raises(TooManyStreams):
            open_stream(owner)
    for each in list(opened):
        each.release()
