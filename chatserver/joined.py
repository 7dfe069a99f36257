"""Calls that are asked for in one moment, made as one."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from chatserver.errors import DatabaseUnavailable

Item = TypeVar("Item")
Result = TypeVar("Result")


class Joined(Generic[Item, Result]):
    """One call for all that is asked for in one moment, or while the call before it is on its way.

    :param call: is given what was asked for, and returns an answer to each
    """

    def __init__(self, call: Callable[[Sequence[Item]], Coroutine[Any, Any, Sequence[Result]]]) -> None:
        self._call = call
        self._calling = asyncio.Lock()
        self._next: tuple[list[Item], asyncio.Task[Sequence[Result]]] | None = None

    async def ask(self, item: Item) -> Result:
        """Return the answer to one."""
        if self._next is None:
            items: list[Item] = []
            answers = asyncio.get_running_loop().create_task(self._run(items))
            # It may fail when nobody asks any more.
            answers.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._next = (items, answers)
        items, answers = self._next
        items.append(item)
        place = len(items) - 1
        try:
            return (await asyncio.shield(answers))[place]
        except DatabaseUnavailable:
            raise
        except Exception:
            if len(items) == 1:
                raise
            # What is wrong may be wrong with another one only.
            return (await self._call([item]))[0]

    async def _run(self, items: Sequence[Item]) -> Sequence[Result]:
        async with self._calling:
            self._next = None
            return await self._call(items)
