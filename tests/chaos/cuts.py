"""Cuts at every byte offset within a frame, of a stream's bytes as they are on the wire. Pure."""

import random
import re
from collections import Counter, defaultdict
from enum import Enum, auto
from itertools import cycle
from typing import NamedTuple

_TURN = (("token",), ("done", "error"), ("input",))
KINDS = (*_TURN, *_TURN, ("stream",), ("ping",))
"""What successive connections are cut in. Each stream begins with the last two, but a turn's end has to be awaited."""
_LONGEST = 400
"""Longer frames (many tokens joined into one) are passed on whole: most of their offsets lie within a text."""
_TOKENS = 8
"""A connection cut in a token passes on fewer than so many before: its client would else stay where it is."""
_NAME = re.compile(rb"^event: (\w+)$", re.MULTILINE)


class Segment(NamedTuple):
    """Bytes from the end of a frame to the end of the next one, chunk headers included, and that frame's event.

    Bytes that belong to no frame (the head, what follows the last chunk, other responses) have the event "".
    """

    event: str
    data: bytes


class _State(Enum):
    HEAD = auto()
    SIZE = auto()
    CHUNK = auto()
    CHUNK_END = auto()
    BODY = auto()
    """Of a stream that ends with the connection."""
    REST = auto()


class Splitter:
    """Divides a response into segments; what is yet to be completed is held back."""

    def __init__(self) -> None:
        self.held = bytearray()
        self._text = bytearray()
        self._line = bytearray()
        self._left = 0
        self._state = _State.HEAD

    def feed(self, data: bytes) -> list[Segment]:
        """Take the next bytes; return the segments that they complete."""
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
        """Return how many bytes belong to the present state, and the event of the segment that they complete."""
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
    """Chooses where lines are cut: each time at one of the offsets, within frames of that event, that were cut least.

    So none is cut twice before all were cut once; their order is left to the dice, for the sake of short runs.
    """

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice
        self._kinds = cycle(KINDS)
        self.offsets: defaultdict[str, Counter[int]] = defaultdict(Counter)
        """How often each offset was cut, by event."""
        self.longest: Counter[str] = Counter()
        """The length of the longest frame that was cut, by event."""

    def cutter(self) -> "Cutter":
        """Return what cuts the next connection."""
        kind = next(self._kinds)
        return Cutter(self, kind, self._dice.randrange(_TOKENS) if "token" in kind else 0)

    def choose(self, event: str, length: int) -> int:
        """Return how many bytes of a frame a client gets, at least 0 and fewer than all."""
        counts = self.offsets[event]
        least = min(counts[each] for each in range(length))
        offset = self._dice.choice([each for each in range(length) if counts[each] == least])
        counts[offset] += 1
        self.longest[event] = max(self.longest[event], length)
        return offset


class Cutter:
    """Cuts one connection within a frame, after so many frames of that kind; see `tests.proxy.Cutter`."""

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
