"""A backend for fault injection: the n-th call fails, always in the same way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar, cast

from granite_storage.backends.base import ObjectInfo, ObjectReader, StorageBackend, SupportsReopen, closing_listing
from granite_storage.backends.wrappers import ReopeningReader, WrappedBackend, WrappedReader
from granite_storage.exceptions import BackendUnavailableError

__all__ = ["FaultInjectingBackend", "Operation", "RecordedCall"]

T = TypeVar("T")

Operation: TypeAlias = Literal[
    "put_bytes",
    "put_stream",
    "open",
    "read",
    "stat",
    "exists",
    "delete",
    "iter_objects",
    "aclose",
    "copy",
    "delete_many",
    "cleanup_incomplete",
    "abort_upload",
    "now",
    "is_mounted",
    "identities",
    "places",
    "presign_get",
    "presign_many",
    "presign_upload",
]
"""What faults strike: the methods of a backend and of its optional protocols; `read` is that of any reader it has opened."""


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One call that was made.

    Attributes:
        operation: Which one.
        locations: The locations it was about; two for a copy, none for a listing.
    """

    operation: Operation
    locations: tuple[str, ...] = ()


class FaultInjectingBackend(WrappedBackend):
    """Passes every call to an inner backend, and makes declared calls fail, wait, end early or return wrong bytes.

    Nothing is random: a fault strikes the `nth` call of its operation, counted from when it is declared, and as many after it as
    `times` says. It has the abilities of the inner backend and no others, also for `isinstance`.

    Args:
        inner: The backend behind. Closing this one closes it.

    Attributes:
        inner: The backend behind.
        calls: Every call made so far, in order.

    Example:
        >>> import asyncio
        >>> from granite_storage.backends.memory import MemoryStorageBackend
        >>> faults = FaultInjectingBackend(MemoryStorageBackend())
        >>> faults.fail("put_bytes", nth=2)
        >>> asyncio.run(faults.put_bytes("a", b"1"))
        >>> asyncio.run(faults.put_bytes("b", b"2"))
        Traceback (most recent call last):
        granite_storage.exceptions.BackendUnavailableError: a fault was injected into put_bytes
    """

    def __init__(self, inner: StorageBackend) -> None:
        super().__init__(inner)
        self.calls: list[RecordedCall] = []
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"FaultInjectingBackend({self.inner!r})"

    @property
    def pending(self) -> int:
        """The number of declared faults that have not occurred; a test should end with none."""
        return sum(fault.left for fault in self._faults)

    def fail(
        self,
        operation: Operation,
        *,
        nth: int = 1,
        times: int = 1,
        error: BaseException | None = None,
        lost_answer: bool = False,
    ) -> None:
        """Make a call raise an error.

        Args:
            operation: Which one.
            nth: Which of the calls from now on, the next being 1.
            times: How many calls in a row.
            error: What to raise; None for a `BackendUnavailableError`.
            lost_answer: Whether the inner backend does its work first, and only its answer is lost.
        """
        self._declare(_Fault(operation, nth, times, error=error, failing="after" if lost_answer else "before"))

    def delay(self, operation: Operation, *, seconds: float, nth: int = 1, times: int = 1) -> None:
        """Delay a call before it is passed on.

        Args:
            operation: Which one.
            seconds: How long.
            nth: Which of the calls from now on, the next being 1.
            times: How many calls in a row.
        """
        self._declare(_Fault(operation, nth, times, delay=seconds))

    def cut(
        self,
        operation: Literal["put_stream", "open", "iter_objects"],
        *,
        after: int,
        nth: int = 1,
        times: int = 1,
        error: BaseException | None = None,
        silently: bool = False,
    ) -> None:
        """Cut off a stream, a body or a listing after `after` bytes or objects; a shorter one stays whole.

        Args:
            operation: Which one.
            after: How many bytes, or objects of a listing, still pass.
            nth: Which of the calls from now on, the next being 1.
            times: How many calls in a row.
            error: What to raise then; None for a `BackendUnavailableError`.
            silently: Whether the rest is lost without an error.
        """
        self._declare(
            _Fault(operation, nth, times, cut=after, error=error, silent=silently), "put_stream", "open", "iter_objects"
        )

    def corrupt(self, operation: Literal["put_bytes", "put_stream", "open"], *, at: int, nth: int = 1, times: int = 1) -> None:
        """Corrupt one byte: all its bits are flipped.

        Args:
            operation: Which one.
            at: The byte, counted from the first that passes.
            nth: Which of the calls from now on, the next being 1.
            times: How many calls in a row.
        """
        self._declare(_Fault(operation, nth, times, flip=at), "put_bytes", "put_stream", "open")

    def count(self, operation: Operation) -> int:
        """Return the number of calls of an operation."""
        return sum(call.operation == operation for call in self.calls)

    async def put_bytes(self, location: str, content: bytes, *, content_type: str | None = None) -> Mapping[str, Any] | None:
        """Store `content`."""
        strike = self._begin("put_bytes", [location])
        call = partial(self.inner.put_bytes, location, strike.flipped(content), content_type=content_type)
        return await strike.around(call)

    async def put_stream(
        self, location: str, stream: AsyncIterator[bytes], *, content_type: str | None = None
    ) -> Mapping[str, Any] | None:
        """Store what `stream` yields."""
        strike = self._begin("put_stream", [location])
        async with aclosing(strike.stream(stream)) as struck:
            return await strike.around(partial(self.inner.put_stream, location, struck, content_type=content_type))

    async def open(self, location: str, *, offset: int = 0, length: int | None = None) -> ObjectReader:
        """Open a range for reading."""
        return await self._open(location, partial(self.inner.open, location, offset=offset, length=length))

    async def _open(self, location: str, call: Callable[[], Awaitable[ObjectReader]]) -> ObjectReader:
        strike = self._begin("open", [location])
        reader = await strike.around(call, lambda opened: opened.aclose())
        struck = _StruckReopeningReader if isinstance(reader, SupportsReopen) else _StruckReader
        return struck(reader, location, self._call, strike, partial(self._open, location))

    async def iter_objects(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        """Yield the objects whose location begins with `prefix`, in the byte order of UTF-8."""
        strike = self._begin("iter_objects", [])
        await strike.before()
        passed = 0
        async with closing_listing(self.inner.iter_objects(prefix, start_after=start_after)) as objects:
            async for info in objects:
                if strike.cut is not None and passed >= strike.cut:
                    strike.break_off()
                    return
                passed += 1
                yield info
        strike.after()

    async def _call(self, operation: Any, locations: Iterable[str], call: Callable[[], Awaitable[T]]) -> T:
        return await self._begin(operation, locations).around(call)

    def _declare(self, fault: _Fault, *allowed: Operation) -> None:
        if fault.operation != "read" and not hasattr(self, fault.operation):
            raise ValueError(f"{self.inner!r} has no operation {fault.operation!r}")
        if allowed and fault.operation not in allowed:
            raise ValueError(f"this fault applies to {', '.join(allowed)}, not to {fault.operation}")
        if fault.nth < 1 or fault.left < 1:
            raise ValueError(f"nth and times count from 1, but are {fault.nth} and {fault.left}")
        with self._lock:
            self._faults.append(fault)

    def _begin(self, operation: Operation, locations: Iterable[str]) -> _Strike:
        with self._lock:
            self.calls.append(call := RecordedCall(operation, tuple(locations)))
            due = [fault for fault in self._faults if fault.operation == operation and fault.strikes()]
        return _Strike(call, due)


@dataclass(slots=True)
class _Fault:
    operation: Operation
    nth: int
    left: int
    delay: float = 0.0
    error: BaseException | None = None
    failing: Literal["before", "after"] | None = None
    cut: int | None = None
    silent: bool = False
    flip: int | None = None

    def strikes(self) -> bool:
        """Count one more call, and tell whether it is one of those to strike."""
        self.nth -= 1
        if self.nth > 0 or not self.left:
            return False
        self.left -= 1
        return True


class _Strike:
    """What befalls one call: nothing, or the faults that are due."""

    def __init__(self, call: RecordedCall, faults: list[_Fault]) -> None:
        self._call = call
        self._faults = faults
        self.cut = min((fault.cut for fault in faults if fault.cut is not None), default=None)

    async def around(self, call: Callable[[], Awaitable[T]], undo: Callable[[T], Awaitable[None]] | None = None) -> T:
        await self.before()
        result = await call()
        if undo is not None and self._failing("after"):
            await undo(result)
        self.after()
        return result

    async def before(self) -> None:
        for fault in self._faults:
            if fault.delay:
                await asyncio.sleep(fault.delay)
        for fault in self._failing("before"):
            raise self._error(fault)

    def after(self) -> None:
        for fault in self._failing("after"):
            raise self._error(fault)

    def break_off(self) -> None:
        """Raise what a cut raises, unless it is silent."""
        for fault in self._faults:
            if fault.cut == self.cut and not fault.silent:
                raise self._error(fault)

    def flipped(self, content: bytes, position: int = 0) -> bytes:
        for fault in self._faults:
            if fault.flip is not None and position <= fault.flip < position + len(content):
                at = fault.flip - position
                content = content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]
        return content

    async def stream(self, stream: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Pass a stream on; one that is cut silently is read to its end all the same."""
        position = 0
        async for chunk in stream:
            passing = self.flipped(chunk if self.cut is None else chunk[: max(0, self.cut - position)], position)
            if passing:
                yield passing
            if len(passing) < len(chunk):
                self.break_off()
            position += len(chunk)

    def _failing(self, when: Literal["before", "after"]) -> list[_Fault]:
        return [fault for fault in self._faults if fault.failing == when]

    def _error(self, fault: _Fault) -> BaseException:
        location = next(iter(self._call.locations), None)
        return fault.error or BackendUnavailableError(f"a fault was injected into {self._call.operation}", location=location)


class _StruckReader(WrappedReader):
    def __init__(
        self,
        inner: ObjectReader,
        location: str,
        call: Callable[..., Awaitable[Any]],
        strike: _Strike,
        open_again: Callable[[Callable[[], Awaitable[ObjectReader]]], Awaitable[ObjectReader]],
    ) -> None:
        super().__init__(inner, location, call)
        self._open_again = open_again
        self._strike = strike
        self._position = 0
        self._broken = False

    async def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes, all remaining ones if negative."""
        chunk = await super().read(size)
        room = len(chunk) if self._strike.cut is None else max(0, self._strike.cut - self._position)
        self._broken = self._broken or room < len(chunk)
        passing = self._strike.flipped(chunk[:room], self._position)
        self._position += len(passing)
        if self._broken and (size < 0 or not passing):
            self._strike.break_off()
        return passing


class _StruckReopeningReader(_StruckReader, ReopeningReader):
    async def reopen(self, offset: int, length: int, /) -> ObjectReader:
        """Open a range of the object that the inner reader is of; faults of `open` strike it."""
        return await self._open_again(partial(cast(SupportsReopen, self._inner).reopen, offset, length))
