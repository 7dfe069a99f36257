"""Positions and resume, for whatever hypothesis comes up with: every client ends with exactly the stored text.

Two servers of this process share one real database. The machine feeds the text of their replies; their clients have
connections that take a few bytes at a time, stall, and abort in the middle of a frame.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from typing import Any

import pytest
from bson import ObjectId
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from chatserver import positions
from chatserver.errors import DatabaseUnavailable, SourceError
from chatserver.hub import Counts, LiveConversation, LiveReply, Log
from chatserver.positions import Position
from chatserver.records import Key, Message
from chatserver.replies import endings
from chatserver.server import Server as WholeServer
from chatserver.settings import Settings
from chatserver.sources import Prompt
from chatserver.store import Store, connect
from chatserver.streams import Connection
from chatserver.wire import sse
from tests.apps import Database
from tests.clients import Event, EventDecoder, Transcript, new_id

IDS = st.text("0123456789abcdef", min_size=24, max_size=24)
POSITIONS = st.builds(Position, IDS, st.none() | st.integers(0, 999_999_999))
HARD = ["\n\n", "\u2028", "e\u0301", "\U0001f469\u200d\U0001f467", "data: x\n", "long " * 60]
PIECES = st.text(min_size=1, max_size=12) | st.sampled_from(HARD)


# -- the pure parts ------------------------------------------------------------------------------------------------


@given(POSITIONS)
def test_any_position_comes_back_from_its_text(position: Position) -> None:
    assert positions.parse_position(str(position)) == position


@given(st.text() | st.from_regex(r"[0-9a-fA-F]{23,25}-+(done|[0-9]{1,11})\s?", fullmatch=True))
def test_any_text_is_the_form_of_one_position_or_of_none(text: str) -> None:
    position = positions.parse_position(text)
    assert position is None or str(position) == text


@given(POSITIONS, st.text(), st.data())
def test_any_text_survives_its_frame_in_any_pieces(position: Position, text: str, data: st.DataObject) -> None:
    frame = sse.frame("token", position, {"text": text})
    cuts = sorted(data.draw(st.lists(st.integers(0, len(frame)))))
    client = Client()
    for begin, end in zip([0, *cuts], [*cuts, len(frame)], strict=True):
        client.feed(frame[begin:end])
    assert client.events == [Event("token", str(position), {"text": text})]


@given(st.lists(PIECES, max_size=30), st.data())
def test_what_follows_any_position_of_a_reply_is_the_rest_of_it(pieces: list[str], data: st.DataObject) -> None:
    reply, log = LiveReply("b" * 24, datetime.now(UTC)), Log(sse)
    log.open_reply(reply, None)
    frames: list[bytes] = []
    for piece in pieces:
        chars = reply.append(piece, len(piece.encode()))
        frames.append(sse.token_frame(reply.message_id, chars, piece))
        log.append(frames[-1], chars, delivered=False)
    text = "".join(pieces)
    at = data.draw(st.integers(0, len(text)))
    place = log.locate(Position(reply.message_id, at))
    assert place is not None
    client = Client()
    client.feed(place.before + b"".join(frames)[place.offset :])
    assert "".join(event.data["text"] for event in client.events) == text[at:]
    ends = [end for end in accumulate(map(len, pieces)) if end > at]
    assert [event.id for event in client.events] == [f"{'b' * 24}-{end}" for end in ends]


def test_reply_that_is_replaced_before_its_first_word_leaves_nothing_in_the_log() -> None:
    """Its entry stayed, and the second turn after it could not begin."""
    live, time = LiveConversation(Key(None, "c" * 24), Counts(), lambda _live: None), datetime.now(UTC)
    live.open_turn(positions.start("c" * 24), None, "1" * 24, time)
    for turn in range(2, 5):
        live.open_turn(Position(f"{turn - 1}" * 24, None), None, f"{turn}" * 24, time)
        assert not live.covers(Position("1" * 24, 0))
        live.finish(Message(f"{turn}" * 24, "assistant", "", time))


# -- a client and its connection -----------------------------------------------------------------------------------


class Client:
    """Assembles the events that it receives; each must continue the text before it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.transcript = Transcript()
        self.decoder = EventDecoder()
        self.rest = b""
        self.line: Line | None = None
        self.server: Server | None = None
        self.was_reset = False

    @property
    def position(self) -> str:
        return self.decoder.last_event_id

    def feed(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            if (event := self.decoder.feed(line.decode())) is not None:
                self.events.append(event)

    def take(self, data: bytes) -> None:
        """Take bytes of the stream, and the events that they complete."""
        self.feed(data)
        for event in self.events:
            self.transcript.take(event)
            if event.name == "token":
                message_id, _, chars = event.id.rpartition("-")
                assert len(self.transcript.said[message_id]) == int(chars), "a token that does not follow"
            self.was_reset |= event.name == "reset"
        self.events.clear()

    def lose_line(self) -> None:
        """Forget the connection and an incomplete event; keep the position."""
        self.line, self.rest, self.decoder = None, b"", EventDecoder(self.position)

    def begin_with(self, history: dict[str, str], ended: dict[str, str], position: str) -> None:
        self.transcript = Transcript(dict(history), dict(ended), list(history))
        self.decoder = EventDecoder(position)
        self.was_reset = False


class Line(asyncio.Transport):
    """A connection to a client: the server's bytes, those in transit, and the network's capacity."""

    def __init__(self, connection: Connection, window: int) -> None:
        super().__init__()
        self.connection = connection
        self.stalled = False
        self._window = window
        self._network = bytearray()
        self._unsent = bytearray()
        self._paused = False
        self._closed = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        assert high == 0

    def get_write_buffer_size(self) -> int:
        return len(self._unsent)

    def write(self, data: "bytes | bytearray | memoryview[Any]") -> None:
        assert not self._closed and not self._paused, "written to while it had bytes in flight"
        self._unsent += data
        self._send()
        if self._unsent:
            self._paused = True
            self.connection.pause_writing()

    def close(self) -> None:
        self._closed = True

    def is_closing(self) -> bool:
        return self._closed

    def _send(self) -> None:
        room = self._window - len(self._network)
        self._network += self._unsent[:room]
        del self._unsent[:room]

    def read(self, client: Client) -> bool:
        """Have the client take all available bytes; return whether it is still connected."""
        while self._network:
            client.take(bytes(self._network))
            self._network.clear()
            self._send()
            if self._paused and not self._unsent:
                self._paused = False
                self.connection.resume_writing()
        if self._closed:
            self.connection.connection_lost(None)
        return not self._closed

    def cut(self, client: Client, share: float) -> None:
        """Abort the connection: only a share (0 to 1) of the bytes in transit arrives."""
        client.take(bytes(self._network[: int(share * len(self._network))]))
        self.connection.connection_lost(None)


# -- a server ------------------------------------------------------------------------------------------------------


class Fed:
    """A source whose newest reply yields the items that a test feeds it: text, an error, or None for the end."""

    def __init__(self) -> None:
        self.food: asyncio.Queue[str | SourceError | None] = asyncio.Queue()

    async def reply(self, prompt: Prompt) -> AsyncGenerator[str, None]:
        food = self.food = asyncio.Queue()
        while (piece := await food.get()) is not None:
            if isinstance(piece, SourceError):
                raise piece
            yield piece
            food.task_done()

    async def close(self) -> None:
        pass


class GatedStore(Store):
    """A store that accepts checkpoints only on request, and whose indexes exist already."""

    taken: asyncio.Event | None = None

    async def build_indexes(self) -> None: ...

    async def checkpoint(self, replies: Any) -> Any:
        if (taken := self.taken) is None:
            raise DatabaseUnavailable
        lost = await super().checkpoint(replies)
        taken.set()
        return lost


class Server:
    """One server, as far as replies and positions go."""

    def __init__(self, client: Any) -> None:
        self.source = Fed()
        whole = WholeServer(
            Settings(checkpoint_ms=10, drain_s=0.0),
            "",
            max_connections=0,
            source=self.source,
            client=client,
            make_store=GatedStore,
        )
        assert isinstance(whole.store, GatedStore)
        self.whole, self.hub, self.store = whole, whole.hub, whole.store
        self.chat, self.reading, self.replies = whole.chat, whole.reading, whole.replies
        self.zombies = 0
        """Replies that it still writes although another server has ended them."""

    async def until_ended(self) -> None:
        """Wait until it writes no reply but its zombies."""
        while self.replies.running > self.zombies:
            await asyncio.sleep(0.001)

    async def checkpoint(self) -> None:
        """Have a checkpoint taken; it ends the zombies."""
        self.store.taken = asyncio.Event()
        if self.replies.running:
            await self.store.taken.wait()
        self.store.taken = None


@dataclass
class Turn:
    """A running reply: its text, and the length of its checkpoint."""

    reply_id: str
    server: Server | None
    said: str = ""
    saved: str = ""


@dataclass
class World:
    """What all examples share."""

    loop: asyncio.AbstractEventLoop
    client: Any
    conversations: Any


# -- the machine ---------------------------------------------------------------------------------------------------

SERVERS = st.integers(0, 1)
CLIENTS = st.integers(0, 4)
WINDOWS = st.integers(1, 400)
MEANWHILE = st.none() | st.tuples(CLIENTS, SERVERS)
PATIENCE_S = 4.0


class Conversation(RuleBasedStateMachine):
    """One conversation on two servers: turns, checkpoints, crashes, restarts, take-overs; clients that come and go.

    `record` is the expected content of the database: each message's id, role, content and status.
    """

    world: World
    make_client: type[Client] = Client

    def __init__(self) -> None:
        super().__init__()
        self.id = new_id()
        self.key = Key(None, self.id)
        self.servers: list[Server] = []
        self.clients: list[Client] = []
        self.record: list[tuple[str, str, str, str]] = []
        self.turn: Turn | None = None
        self.ended_at: Server | None = None
        self.shortened = False

    def run(self, work: Coroutine[Any, Any, None], meanwhile: tuple[int, int] | None = None) -> None:
        """Run a coroutine, and wait until all its consequences have settled.

        :param meanwhile: a disconnected client, and the server that it connects to at the same time
        """

        async def resume() -> None:
            if meanwhile is not None and self.clients:
                which, number = meanwhile
                client = self.clients[which % len(self.clients)]
                if client.line is None:
                    await self.connect(client, self.servers[number], 100)

        async def bounded() -> None:
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.gather(work, resume())
                await self.settle()

        self.world.loop.run_until_complete(bounded())

    async def settle(self) -> None:
        calm = 0
        while calm < 3:
            busy = any(live.is_dirty for server in self.servers for live in server.hub.conversations)
            calm = 0 if busy else calm + 1
            for client in self.clients:
                if client.line is not None and not client.line.stalled and not client.line.read(client):
                    client.lose_line()
                if client.line is None and client.was_reset:
                    await self.begin_again(client)
            await asyncio.sleep(0)

    async def begin_again(self, client: Client) -> None:
        """Handle a reset, which is correct only where less of a reply was stored than its server had sent."""
        assert self.shortened, "a reset without a reason"
        await self.begin_with_history(client, self.servers[0])

    async def begin_with_history(self, client: Client, server: Server) -> None:
        history = await server.reading.history(self.key, all_branches=True)
        parts = [part async for part in history.parts]
        messages = [message for part in parts for message in part.messages]
        said = {message.id: message.content for message in messages}
        ended = {
            message.id: end_of(message.status, message.error and message.error.code)
            for message in messages
            if message.role == "assistant"
        }
        if messages and messages[-1].status == "streaming":
            del ended[messages[-1].id]
        client.begin_with(said, ended, str(parts[-1].position))

    def stored(self) -> list[tuple[str, str, str, str]]:
        document = self.world.conversations.find_one({"_id": ObjectId(self.id)}) or {"messages": []}
        return [
            (str(each["_id"]), each["role"], each["content"], each.get("status", "complete"))
            for each in document["messages"]
        ]

    def look(self, *allowed: tuple[str, str]) -> None:
        """Compare the record; if the reply has ended, it matches one of `allowed` (status, content)."""
        stored = self.stored()
        turn = self.turn
        if turn is not None and stored and stored[-1][0] == turn.reply_id:
            *_, content, status = stored[-1]
            assert (status, content) in allowed
            self.record.append(stored[-1])
            self.ended_at = turn.server
            if turn.server is not None and turn.server.replies.running > turn.server.zombies:
                turn.server.zombies += 1
                self.ended_at = None
            self.turn = None
        assert stored == self.record

    # -- turns -----------------------------------------------------------------------------------------------------

    @initialize()
    def start(self) -> None:
        async def start() -> None:
            self.servers = [await self.started(), await self.started()]

        self.run(start())

    async def started(self) -> Server:
        server = Server(self.world.client)
        await server.whole.start_replies()
        return server

    @precondition(lambda self: self.turn is None)
    @rule(number=SERVERS, text=PIECES, again=st.booleans(), meanwhile=MEANWHILE)
    def say(self, number: int, text: str, again: bool, meanwhile: tuple[int, int] | None = None) -> None:
        server = self.servers[number]

        async def say() -> None:
            food = server.source.food
            if again and self.record and self.record[-1][3] in ("stopped", "failed", "interrupted"):
                turn = await server.chat.retry(self.key)
            else:
                turn = await server.chat.say(None, self.id, text)
                self.record.append((turn.message_id, "user", text, "complete"))
            self.turn = Turn(turn.reply_id, server)
            while server.source.food is food:
                await asyncio.sleep(0)

        self.run(say(), meanwhile)
        self.look()

    @precondition(lambda self: self.turn is not None and self.turn.server is not None)
    @rule(pieces=st.lists(PIECES, min_size=1, max_size=4), saved=st.booleans())
    def append(self, pieces: list[str], saved: bool) -> None:
        turn = self.turn
        assert turn is not None and turn.server is not None
        server, food = turn.server, turn.server.source.food

        async def append() -> None:
            for piece in pieces:
                food.put_nowait(piece)
            await food.join()

        self.run(append())
        turn.said += "".join(pieces)
        self.look()
        if saved:
            self.checkpoint(self.servers.index(server))

    @precondition(lambda self: self.turn is not None and self.turn.server is not None)
    @rule(how=st.sampled_from(["complete", "failed", "stopped"]), meanwhile=MEANWHILE)
    def end(self, how: str, meanwhile: tuple[int, int] | None = None) -> None:
        turn = self.turn
        assert turn is not None and turn.server is not None
        server = turn.server
        if how == "complete" and not turn.said.strip():
            how = "failed"  # a reply without a word is never complete

        async def end() -> None:
            if how == "stopped":
                await server.chat.stop(self.key)
            else:
                server.source.food.put_nowait(SourceError("source_failed", "No more.") if how == "failed" else None)
            await server.until_ended()

        self.run(end(), meanwhile)
        self.look((how, turn.said))
        assert self.turn is None

    @precondition(lambda self: self.turn is not None and self.turn.server is not None)
    @rule(knows_how=st.booleans(), meanwhile=MEANWHILE)
    def stop_elsewhere(self, knows_how: bool, meanwhile: tuple[int, int] | None = None) -> None:
        """Stop the reply on the server that does not write it.

        :param knows_how: else that server ends the reply itself, with the text of its checkpoint, as version 0.1.0 did
        """
        turn = self.turn
        assert turn is not None and turn.server is not None
        server = turn.server
        other = self.servers[server is self.servers[0]]
        self.shortened |= not knows_how and turn.saved != turn.said

        async def stop() -> None:
            if knows_how:
                server.store.taken = asyncio.Event()  # its checkpoints are accepted until the end of the reply
                await other.chat.stop(self.key)
                while server.replies.running:
                    await asyncio.sleep(0.001)
                server.store.taken, server.zombies = None, 0
            else:
                await self.take_checkpoint(other)
                record = await other.store.peek(self.key)
                assert record is not None and record.reply is not None
                await other.replies.leases.finish_from_checkpoint(self.key, record.reply, endings.STOPPED)
                await other.reading.history(self.key)

        self.run(stop(), meanwhile)
        self.look(("stopped", turn.said if knows_how else turn.saved))
        assert self.turn is None

    @rule(number=SERVERS)
    def checkpoint(self, number: int) -> None:
        server, turn = self.servers[number], self.turn
        self.run(self.take_checkpoint(server))
        if turn is not None and turn.server is server and self.stored() == self.record:
            turn.saved = turn.said
        self.look()

    async def take_checkpoint(self, server: Server) -> None:
        """Take a checkpoint; it ends the server's reply if another server has already ended it."""
        await server.checkpoint()
        ours = self.turn is not None and self.turn.server is server and self.stored() == self.record
        while server.replies.running > ours:
            await asyncio.sleep(0.001)
        server.zombies = 0

    # -- faults ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.turn is not None)
    @rule(number=SERVERS)
    def run_out_of_lease(self, number: int) -> None:
        """Let the reply's server seem lost; then the servers look, one after the other."""
        turn = self.turn
        assert turn is not None
        long_ago = {"$set": {"reply.renewedAt": datetime(2020, 1, 1, tzinfo=UTC)}}
        self.world.conversations.update_one({"_id": ObjectId(self.id)}, long_ago)

        async def look() -> None:
            await self.servers[number].reading.history(self.key)
            await self.servers[1 - number].reading.history(self.key)

        self.run(look())
        self.look(("interrupted", turn.saved))
        assert self.turn is None

    @rule(number=SERVERS, killed=st.booleans())
    def restart(self, number: int, killed: bool) -> None:
        server, turn = self.servers[number], self.turn

        async def restart() -> None:
            if not killed:
                await server.replies.drain()
                for client in self.at(server):
                    assert client.line is not None
                    client.line.connection.finish()
                await self.settle()
            await server.whole.stop_replies()
            for client in self.at(server):
                client.lose_line()
            self.servers[number] = await self.started()

        self.run(restart())
        ours = turn is not None and turn.server is server
        if turn is not None and ours and killed:
            turn.server = None
        self.look(*([("interrupted", turn.said)] if turn is not None and ours and not killed else []))

    # -- clients ---------------------------------------------------------------------------------------------------

    def at(self, server: Server) -> list[Client]:
        return [client for client in self.clients if client.line is not None and client.server is server]

    @precondition(lambda self: len(self.clients) < 5)
    @rule(number=SERVERS, begins=st.sampled_from(["nowhere", "start", "history"]), window=WINDOWS)
    def come(self, number: int, begins: str, window: int) -> None:
        client, server = self.make_client(), self.servers[number]
        self.clients.append(client)

        async def come() -> None:
            if begins == "history" and self.record:
                await self.begin_with_history(client, server)
            elif begins == "start":
                client.begin_with({}, {}, str(positions.start(self.id)))
            await self.connect(client, server, window)

        self.run(come())
        self.look()

    async def connect(self, client: Client, server: Server, window: int) -> None:
        connection = Connection(b"", server.hub.unsubscribe, stream_format=sse, chunked=False)
        await server.reading.subscribe(self.key, positions.parse_position(client.position), connection)
        client.line, client.server = Line(connection, window), server
        connection.connection_made(client.line)

    @precondition(lambda self: self.clients)
    @rule(which=CLIENTS, stalled=st.booleans())
    def stall(self, which: int, stalled: bool) -> None:
        client = self.clients[which % len(self.clients)]
        if client.line is not None:
            client.line.stalled = stalled
        self.run(self.settle())
        self.look()

    @precondition(lambda self: self.clients)
    @rule(which=CLIENTS, share=st.floats(0, 1), number=SERVERS | st.none(), window=WINDOWS)
    def cut(self, which: int, share: float, number: int | None, window: int) -> None:
        """Disconnect a client, if it is connected; let it resume, if requested."""
        client = self.clients[which % len(self.clients)]
        if client.line is not None:
            client.line.cut(client, share)
            client.lose_line()
        self.run(self.settle())
        if number is not None:
            self.run(self.connect(client, self.servers[number], window))
        self.look()

    # -- the end ---------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            self.come_to_rest()
            self.run(self.catch_up())
            self.compare()
        finally:
            self.run(self.leave())

    def come_to_rest(self) -> None:
        if self.turn is not None and self.turn.server is not None:
            self.end(how="complete")
        elif self.turn is not None:
            self.run_out_of_lease(0)
        for number in range(len(self.servers)):
            self.checkpoint(number)
        for which in range(len(self.clients)):
            self.stall(which, stalled=False)

    async def catch_up(self) -> None:
        """Clients still connected to the server of the last turn have all of it; the others resume."""
        end = f"{self.record[-1][0]}-done" if self.record else str(positions.start(self.id))
        for client in self.clients:
            if client.line is not None and client.server is self.ended_at:
                assert client.position == end, "a client was left behind"
            elif client.line is not None:
                client.line.cut(client, 1.0)
                client.lose_line()
        for index, client in enumerate(self.clients):
            while client.position != end or client.line is None:
                if client.line is not None:
                    client.line.cut(client, 1.0)
                    client.lose_line()
                await self.connect(client, self.servers[index % 2], 100)
                await self.settle()

    def compare(self) -> None:
        ids = [message_id for message_id, *_ in self.record]
        for client in self.clients:
            told = client.transcript
            assert told.order == ids[len(ids) - len(told.order) :], "messages skipped"
            for message_id, role, content, status in self.record:
                text = told.said.get(message_id, content)
                if told.ended.get(message_id) == "interrupted":
                    assert text.startswith(content)
                else:
                    assert text == content, f"{role} {status}"
                if role == "assistant" and message_id in told.said:
                    assert told.ended[message_id] == end_of(status, None)

    async def leave(self) -> None:
        """Disconnect every client; conversations without subscribers are dropped."""
        for client in self.clients:
            if client.line is not None:
                client.line.cut(client, 0.0)
                client.lose_line()
        try:
            while any(server.hub.conversations for server in self.servers):
                await asyncio.sleep(0.001)
        finally:
            for server in self.servers:
                await server.whole.stop_replies()


def end_of(status: str, code: str | None) -> str:
    """Return the end of a stored reply as clients receive it: the status of its `done`, or the code of its `error`."""
    if code is not None:
        return code
    return {"complete": "complete", "failed": "source_failed", "interrupted": "interrupted"}.get(status, "stopped")


@pytest.fixture
def world(database: Database) -> Iterator[World]:
    loop = asyncio.new_event_loop()
    client = connect(database.uri, 5.0)
    yield World(loop, client, database.conversations)
    client.close()
    loop.close()


@pytest.fixture
def machine(world: World) -> type[Conversation]:
    return type("ThisConversation", (Conversation,), {"world": world})


@pytest.mark.soak
def test_any_sequence_of_events_ends_with_the_stored_text(machine: type[Conversation]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # to make a failing sequence shorter takes minutes, since much of it is waiting
        ),
    )


@pytest.mark.parametrize("waits", [True, False])
def test_client_that_saw_more_than_another_server_kept_is_reset(machine: type[Conversation], waits: bool) -> None:
    """A `done` was sent to clients with more text than the other server had stored."""
    conversation = machine()
    conversation.start()
    conversation.come(number=0, begins="start", window=400)
    conversation.say(number=0, text="hi", again=False)
    conversation.append(pieces=["Hello"], saved=False)
    conversation.cut(which=0, share=1.0, number=1 if waits else None, window=400)
    conversation.stop_elsewhere(knows_how=False)
    conversation.cut(which=0, share=1.0, number=1, window=400)
    conversation.teardown()
