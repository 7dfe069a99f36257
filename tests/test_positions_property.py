"""Positions and resume, on any sequence of appends, endings, cuts, resumes and restarts: the stored text, each once."""

from collections.abc import Callable
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from chatserver import chat as chat_module
from chatserver import sse
from chatserver.hub import Counts, Live
from chatserver.sse import Position
from chatserver.store import INTERRUPTED, Message, Record, ReplyError, new_id
from tests.clients import EventDecoder, Transcript

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.sampled_from(
    ["\n", "\r\n", "🙂", "e\u0301", ""]
)


class Wire:
    """A subscriber whose line takes bytes only while it is open, and whose client keeps what it was told."""

    def __init__(self) -> None:
        self.cursor = 0
        self.live: Live | None = None
        self.until_done = False
        self.blocked = False
        self.ended = False
        self.client = Transcript()
        self.decoder = EventDecoder()
        self._rest = ""
        self._backlog = b""

    @property
    def ready(self) -> bool:
        return not (self.blocked or self.ended or self._backlog)

    def replay(self, data: bytes) -> None:
        if self.blocked:
            self._backlog += data
        else:
            self._take(data)

    def write(self, data: bytes) -> None:
        assert self.ready
        self._take(data)

    def end(self, data: bytes = b"") -> None:
        if not self.ended:
            self.ended = True
            self._backlog += data

    def unblock(self) -> None:
        self.blocked = False
        data, self._backlog = self._backlog, b""
        self._take(data)
        if self.live is not None and not self.ended:
            self.live.catch_up(self)

    def _take(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data.decode()).split("\n")
        for line in lines:
            if (event := self.decoder.feed(line)) is not None:
                assert event.name != "reset"
                self.client.take(event)


class Conversation(RuleBasedStateMachine):
    """One conversation, its live part in a server that may restart, its record, and clients that come and go."""

    wires = Bundle("wires")

    @initialize()
    def begin(self) -> None:
        self.id = new_id()
        self.record: list[Message] = []
        self.saved: str | None = None
        self.live = Live(self.id, Counts())
        self.open: list[Wire] = []
        self.all: list[Wire] = []

    # -- the server -------------------------------------------------------------------------------------------------

    @rule(text=TEXT)
    def say(self, text: str) -> None:
        if self.live.reply is not None:
            return
        message = Message(new_id(), "user", text or "x", datetime.now(UTC))
        previous = Position(self.record[-1].id, None) if self.record else sse.start(self.id)
        self.record.append(message)
        self.saved = ""
        self.live.begin(previous, (message.id, chat_module._input_frame(message)), new_id(), message.created_at)
        self.live.deliver()

    @rule(pieces=st.lists(TEXT, max_size=4), delivered=st.booleans())
    def append(self, pieces: list[str], delivered: bool) -> None:
        if self.live.reply is None:
            return
        for piece in pieces:
            chat_module._append(self.live, self.live.reply, piece)
        if delivered:
            self.live.deliver()

    @rule()
    def checkpoint(self) -> None:
        if self.live.reply is not None:
            self.saved = self.live.reply.content

    @rule(error=st.none() | st.just(ReplyError("source_failed", "x")))
    def finish(self, error: ReplyError | None) -> None:
        reply = self.live.reply
        if reply is None:
            return
        status = "failed" if error else "complete"
        message = Message(reply.message_id, "assistant", reply.content, reply.created_at, status, error)  # type: ignore[arg-type]
        self.record.append(message)
        self.live.finish(chat_module._end_frame(message))
        self.live.deliver()

    @rule(text=TEXT, pieces=st.lists(TEXT, max_size=3))
    def whole_turn(self, text: str, pieces: list[str]) -> None:
        """So that turns pass while somebody lags."""
        self.finish(None)
        self.say(text)
        self.append(pieces, delivered=True)
        self.finish(None)

    @rule(orderly=st.booleans())
    def restart(self, orderly: bool) -> None:
        """All lines go; a running reply is interrupted with all of its text, or with what was checkpointed."""
        reply = self.live.reply
        if reply is not None:
            content = reply.content if orderly else self.saved or ""
            self.record.append(
                Message(reply.message_id, "assistant", content, reply.created_at, "interrupted", INTERRUPTED)
            )
        for wire in self.open:
            wire.ended = True
        self.open = []
        self.live = Live(self.id, Counts())

    # -- the clients ------------------------------------------------------------------------------------------------

    @rule(target=wires)
    def join(self) -> Wire:
        wire = Wire()
        wire.decoder.last_event_id = str(sse.start(self.id))
        self.all.append(wire)
        self._subscribe(wire)
        return wire

    @rule(wire=wires)
    def cut_and_resume(self, wire: Wire) -> None:
        """The line breaks: what was written but not taken is lost; the client comes back with its position."""
        if wire in self.open:
            self.live.unsubscribe(wire)
            self.open.remove(wire)
        wire.ended, wire.blocked, wire._rest, wire._backlog, wire.cursor = False, False, "", b"", 0
        wire.decoder = EventDecoder(wire.decoder.last_event_id)
        self._subscribe(wire)

    @rule(wire=wires)
    def stall(self, wire: Wire) -> None:
        wire.blocked = True

    @rule(wire=wires)
    def go_on(self, wire: Wire) -> None:
        if wire in self.open:
            wire.unblock()

    def _subscribe(self, wire: Wire) -> None:
        """What `Chat.subscribe` does, with the record at hand instead of the database."""
        at = sse.parse_position(wire.decoder.last_event_id)
        assert at is not None
        if not self.live.covers(at):
            ids = [message.id for message in self.record]
            start = at == sse.start(self.id)
            since = 0 if start else ids.index(at.message_id)
            last_id = ids[-1] if ids else None
            now = datetime.now(UTC)
            record = Record(now, now, self.record[since:], None, last_id, since, True)
            if self.live.reply is None:
                self.live.adopt(Position(last_id, None) if last_id else sse.start(self.id))
            if not self.live.covers(at):
                missed = chat_module._missed(record, at, self.id, False)
                assert missed is not None and missed.position is not None
                wire.replay(missed.frames)
                at = missed.position
        self.live.subscribe(wire, at)
        self.open.append(wire)

    # -- the promise ------------------------------------------------------------------------------------------------

    @invariant()
    def clients_have_a_beginning_of_the_stored_text(self) -> None:
        texts = {message.id: message.content for message in self.record}
        if self.live.reply is not None:
            texts[self.live.reply.message_id] = self.live.reply.content
        for wire in self.all:
            order = list(texts)[: len(wire.client.order)]
            assert wire.client.order == order
            for message_id in wire.client.order:
                said, text = wire.client.said[message_id], texts[message_id]
                lost = any(each.id == message_id and each.status == "interrupted" for each in self.record)
                assert text.startswith(said) or (lost and said.startswith(text))

    def teardown(self) -> None:
        """In the end, whoever comes back has all that is stored; only an interrupted reply may have been longer."""
        self.finish(None)
        for wire in self.all:
            wire.ended = wire.ended or wire.blocked
            self.cut_and_resume(wire)
            for message in self.record:
                said = wire.client.said[message.id]
                assert said == message.content or (message.status == "interrupted" and said.startswith(message.content))
                assert message.role == "user" or message.id in wire.client.ended


Conversation.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestConversation: Callable[[], None] = Conversation.TestCase  # type: ignore[assignment]


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXT, max_size=12), st.integers(0, 70))
def test_any_place_in_a_reply_is_found(pieces: list[str], chars: int) -> None:
    live = Live(new_id(), Counts())
    live.begin(sse.start(live.conversation_id), None, new_id(), datetime.now(UTC))
    reply = live.reply
    assert reply is not None
    for piece in pieces:
        chat_module._append(live, reply, piece)
    text = "".join(pieces)
    position = Position(reply.message_id, min(chars, len(text)))
    live.finish(chat_module._end_frame(Message(reply.message_id, "assistant", text, reply.created_at)))
    wire = Wire()
    live.subscribe(wire, position)
    assert wire.client.said.get(reply.message_id, "") == text[chars:]
    assert wire.client.ended == {reply.message_id: "complete"}
