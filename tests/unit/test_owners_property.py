"""Two owners do everything at random, on the same ids, on two servers over one database: neither learns of the other.

Every text of an owner has his mark, and the source repeats all texts of a conversation. The other one must never
receive that mark, and what he is answered about an id that only the other one has is what he is answered about an
unknown id.
"""

import asyncio
import json
import logging
import random
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from bson import json_util

from chatserver.branches import Parent
from chatserver.errors import ChatError, NoSuchConversation, NoSuchMessage, SourceError
from chatserver.records import Key, Turn
from chatserver.server import Server as WholeServer
from chatserver.settings import Settings
from chatserver.sources import Prompt
from chatserver.store import Store, connect
from tests.apps import Database
from tests.clients import new_id
from tests.unit.recorder import Recorder

pytestmark = pytest.mark.gen_test

OWNERS = ("alice", "bob")
RELATIONS = ("own", "other", "unknown")
CHECKPOINT_MS = 10


def mark(owner: str) -> str:
    return f"{owner}-says"


def other(owner: str) -> str:
    return OWNERS[owner == OWNERS[0]]


class Echo:
    """A source that repeats all texts of a prompt, in chunks for which it waits at its gate. Every third turn fails."""

    def __init__(self) -> None:
        self.gate = asyncio.Semaphore(0)
        self.prompts: list[str] = []

    async def reply(self, prompt: Prompt) -> AsyncGenerator[str, None]:
        text = " ".join(each.content for each in prompt.messages)[-500:]
        self.prompts.append(text)
        for piece in (text[:20], text[20:], " again"):
            await self.gate.acquire()
            yield piece
        if prompt.turn % 3 == 0:
            raise SourceError("source_failed", "No more.")

    async def close(self) -> None:
        pass


class IndexedStore(Store):
    """A store on a database that has its indexes."""

    async def build_indexes(self) -> None: ...


class Server:
    """One server, without HTTP."""

    def __init__(self, client: Any) -> None:
        self.source = Echo()
        self.whole = WholeServer(
            Settings(checkpoint_ms=CHECKPOINT_MS, drain_s=0.0),
            "",
            max_connections=0,
            source=self.source,
            client=client,
            make_store=IndexedStore,
        )
        self.chat, self.reading = self.whole.chat, self.whole.reading

    async def subscribe(self, conversation: Key, position: str) -> Recorder:
        return await Recorder().subscribe(self.reading, self.whole.hub.unsubscribe, conversation, position)


@dataclass
class Stream:
    """An open stream, and one of an unknown id that was opened in the same way."""

    key: Key
    server: Server
    recorder: Recorder
    unknown: Key
    control: Recorder

    def is_as_unknown(self) -> bool:
        received = self.recorder.received.replace(self.key.id.encode(), self.unknown.id.encode())
        return (received, self.recorder.ended) == (self.control.received, self.control.ended)


async def outcome(call: Awaitable[Any]) -> Any:
    """Return what a call returns, or the type and the text of its error."""
    try:
        return await call
    except ChatError as error:
        return type(error), str(error)


class World:
    """Two servers, the ids, and who has which of them."""

    def __init__(self, database: Database, client: Any, logs: pytest.LogCaptureFixture, seed: int) -> None:
        self.random = random.Random(seed)
        self.seen: Counter[tuple[str, str]] = Counter()
        """How often each step met each relation of an owner to an id."""
        self._client, self._database, self._logs = client, database, logs
        self._servers: list[Server] = []
        self._ids = [new_id() for _ in range(3)]
        self._holders: dict[str, str] = {}
        self._once_held: set[Key] = set()
        """The conversations that an owner has, or has had: a server may still hold something of a deleted one."""
        self._positions: defaultdict[str, list[str]] = defaultdict(list)
        """The positions in each conversation, whoever has it."""
        self._streams: list[Stream] = []
        self._texts = 0

    async def start(self) -> None:
        for _ in range(2):
            self._servers.append(await self._started())

    async def _started(self) -> Server:
        server = Server(self._client)
        await server.whole.start_replies()
        return server

    async def stop(self) -> None:
        for stream in self._streams:
            stream.recorder.leave()
            stream.control.leave()
        for server in self._servers:
            await server.whole.stop_replies()

    # -- steps -------------------------------------------------------------------------------------------------------

    async def step(self) -> None:
        """Have one owner, or both at once, do something; then check what each has received."""
        if self.random.random() < 0.05:
            self._ids[self.random.randrange(3)] = new_id()
        same = self.random.choice(self._ids)
        steps: list[Callable[[str, str, Server], Awaitable[None]]] = [
            *3 * [self.say],
            *2 * [self.say_anew],
            *3 * [self.subscribe],
            *2 * [self.retry],
            self.show,
            self.rename,
            self.stop_reply,
            self.delete,
            self.delete_all,
            self.history,
            self.export,
            self.list,
            *3 * [self.write],
        ]
        await asyncio.gather(
            *(
                self.random.choice(steps)(owner, same, self.random.choice(self._servers))
                for owner in self.random.sample(OWNERS, self.random.choice((1, 1, 2)))
            )
        )
        match self.random.randrange(12):
            case 0:
                await self.crash()
            case 1:
                await self.expire()
            case 2:
                await asyncio.sleep(2 * CHECKPOINT_MS / 1000)
        await asyncio.sleep(0.001)
        self.check()

    def relation(self, key: Key) -> str:
        if self._holders.get(key.id) == key.owner or key in self._once_held:
            return "own"
        return "other" if key.id in self._holders else "unknown"

    async def say(self, owner: str, conversation_id: str, server: Server) -> None:
        """Post to an id, with or without a key, after the head or another message."""
        relation = self.relation(Key(owner, conversation_id))
        self.seen["say", relation] += 1
        parent = self.random.choice((None, None, Parent(None), Parent(self.message_id(conversation_id))))
        answer = await self.post(owner, conversation_id, self.random.choice((None, "1", "2")), server, parent)
        unknown = NoSuchMessage if parent is not None and parent.id is not None else NoSuchConversation
        assert relation != "other" or isinstance(answer, Turn) or answer[0] is unknown

    async def say_anew(self, owner: str, _: str, server: Server) -> None:
        """Post without an id, with or without a key.

        The id made of a key stays unknown to the other one: if it were deleted, he could take it.
        """
        self.seen["say anew", "own"] += 1
        key = self.random.choice((None, "1", "2"))
        answer = await self.post(owner, None, key, server)
        if isinstance(answer, Turn) and key is None:
            self._ids[self.random.randrange(3)] = answer.conversation.id

    async def post(
        self, owner: str, conversation_id: str | None, key: str | None, server: Server, parent: Parent | None = None
    ) -> Any:
        """Post a new text, or with a key maybe a repeated one; the answer is 404 only for an id of the other one."""
        text = self.text(owner) if key is None or self.random.random() < 0.3 else f"{mark(owner)} again"
        holders = {self._holders.get(conversation_id or "")}
        answer = await self.answer(owner, server.chat.say(owner, conversation_id, text, key, parent))
        holders.add(self._holders.get(conversation_id or ""))
        if isinstance(answer, Turn):
            conversation = answer.conversation
            assert conversation == Key(owner, conversation_id or conversation.id)
            self._holders[conversation.id] = owner
            self._once_held.add(conversation)
            self.keep_positions(answer)
        else:
            assert answer[0] is not NoSuchConversation or other(owner) in holders
        return answer

    def keep_positions(self, turn: Turn) -> None:
        ids = (turn.message_id, turn.reply_id)
        self._positions[turn.conversation.id] += [f"{each}-{chars}" for each in ids for chars in ("0", "3", "done")]

    def message_id(self, conversation_id: str) -> str:
        """Return the id of a message that is or was in a conversation, whoever has it; or an unknown one."""
        return self.random.choice([*self._positions[conversation_id][-12:], new_id()])[:24]

    async def retry(self, owner: str, conversation_id: str, server: Server) -> None:
        message_id = self.random.choice((None, self.message_id(conversation_id)))
        key = self.random.choice((None, "1", "3"))
        retry = partial(server.chat.retry, message_id=message_id, key=key)
        answer = await self.compare("retry", Key(owner, conversation_id), retry)
        if isinstance(answer, Turn):
            self.keep_positions(answer)

    async def show(self, owner: str, conversation_id: str, server: Server) -> None:
        show = partial(server.chat.show, message_id=self.message_id(conversation_id))
        await self.compare("show", Key(owner, conversation_id), show)

    async def rename(self, owner: str, conversation_id: str, server: Server) -> None:
        rename = partial(server.chat.rename, title=self.random.choice((None, self.text(owner))))
        await self.compare("rename", Key(owner, conversation_id), rename)

    async def stop_reply(self, owner: str, conversation_id: str, server: Server) -> None:
        await self.compare("stop", Key(owner, conversation_id), server.chat.stop)

    async def delete(self, owner: str, conversation_id: str, server: Server) -> None:
        key = Key(owner, conversation_id)
        answer = await self.compare("delete", key, server.chat.delete)
        # Meanwhile the other one may have taken the id.
        if answer is None and self._holders.get(conversation_id) == owner:
            del self._holders[conversation_id]

    async def delete_all(self, owner: str, _: str, server: Server) -> None:
        if self.random.random() < 0.3:
            assert await self.answer(owner, server.chat.delete_all(owner)) is None
            self._holders = {each: holder for each, holder in self._holders.items() if holder != owner}

    async def history(self, owner: str, conversation_id: str, server: Server) -> None:
        async def read(key: Key) -> Any:
            if all_branches:
                history = await server.reading.history(key, all_branches=True)
            else:
                history = await server.reading.history(key, limit)
            return history.streaming, history.view, [part async for part in history.parts]

        limit, all_branches = self.random.choice((None, 1)), self.random.random() < 0.3

        await self.compare("history", Key(owner, conversation_id), read)

    async def export(self, owner: str, _: str, server: Server) -> None:
        async def export() -> dict[Key, Any]:
            exported = server.reading.export(owner)
            return {key: [part async for part in history.parts] async for key, history in exported}

        answer = await self.answer(owner, export())
        assert isinstance(answer, tuple) or answer.keys() <= self._once_held

    async def list(self, owner: str, _: str, server: Server) -> None:
        self.seen["list", "own"] += 1
        for place in (None, *(each.place for each in await server.reading.summaries(other(owner), 100))):
            listed = await self.answer(owner, server.reading.summaries(owner, 100, place))
            assert {Key(owner, each.id) for each in listed} <= self._once_held

    async def subscribe(self, owner: str, conversation_id: str, server: Server) -> None:
        key, unknown = Key(owner, conversation_id), Key(owner, new_id())
        self.seen["subscribe", self.relation(key)] += 1
        known = self._positions[self.random.choice(self._ids)]
        position = self.random.choice([*known[-3:], "", *2 * [f"{conversation_id}-0"]])
        recorder = await server.subscribe(key, position)
        control = await server.subscribe(unknown, position.replace(key.id, unknown.id))
        self._streams.append(Stream(key, server, recorder, unknown, control))
        if len(self._streams) > 12:
            oldest = self._streams.pop(0)
            oldest.recorder.leave()
            oldest.control.leave()

    async def write(self, _owner: str, _id: str, server: Server) -> None:
        for _ in range(self.random.choice((1, 2, 8))):
            server.source.gate.release()

    async def crash(self) -> None:
        """Replace a server by a new one. Its replies go on running in the database, until their leases have expired."""
        number = self.random.randrange(2)
        server = self._servers[number]
        await server.whole.stop_replies()
        for stream in [each for each in self._streams if each.server is server]:
            stream.recorder.leave()
            stream.control.leave()
            self._streams.remove(stream)
        self._servers[number] = await self._started()

    async def expire(self) -> None:
        """Let all leases expire, then restart a server, which ends the replies before they are renewed, or not."""
        ages_ago = {"$set": {"reply.renewedAt": datetime(2020, 1, 1, tzinfo=UTC)}}
        self._database.conversations.update_many({"reply": {"$exists": True}}, ages_ago)
        await self.crash()

    # -- checks ------------------------------------------------------------------------------------------------------

    def text(self, owner: str) -> str:
        self._texts += 1
        return f"{mark(owner)} {self._texts}"

    async def answer(self, owner: str, call: Awaitable[Any]) -> Any:
        answer = await outcome(call)
        assert mark(other(owner)) not in repr(answer)
        return answer

    async def compare(self, name: str, key: Key, act: Callable[[Key], Awaitable[Any]]) -> Any:
        """Do something with a conversation; unless it is the owner's, the answer is that for an unknown id."""
        assert key.owner is not None
        relation = self.relation(key)
        self.seen[name, relation] += 1
        answer = await self.answer(key.owner, act(key))
        if relation != "own":
            assert answer == await outcome(act(Key(key.owner, new_id())))
        return answer

    def check(self) -> None:
        for stream in self._streams:
            owner = stream.key.owner
            assert owner is not None and mark(other(owner)).encode() not in stream.recorder.received
            self.seen["received", owner] += mark(owner).encode() in stream.recorder.received
            assert stream.key in self._once_held or stream.is_as_unknown()
        for prompt in (each for server in self._servers for each in server.source.prompts):
            assert not all(mark(owner) in prompt for owner in OWNERS)
        for document in self._database.conversations.find():
            assert self._holders.get(str(document["_id"])) == document["owner"]
            assert mark(other(document["owner"])) not in json_util.dumps(document)
        for record in self._logs.get_records("call"):
            assert not any(mark(owner) in json.dumps(vars(record), default=str) for owner in OWNERS)


@asynccontextmanager
async def worlds(database: Database, logs: pytest.LogCaptureFixture) -> AsyncIterator[Callable[[int], World]]:
    database.conversations.create_index([("reply._id", 1)], sparse=True)
    client = connect(database.uri, 5.0)
    logs.set_level(logging.DEBUG, "chatserver")
    try:
        yield lambda seed: World(database, client, logs, seed)
    finally:
        client.close()


async def run(database: Database, logs: pytest.LogCaptureFixture, seeds: range, steps: int) -> None:
    seen: Counter[tuple[str, str]] = Counter()
    async with worlds(database, logs) as make_world:
        for seed in seeds:
            world = make_world(seed)
            await world.start()
            try:
                for number in range(steps):
                    try:
                        await world.step()
                    except AssertionError as error:
                        error.add_note(f"seed {seed}, step {number}")
                        raise
            finally:
                await world.stop()
            seen += world.seen
            database.conversations.delete_many({})
            logs.clear()
    assert all(seen["received", owner] for owner in OWNERS)
    names = ("say", "retry", "show", "rename", "stop", "delete", "history", "subscribe")
    assert {(name, relation) for name in names for relation in RELATIONS} <= seen.keys()


@pytest.mark.expects_log("could not be stored")
async def test_no_owner_learns_of_the_other(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    await run(database, caplog, range(4), steps=80)


@pytest.mark.soak
@pytest.mark.parametrize("first", range(100, 160, 10))
@pytest.mark.expects_log("could not be stored")
async def test_no_owner_learns_of_the_other_in_many_runs(
    database: Database, caplog: pytest.LogCaptureFixture, first: int
) -> None:
    await run(database, caplog, range(first, first + 10), steps=100)
