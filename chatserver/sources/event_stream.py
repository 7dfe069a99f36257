"""A reader of Server-Sent Events that a model server sends: bytes in, events out, no I/O.

The parsers of the SDK and of httpx2 do not fit: the SDK's has no limit of size and fails at harmless events, httpx2's
has one limit for lines and events together and replaces bytes that are not UTF-8.
"""

from collections.abc import Iterator
from typing import NamedTuple

MAX_LINE_BYTES = 1_000_000
MAX_EVENT_BYTES = 4_000_000
_BOM = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """An event with data: its type ("" if it has none) and its `data` lines, joined by newlines."""

    type: str
    data: bytes


class EventTooLarge(Exception):
    """A line or an event exceeds its limit; the message names it."""


class EventReader:
    """Splits the bytes of one response into events; lines end with LF, CR or CRLF, also across reads.

    Two deviations from the standard are accepted: a body or an event of bare JSON, without `data:` (an error with
    status 200, a completion without streaming), and llama.cpp's field `error:`.
    """

    def __init__(self) -> None:
        self._line = bytearray()
        self._after_cr = False
        self._at_start = True
        self._type = ""
        self._data: bytearray | None = None
        self._is_bare = False

    def feed(self, data: bytes) -> Iterator[Event]:
        """Return the events that these bytes complete.

        :raises EventTooLarge: if a line exceeds `MAX_LINE_BYTES`, or the data of an event `MAX_EVENT_BYTES`
        """
        if self._after_cr and data.startswith(b"\n"):  # the second half of a CRLF
            data = data[1:]
            self._after_cr = False
        if data:
            self._after_cr = data.endswith(b"\r")
        for part in data.splitlines(keepends=True):
            if len(self._line) + len(part) > MAX_LINE_BYTES:
                raise EventTooLarge(f"a line of more than {MAX_LINE_BYTES // 1_000_000} MB")
            self._line += part
            if part.endswith((b"\n", b"\r")):
                yield from self._take_line()

    def close(self) -> Iterator[Event]:
        """Return the last event if the response ended without the empty line after it.

        :raises EventTooLarge: as `feed`
        """
        if self._line:
            yield from self._take_line()
        yield from self._take_event()

    def _take_line(self) -> Iterator[Event]:
        line = bytes(self._line).rstrip(b"\r\n")
        self._line.clear()
        if self._at_start:
            line = line.removeprefix(_BOM)
            self._at_start = False
        if not line:
            yield from self._take_event()
            return
        if self._data is None and line.startswith((b"{", b"[")):
            self._is_bare = True
        if self._is_bare:
            self._add(line)
            return
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._add(value)
        elif field == b"event":
            self._type = value.decode(errors="replace")
        elif field == b"error":
            self._type = "error"
            self._add(value)

    def _add(self, value: bytes) -> None:
        if self._data is None:
            self._data = bytearray(value)
            return
        if len(self._data) + len(value) >= MAX_EVENT_BYTES:
            raise EventTooLarge(f"an event of more than {MAX_EVENT_BYTES // 1_000_000} MB")
        self._data += b"\n" + value

    def _take_event(self) -> Iterator[Event]:
        if self._data is not None:
            yield Event(self._type, bytes(self._data))
        self._data, self._type, self._is_bare = None, "", False
