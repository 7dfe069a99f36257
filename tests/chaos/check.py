"""Compares every conversation and every client's events with the documents in MongoDB."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.ledger import Fault, Ledger, Seen

KINDS = (
    "message lost",
    "post stored twice",
    "done not kept",
    "stop not kept",
    "retry not kept",
    "wrong branch",
    "deletion not kept",
    "text repeated",
    "text skipped",
    "text lost",
    "end not sent",
    "premature last chunk",
    "stuck",
)
SLACK_S = 0.25
"""How far the last checkpoint may exceed its interval: 0.1 s was measured on two cores under a load of eight."""
RECOVERY_S = 1.0
"""How long the driver and the server, which both check twice a second, take to find the database after an outage."""
RESET_S = 2.0
"""How long the reset of a deleted conversation may take to arrive."""
Stored = Mapping[str, Any]
_UNKNOWN = ""
"""Instead of a message's id: a client that connects without a position need not know where the conversation ends."""


@dataclass
class Verdict:
    """The result: violations by kind, with a line for each."""

    events: int = 0
    ends: int = 0
    orderly: int = 0
    """How many streams ended with their last chunk."""
    lines: list[tuple[str, str]] = field(default_factory=list)

    def blame(self, kind: str, line: str) -> None:
        assert kind in KINDS
        self.lines.append((kind, line))

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(kind for kind, _ in self.lines)
        return {kind: found[kind] for kind in KINDS}


def check(ledger: Ledger, conversations: Mapping[str, Stored]) -> Verdict:
    """Return the violations of a run.

    :param conversations: the documents by their ids, as MongoDB has them at the end
    """
    verdict = Verdict()
    for line in ledger.stuck:
        verdict.blame("stuck", line)
    for conversation_id, document in conversations.items():
        if "reply" in document:
            verdict.blame("stuck", f"{conversation_id} is still streaming")
    _check_deletions(ledger, conversations, verdict)
    # A deleted conversation is compared with its messages before its last turn.
    deleted = {each: {"messages": deletion.messages} for each, deletion in ledger.deletions.items()}
    conversations = {**conversations, **deleted}
    _check_posts(ledger, conversations, verdict)
    _check_endings(ledger, conversations, verdict)
    for (conversation_id, number), seen in ledger.seen.items():
        document = conversations.get(conversation_id, {"messages": []})
        if conversation_id in deleted:
            seen = [each for each in seen if _is_about(each, document)]
        reader = _Reader(ledger, f"{conversation_id} client {number}", document, verdict)
        reader.read(seen)
        if conversation_id not in deleted:
            reader.check_head(document)
    return verdict


def parents(document: Stored) -> Mapping[str, str | None]:
    """Return the parent of each message, by id; None for a first message. Without a stored one it is the one before."""
    found: dict[str, str | None] = {}
    before = None
    for message in document["messages"]:
        parent = message.get("parent", before)
        before = str(message["_id"])
        found[before] = None if parent is None else str(parent)
    return found


def _is_about(event: Seen, document: Stored) -> bool:
    """Return whether an event is about messages of a document only, or about a stream."""
    stored = {str(message["_id"]) for message in document["messages"]}
    about = {message["id"] for message in event.data["messages"]} if event.kind == "history" else {event.id[:24]}
    return event.kind == "left" or about <= stored


def _check_deletions(ledger: Ledger, conversations: Mapping[str, Stored], verdict: Verdict) -> None:
    """A deleted conversation stays deleted, and its streams end with `reset`."""
    for conversation_id in ledger.deletions.keys() & conversations.keys():
        verdict.blame("deletion not kept", f"{conversation_id} is stored again")
    for (conversation_id, number), seen in ledger.seen.items():
        name = f"{conversation_id} client {number}"
        if (deletion := ledger.deletions.get(conversation_id)) is None:
            if seen and seen[-1].kind == "gone":
                verdict.blame("message lost", f"{name}: the conversation is unknown, but was not deleted")
            continue
        if not seen or seen[-1].kind != "gone":
            verdict.blame("deletion not kept", f"{name} received no reset")
        for stream in (each for each in seen if each.kind == "left"):
            late = stream.data["opened"] < deletion.time < stream.time - RESET_S
            # A server that was paused, or a second server, learns of the deletion later.
            if late and not any(
                fault.kind == "server paused" and fault.begin < stream.time and deletion.time < fault.end + 1
                for fault in ledger.faults
            ):
                verdict.blame("deletion not kept", f"{name}: reset after {stream.time - deletion.time:.2f} s")


def _check_endings(ledger: Ledger, conversations: Mapping[str, Stored], verdict: Verdict) -> None:
    """Answered stops and retries are stored as such, and no reply has an older sibling without a retry."""
    nothing: Stored = {"messages": []}
    for conversation_id, reply_id in ledger.stops:
        messages = conversations.get(conversation_id, nothing)["messages"]
        # If the server died before it stored the stop, the reply is interrupted; but it never runs to its end.
        if not any(str(each["_id"]) == reply_id and each.get("status", "complete") != "complete" for each in messages):
            verdict.blame("stop not kept", f"{conversation_id}: {reply_id} was stopped, but is not stored as stopped")
    first_answers: dict[tuple[str, str], str] = {}
    for retry in ledger.retries:
        if first_answers.setdefault((retry.conversation_id, retry.key), retry.new_id) != retry.new_id:
            verdict.blame("retry not kept", f"{retry.conversation_id} key {retry.key}: two answers")
        parent_of = parents(conversations.get(retry.conversation_id, nothing))
        if retry.new_id not in parent_of or parent_of[retry.new_id] != parent_of.get(retry.reply_id):
            verdict.blame("retry not kept", f"{retry} is not stored")
    retries = {retry.new_id for retry in ledger.retries}
    for conversation_id, document in conversations.items():
        parent_of, answered_messages = parents(document), set()
        for message in document["messages"]:
            id_ = str(message["_id"])
            if message["role"] == "assistant" and parent_of[id_] in answered_messages and id_ not in retries:
                verdict.blame("retry not kept", f"{conversation_id}: {id_} is no client's retry")
            if message["role"] == "assistant":
                answered_messages.add(parent_of[id_])


def _check_posts(ledger: Ledger, conversations: Mapping[str, Stored], verdict: Verdict) -> None:
    answers: dict[tuple[str, str], dict[str, Any]] = {}
    orders: dict[str, list[str]] = {}
    for post in ledger.posts:
        first = answers.setdefault((post.conversation_id, post.key), post.answer)
        if first != post.answer:
            verdict.blame("post stored twice", f"{post.conversation_id} key {post.key}: two answers")
        order = orders.setdefault(post.conversation_id, [])
        if post.answer["messageId"] not in order:
            order.append(post.answer["messageId"])
    for conversation_id, order in orders.items():
        if conversation_id in ledger.deletions:
            order.pop()
        messages = conversations.get(conversation_id, {"messages": []})["messages"]
        users = [str(message["_id"]) for message in messages if message["role"] == "user"]
        for message_id, count in Counter(users).items():
            if count > 1:
                verdict.blame("post stored twice", f"{conversation_id} message {message_id}")
        for text, count in Counter(message["content"] for message in messages if message["role"] == "user").items():
            if count > 1:
                verdict.blame("post stored twice", f"{conversation_id} {text!r}")
        if [each for each in users if each in order] != order:
            verdict.blame("message lost", f"{conversation_id}: acknowledged {order}, stored {users}")


class _Reader:
    """Assembles the events of one client, and compares the result with the stored messages."""

    def __init__(self, ledger: Ledger, name: str, document: Stored, verdict: Verdict) -> None:
        self._ledger, self._name, self._verdict = ledger, name, verdict
        self._stored = {str(message["_id"]): message for message in document["messages"]}
        self._parents = parents(document)
        self._head: str | None = _UNKNOWN
        """The message at the end of the visible conversation; None if it is empty."""
        self._texts: dict[str, list[tuple[float, str]]] = {}
        self._ended: set[str] = set()

    def read(self, seen: list[Seen]) -> None:
        for event in seen:
            self._verdict.events += 1
            if event.kind == "history":
                self._take_history(event)
            elif event.kind == "token":
                self._take_token(event)
            elif event.kind == "input":
                self._take_input(event)
            elif event.kind in ("done", "error"):
                self._take_end(event)
            elif event.kind == "head":
                self._head = event.data["messageId"]
            elif event.kind == "left":
                self._take_leave(event)
        self._check_order()

    def check_head(self, document: Stored) -> None:
        """A client that has received everything shows the branch that is stored as the active one."""
        last, head = next(reversed(self._stored), None), document.get("head")
        if head is not None and head["length"] == len(self._stored):
            last = str(head["_id"])
        if self._head not in (_UNKNOWN, last):
            self._verdict.blame("wrong branch", f"{self._name}: at the end it shows {self._head}, stored {last}")

    def _continue(self, message_id: str) -> None:
        """A message begins where its parent is the end of the visible conversation, and is then the end itself."""
        allowed: set[str | None] = {_UNKNOWN}
        if message_id in self._texts:
            allowed.add(message_id)
        if message_id in self._parents and not _text(self._texts.get(message_id, [])):
            allowed.add(self._parents[message_id])
        if self._head not in allowed:
            self._verdict.blame("wrong branch", f"{self._name}: {message_id} after {self._head}")
        self._head = message_id

    def _check_order(self) -> None:
        """A client receives all messages from its first one on, in order."""
        received, stored = list(self._texts), list(self._stored)
        if received and received[0] in stored:
            first = stored.index(received[0])
            stored = stored[first : first + len(received)]
        if received and received != stored:
            self._verdict.blame("text skipped", f"{self._name}: received {received}, stored {stored}")

    def _take_history(self, event: Seen) -> None:
        """After a reset, a client has the text of the history only. It must have had text that is not stored."""
        kept = {message_id: message["content"] for message_id, message in self._stored.items()}
        texts = {message_id: _text(pieces) for message_id, pieces in self._texts.items()}
        if all(kept.get(message_id, "").startswith(text) for message_id, text in texts.items()):
            self._verdict.blame("text repeated", f"{self._name}: a reset, although all its text is stored")
        self._texts, self._ended, self._head = {}, set(), event.data["head"]
        for message in event.data["messages"]:
            self._texts[message["id"]] = [(event.time, message["content"])]
            if message["status"] != "streaming":
                self._ended.add(message["id"])

    def _take_token(self, event: Seen) -> None:
        message_id, _, chars = event.id.rpartition("-")
        if message_id in self._ended:
            self._verdict.blame("text repeated", f"{self._name}: a token of {message_id} after its end")
        self._continue(message_id)
        pieces = self._texts.setdefault(message_id, [])
        text, had = event.data["text"], len(_text(pieces))
        begins = int(chars) - len(text)
        if begins < had:
            self._verdict.blame("text repeated", f"{self._name}: {message_id} from {begins}, had {had}")
        elif begins > had:
            self._verdict.blame("text skipped", f"{self._name}: {message_id} from {begins}, had {had}")
        pieces.append((event.time, text))

    def _take_input(self, event: Seen) -> None:
        message_id = event.data["messageId"]
        if message_id in self._texts:
            self._verdict.blame("text repeated", f"{self._name}: input {message_id} twice")
        self._continue(message_id)
        self._texts[message_id] = [(event.time, event.data["text"])]
        stored = self._stored.get(message_id)
        if stored is None or stored["content"] != event.data["text"]:
            self._verdict.blame("message lost", f"{self._name}: input {message_id} is not stored with this text")

    def _take_leave(self, event: Seen) -> None:
        """A server that shuts down has stored its replies, and sends their ends before it ends their streams.

        Except for the replies of a server that died just before: they end when their leases have expired. And only a
        server that shuts down sends a last chunk, to a client that has received everything.
        """
        faults, takeover_s = self._ledger.faults, 1.5 * self._ledger.lease_s
        ended = any(
            fault.kind == "server restarted"
            and event.data["opened"] < fault.begin < event.time < fault.end + 1
            and not any(lost.hits == "server" and lost.begin < fault.begin < lost.end + takeover_s for lost in faults)
            for fault in faults
        )
        message_id, _, chars = event.id.rpartition("-")
        if ended and chars != "done" and message_id in self._stored:
            self._verdict.blame("end not sent", f"{self._name}: left at {event.id} by a server that shut down")
        if event.data["clean"]:
            self._verdict.orderly += 1
            if chars not in ("done", "0") or not any(
                fault.hits == "shutdown" and fault.begin < event.time < fault.end + 1 for fault in faults
            ):
                self._verdict.blame("premature last chunk", f"{self._name}: a last chunk at {event.id}")

    def _take_end(self, event: Seen) -> None:
        message_id = event.data["messageId"]
        if message_id in self._ended:
            self._verdict.blame("text repeated", f"{self._name}: two ends of {message_id}")
        self._continue(message_id)
        self._ended.add(message_id)
        self._verdict.ends += 1
        stored = self._stored.get(message_id)
        pieces = self._texts.setdefault(message_id, [])
        text = _text(pieces)
        kept = stored["content"] if stored else ""
        if event.kind == "done":
            status = stored.get("status", "complete") if stored else None
            if status != event.data["status"] or kept != text:
                line = f"{self._name}: done of {message_id}: sent {text!r}, stored {kept!r} as {status}"
                self._verdict.blame("done not kept", line)
        elif stored is None or stored.get("error", {}).get("code") != event.data["code"]:
            self._verdict.blame("done not kept", f"{self._name}: error of {message_id} is not stored")
        elif not any(
            fault.hits in ("server", "shutdown") and fault.begin <= event.time for fault in self._ledger.faults
        ):
            self._verdict.blame("text lost", f"{self._name}: {message_id} has an error, but no server was hit")
        elif not text.startswith(kept):
            self._verdict.blame("text skipped", f"{self._name}: {message_id}: sent {text!r}, stored {kept!r}")
        elif len(text) > len(kept):
            self._check_loss(message_id, pieces, len(kept), event)

    def _check_loss(self, message_id: str, pieces: list[tuple[float, str]], kept: int, end: Seen) -> None:
        """Only the text after the last checkpoint may be lost, and only of interrupted replies."""
        first_lost = next(time for time, total in _running_totals(pieces) if total > kept)
        bound = last_checkpoint(self._ledger, first_lost, end.time)
        code = end.data["code"]
        if code != "interrupted" or bound is None or first_lost < bound:
            late = "no server died" if bound is None else f"{bound - first_lost:.2f} s before the last checkpoint"
            self._verdict.blame("text lost", f"{self._name}: {message_id} ({code}), first lost token {late}")


def _text(pieces: list[tuple[float, str]]) -> str:
    return "".join(piece for _, piece in pieces)


def _running_totals(pieces: list[tuple[float, str]]) -> list[tuple[float, int]]:
    totals, total = [], 0
    for time, piece in pieces:
        total += len(piece)
        totals.append((time, total))
    return totals


def last_checkpoint(ledger: Ledger, after: float, before: float) -> float | None:
    """Return the time up to which a checkpoint must have saved the text before the server died; None if none died.

    A checkpoint is taken every interval while the database answers. During an outage a checkpoint may fail, until the
    server has found the database again and one more interval has passed. A client receives a token after the server
    has produced it, never before, so that the delay needs no allowance.
    """
    margin = ledger.interval_s + SLACK_S
    lost = [
        fault.begin
        for fault in ledger.faults
        if fault.hits == "server" and fault.end + margin >= after and fault.begin <= before
    ]
    if not lost:
        return None
    # The first one counts: its reply was not continued.
    bound = min(lost) - margin
    for outage in sorted((each for each in ledger.faults if each.hits == "database"), key=_begin, reverse=True):
        if outage.begin <= bound + margin and outage.end + RECOVERY_S + margin >= bound:
            bound = min(bound, outage.begin - margin)
    return bound


def _begin(fault: Fault) -> float:
    return fault.begin
