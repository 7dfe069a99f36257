"""Batching: concurrent calls become one."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from chatserver.errors import DatabaseRefused, DatabaseUnavailable

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Makes one call for all items submitted in one turn of the event loop, or while the previous call is in progress.

    :param call: takes the items and returns one result for each, in their order
    """

    def __init__(self, call: Callable[[Sequence[Item]], Coroutine[Any, Any, Sequence[Result]]]) -> None:
        self._call = call
        self._submitted: list[tuple[Item, asyncio.Future[Result]]] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """The number of items that wait for the call in progress to return."""
        return len(self._submitted)

    @property
    def is_calling(self) -> bool:
        """Whether a call is in progress."""
        return self._task is not None

    async def submit(self, item: Item) -> Result:
        """Return the result for one item, or raise the call's exception."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Result] = loop.create_future()
        self._submitted.append((item, result))
        if self._task is None:
            self._task = loop.create_task(self._run())
        return await result

    async def _run(self) -> None:
        try:
            while self._submitted:
                batch, self._submitted = self._submitted, []
                await self._resolve(batch)
        finally:
            self._task = None

    async def _resolve(self, batch: Sequence[tuple[Item, asyncio.Future[Result]]]) -> None:
        """Make the call for some items and set their results."""
        results: Sequence[Result] | BaseException
        # `gather` instead of `try`: a CancelledError that the call itself raises fails the items, or their submitters
        # would wait forever; a cancellation of this task is still raised here.
        (results,) = await asyncio.gather(self._call([item for item, _ in batch]), return_exceptions=True)
        if not isinstance(results, BaseException) and len(results) != len(batch):
            results = RuntimeError(f"{len(results)} results for {len(batch)} items")
        if isinstance(results, BaseException):
            is_unavailable = isinstance(results, DatabaseUnavailable) and not isinstance(results, DatabaseRefused)
            if len(batch) > 1 and not is_unavailable:
                # One item alone may have caused the failure.
                await asyncio.gather(*(self._resolve([each]) for each in batch))
                return
            for _, result in batch:
                if not result.done():  # else its submitter was cancelled
                    result.set_exception(results)
        else:
            for (_, result), value in zip(batch, results, strict=True):
                if not result.done():
                    result.set_result(value)
