#!/usr/bin/env python3
"""Chat in a terminal: an example of a client that loses and repeats no text.

1. Choose an id for a new conversation, or fetch the history of an existing one.
2. Open the stream before the first post, so that no event is missed. A separate thread reads it.
3. Post the user's message with an idempotency key, so that the post can be repeated if its answer is lost.
4. Print the tokens as they arrive. If the connection fails, or is silent for longer than the server's ping interval
   allows, reopen the stream from the last position.
5. A reply is stored before its end is sent: compare it with the history.
6. A conversation is a tree, of which one path is shown. If the event `head` names a message of that path, drop what
   follows it; if it names another one, fetch the history.

If the server has users, pass a token in the environment variable CHAT_TOKEN or by --token. It is never printed.

It needs only Python's standard library. Ctrl-C stops a reply, Ctrl-D exits, /help lists the commands.
"""

import argparse
import http.client
import itertools
import json
import os
import queue
import random
import re
import secrets
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

PING_S = 15  # the ping interval of an idle stream, until the server announces its own
SILENT_PINGS = 2.5  # a stream without data for this number of ping intervals is dead
TIMEOUT_S = 15
PATIENCE_S = 60  # how long to repeat a request
SHORT_CHARS = 60  # how much of a message a notice shows
COMMANDS = (
    "/stop stops the reply, /retry asks for another version of the last reply, "
    "/edit N TEXT posts another version of your N-th message, "
    "/branches lists the versions, /branches NUMBER shows one of them, /help lists the commands; "
    "//text sends a text that begins with a slash"
)
LATER = (429, 502, 503, 504)  # status codes of a server that is busy or unavailable, or of its proxy


@dataclass
class Event:
    """An event of the stream, a state of the stream ("open", "lost", "refused") or an input ("typed", "eof").

    A "head" says what becomes of the shown path: its first `n_kept` messages stay, `after` is the last one of them, and
    `history` has the messages that follow now, or is None if none do.
    """

    name: str
    data: dict[str, Any]


class Refused(Exception):
    """A request failed; the text is for the user. `pause_s`: repeat it after this time; None: do not repeat it."""

    def __init__(self, text: str, code: str | None = None, pause_s: float | None = None) -> None:
        super().__init__(text.rstrip("."))
        self.code = code
        self.pause_s = pause_s


class Conversation:
    """One conversation, over HTTP. `notice` shows a text to the user while a request is repeated."""

    def __init__(
        self, url: SplitResult, conversation_id: str, notice: Callable[[str], None], token: str | None = None
    ) -> None:
        self.id = conversation_id
        self.position = ""
        self._url = url
        self._token = token
        self._notice = notice
        self._pause_s = 1.0  # before reconnecting; the server sets it by `retry`
        self._path: list[dict[str, Any]] = []  # the shown messages; a running reply may have no known id
        self._replying = False  # whether the last one is a running reply, of which some text was received
        self._missed: str | None = None  # a head that the history did not have either

    def history(self) -> dict[str, Any] | None:
        """Return the stored conversation, or None if it does not exist; the stream continues from its end."""
        try:
            answer = self._request("GET", f"/{self.id}")
        except Refused as refusal:
            if refusal.code != "not_found":
                raise
            self.position = ""
            self._path, self._replying = [], False
            return None
        self.position = answer["lastEventId"]
        self._path = [each for each in answer["messages"] if each["content"] or each["status"] != "streaming"]
        self._replying = bool(self._path) and self._path[-1]["status"] == "streaming"
        return answer

    def path(self) -> list[dict[str, Any]]:
        """Return the messages of the active path."""
        messages: list[dict[str, Any]] = self._request("GET", f"/{self.id}")["messages"]
        return messages

    def tree(self) -> dict[str, Any]:
        """Return all messages, each with its `parentId`, and the `head`, the last message of the active path."""
        return self._request("GET", f"/{self.id}?branches=all")

    def stored(self, message_id: str) -> str | None:
        """Return the stored text of a message, or None if there is no such message."""
        messages = self.tree()["messages"]  # not the path: another client may have shown another branch by now
        return next((message["content"] for message in messages if message["id"] == message_id), None)

    def say(self, text: str) -> dict[str, Any]:
        """Post the user's message; return the ids of the message and of its reply."""
        return self._request("POST", "", {"conversationId": self.id, "input": text})

    def edit(self, parent_id: str | None, text: str) -> dict[str, Any]:
        """Post another version of a message: a message with the same parent (None: of a first message)."""
        return self._request("POST", "", {"conversationId": self.id, "input": text, "parentId": parent_id})

    def stop(self) -> None:
        """Stop the running reply; its text so far is kept."""
        self._request("POST", f"/{self.id}/stop")

    def retry(self) -> dict[str, Any]:
        """Request another version of the last reply."""
        return self._request("POST", f"/{self.id}/retry")

    def switch(self, message_id: str) -> None:
        """Show the branch with a message; the stream reports it."""
        self._request("PUT", f"/{self.id}/head", {"messageId": message_id})

    def events(self) -> Iterator[Event]:
        """Yield all events after `position`, and reopen the stream whenever it ends."""
        while True:
            headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": self.position} if self.position else {})
            try:
                silence_s = SILENT_PINGS * PING_S
                with self._answer("GET", f"/stream/{self.id}", headers, timeout_s=silence_s) as (response, connection):
                    yield from self._read(response, connection)
            except Refused as refusal:
                if refusal.pause_s is None:
                    yield Event("refused", {"reason": str(refusal)})
                    return
                yield Event("lost", {"reason": str(refusal)})
                time.sleep(refusal.pause_s * random.uniform(0.5, 1))  # so that clients do not reconnect all at once

    def _read(self, response: http.client.HTTPResponse, connection: socket.socket) -> Iterator[Event]:
        """Yield the events of one connection (https://html.spec.whatwg.org/#event-stream-interpretation)."""
        opened = False
        is_first_head = True
        name, data, position = "", "", self.position
        for line in response:
            field, _, value = line.decode().rstrip("\r\n").partition(":")
            value = value.removeprefix(" ")
            if field == "event":
                name = value
            elif field == "data":
                data += value
            elif field == "id":
                position = value
            elif field == "retry":
                self._pause_s = int(value) / 1000
            elif line in (b"\n", b"\r\n"):  # the end of an event: only now it counts
                if name == "reset":  # our position is unknown: continue from the history
                    yield Event("reset", self.history() or {})
                    return
                self.position = position
                if position and not opened:
                    opened = True
                    yield Event("open", {})
                if name == "ping":
                    connection.settimeout(SILENT_PINGS * max(1, json.loads(data)["everyS"]))
                elif name == "head":
                    change = self._move(json.loads(data)["messageId"], is_first=is_first_head)
                    is_first_head = False
                    if change:
                        yield change
                    if change and change.data["history"]:
                        return  # the stream continues from the end of the history
                elif data:
                    event = Event(name, json.loads(data))
                    self._extend(event)
                    yield event
                name, data = "", ""
        raise ConnectionError("the stream has ended")

    def _extend(self, event: Event) -> None:
        """Add an event to the shown path."""
        data = event.data
        if event.name == "token" and self._replying:
            if len(self._path[-1]["content"]) < SHORT_CHARS:  # no more than a notice shows
                self._path[-1] = self._path[-1] | {"content": self._path[-1]["content"] + data["text"]}
        elif event.name == "token":
            self._path.append({"id": None, "role": "assistant", "content": data["text"], "status": "streaming"})
            self._replying = True
        elif event.name in ("input", "message"):
            message = {"id": data["messageId"], "role": data.get("role", "user"), "content": data["text"]}
            self._path.append(message | {"status": "complete"})
        elif event.name in ("done", "error"):
            reply = self._path.pop() if self._replying else {"role": "assistant", "content": ""}
            self._path.append(reply | {"id": data["messageId"], "status": data.get("status", "failed")})
            self._replying = False

    def _move(self, message_id: str | None, *, is_first: bool) -> Event | None:
        """End the shown path at a message, the head; return None if that changes nothing.

        :param is_first: whether it is the first head of its stream, which may name the reply that is being received
        """
        ids = [message["id"] for message in self._path]
        if message_id is None or message_id in ids:
            n_kept = 0 if message_id is None else ids.index(message_id) + 1
            history = None
        elif is_first and self._replying and ids[-1] is None:
            self._path[-1] = self._path[-1] | {"id": message_id}
            return None
        elif message_id == self._missed:
            return None  # the history does not have it either
        else:
            before = ids[:-1] if self._replying else ids
            history = self.history()
            if history is None:
                return None  # it was deleted: the stream ends with a reset
            now = [message["id"] for message in self._path]
            self._missed = None if message_id in now else message_id
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, now, strict=False))
            n_kept = len(list(same))
        if history is None and n_kept == len(ids):
            return None
        after = self._path[n_kept - 1] if n_kept else None
        if history is None:
            del self._path[n_kept:]
            self._replying = False
        return Event("head", {"messageId": message_id, "n_kept": n_kept, "after": after, "history": history})

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the server's answer; repeat the request without an answer, or if the server asks to retry later."""
        headers = {"Content-Type": "application/json"} if body else {}
        if method == "POST":
            headers["Idempotency-Key"] = secrets.token_hex(16)  # the same for all attempts: posted twice, stored once
        give_up = time.monotonic() + PATIENCE_S
        notified = ""
        while True:
            try:
                with self._answer(method, path, headers, json.dumps(body) if body else None) as (response, _):
                    return dict(json.loads(response.read()))
            except Refused as refusal:
                if refusal.pause_s is None or time.monotonic() + refusal.pause_s > give_up:
                    raise
                if notified != str(refusal):
                    notified = str(refusal)
                    self._notice(f"{notified}; trying again in {refusal.pause_s:.0f} s")
                time.sleep(refusal.pause_s)

    @contextmanager
    def _answer(
        self, method: str, path: str, headers: dict[str, str], body: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> Iterator[tuple[http.client.HTTPResponse, socket.socket]]:
        """Yield the answer to one request and its socket; raise Refused on an error or a broken connection."""
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._url.hostname or "", self._url.port, timeout=timeout_s)
        try:
            connection.connect()
            # `connection` drops its socket when an answer begins that ends with the connection.
            connected = connection.sock
            if self._token is not None:
                headers = headers | {"Authorization": f"Bearer {self._token}"}
            connection.request(method, f"{self._url.path.rstrip('/')}/chat{path}", body, headers)
            response = connection.getresponse()
            if response.status >= 300:
                text = response.read()
                # A proxy may answer HTML.
                problem = json.loads(text) if "json" in response.headers.get("Content-Type", "") else {}
                pause_s = float(response.headers.get("Retry-After", 5)) if response.status in LATER else None
                detail = problem.get("detail", f"the server answered {response.status}")
                if response.status == 401:
                    detail = f"{detail.rstrip('.')}. Pass a valid token in CHAT_TOKEN or by --token"
                raise Refused(detail, problem.get("code"), pause_s)
            yield response, connected
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            if isinstance(error, ConnectionRefusedError):
                reason = "no server listens there; is scripts/run running? see --url"
            raise Refused(f"no connection to {self._url.geturl()}: {reason}", pause_s=self._pause_s) from error
        finally:
            connection.close()


class Screen:
    """Prints a conversation: in colours on a terminal, as plain text elsewhere."""

    def __init__(self, *, only_the_reply: bool = False) -> None:
        self._only_the_reply = only_the_reply
        self._terminal = sys.stdout.isatty()
        self._colours = self._terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._asks = self._terminal and sys.stdin.isatty() and not only_the_reply
        self._prompting = False
        self._line_open = False
        self._as_typed = False  # whether the screen ends with the line typed at the prompt

    def prompt(self) -> None:
        """Show that it is the user's turn."""
        if self._asks and not self._prompting:
            self.end_line()
            self._prompting = True  # set first: Ctrl-C may come as soon as the prompt is visible
            self._write(self._paint("1;36", "you › "))

    def typed(self) -> None:
        """Record that the user has ended a line, which the terminal has echoed."""
        if self._asks:
            self._as_typed = self._prompting
            self._prompting = self._line_open = False

    def said(self, text: str) -> None:
        """Print the user's message, unless the typed line is still the last one on the screen."""
        if not self._as_typed:
            self.speaker("you", text)

    def speaker(self, who: str, text: str = "") -> None:
        """Begin a message with the name of its speaker."""
        if not self._only_the_reply:
            self.end_line()
            self._write(
                self._paint("1;32" if who == "bot" else "1;36", f"{self._harmless(who)} › ") + self._harmless(text)
            )

    def past(self, message: dict[str, Any]) -> None:
        """Print a message of the history."""
        if not self._only_the_reply:
            names = {"user": "you", "assistant": "bot"}
            self.speaker(names.get(message["role"], message["role"]), message["content"])
            if message["status"] not in ("complete", "streaming"):
                self.notice(message.get("error", {}).get("message") or message["status"])

    def token(self, text: str) -> None:
        """Print the next token of a reply."""
        self._write(self._harmless(text))

    def end_line(self) -> None:
        """End an open line; erase a prompt, which is printed again later."""
        if self._prompting:
            self._write("\r\033[K")
            self._prompting = self._line_open = False
        elif self._line_open:
            self._write("\n")

    def notice(self, text: str) -> None:
        """Show a note to the user, apart from the conversation."""
        if self._only_the_reply:
            print(f"({text})", file=sys.stderr, flush=True)
        else:
            self.end_line()
            self._write(self._paint("31" if text.startswith("✗") else "2", f"({text})") + "\n")

    def _write(self, text: str) -> None:
        print(text, end="", flush=True)
        if text:
            self._line_open = not text.endswith("\n")
            self._as_typed = False

    def _paint(self, colour: str, text: str) -> str:
        return f"\033[{colour}m{text}\033[0m" if self._colours else text

    def _harmless(self, text: str) -> str:
        """Replace control characters, which a terminal would obey; leave the text unchanged for a file or a pipe."""
        return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text) if self._terminal else text


class Chat:
    """Handles the user's input and the stream's events, one after the other, in one thread."""

    def __init__(self, conversation: Conversation, screen: Screen, once: str | None) -> None:
        self._conversation = conversation
        self._screen = screen
        self._once = once is not None
        # Lines as typed: commands, and texts with a doubled first slash.
        self._unsent = deque(["/" + once if once.startswith("/") else once] if once else [])
        self._leaving = self._once
        self._inbox: queue.Queue[Event] = queue.Queue()
        self._question: str | None = None  # the ids of our message and of its reply, until the reply has ended
        self._answer: str | None = None
        self._busy = False  # whether any reply runs, ours or another client's
        self._streamed = ""
        self._branches_from: tuple[str | None] | None = None  # where our edit or retry makes the stream's head go
        self._versions: list[str] = []  # the ids of the versions, as /branches has numbered them
        self._title: str | None = None
        self._visible = not self._once  # with --once, hide the end of another client's reply
        self._open = False  # while the stream is closed, post nothing: its reply might be missed
        self._lost_at: float | None = None
        self._stopping = False
        self._good = True

    def run(self) -> int:
        """Chat until the user exits; return the exit code: 0 if each reply was streamed as stored."""
        threading.Thread(target=self._listen, daemon=True).start()
        while not self._open:
            self._take(self._inbox.get())
        if not self._once:
            threading.Thread(target=self._read_lines, daemon=True).start()
        while self._good or not self._once:
            idle = self._answer is None and not self._busy
            if idle and self._unsent and self._open:
                self._send(self._unsent.popleft())
            elif idle and self._leaving and not self._unsent:
                break
            else:
                if idle and not self._leaving:
                    self._screen.prompt()
                self._wait()
        return 0 if self._good else 1

    def show(self, history: dict[str, Any], n_shown: int = 0) -> None:
        """Print the history after its first `n_shown` messages; a running reply continues at the end of its text."""
        self._busy, self._streamed = False, ""
        self._name(history.get("title"))
        for number, message in enumerate(history["messages"]):
            if message["status"] == "streaming":
                self._busy, self._streamed = True, message["content"]
            is_begun = message["content"] or message["status"] != "streaming"  # a reply begins with its first token
            if is_begun and number >= n_shown:
                self._screen.past(message)

    def _listen(self) -> None:
        for event in self._conversation.events():
            self._inbox.put(event)

    def _read_lines(self) -> None:
        with open(0, encoding="utf-8", errors="replace", closefd=False) as lines:
            for line in lines:
                self._inbox.put(Event("typed", {"text": line.strip()}))
        self._inbox.put(Event("eof", {}))

    def _wait(self) -> None:
        """Handle the next event; Ctrl-C stops our reply, or exits if there is none."""
        try:
            self._take(self._inbox.get())
        except KeyboardInterrupt:
            if self._answer is None or self._stopping:
                raise
            self._stopping = True
            self._conversation.stop()

    def _send(self, line: str) -> None:
        """Post a typed text, or execute a command."""
        command, _, rest = line.partition(" ")
        try:
            if line == "/stop":
                self._conversation.stop()
            elif line == "/retry":
                answer = self._conversation.retry()
                self._branches_from = (answer["messageId"],)
                self._expect(answer)
            elif command == "/edit":
                self._edit(rest)
            elif command == "/branches":
                self._branches(rest)
            else:
                text = line[1:] if line.startswith("//") else line
                self._screen.said(text)
                self._expect(self._conversation.say(text))
        except Refused as refusal:
            if refusal.code == "reply_in_progress" and command not in ("/retry", "/branches"):
                # Another client was faster. Post after the reply to its message, which the stream will show.
                self._screen.notice("another reply is running; your message will be sent after it")
                self._unsent.appendleft(line)
                self._busy = True
            else:
                self._screen.notice(f"✗ {refusal}")
                self._good = self._good and not self._once

    def _edit(self, arguments: str) -> None:
        """Post another version of one of our messages, as "N TEXT"."""
        number, _, text = arguments.strip().partition(" ")
        text = text.strip()
        path = self._conversation.path()
        ours = [index for index, message in enumerate(path) if message["role"] == "user"]
        if not (number.isdecimal() and 1 <= int(number) <= len(ours) and text):
            self._screen.notice(f"✗ /edit N TEXT: N is the number of your message, from 1 to {len(ours)}")
            return
        index = ours[int(number) - 1]
        parent = path[index - 1]["id"] if index else None
        self._screen.speaker("you", text)
        answer = self._conversation.edit(parent, text)
        self._branches_from = (parent,)
        self._expect(answer)

    def _branches(self, choice: str) -> None:
        """List the versions of the shown messages with numbers, or show the one with a number or an id."""
        choice = choice.strip()
        if not choice:
            self._list_versions()
        elif re.fullmatch("[0-9a-fA-F]{24}", choice):
            self._conversation.switch(choice.lower())
        elif choice.isdecimal() and 1 <= int(choice) <= len(self._versions):
            self._conversation.switch(self._versions[int(choice) - 1])
        else:
            self._screen.notice(f"✗ there is no version {choice}; /branches lists them")

    def _list_versions(self) -> None:
        tree = self._conversation.tree()
        by_id = {message["id"]: message for message in tree["messages"]}
        path: list[dict[str, Any]] = []
        while (next_id := path[-1]["parentId"] if path else tree["head"]) is not None:
            path.append(by_id[next_id])
        self._versions = []
        for message in reversed(path):
            siblings = [each for each in tree["messages"] if each["parentId"] == message["parentId"]]
            if len(siblings) == 1:
                continue
            self._screen.notice(f"versions {self._place(by_id.get(message['parentId']))}:")
            for each in siblings:
                self._versions.append(each["id"])
                mark = "*" if each is message else " "
                self._screen.notice(f"{mark} {len(self._versions)}  {self._short(each)}")
        if not self._versions:
            self._screen.notice("there is one version of each message")

    def _move(self, data: dict[str, Any]) -> None:
        """Show another branch, or only that another one begins: what is printed cannot be taken back."""
        is_ours = self._branches_from == (data["messageId"],)
        self._branches_from = None
        if self._visible and not (is_ours and data["history"] is None):
            self._screen.notice(f"another branch, {self._place(data['after'])}")
        if data["history"] is not None:
            self._open = False
            self.show(data["history"], data["n_kept"])
            self._forget_if_idle()

    @staticmethod
    def _short(message: dict[str, Any]) -> str:
        """Return a message on one line of limited length."""
        text = " ".join(message["content"].split()) or message["status"]
        who = {"user": "you", "assistant": "bot"}.get(message["role"], message["role"])
        return f"{who} › {text[:SHORT_CHARS]}{'…' if len(text) > SHORT_CHARS else ''}"

    def _place(self, message: dict[str, Any] | None) -> str:
        """Name the place after a message; None: the beginning."""
        return "from the beginning" if message is None else f"after {self._short(message)}"

    def _name(self, title: str | None) -> None:
        """Take the conversation's title; None: it has not been renamed."""
        if title != self._title and self._visible:
            self._screen.notice(f"title: {title}" if title else "the title is automatic again")
        self._title = title

    def _type(self, line: str) -> None:
        """Execute a typed line at once if possible; otherwise queue it."""
        if line == "/stop":
            self._send(line)
        elif line == "/help":
            self._screen.notice(COMMANDS)
        elif re.match("/(?!/)", line) and line != "/retry" and line.split()[0] not in ("/edit", "/branches"):
            self._screen.notice(f"✗ unknown command {line.split()[0]}: {COMMANDS}")
        elif line:
            self._unsent.append(line)

    def _expect(self, answer: dict[str, Any]) -> None:
        self._question, self._answer = answer.get("messageId"), answer["replyId"]
        self._stopping = False

    def _take(self, event: Event) -> None:
        """Handle one event."""
        data = event.data
        match event.name:
            case "typed":
                self._screen.typed()
                self._type(data["text"])
            case "eof":
                self._leaving = True
            case "open":
                self._open = True
                if self._lost_at is not None:
                    self._screen.notice("connected again")
                self._lost_at = None
            case "lost":
                self._open = False
                if self._lost_at is None:
                    self._screen.notice(f"{data['reason']}; trying again")
                    self._lost_at = time.monotonic()
                elif self._once and time.monotonic() - self._lost_at > PATIENCE_S:
                    raise Refused(data["reason"])
            case "refused":
                raise Refused(data["reason"])
            case "input":
                self._streamed = ""
                if data["messageId"] == self._question:
                    self._visible = True
                elif self._visible:
                    self._screen.speaker("someone else", data["text"])
                self._busy = True
            case "message" if self._visible:
                self._screen.speaker(data["role"], data["text"])
            case "token":
                self._busy = True
                if self._visible:
                    if not self._streamed:
                        self._screen.speaker("bot")
                    self._screen.token(data["text"])
                self._streamed += data["text"]
            case "done" | "error":
                self._end(event)
            case "head":
                self._move(data)
            case "title":
                self._name(data["title"])
            case "reset":
                self._reset(data)

    def _end(self, event: Event) -> None:
        """End a reply; if it is ours, compare it with the stored text."""
        self._busy = False
        if self._visible:
            self._screen.end_line()
            if event.name == "error":
                self._screen.notice(f"✗ {event.data['message']} /retry asks for another reply.")
            elif event.data["status"] != "complete":
                self._screen.notice(event.data["status"])
        if event.data["messageId"] == self._answer:
            whole = event.name == "done" and event.data["status"] == "complete"
            same = self._conversation.stored(event.data["messageId"]) == self._streamed
            if not same and event.name == "done":
                self._screen.notice("✗ the stored reply differs from the streamed one")
            if whole or self._once:
                self._good = self._good and whole and same
            self._question = self._answer = self._branches_from = None
        self._streamed = ""

    def _reset(self, history: dict[str, Any]) -> None:
        """Restart from the history, after the server has rejected our position and closed the stream."""
        self._open = False
        if history:
            self._screen.notice("the conversation has changed; this is its current state")
            self.show(history)
        else:
            self._busy = False
            self._screen.notice("the conversation was deleted; your next message starts a new one")
        self._forget_if_idle()

    def _forget_if_idle(self) -> None:
        """Wait no longer for our reply if the history has no running one."""
        if self._answer is not None and not self._busy:
            self._question = self._answer = self._branches_from = None
            self._good = self._good and not self._once


def server_url(text: str) -> SplitResult:
    """Return the parts of a server's address.

    :raises ValueError: if it is not an HTTP address
    """
    url = urlsplit(text if "//" in text else f"http://{text}")
    if url.scheme not in ("http", "https") or not (url.hostname or "").encode("idna") or url.port == 0:
        raise ValueError
    return url


def main() -> int:
    """Parse the arguments and chat."""
    parser = argparse.ArgumentParser(
        description="Chat in a terminal. Ctrl-C stops a reply, Ctrl-D exits, /help lists commands."
    )
    parser.add_argument("--url", default="http://127.0.0.1:3000", help="address of the server (default: %(default)s)")
    parser.add_argument("--conversation", metavar="ID", help="continue a conversation: its id, 24 hex digits")
    parser.add_argument(
        "--once", metavar="TEXT", help="one turn: print the reply; exit code 0 if it is stored as streamed"
    )
    parser.add_argument(
        "--token", help="bearer token of a server with users; on a shared machine set CHAT_TOKEN instead (see `ps`)"
    )
    arguments = parser.parse_args()
    try:
        url = server_url(arguments.url)
    except ValueError:
        parser.error(f"--url: not the address of a server, such as http://127.0.0.1:3000: {arguments.url!r}")
    if arguments.conversation is not None and not re.fullmatch("[0-9a-fA-F]{24}", arguments.conversation):
        parser.error(f"--conversation: an id has 24 hex digits: {arguments.conversation!r}")
    if arguments.once is not None and not arguments.once.strip():
        parser.error("--once: the text is empty")
    token = arguments.token if arguments.token is not None else os.environ.get("CHAT_TOKEN") or None
    if token is not None and not re.fullmatch("[!-~]+", token):
        parser.error("the token is not made of visible ASCII characters only")

    screen = Screen(only_the_reply=arguments.once is not None)
    conversation = Conversation(url, arguments.conversation or secrets.token_hex(12), screen.notice, token)
    chat = Chat(conversation, screen, arguments.once)
    try:
        screen.notice(f"conversation {conversation.id}")
        if arguments.conversation and (history := conversation.history()):
            chat.show(history)
        code = chat.run()
        screen.end_line()
        return code
    except Refused as refusal:
        screen.notice(f"✗ {refusal}")
        return 1
    except KeyboardInterrupt:
        screen.end_line()
        return 130
    except BrokenPipeError:  # the reader of our output has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
