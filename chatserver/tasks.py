"""Background tasks: a set of them with one end, and jobs that survive exceptions."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)

PAUSE_S = 1.0
"""Pause of a job after an unexpected exception, so that a permanent failure does not flood the log; seconds."""


class Tasks:
    """The background tasks of one process. It keeps the references that the event loop does not."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run a coroutine as a task, and return the task; its exception, if any, is logged."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    async def close(self) -> None:
        """Cancel all tasks and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _reap(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task crashed", exc_info=error)


async def repeat(step: Callable[[], Awaitable[bool | None]], *, expected: tuple[type[Exception], ...] = ()) -> None:
    """Run a step repeatedly until it returns True or the task is cancelled.

    An exception is logged with its stack trace, and the step runs again after `PAUSE_S`.

    :param expected: exceptions that are not logged and after which the step runs again at once: the step must wait
        before it does what raises them
    """
    while True:
        try:
            if await step():
                return
        except expected:
            continue
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            # This task was not cancelled: the CancelledError came from an object that the step awaited.
            logger.exception("a background job failed; retrying")
            await asyncio.sleep(PAUSE_S)
