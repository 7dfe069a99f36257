"""The chaos program: a short run holds every promise, and it catches servers that do not."""

import re
import subprocess
import sys
from typing import Any

import pytest
from bson import ObjectId

from scripts.chaos_lib.check import check, last_checkpoint
from scripts.chaos_lib.ledger import Fault, Ledger, Post, Seen
from tests.servers import ROOT

CONVERSATION, USER, REPLY = "c" * 24, "a" * 24, "b" * 24


def chaos(*options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "scripts.chaos_lib", "--seed", "7", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)


@pytest.mark.timeout(180)
def test_short_run_holds_every_promise() -> None:
    done = chaos("--seconds", "55")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("mutant", "faults", "delay_ms", "caught"),
    [
        ("post_stored_twice", "lines cut", "5", "post stored twice"),
        # Short replies, so that a kill finds many that have ended and are yet to be written.
        ("done_before_the_write", "server killed", "2", "done not kept"),
        ("text_repeated_on_resume", "lines cut", "15", "text repeated"),
        ("lost_replies_left_alone", "server killed", "15", "stuck"),
        ("no_checkpoints", "server killed", "15", "text lost"),
    ],
)
def test_server_that_breaks_a_promise_is_caught(mutant: str, faults: str, delay_ms: str, caught: str) -> None:
    server = f"{sys.executable} -m tests.mutants {mutant}"
    options = ["--seconds", "12", "--turns", "1", "--patience", "6", "--pause", "4", "--token-delay-ms", delay_ms]
    done = chaos("--server", server, "--faults", faults, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(rf"^  {caught} +[1-9]", done.stdout, re.M), done.stdout


def test_run_without_enough_faults_or_turns_does_not_count() -> None:
    done = chaos("--seconds", "1", "--turns", "100000", "--conversations", "1")
    assert done.returncode == 1
    assert "no server killed" in done.stdout and "fewer than 100000 turns" in done.stdout


# -- the checker on made-up ledgers --------------------------------------------------------------------------------


def stored(content: str = "Hello", **fields: Any) -> dict[str, Any]:
    user = {"_id": ObjectId(USER), "role": "user", "content": "hi"}
    reply = {"_id": ObjectId(REPLY), "role": "assistant", "content": content, **fields}
    return {CONVERSATION: {"messages": [user, reply]}}


INTERRUPTED = {"status": "interrupted", "error": {"code": "interrupted", "message": ""}}


def ledger(*seen: Seen, **fields: Any) -> Ledger:
    answer = {"conversationId": CONVERSATION, "messageId": USER, "replyId": REPLY}
    posts = fields.pop("posts", [Post(CONVERSATION, "k", "hi", answer, 0.0)])
    return Ledger(0.25, 0.5, posts=posts, seen={(CONVERSATION, 0): list(seen)}, **fields)


def said(text: str = "hi", time: float = 1.0) -> Seen:
    return Seen(time, "input", f"{USER}-done", {"messageId": USER, "text": text})


def token(text: str, chars: int, time: float = 2.0) -> Seen:
    return Seen(time, "token", f"{REPLY}-{chars}", {"text": text})


def done(status: str = "complete", time: float = 3.0) -> Seen:
    return Seen(time, "done", f"{REPLY}-done", {"messageId": REPLY, "status": status})


def failed(code: str = "interrupted", time: float = 9.0) -> Seen:
    return Seen(time, "error", f"{REPLY}-done", {"messageId": REPLY, "code": code, "message": ""})


def kinds(run: Ledger, conversations: dict[str, Any]) -> set[str]:
    return {kind for kind, _ in check(run, conversations).lines}


def test_checker_finds_nothing_where_nothing_is_wrong() -> None:
    verdict = check(ledger(said(), token("Hel", 3), token("lo", 5), done()), stored())
    assert not verdict.lines and (verdict.events, verdict.ends) == (4, 1)
    # A client that came after the question, and one that began anew with the history, as it had what is not stored.
    assert not kinds(ledger(token("Hello", 5), done()), stored())
    messages = [
        {"id": USER, "content": "hi", "status": "complete"},
        {"id": REPLY, "content": "He", "status": "streaming"},
    ]
    history = Seen(2.5, "history", f"{REPLY}-2", {"messages": messages})
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
def test_checker_names_what_a_client_was_told_wrongly(seen: list[Seen], kind: str) -> None:
    assert kind in kinds(ledger(*seen), stored())


def test_checker_compares_posts_with_the_record() -> None:
    answer = {"conversationId": CONVERSATION, "messageId": USER, "replyId": REPLY}
    other = {**answer, "messageId": "d" * 24}
    assert kinds(ledger(posts=[Post(CONVERSATION, "k", "hi", other, 0.0)]), stored()) == {"message lost"}
    posts = [Post(CONVERSATION, "k", "hi", answer, 0.0), Post(CONVERSATION, "k", "hi", other, 1.0)]
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
        (4.9, [Fault("lines cut", "line", 5.0, 5.0)], True),
        (4.2, [Fault("database killed", "database", 3.0, 4.8), Fault("server killed", "server", 5.0, 5.0)], False),
        (1.9, [Fault("database killed", "database", 3.0, 4.8), Fault("server killed", "server", 5.0, 5.0)], True),
        (4.2, [Fault("database killed", "database", 1.0, 2.0), Fault("server killed", "server", 5.0, 5.0)], True),
    ],
)
def test_only_what_came_after_the_last_checkpoint_may_be_lost(
    lost_at: float, faults: list[Fault], blamed: bool
) -> None:
    run = ledger(said(), token("Hel", 3, 1.5), token("lo", 5, lost_at), failed(), faults=faults)
    assert (kinds(run, stored("Hel", **INTERRUPTED)) == {"text lost"}) is blamed
    stopped = {**INTERRUPTED, "status": "failed"}
    assert kinds(run, stored("Hel", **stopped)) == {"text lost"}
    assert last_checkpoint(run, 100.0, 101.0) is None
