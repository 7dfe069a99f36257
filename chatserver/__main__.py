"""`python -m chatserver`: arguments, the limit of open files, signals and exit codes."""

import argparse
import asyncio
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from tornado import autoreload
from tornado.netutil import bind_sockets

from chatserver import logs
from chatserver.errors import DatabaseUnavailable, SetupError
from chatserver.mongod import Mongod
from chatserver.server import Server, private_database
from chatserver.settings import Settings, read_settings
from chatserver.store import redact_uri

_new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
with suppress(ImportError):
    from uvloop import new_event_loop as _new_event_loop

logger = logging.getLogger("chatserver")

_OTHER_FILES = 200
"""File descriptors that are not client connections: up to 100 to MongoDB, refused clients, the log, libraries."""
_OTHER_CONNECTIONS = 10_000
"""Connections allowed in addition to `MAX_STREAMS`, unless `MAX_CONNECTIONS` is set."""
_SWITCH_S = 0.0005
"""How long one of the driver's threads waits for the interpreter while the event loop is busy, several times per call.
With Python's default of 5 ms, stopping one of 200 undelayed replies takes up to a second."""
_GC_THRESHOLD = 50_000
"""Allocations minus deallocations that start a collection of the youngest generation; Python's default is 700."""


async def serve(settings: Settings, *, connections: int, reload: bool = False) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP, then shut down in order; a second SIGTERM or SIGINT exits at once.

    :param connections: the maximum number of open connections
    :raises SetupError: if the server cannot be started as configured
    """
    stopping = asyncio.Event()
    if settings.mongodb_uri is not None:
        _handle_signals(stopping)
        await _serve_on(settings, settings.mongodb_uri, stopping, connections, reload=reload)
        return
    mongod = Mongod(settings.chat_data_dir)
    _handle_signals(stopping, mongod)
    async with private_database(mongod) as uri:
        await _serve_on(settings, uri, stopping, connections, reload=reload, sole_server=True)


def _handle_signals(stopping: asyncio.Event, mongod: Mongod | None = None) -> None:
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if stopping.is_set():
            if mongod is not None:
                mongod.kill()
            os._exit(1)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        # Closing a terminal may send it twice, from the kernel and from the shell: the second must not exit at once.
        loop.add_signal_handler(signal.SIGHUP, stopping.set)


async def _serve_on(
    settings: Settings,
    uri: str,
    stopping: asyncio.Event,
    connections: int,
    *,
    reload: bool,
    sole_server: bool = False,
) -> None:
    server = Server(settings, uri, max_connections=connections, sole_server=sole_server)
    address = redact_uri(uri)
    try:
        sockets = bind_sockets(settings.port, settings.host)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "invalid host name"
        raise SetupError(f"{settings.host}:{settings.port} (HOST, PORT) cannot be bound: {why}") from None
    try:
        await server.start(sockets)
    except DatabaseUnavailable:
        raise SetupError(f"No MongoDB answers at {address} (MONGODB_URI)") from None
    try:
        host, port = sockets[0].getsockname()[:2]
        print(f"chatserver listens on http://{f'[{host}]' if ':' in host else host}:{port}/", flush=True)
        print(f"conversations are in {address}", flush=True)
        if reload:
            autoreload.start()
        # Objects made at start-up live as long as the process, and streams and turns leave no cycles behind. Collecting
        # less often halves the cost of a connect.
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD)
        sys.setswitchinterval(_SWITCH_S)
        await stopping.wait()
        running = server.replies.running
        logger.info("shutting down: waiting up to %g s for %d running replies", settings.drain_s, running)
    finally:
        await server.stop()


def _allow_connections(settings: Settings) -> int:
    """Raise the limit of open files as far as the system permits; return the maximum number of connections."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections or settings.max_streams + _OTHER_CONNECTIONS
    if files == resource.RLIM_INFINITY:
        return wanted
    others = _OTHER_FILES + (settings.max_replies if settings.reply_source == "openai" else 0)
    room = max(files - others, files // 2)
    name, configured = (
        ("MAX_STREAMS", settings.max_streams)
        if settings.max_connections is None
        else ("MAX_CONNECTIONS", settings.max_connections)
    )
    if configured > room:
        logger.warning(
            "%s is %d, but this process may open only %d files (ulimit -n), which leaves room for %d connections",
            *(name, configured, files, room),
        )
    return min(wanted, room)


def main() -> int:
    """Run the server; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m chatserver", description="A chat backend that never loses a word.")
    parser.add_argument("--reload", action="store_true", help="restart when the code changes")
    arguments = parser.parse_args()
    try:
        settings = read_settings()
        logs.set_up(settings)
        connections = _allow_connections(settings)
        with asyncio.Runner(loop_factory=_new_event_loop) as runner:
            runner.run(serve(settings, connections=connections, reload=arguments.reload))
    except SetupError as error:
        print(f"chatserver: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
