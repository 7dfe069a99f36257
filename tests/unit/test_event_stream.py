"""The reader of a model server's events: from any bytes, however they are split, to the same events."""

import tracemalloc

import pytest

from chatserver.sources import event_stream
from chatserver.sources.event_stream import MAX_EVENT_BYTES, MAX_LINE_BYTES, Event, EventReader, EventTooLarge


def read(*pieces: bytes) -> list[Event]:
    reader = EventReader()
    return [event for piece in pieces for event in reader.feed(piece)] + list(reader.close())


TABLE: dict[str, tuple[bytes, list[Event]]] = {
    "LF": (b"data: a\n\ndata: b\n\n", [Event("", b"a"), Event("", b"b")]),
    "CRLF": (b"data: a\r\n\r\ndata: b\r\n\r\n", [Event("", b"a"), Event("", b"b")]),
    "CR": (b"data: a\r\rdata: b\r\r", [Event("", b"a"), Event("", b"b")]),
    "mixed line ends": (b"data: a\r\n\ndata: b\r\r\n", [Event("", b"a"), Event("", b"b")]),
    "no empty line at the end": (b"data: a\n\ndata: b\n", [Event("", b"a"), Event("", b"b")]),
    "no line end at the end": (b"data: a\n\ndata: b", [Event("", b"a"), Event("", b"b")]),
    "several lines": (b"data: a\ndata:\ndata: b\n\n", [Event("", b"a\n\nb")]),
    "one space belongs to the field": (b"data:a\n\ndata:  a\n\n", [Event("", b"a"), Event("", b" a")]),
    "no colon": (b"data\n\n", [Event("", b"")]),
    "colons in the data": (b"data: a: b\n\n", [Event("", b"a: b")]),
    "type": (b"event: error\ndata: a\n\ndata: b\n\n", [Event("error", b"a"), Event("", b"b")]),
    "type after the data": (b"data: a\nevent: ping\n\n", [Event("ping", b"a")]),
    "type without data": (b"event: ping\n\ndata: a\n\n", [Event("", b"a")]),
    "comments": (b": x\n\n:\ndata: a\n: x\ndata: b\n\n", [Event("", b"a\nb")]),
    "other fields": (b"id: 1\nretry: 5\n\nid: 2\nfoo: bar\ndata: a\n\n", [Event("", b"a")]),
    "byte-order mark": (b"\xef\xbb\xbfdata: a\n\n", [Event("", b"a")]),
    "byte-order mark later": (b"data: \xef\xbb\xbfa\n\n", [Event("", b"\xef\xbb\xbfa")]),
    "not UTF-8": (b": \xff\nevent: \xff\ndata: \xff\n\n", [Event("�", b"\xff")]),
    "separators of lines elsewhere": (
        "data: a\u2028b\x0bc\x85\n\n".encode(),
        [Event("", "a\u2028b\x0bc\x85".encode())],
    ),
    "bare JSON": (b'{\n  "error": {}\n}\n', [Event("", b'{\n  "error": {}\n}')]),
    "bare JSON between events": (
        b'data: a\n\n{"x": 1}\n\ndata: b\n\n',
        [Event("", b"a"), Event("", b'{"x": 1}'), Event("", b"b")],
    ),
    "field error": (b'data: a\n\nerror: {"x": 1}\n\n', [Event("", b"a"), Event("error", b'{"x": 1}')]),
    "nothing": (b"", []),
    "empty lines": (b"\n\n\r\n\r\r", []),
}


@pytest.mark.parametrize(("stream", "events"), TABLE.values(), ids=TABLE)
def test_a_stream_has_the_same_events_however_it_is_split(stream: bytes, events: list[Event]) -> None:
    assert read(stream) == events
    assert read(*(stream[i : i + 1] for i in range(len(stream)))) == events
    for cut in range(len(stream)):
        assert read(stream[:cut], b"", stream[cut:]) == events


def test_an_event_is_returned_at_its_empty_line_and_not_later() -> None:
    for end in (b"\n\n", b"\r\r", b"\r\n\r"):
        assert list(EventReader().feed(b"data: a" + end)) == [Event("", b"a")]


def test_lines_and_events_up_to_their_limits_are_read() -> None:
    line = b"data: " + b"x" * (MAX_LINE_BYTES - 7) + b"\n"
    assert [len(event.data) for event in read(line, b"\n")] == [MAX_LINE_BYTES - 7]
    assert [len(event.data) for event in read(*[line] * 4, b"\n")] == [4 * (MAX_LINE_BYTES - 7) + 3]


@pytest.mark.parametrize(
    ("piece", "said"),
    [
        pytest.param(b"x" * 10_000, "a line of more than 1 MB", id="line"),
        pytest.param(b": " + b"x" * 10_000, "a line of more than 1 MB", id="comment"),
        pytest.param(b"data: " + b"x" * 10_000 + b"\n", "an event of more than 4 MB", id="event"),
        pytest.param(b"{" + b"x" * 10_000 + b"\n", "an event of more than 4 MB", id="bare"),
    ],
)
def test_a_stream_beyond_its_limits_is_refused_before_it_costs_memory(piece: bytes, said: str) -> None:
    reader = EventReader()
    tracemalloc.start()
    try:
        with pytest.raises(EventTooLarge, match=said):
            for _ in range(MAX_EVENT_BYTES):
                list(reader.feed(piece))
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_EVENT_BYTES
    finally:
        tracemalloc.stop()


def test_lines_without_data_count_for_the_size_of_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_stream, "MAX_EVENT_BYTES", 1000)
    assert read(b"data\n" * 1000) == [Event("", b"\n" * 999)]
    with pytest.raises(EventTooLarge):
        read(b"data\n" * 1002)
