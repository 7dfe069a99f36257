"""The chaos program: a short run finds no violation, and runs with broken servers find theirs.

Each broken server has its own, shorter run with the one kind of fault that exposes its error. The options of the first
run catch each of the first seven, too, as was tried by hand; but that would take six minutes more.
"""

import asyncio
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
import pytest
from bson import ObjectId

from chatserver import positions
from chatserver.wire import chunked as http_chunks
from chatserver.wire import sse
from tests.chaos.check import check, last_checkpoint
from tests.chaos.clients import Conversation, Watcher
from tests.chaos.cuts import KINDS, Cuts, Splitter
from tests.chaos.ledger import Deletion, Fault, Ledger, Post, Retry, Seen
from tests.processes import ROOT

CONVERSATION, USER, REPLY = "c" * 24, "a" * 24, "b" * 24


def chaos(*options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.chaos", "--seed", "6", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)


@pytest.mark.alone
@pytest.mark.timeout(180)
def test_short_run_finds_no_violation() -> None:
    done = chaos("--seconds", "40")
    assert done.returncode == 0, done.stdout + done.stderr


BROKEN = {
    "post_stored_twice": ("connections aborted", "5", "post stored twice"),
    "retry_stored_twice": ("connections aborted", "2", "retry not kept"),
    "head_not_sent": ("connections aborted", "2", "wrong branch"),
    # Short replies, so that a kill finds many that have ended, but are not written yet.
    "done_before_the_write": ("server killed", "2", "done not kept"),
    "text_repeated_on_resume": ("connections aborted", "15", "text repeated"),
    "expired_replies_ignored": ("server killed", "15", "stuck"),
    "rare_checkpoints": ("server killed", "15", "text lost"),
    "end_not_sent_at_shutdown": ("server restarted", "15", "end not sent"),
    "deletion_not_sent": ("connections aborted", "5", "deletion not kept"),
    "position_first": ("connections aborted", "15", "text skipped"),
    "last_chunk_within_reply": ("server restarted", "15", "premature last chunk"),
}
"""Broken server -> the kind of fault that exposes it, the delay of its tokens in ms, and the violation."""


def chaos_with(mutant: str) -> "subprocess.CompletedProcess[str]":
    faults, delay_ms, _ = BROKEN[mutant]
    server = f"{sys.executable} -m tests.chaos.mutants {mutant}"
    # With a patience of 2.5 s, clients of a correct server are stuck, too: a reply takes up to 4 s.
    options = ["--seconds", "7", "--turns", "1", "--patience", "8", "--pause", "4", "--token-delay-ms", delay_ms]
    return chaos("--server", server, "--faults", faults, *options)


Runs = dict[str, "Future[subprocess.CompletedProcess[str]]"]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """The runs with the broken servers of this session's tests, two at a time: they wait most of their time."""
    tests = [
        each for each in request.session.items if isinstance(each, pytest.Function) and "runs" in each.fixturenames
    ]
    mutants = [str(each.callspec.params["mutant"]) for each in tests]
    with ThreadPoolExecutor(2) as pool:
        yield {mutant: pool.submit(chaos_with, mutant) for mutant in mutants}


@pytest.mark.alone
@pytest.mark.timeout(180)
@pytest.mark.parametrize("mutant", BROKEN)
def test_broken_server_is_caught(mutant: str, runs: Runs) -> None:
    done = runs[mutant].result()
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"^  {BROKEN[mutant][2]} +[1-9]", done.stdout, re.M), done.stdout


def test_run_without_enough_faults_or_turns_fails() -> None:
    done = chaos("--seconds", "1", "--turns", "100000", "--conversations", "1")
    assert done.returncode == 1
    assert "no server killed" in done.stdout and "fewer than 100000 turns" in done.stdout


# -- the checker on made-up ledgers --------------------------------------------------------------------------------


def stored(content: str = "Hello", **fields: Any) -> dict[str, Any]:
    user = {"_id": ObjectId(USER), "role": "user", "content": "hi"}
    reply = {"_id": ObjectId(REPLY), "role": "assistant", "content": content, **fields}
    return {CONVERSATION: {"messages": [user, reply]}}


INTERRUPTED: dict[str, Any] = {"status": "interrupted", "error": {"code": "interrupted", "message": ""}}


def ledger(*seen: Seen, **fields: Any) -> Ledger:
    answer = {"conversationId": CONVERSATION, "messageId": USER, "replyId": REPLY}
    posts = fields.pop("posts", [Post(CONVERSATION, "k", answer)])
    return Ledger(0.25, 2.0, posts=posts, seen={(CONVERSATION, 0): list(seen)}, **fields)


def said(text: str = "hi", time: float = 1.0) -> Seen:
    return Seen(time, "input", f"{USER}-done", {"messageId": USER, "text": text})


def token(text: str, chars: int, time: float = 2.0) -> Seen:
    return Seen(time, "token", f"{REPLY}-{chars}", {"text": text})


def done(status: str = "complete", time: float = 3.0) -> Seen:
    return Seen(time, "done", f"{REPLY}-done", {"messageId": REPLY, "status": status})


def failed(code: str = "interrupted", time: float = 9.0) -> Seen:
    return Seen(time, "error", f"{REPLY}-done", {"messageId": REPLY, "code": code, "message": ""})


def left(position: str, time: float, opened: float = 1.0, *, clean: bool = False) -> Seen:
    return Seen(time, "left", position, {"opened": opened, "clean": clean})


def gone(time: float = 5.0) -> Seen:
    return Seen(time, "gone", f"{REPLY}-done", {})


def kinds(run: Ledger, conversations: dict[str, Any]) -> set[str]:
    return {kind for kind, _ in check(run, conversations).lines}


def test_checker_accepts_a_correct_run() -> None:
    verdict = check(ledger(said(), token("Hel", 3), token("lo", 5), done()), stored())
    assert not verdict.lines and (verdict.events, verdict.ends) == (4, 1)
    # A client that connected after the question, and a client that restarted from the history, since it had text that
    # is not stored.
    assert not kinds(ledger(token("Hello", 5), done()), stored())
    messages = [
        {"id": USER, "content": "hi", "status": "complete"},
        {"id": REPLY, "content": "He", "status": "streaming"},
    ]
    history = Seen(2.5, "history", f"{REPLY}-2", {"messages": messages, "head": REPLY})
    assert not kinds(ledger(said(), token("x", 1), history, token("llo", 5), done()), stored())
    assert kinds(ledger(said(), token("Hel", 3), history, token("llo", 5), done()), stored()) == {"text repeated"}


@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        ([said(), token("Hel", 3), token("lo!", 6), done()], "done not kept"),
        ([said(), token("Hello", 5), done("stopped")], "done not kept"),
        ([said(), token("Hello", 5), failed()], "done not kept"),
        ([said(), token("Hel", 3), token("llo", 5), done()], "text repeated"),
        ([said(), said(), token("Hello", 5), done()], "text repeated"),
        ([said(), token("Hello", 5), done(), done()], "text repeated"),
        ([said(), token("Hello", 5), done(), token("x", 6)], "text repeated"),
        ([said(), token("Hel", 3), token("o", 5), done()], "text skipped"),
        ([said(), token("lo", 5), done()], "text skipped"),
        ([done(), said()], "text skipped"),
        ([said("ho"), token("Hello", 5), done()], "message lost"),
    ],
)
def test_checker_names_wrong_events(seen: list[Seen], kind: str) -> None:
    assert kind in kinds(ledger(*seen), stored())


def test_checker_compares_posts_with_the_documents() -> None:
    answer = {"conversationId": CONVERSATION, "messageId": USER, "replyId": REPLY}
    other = {**answer, "messageId": "d" * 24}
    assert kinds(ledger(posts=[Post(CONVERSATION, "k", other)]), stored()) == {"message lost"}
    posts = [Post(CONVERSATION, "k", answer), Post(CONVERSATION, "k", other)]
    assert "post stored twice" in kinds(ledger(posts=posts), stored())
    document = stored()[CONVERSATION]
    again = {"_id": ObjectId(), "role": "user", "content": "hi"}
    assert kinds(ledger(), {CONVERSATION: {"messages": [*document["messages"], again]}}) == {"post stored twice"}
    assert kinds(ledger(), {CONVERSATION: {**document, "reply": {}}}) == {"stuck"}
    assert kinds(ledger(stuck=["x"]), stored()) == {"stuck"}


@pytest.mark.parametrize(
    ("lost_at", "faults", "blamed"),
    [
        (4.9, [Fault("server killed", "server", 5.0, 5.0)], False),
        (4.2, [Fault("server killed", "server", 5.0, 5.0)], True),
        (4.9, [], True),
        (4.9, [Fault("connections aborted", "connection", 5.0, 5.0)], True),
        (4.9, [Fault("server restarted", "shutdown", 5.0, 5.5)], True),
        (4.55, [Fault("server killed", "server", 5.0, 5.0)], False),
        (4.4, [Fault("server killed", "server", 5.0, 5.0)], True),
        (4.2, [Fault("database killed", "database", 3.0, 4.8), Fault("server killed", "server", 5.0, 5.0)], False),
        (1.9, [Fault("database killed", "database", 3.0, 4.8), Fault("server killed", "server", 5.0, 5.0)], True),
        (4.2, [Fault("database killed", "database", 1.0, 2.0), Fault("server killed", "server", 5.0, 5.0)], True),
    ],
)
def test_only_text_after_the_last_checkpoint_may_be_lost(lost_at: float, faults: list[Fault], blamed: bool) -> None:
    run = ledger(said(), token("Hel", 3, 1.5), token("lo", 5, lost_at), failed(), faults=faults)
    assert (kinds(run, stored("Hel", **INTERRUPTED)) == {"text lost"}) is blamed
    crashed: dict[str, Any] = {"status": "failed", "error": {"code": "source_failed"}}
    run.seen[CONVERSATION, 0][-1] = failed("source_failed")
    assert kinds(run, stored("Hel", **crashed)) == {"text lost"}
    assert last_checkpoint(run, 100.0, 101.0) is None


def test_stopped_reply_may_be_interrupted_but_not_complete() -> None:
    run = ledger(stops=[(CONVERSATION, REPLY)])
    assert kinds(run, stored()) == {"stop not kept"}
    assert not kinds(run, stored(status="stopped"))
    assert not kinds(run, stored(**INTERRUPTED))


AGAIN = "d" * 24
"""A retry of the reply."""


def branching() -> dict[str, Any]:
    """Return the stored documents after a retry."""
    documents = stored(status="stopped")
    again = {"_id": ObjectId(AGAIN), "role": "assistant", "content": "", "parent": ObjectId(USER)}
    documents[CONVERSATION]["messages"].append(again)
    documents[CONVERSATION]["head"] = {"_id": ObjectId(AGAIN), "length": 3}
    return documents


def head(message_id: str | None) -> Seen:
    return Seen(4.0, "head", f"{REPLY}-done", {"messageId": message_id})


def done_again() -> Seen:
    return Seen(5.0, "done", f"{AGAIN}-done", {"messageId": AGAIN, "status": "complete"})


def test_retry_has_the_parent_of_the_existing_reply() -> None:
    run = ledger(said(), token("Hello", 5), done("stopped"), retries=[Retry(CONVERSATION, "k2", REPLY, AGAIN)])
    assert kinds(run, stored(status="stopped")) == {"retry not kept"}
    run.seen[CONVERSATION, 0] += [head(USER), done_again()]
    documents = branching()
    assert not kinds(run, documents)
    run.retries.append(Retry(CONVERSATION, "k3", REPLY, "e" * 24))
    assert kinds(run, documents) == {"retry not kept"}
    documents[CONVERSATION]["messages"].append({**documents[CONVERSATION]["messages"][2], "_id": ObjectId("e" * 24)})
    assert "retry not kept" not in kinds(run, documents)
    run.retries[1] = replace(run.retries[1], key="k2")
    assert "retry not kept" in kinds(run, documents)
    documents[CONVERSATION]["messages"].pop()
    run.retries.clear()
    assert kinds(run, documents) == {"retry not kept"}
    run.retries.append(Retry(CONVERSATION, "k2", REPLY, AGAIN))
    documents[CONVERSATION]["messages"][2]["parent"] = ObjectId(REPLY)
    assert "retry not kept" in kinds(run, documents)


@pytest.mark.parametrize(
    ("seen", "wrong"),
    [
        ([head(USER), done_again()], False),
        ([head(REPLY), head(USER), done_again()], False),
        ([done_again()], True),
        ([head(None), done_again()], True),
        ([head(USER), done_again(), head(REPLY)], True),
        ([head(USER)], True),
    ],
)
def test_message_begins_at_its_parent(seen: list[Seen], wrong: bool) -> None:
    retries = [Retry(CONVERSATION, "k2", REPLY, AGAIN)]
    run = ledger(said(), token("Hello", 5), done("stopped"), *seen, retries=retries)
    assert kinds(run, branching()) == ({"wrong branch"} if wrong else set())


@pytest.mark.parametrize(
    ("seen", "faults", "reset"),
    [
        ([left(f"{REPLY}-done", 4.1), gone()], [], True),
        ([left(f"{REPLY}-done", 4.1)], [], False),
        ([left(f"{REPLY}-done", 9.0), gone(9.0)], [], False),
        ([left(f"{REPLY}-done", 9.0, opened=4.5), gone(9.0)], [], True),
        ([left(f"{REPLY}-done", 9.0), gone(9.0)], [Fault("server paused", "server", 3.5, 7.0)], True),
    ],
)
def test_streams_of_a_deleted_conversation_are_reset(seen: list[Seen], faults: list[Fault], reset: bool) -> None:
    doomed = {"conversationId": CONVERSATION, "messageId": "d" * 24, "replyId": "e" * 24}
    last = Seen(3.5, "token", f"{'e' * 24}-1", {"text": "x"})
    run = ledger(said(), token("Hello", 5), done(), last, *seen, faults=faults)
    run.posts.append(Post(CONVERSATION, "l", doomed))
    run.deletions[CONVERSATION] = Deletion(4.0, stored()[CONVERSATION]["messages"])
    assert kinds(run, {}) == (set() if reset else {"deletion not kept"})
    assert "deletion not kept" in kinds(run, stored())
    assert "message lost" in kinds(ledger(said(), gone()), {})


def test_conversation_is_checked_up_to_its_deletion() -> None:
    run = ledger(said(), token("Hel", 3), done(), gone(), posts=[])
    run.deletions[CONVERSATION] = Deletion(4.0, stored()[CONVERSATION]["messages"])
    assert kinds(run, {}) == {"done not kept"}


@pytest.mark.parametrize(
    ("end", "killed_s", "wrong"),
    [
        (left(f"{REPLY}-3", 5.6, clean=True), 0.0, {"end not sent", "premature last chunk"}),
        (left(f"{REPLY}-3", 5.6), 0.0, {"end not sent"}),
        (left(f"{REPLY}-3", 5.6), 3.5, set()),
        (left(f"{REPLY}-done", 5.6, clean=True), 0.0, set()),
        (left(f"{REPLY}-done", 5.6, clean=True), 3.5, set()),
        (left(f"{REPLY}-done", 5.6), 0.0, set()),
        (left(f"{REPLY}-3", 4.9), 0.0, set()),
        (left(f"{REPLY}-done", 4.9, clean=True), 0.0, {"premature last chunk"}),
        (left(f"{REPLY}-3", 5.6, opened=5.1), 0.0, set()),
    ],
)
def test_shutdown_ends_a_stream_after_the_end_of_its_reply(end: Seen, killed_s: float, wrong: set[str]) -> None:
    faults = [
        Fault("server killed", "server", killed_s, killed_s + 0.1),
        Fault("server restarted", "shutdown", 5.0, 5.5),
    ]
    run = ledger(said(), token("Hel", 3), end, token("lo", 5, 7.0), failed(), faults=faults)
    assert kinds(run, stored(**INTERRUPTED)) == wrong


# -- aborts within frames --------------------------------------------------------------------------------

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
FRAMES = [
    f"retry: 1000\n: chatserver\nevent: stream\nid: {USER}-done\n\n".encode(),
    sse.ping(15),
    sse.token_frame(REPLY, 3, "Hel"),
    sse.frame("done", positions.Position(REPLY, None), {"messageId": REPLY, "status": "complete"}),
]
EVENTS = ["stream", "ping", "token", "done"]
POSITIONS = ["", f"{USER}-done", f"{USER}-done", f"{REPLY}-3", f"{REPLY}-done"]
"""The position before the first frame, and after each frame."""


def response(*, chunked: bool) -> list[bytes]:
    """Return a response's head, and its frames as they are on the wire."""
    if chunked:
        return [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *map(http_chunks.chunk, FRAMES)]
    return [HEAD + b"\r\n", *FRAMES]


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_splitter_divides_a_response_after_each_frame(chunked: bool, size: int) -> None:
    wire = b"".join(response(chunked=chunked))
    for rest in (http_chunks.LAST_CHUNK, http_chunks.chunk(b"event: to")[:9]) if chunked else (b"event: to",):
        splitter, found = Splitter(), []
        for begin in range(0, len(wire + rest), size):
            found += splitter.feed((wire + rest)[begin : begin + size])

        frames = [segment for segment in found if segment.event]
        assert [segment.event for segment in frames] == EVENTS
        assert all(segment.data.endswith(b"\n\n") for segment in frames)
        assert b"".join(segment.data for segment in found) + splitter.held == wire + rest
        assert bytes(splitter.held) in (b"", b"\r\n" + rest, rest)


def test_splitter_finds_several_frames_in_a_chunk_and_a_frame_in_several_chunks() -> None:
    head = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    body = b"".join(FRAMES)
    for size in (10, 100, len(body)):
        chunks = [http_chunks.chunk(body[begin : begin + size]) for begin in range(0, len(body), size)]
        found = Splitter().feed(head + b"".join(chunks) + http_chunks.LAST_CHUNK)
        assert [segment.event for segment in found if segment.event] == EVENTS
    other = head.replace(b"text/event-stream", b"application/json") + http_chunks.chunk(FRAMES[2])
    assert {segment.event for segment in Splitter().feed(other)} == {""}


def test_cuts_use_every_offset_within_a_frame() -> None:
    cuts = Cuts(random.Random(1))
    pieces = response(chunked=True)
    wire = b"".join(pieces) + 10 * b"".join(pieces[3:])  # some frames are spared
    lengths = {event: len(piece) for event, piece in zip(EVENTS, pieces[1:], strict=True)}
    lengths["stream"] -= 2  # its segment begins after the head, the others' before the end of the last chunk
    for _ in range(len(KINDS) * max(lengths.values())):
        part, _ = cuts.cutter().take(wire)
        assert wire.startswith(part)
    assert {event: sorted(counts) for event, counts in cuts.offsets.items()} == {
        event: list(range(length)) for event, length in lengths.items()
    }


async def watch(wires: list[bytes], *, eager: bool) -> list[tuple[str, list[Seen]]]:
    """Give each client the bytes of one response; return the clients' positions and events."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
        writer.write(wires[int(path.rpartition(b"/")[2], 16)])
        writer.close()

    run = ledger()
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        limits = httpx.Limits(max_connections=20, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, trust_env=False, limits=limits) as http:

            async def one(number: int) -> tuple[str, list[Seen]]:
                conversation = Conversation(f"{number:024x}")
                watcher = Watcher(http, conversation, 1, run, random.Random(1), eager=eager)
                with suppress(httpx.TransportError):
                    await watcher.watch()
                return watcher.position, run.seen[conversation.id, 1]

            return await asyncio.gather(*map(one, range(len(wires))))


@pytest.mark.gen_test
@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("eager", [True, False])
async def test_aborted_client_ignores_an_incomplete_frame(chunked: bool, eager: bool) -> None:
    pieces = response(chunked=chunked)
    # A frame is complete before the end of its chunk, two bytes, has come.
    ends = [sum(map(len, pieces[: count + 1])) - (2 if chunked else 0) for count in range(1, len(pieces))]
    wire = b"".join(pieces)
    offsets = range(len(pieces[0]), len(wire) + 1)

    results = await watch([wire[:offset] for offset in offsets], eager=eager)

    for offset, (position, seen) in zip(offsets, results, strict=True):
        complete = sum(end <= offset for end in ends)
        assert position == POSITIONS[complete], wire[:offset]
        assert [each.kind for each in seen] == [*EVENTS[2:complete], "left"], wire[:offset]
        assert not seen[-1].data["clean"]


@pytest.mark.gen_test
@pytest.mark.parametrize("eager", [True, False])
async def test_only_the_last_chunk_is_a_clean_end(eager: bool) -> None:
    whole = b"".join(response(chunked=True)) + http_chunks.LAST_CHUNK
    cut = len(http_chunks.LAST_CHUNK)

    results = await watch([whole[: len(whole) - missing] for missing in range(cut + 1)], eager=eager)

    assert [seen[-1].data["clean"] for _, seen in results] == [True] + cut * [False]


@pytest.mark.gen_test
async def test_eager_client_loses_a_frame_whose_position_comes_first() -> None:
    event, data, position = FRAMES[2].removesuffix(b"\n\n").split(b"\n")
    early = b"\n".join([position, event, data])

    ((eager, _),) = await watch([HEAD + b"\r\n" + FRAMES[0] + early], eager=True)
    ((other, _),) = await watch([HEAD + b"\r\n" + FRAMES[0] + early], eager=False)

    assert (eager, other) == (POSITIONS[3], POSITIONS[2])
