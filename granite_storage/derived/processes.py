"""Worker processes for functions that read hostile files: one that crashes, hangs or eats memory costs one derivation.

Each call has a thread of this process, which waits for the worker's answer; so the processes serve all event loops together, and
depend on none. Cancelling a call kills its process. The alternatives were weighed in 2026:

- `concurrent.futures.ProcessPoolExecutor` fails all calls in progress when one process dies, and cannot end a call.
- `anyio.to_process` runs the application's main module in each process, has a pool for each event loop, sets no limits, and
  unpickles what comes back: a decoder that a hostile file has taken over could run code in the application. So does the former.
- `asyncio.create_subprocess_exec` ties a process to one event loop, which may be closed before the next call.

The processes are no sandbox: they run as the same user, with the same environment and network; put the application into a
container where decoders must not see more than their files.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from granite_storage._tasks import shielded_cleanup, wait_uncancelled
from granite_storage._threads import ThreadPool
from granite_storage.derived import _worker
from granite_storage.derived.base import Derivation, DerivationSource
from granite_storage.exceptions import (
    DerivationFailedError,
    DerivationRefusedError,
    DerivationUnavailableError,
    InvalidReferenceError,
)
from granite_storage.inspection.base import require_positive
from granite_storage.refs import read_only

logger: logging.Logger = logging.getLogger("granite_storage")

MIB = 1 << 20
_MOST_JOBS = 500
_MOST_TEXT = 255
_INLINE_RESULT = MIB
_POLL_SECONDS = 0.5
_START_SECONDS = 30.0
_EXIT_SECONDS = 0.5

_NO_PROCESS = "no worker process was free for {:g} s"

in_background: ContextVar[bool] = ContextVar("granite_derived_in_background", default=False)
"""Whether a worker derives, so that no caller waits for the result."""

_file_threads = ThreadPool("granite-derived-file", 4)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may use.

    Attributes:
        timeout: Seconds, of time and of processor time.
        max_memory: Bytes of private memory of the process, its interpreter and modules included.
        max_source: Bytes of the original.
        max_size: Bytes of the result, and of any file that the function writes.
    """

    timeout: float = 60.0
    max_memory: int = 1024 * MIB
    max_source: int = 256 * MIB
    max_size: int = 64 * MIB

    def __post_init__(self) -> None:
        require_positive("timeout", self.timeout, (int, float))
        for name in ("max_memory", "max_source", "max_size"):
            require_positive(name, getattr(self, name))


_Semaphores: TypeAlias = dict[bool, tuple[asyncio.Semaphore, ...]]
"""What calls on one event loop wait for, by whether they are in the background."""


def _make_semaphores(max_processes: int) -> _Semaphores:
    place = asyncio.Semaphore(2 * max_processes)
    return {False: (place,), True: (asyncio.Semaphore(max(1, max_processes - 1)), place)}


class WorkerProcesses:
    """A bounded number of worker processes, started when first needed, reused, and ended when idle.

    It serves any number of event loops and threads. A forked child makes its own; processes end with the application, also
    where that is killed.

    Args:
        max_processes: The most processes; by default one for each processor, at most 4.
        idle_timeout: After how many seconds without work a process ends.
    """

    def __init__(self, max_processes: int | None = None, idle_timeout: float = 60.0) -> None:
        self.max_processes: int = min(os.cpu_count() or 1, 4) if max_processes is None else max_processes
        self.idle_timeout = idle_timeout
        require_positive("max_processes", self.max_processes)
        require_positive("idle_timeout", idle_timeout, (int, float))
        self._threads = ThreadPool("granite-derived", self.max_processes)
        self._reset()
        _all_processes.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self.workers: set[_Worker] = set()
        self._is_closed = False
        self._semaphores: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Semaphores] = weakref.WeakKeyDictionary()
        self._watched: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, float] = weakref.WeakKeyDictionary()

    def forget(self) -> None:
        """Let go of the parent's processes, in a forked child: they end when the parent closes its sockets."""
        for worker in self.workers:
            worker.forget()
        self._reset()

    @asynccontextmanager
    async def run(
        self, function: str, arguments: Mapping[str, Any], source: DerivationSource, limits: Limits
    ) -> AsyncIterator[Derivation]:
        """Call a function with the original, as a binary file, in a process; yield what it returns.

        Args:
            function: `module:qualname`.
            arguments: Further arguments, JSON values.
            source: The original; it is copied to a file without a name in the folder for temporary files.
            limits: What the call may use.

        Raises:
            DerivationRefusedError: The function raised it, or the original is too large.
            DerivationFailedError: The process died or was killed at a limit, or the function raised something else.
            DerivationUnavailableError: No process was free for as long as the call may take, or nothing could be attempted.
        """
        if source.ref.size > limits.max_source:
            raise DerivationRefusedError(f"the file has {source.ref.size} bytes; at most {limits.max_source} can be processed")
        files = await _use_disk(_Files, undo=_Files.close)
        try:
            async with self._place(limits.timeout):
                await _copy(source, files.source, limits.max_source)
                found = await self._call(function, arguments, files, limits)
            yield await _use_disk(_read_result, files.result, found, limits.max_size)
        finally:
            await shielded_cleanup(_file_threads.run(files.close), "closing temporary files")

    def close(self) -> None:
        """End all processes; calls in progress fail, and later ones start processes of their own, which serve one call each."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            workers = list(self.workers)
        for worker in workers:
            worker.kill()
        for worker in idle:
            self._dispose(worker)

    @asynccontextmanager
    async def _place(self, timeout: float) -> AsyncIterator[None]:
        """Bound how many originals lie on the disk: those that are processed, and as many that are about to be.

        What is in the background leaves a process to others, where there are several.
        """
        semaphores = self._semaphores.setdefault(asyncio.get_running_loop(), _make_semaphores(self.max_processes))
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(timeout):
                    for one in semaphores[in_background.get()]:
                        await stack.enter_async_context(one)
            except TimeoutError as error:
                raise DerivationUnavailableError(_NO_PROCESS.format(timeout)) from error
            yield

    async def _call(self, function: str, arguments: Mapping[str, Any], files: _Files, limits: Limits) -> dict[str, Any]:
        request = {
            "function": function,
            "arguments": dict(arguments),
            "parent": os.getpid(),
            **asdict(limits),
        }
        call = _Call(self, request, [files.source.fileno(), files.result.fileno()])
        running = asyncio.ensure_future(self._threads.run(call.perform))
        try:
            answer = await asyncio.shield(running)
        except asyncio.CancelledError:
            call.cancel()
            await wait_uncancelled(running)
            raise
        finally:
            self._watch()
        if isinstance(refusal := answer.get("refused"), str):
            raise DerivationRefusedError(refusal)
        if "error" in answer:
            error = DerivationFailedError(f"the derivation failed: {answer['error']}")
            if answer.get("traceback"):
                error.add_note(f"In the worker process:\n{answer['traceback']}")
            raise error
        return answer

    def _watch(self) -> None:
        """Wait for processes that end because they are idle, at most once a second; on a closed loop the next call does it."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._watched.get(loop, -1.0) >= 1:
            self._watched[loop] = loop.time()
            loop.call_later(self.idle_timeout + 1, self._threads.submit, self._dispose_expired)

    def take(self) -> _Worker:
        """Return an idle process or a new one; in a thread."""
        self._dispose_expired()
        with self._lock:
            if self._idle:
                return self._idle.pop()
        worker = _Worker(self.idle_timeout)
        with self._lock:
            self.workers.add(worker)
        return worker

    def give_back(self, worker: _Worker, is_healthy: bool) -> None:
        """Keep a process for the next call, or end it; in a thread."""
        worker.idle_since = time.monotonic()
        worker.jobs += 1
        with self._lock:
            keep = is_healthy and not self._is_closed and worker.jobs < _MOST_JOBS
            if keep:
                self._idle.append(worker)
        if not keep:
            self._dispose(worker)

    def _dispose_expired(self) -> None:
        # A process ends by itself after the idle time; shortly before that, it is not used any more.
        before = time.monotonic() - max(0.5 * self.idle_timeout, self.idle_timeout - 1)
        with self._lock:
            expired = [worker for worker in self._idle if worker.idle_since < before or worker.has_ended()]
            self._idle = [worker for worker in self._idle if worker not in expired]
        for worker in expired:
            self._dispose(worker)

    def _dispose(self, worker: _Worker) -> None:
        with self._lock:
            self.workers.discard(worker)
        worker.dispose()


_all_processes: weakref.WeakSet[WorkerProcesses] = weakref.WeakSet()


def _forget_all() -> None:
    for processes in _all_processes:
        processes.forget()


def close_all() -> None:
    """End the worker processes of this process; later calls start others."""
    for processes in _all_processes:
        processes.close()


os.register_at_fork(after_in_child=_forget_all)
atexit.register(close_all)

_processes = WorkerProcesses()


def limit_processes(max_processes: int | None = None, *, idle_timeout: float = 60.0) -> None:
    """Set the maximum number of worker processes of this process, before the first derivation.

    Args:
        max_processes: The most processes; by default one for each processor, at most 4. Each server process has its own.
        idle_timeout: After how many seconds without work a process ends.

    Raises:
        ConfigurationError: One is not a positive number.
    """
    global _processes
    before, _processes = _processes, WorkerProcesses(max_processes, idle_timeout)
    before.close()


def run_in_process(function: str, arguments: Mapping[str, Any], source: DerivationSource, limits: Limits) -> Any:
    """Do as `WorkerProcesses.run`, in the processes that this process has."""
    return _processes.run(function, arguments, source, limits)


class _Files:
    """The original and the result, in files that have no name, so that none is left behind even by a process that is killed."""

    def __init__(self) -> None:
        with ExitStack() as stack:
            self.source: IO[bytes] = stack.enter_context(tempfile.TemporaryFile(prefix="granite-"))
            self.result: IO[bytes] = stack.enter_context(tempfile.TemporaryFile(prefix="granite-"))
            stack.pop_all()

    def close(self) -> None:
        with suppress(OSError):  # what is still to be written no longer matters
            self.source.close()
        self.result.close()


async def _use_disk(function: Any, *args: Any, undo: Any = None) -> Any:
    try:
        return await _file_threads.run(function, *args, undo=undo)
    except OSError as error:
        raise DerivationUnavailableError(f"the folder for temporary files cannot be used: {error.strerror}") from error


async def _copy(source: DerivationSource, file: IO[bytes], max_source: int) -> None:
    size = 0
    async with source.open() as chunks:
        async for chunk in chunks:
            size += len(chunk)
            if size > max_source:
                raise DerivationRefusedError(f"the file has more than {max_source} bytes, the most that can be processed")
            await _use_disk(file.write, chunk)
    await _use_disk(_rewind, file)


def _rewind(file: IO[bytes]) -> None:
    file.flush()
    file.seek(0)


def _read_result(file: IO[bytes], found: dict[str, Any], max_size: int) -> Derivation:
    size = os.fstat(file.fileno()).st_size
    if size > max_size:
        raise DerivationFailedError(f"the derivation failed: its result has {size} bytes, more than {max_size}")
    file.seek(0)
    content = file.read() if size <= _INLINE_RESULT else Path(_path_of(file.fileno()))
    content_type, media, filename = (found.get(name) for name in ("content_type", "media", "filename"))
    try:
        media = None if media is None else read_only(media, "media")
    except InvalidReferenceError as error:
        raise DerivationFailedError(f"the derivation failed: {error}") from error
    for text in (content_type, filename):
        if text is not None and not (isinstance(text, str) and text.isprintable() and len(text) <= _MOST_TEXT):
            raise DerivationFailedError(f"the derivation failed: {text!r:.80} is neither a media type nor a file name")
    return Derivation(content, content_type or "", media, filename)


def _path_of(descriptor: int) -> str:
    path = f"/proc/self/fd/{descriptor}"
    return path if os.path.exists(path) else f"/dev/fd/{descriptor}"


class _Call:
    """One call of a function, in a thread, and its end from the event loop."""

    def __init__(self, processes: WorkerProcesses, request: dict[str, Any], descriptors: list[int]) -> None:
        self._processes = processes
        self._request = request
        self._descriptors = descriptors
        self._deadline = time.monotonic() + request["timeout"]
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._is_cancelled = False

    def perform(self) -> dict[str, Any]:
        """Call the function and return the answer."""
        if time.monotonic() > self._deadline:
            raise DerivationUnavailableError(_NO_PROCESS.format(self._request["timeout"]))
        worker = self._processes.take()
        is_healthy = False
        try:
            with self._lock:
                self._worker = worker
                if self._is_cancelled:
                    return {"error": "it was cancelled"}
            answer = worker.ask(self._request, self._descriptors)
            is_healthy = not answer.pop("is_worn", False)
            return answer
        finally:
            with self._lock:
                self._worker = None
                is_healthy = is_healthy and not self._is_cancelled
            self._processes.give_back(worker, is_healthy)

    def cancel(self) -> None:
        """Kill the process that is at work."""
        with self._lock:
            self._is_cancelled = True
            if self._worker is not None:
                self._worker.kill()


def _start(*descriptors: int) -> subprocess.Popen[bytes]:
    """Start a process that inherits descriptors, and whose arguments they are."""
    return subprocess.Popen(  # noqa: S603  # our own program
        [sys.executable, "-IB" if sys.dont_write_bytecode else "-I", _worker.__file__, *map(str, descriptors)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=descriptors,
        start_new_session=True,  # a group of its own, to be killed with its children, out of reach of Ctrl-C
    )


class _Worker:
    """A process, the socket to it, and another one whose end the process does not outlive."""

    def __init__(self, idle_timeout: float) -> None:
        self.jobs = 0
        self.idle_since: float = time.monotonic()
        self._is_disposed = False
        try:
            with ExitStack() as on_failure:
                self._socket, channel = socket.socketpair()
                on_failure.enter_context(self._socket)
                with channel:
                    self._lifeline, lifeline = socket.socketpair()
                    on_failure.enter_context(self._lifeline)
                    with lifeline:
                        self._process = _start(channel.fileno(), lifeline.fileno())
                on_failure.pop_all()
        except OSError as error:
            raise DerivationUnavailableError("no worker process can be started") from error
        self._socket.settimeout(_START_SECONDS)
        with suppress(OSError):  # it has died already, which the first call finds
            self._send({"path": [os.path.abspath(path) for path in sys.path], "idle": idle_timeout}, [])

    def ask(self, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """Send a request and return the answer, or what became of the process."""
        deadline = time.monotonic() + request["timeout"]
        try:
            self._send(request, descriptors)
            size = _worker.HEADER.unpack(self._receive(_worker.HEADER.size, deadline))[0]
            if size > _worker.MOST_ANSWER:
                raise ValueError(f"the answer has {size} bytes, more than {_worker.MOST_ANSWER}")
            answer = json.loads(self._receive(size, deadline))
            if not isinstance(answer, dict):
                raise ValueError("the answer is not a JSON object")
        except TimeoutError:
            return {"error": f"{request['function']} took longer than {request['timeout']:g} s", "is_worn": True}
        except (OSError, EOFError, ValueError, RecursionError):
            return {"error": f"the process of {request['function']} {self._describe_end()}", "is_worn": True}
        return answer

    def _describe_end(self) -> str:
        try:
            status = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return "sent no answer that can be read"
        if status >= 0:
            return f"ended with status {status}"
        by_limit = {signal.SIGXCPU: "used too much processor time", signal.SIGALRM: "took too long"}
        return by_limit.get(signal.Signals(-status), f"was ended by {signal.Signals(-status).name}")

    def _send(self, request: dict[str, Any], descriptors: list[int]) -> None:
        body = json.dumps(request).encode()
        socket.send_fds(self._socket, [_worker.HEADER.pack(len(body))], descriptors)
        self._socket.sendall(body)

    def _receive(self, size: int, deadline: float) -> bytes:
        received = bytearray()
        while len(received) < size:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            # The socket stays open where a child of the process holds it; so the process is watched, too.
            if not self._is_readable(min(left, _POLL_SECONDS)):
                if self._process.poll() is not None:
                    raise EOFError
                continue
            piece = self._socket.recv(size - len(received))
            if not piece:
                raise EOFError
            received += piece
        return bytes(received)

    def filenos(self) -> tuple[int, int]:
        """Return the descriptors of its sockets."""
        return self._socket.fileno(), self._lifeline.fileno()

    def has_ended(self) -> bool:
        """Return whether the process has ended, or sends data without a request."""
        return self._is_readable(0)

    def _is_readable(self, seconds: float) -> bool:
        poller = select.poll()  # select() takes no descriptor above 1023, which a busy server has
        poller.register(self._socket, select.POLLIN)
        return bool(poller.poll(seconds * 1000))

    def kill(self) -> None:
        """Kill the process and its children, which may have outlived it."""
        if not self._is_disposed:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def dispose(self) -> None:
        """End the process, wait for it, and close its sockets."""
        self.kill()
        self._is_disposed = True
        self._process.wait()
        self._close()

    def forget(self) -> None:
        """Close the sockets of a process that is another's child."""
        self._is_disposed = True
        self._process.returncode = 0
        self._close()

    def _close(self) -> None:
        self._socket.close()
        self._lifeline.close()
