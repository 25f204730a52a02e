"""Worker processes: whatever a function does there costs its own derivation, and nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from granite_storage import StoredObjectRef
from granite_storage._portal import portal
from granite_storage.derived import Derivation, DerivationSource, Derived, limit_processes
from granite_storage.derived import processes as module
from granite_storage.derived.processes import Limits, WorkerProcesses, in_background
from granite_storage.exceptions import (
    ConfigurationError,
    DerivationFailedError,
    DerivationRefusedError,
    DerivationUnavailableError,
)
from tests.core.support import PROJECT, eventually
from tests.derived import functions
from tests.derived.support import derive, source_of

MIB = 1 << 20
LIMITS = Limits(timeout=20, max_memory=256 * MIB)


def recipe(function: Any, **options: Any) -> Derived:
    return Derived(function, content_type="text/plain", **{"timeout": 20, "max_memory": 256 * MIB} | options)


@pytest.fixture
async def pool() -> AsyncIterator[WorkerProcesses]:
    """Two processes of the test's own."""
    processes = WorkerProcesses(2)
    yield processes
    await asyncio.to_thread(processes.close)


async def call(pool: WorkerProcesses, function: Callable[..., Any], content: bytes = b"abc", limits: Limits = LIMITS) -> bytes:
    async with pool.run(f"{function.__module__}:{function.__qualname__}", {}, source_of(content), limits) as made:
        return made.content.read_bytes() if isinstance(made.content, Path) else made.content


class TestResults:
    async def test_bytes_text_and_all_that_a_receipt_says(self) -> None:
        assert await derive(recipe(functions.shout), b"abc") == Derivation(b"ABC", "text/plain")
        assert await derive(recipe(functions.count, filename="n.txt"), b"abc") == Derivation(b"3", "text/plain", None, "n.txt")
        expected = Derivation(b"abc", "text/csv", {"pages": 2, "title": "ü"}, "page.csv")
        assert await derive(recipe(functions.describe), b"abc, def") == expected
        assert await derive(recipe(functions.Holder.static), b"ABC") == Derivation(b"abc", "text/plain")

    async def test_the_original_has_a_path_for_other_programs(self) -> None:
        content = os.urandom(3 * MIB)
        assert (await derive(recipe(functions.read_by_program), source_of(content, chunk=100_000))).content == content

    async def test_a_large_result_is_a_file_while_it_is_used(self) -> None:
        async with recipe(functions.lengthen).make(source_of(b"abcd")) as made:
            assert isinstance(made.content, Path)
            assert made.content.stat().st_size == 4_000_000
            assert made.content.read_bytes() == b"abcd" * 1_000_000
        assert not made.content.exists() or made.content.resolve().stat().st_size != 4_000_000

    @given(st.binary(max_size=3000), st.integers(1, 700))
    async def test_what_is_read_is_what_was_stored(self, content: bytes, chunk: int) -> None:
        assert (await derive(recipe(functions.shout), source_of(content, chunk=chunk))).content == content.upper()

    async def test_neither_the_main_module_nor_pillow_is_loaded(self, pool: WorkerProcesses) -> None:
        names = (await call(pool, functions.list_modules)).decode().split()
        assert "granite_storage.derived" in names
        assert not {"PIL", "pyvips", "sqlalchemy", "pytest"} & set(names)


FAILURES: dict[Callable[..., Any], str] = {
    functions.fail: "functions:fail raised ValueError: cannot read this",
    functions.return_nothing: "raised TypeError: it must return bytes, text or a Derivation, not NoneType",
    functions.segfault: "was ended by SIGSEGV",
    functions.abort: "was ended by SIGABRT",
    functions.exit_at_once: "ended with status 3",
    functions.exit_politely: "raised SystemExit: 4",
    functions.interrupt: "raised KeyboardInterrupt",
    functions.eat_memory: "ran out of memory",
    functions.load_library_without_memory: "ran out of memory",
    functions.loop: "took longer than 0.4 s",
    functions.sleep: "took longer than 0.4 s",
    functions.fork_and_hang: "took longer than 0.4 s|ended with status 5",
    functions.close_all: "ended with status",
    functions.close_all_and_hang: "sent no answer that can be read|took longer",
    functions.babble: "sent no answer that can be read|took longer",
    functions.fill_disk: "File too large",
}


class TestFailures:
    @pytest.mark.parametrize("function", FAILURES, ids=lambda function: function.__name__)
    async def test_each_costs_its_own_derivation(self, pool: WorkerProcesses, function: Callable[..., Any]) -> None:
        """Another is in progress in the other process, and one waits."""
        await asyncio.gather(*(call(pool, functions.sleep_a_little) for _ in range(2)))  # both processes have started
        tight = Limits(timeout=0.4 if "longer" in FAILURES[function] else 20, max_memory=128 * MIB, max_size=MIB)
        others = [asyncio.ensure_future(call(pool, functions.sleep_a_little)) for _ in range(2)]
        with pytest.raises(DerivationFailedError, match=FAILURES[function]):
            await call(pool, function, limits=tight)
        assert await asyncio.gather(*others) == [b"abc"] * 2
        assert await call(pool, functions.shout) == b"ABC"

    async def test_what_it_says_of_the_function_is_in_a_note(self) -> None:
        with pytest.raises(DerivationFailedError) as caught:
            await derive(recipe(functions.fail), b"")
        assert 'raise ValueError("cannot read this")' in caught.value.__notes__[0]

    async def test_children_die_with_their_process(self, pool: WorkerProcesses) -> None:
        group = int(await call(pool, functions.name_process))
        with pytest.raises(DerivationFailedError, match="status 5"):
            await call(pool, functions.fork_and_hang)
        await eventually(lambda: not [one for one in psutil.process_iter() if is_in_group(one, group)], within=15)

    async def test_signal_for_a_request_that_was_received(self, pool: WorkerProcesses, tmp_path: Path) -> None:
        """The kernel may signal that bytes have come when the process has taken them already, and is at work."""
        begun = tmp_path / "begun"
        running = asyncio.ensure_future(call(pool, functions.touch_and_sleep, os.fsencode(begun)))
        await asyncio.to_thread(wait_for, begun.exists)
        (worker,) = pool.workers
        worker._socket.send(b"x")  # a signal of the same kind
        assert await running == os.fsencode(begun)

    async def test_a_refusal_keeps_the_process(self, pool: WorkerProcesses) -> None:
        first = await call(pool, functions.name_process)
        with pytest.raises(DerivationRefusedError, match=r"^this is no poem$"):
            await call(pool, functions.refuse)
        assert await call(pool, functions.name_process) == first

    async def test_what_is_printed_goes_nowhere(self, pool: WorkerProcesses, capfd: pytest.CaptureFixture[str]) -> None:
        assert await call(pool, functions.write_to_stdout) == b"abc"
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("kind", ["none", "number", "media", "deep", "type", "name", "long name", "long"])
    async def test_a_strange_result_is_a_failure(self, pool: WorkerProcesses, kind: str) -> None:
        with pytest.raises(DerivationFailedError):
            await call(pool, functions.answer_strangely, kind.encode())
        assert await call(pool, functions.shout) == b"ABC"

    async def test_a_result_over_the_limit(self) -> None:
        with pytest.raises(DerivationFailedError, match="File too large"):
            await derive(recipe(functions.lengthen, max_size=MIB), b"abcd")

    async def test_a_function_that_is_gone(self, pool: WorkerProcesses) -> None:
        with pytest.raises(DerivationFailedError, match="no attribute 'nothing'"):
            async with pool.run("tests.derived.functions:nothing", {}, source_of(b""), LIMITS):
                pass
        with pytest.raises(DerivationFailedError, match="ModuleNotFoundError"):
            async with pool.run("tests.nowhere:nothing", {}, source_of(b""), LIMITS):
                pass

    async def test_no_process_can_be_started(self, pool: WorkerProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "executable", "/nonexistent/python")
        with pytest.raises(DerivationUnavailableError, match="no worker process can be started"):
            await call(pool, functions.shout)
        monkeypatch.setattr(sys, "executable", "/bin/true")
        with pytest.raises(DerivationFailedError, match="ended with status 0"):
            await call(pool, functions.shout)

    @pytest.mark.parametrize("pairs", [0, 1])
    async def test_no_socket_is_left_for_a_process(
        self, pool: WorkerProcesses, monkeypatch: pytest.MonkeyPatch, pairs: int
    ) -> None:
        made: list[socket.socket] = []
        make = socket.socketpair

        def make_some() -> tuple[socket.socket, socket.socket]:
            if len(made) == 2 * pairs:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            made.extend(make())
            return made[-2], made[-1]

        with monkeypatch.context() as patch:
            patch.setattr(socket, "socketpair", make_some)
            with pytest.raises(DerivationUnavailableError, match="no worker process can be started"):
                await call(pool, functions.shout)
        assert {one.fileno() for one in made} <= {-1}
        assert await call(pool, functions.shout) == b"ABC"

    async def test_no_room_for_temporary_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.tempdir", "/nonexistent")
        with pytest.raises(DerivationUnavailableError, match="the folder for temporary files cannot be used: No such file"):
            await derive(recipe(functions.shout), b"")


class TestSources:
    async def test_one_that_is_too_large_is_not_read(self) -> None:
        def refuse_to_open() -> Any:
            raise AssertionError

        source = DerivationSource(StoredObjectRef("files", "memory", "x", 2 * MIB, ""), refuse_to_open)
        with pytest.raises(DerivationRefusedError, match="at most 1048576"):
            await derive(recipe(functions.shout, max_source=MIB), source)

    async def test_one_that_is_longer_than_it_says(self) -> None:
        source = source_of(b"a" * (2 * MIB))
        short = DerivationSource(StoredObjectRef("files", "memory", "x", 1, ""), source.open)
        with pytest.raises(DerivationRefusedError, match="more than 1048576"):
            await derive(recipe(functions.shout, max_source=MIB), short)

    async def test_one_that_fails(self) -> None:
        @contextlib.asynccontextmanager
        async def opened() -> AsyncIterator[AsyncIterator[bytes]]:
            async def chunks() -> AsyncIterator[bytes]:
                yield b"abc"
                raise ConnectionResetError("gone")

            yield chunks()

        with pytest.raises(ConnectionResetError, match="gone"):
            await derive(recipe(functions.shout), DerivationSource(StoredObjectRef("files", "memory", "x", 9, ""), opened))


class TestLeftBehind:
    """What a function has started ends with its process, which is not used again."""

    async def test_a_child(self, pool: WorkerProcesses) -> None:
        process, child = map(int, (await call(pool, functions.leave_a_child)).split())
        assert int(await call(pool, functions.name_process)) != process
        await asyncio.to_thread(wait_for, lambda: not is_running(child))

    async def test_a_thread(self, pool: WorkerProcesses) -> None:
        process = await call(pool, functions.leave_a_thread)
        assert await call(pool, functions.name_process) != process


class TestWaiting:
    """A file that keeps a process busy holds up others for a bounded time, and what nobody waits for holds up nobody."""

    async def test_no_process_is_free(self, pool: WorkerProcesses) -> None:
        slow = [asyncio.create_task(call(pool, functions.sleep)) for _ in range(2)]
        await asyncio.to_thread(wait_for, lambda: len(pool.workers) == 2)
        late = [call(pool, functions.shout, limits=Limits(timeout=0.5)) for _ in range(4)]
        for result in await asyncio.gather(*late, return_exceptions=True):
            assert isinstance(result, DerivationUnavailableError)
            assert str(result).endswith("no worker process was free for 0.5 s")
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        assert await call(pool, functions.shout) == b"ABC"

    async def test_the_background_leaves_a_process_to_others(self, pool: WorkerProcesses) -> None:
        async def in_the_background() -> None:
            in_background.set(True)
            await call(pool, functions.sleep)

        slow = [asyncio.create_task(in_the_background()) for _ in range(6)]
        await asyncio.sleep(0.3)
        assert await call(pool, functions.shout, limits=Limits(timeout=10)) == b"ABC"
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)


class TestMany:
    async def test_a_hundred_share_two_processes(self, pool: WorkerProcesses) -> None:
        mixed = [functions.shout, functions.refuse, functions.shout, functions.exit_at_once, *[functions.shout] * 16] * 5
        results = await asyncio.gather(
            *(call(pool, function, str(number).encode()) for number, function in enumerate(mixed)), return_exceptions=True
        )
        for number, (function, result) in enumerate(zip(mixed, results, strict=True)):
            if function is functions.shout:
                assert result == str(number).encode()
            else:
                assert isinstance(result, DerivationRefusedError | DerivationFailedError)
        assert len(pool.workers) <= 2

    async def test_originals_on_the_disk_are_bounded(self, pool: WorkerProcesses) -> None:
        opened, most = 0, 0

        @contextlib.asynccontextmanager
        async def open_one() -> AsyncIterator[AsyncIterator[bytes]]:
            nonlocal opened, most
            opened += 1
            most = max(most, opened)
            async with source_of(b"abc").open() as chunks:
                yield chunks  # type: ignore[misc]

        async def one() -> None:
            nonlocal opened
            source = DerivationSource(StoredObjectRef("files", "memory", "x", 3, ""), open_one)  # type: ignore[arg-type]
            async with pool.run("tests.derived.functions:sleep_a_little", {}, source, LIMITS):
                opened -= 1

        await asyncio.gather(*(one() for _ in range(24)))
        assert most <= 12  # four, and those that have ended and were not counted down yet

    async def test_event_loops_in_threads_share_the_processes(self, pool: WorkerProcesses) -> None:
        def run() -> None:
            async def several() -> None:
                assert await asyncio.gather(*(call(pool, functions.shout) for _ in range(5))) == [b"ABC"] * 5

            for _ in range(2):
                asyncio.run(several())

        await asyncio.gather(*(asyncio.to_thread(run) for _ in range(3)))
        assert len(pool.workers) <= 2

    async def test_a_program_with_many_open_files(self, pool: WorkerProcesses) -> None:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], min(limits[1], 4096)), limits[1]))
        with contextlib.ExitStack() as stack:
            stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
            highest = 0
            while highest < 1100:
                highest = stack.enter_context(open(os.devnull)).fileno()
            assert await asyncio.gather(*(call(pool, functions.shout) for _ in range(3))) == [b"ABC"] * 3
            assert max(number for worker in pool.workers for number in worker.filenos()) > 1023

    async def test_the_loop_of_synchronous_callers(self) -> None:
        made = await asyncio.to_thread(lambda: portal.run(derive(recipe(functions.shout), b"abc")))
        assert made.content == b"ABC"

    @pytest.mark.time_bound
    async def test_the_loop_turns_meanwhile(self, pool: WorkerProcesses) -> None:
        await call(pool, functions.shout)
        worst, before = 0.0, time.perf_counter()
        calls = asyncio.gather(*(call(pool, functions.sleep_a_little) for _ in range(6)))
        while not calls.done():
            await asyncio.sleep(0.001)
            worst, before = max(worst, time.perf_counter() - before), time.perf_counter()
        await calls
        assert worst < 0.2


class TestCancellation:
    async def test_at_every_turn_of_the_loop(self, pool: WorkerProcesses) -> None:
        """However far it has come, nothing stays behind, and both processes serve the next ones."""
        await call(pool, functions.shout)
        ended = 0
        for turns in range(200):
            task = asyncio.ensure_future(call(pool, functions.shout))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert await task == b"ABC"
                ended += 1
            if ended > 3:
                break
        assert await asyncio.gather(*(call(pool, functions.shout) for _ in range(4))) == [b"ABC"] * 4

    @pytest.mark.parametrize("delay", [0.0, 0.001, 0.003, 0.01, 0.1])
    async def test_a_process_that_hangs_is_killed(self, pool: WorkerProcesses, delay: float) -> None:
        tasks = [asyncio.ensure_future(call(pool, functions.sleep, limits=Limits(timeout=45))) for _ in range(5)]
        await asyncio.sleep(delay)
        for task in tasks:
            task.cancel()
        began = time.monotonic()
        assert all(isinstance(one, asyncio.CancelledError) for one in await asyncio.gather(*tasks, return_exceptions=True))
        assert time.monotonic() - began < 30
        assert await call(pool, functions.shout) == b"ABC"

    async def test_a_result_that_is_in_use(self, pool: WorkerProcesses) -> None:
        async def use() -> None:
            async with pool.run("tests.derived.functions:shout", {}, source_of(b"abc"), LIMITS):
                await asyncio.sleep(60)

        task = asyncio.ensure_future(use())
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


class TestLifetime:
    async def test_nothing_is_started_before_it_is_needed(self, pool: WorkerProcesses) -> None:
        assert not pool.workers
        first = await call(pool, functions.name_process)
        assert [await call(pool, functions.name_process) for _ in range(3)] == [first] * 3

    async def test_idle_processes_end_and_are_waited_for(self) -> None:
        pool = WorkerProcesses(2, idle_timeout=0.2)
        pid = int(await call(pool, functions.name_process))
        await eventually(lambda: not pool.workers and not psutil.pid_exists(pid), within=30)
        assert int(await call(pool, functions.name_process)) != pid
        await asyncio.to_thread(pool.close)

    async def test_a_process_that_died_while_idle_is_replaced(self, pool: WorkerProcesses) -> None:
        pid = int(await call(pool, functions.name_process))
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        assert int(await call(pool, functions.name_process)) != pid

    async def test_a_process_ends_after_many_calls(self, pool: WorkerProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_MOST_JOBS", 2)
        names = [await call(pool, functions.name_process) for _ in range(5)]
        assert len(set(names)) == 3

    async def test_closing(self, pool: WorkerProcesses) -> None:
        await call(pool, functions.shout)
        waiting = asyncio.ensure_future(call(pool, functions.sleep))
        await asyncio.sleep(0.1)
        await asyncio.to_thread(pool.close)
        with pytest.raises(DerivationFailedError, match="SIGKILL"):
            await waiting
        assert not pool.workers
        assert await call(pool, functions.shout) == b"ABC"
        assert not pool.workers

    async def test_limits_are_chosen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_processes", WorkerProcesses(1))
        limit_processes(3, idle_timeout=5)
        assert (module._processes.max_processes, module._processes.idle_timeout) == (3, 5)
        for wrong in (0, -1, 1.5, "2", True):
            with pytest.raises(ConfigurationError, match="max_processes"):
                limit_processes(wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="idle_timeout"):
            limit_processes(idle_timeout=0)
        assert WorkerProcesses().max_processes == min(os.cpu_count() or 1, 4)


PROGRAM = """
import asyncio, os, signal, sys
from granite_storage.derived import Derived
from tests.derived import functions
from tests.derived.support import derive

def run(function, **options):
    return asyncio.run(derive(Derived(function, content_type="text/plain", **options), b"abc")).content.decode()
"""


def program(tmp_path: Path, body: str) -> list[str]:
    (tmp_path / "program.py").write_text(PROGRAM + textwrap.dedent(body))
    return [sys.executable, "-W", "ignore::DeprecationWarning", str(tmp_path / "program.py")]  # of fork, since Python 3.12


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT)}


class TestPrograms:
    def test_a_main_module_without_a_guard_runs_once(self, tmp_path: Path, environment: dict[str, str]) -> None:
        body = "print('begun', flush=True)\nprint(run(functions.shout), run(functions.write_to_stdout))\n"
        done = subprocess.run(program(tmp_path, body), env=environment, capture_output=True, text=True, check=True, timeout=60)
        assert (done.stdout, done.stderr) == ("begun\nABC abc\n", "")

    def test_a_forked_child_has_processes_of_its_own(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """As the workers of gunicorn and Celery, of which each is forked from a process that may have used some."""
        body = """
        first = run(functions.name_process)
        if (child := os.fork()) == 0:
            mine = run(functions.name_process)
            assert mine != first
            print(mine == run(functions.name_process), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(run(functions.name_process) == first)
        """
        done = subprocess.run(program(tmp_path, body), env=environment, capture_output=True, text=True, check=True, timeout=60)
        assert (done.stdout, done.stderr) == ("True\nTrue\n", "")

    @pytest.mark.parametrize("function", ["loop", "sleep", "shout"])
    def test_processes_end_with_an_application_that_is_killed(
        self, tmp_path: Path, environment: dict[str, str], function: str
    ) -> None:
        body = f"""
        pid = run(functions.name_process)
        print(pid, flush=True)
        run(functions.{function})
        import time; time.sleep(600)
        """
        with subprocess.Popen(program(tmp_path, body), env=environment, stdout=subprocess.PIPE, text=True) as running:
            assert running.stdout is not None
            pid = int(running.stdout.readline())
            time.sleep(0.3)
            assert psutil.pid_exists(pid)
            running.kill()
        wait_for(lambda: not is_running(pid))

    def test_the_end_of_a_program_does_not_wait_for_idle_processes(self, tmp_path: Path, environment: dict[str, str]) -> None:
        command = program(tmp_path, "print(run(functions.name_process))")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=30)
        assert done.stderr == ""
        assert not is_running(int(done.stdout))

    def test_ctrl_c_ends_a_program_and_its_processes(self, tmp_path: Path, environment: dict[str, str]) -> None:
        body = """\
            import signal
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without
            print(run(functions.name_process), flush=True)
            run(functions.sleep)
        """
        with subprocess.Popen(
            program(tmp_path, body), env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as running:
            assert running.stdout is not None
            pid = int(running.stdout.readline())
            time.sleep(0.3)
            running.send_signal(signal.SIGINT)
            running.wait(30)
        wait_for(lambda: not is_running(pid))

    def test_importing_loads_no_library_of_images(self, environment: dict[str, str]) -> None:
        code = "import sys, granite_storage.derived; print(sorted({'PIL', 'pyvips', 'sqlalchemy'} & set(sys.modules)))"
        assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout == b"[]\n"


def is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def is_in_group(process: psutil.Process, group: int) -> bool:
    with contextlib.suppress(OSError, psutil.Error):
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
