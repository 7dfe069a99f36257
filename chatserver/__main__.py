"""`python -m chatserver`: settings, wiring, signals, and a shutdown in order."""

import argparse
import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

from tornado import autoreload
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from chatserver import logs
from chatserver.app import make_app
from chatserver.chat import Chat
from chatserver.errors import DatabaseUnavailable, SetupError
from chatserver.hub import Hub
from chatserver.listener import Listener
from chatserver.metrics import Metrics
from chatserver.mongod import Mongod
from chatserver.settings import Settings, read_settings
from chatserver.sources import make_source
from chatserver.store import Store, connect, initiate_replica_set, redact_uri
from chatserver.streams import Streams

_new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
with suppress(ImportError):
    from uvloop import new_event_loop as _new_event_loop

logger = logging.getLogger("chatserver")

_OTHER_FILES = 200
"""Open files that are no clients' connections: up to 100 to MongoDB, refused clients, the log, libraries."""
_OTHER_CONNECTIONS = 10_000
"""Connections that are no streams, unless `MAX_CONNECTIONS` is set."""
_READ_HEADS = 4
"""A head beyond so many times what is allowed is not read to its end, and its connection closed without a word."""
_CHUNK = 16 * 1024
"""Bytes of a request that are read at once; for each that comes Tornado clears a buffer of this size."""
_SWITCH_S = 0.0005
"""How long a driver's thread waits for the interpreter while the event loop is busy, several times a call: with the
interpreter's own 5 ms, a stop among 200 replies without delay takes up to a second."""
_GC_THRESHOLD = 50_000
"""Objects with references, made and not yet unmade, before the youngest are looked through; Python's own is 700."""


async def serve(settings: Settings, *, connections: int, reload: bool = False) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP, then shut down in order; a second SIGTERM or SIGINT exits at once.

    :param connections: how many may be open
    :raises SetupError: if the server cannot be started as it is set up
    """
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    mongod = None if settings.mongodb_uri else Mongod(settings.chat_data_dir)
    keeping: asyncio.Task[None] | None = None

    def stop() -> None:
        if stopping.is_set():
            if mongod is not None:
                mongod.kill()
            os._exit(1)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup would have it
        # A terminal that is closed may say so twice: by the kernel, and by its shell.
        loop.add_signal_handler(signal.SIGHUP, stopping.set)
    try:
        uri = settings.mongodb_uri
        if mongod is not None:
            uri = await mongod.start()
            await initiate_replica_set(uri, mongod.host)
            keeping = asyncio.create_task(mongod.keep_running())
        assert uri is not None
        await _serve_on(settings, uri, stopping, connections, sole_server=mongod is not None, reload=reload)
    finally:
        if keeping is not None:
            keeping.cancel()
        if mongod is not None:
            await mongod.stop()


async def _serve_on(
    settings: Settings, uri: str, stopping: asyncio.Event, connections: int, *, sole_server: bool, reload: bool
) -> None:
    client = connect(uri, settings.database_timeout_s)
    address = redact_uri(uri)
    try:
        sockets = bind_sockets(settings.port, settings.host)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no host name"
        raise SetupError(f"{settings.host}:{settings.port} (HOST, PORT) cannot be listened on: {why}") from None
    set_tcp_user_timeout(sockets, settings.slow_client_timeout_s)
    metrics = Metrics()
    store = Store(
        client,
        uri,
        timeout_s=settings.database_timeout_s,
        lease_ms=settings.lease_ms,
        history=settings.history_messages,
        history_chars=settings.openai_history_chars,
        observe=metrics.observe_store,
    )
    try:
        chat = Chat(settings, store, Hub(), make_source(settings), metrics, sole_server=sole_server)
        try:
            await chat.start()
        except DatabaseUnavailable:
            raise SetupError(f"No MongoDB answers at {address} (MONGODB_URI)") from None
        streams = Streams(chat, settings, metrics)
        server = HTTPServer(
            make_app(chat, streams, metrics, settings),
            max_header_size=_READ_HEADS * settings.max_header_bytes,
            chunk_size=_CHUNK,
            body_timeout=settings.request_timeout_s,
            idle_connection_timeout=settings.request_timeout_s,
        )
        listener = Listener(sockets, server, connections, metrics)
        streams.give_back_to(listener.serve)
        listener.start()
        ticking = asyncio.create_task(streams.tick_for_ever())
        host, port = sockets[0].getsockname()[:2]
        print(f"chatserver listens on http://{f'[{host}]' if ':' in host else host}:{port}/", flush=True)
        print(f"conversations are in {address}", flush=True)
        if reload:
            autoreload.start()
        # What start-up made stays for good, and what a stream or a turn leaves behind is no garbage: to look for some
        # less often halves the cost of a connect.
        gc.freeze()
        gc.set_threshold(_GC_THRESHOLD)
        sys.setswitchinterval(_SWITCH_S)
        await stopping.wait()
        logger.info("shutting down; running replies: %d, waited for up to %g s", chat.running, settings.drain_s)
        listener.stop()
        await chat.drain()
        await streams.close()
        ticking.cancel()
        await chat.close()
    finally:
        await store.close()
    # What was asked has its answer from the store now.
    await server.close_all_connections()


def set_tcp_user_timeout(sockets: list[socket.socket], slow_client_timeout_s: float) -> None:
    """Have the kernel, where it can, cut a client that has vanished or takes nothing of its answer.

    What is accepted inherits it. A stream's own timer comes first, and counts those that it cuts.
    """
    milliseconds = int(slow_client_timeout_s * 1000) + 5000
    for each in sockets:
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


def _allow_connections(settings: Settings) -> int:
    """Raise the limit of open files as far as the system permits; return how many connections may be open."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = settings.max_connections or settings.max_streams + _OTHER_CONNECTIONS
    if files == resource.RLIM_INFINITY:
        return wanted
    others = _OTHER_FILES + (settings.max_replies if settings.reply_source == "openai" else 0)
    room = max(files - others, files // 2)
    name, asked = (
        ("MAX_STREAMS", settings.max_streams)
        if settings.max_connections is None
        else ("MAX_CONNECTIONS", settings.max_connections)
    )
    if asked > room:
        logger.warning(
            "%s is %d, but this process may open only %d files (ulimit -n), which leaves room for %d connections",
            *(name, asked, files, room),
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
