"""Work side by side, and work that is repeated: how much at a time, when, and what an error or a cancellation leaves."""

from __future__ import annotations

import asyncio
import contextlib

import anyio
import pytest

from granite_storage._tasks import UnexpectedExitError, background, contained, is_cancellation, repeat, run_bounded
from tests.core.support import eventually


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


async def test_after_an_error_the_caller_is_not_cancelling() -> None:
    task = asyncio.current_task()
    with pytest.raises(ValueError, match="-90 is negative"):
        await run_bounded([9, -90], Work(), 2)
    assert task is not None
    assert task.cancelling() == 0


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


async def await_what_others_cancel() -> None:
    """Await a task that somebody else has cancelled."""
    task = asyncio.ensure_future(asyncio.sleep(3600))
    await asyncio.sleep(0)
    task.cancel()
    await task


class TestEndsThatWereNotAskedFor:
    @pytest.mark.parametrize(
        "error", [asyncio.CancelledError(), GeneratorExit(), BaseException("x"), BaseExceptionGroup("g", [GeneratorExit()])]
    )
    async def test_they_are_errors(self, error: BaseException) -> None:
        problem = f"the recipe raised {type(error).__name__}, but nothing had cancelled it"
        with pytest.raises(UnexpectedExitError, match=problem) as caught, contained("the recipe"):
            raise error
        assert caught.value.__cause__ is error

    async def test_a_task_that_others_cancel(self) -> None:
        with pytest.raises(UnexpectedExitError, match="CancelledError"), contained("the recipe"):
            await await_what_others_cancel()

    @pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), SystemExit(3)])
    async def test_what_passes_through(self, error: BaseException) -> None:
        with pytest.raises(type(error)) as caught, contained("the recipe"):
            raise error
        assert caught.value is error

    async def test_what_ends_the_program_comes_out_of_a_group(self) -> None:
        end = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt) as caught, contained("the recipe"):
            raise BaseExceptionGroup("g", [ValueError("x"), BaseExceptionGroup("h", [end])])
        assert caught.value is end

    async def test_a_thread_has_no_task_that_is_cancelled(self) -> None:
        def call() -> None:
            with contained("the function"):
                raise asyncio.CancelledError

        with pytest.raises(UnexpectedExitError):
            await asyncio.to_thread(call)

    async def test_cancellations_of_the_caller(self) -> None:
        async def wait() -> bool:
            try:
                with contained("the recipe"):
                    await asyncio.sleep(3600)
            except asyncio.CancelledError as error:
                return is_cancellation(error)
            return False

        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        task.cancel()
        assert await task
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                with contained("the recipe"):
                    await asyncio.sleep(3600)
        with anyio.move_on_after(0.001) as scope, contained("the recipe"):
            await asyncio.sleep(3600)
        assert scope.cancelled_caught
        assert not is_cancellation(asyncio.CancelledError())

    async def test_a_coroutine_that_is_closed(self) -> None:
        async def wait() -> None:
            with contained("the recipe"):
                await asyncio.sleep(3600)

        coroutine = wait()

        async def begin() -> None:
            coroutine.send(None)

        await asyncio.create_task(begin())
        coroutine.close()

    async def test_concurrent_work(self) -> None:
        """A task group takes no notice of a child that is cancelled, and the caller would be cancelled by its result."""

        async def work(number: int) -> None:
            if number == 1:
                await await_what_others_cancel()
            await asyncio.sleep(3600)

        with pytest.raises(UnexpectedExitError):
            await asyncio.wait_for(run_bounded(range(3), work, 3), 20)


@pytest.mark.parametrize("error", [asyncio.CancelledError(), GeneratorExit(), BaseException("x")])
async def test_an_end_that_was_not_asked_for_does_not_end_the_repetition(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    count = 0

    async def work() -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise error

    async with background(repeat(work, 0.001, "looking")):
        await eventually(lambda: count >= 4)
    assert f"looking raised {type(error).__name__}, but nothing had cancelled it" in caplog.text


class Runs:
    """Counts runs, and lets one of them fail."""

    def __init__(self, failing: int = 0) -> None:
        self.count = 0
        self.failing = failing

    async def __call__(self) -> None:
        self.count += 1
        if self.count == self.failing:
            raise ConnectionRefusedError("nobody is there")


async def test_an_error_is_logged_and_the_next_run_comes(caplog: pytest.LogCaptureFixture) -> None:
    runs = Runs(failing=2)
    async with background(repeat(runs, 0.001, "looking")):
        await eventually(lambda: runs.count >= 4)
    assert "looking failed and will be retried" in caplog.text
    assert "nobody is there" in caplog.text


@pytest.mark.timeout(20)
async def test_work_that_swallows_a_cancellation_is_not_begun_again() -> None:
    """As a driver of a database may do, which is cancelled while it waits for an answer."""
    begun = asyncio.Event()

    async def work() -> None:
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)

    async with background(repeat(work, 3600, "working")):
        await begun.wait()


async def test_the_interval_lies_between_the_end_of_a_run_and_the_next_one() -> None:
    loop, times = asyncio.get_running_loop(), list[float]()

    async def work() -> None:
        times.append(loop.time())
        await asyncio.sleep(0.02)
        times.append(loop.time())

    async with background(repeat(work, 0.03, "working")):
        await eventually(lambda: len(times) >= 6)
    assert all(times[index + 1] - times[index] >= 0.029 for index in (1, 3))


@pytest.mark.parametrize("has_event", [True, False])
async def test_intervals_differ_by_the_jitter(monkeypatch: pytest.MonkeyPatch, has_event: bool) -> None:
    bounds: list[tuple[float, float]] = []

    def uniform(least: float, most: float) -> float:
        bounds.append((least, most))
        return 0.001

    monkeypatch.setattr("granite_storage._tasks.random.uniform", uniform)
    runs = Runs()
    async with background(repeat(runs, 1.0, "looking", jitter=0.25, wake=asyncio.Event() if has_event else None)):
        await eventually(lambda: runs.count >= 3)
    assert set(bounds) == {(0.75, 1.25)}


async def test_an_event_begins_the_next_run_early() -> None:
    runs, wake = Runs(), asyncio.Event()
    async with background(repeat(runs, 3600, "looking", wake=wake)):
        for count in range(1, 4):
            await eventually(lambda count=count: runs.count == count)
            await asyncio.sleep(0.01)
            assert runs.count == count
            wake.set()


async def test_an_event_that_is_set_during_a_run_is_not_lost() -> None:
    wake, count = asyncio.Event(), 0

    async def work() -> None:
        nonlocal count
        count += 1
        if count == 1:
            wake.set()

    async with background(repeat(work, 3600, "looking", wake=wake)):
        await eventually(lambda: count == 2)


async def test_an_event_does_not_shorten_the_rest() -> None:
    runs, wake = Runs(), asyncio.Event()
    async with background(repeat(runs, 3600, "looking", wake=wake, rest=0.05)):
        await eventually(lambda: runs.count == 1)
        wake.set()
        await asyncio.sleep(0.02)
        assert runs.count == 1
        await eventually(lambda: runs.count == 2)


@pytest.mark.parametrize("at", ["work", "rest", "interval", "event"])
async def test_a_cancellation_ends_it_promptly(at: str, caplog: pytest.LogCaptureFixture) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            if at == "work":
                await asyncio.sleep(3600)
        finally:
            ended.set()

    wake = asyncio.Event() if at == "event" else None
    async with asyncio.timeout(5):
        async with background(repeat(work, 3600, "working", wake=wake, rest=3600 if at == "rest" else 0)):
            await begun.wait()
            await asyncio.sleep(0.01)
    assert ended.is_set()
    assert not caplog.records


async def test_the_end_of_a_block_waits_for_its_tasks() -> None:
    ended: list[int] = []

    async def work(number: int) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(0.01)
            ended.append(number)

    with pytest.raises(KeyError):
        async with background(work(1), work(2)):
            await asyncio.sleep(0)
            raise KeyError
    assert sorted(ended) == [1, 2]
