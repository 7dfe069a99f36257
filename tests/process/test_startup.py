"""Starting and ending the server as an operator does: a process, signals, its output."""

import json
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pymongo
import pytest

from chatserver.errors import SetupError
from chatserver.mongod import _ended
from chatserver.settings import Settings, read_settings
from chatserver.sources import make_source
from tests.apps import Database
from tests.processes import ROOT, Server, until


@pytest.fixture
def private(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Return a function that makes a server on a private MongoDB, in this test's folder."""
    servers: list[Server] = []

    def make(**variables: object) -> Server:
        servers.append(Server(tmp_path, dict(variables)))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()


def say(server: Server, text: str = "hi") -> dict[str, str]:
    response = httpx.post(f"{server.url}/chat", json={"input": text}, trust_env=False)
    assert response.status_code == 202, response.text
    answer: dict[str, str] = response.json()
    return answer


def history(server: Server, conversation_id: str) -> dict[str, Any]:
    response = httpx.get(f"{server.url}/chat/{conversation_id}", trust_env=False)
    value: dict[str, Any] = response.json()
    return value


def mongod_pid(server: Server) -> int:
    return int((server.folder / ".data" / "db" / "mongod.lock").read_text())


def mongodb_uri(server: Server) -> str:
    """Return the address of the database as the server prints it, right after its own."""
    until(lambda: "conversations are in" in server.output)
    found = re.search(r"mongodb://\S+", server.output)
    assert found is not None
    return found[0]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def failed(server: Server, seconds: float) -> str:
    """Start a server that must give up by itself in time, with an exit code and without a stack trace."""
    began = time.monotonic()
    server.spawn()
    assert server.wait(seconds + 5) == 1
    assert time.monotonic() - began < seconds
    assert "Traceback" not in server.output
    return server.output


def test_private_mongodb_starts_and_ends_with_the_server(private: Callable[..., Server]) -> None:
    server = private(SIMULATED_TOKENS=400).start()
    answer = say(server)
    pid = mongod_pid(server)
    with pymongo.MongoClient[dict[str, Any]](mongodb_uri(server)) as client:
        assert client.get_default_database().conversations.count_documents({}) == 1
    # The reply that still runs is written to its end first, and stored.
    assert server.stop() == 0
    assert re.search("shutting down.*reply complete", server.output, re.DOTALL)
    assert _ended(pid) and not re.search("WARNING|ERROR", server.output)
    server.start()
    _, reply = history(server, answer["conversationId"])["messages"]
    assert reply["status"] == "complete" and reply["content"]
    assert server.stop() == 0


def test_killed_server_starts_again_and_finds_its_data(private: Callable[..., Server]) -> None:
    server = private(SIMULATED_TOKEN_DELAY_MS=50, CHECKPOINT_MS=50).start()
    answer = say(server)
    with pymongo.MongoClient[dict[str, Any]](mongodb_uri(server)) as client:
        conversations = client.get_default_database().conversations
        until(lambda: conversations.count_documents({"reply.content": {"$gt": ""}}) == 1)
    pid = mongod_pid(server)
    server.kill()
    server.start()
    until(lambda: _ended(pid))
    # With a private database no other server can be writing that reply: it is finished at once.
    stored = history(server, answer["conversationId"])
    messages = stored["messages"]
    assert stored["status"] == "idle" and messages[-1]["status"] == "interrupted" and messages[-1]["content"]
    assert messages[-1]["error"]["code"] == "interrupted"
    assert server.stop() == 0


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT], 2 * [signal.SIGHUP]])
def test_signal_ends_it_in_order(make_server: Callable[..., Server], numbers: list[int]) -> None:
    server = make_server(SIMULATED_TOKEN_DELAY_MS=50, DRAIN_S=0.2).start()
    answer = say(server)
    with httpx.stream("GET", f"{server.url}/chat/stream/{answer['conversationId']}", trust_env=False) as stream:
        for number in numbers:
            server.signal(number)
            until(lambda: "shutting down" in server.output)
        text = "".join(stream.iter_text())
    assert server.wait() == 0
    assert '"code":"interrupted"' in text
    server.start()
    messages = history(server, answer["conversationId"])["messages"]
    assert messages[-1]["status"] == "interrupted"
    streamed = "".join(re.findall(r'data: \{"text":"(.*?)"\}', text)).replace("\\n", "\n").replace('\\"', '"')
    assert messages[-1]["content"] == streamed


def test_server_does_without_uvloop(tmp_path: Path, make_server: Callable[..., Server]) -> None:
    (tmp_path / "uvloop.py").write_text("raise ImportError\n")
    server = make_server(PYTHONPATH=f"{tmp_path}:{ROOT}", SIMULATED_TOKENS=20).start()
    answer = say(server)
    query = {"lastEventId": answer["lastEventId"], "until": "done"}
    stream = httpx.get(f"{server.url}/chat/stream/{answer['conversationId']}", params=query, trust_env=False)
    assert stream.text.count("event: token") > 0 and "event: done" in stream.text
    assert server.stop() == 0


def test_script_runs_it(tmp_path: Path, make_server: Callable[..., Server]) -> None:
    """In a copy of the folder whose .venv, this one's, is ready."""
    for name in ("chatserver", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    installed = tmp_path / ".venv" / "installed"
    installed.mkdir(parents=True)
    for file in (tmp_path, installed):
        shutil.copy(ROOT / "requirements.txt", file)
    for entry in Path(sys.prefix).iterdir():
        if entry.name != installed.name:
            (tmp_path / ".venv" / entry.name).symlink_to(entry)
    server = make_server()
    server.command = [str(tmp_path / "scripts" / "run")]
    assert httpx.get(f"{server.start().url}/healthz", trust_env=False).json() == {"status": "ok"}
    assert server.stop() == 0


def test_logs_as_json_name_their_subject_and_never_the_text(make_server: Callable[..., Server]) -> None:
    server = make_server(LOG_FORMAT="json", LOG_LEVEL="debug", SIMULATED_TOKENS=50).start()
    answer = say(server, "a private matter")
    query = {"lastEventId": answer["lastEventId"], "until": "done"}
    httpx.get(f"{server.url}/chat/stream/{answer['conversationId']}", params=query, trust_env=False)
    content = history(server, answer["conversationId"])["messages"][-1]["content"]
    assert server.stop() == 0
    lines = [json.loads(line) for line in server.stderr]
    for line in lines:
        assert datetime.fromisoformat(line["time"]).tzinfo and line["level"] and line["logger"] and line["message"]
    about = [line for line in lines if line.get("conversation") == answer["conversationId"]]
    assert [line["message"] for line in about if line.get("reply") == answer["replyId"]] == [
        "reply started",
        "POST /chat",
        "reply complete",
    ]
    assert [line["message"] for line in about if line.get("status") == 200] == [
        f"GET /chat/{path}{answer['conversationId']}" for path in ("stream/", "")
    ]
    assert "private" not in server.output and content[:20] not in server.output


def test_what_a_client_sends_wrongly_is_not_logged(make_server: Callable[..., Server]) -> None:
    server = make_server(LOG_LEVEL="debug").start()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nIdempotency-Key: secret\x00\r\n\r\n")
        assert b" 400 " in connection.recv(1000)
    assert server.stop() == 0
    assert "secret" not in server.output


def test_second_signal_ends_it_at_once(make_server: Callable[..., Server]) -> None:
    server = make_server(SIMULATED_TOKEN_DELAY_MS=1000, DRAIN_S=60).start()
    say(server)
    server.signal(signal.SIGTERM)
    until(lambda: "shutting down" in server.output)
    # While it waits for its reply, it accepts no new connection.
    until(lambda: not listens(server.port))
    began = time.monotonic()
    server.signal(signal.SIGTERM)
    assert server.wait() == 1 and time.monotonic() - began < 2


def test_address_without_a_database_is_an_error_that_hides_the_password(private: Callable[..., Server]) -> None:
    uri = "mongodb://admin:pass%40word@127.0.0.1:1/?serverSelectionTimeoutMS=30000"
    output = failed(private(MONGODB_URI=uri), 5)
    assert "127.0.0.1:1" in output and "MONGODB_URI" in output
    assert "pass" not in output.replace("password", "")


@pytest.mark.parametrize("uri", ["nonsense", "mongodb://", "http://x:secret@y/", "mongodb://u:secret@h:port/"])
def test_wrong_uri_is_an_error_that_hides_the_password(private: Callable[..., Server], uri: str) -> None:
    output = failed(private(MONGODB_URI=uri), 5)
    assert "MONGODB_URI" in output and "secret" not in output


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MONGODB_URI", "mongodb://[::1/x"),
        ("MONGODB_URI", "mongodb+srv://nowhere.invalid/x"),
        ("HOST", "a..b"),
        ("HOST", "x" * 64),
    ],
)
def test_address_that_cannot_be_one_is_named(
    private: Callable[..., Server], database: Database, name: str, value: str
) -> None:
    server = private(**{"MONGODB_URI": database.uri, "DATABASE_TIMEOUT_S": 1, name: value})
    assert name in failed(server, 15)


@pytest.mark.parametrize(
    ("limits", "variables", "said"),
    [
        ("-S -n 200", {"MAX_STREAMS": 250}, None),
        ("-n 300", {"MAX_STREAMS": 150}, None),
        ("-n 300", {"MAX_STREAMS": 151}, "MAX_STREAMS is 151, but this process may open only 300 files"),
        ("-n 300", {"MAX_STREAMS": 151, "MAX_CONNECTIONS": 150}, None),
        ("-n 600", {"MAX_CONNECTIONS": 401}, "MAX_CONNECTIONS is 401, .* 600 files .* room for 400 connections"),
    ],
)
def test_as_many_files_may_be_open_as_the_system_allows(
    make_server: Callable[..., Server], limits: str, variables: dict[str, int], said: str | None
) -> None:
    server = make_server(**variables)
    server.command = ["sh", "-c", f"ulimit {limits}; exec {sys.executable} -m chatserver"]
    server.start()
    assert server.process is not None
    limit = re.search(r"Max open files +(\d+) +(\d+)", Path(f"/proc/{server.process.pid}/limits").read_text())
    assert limit is not None and limit[1] == limit[2]
    assert re.search(said, server.output) if said else "WARNING" not in server.output


def test_wrong_password_is_an_error(private: Callable[..., Server], replica_set: str) -> None:
    output = failed(private(MONGODB_URI=replica_set.replace("//", "//nobody:secret@")), 5)
    assert "MONGODB_URI" in output and "secret" not in output


def test_port_that_is_taken_is_an_error(private: Callable[..., Server], database: Database) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in failed(private(MONGODB_URI=database.uri, PORT=port), 5)
        # Also when a private server would have to be ended again.
        server = private(PORT=port)
        assert f"127.0.0.1:{port}" in failed(server, 10)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PORT": "abc"}, "PORT is 'abc': not a whole number"),
        ({"PORT": "70000"}, "PORT is '70000'"),
        ({"PORT": "70000", "DRAIN_S": "x"}, "DRAIN_S is 'x'"),
        ({"SIMULATED_TOKEN_DELAY_MS": "-1"}, "SIMULATED_TOKEN_DELAY_MS is '-1'"),
        ({"REPLY_SOURCE": "gpt"}, "REPLY_SOURCE is 'gpt': not one of simulated, openai"),
        ({"REPLY_SOURCE": "openai"}, "OPENAI_API_KEY"),
        ({"REPLY_SOURCE": "openai", "OPENAI_API_KEY": "your_api_key_here"}, "OPENAI_API_KEY"),
        ({"LEASE_MS": "300", "CHECKPOINT_MS": "250"}, "LEASE_MS is '300'"),
        ({"TRUSTED_PROXIES": "proxy"}, "TRUSTED_PROXIES is 'proxy'"),
        ({"ALLOWED_HOSTS": "a.example, http://b.example"}, "'http://b.example' is not a host name without a port"),
        ({"ALLOWED_HOSTS": "a.example:3000"}, "ALLOWED_HOSTS is 'a.example:3000'"),
        ({"CORS_ORIGINS": "https://a.example,foo"}, "CORS_ORIGINS is 'https://a.example,foo': 'foo' is not an origin"),
        ({"CORS_ORIGINS": "https://a.example/"}, "CORS_ORIGINS is 'https://a.example/'"),
        ({"OPENAI_BASE_URL": "localhost:11434"}, "OPENAI_BASE_URL is 'localhost:11434'"),
        ({"OPENAI_API_KEY": "sk-1\u200b2"}, "OPENAI_API_KEY is [hidden]: not made of visible ASCII characters"),
        ({"CORS_CREDENTIALS": "true", "CORS_ORIGINS": "*"}, "CORS_CREDENTIALS"),
        ({"HOST": "0.0.0.0"}, "AUTH is not set, but HOST is '0.0.0.0'"),
        ({"AUTH": "jwt", "AUTH_SECRET": "short-secret"}, "AUTH_SECRET is [hidden]: not made of secrets of 32"),
        ({"CHAT_DATA_DIR": "/dev/null/x"}, "CHAT_DATA_DIR /dev/null/x"),
        ({"CHAT_DATA_DIR": "~/x", "HOME": "/dev/null"}, "CHAT_DATA_DIR /dev/null/x"),
        ({"CHAT_DATA_DIR": "~nobody-of-that-name/x"}, "CHAT_DATA_DIR is '~nobody-of-that-name/x'"),
    ],
)
def test_setting_that_is_wrong_is_named_with_its_value(
    private: Callable[..., Server], variables: dict[str, object], said: str
) -> None:
    assert said in failed(private(**variables), 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_PROXY", "ftp://user:secret@proxy.example:21"),
        ("http_proxy", "http://user:secret/x@proxy.example"),
        ("HTTPS_PROXY", "http://proxy.example:99999"),
        ("ALL_PROXY", "socks5://user:secret@proxy.example:1080"),
        ("HTTPS_PROXY", "http://[secret"),
        ("SSL_CERT_FILE", "/no/such/file"),
    ],
)
def test_environment_that_the_http_client_cannot_use_is_named_without_the_password(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SetupError, match=name.upper()) as raised:
        make_source(Settings(reply_source="openai", openai_api_key="sk-x"))
    assert "secret" not in str(raised.value)


def test_wrong_proxy_is_a_sentence_and_only_where_a_proxy_is_used(
    monkeypatch: pytest.MonkeyPatch, make_server: Callable[..., Server]
) -> None:
    said = failed(make_server(HTTP_PROXY="ftp://x:1", REPLY_SOURCE="openai", OPENAI_API_KEY="sk-x"), 20)
    assert "HTTP_PROXY is not" in said
    assert make_server(HTTP_PROXY="ftp://x:1").start().stop() == 0
    monkeypatch.setenv("HTTP_PROXY", "ftp://x:1")
    monkeypatch.setenv("NO_PROXY", "x, *")
    make_source(Settings(reply_source="openai", openai_api_key="sk-x"))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("PORT", ["1_000", "+80", "٣", "80.0", "9" * 5000]),
        ("DRAIN_S", ["1_0", "+1", "1e1", "nan", "inf", "٣", ".", "1."]),
        ("ALLOWED_HOSTS", ["*.example.com", ".example.com", "a..example", "ünï.example", "a.example/"]),
        ("CORS_ORIGINS", ["https://a.example:443", "http://a.example:80", "https://ü.example", "https://a.example?"]),
        ("OPENAI_BASE_URL", ["http://x:0", "x", "file://x/y"]),
    ],
)
def test_setting_that_could_never_work_is_refused(name: str, values: list[str]) -> None:
    for value in values:
        with pytest.raises(SetupError, match=rf"^{name} is {re.escape(repr(value))}: "):
            read_settings({name: value}, Path("none"))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("PORT", ["0", "0080", " 80\n"]),
        ("OPENAI_TEMPERATURE", ["1", "0.7", ".7"]),
        ("ALLOWED_HOSTS", ["*", "A.example, b-c.example.", "my_box", "xn--nxasmq6b", "10.0.0.1,::1,[fe80::1]"]),
        (
            "CORS_ORIGINS",
            ["*", "HTTPS://a.example", "http://a.example:443,http://[::1]:8000", "capacitor://localhost"],
        ),
        ("OPENAI_BASE_URL", ["HTTP://x", "http://[::1]:8000/v1", "https://user:password@x:8443/v1"]),
    ],
)
def test_setting_that_works_is_taken(name: str, values: list[str]) -> None:
    for value in values:
        assert getattr(read_settings({name: value, "AUTH": "none"}, Path("none")), name.lower()) is not None


@pytest.mark.parametrize(
    ("text", "line"), [("HOST=localhost\nPORT='3001\nLOG_LEVEL=info\n", 2), ("\n# a note\nOPENAI_API_KEY='sk-1' 2", 3)]
)
def test_line_of_the_file_that_cannot_be_read_is_named(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / ".env").write_text(text)
    with pytest.raises(SetupError) as raised:
        read_settings({}, tmp_path / ".env")
    assert str(raised.value) == f"{tmp_path / '.env'}, line {line}, is neither NAME=value nor a comment"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfeP\0O\0R\0T\0", " is not valid UTF-8: save it as UTF-8"),
        (b"PORT=3000\nHOST=caf\xe9\n", " is not valid UTF-8: save it as UTF-8"),
        (b"PORT=3000\n\0\0\0\0", ", line 2, has a control character: write that line again"),
        (b"HOST=\x1b[A", ", line 1, has a control character: write that line again"),
        (None, " cannot be read: Is a directory; repair it, or move it away"),
    ],
)
def test_damaged_file_is_named_and_what_to_do(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / ".env"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(SetupError) as raised:
        read_settings({}, file)
    assert str(raised.value).startswith(f"{file}{said}")


def test_file_saved_by_an_editor_on_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"\xef\xbb\xbfPORT=3001\r\nHOST=localhost\r\n")
    settings = read_settings({}, tmp_path / ".env")
    assert (settings.port, settings.host) == (3001, "localhost")


def test_settings_come_from_the_environment_first_then_from_the_file(
    tmp_path: Path, private: Callable[..., Server]
) -> None:
    (tmp_path / ".env").write_text("PORT=abc\nREPLY_SOURCE=gpt\n")
    assert "REPLY_SOURCE is 'gpt'" in failed(private(), 5)


@pytest.mark.parametrize("own_database", [False, True])
def test_reload_restarts_it_when_the_code_changes(
    tmp_path: Path, private: Callable[..., Server], database: Database, own_database: bool
) -> None:
    shutil.copytree(ROOT / "chatserver", tmp_path / "chatserver", ignore=shutil.ignore_patterns("__pycache__"))
    uri = None if own_database else database.uri
    server = private(MONGODB_URI=uri, PYTHONPATH=tmp_path).start("--reload")
    answer = say(server)

    def changed_and_restarted() -> bool:
        with (tmp_path / "chatserver" / "wire" / "sse.py").open("a") as file:
            file.write("\n")
        return "".join(server.stdout).count("listens") == 2

    until(changed_and_restarted)
    assert history(server, answer["conversationId"])["messages"]
    pid = mongod_pid(server) if own_database else None
    assert server.stop() == 0
    assert pid is None or _ended(pid)
