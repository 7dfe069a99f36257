"""Calls that are asked for in one moment, made as one."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from chatserver.errors import DatabaseRefused, DatabaseUnavailable

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """One call for all that is asked for in one moment, or while the call before it is on its way.

    :param call: is given what was asked for, and returns an answer to each
    """

    def __init__(self, call: Callable[[Sequence[Item]], Coroutine[Any, Any, Sequence[Result]]]) -> None:
        self._call = call
        self._asked: list[tuple[Item, asyncio.Future[Result]]] = []
        self._calling: asyncio.Task[None] | None = None

    async def submit(self, item: Item) -> Result:
        """Return the answer to one."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Result] = loop.create_future()
        self._asked.append((item, answer))
        if self._calling is None:
            self._calling = loop.create_task(self._answer_all())
        return await answer

    async def _answer_all(self) -> None:
        try:
            while self._asked:
                asked, self._asked = self._asked, []
                await self._answer(asked)
        finally:
            self._calling = None

    async def _answer(self, asked: Sequence[tuple[Item, asyncio.Future[Result]]]) -> None:
        results: Sequence[Result] | BaseException
        (results,) = await asyncio.gather(self._call([item for item, _ in asked]), return_exceptions=True)
        if not isinstance(results, BaseException) and len(results) != len(asked):
            results = RuntimeError(f"{len(results)} answers to {len(asked)} questions")
        if isinstance(results, BaseException):
            is_silent = isinstance(results, DatabaseUnavailable) and not isinstance(results, DatabaseRefused)
            if len(asked) > 1 and not is_silent:
                # What is wrong may be wrong with one of them only.
                await asyncio.gather(*(self._answer([each]) for each in asked))
                return
            for _, answer in asked:
                if not answer.done():  # whoever asked was cancelled
                    answer.set_exception(results)
        else:
            for (_, answer), result in zip(asked, results, strict=True):
                if not answer.done():
                    answer.set_result(result)
