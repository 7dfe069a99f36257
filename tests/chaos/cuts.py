"""Chooses byte offsets within the frames of a stream at which to abort its connection. Pure."""

import random
import re
from collections import Counter, defaultdict
from enum import Enum, auto
from itertools import cycle
from typing import NamedTuple

_TURN = (("token",), ("done", "error"), ("input",))
KINDS = (*_TURN, *_TURN, ("stream",), ("ping",), ("head",))
"""The frames in which successive connections are aborted. The first ones are listed twice, since a client must wait for
them, while every stream, or every one of a conversation with branches, begins with the last three.
"""
_LONGEST = 400
"""Longer frames (many tokens in one) are passed on whole: most of their offsets lie within a text."""
_TOKENS = 8
"""A connection aborted in a token passes on fewer tokens than this first, so that its client advances."""
_NAME = re.compile(rb"^event: (\w+)$", re.MULTILINE)


class Segment(NamedTuple):
    """Bytes from the end of a frame to the end of the next one, chunk headers included, and that frame's event.

    Bytes that belong to no frame (the head, bytes after the last chunk, other responses) have the event "".
    """

    event: str
    data: bytes


class _State(Enum):
    HEAD = auto()
    SIZE = auto()
    CHUNK = auto()
    CHUNK_END = auto()
    BODY = auto()
    """A body without chunks, which ends with the connection."""
    REST = auto()


class Splitter:
    """Divides a response into segments, and holds back an incomplete one."""

    def __init__(self) -> None:
        self.held = bytearray()
        self._text = bytearray()
        self._line = bytearray()
        self._left = 0
        self._state = _State.HEAD

    def feed(self, data: bytes) -> list[Segment]:
        """Take the next bytes; return the completed segments."""
        found: list[Segment] = []
        while data:
            taken, event = self._step(data)
            self.held += data[:taken]
            data = data[taken:]
            if event is not None:
                found.append(Segment(event, bytes(self.held)))
                self.held.clear()
        return found

    def _step(self, data: bytes) -> tuple[int, str | None]:
        """Return how many bytes belong to the current state, and the event of the segment that they complete."""
        if self._state is _State.HEAD:
            taken = self._take_line(data)
            if self._line == b"\r\n":
                self._state = self._begin_body()
                return taken, ""
        elif self._state is _State.SIZE:
            taken = self._take_line(data)
            if self._line.endswith(b"\n"):
                self._left = int(self._line.partition(b";")[0], 16)
                self._state = _State.CHUNK if self._left else _State.REST
        elif self._state is _State.CHUNK_END:
            taken = self._take_line(data)
            if self._line.endswith(b"\n"):
                self._line.clear()
                self._state = _State.SIZE
        elif self._state is _State.REST:
            return len(data), ""
        else:
            return self._take_text(data)
        return taken, None

    def _take_line(self, data: bytes) -> int:
        if self._line.endswith(b"\n"):
            self._line.clear()
        taken = data.find(b"\n") + 1 or len(data)
        self._line += data[:taken]
        return taken

    def _begin_body(self) -> _State:
        head = bytes(self.held).lower()
        self._line.clear()
        if not head.startswith(b"http/1.1 200") or b"content-type: text/event-stream" not in head:
            return _State.REST
        return _State.SIZE if b"transfer-encoding: chunked" in head else _State.BODY

    def _take_text(self, data: bytes) -> tuple[int, str | None]:
        part = data if self._state is _State.BODY else data[: self._left]
        before = len(self._text)
        self._text += part
        end = self._text.find(b"\n\n", max(0, before - 1))
        taken = len(part) if end < 0 else end + 2 - before
        event = None
        if end >= 0:
            name = _NAME.search(self._text, 0, end)
            event = name[1].decode() if name else ""
            self._text.clear()
        if self._state is _State.CHUNK:
            self._left -= taken
            if not self._left:
                self._state = _State.CHUNK_END
        return taken, event


class Cuts:
    """Chooses the offsets of aborts: at random among the least used ones within frames of an event.

    So no offset is used twice before all were used once. The order is random, so that short runs cover all parts.
    """

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._kinds = cycle(KINDS)
        self.offsets: defaultdict[str, Counter[int]] = defaultdict(Counter)
        """How often each offset was used, by event."""
        self.longest: Counter[str] = Counter()
        """The length of the longest frame that was divided, by event."""

    def cutter(self) -> "Cutter":
        """Return the cutter of the next connection."""
        kind = next(self._kinds)
        return Cutter(self, kind, self._dice.randrange(_TOKENS) if "token" in kind else 0)

    def choose(self, event: str, length: int) -> int:
        """Return how many bytes of a frame to pass on: at least 0, fewer than `length`."""
        counts = self.offsets[event]
        least = min(counts[each] for each in range(length))
        offset = self._dice.choice([each for each in range(length) if counts[each] == least])
        counts[offset] += 1
        self.longest[event] = max(self.longest[event], length)
        return offset


class Cutter:
    """Aborts one connection within a frame, after `spared` frames of the same kind; see `tests.proxy.Cutter`."""

    def __init__(self, cuts: Cuts, kind: tuple[str, ...], spared: int) -> None:
        self._cuts, self._kind, self._spared = cuts, kind, spared
        self._splitter = Splitter()

    def take(self, data: bytes) -> tuple[bytes, bool]:
        passed = bytearray()
        for event, segment in self._splitter.feed(data):
            if event in self._kind and len(segment) <= _LONGEST:
                if not self._spared:
                    return bytes(passed + segment[: self._cuts.choose(event, len(segment))]), True
                self._spared -= 1
            passed += segment
        return bytes(passed), False

    def rest(self) -> bytes:
        return bytes(self._splitter.held)
