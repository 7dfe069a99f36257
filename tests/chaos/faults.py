"""Injects faults into the server, MongoDB and the connections, and repairs them."""

import asyncio
import random
import signal
import time
from collections.abc import Awaitable, Callable

from tests.chaos.cuts import Cuts
from tests.chaos.ledger import Fault, Ledger
from tests.processes import MongoServer, Server, StartError
from tests.proxy import CuttingProxy


class Faults:
    """Injects one fault after the other, chosen at random.

    :param spare: makes a second server on the same database, which takes over while the first one is paused
    :param lease_s: the lease of a running reply; a pause of its server is longer
    """

    def __init__(
        self,
        ledger: Ledger,
        dice: random.Random,
        server: Server,
        spare: Callable[[], Server],
        mongod: MongoServer,
        proxy: CuttingProxy,
        cuts: Cuts,
        lease_s: float,
    ) -> None:
        self._ledger, self._dice, self._lease_s = ledger, dice, lease_s
        self._server, self._spare, self._mongod, self._proxy, self._cuts = server, spare, mongod, proxy, cuts
        self.kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "server killed": self._kill_server,
            "server paused": self._pause_server,
            "server restarted": self._restart_server,
            "database killed": self._kill_mongod,
            "database frozen": self._freeze_mongod,
            "connections aborted": self._abort_connections,
        }

    async def run(self, kinds: list[str], seconds: float, pause_s: float) -> None:
        """Inject faults for `seconds`. Every kind is used once before any is used again."""
        until = time.monotonic() + seconds
        while True:
            for kind in self._dice.sample(kinds, len(kinds)):
                pause = self._dice.uniform(0.4, 1.0) * pause_s
                if time.monotonic() + pause >= until:
                    return
                await asyncio.sleep(pause)
                await self.kinds[kind]()

    def _note(self, kind: str, hits: str, begin: float) -> None:
        self._ledger.faults.append(Fault(kind, hits, begin, time.monotonic()))

    async def _kill_server(self) -> None:
        begin = time.monotonic()
        self._server.kill()
        self._note("server killed", "server", begin)
        await start(self._server)

    async def _restart_server(self) -> None:
        begin = time.monotonic()
        await stop(self._server)
        self._note("server restarted", "shutdown", begin)
        await start(self._server)

    async def _pause_server(self) -> None:
        """Pause it for longer than its lease. A second server finishes its replies, and may serve its clients."""
        begin = time.monotonic()
        self._server.signal(signal.SIGSTOP)
        spare = self._spare()
        await start(spare)
        moved = self._dice.random() < 0.5
        if moved:
            self._proxy.aim(spare.port)
            self._proxy.cut()
        await asyncio.sleep(self._lease_s + 1.0)
        self._server.signal(signal.SIGCONT)
        self._note("server paused", "server", begin)
        await asyncio.sleep(0.5)
        if moved:
            self._proxy.aim(self._server.port)
        ending = time.monotonic()
        await stop(spare)
        self._note("spare ended", "shutdown", ending)

    async def _kill_mongod(self) -> None:
        begin = time.monotonic()
        self._mongod.kill()
        await asyncio.sleep(self._dice.uniform(0.2, 1.5))
        await self._mongod.start()
        self._note("database killed", "database", begin)

    async def _freeze_mongod(self) -> None:
        begin = time.monotonic()
        self._mongod.signal(signal.SIGSTOP)
        await asyncio.sleep(self._dice.uniform(0.5, 4.0))
        self._mongod.signal(signal.SIGCONT)
        self._note("database frozen", "database", begin)

    async def _abort_connections(self) -> None:
        """Abort the open connections at once, and each new one within a frame, for a few seconds."""
        begin = time.monotonic()
        self._proxy.cut_by(self._cuts.cutter)
        self._proxy.cut()
        await asyncio.sleep(self._dice.uniform(2.0, 4.0))
        self._proxy.cut_by(None)
        self._proxy.cut()  # so that no connection with a cutter is left
        self._note("connections aborted", "connection", begin)


async def start(server: Server) -> None:
    """Start a server and wait until it listens. Restart it while its database is away, as a supervisor would.

    :raises StartError: if the twentieth start fails, too
    """
    for attempt in range(20):
        try:
            await asyncio.to_thread(server.start)
            return
        except StartError:
            if attempt == 19:
                raise
            await asyncio.sleep(0.3)


async def stop(server: Server) -> None:
    """Shut a server down.

    :raises RuntimeError: if its exit code is not 0
    """
    code = await asyncio.to_thread(server.stop)
    if code != 0:
        raise RuntimeError(f"the server ended with {code}: {server.output[-2000:]}")
