"""What the long-running jobs share: progress, a bound on concurrency and bytes per second, and a key to resume from."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Generator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from granite_storage._tasks import contained
from granite_storage.backends.base import StorageBackend, SupportsMountCheck
from granite_storage.exceptions import BackendUnavailableError, ConfigurationError, StorageFullError, UnknownBackendError
from granite_storage.orm._interfaces import find_binding
from granite_storage.orm.references import RowValues, Scan
from granite_storage.readers import StoredObjectReader

if TYPE_CHECKING:
    from granite_storage.orm.binding import StorageBinding

Item = TypeVar("Item")
Result = TypeVar("Result")
Report = TypeVar("Report")

MOST_KEPT = 1000
"""How many single things a report holds, so that its size is bounded."""

_AHEAD = 4
_PAUSES = (0.5, 2.0)


class Run(ABC, Generic[Item, Report]):
    """A long-running job: iterate over it for its items, or await it for its report.

    It runs once. It starts when the first item is asked for, and continues only as items are asked for. `stop` ends it early and
    cleanly; a cancellation ends it with the statements in progress.

    Attributes:
        report: What was done so far. It grows while the job runs, and remains readable after an error.
    """

    def __init__(self, report: Report) -> None:
        self.report = report
        self._stopped = False
        self._begun = False
        self._on_progress: Callable[[], None] = lambda: None

    def stop(self) -> None:
        """Stop the job once the work in progress is done."""
        self._stopped = True

    def on_progress(self, callback: Callable[[], None]) -> Self:
        """Call a function whenever the report is updated; return the job, to iterate over it or to await it."""
        self._on_progress = callback
        return self

    def __aiter__(self) -> AsyncGenerator[Item, None]:
        if self._begun:
            raise ConfigurationError(
                "a run can be iterated or awaited only once: start a new one, with after=report.key to continue this one"
            )
        self._begun = True
        return self._items()

    def __await__(self) -> Generator[Any, None, Report]:
        return self._run_to_end().__await__()

    async def _run_to_end(self) -> Report:
        async with aclosing(aiter(self)) as items:
            async for _ in items:
                pass
        return self.report

    @abstractmethod
    def _items(self) -> AsyncGenerator[Item, None]:
        """Do the work, and yield its items as they come."""


@dataclass(slots=True)
class RowReport:
    """The results of a job over rows.

    Attributes:
        rows: How many rows were read, in all passes.
        key: The key of the last row of this pass up to which every row is done, for the argument `after` of another run; None
            before the first.
        complete: Whether it has come to its end, and could see all rows.
        unseen: In words what may have refs and could not be read, such as a table in a schema that this role may not read.
    """

    rows: int = 0
    key: str | None = None
    complete: bool = False
    unseen: list[str] = field(default_factory=list)


ReportOnRows = TypeVar("ReportOnRows", bound=RowReport)


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows a job processes, and how fast.

    Attributes:
        binding: The binding.
        concurrency: How many rows are processed at a time.
        after: The key of the row to begin after; None for the first one.
        bytes_per_second: The most bytes of objects that are read per second; None for no limit.
        schemas: The schemas whose rows are meant, as the database calls them; none for all.
    """

    binding: StorageBinding
    concurrency: int
    after: str | None
    bytes_per_second: float | None
    schemas: Collection[str]


class RowRun(Run[Item, ReportOnRows]):
    """A job over the rows of a binding, in the order of their keys.

    Args:
        report: The report.
        rows: The rows.

    Attributes:
        has_ended: Whether it has processed every row that it could see.
    """

    def __init__(self, report: ReportOnRows, rows: Rows) -> None:
        super().__init__(report)
        report.key = rows.after
        self._concurrency = require_concurrency(rows.concurrency)
        self._budget = Budget(rows.bytes_per_second)
        self._binding = rows.binding
        self._scan = Scan(rows.binding, rows.schemas)
        self.has_ended: bool = False

    async def count(self) -> int:
        """Return how many rows a pass reads, to show progress."""
        number = await self._scan.count()
        self.report.unseen = list(self._scan.unseen)
        return number

    async def _items(self) -> AsyncGenerator[Item, None]:
        async with aclosing(self._process_rows(self.report.key)) as items:
            async for item in items:
                yield item
        self.report.complete = self._end()

    async def _process_rows(self, after: str | None) -> AsyncGenerator[Item, None]:
        """Process the rows after a key, several at a time, record and yield what comes of it, and note the rows as done."""
        rows = self._scan.rows(after=after)
        results = run_in_order(rows, self._process_row, concurrency=self._concurrency, is_stopped=lambda: self._stopped)
        async with aclosing(results):
            async for row, items in results:
                for item in items:
                    self._record(item)
                    yield item
                self.report.rows += 1
                self.report.key = row.key
                self._on_progress()
        self.report.unseen = list(self._scan.unseen)

    def _end(self, *, is_whole: bool = True) -> bool:
        """Note that a pass has ended; return whether it is complete."""
        self.has_ended = is_whole and not self._stopped
        return self.has_ended and not self.report.unseen

    @abstractmethod
    async def _process_row(self, row: RowValues) -> Sequence[Item]:
        """Do the work on a row."""

    @abstractmethod
    def _record(self, item: Item) -> None:
        """Count an item in the report."""


async def run_in_order(
    items: AsyncGenerator[Item, None],
    work: Callable[[Item], Awaitable[Result]],
    *,
    concurrency: int,
    is_stopped: Callable[[], bool],
) -> AsyncGenerator[tuple[Item, Result], None]:
    """Do work on items, several at a time, and yield the results in the items' order: a result says that all before it are done.

    An error ends it, once the work in progress was cancelled and has ended. Memory is that of a few times `concurrency` items.
    """
    slots = asyncio.Semaphore(concurrency)
    tasks: deque[asyncio.Task[tuple[Item, Result] | None]] = deque()

    async def one(item: Item) -> tuple[Item, Result] | None:
        async with slots:
            if is_stopped():
                return None
            with contained("processing a row"):
                return item, await work(item)

    try:
        async with aclosing(items):
            async for item in items:
                tasks.append(asyncio.create_task(one(item)))
                while tasks and (tasks[0].done() or len(tasks) >= _AHEAD * concurrency):
                    done = await tasks[0]
                    tasks.popleft()
                    if done is None:
                        return
                    yield done
        while tasks:
            done = await tasks[0]
            tasks.popleft()
            if done is None:
                return
            yield done
    finally:
        if is_stopped():
            await _wait_ended(tasks)
        for task in tasks:
            task.cancel()
        await _wait_ended(tasks)


async def _wait_ended(tasks: deque[asyncio.Task[Result]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


def require_concurrency(concurrency: object) -> int:
    """Return the concurrency; raise `ConfigurationError` unless it is an integer of at least 1."""
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
        raise ConfigurationError(f"concurrency must be an integer of at least 1, not {concurrency!r}")
    return concurrency


def require_in_force(binding: StorageBinding) -> None:
    """Raise `ConfigurationError` if a binding was unbound, or replaced by another one."""
    if find_binding(binding.metadata) is not binding:
        raise ConfigurationError(
            "the binding is not active, because it was unbound or its base was bound again: pass the current one"
        )


class Budget:
    """Limits the bytes per second of all readers that share it.

    Args:
        bytes_per_second: The limit; None for no limit.
    """

    def __init__(self, bytes_per_second: float | None) -> None:
        if bytes_per_second is not None and not bytes_per_second > 0:
            raise ConfigurationError(f"bytes_per_second must be a number above 0, or None, not {bytes_per_second!r}")
        self._rate = bytes_per_second
        self._free = 0.0

    async def spend(self, count: int) -> None:
        """Wait for the time that the bytes which were just read take at the limit."""
        if self._rate is None:
            return
        now = asyncio.get_running_loop().time()
        self._free = max(self._free, now) + count / self._rate
        await asyncio.sleep(self._free - now)


async def rate_limited(reader: StoredObjectReader, budget: Budget) -> AsyncGenerator[bytes, None]:
    """Yield an object's chunks, no faster than a budget allows."""
    async for chunk in reader:
        yield chunk
        await budget.spend(len(chunk))


async def retry_unavailable(call: Callable[[], Awaitable[Result]]) -> Result:
    """Make a call, and repeat it after a pause while the backend is unavailable; the error of the last attempt is raised."""
    for pause in _PAUSES:
        try:
            return await call()
        except BackendUnavailableError:
            await asyncio.sleep(pause)
    return await call()


def ends_run(error: Exception) -> bool:
    """Return whether an error is not about one object but about the configuration, or about a store as a whole."""
    is_general = isinstance(error, BackendUnavailableError | ConfigurationError | StorageFullError)
    return is_general and not isinstance(error, UnknownBackendError)


async def require_mounted(key: str, backend: StorageBackend) -> None:
    """Refuse a local folder without its marker: where a disk is not mounted, every object seems to be missing.

    Raises:
        BackendUnavailableError: It has none.
    """
    if isinstance(backend, SupportsMountCheck) and not await backend.is_mounted():
        raise BackendUnavailableError(
            f"the folder of the backend {key!r} has no marker file, which its first write created: mount its disk, or correct"
            " the backend's folder",
            backend=key,
        )
