"""Lanes, and fixtures: a real MongoDB, a database for each test, the application on a real socket, no warnings."""

import asyncio
import fcntl
import logging
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pymongo
import pytest
from tornado.ioloop import IOLoop

from tests.apps import App, Database, MakeApp
from tests.processes import MongoServer, Server
from tests.web_servers import APACHE_MODULES

TOOLS = {
    "node": "node",
    "npm": "npm",
    "chromium": os.environ.get("CHROMIUM", "chromium"),
    "nginx": "nginx",
    "apache2": "apache2",
    "cc": "cc",
    "openssl": "openssl",
    "curl": "curl",
    "docker-compose": "docker-compose",
    "systemd-analyze": "systemd-analyze",
}
NODE_PACKAGES = Path(__file__).parent / "node" / "node_modules" / "installed.json"
"""Written by scripts/test after it has installed all the packages."""


# A background job ignores SIGINT, and every program under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


# -- lanes ---------------------------------------------------------------------------------------------------------


LANES = ("fast", "process", "soak")
"""From the quickest to the longest. A run `--up-to` one of them includes the lanes before it."""
PROGRAMS = {"make_server", "llmock_url"}
"""Fixtures that start programs."""
FOLDER_LANES = {"process": "process", "page": "process", "chaos": "soak", "bench": "soak"}


LOCKS = "CHATSERVER_TEST_LOCKS"
"""The environment variable with the folder of the locks that all workers of a run share."""


def lane_of(item: pytest.Item) -> str:
    """Return a test's lane.

    The nearest mark decides. Without one, the folder decides, and then whether the test starts a program: by a fixture
    that does, or by a tool that it needs.
    """
    for mark in item.iter_markers():
        if mark.name in LANES:
            return mark.name
    folder = item.path.parent.name if item.path.parent.name != "tests" else item.path.stem.removeprefix("test_")
    if (lane := FOLDER_LANES.get(folder)) is not None:
        return lane
    starts_a_program = not PROGRAMS.isdisjoint(getattr(item, "fixturenames", ())) or item.get_closest_marker("needs")
    return "process" if starts_a_program else "fast"


def select(items: list[pytest.Item], last_lane: str) -> list[pytest.Item]:
    """Return the tests of a lane and of those before it."""
    lanes = LANES[: LANES.index(last_lane) + 1]
    return [item for item in items if lane_of(item) in lanes]


def pytest_configure(config: pytest.Config) -> None:
    # Here, since pytest's plugin must import it first. Neither check may depend on how busy the machine is.
    from hypothesis import HealthCheck, settings

    settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("busy")
    if not hasattr(config, "workerinput"):
        # The workers inherit it.
        os.environ[LOCKS] = tempfile.mkdtemp(prefix="chatserver-tests-")


@contextmanager
def _locked(file: Path, operation: int) -> Iterator[None]:
    with file.open("a") as lock:
        fcntl.flock(lock, operation)
        yield


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Run a test that is marked `alone` while no other worker runs a test.

    The time that a test waits here does not count for its timeout.
    """
    locks = Path(os.environ[LOCKS])
    operation = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    # The door keeps new tests from starting while a test waits to be alone; otherwise it could wait for ever.
    with ExitStack() as door:
        door.enter_context(_locked(locks / "door", operation))
        with _locked(locks / "room", operation):
            if operation == fcntl.LOCK_SH:
                door.close()
            return (yield)


# -- tests that are not run are named ------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-all", action="store_true", help="a test that is not run is a failure")
    parser.addoption("--up-to", choices=LANES, default=LANES[-1], help="the last of the lanes to run")


def _is_there(tool: str) -> bool:
    packages = {"node": NODE_PACKAGES, "apache2": APACHE_MODULES / "mod_auth_openidc.so"}
    return shutil.which(TOOLS[tool]) is not None and (tool not in packages or packages[tool].is_file())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        missing = [tool for mark in item.iter_markers("needs") for tool in mark.args if not _is_there(tool)]
        if missing:
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(missing)}"))
    selected = select(items, config.getoption("--up-to"))
    if len(selected) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in set(selected)])
        items[:] = selected
    # A worker takes one file at a time: those with the longest tests first, so that none of them is left for the end.
    longest: dict[Path, int] = {}
    for item in items:
        longest[item.path] = max(longest.get(item.path, 0), LANES.index(lane_of(item)))
    items.sort(key=lambda item: -longest[item.path])


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if skipped and session.config.getoption("--require-all"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(LOCKS))
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if skipped:
        print("NOT RUN: " + ", ".join(sorted({report.nodeid for report in skipped})))


# -- logs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_unexpected_logs(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail a test that logs above INFO, unless it is marked with `expects_log`."""
    yield
    expected = [pattern for mark in request.node.iter_markers("expects_log") for pattern in mark.args]
    records = [record for phase in ("setup", "call", "teardown") for record in caplog.get_records(phase)]
    unexpected = [
        f"{record.name}: {record.getMessage()}"
        for record in records
        if record.levelno > logging.INFO
        and record.name.split(".")[0] in ("chatserver", "tornado", "asyncio")
        and not any(re.search(pattern, record.getMessage()) for pattern in expected)
    ]
    assert not unexpected, "unexpected log records: " + "; ".join(unexpected)


# -- MongoDB -------------------------------------------------------------------------------------------------------


def _mongod(folder: Path, *, replica_set: bool, options: Sequence[str] = ()) -> Iterator[str]:
    mongod = MongoServer(folder, replica_set=replica_set, options=options)
    asyncio.run(mongod.start())
    yield mongod.uri
    mongod.remove()


@pytest.fixture(scope="session")
def replica_set(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a MongoDB replica set of one."""
    yield from _mongod(tmp_path_factory.mktemp("replica-set"), replica_set=True)


@pytest.fixture(scope="session")
def standalone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a standalone MongoDB server."""
    yield from _mongod(tmp_path_factory.mktemp("standalone"), replica_set=False)


@pytest.fixture(scope="session")
def faulty_set(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a MongoDB replica set of one, with fail points."""
    yield from _mongod(
        tmp_path_factory.mktemp("faulty"), replica_set=True, options=("--setParameter", "enableTestCommands=1")
    )


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[str]:
    """The URI of a MongoDB server that wants a password."""
    yield from _mongod(tmp_path / "locked", replica_set=False, options=("--auth",))


def _database(uri: str) -> Iterator[Database]:
    # Never dropped: that would cost more than most tests, and the server is thrown away after the session.
    name = f"test-{uuid4().hex}"
    # The store reads by majority, so a test must write and read by majority as well.
    with pymongo.MongoClient[dict[str, Any]](uri, tz_aware=True, readConcernLevel="majority", w="majority") as client:
        yield Database(uri.replace("/?", f"/{name}?"), client[name])


@pytest.fixture
def database(replica_set: str) -> Iterator[Database]:
    """A fresh database of the replica set."""
    yield from _database(replica_set)


@pytest.fixture
def standalone_database(standalone: str) -> Iterator[Database]:
    """A fresh database of the standalone server."""
    yield from _database(standalone)


@pytest.fixture
def faulty_database(faulty_set: str) -> Iterator[Database]:
    """A fresh database of the server that has fail points."""
    yield from _database(faulty_set)


# -- servers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def io_loop() -> Iterator[IOLoop]:
    """Give pytest-tornado a loop of this test's own."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    io_loop = IOLoop.current()
    yield io_loop
    # Clients that a test left in the middle of a stream are generators that are yet to be closed.
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.run_until_complete(loop.shutdown_asyncgens())
    io_loop.close(all_fds=True)
    asyncio.set_event_loop(None)


@pytest.fixture
def make_app(io_loop: IOLoop, database: Database) -> Iterator[MakeApp]:
    """Return a function that starts the application, on a real socket of the test's loop; see `App`."""
    apps: list[App] = []

    async def make(**options: Any) -> App:
        app = App(options.pop("database", database), **options)
        await app.start()
        apps.append(app)
        return app

    yield make
    for app in apps:
        io_loop.run_sync(app.stop)


@pytest.fixture
def app(io_loop: IOLoop, make_app: MakeApp) -> App:
    """The application with its default settings, but without delays."""
    app: App = io_loop.run_sync(make_app)
    return app


@pytest.fixture
def make_server(database: Database, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Return a function that makes `python -m chatserver` on this test's database; see `Server`."""
    servers: list[Server] = []

    def make(**settings: object) -> Server:
        servers.append(Server(tmp_path / f"server-{len(servers)}", {"MONGODB_URI": database.uri, **settings}))
        return servers[-1]

    yield make
    for server in servers:
        server.kill()
        assert "Traceback" not in server.output, server.output


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    """A started `python -m chatserver`, on this test's database."""
    return make_server().start()
