"""Work in threads, and clean-up under cancellation."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import time
import weakref
from collections.abc import Callable
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest

from granite_storage import _threads
from granite_storage._tasks import shielded, shielded_cleanup, wait_uncancelled
from granite_storage._threads import ThreadConsumer, ThreadPool, _pools
from tests.core.support import eventually, in_new_process


@pytest.fixture
def pool() -> ThreadPool:
    return ThreadPool("granite-test", 2)


class Gate:
    """A function that waits in its thread until it is let go."""

    def __init__(self, result: Any = "result") -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.result = result

    def __call__(self) -> Any:
        self.entered.set()
        assert self.open.wait(60)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result

    async def begun(self) -> None:
        await eventually(self.entered.is_set)


async def cancelled(task: asyncio.Future[Any]) -> bool:
    with contextlib.suppress(BaseException):
        await task
    return task.cancelled()


class TestRun:
    async def test_it_returns_and_raises_what_the_function_does(self, pool: ThreadPool) -> None:
        assert await pool.run(int, "7") == 7
        with pytest.raises(ValueError, match="seven"):
            await pool.run(int, "seven")
        error = KeyboardInterrupt("in the thread")
        gate = Gate(error)
        gate.open.set()
        with pytest.raises(KeyboardInterrupt) as caught:
            await pool.run(gate)
        assert caught.value is error

    async def test_a_function_that_was_not_begun_never_runs(self, pool: ThreadPool) -> None:
        gates = [Gate(), Gate()]
        busy = [asyncio.ensure_future(pool.run(gate)) for gate in gates]
        for gate in gates:
            await gate.begun()
        ran: list[int] = []
        waiting = asyncio.ensure_future(pool.run(ran.append, 1))
        await asyncio.sleep(0)
        waiting.cancel()
        assert await cancelled(waiting)
        for gate in gates:
            gate.open.set()
        await asyncio.gather(*busy)
        assert await pool.run(int, "7") == 7
        assert ran == []

    async def test_jobs_that_wait_for_others_get_threads_of_their_own(self) -> None:
        pool = ThreadPool("granite-test", 6)
        gates = [Gate(number) for number in range(6)]
        running = [asyncio.ensure_future(pool.run(gate)) for gate in gates[:5]]
        for gate in gates[:5]:
            await gate.begun()
        pool.submit(gates[5])
        await gates[5].begun()
        for gate in gates:
            gate.open.set()
        assert await asyncio.gather(*running) == [0, 1, 2, 3, 4]

    async def test_two_threads_do_what_is_quick(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_threads, "_STALLED_SECONDS", 600.0)
        pool = ThreadPool("granite-test", 16)
        names = await asyncio.gather(*(pool.run(lambda: threading.current_thread().name) for _ in range(500)))
        assert len(set(names)) <= 2

    async def test_a_cancelled_caller_waits_for_a_function_that_was_begun(self, pool: ThreadPool) -> None:
        gate, undone = Gate(), []
        task = asyncio.ensure_future(pool.run(gate, undo=undone.append))
        await gate.begun()
        try:
            for _ in range(5):
                task.cancel()
                await asyncio.sleep(0.001)
            assert not task.done()
        finally:
            gate.open.set()
        assert await cancelled(task)
        assert undone == ["result"]

    async def test_a_cancellation_after_the_result_undoes_it(self, pool: ThreadPool) -> None:
        undone: list[Any] = []
        gate = Gate()
        task = asyncio.ensure_future(pool.run(gate, undo=undone.append))
        await gate.begun()
        gate.open.set()
        await eventually(lambda: task._fut_waiter is None or task._fut_waiter.done())  # type: ignore[attr-defined]
        task.cancel()
        was_cancelled = await cancelled(task)
        assert undone == (["result"] if was_cancelled else [])

    async def test_a_failed_function_has_nothing_to_undo(self, pool: ThreadPool) -> None:
        gate, undone = Gate(ValueError()), []
        task = asyncio.ensure_future(pool.run(gate, undo=undone.append))
        await gate.begun()
        task.cancel()
        gate.open.set()
        assert await cancelled(task)
        assert undone == []

    async def test_a_failure_to_undo_is_told(self, pool: ThreadPool, caplog: pytest.LogCaptureFixture) -> None:
        gate = Gate()
        task = asyncio.ensure_future(pool.run(gate, undo=lambda _: 1 / 0))
        await gate.begun()
        task.cancel()
        gate.open.set()
        assert await cancelled(task)
        assert "undoing a cancelled call failed" in caplog.text
        assert "ZeroDivisionError" in caplog.text

    async def test_patience_has_an_end(self, pool: ThreadPool, caplog: pytest.LogCaptureFixture) -> None:
        gate = Gate()
        task = asyncio.ensure_future(pool.run(gate, cancel_timeout=0.01))
        await gate.begun()
        task.cancel()
        assert await cancelled(task)
        assert "is still running after 0.01 s" in caplog.text
        gate.open.set()
        assert await pool.run(int, "7") == 7

    async def test_a_call_that_goes_on_is_named(self, pool: ThreadPool, caplog: pytest.LogCaptureFixture) -> None:
        gate = Gate()

        def read(content: bytes) -> Any:
            return gate()

        task = asyncio.ensure_future(pool.run(copy_context().run, read, b"content", cancel_timeout=0.01))
        await gate.begun()
        task.cancel()
        assert await cancelled(task)
        assert f"is still running after 0.01 s: {read!r} of bytes" in caplog.text
        gate.open.set()

    async def test_no_more_threads_than_allowed_and_no_job_forgotten(self, pool: ThreadPool) -> None:
        names: set[str] = set()

        def job(number: int) -> int:
            names.add(threading.current_thread().name)
            return number

        assert await asyncio.gather(*(pool.run(job, number) for number in range(2000))) == list(range(2000))
        assert len(names) <= 2
        assert all(name.startswith("granite-test") for name in names)

    async def test_the_default_executor_is_left_alone(self, pool: ThreadPool) -> None:
        gates = [Gate() for _ in range(50)]
        tasks = [asyncio.ensure_future(pool.run(gate)) for gate in gates]
        assert await asyncio.wait_for(asyncio.to_thread(int, "7"), 60) == 7
        for gate in gates:
            gate.open.set()
        await asyncio.gather(*tasks)

    async def test_a_closed_pool_ends_its_threads_and_works_again(self, pool: ThreadPool) -> None:
        thread = await pool.run(threading.current_thread)
        pool.close()
        gc.collect()
        await eventually(lambda: not thread.is_alive())
        assert await pool.run(int, "7") == 7

    async def test_a_system_without_threads_is_an_error_and_no_later_surprise(
        self, pool: ThreadPool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ran: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", _no_thread)
            for _ in range(5):
                with pytest.raises(RuntimeError, match="can't start"):
                    await pool.run(ran.append, 1)
        assert await asyncio.wait_for(pool.run(int, "7"), 60) == 7
        assert await asyncio.gather(*(pool.run(int, "7") for _ in range(10))) == [7] * 10
        assert ran == []

    async def test_a_job_that_raises_costs_no_worker(self, pool: ThreadPool, caplog: pytest.LogCaptureFixture) -> None:
        def fail() -> None:
            raise SystemExit(1)

        for _ in range(5):
            pool.submit(fail)
        assert await asyncio.gather(*(pool.run(int, "7") for _ in range(10))) == [7] * 10
        await eventually(lambda: caplog.text.count("a job in a thread failed") == 5)

    def test_results_for_a_loop_that_was_closed_are_dropped(self, pool: ThreadPool) -> None:
        gate = Gate()
        loop = asyncio.new_event_loop()
        task = loop.create_task(pool.run(gate))
        loop.run_until_complete(gate.begun())
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is abandoned on purpose
        loop.close()
        gate.open.set()
        assert asyncio.run(pool.run(int, "7")) == 7
        gone = weakref.ref(loop)
        del task, loop
        deadline = time.monotonic() + 10
        while gone() is not None and time.monotonic() < deadline:  # the first thread may still be delivering its result
            gc.collect()
            time.sleep(0.001)
        assert gone() is None

    def test_several_loops_in_threads_are_served(self, pool: ThreadPool) -> None:
        async def use() -> int:
            return sum(await asyncio.gather(*(pool.run(int, "1") for _ in range(200))))

        results: list[int] = []
        threads = [threading.Thread(target=lambda: results.append(asyncio.run(use()))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [200] * 4

    def test_it_survives_a_fork(self, tmp_path: Path) -> None:
        program = """
import asyncio, os, sys, tempfile, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.local import LocalStorageBackend
manager = StorageManager(
    backends={"store": LocalStorageBackend(sys.argv[1])}, policies={"files": StoragePolicy("files", "store")}
)
async def use():
    put = dict(storage_key="files", model_name="m", entity_id="1", field_name="f")
    ref = await manager.put_stream(**put, stream=[b"x" * 3_000_000])
    assert await manager.get(ref) == b"x" * 3_000_000
    return ref.location
first = asyncio.run(use())
child = os.fork()
second = asyncio.run(asyncio.wait_for(use(), 50))
assert first != second
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
        in_new_process(program, tmp_path)

    def test_forgotten_pools_are_not_kept(self) -> None:
        before = len(_pools)
        ThreadPool("granite-test", 1)
        gc.collect()
        assert len(_pools) <= before


def _no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


class TestConsumer:
    async def test_chunks_come_in_order_one_at_a_time(self, pool: ThreadPool) -> None:
        consumed: list[bytes] = []
        consumer = ThreadConsumer(pool, consumed.append, max_pending=100)
        chunks = [bytes([number % 256]) * (number % 7 + 1) for number in range(1000)]
        for chunk in chunks:
            await consumer.feed(chunk)
        await consumer.drain()
        assert consumed == chunks
        assert pool.count(0)
        assert pool._pending == 0

    async def test_no_more_waits_than_allowed(self, pool: ThreadPool) -> None:
        gate = Gate()
        consumer = ThreadConsumer(pool, lambda _: gate(), max_pending=10)
        for _ in range(2):
            await asyncio.wait_for(consumer.feed(b"12345"), 60)
        third = asyncio.ensure_future(consumer.feed(b"12345"))
        await asyncio.sleep(0.02)
        assert not third.done()
        gate.open.set()
        await third
        await consumer.drain()

    async def test_all_consumers_together_are_bounded(self, pool: ThreadPool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("granite_storage._threads._MAX_PENDING", 100)
        gate = Gate()
        consumers = [ThreadConsumer(pool, lambda _: gate(), max_pending=1000) for _ in range(30)]
        feeding = [asyncio.ensure_future(consumer.feed(bytes(10))) for consumer in consumers]
        await asyncio.sleep(0.02)
        assert sum(task.done() for task in feeding) < 10
        gate.open.set()
        await asyncio.gather(*feeding)
        await asyncio.gather(*(consumer.drain() for consumer in consumers))
        assert pool._pending == 0

    async def test_short_ones_that_wait_are_consumed_together_and_in_order(
        self, pool: ThreadPool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ThreadConsumer, "TOGETHER", 10)
        gate, consumed, groups = Gate(), list[bytes](), list[int]()

        def several(chunks: list[bytes]) -> None:
            groups.append(sum(map(len, chunks)))
            consumed.extend(chunks)

        consumer = ThreadConsumer(pool, consumed.append, max_pending=10_000, consume_several=several)
        holding = [asyncio.ensure_future(pool.run(gate)) for _ in range(2)]
        await gate.begun()
        chunks = [bytes([number]) * (number % 13 + 1) for number in range(200)]
        for chunk in chunks:
            await consumer.feed(chunk)
        gate.open.set()
        await asyncio.gather(consumer.drain(), *holding)
        assert consumed == chunks
        assert groups
        assert max(groups) <= 10
        assert pool._pending == 0

    async def test_an_error_among_several_ends_the_work_too(self, pool: ThreadPool) -> None:
        def several(chunks: list[bytes]) -> None:
            raise OSError(28, "full")

        consumer = ThreadConsumer(pool, lambda _: None, max_pending=100, consume_several=several)

        async def feed() -> None:
            for _ in range(100_000):
                await consumer.feed(b"1")
            await consumer.drain()

        with pytest.raises(OSError, match="full"):
            await feed()
        await consumer.stop()
        assert pool._pending == 0

    async def test_an_error_reaches_the_producer_and_ends_the_work(self, pool: ThreadPool) -> None:
        consumed: list[bytes] = []

        def consume(chunk: bytes) -> None:
            if len(consumed) == 2:
                raise OSError(28, "full")
            consumed.append(chunk)

        consumer = ThreadConsumer(pool, consume, max_pending=3)

        async def feed() -> None:
            for _ in range(1000):
                await consumer.feed(b"1")

        with pytest.raises(OSError, match="full"):
            await feed()
        for _ in range(2):
            with pytest.raises(OSError, match="full"):
                await consumer.drain()
        await consumer.stop()
        assert len(consumed) == 2
        assert pool._pending == 0

    async def test_stopping_drops_what_waits_and_leaves_no_thread_at_work(self, pool: ThreadPool) -> None:
        gate, consumed = Gate(), []

        def consume(chunk: bytes) -> None:
            gate()
            consumed.append(chunk)

        consumer = ThreadConsumer(pool, consume, max_pending=1000)
        for number in range(10):
            await consumer.feed(bytes([number]))
        await gate.begun()
        stopping = asyncio.ensure_future(consumer.stop())
        for _ in range(3):
            await asyncio.sleep(0.002)
            stopping.cancel()
        assert not stopping.done()
        gate.open.set()
        assert await cancelled(stopping)
        assert consumed == [b"\0"]
        assert pool._pending == 0
        await consumer.stop()

    async def test_stopping_an_idle_one_does_not_suspend(self, pool: ThreadPool) -> None:
        consumer = ThreadConsumer(pool, lambda _: None, max_pending=10)
        await consumer.feed(b"1")
        await consumer.drain()
        with pytest.raises(StopIteration):
            consumer.stop().send(None)

    async def test_many_share_a_few_threads_fairly(self, pool: ThreadPool) -> None:
        """One that always has work does not keep the others from theirs."""
        order: list[str] = []
        greedy = [ThreadConsumer(pool, lambda _: order.append("greedy"), max_pending=10_000) for _ in range(2)]
        gates = [Gate(), Gate()]
        holding = [asyncio.ensure_future(pool.run(gate)) for gate in gates]
        for gate in gates:
            await gate.begun()
        for consumer in greedy:
            for _ in range(500):
                await consumer.feed(b"1")
        late = ThreadConsumer(pool, lambda _: order.append("late"), max_pending=10)
        await late.feed(b"1")
        for gate in gates:
            gate.open.set()
        await asyncio.gather(late.drain(), *(consumer.drain() for consumer in greedy), *holding)
        assert order.index("late") < 200

    def test_a_loop_that_was_closed_is_not_waited_for(self, pool: ThreadPool) -> None:
        gate = Gate()
        loop = asyncio.new_event_loop()

        async def begin() -> asyncio.Task[None]:
            consumer = ThreadConsumer(pool, lambda _: gate(), max_pending=1)
            task = asyncio.ensure_future(consumer.feed(b"12"))
            await gate.begun()
            await asyncio.sleep(0)
            return task

        task = loop.run_until_complete(begin())
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is abandoned on purpose
        loop.close()
        gate.open.set()
        assert asyncio.run(asyncio.wait_for(_use(pool), 60)) == [7] * 10


async def _use(pool: ThreadPool) -> list[int]:
    return await asyncio.gather(*(pool.run(int, "7") for _ in range(10)))


async def slow(seconds: float, result: Any = None) -> Any:
    await asyncio.sleep(seconds)
    if isinstance(result, BaseException):
        raise result
    return result


class TestCleanUp:
    @pytest.mark.case("CAN-04")
    @pytest.mark.parametrize("call", [lambda: shielded(slow(0.02)), lambda: shielded_cleanup(slow(0.02), "a clean-up")])
    @pytest.mark.parametrize("times", [1, 2, 5])
    async def test_it_ends_before_the_cancellation_goes_on(self, call: Callable[[], Any], times: int) -> None:
        task = asyncio.ensure_future(call())
        began = time.monotonic()
        for number in range(times):
            await asyncio.sleep(0)
            task.cancel(f"number {number}")
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert time.monotonic() - began >= 0.019
        assert caught.value.args[0].startswith("number")

    async def test_what_a_cancelled_caller_does_not_hear_of_is_undone(self) -> None:
        undone: list[int] = []

        async def undo(result: int) -> None:
            undone.append(result)

        assert await shielded(slow(0, 7), undo=undo) == 7
        assert undone == []
        for result in (8, ValueError("of the work")):
            task = asyncio.ensure_future(shielded(slow(0.01, result), undo=undo))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert undone == [8]

    async def test_without_a_cancellation_it_returns(self) -> None:
        assert await shielded(slow(0, 7)) == 7
        await shielded_cleanup(slow(0), "a clean-up")
        with pytest.raises(ValueError, match="of the work"):
            await shielded(slow(0, ValueError("of the work")))

    async def test_a_failed_clean_up_is_logged_and_hides_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        async def work() -> None:
            try:
                raise KeyError("the error")
            finally:
                await shielded_cleanup(slow(0, ValueError("of the clean-up")), "tidying")

        with pytest.raises(KeyError):
            await work()
        assert "tidying failed" in caplog.text
        assert "of the clean-up" in caplog.text

    async def test_a_clean_up_has_its_time(self, caplog: pytest.LogCaptureFixture) -> None:
        await shielded_cleanup(slow(100), "tidying", timeout=0.01)
        assert "tidying did not end within 0.01 s" in caplog.text

    async def test_a_clean_up_that_was_cancelled_itself_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        await shielded_cleanup(slow(0, asyncio.CancelledError()), "tidying")
        assert "tidying failed" in caplog.text

    async def test_settling_tells_whether_it_is_done(self) -> None:
        future = asyncio.get_running_loop().create_future()
        assert not await wait_uncancelled(future, 0.01)
        future.set_exception(ValueError("seen"))
        assert await wait_uncancelled(future)

    @pytest.mark.case("CAN-03")
    async def test_the_count_of_cancellations_is_kept(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await shielded_cleanup(slow(0.02), "a clean-up")
        assert task.cancelling() == 0
        await asyncio.sleep(0)
