"""The limit of connections, below that of open files, and the behaviour at each."""

import asyncio
import errno
import json
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from tornado.httpserver import HTTPServer

from chatserver.listener import REFUSED_AT_ONCE, Listener
from chatserver.metrics import Metrics
from tests.apps import MakeApp
from tests.clients import RawStream, new_id
from tests.processes import Server, until


class Client:
    """A connection that stays open, without a library that would open another one."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 10)

    def ask(self, method: str = "GET", path: str = "/healthz", body: str = "") -> tuple[int, dict[str, str], str]:
        """Return the status, the headers and the body of an answer that has a length."""
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.socket.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        with self.socket.makefile("rb") as answer:
            status = int(answer.readline().split()[1])
            lines = iter(lambda: answer.readline().decode().rstrip(), "")
            headers = {name: value for name, _, value in (line.partition(": ") for line in lines)}
            return status, headers, answer.read(int(headers["Content-Length"])).decode()

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def connect() -> Iterator["Connect"]:
    """Return a function that connects to a server; the connections are closed after the test."""
    clients: list[Client] = []

    def connect(server: Server) -> Client:
        clients.append(Client(server.port))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


Connect = Callable[[Server], Client]


def files_of(server: Server) -> set[int]:
    assert server.process is not None
    return {int(name) for name in os.listdir(f"/proc/{server.process.pid}/fd")}


def limit_files(server: Server, files: int) -> None:
    assert server.process is not None
    _, hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (files, hard))


def cpu_s(server: Server) -> float:
    assert server.process is not None
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_connections_are_limited_below_the_limit_of_open_files(
    make_server: Callable[..., Server], connect: Connect
) -> None:
    server = make_server(MAX_STREAMS=50)
    server.command = ["sh", "-c", f"ulimit -n 300; exec {sys.executable} -m chatserver"]
    server.start()
    held = [connect(server) for _ in range(150)]
    until(lambda: len(files_of(server)) > 150)

    refused = connect(server)
    status, headers, body = refused.ask()
    assert (status, headers["Content-Type"]) == (503, "application/problem+json")
    assert headers["Retry-After"] == "5" and headers["Connection"] == "close"
    assert json.loads(body)["code"] == "too_many_connections"
    assert json.loads(body)["requestId"] == headers["X-Request-Id"]
    assert refused.socket.recv(1) == b""

    more = [connect(server) for _ in range(150)]
    # The very first request: it must not need to open any further file.
    assert held[0].ask("POST", "/chat", '{"input": "hi"}')[0] == 202
    # Of those beyond the limit, most are closed at once.
    for each in more:
        each.socket.setblocking(False)
    until(lambda: sum(_is_closed(each) for each in more) >= len(more) - REFUSED_AT_ONCE)
    assert len(files_of(server)) < 300 - 50

    for each in [*held, *more]:
        each.close()
    until(lambda: httpx.get(f"{server.url}/healthz", trust_env=False).status_code == 200)
    until(lambda: "chatserver_open_connections 1.0" in httpx.get(f"{server.url}/metrics", trust_env=False).text)
    assert server.stop() == 0
    refusals = [int(count) for count in re.findall(r"connections refused: (\d+); 150 may be open", server.output)]
    assert sum(refusals) >= 151 and len(refusals) < 10
    assert "Too many open files" not in server.output


def _is_closed(client: Client) -> bool:
    try:
        return client.socket.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_server_without_a_free_file_waits_and_says_so_once_a_second(
    make_server: Callable[..., Server], connect: Connect
) -> None:
    server = make_server().start()
    accepted = connect(server)
    assert accepted.ask()[0] == 200
    # The client that builds the indexes closes its files soon after.
    until(lambda: "built the index owner_1__id_1 " in server.output)
    files: set[int] = set()
    while files != (files := files_of(server)):
        time.sleep(0.3)
    limit_files(server, next(number for number in range(10_000) if number not in files))
    cpu, began = cpu_s(server), time.monotonic()

    waiting = connect(server)
    until(lambda: server.output.count("no connection can be accepted: Too many open files") == 2)
    # The very first request is answered nevertheless, with an error if MongoDB needs a new connection.
    assert accepted.ask("POST", "/chat", '{"input": "hi"}')[0] in (202, 503)

    seconds = time.monotonic() - began
    assert seconds >= 1 and cpu_s(server) - cpu < 0.5 * seconds
    assert server.output.count("Too many open files") <= seconds + 1
    limit_files(server, 1000)
    assert waiting.ask()[0] == 200
    assert server.stop() == 0


def test_connection_counts_until_its_socket_is_closed(make_server: Callable[..., Server], connect: Connect) -> None:
    """Its owner changes: the HTTP server, a stream, the HTTP server again. uvloop closes sockets in its own way."""
    server = make_server(MAX_CONNECTIONS=3, SIMULATED_TOKENS=5).start()

    def count(client: Client) -> int:
        found = re.search(r"chatserver_open_connections (\d+)", client.ask(path="/metrics")[2])
        assert found is not None
        return int(found[1])

    counter, stream, conversation = connect(server), connect(server), new_id()
    path = f"/chat/stream/{conversation}"
    stream.socket.sendall(f"GET {path}?until=done HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert stream.socket.recv(10_000).startswith(b"HTTP/1.1 200")
    assert count(counter) == 2
    body = json.dumps({"conversationId": conversation, "input": "hi"})
    assert counter.ask("POST", "/chat", body)[0] == 202
    received = b""
    while not received.endswith(b"\r\n0\r\n\r\n"):
        received += stream.socket.recv(10_000)
    # The stream has ended and its connection is used again.
    assert count(counter) == 2 and stream.ask()[0] == 200 and count(counter) == 2
    stream.socket.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert stream.socket.recv(10_000).startswith(b"HTTP/1.1 200")
    third, fourth = connect(server), connect(server)
    assert (third.ask()[0], fourth.ask()[0]) == (200, 503)
    stream.close()
    until(lambda: count(counter) == 2)


@pytest.mark.gen_test
@pytest.mark.expects_log("connections refused: 1; 2 may be open")
async def test_streams_and_requests_share_the_limit(make_app: MakeApp) -> None:
    app = await make_app(max_connections=2)
    streams = [await RawStream(app.port, f"/chat/stream/{new_id()}").open() for _ in range(2)]
    assert app.listener.open == 2
    async with httpx.AsyncClient(trust_env=False) as client:
        response = await client.get(f"{app.url}/healthz")
        assert (response.status_code, response.json()["code"]) == (503, "too_many_connections")
        streams[0].close()
        await app.until(lambda: app.listener.open == 1)
        assert (await client.get(f"{app.url}/healthz")).status_code == 200
    streams[1].close()
    await app.until(lambda: app.listener.open == 0)


@pytest.mark.gen_test
@pytest.mark.expects_log("a connection could not be served")
async def test_connection_that_cannot_be_served_does_not_keep_others_out(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = await make_app()
    handle = app.server.http.handle_stream
    broken = [True]

    def handle_stream(*arguments: object) -> None:
        if broken.pop():
            raise RuntimeError("broken")
        handle(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(app.server.http, "handle_stream", handle_stream)
    reader, writer = await asyncio.open_connection("127.0.0.1", app.port)
    assert await reader.read() == b""
    writer.close()
    monkeypatch.undo()
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(f"{app.url}/healthz")).status_code == 200
    await app.until(lambda: app.listener.open == 0)


class Exhausted(socket.socket):
    """A listening socket for whose connections no file descriptor is left."""

    def accept(self) -> tuple[socket.socket, object]:
        raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.gen_test
@pytest.mark.expects_log("no connection can be accepted: Too many open files")
async def test_two_sockets_that_fail_at_once_pause_together(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pausing removes the readers of all sockets, and with them the callbacks that are already due."""
    monkeypatch.setattr("chatserver.listener._PAUSE_S", 0.1)
    sockets = [Exhausted() for _ in range(2)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
        each.listen()
        each.setblocking(False)
    clients = [socket.create_connection(each.getsockname()) for each in sockets]
    listener = Listener(HTTPServer(lambda _request: None), 10, Metrics())

    listener.start(sockets)
    await asyncio.sleep(0.05)
    assert caplog.text.count("no connection can be accepted") == 1

    listener.stop()
    await asyncio.sleep(0.2)
    assert caplog.text.count("no connection can be accepted") == 1
    for client in clients:
        client.close()
