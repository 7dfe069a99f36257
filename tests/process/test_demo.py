"""The demo client as users run it: a process, a real server, and a proxy that aborts connections between them."""

import asyncio
import os
import pty
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

from tests.processes import ROOT, Server
from tests.proxy import CuttingProxy
from tests.users import SECRET, token

PATIENCE_S = 30


def served(folder: Path, replica_set: str, **settings: Any) -> Iterator[str]:
    """Start a server on a database of its own and give its address; end it afterwards."""
    uri = replica_set.replace("/?", f"/{folder.name}?")
    server = Server(folder, {"MONGODB_URI": uri, **settings}).start()
    yield server.url
    assert server.stop() == 0


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory, replica_set: str) -> Iterator[str]:
    """The address of a server whose replies take a second."""
    yield from served(tmp_path_factory.mktemp("demo-quick"), replica_set, KEEPALIVE_S=1)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, replica_set: str) -> Iterator[str]:
    """The address of a server whose replies take a second for each word, and which writes only two at a time."""
    folder = tmp_path_factory.mktemp("demo-slow")
    yield from served(
        folder, replica_set, SIMULATED_TOKEN_DELAY_MS=1000, MAX_REPLIES=2, DRAIN_S=0, DATABASE_TIMEOUT_S=20
    )


class Demo:
    """A running demo client."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.output = ""

    async def say(self, line: str) -> None:
        """Type a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())
        await self.process.stdin.drain()

    async def until(self, text: str) -> str:
        """Wait until the demo has printed `text`; return the output so far."""
        assert self.process.stdout is not None
        while text not in self.output:
            data = await asyncio.wait_for(self.process.stdout.read(65536), PATIENCE_S)
            assert data, self.output
            self.output += data.decode()
        return self.output

    async def end(self) -> tuple[int, str, str]:
        """Type Ctrl-D; return the exit code, the standard output and the standard error."""
        output, errors = await asyncio.wait_for(self.process.communicate(b""), PATIENCE_S)
        assert self.process.returncode is not None
        self.output += output.decode()
        return self.process.returncode, self.output, errors.decode()


@asynccontextmanager
async def demo(url: str, *arguments: str) -> AsyncIterator[Demo]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        sys.executable, "scripts/demo.py", "--url", url, *arguments, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe
    )
    try:
        yield Demo(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


@asynccontextmanager
async def proxied(url: str) -> AsyncIterator[tuple[CuttingProxy, str]]:
    async with CuttingProxy() as proxy:
        port = await proxy.start(int(url.rpartition(":")[2]))
        yield proxy, f"http://127.0.0.1:{port}"


async def history(url: str, conversation_id: str, **query: str) -> list[dict[str, Any]]:
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"{url}/chat/{conversation_id}", params=query)
        messages: list[dict[str, Any]] = answer.raise_for_status().json()["messages"]
        return messages


async def post(url: str, path: str = "", method: str = "POST", **body: str | None) -> dict[str, Any]:
    async with httpx.AsyncClient() as client:
        answer = await client.request(method, f"{url}/chat{path}", json=body or None)
        result: dict[str, Any] = answer.raise_for_status().json()
        return result


def new_id() -> str:
    return secrets.token_hex(12)


def said(message: dict[str, Any]) -> str:
    """Return a reply's text as the demo prints it."""
    return f"bot › {message['content']}\n"


# --- one turn


def test_once_prints_the_reply_and_nothing_else(quick: str) -> None:
    async def run() -> None:
        async with demo(quick, "--once", "¿Qué tal? 😀") as client:
            code, output, errors = await client.end()
        found = re.search(r"conversation ([0-9a-f]{24})", errors)
        assert found
        question, reply = await history(quick, found[1])
        assert question["content"] == "¿Qué tal? 😀"
        assert output == reply["content"] + "\n"
        assert code == 0

    asyncio.run(run())


@pytest.mark.parametrize("n_bytes", [3_000, 3_333])
def test_once_loses_nothing_when_connections_are_aborted_repeatedly(
    make_server: Callable[..., Server], n_bytes: int
) -> None:
    server = make_server(SIMULATED_TOKEN_DELAY_MS=20).start()

    async def run() -> None:
        conversation = new_id()
        async with proxied(server.url) as (proxy, url):
            proxy.cut_after(n_bytes)
            async with demo(url, "--conversation", conversation, "--once", "hello") as client:
                code, output, _ = await client.end()
            assert proxy.cuts >= 2
        [_, reply] = await history(server.url, conversation)
        assert output == reply["content"] + "\n"
        assert code == 0

    asyncio.run(run())


def test_once_waits_for_an_unavailable_server(quick: str) -> None:
    async def run() -> None:
        async with proxied(quick) as (proxy, url):
            proxy.refuse = True
            async with demo(url, "--once", "hello") as client:
                await proxy.wait_for(refused=2)
                proxy.refuse = False
                code, output, errors = await client.end()
        assert code == 0
        assert output
        assert "no connection" in errors
        assert "connected again" in errors

    asyncio.run(run())


def test_once_fails_for_a_stopped_reply(slow: str) -> None:
    async def run() -> None:
        async with demo(slow, "--once", "hello") as client:
            await client.until(" ")  # the first words
            client.process.send_signal(signal.SIGINT)
            code, output, errors = await client.end()
        found = re.search(r"conversation ([0-9a-f]{24})", errors)
        assert found
        [_, reply] = await history(slow, found[1])
        assert reply["status"] == "stopped"
        assert output.strip() == reply["content"].strip()
        assert code == 1
        assert "(stopped)" in errors

    asyncio.run(run())


class LyingServer(RequestHandler):
    """Streams a reply of which it has stored something else."""

    stored = "Hallo!"

    def initialize(self) -> None:
        self.left = asyncio.Event()

    def post(self, path: str) -> None:
        self.write({"messageId": "a" * 24, "replyId": "b" * 24, "lastEventId": "x"})
        self.set_status(202)

    async def get(self, path: str) -> None:
        if not path.startswith("/stream/"):
            reply = {"id": "b" * 24, "role": "assistant", "content": self.stored, "status": "complete"}
            self.finish({"messages": [reply], "lastEventId": "x"})
            return
        self.set_header("Content-Type", "text/event-stream")
        self.write('id: x-0\n\nevent: input\nid: x-1\ndata: {"messageId": "%s", "text": "hi"}\n\n' % ("a" * 24))
        self.write('event: token\nid: x-2\ndata: {"text": "Hello!"}\n\n')
        self.write('event: done\nid: x-3\ndata: {"messageId": "%s", "status": "complete"}\n\n' % ("b" * 24))
        await self.flush()
        await self.left.wait()

    def on_connection_close(self) -> None:
        self.left.set()


async def once_against(handler: type[RequestHandler]) -> tuple[int, str, str]:
    """Return what `--once` makes of a server that only a test would write."""
    sock, port = bind_unused_port()
    server = HTTPServer(Application([(r"/chat(.*)", handler)], log_function=lambda handler: None))
    server.add_sockets([sock])
    try:
        async with demo(f"http://127.0.0.1:{port}", "--once", "hi") as client:
            return await client.end()
    finally:
        server.stop()
        await server.close_all_connections()


@pytest.mark.parametrize(("stored", "code"), [("Hallo!", 1), ("Hello", 1), ("Hello!", 0)])
def test_once_fails_if_another_text_is_stored(stored: str, code: int) -> None:
    """Only a server that stores another text shows that the exit code depends on the comparison."""

    async def run() -> None:
        result, output, errors = await once_against(type("Lying", (LyingServer,), {"stored": stored}))
        assert output == "Hello!\n"
        assert result == code
        assert ("differs from the streamed one" in errors) == (code == 1)

    asyncio.run(run())


class BusyServer(LyingServer):
    """Refuses the first requests for the stream and the first posts, like a busy server or its proxy."""

    stored = "Hello!"
    statuses: ClassVar[dict[str, list[int]]]

    def prepare(self) -> None:
        if self.statuses.get(self.request.method):
            self.set_status(self.statuses[self.request.method].pop())
            self.set_header("Retry-After", "0")
            self.finish({"detail": "Busy."})


def test_requests_to_a_busy_server_are_repeated_and_the_reason_is_shown_once() -> None:
    async def run() -> None:
        statuses = {"GET": [502, 503], "POST": [504, 502, 503, 429]}
        code, output, errors = await once_against(type("Busy", (BusyServer,), {"statuses": statuses}))
        assert statuses == {"GET": [], "POST": []}
        assert errors.splitlines()[1:] == ["(Busy; trying again)", "(connected again)", "(Busy; trying again in 0 s)"]
        assert (code, output) == (0, "Hello!\n")

    asyncio.run(run())


def test_once_into_a_pipe_that_closes_early_is_quiet(quick: str) -> None:
    command = f"{sys.executable} scripts/demo.py --url {quick} --once hello | head -c 3"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert len(done.stdout.encode()) == 3
    assert "Traceback" not in done.stderr
    assert "Broken" not in done.stderr


def test_refusal_of_the_server_is_shown(quick: str) -> None:
    async def run() -> None:
        async with demo(quick, "--once", "x" * 32_001) as client:
            code, output, errors = await client.end()
        assert code == 1
        assert output == ""
        assert "(✗ /input" in errors

    asyncio.run(run())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--url", "http://127.0.0.1:notaport"], "--url: not the address of a server"),
        (["--url", "http://127.0.0.1:0"], "--url: not the address of a server"),
        (["--url", "http://:3000"], "--url: not the address of a server"),
        (["--url", "http://a..b"], "--url: not the address of a server"),
        (["--url", "ftp://127.0.0.1"], "--url: not the address of a server"),
        (["--conversation", "nonsense"], "--conversation: an id has 24 hex digits"),
        (["--conversation", ""], "--conversation: an id has 24 hex digits"),
        (["--once", "  "], "--once: the text is empty"),
        (["--once", ""], "--once: the text is empty"),
    ],
)
def test_invalid_arguments_are_refused(arguments: list[str], complaint: str) -> None:
    command = [sys.executable, "scripts/demo.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"error: {complaint}" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--conversation", "a" * 24]])
def test_missing_server_is_reported_with_its_address(arguments: list[str]) -> None:
    async def run() -> None:
        sock, port = bind_unused_port()
        sock.close()
        url = f"http://127.0.0.1:{port}"
        async with demo(url, *arguments) as client:
            await client.until(f"(no connection to {url}: no server listens there; is scripts/run running? see --url; ")

    asyncio.run(run())


# --- a conversation


def test_conversation_is_reopened_by_its_id(quick: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with demo(quick, "--conversation", conversation) as client:
            await client.say("one")
            await client.say("two")
            code, output, _ = await client.end()
        messages = await history(quick, conversation)
        assert [message["content"] for message in messages][::2] == ["one", "two"]
        transcript = f"you › one\n{said(messages[1])}you › two\n{said(messages[3])}"
        assert output == f"(conversation {conversation})\n{transcript}"
        assert code == 0
        async with demo(quick, "--conversation", conversation) as client:
            assert await client.end() == (0, output, "")

    asyncio.run(run())


def test_running_reply_is_continued(quick: str) -> None:
    async def run() -> None:
        conversation = (await post(quick, input="hello"))["conversationId"]
        async with demo(quick, "--conversation", conversation) as client:
            await client.say("and more")
            code, output, _ = await client.end()
        messages = await history(quick, conversation)
        assert len(messages) == 4
        assert output.endswith(f"you › hello\n{said(messages[1])}you › and more\n{said(messages[3])}")
        assert code == 0

    asyncio.run(run())


def test_message_of_another_client_is_shown_with_its_reply(quick: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with demo(quick, "--conversation", conversation) as one:
            await one.say("first")
            await one.until("bot › ")
            async with demo(quick, "--conversation", conversation) as two:
                await two.until("you › first")  # the history: the demo shows every event from now on
                await one.say("from one")
                await two.until("someone else › from one\nbot › ")
                await two.say("from two")  # waits for the reply to the other
                await one.until("someone else › from two\nbot › ")
                (_, first, _), (_, second, _) = await asyncio.gather(one.end(), two.end())
        messages = await history(quick, conversation)
        replies = [said(message) for message in messages[1::2]]
        assert first.endswith(f"you › from one\n{replies[1]}someone else › from two\n{replies[2]}")
        assert second.endswith(f"someone else › from one\n{replies[1]}you › from two\n{replies[2]}")

    asyncio.run(run())


def test_post_with_a_lost_answer_is_stored_once(quick: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with proxied(quick) as (proxy, url), demo(url, "--conversation", conversation) as client:
            await proxy.wait_for(connections=2)  # the history, the stream
            proxy.cut_after(1)
            await client.say("hello")
            await proxy.wait_for(cuts=1)
            proxy.cut_after(None)
            code, output, _ = await client.end()
        messages = await history(quick, conversation)
        assert [message["role"] for message in messages] == ["user", "assistant"]
        assert "trying again" in output
        assert output.endswith(said(messages[1]))
        assert code == 0

    asyncio.run(run())


def test_reply_is_resumed_after_its_connection_is_aborted(quick: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with proxied(quick) as (proxy, url), demo(url, "--conversation", conversation) as client:
            await client.say("hello")
            await client.until("bot › ")
            proxy.refuse = True
            assert proxy.cut() >= 1
            await proxy.wait_for(refused=2)
            proxy.refuse = False
            code, output, _ = await client.end()
        [_, reply] = await history(quick, conversation)
        before, notices, after = re.split(
            rf"\n(\(no connection to {url}: [^\n]+; trying again\)\n\(connected again\))\n", output
        )
        assert (before + after).endswith(said(reply)), notices
        assert code == 0

    asyncio.run(run())


def test_stream_that_stays_silent_is_reopened(quick: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with proxied(quick) as (proxy, url), demo(url, "--conversation", conversation) as client:
            await client.until(f"conversation {conversation}")
            await proxy.wait_for(connections=2)  # the history, the stream
            await client.say("first")
            await client.until("bot › ")
            first = await wait_for_reply(quick, conversation, 2)
            await client.until(first)

            assert proxy.mute_streams() == 1
            await client.say("second")
            code, output, _ = await client.end()

        second = await wait_for_reply(quick, conversation, 4)
        assert output.endswith(second)
        assert "timed out; trying again" in output and "connected again" in output
        assert code == 0
        assert proxy.streams == 2

    asyncio.run(run())


async def wait_for_reply(url: str, conversation_id: str, messages: int) -> str:
    """Wait until the last of `messages` messages is complete; return its text as the demo prints it."""
    assert await wait_until(lambda: has_statuses(url, conversation_id, ["complete"] * messages))
    return said((await history(url, conversation_id))[-1])


def test_demo_survives_a_killed_and_restarted_server(make_server: Callable[..., Server]) -> None:
    server = make_server(SIMULATED_TOKEN_DELAY_MS=80, CHECKPOINT_MS=20, LEASE_MS=300).start()

    async def run() -> None:
        conversation = new_id()
        async with demo(server.url, "--conversation", conversation) as client:
            await client.say("hello")
            await client.until("> hello")  # the quote: some words have been stored
            server.kill()
            await client.until("no connection")
            await asyncio.to_thread(server.start)
            output = await client.until("/retry asks")
            await client.say("once more")
            await client.until("> once more")
            client.process.send_signal(signal.SIGINT)
            code, _, _ = await client.end()
        messages = await history(server.url, conversation)
        assert [message["status"] for message in messages] == ["complete", "interrupted", "complete", "stopped"]
        assert messages[1]["error"]["message"] in output
        assert code == 0

    asyncio.run(run())


def test_message_waits_while_another_reply_runs(slow: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with demo(slow, "--conversation", conversation) as client:
            await client.say("first")
            await client.until("bot › ")
            await post(slow, f"/{conversation}/stop")
            await client.until("(stopped)")
            await post(slow, f"/{conversation}/retry")  # is not to be seen for a second
            await client.say("second")
            await client.until("another reply is running")
            await post(slow, f"/{conversation}/stop")
            await client.until("you › second\nbot › ")
            client.process.send_signal(signal.SIGINT)
            code, _, _ = await client.end()
        messages = await history(slow, conversation)
        assert [message["content"] for message in messages if message["role"] == "user"] == ["first", "second"]
        assert messages[-1]["status"] == "stopped"
        assert code == 0

    asyncio.run(run())


def test_post_is_repeated_after_the_time_that_the_server_names(slow: str) -> None:
    async def run() -> None:
        others = [(await post(slow, input="hello"))["conversationId"] for _ in range(2)]
        async with demo(slow) as client:
            await client.say("hello")
            await client.until("trying again in")
            for other in others:
                await post(slow, f"/{other}/stop")
            await client.until("bot › ")
            client.process.send_signal(signal.SIGINT)
            code, output, _ = await client.end()
        assert output.count("you › hello\n") == 1
        assert "Try again in a moment; trying again in" in output
        assert code == 0

    asyncio.run(run())


def test_stop_and_retry(slow: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with demo(slow, "--conversation", conversation) as client:
            await client.say("hello")
            await client.until("bot › ")
            await client.say("/stop")
            await client.until("(stopped)")
            await client.say("/retry")
            assert await wait_until(lambda: has_statuses(slow, conversation, ["complete", "streaming"]))
            await client.say("/stop")
            await client.end()
        assert await has_statuses(slow, conversation, ["complete", "stopped"])
        everything = await history(slow, conversation, branches="all")
        assert [message["status"] for message in everything] == ["complete", "stopped", "stopped"]

    asyncio.run(run())


def test_complete_reply_is_retried(quick: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with demo(quick, "--conversation", conversation) as client:
            await client.say("hello")
            await client.say("/retry")
            code, output, _ = await client.end()
        question, first, second = await history(quick, conversation, branches="all")
        assert [each["id"] for each in await history(quick, conversation)] == [question["id"], second["id"]]
        assert output == f"(conversation {conversation})\nyou › hello\n{said(first)}{said(second)}"
        assert code == 0

    asyncio.run(run())


def test_nth_message_is_edited(quick: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with demo(quick, "--conversation", conversation) as client:
            await client.say("one")
            await client.say("two")
            await client.say("/edit 2  /zwei")
            await client.say("/edit 1 eins")
            code, output, _ = await client.end()
        everything = await history(quick, conversation, branches="all")
        texts = {each["id"]: each["content"] for each in everything}
        asked = [(each["content"], texts.get(each["parentId"])) for each in everything if each["role"] == "user"]
        reply = everything[1]["content"]
        assert asked == [("one", None), ("two", reply), ("/zwei", reply), ("eins", None)]
        assert [each["content"] for each in await history(quick, conversation)] == ["eins", everything[-1]["content"]]
        assert output.endswith(f"you › /zwei\n{said(everything[5])}you › eins\n{said(everything[7])}")
        assert "another branch" not in output
        assert code == 0

    asyncio.run(run())


@pytest.mark.parametrize("arguments", ["", " 0 x", " 2 x", " one x", " 1", " 1  "])
def test_edit_without_the_number_of_a_message_is_refused(quick: str, arguments: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with demo(quick, "--conversation", conversation) as client:
            await client.say("one")
            await client.say(f"/edit{arguments}")
            code, output, _ = await client.end()
        assert "(✗ /edit N TEXT: N is the number of your message, from 1 to 1)" in output
        assert len(await history(quick, conversation, branches="all")) == 2
        assert code == 0

    asyncio.run(run())


def test_branches_are_listed_and_shown(quick: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with demo(quick, "--conversation", conversation) as client:
            await client.say("one")
            await client.say("/branches")
            await client.say("two")
            await client.say("/edit 2 deux")
            await client.say("/branches")
            await client.until("(* 2  you › deux)")
            await client.say("/branches 3")
            await client.until("there is no version 3")
            await client.say("/branches 1")
            output = await client.until("another branch, after bot › ")
            old = await history(quick, conversation)
            everything = await history(quick, conversation, branches="all")
            await client.say(f"/branches {everything[4]['id'].upper()}")
            code, output, _ = await client.end()
        assert [each["content"] for each in old][::2] == ["one", "two"]
        assert "(there is one version of each message)" in output
        listed = "(  1  you › two)\n(* 2  you › deux)\n"
        assert listed in output
        start = output.index(listed)
        assert f"you › two\n{said(everything[3])}" in output[start:]
        assert [each["content"] for each in await history(quick, conversation)][::2] == ["one", "deux"]
        assert code == 0

    asyncio.run(run())


def test_branch_of_another_client_is_shown(quick: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with demo(quick, "--conversation", conversation) as client:
            await client.say("hello")
            await client.until("bot › ")
            first = await wait_for_reply(quick, conversation, 2)
            await client.until(first)
            await post(quick, f"/{conversation}/retry")
            await client.until("(another branch, after you › hello)\nbot › ")
            second = await wait_for_reply(quick, conversation, 2)
            await client.until(f"(another branch, after you › hello)\n{second}")
            question, reply, _ = await history(quick, conversation, branches="all")
            await post(quick, f"/{conversation}/head", "PUT", messageId=reply["id"])
            await client.until(f"{second}(another branch, after you › hello)\n{first}")
            await post(quick, conversationId=conversation, input="hi", parentId=None)
            await client.until("(another branch, from the beginning)\nsomeone else › hi\nbot › ")
            await client.say("go on")
            code, output, _ = await client.end()
        path = await history(quick, conversation)
        assert [each["content"] for each in path][::2] == ["hi", "go on"]
        assert output.endswith(f"{said(path[1])}you › go on\n{said(path[3])}")
        assert question["content"] == "hello"
        assert code == 0

    asyncio.run(run())


def test_new_version_of_a_reply_is_resumed_after_its_connection_is_aborted(quick: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with proxied(quick) as (proxy, url), demo(url, "--conversation", conversation) as client:
            await client.say("hello")
            await client.until("bot › ")
            first_reply = await wait_for_reply(quick, conversation, 2)
            await client.until(first_reply)
            await client.say("/retry")
            await client.until(f"{first_reply}bot › ")
            proxy.refuse = True
            assert proxy.cut() >= 1
            await proxy.wait_for(refused=2)
            proxy.refuse = False
            code, output, _ = await client.end()
        _, first, second = await history(quick, conversation, branches="all")
        assert "(connected again)" in output and "another branch" not in output
        without_notices = re.sub(r"\n(\([^\n]*\)\n)+", "", output.partition(said(first))[2])
        assert without_notices == said(second)
        assert code == 0

    asyncio.run(run())


class ScriptedServer(RequestHandler):
    """Answers each request for the stream with the next of some bodies, and keeps the last stream open."""

    streams: ClassVar[list[list[str]]]
    positions: ClassVar[list[str]]
    history: ClassVar[dict[str, Any]]

    def initialize(self) -> None:
        self.left = asyncio.Event()

    async def get(self, path: str) -> None:
        if not path.startswith("/stream/"):
            self.finish(self.history)
            return
        self.positions.append(self.request.headers.get("Last-Event-ID", ""))
        self.set_header("Content-Type", "text/event-stream")
        self.write("retry: 10\nevent: stream\nid: start\n\n")
        for number, event in enumerate(self.streams.pop(0)):
            name, _, data = event.partition(" ")
            self.write(f"event: {name}\ndata: {data}\n{'' if name == 'head' else f'id: {number}'}\n\n")
        await self.flush()
        if not self.streams:
            await self.left.wait()

    def on_connection_close(self) -> None:
        self.left.set()


@asynccontextmanager
async def demo_of(**script: Any) -> AsyncIterator[Demo]:
    """Run the demo against a `ScriptedServer`."""
    sock, port = bind_unused_port()
    handler = type("Scripted", (ScriptedServer,), script)
    server = HTTPServer(Application([(r"/chat(.*)", handler)], log_function=lambda handler: None))
    server.add_sockets([sock])
    try:
        async with demo(f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        server.stop()
        await server.close_all_connections()


TURN = [
    'input {"messageId": "u1", "text": "hi"}',
    'token {"text": "Hello"}',
    'done {"messageId": "r1", "status": "complete"}',
]


def past(message_id: str, role: str, content: str) -> dict[str, str]:
    return {"id": message_id, "role": role, "content": content, "status": "complete"}


def test_first_head_of_a_stream_may_name_the_reply_that_is_being_received() -> None:
    async def run() -> None:
        resumed = ['head {"messageId": "r1"}', 'token {"text": " there"}', TURN[2], 'head {"messageId": "u1"}']
        async with demo_of(streams=[TURN[:2], resumed], positions=[], history={}) as client:
            output = await client.until("(another branch, after you › hi)\n")
        assert "someone else › hi\nbot › Hello\n" in output
        assert "(connected again)\n there\n(another branch, after you › hi)\n" in output

    asyncio.run(run())


def test_head_that_is_not_shown_is_fetched_with_the_history() -> None:
    async def run() -> None:
        positions: list[str] = []
        messages = [past("u1", "user", "hi"), past("r2", "assistant", "Good day")]
        history = {"messages": messages, "lastEventId": "end"}
        streams = [[*TURN, 'head {"messageId": "r2"}'], ['head {"messageId": "r2"}', 'head {"messageId": "u1"}']]
        async with demo_of(streams=streams, positions=positions, history=history) as client:
            output = await client.until("Good day\n(another branch, after you › hi)\n")
        assert "bot › Hello\n(another branch, after you › hi)\nbot › Good day\n" in output
        assert positions == ["", "end"]

    asyncio.run(run())


def test_head_that_the_history_does_not_have_is_fetched_once() -> None:
    async def run() -> None:
        positions: list[str] = []
        history = {"messages": [past("u1", "user", "hi")], "lastEventId": "end"}
        more = 'input {"messageId": "u2", "text": "more"}'
        streams = [[*TURN, 'head {"messageId": "r2"}'], ['head {"messageId": "r2"}', more], []]
        async with demo_of(streams=streams, positions=positions, history=history) as client:
            await client.until("someone else › more")
        assert positions[:2] == ["", "end"]

    asyncio.run(run())


def test_title_is_shown_when_it_changes(quick: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with demo(quick, "--conversation", conversation) as client:
            await client.say("hello")
            await client.until("bot › ")
            await wait_for_reply(quick, conversation, 2)
            await post(quick, f"/{conversation}", "PATCH", title="Greetings")
            await client.until("(title: Greetings)")
            await post(quick, f"/{conversation}", "PATCH", title=None)
            await client.until("(the title is automatic again)")
            await post(quick, f"/{conversation}", "PATCH", title="Greetings")
            await client.until("automatic again)\n(title: Greetings)")
            await client.end()
        async with demo(quick, "--conversation", conversation) as client:
            code, output, _ = await client.end()
        assert output.count("title: Greetings") == 1
        assert code == 0

    asyncio.run(run())


def test_unknown_command_lists_the_known_ones(quick: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with demo(quick, "--conversation", conversation) as client:
            await client.say("/stpo it")
            await client.say("/")
            await client.until("unknown command /:")
            await client.say("/help")
            code, output, _ = await client.end()
        known = "/stop stops the reply, /retry asks for another version of the last reply, /edit N TEXT"
        assert f"(✗ unknown command /stpo: {known}" in output
        assert f"({known}" in output
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{quick}/chat/{conversation}")).status_code == 404
        assert code == 0

    asyncio.run(run())


def test_text_may_begin_with_a_slash(quick: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with demo(quick, "--conversation", conversation) as client:
            await client.say("//etc/hosts?")
            await client.end()
        async with demo(quick, "--conversation", conversation, "--once", "/retry") as client:
            assert (await client.end())[0] == 0
        messages = await history(quick, conversation)
        assert [each["content"] for each in messages if each["role"] == "user"] == ["/etc/hosts?", "/retry"]

    asyncio.run(run())


async def has_statuses(url: str, conversation_id: str, statuses: list[str]) -> bool:
    return [message["status"] for message in await history(url, conversation_id)] == statuses


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> bool:
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():
            await asyncio.sleep(0.02)
    return True


def test_deleted_conversation_starts_again(quick: str) -> None:
    async def run() -> None:
        conversation = new_id()
        async with demo(quick, "--conversation", conversation) as client:
            await client.say("one")
            await client.until("bot › ")
            async with httpx.AsyncClient() as deleter:
                (await deleter.delete(f"{quick}/chat/{conversation}")).raise_for_status()
            await client.until("was deleted")
            await client.say("two")
            code, output, _ = await client.end()
        assert "no connection" not in output
        messages = await history(quick, conversation)
        assert [message["content"] for message in messages][::2] == ["two"]
        assert output.endswith(f"you › two\n{said(messages[1])}")
        assert code == 0

    asyncio.run(run())


# --- users


@pytest.fixture(scope="module")
def with_users(tmp_path_factory: pytest.TempPathFactory, replica_set: str) -> Iterator[str]:
    """The address of a server with users, of whom each may start two turns a minute."""
    folder = tmp_path_factory.mktemp("demo-users")
    yield from served(folder, replica_set, AUTH="jwt", AUTH_SECRET=SECRET, AUTH_LEEWAY_S=0, MAX_TURNS_PER_MINUTE=2)


def run_demo(url: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/demo.py", "--url", url, *arguments]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, input="", capture_output=True, text=True, timeout=100)


def test_token_is_sent_and_never_printed(with_users: str) -> None:
    for owner, given in (("alice", "option"), ("bob", "variable")):
        secret = token(owner)
        arguments, environment = (["--token", secret], {}) if given == "option" else ([], {"CHAT_TOKEN": secret})
        done = run_demo(with_users, "--once", "hello", *arguments, **environment)
        assert done.returncode == 0 and "> hello" in done.stdout, done.stderr
        assert secret not in done.stdout + done.stderr


def test_refused_token_ends_the_demo_with_a_sentence(with_users: str) -> None:
    advice = "Pass a valid token in CHAT_TOKEN or by --token"
    for arguments, reason in (
        ([], "This request needs a credential: sign in, or send a bearer token."),
        (["--token", "not-a-token"], "The token is not valid for this server."),
        (["--token", token("alice", -1)], "The token has expired. Send a new one."),
    ):
        for once in (["--once", "hello"], []):
            done = run_demo(with_users, *once, *arguments)
            assert f"(✗ {reason} {advice})" in done.stdout + done.stderr
            assert "Traceback" not in done.stderr and done.returncode == 1


def test_token_that_cannot_be_sent_is_refused_without_printing_it(with_users: str) -> None:
    done = run_demo(with_users, "--token", "a secret\n")
    assert done.returncode == 2 and "visible ASCII" in done.stderr and "a secret" not in done.stderr


def test_demo_waits_for_its_next_turn(with_users: str) -> None:
    async def run() -> None:
        async with demo(with_users, "--token", token("carol")) as client:
            for text in ("one", "two"):
                await client.say(text)
                await client.until(f"> {text}")
            await client.say("three")
            output = await client.until("trying again in")
        assert "(You have started too many turns. Wait a moment; trying again in" in output

    asyncio.run(run())


# --- on a terminal


def on_terminal(
    url: str, conversation: str, *, typed: bytes, until: bytes, interrupt: bool = False, **environment: str
) -> tuple[bytes, int]:
    """Type keys into a demo on a terminal, wait until it shows `until` and ends; return its whole output."""
    main, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "scripts/demo.py", "--url", url, "--conversation", conversation],
        cwd=ROOT,
        stdin=end,
        stdout=end,
        stderr=end,
        env={**os.environ, "TERM": "xterm", **environment},
        start_new_session=True,
    )
    os.close(end)
    shown = b""

    def show(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(main, 65536)

    try:
        show("you › ".encode())
        os.write(main, typed)
        show(until)
        if interrupt:
            process.send_signal(signal.SIGINT)
        else:
            os.write(main, b"\x04")
        with suppress(OSError):  # a terminal without a process answers so
            while data := os.read(main, 65536):
                shown += data
        return shown, process.wait(PATIENCE_S)
    finally:
        process.kill()
        process.wait()
        os.close(main)


def test_terminal_shows_colours_and_a_prompt(quick: str) -> None:
    conversation = new_id()
    asyncio.run(post_and_wait(quick, conversation, "before"))
    reply = asyncio.run(history(quick, conversation))[-1]["content"]
    last_words = reply.split("\n")[-1].encode()
    shown, code = on_terminal(quick, conversation, typed=b"", until=last_words)
    assert "\x1b[1;36myou › \x1b[0mbefore".encode() in shown
    assert "\x1b[1;32mbot › \x1b[0m".encode() in shown
    assert code == 0
    plain, _ = on_terminal(quick, conversation, typed=b"", until=last_words, NO_COLOR="1")
    assert b"\x1b[1" not in plain
    assert "you › before".encode() in plain


def test_terminal_gets_no_control_characters_of_others(quick: str) -> None:
    conversation = new_id()
    asyncio.run(post_and_wait(quick, conversation, "\x1b]0;owned\x07 \x9b31m"))
    shown, _ = on_terminal(quick, conversation, typed=b"", until=b"owned")
    assert b"\x1b]0" not in shown
    assert b"\x07" not in shown
    assert "\x9b".encode() not in shown


def test_typing_on_a_terminal_shows_each_line_once(quick: str) -> None:
    conversation = new_id()
    shown, code = on_terminal(quick, conversation, typed=b"hello there\n", until=b"bot", NO_COLOR="1")
    reply = asyncio.run(history(quick, conversation))[-1]["content"]
    assert shown.count(b"hello there\r\n") == 2, "as typed, and in the reply's quote"
    assert reply.replace("\n", "\r\n").encode() in shown
    assert code == 0


def test_ctrl_c_at_the_prompt_exits_quietly(quick: str) -> None:
    shown, code = on_terminal(quick, new_id(), typed=b"", until=b"", interrupt=True, NO_COLOR="1")
    assert shown.decode().endswith("you › \r\x1b[K")
    assert code == 130


def test_line_typed_during_a_reply_is_shown_when_it_is_sent(quick: str) -> None:
    conversation = new_id()
    shown, code = on_terminal(quick, conversation, typed=b"one\ntwo\n", until=b"> two", NO_COLOR="1")
    assert "\nyou › two\r\nbot › ".encode() in shown
    assert code == 0


def test_invalid_utf8_is_replaced_and_sent(quick: str) -> None:
    conversation = new_id()
    command = [sys.executable, "scripts/demo.py", "--url", quick, "--conversation", conversation]
    subprocess.run(command, cwd=ROOT, input=b"caf\xe9\n", capture_output=True, timeout=PATIENCE_S, check=True)
    [question, _] = asyncio.run(history(quick, conversation))
    assert question["content"] == "caf\ufffd"


async def post_and_wait(url: str, conversation: str, text: str) -> None:
    async with demo(url, "--conversation", conversation, "--once", text) as client:
        code, _, errors = await client.end()
        assert code == 0, errors
