"""Conversations with branches, as a client and as a reader of the database see them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.clients import Event

Head = tuple[str, str | None]
"""What `expected_heads` returns for a `head`; the other events are ("input" | "token" | "end", message id)."""


@dataclass
class Shown:
    """A message in a client's view. `id` is None while the client does not know it."""

    id: str | None
    role: str
    text: str
    status: str = "complete"

    @property
    def values(self) -> tuple[str | None, str, str, str]:
        return self.id, self.role, self.text, self.status


@dataclass
class View:
    """The conversation that a client shows: it knows the protocol, and nothing but what it was sent.

    `is_stale` is whether the client must fetch the history: it was sent a head that it does not hold, a reset, or the
    end of an interrupted reply, whose stored text may be shorter.
    """

    messages: list[Shown] = field(default_factory=list)
    title: str | None = None
    is_stale: bool = False
    is_first_head: bool = True
    """Whether the next `head` is the first one of its stream."""

    @property
    def values(self) -> list[tuple[str | None, str, str, str]]:
        return [each.values for each in self.messages]

    @property
    def running(self) -> Shown | None:
        """The reply that runs, as far as the client knows."""
        return self.messages[-1] if self.messages and self.messages[-1].status == "streaming" else None

    def load(self, history: dict[str, Any]) -> None:
        """Show a history, as `GET /chat/:id` returned it."""
        self.messages = [
            Shown(each["id"], each["role"], each["content"], each["status"]) for each in history["messages"]
        ]
        self.title = history.get("title")
        self.is_stale = False

    def open(self) -> None:
        """Note that a new stream begins: without a `title` at its start, the title is the automatic one."""
        self.is_first_head, self.title = True, None

    def take(self, event: Event) -> None:
        """Take the next event of the stream; none counts while the view is stale."""
        if self.is_stale:
            return
        data = event.data
        match event.name:
            case "head":
                self._end_at(data["messageId"])
                self.is_first_head = False
            case "title":
                self.title = data["title"]
            case "input":
                self.messages.append(Shown(data["messageId"], "user", data["text"]))
            case "message":
                self.messages.append(Shown(data["messageId"], data["role"], data["text"]))
            case "token":
                self._reply().text += data["text"]
            case "done" | "error":
                reply = self._reply()
                assert reply.id in (None, data["messageId"]), "the end of another reply"
                code = data.get("code")
                reply.id, reply.status = data["messageId"], data.get("status", "failed")
                self.is_stale = code == "interrupted"
            case "reset":
                self.is_stale = True

    def _end_at(self, message_id: str | None) -> None:
        ids = [each.id for each in self.messages]
        if message_id is None:
            del self.messages[:]
        elif message_id in ids:
            del self.messages[ids.index(message_id) + 1 :]
        elif self.is_first_head and (reply := self.running) is not None and reply.id is None and reply.text:
            reply.id = message_id
        else:
            self.is_stale = True

    def _reply(self) -> Shown:
        """Return the running reply, a new one if none runs."""
        if self.running is None:
            self.messages.append(Shown(None, "assistant", "", "streaming"))
        return self.messages[-1]


def path_to(messages: Sequence[dict[str, Any]], head: str | None) -> list[dict[str, Any]]:
    """Return the path from a first message to a head, of all messages as `?branches=all` returns them."""
    by_id = {each["id"]: each for each in messages}
    path = []
    while head is not None:
        path.append(by_id[head])
        head = by_id[head]["parentId"]
    return path[::-1]


def shown(message: dict[str, Any]) -> Shown:
    """Return a message of a history as a client shows it."""
    status = "failed" if message["status"] == "interrupted" else message["status"]
    return Shown(message["id"], message["role"], message["content"], status)


def at_position(history: dict[str, Any], index: int, chars: int | None) -> View:
    """Return the view of a client that has followed a conversation from its beginning to a position.

    :param history: with all branches
    :param index: of the message in the array; -1 for before the first one
    :param chars: how much of that message the client received; None for all of it, and its end
    """
    if index < 0:
        return View()
    message = history["messages"][index]
    path = [shown(each) for each in path_to(history["messages"], message["id"])]
    if chars is not None and not chars:
        path.pop()
    elif chars is not None:
        path[-1] = Shown(None, "assistant", message["content"][:chars], "streaming")
    return View(path)


def expected_events(history: dict[str, Any], index: int, chars: int | None) -> list[Head]:
    """Return the events of a stream that starts at a position, as names and message ids, repeated tokens left out.

    :param history: with all branches, of a conversation with branches
    :param index: as in `at_position`
    :param chars: as in `at_position`
    """
    messages = history["messages"]
    is_inside = index >= 0 and bool(chars)
    begin = index + 1 if index < 0 or chars is None else index
    following = messages[begin:]
    head = messages[index]["id"] if is_inside else following[0]["parentId"] if following else history["head"]
    events: list[Head] = [("head", head)]
    for each in following:
        if not (is_inside and each is following[0]) and each["parentId"] != head:
            events.append(("head", each["parentId"]))
        head = each["id"]
        if each["role"] != "assistant":
            events.append(("input", head))
            continue
        rest = each["content"][chars or 0 :] if each is following[0] and is_inside else each["content"]
        events += [("token", head)] if rest else []
        events += [("end", head)] if each["status"] != "streaming" else []
    if head != history["head"]:
        events.append(("head", history["head"]))
    return events


def names_of(events: Sequence[Event]) -> list[Head]:
    """Return events in the form of `expected_events`."""
    names: list[Head] = []
    for event in events:
        message_id = event.data.get("messageId") if event.name != "token" else event.id.rpartition("-")[0]
        name = {"done": "end", "error": "end"}.get(event.name, event.name)
        if (name, message_id) != ("token", names[-1][1] if names and names[-1][0] == "token" else None):
            names.append((name, message_id))
    return names
