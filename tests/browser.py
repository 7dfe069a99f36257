"""A real Chromium and an application in the same process, for the tests of the chat page."""

import asyncio
import os
import shutil
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from playwright.sync_api import expect

from chatserver.sources import Prompt
from tests.apps import App, Database

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    # A name other than localhost: the page is not in a secure context, as in a local network without TLS.
    "--host-resolver-rules=MAP chat.test 127.0.0.1",
]
TIMEOUT_MS = 15_000
T = TypeVar("T")

expect.set_options(timeout=TIMEOUT_MS)


def chromium() -> str:
    """Return the path of Chromium: the setting CHROMIUM, or the one on the PATH."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert path is not None, "there is no chromium on the PATH, and CHROMIUM is not set"
    return path


class Turns:
    """A source that sends one script for each turn; an exception in a script is raised.

    Each chunk waits until `Site.say` releases it.
    """

    def __init__(self, *scripts: list[str | BaseException]) -> None:
        self.scripts = list(scripts)
        self.prompts: list[Prompt] = []
        self.gate = asyncio.Semaphore(0)

    async def reply(self, prompt: Prompt) -> AsyncGenerator[str, None]:
        self.prompts.append(prompt)
        for piece in self.scripts.pop(0):
            await self.gate.acquire()
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    async def close(self) -> None:
        pass


class Site:
    """The application on its own event loop, in a thread, because the test blocks while it waits for the browser.

    :param source: where replies come from; by default the simulated source
    :param settings: fields of `Settings`
    """

    def __init__(self, database: Database, source: Turns | None = None, **settings: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.source = source
        self.app = App(database, source, **settings)
        self.run(self.app.start())
        self.url = f"{self.app.url}/"

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the application's loop; return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def say(self, pieces: int = 1) -> None:
        """Let the source send this many chunks more."""

        async def release() -> None:
            assert self.source is not None
            for _ in range(pieces):
                self.source.gate.release()

        self.run(release())

    def history(self, conversation_id: str) -> list[dict[str, Any]]:
        """Return the messages of a conversation from the API."""
        messages: list[dict[str, Any]] = self.run(self.app.client.history(conversation_id))["messages"]
        return messages

    def open_streams(self) -> int:
        return len(self.app.streams)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition of the application holds."""
        self.run(self.app.until(condition, TIMEOUT_MS / 1000))

    def stop(self) -> None:
        self.run(self.app.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
