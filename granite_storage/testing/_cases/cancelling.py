"""Cancelling a call at one of its awaits, chosen by number: the same each time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any, Literal, TypeAlias

__all__ = ["Moment", "cancel_at_every_await"]

Moment: TypeAlias = Literal["at once", "a little later", "twice"]
"""When the cancellation comes: as the call suspends, while it waits, or as it suspends and once more during its clean-up."""

_A_LITTLE = 0.001
_MOST_STEPS = 5000


async def cancel_at_every_await(
    call: Callable[[int], Coroutine[Any, Any, object]], moment: Moment
) -> AsyncIterator[tuple[int, asyncio.Task[object], bool]]:
    """Run a call again and again, cancelling it at its first await, at its second, and so on until it has no further one.

    Args:
        call: Makes the call of a number.
        moment: When the cancellation comes.

    Yields:
        The number, the task, which is done, and whether it was cancelled before it was done.
    """
    for step in range(_MOST_STEPS):
        coroutine = call(step)
        stepped = _Stepped(coroutine, step, moment)
        task = asyncio.ensure_future(_run(stepped))
        if step == 0:
            task.cancel()
        await asyncio.wait([task])
        coroutine.close()
        yield step, task, stepped.struck or step == 0
        if step > stepped.suspensions and step > 0:
            return
    raise AssertionError(f"the call was not done after {_MOST_STEPS} awaits")


async def _run(stepped: _Stepped) -> object:
    return await stepped


class _Stepped:
    """Awaits a coroutine, counts how often it suspends, and cancels the task that runs it at one of the suspensions."""

    def __init__(self, call: Coroutine[Any, Any, object], step: int, moment: Moment) -> None:
        self.suspensions = 0
        self.struck = False
        self._call = call
        self._step = step
        self._moment = moment

    def __await__(self) -> Generator[Any, Any, object]:
        task = asyncio.current_task()
        assert task is not None, "a coroutine is awaited in a task"
        resume: Callable[[Any], Any] = self._call.send
        value: Any = None
        while True:
            try:
                waited = resume(value)
            except StopIteration as end:
                return end.value
            self.suspensions += 1
            self._strike(task)
            try:
                resume, value = self._call.send, (yield waited)
            except BaseException as error:  # noqa: BLE001  # the coroutine decides what becomes of it
                resume, value = self._call.throw, error

    def _strike(self, task: asyncio.Task[object]) -> None:
        later = self._moment == "a little later"
        if self.suspensions == self._step and later:
            asyncio.get_running_loop().call_later(_A_LITTLE, self._cancel, task)
        elif self.suspensions == self._step or (self._moment == "twice" and self.suspensions == self._step + 1):
            self._cancel(task)

    def _cancel(self, task: asyncio.Task[object]) -> None:
        self.struck = task.cancel() or self.struck
