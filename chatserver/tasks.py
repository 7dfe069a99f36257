"""Background jobs that go on whatever happens to them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

PAUSE_S = 1.0
"""How long a job pauses after an unexpected exception, so that one that comes again does not fill the log."""


async def repeat(step: Callable[[], Awaitable[bool | None]], *, expected: tuple[type[Exception], ...] = ()) -> None:
    """Run a step again and again, until it returns True or the task is cancelled.

    An exception is logged with its stack trace, and the step is run again after `PAUSE_S`.

    :param expected: exceptions that are not logged, and after which the step is run again at once: it has to wait
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
            # A cancellation that is not ours came from something that the step awaited.
            logger.exception("a background job failed and goes on")
            await asyncio.sleep(PAUSE_S)
