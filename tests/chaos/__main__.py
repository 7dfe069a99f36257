"""Inject faults while clients chat, then compare the events that the clients received with the stored documents.

Connections are aborted within frames, chunk headers included. No byte offset is used twice before all were used once;
the summary counts the offsets. Some clients store a position before its frame is complete, as several published SSE
clients do.

Exit code 0: every promise held, every kind of fault was injected, and enough turns ended. Exit code 1: otherwise.
"""

import argparse
import asyncio
import logging
import random
import secrets
import shlex
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pymongo

from tests.chaos.check import Verdict, check
from tests.chaos.clients import Conversation, Talker, Watcher
from tests.chaos.cuts import Cuts
from tests.chaos.faults import Faults, start
from tests.chaos.ledger import Ledger
from tests.processes import MongoServer, Server, steady_port
from tests.proxy import CuttingProxy

KINDS = (
    "server killed",
    "server paused",
    "server restarted",
    "database killed",
    "database frozen",
    "connections aborted",
)
CHECKPOINT_MS = 250
LEASE_MS = 2000


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="of all random choices")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults are injected")
    parser.add_argument("--conversations", type=int, default=12)
    parser.add_argument("--clients", type=int, default=3, help="number of clients that watch each conversation")
    parser.add_argument("--faults", default=",".join(KINDS), help="kinds of faults, separated by commas")
    parser.add_argument("--turns", type=int, default=100, help="how many turns must end")
    parser.add_argument("--token-delay-ms", type=int, default=15, help="pause between two tokens of a reply")
    parser.add_argument("--pause", type=float, default=2.5, help="longest pause between two faults, in seconds")
    parser.add_argument("--patience", type=float, default=40.0, help="longest wait for replies and clients at the end")
    parser.add_argument("--server", help="another command to run as the server")
    arguments = parser.parse_args()
    arguments.faults = arguments.faults.split(",")
    if unknown := set(arguments.faults) - set(KINDS):
        parser.error(f"--faults: unknown kinds {', '.join(sorted(unknown))}")
    return arguments


Stored = dict[str, dict[str, Any]]


async def run(arguments: argparse.Namespace, folder: Path) -> tuple[Ledger, Stored, Cuts]:
    """Run processes, clients and faults; return the ledger, the stored documents and the chosen offsets."""
    dice = random.Random(arguments.seed)
    ledger = Ledger(CHECKPOINT_MS / 1000, LEASE_MS / 1000)
    mongod = MongoServer(folder / "db", port=steady_port())
    uri = mongod.database_uri("chaos")
    variables: dict[str, object] = {
        "MONGODB_URI": uri,
        "CHECKPOINT_MS": CHECKPOINT_MS,
        "LEASE_MS": LEASE_MS,
        "SIMULATED_TOKEN_DELAY_MS": arguments.token_delay_ms,
        "KEEPALIVE_S": 2,
        "DRAIN_S": 0.7,
        "LOG_LEVEL": "warning",
    }
    command = shlex.split(arguments.server) if arguments.server else [sys.executable, "-m", "chatserver"]
    servers: list[Server] = []

    def make_server() -> Server:
        # On a port that stays free while the server is down.
        own = {**variables, "PORT": steady_port()}
        servers.append(Server(folder / f"server-{len(servers)}", own, command))
        return servers[-1]

    server = make_server()

    conversations = [Conversation() for _ in range(arguments.conversations)]
    proxy, cuts = CuttingProxy(), Cuts(random.Random(dice.random()))
    try:
        await mongod.start()
        await start(server)
        await proxy.start(server.port)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{proxy.port}", limits=limits, trust_env=False) as http:
            watchers = [
                # Every second client stores positions early.
                Watcher(http, conversation, number, ledger, random.Random(dice.random()), eager=number % 2 == 1)
                for conversation in conversations
                for number in range(arguments.clients)
            ]
            talkers = [Talker(http, each, ledger, random.Random(dice.random())) for each in conversations]
            watching = [asyncio.create_task(each.run()) for each in watchers]
            talking = [asyncio.create_task(each.run()) for each in talkers]
            faults = Faults(ledger, dice, server, make_server, mongod, proxy, cuts, LEASE_MS / 1000)
            await faults.run(arguments.faults, arguments.seconds, arguments.pause)
            for talker in talkers:
                talker.stopping = True
            await _come_to_rest(ledger, talking, conversations, arguments.patience)
            stored = _read(uri)
            await _catch_up(ledger, stored, conversations, arguments.patience)
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
        return ledger, _read(uri), cuts
    finally:
        await proxy.close()
        for each in servers:
            each.kill()
        mongod.remove()


async def _come_to_rest(
    ledger: Ledger, talking: list["asyncio.Task[None]"], conversations: list[Conversation], patience_s: float
) -> None:
    """Wait until the clients have received the end of every requested reply."""
    _, pending = await asyncio.wait(talking, timeout=patience_s)
    for task, conversation in zip(talking, conversations, strict=True):
        if task in pending:
            ledger.stuck.append(f"{conversation.id}: its talker still waits for an answer, or for watchers")
            task.cancel()
        else:
            task.result()
    await asyncio.gather(*pending, return_exceptions=True)


async def _catch_up(ledger: Ledger, stored: Stored, conversations: list[Conversation], patience_s: float) -> None:
    """Wait until every client has reached the end of its stored conversation."""
    deadline = time.monotonic() + patience_s
    for conversation in conversations:
        # A conversation whose predecessor was deleted just before the end has no document yet.
        document = stored.get(conversation.id)
        end = f"{document['messages'][-1]['_id']}-done" if document else f"{conversation.id}-0"
        for watcher in conversation.watchers:
            while watcher.position != end and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
            if watcher.position != end:
                ledger.stuck.append(f"{watcher.id}: client {watcher.number} is at {watcher.position}, not at {end}")


def _read(uri: str) -> Stored:
    with pymongo.MongoClient[dict[str, Any]](uri, tz_aware=True) as client:
        return {str(each["_id"]): each for each in client.get_default_database()["conversations"].find()}


def report(ledger: Ledger, verdict: Verdict, cuts: Cuts, arguments: argparse.Namespace) -> list[str]:
    """Print the table; return the reasons why the run failed."""
    injected = Counter(fault.kind for fault in ledger.faults)
    retried = {retry.new_id for retry in ledger.retries}
    turns = len({post.answer["replyId"] for post in ledger.posts} | retried)
    rows = [(kind, injected[kind]) for kind in arguments.faults]
    rows += [("turns", turns), ("requests sent again", ledger.resent), ("replies stopped", len(ledger.stops))]
    rows += [("replies retried", len(retried)), ("branches begun or shown", ledger.branches)]
    rows += [("conversations deleted", len(ledger.deletions))]
    rows += [("streams reopened", ledger.reconnects), ("streams ended cleanly", verdict.orderly)]
    rows += [("aborts within a frame", sum(counts.total() for counts in cuts.offsets.values()))]
    rows += [("at distinct offsets", sum(map(len, cuts.offsets.values())))]
    rows += [("events checked", verdict.events), ("ends checked", verdict.ends)]
    print(f"seed {arguments.seed}, {arguments.conversations} conversations x {arguments.clients} clients")
    for name, number in rows:
        print(f"  {name:<24}{number:>9,}")
    for event, counts in sorted(cuts.offsets.items()):
        print(f"  offsets used: {event:<10}{len(counts):>9,} of {cuts.longest[event]}, the bytes of the longest frame")
    print("violations")
    for name, number in verdict.counts.items():
        print(f"  {name:<24}{number:>9,}")
    for kind, line in verdict.lines[:20]:
        print(f"! {kind}: {line[:400]}")
    wrong = [f"{len(verdict.lines)} violations"] if verdict.lines else []
    wrong += [f"no {kind}" for kind in arguments.faults if not injected[kind]]
    if injected["server restarted"] and not verdict.orderly:
        wrong.append("no stream ended cleanly at a shutdown")
    if turns < arguments.turns:
        wrong.append(f"fewer than {arguments.turns} turns")
    print("FAILED: " + ", ".join(wrong) if wrong else "every promise held")
    return wrong


def main() -> int:
    """Return the exit code."""
    logging.disable(logging.CRITICAL)
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        ledger, stored, cuts = asyncio.run(run(arguments, Path(folder)))
    return 1 if report(ledger, check(ledger, stored), cuts, arguments) else 0


if __name__ == "__main__":
    sys.exit(main())
