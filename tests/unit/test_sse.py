"""Positions and frames: the pure part of the stream."""

import json

import pytest

from chatserver import positions
from chatserver.positions import Position
from chatserver.wire import chunked, sse

ID = "0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "position"),
    [
        (f"{ID}-0", Position(ID, 0)),
        (f"{ID}-17", Position(ID, 17)),
        (f"{ID}-done", Position(ID, None)),
    ],
)
def test_position_round_trips_through_its_text(text: str, position: Position) -> None:
    assert positions.parse_position(text) == position
    assert str(position) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ID,
        f"{ID}-",
        f"{ID}--1",
        f"{ID}-01",
        f"{ID}-1.5",
        f"{ID}-٣",
        f"{ID}-done\n",
        f"{ID}-DONE",
        f"{ID[:-1]}-3",
        f"{ID}0-3",
        f"{ID.upper()}-3",
        f" {ID}-3",
        f"{ID}-9999999999",
        f"{ID}-3-4",
    ],
)
def test_text_that_is_no_position_is_refused(text: str) -> None:
    assert positions.parse_position(text) is None


@pytest.mark.parametrize(
    "text", ["a\nb", "a\rb", "a\r\nb", "\u2028\u2029\x85", '"\\', "🙂é̂", "\x00", "", ": data", "\n\n"]
)
def test_text_never_breaks_a_frame(text: str) -> None:
    frame = sse.token_frame(ID, 3, text)
    assert frame == sse.frame("token", Position(ID, 3), {"text": text})
    lines = frame.split(b"\n")
    assert lines[0] == b"event: token"
    assert json.loads(lines[1].removeprefix(b"data: ")) == {"text": text}
    assert lines[2:] == [f"id: {ID}-3".encode(), b"", b""]


@pytest.mark.parametrize("text", ["a\rb", "a\r\nb", "\x85", "\u2028", "\u2029", "é\u2028\u2029\x85\r\n"])
def test_no_reader_finds_a_line_break_inside_the_data(text: str) -> None:
    """Python's `splitlines` ends a line at more characters than the standard does, and some clients use it."""
    for frame in (sse.token_frame(ID, 3, text), sse.frame("input", Position(ID, None), {"text": text})):
        assert len(frame.decode().splitlines()) == 4


def test_opening_sets_a_position_without_an_event() -> None:
    lines = sse.opening(Position(ID, None), 15).decode().split("\n")
    assert lines[0] == "retry: 1000" and lines[1].startswith(":")
    assert lines[2:5] == ["event: stream", f"id: {ID}-done", ""]
    assert "\n".join(lines[5:]).encode() == sse.ping(15)


@pytest.mark.parametrize(("every_s", "number"), [(15.0, "15"), (2.5, "2.5")])
def test_ping_announces_its_interval_and_has_no_position(every_s: float, number: str) -> None:
    assert sse.ping(every_s).decode() == f'event: ping\ndata: {{"everyS":{number}}}\n\n'


def test_chunk_is_its_size_in_hexadecimal_and_its_bytes() -> None:
    assert chunked.chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"


def test_reset_takes_the_position_away() -> None:
    assert sse.RESET.split(b"\n") == [b"event: reset", b"data: {}", b"id:", b"", b""]
