"""Work side by side: how many at a time, in which order the results come, and what an error or a cancellation leaves."""

from __future__ import annotations

import asyncio

import pytest

from granite_storage._tasks import run_bounded


class Work:
    """Counts what runs at a time, and which of it has ended."""

    def __init__(self) -> None:
        self.running = self.most = 0
        self.ended: list[int] = []

    async def __call__(self, number: int) -> int:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0.001 * (10 - abs(number) % 10))
            if number < 0:
                raise ValueError(f"{number} is negative")
            return number * 2
        finally:
            self.running -= 1
            self.ended.append(number)


@pytest.mark.parametrize("limit", [1, 3, 100])
async def test_results_are_in_the_order_of_the_items(limit: int) -> None:
    work = Work()
    assert await run_bounded(iter(range(10)), work, limit) == [number * 2 for number in range(10)]
    assert work.most == min(limit, 10)


async def test_nothing_to_do() -> None:
    assert await run_bounded([], Work(), 3) == []


async def test_an_error_ends_the_rest_and_is_raised_as_it_is() -> None:
    work = Work()
    with pytest.raises(ValueError, match="-90 is negative"):
        await run_bounded([9, -90, *range(9)], work, 2)
    assert work.running == 0
    assert len(work.ended) < 10


async def test_an_error_keeps_its_cause() -> None:
    async def fail(_: int) -> None:
        raise ValueError("translated") from OSError("of the system")

    with pytest.raises(ValueError, match="translated") as caught:
        await run_bounded([1, 2], fail, 2)
    assert isinstance(caught.value.__cause__, OSError)


async def test_a_cancelled_caller_leaves_nothing_running() -> None:
    work = Work()
    task = asyncio.create_task(run_bounded(range(9), work, 3))
    await asyncio.sleep(0.002)
    assert work.running == 3
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.running == 0
    assert len(work.ended) == 3
