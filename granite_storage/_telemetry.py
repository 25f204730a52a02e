"""What the library reports of its work: log records, and spans and metrics by the API of OpenTelemetry.

Every log record has the attributes `backend`, `storage_key` and `location`, None where they are unknown. `fields_of` gives them
for `extra=`; otherwise they are those of the error that is logged. An error of ours quotes no secret, but its cause is the SDK's
or the system's own, and that may quote an address with a signature, a token or a password. Log lines show the whole chain, so
whatever the library logs passes through `redact` first.

Without OpenTelemetry's package nothing is wrapped, and without an SDK nothing is recorded. Names and attributes follow its
semantic conventions (https://opentelemetry.io/docs/specs/semconv/): namespaces with dots, units of UCUM, `error.type`. Attributes
are of few values, so that they can be labels of metrics. Names of files, locations and messages of errors, which contain both,
are left out unless `GRANITE_STORAGE_TELEMETRY_LOCATIONS=1` is set.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, wraps
from importlib.util import find_spec
from inspect import iscoroutinefunction
from operator import is_
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast

if TYPE_CHECKING:
    from opentelemetry.metrics import Counter, Histogram, Meter
    from opentelemetry.metrics import _Gauge as Gauge
    from opentelemetry.trace import Tracer

Function = TypeVar("Function", bound=Callable[..., Any])

IS_INSTALLED = find_spec("opentelemetry") is not None

# Log records.

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*://)(?:[^\s/\"'<>]*@)?([^\s?\"'<>]*)(\?[^\s\"'<>]*)?", re.IGNORECASE)
_NAMED = re.compile(
    r"""\b((?:[\w-]*(?:signature|token|secret|password|passwd|credential|api[_-]?key|account[_-]?key|access[_-]?key)|sig)["']?\s*[=:]\s*)"""
    r"""("[^"]*"|'[^']*'|(?:Bearer|Basic)\s+\S+|[^\s&,;"'<>)\]}]+)""",
    re.IGNORECASE,
)
_AUTHORIZATION = re.compile(r"(\bauthorization[\"']?\s*[=:]\s*).*", re.IGNORECASE)


FIELDS = ("backend", "storage_key", "location")


def fields_of(subject: object = None, **known: str) -> dict[str, str]:
    """Return what a log record or a span says of the object, the upload, the backend or the collection that it concerns.

    Args:
        subject: A ref, an upload that was prepared, a job, or a report.
        known: The fields themselves, where no such thing has them.
    """
    values = {name: getattr(subject, name, None) for name in FIELDS} | known
    policy = getattr(subject, "policy", None)
    if policy is not None:
        values |= {"backend": policy.backend_key, "storage_key": policy.storage_key}
    return {name: value for name, value in values.items() if isinstance(value, str)}


def redact(text: str) -> str:
    """Return a text without the credentials and the query of each URL, and without values that are named like secrets."""
    text = _ADDRESS.sub(lambda found: f"{found[1]}{found[2]}{'?...' if found[3] else ''}", text)
    text = _AUTHORIZATION.sub(r"\1...", text)
    return _NAMED.sub(r"\1...", text)


def redact_records() -> None:
    """Pass the library's log records through `redact`; idempotent."""
    logging.getLogger("granite_storage").addFilter(_REDACTION)


class _Redaction(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        _complete(record)
        message = record.getMessage()
        redacted = redact(message)
        if redacted != message:
            record.msg, record.args = redacted, ()
        if record.exc_info and record.exc_info[1] is not None:
            error = _redacted(record.exc_info[1], {})
            record.exc_info = (type(error), error, record.exc_info[2])
        return True


_REDACTION = _Redaction()


def _complete(record: logging.LogRecord) -> None:
    """Give a record the fields that it lacks: those of the first error that it logs, or None."""
    logged = [record.exc_info[1]] if record.exc_info else []
    logged += [one for one in record.args if isinstance(one, BaseException)] if isinstance(record.args, tuple) else []
    found = fields_of(logged[0] if logged else None)
    for name in FIELDS:
        record.__dict__.setdefault(name, found.get(name))


def _redacted(error: BaseException, done: dict[int, BaseException]) -> BaseException:
    """Return an error as it may be logged: itself if its chain contains no secret, otherwise a redacted copy.

    Args:
        error: The error.
        done: What was returned for those of the same chain; one that is not finished yet is hidden as a whole.
    """
    if id(error) in done:
        return done[id(error)]
    done[id(error)] = _with_message(error, "(above)")
    done[id(error)] = _redacted_copy(error, done)
    return done[id(error)]


def _redacted_copy(error: BaseException, done: dict[int, BaseException]) -> BaseException:
    words = str(error)
    notes = [redact(note) for note in getattr(error, "__notes__", ())]
    cause, context = (one and _redacted(one, done) for one in (error.__cause__, error.__context__))
    parts = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    inner = [_redacted(one, done) for one in parts]
    is_same = all(map(is_, (cause, context, *inner), (error.__cause__, error.__context__, *parts)))
    if is_same and redact(words) == words and notes == getattr(error, "__notes__", []):
        return error
    likeness: BaseException
    if isinstance(error, BaseExceptionGroup):
        likeness = error.derive(inner)
    elif redact(words) == words and type(error).__module__.partition(".")[0] == "granite_storage":
        likeness = copy.copy(error)
    else:
        likeness = _with_message(error, redact(words))
    likeness.__cause__, likeness.__context__ = cause, context
    likeness.__suppress_context__ = error.__suppress_context__
    if notes:
        likeness.__notes__ = notes  # a copy shares the list with the error itself
    return likeness.with_traceback(error.__traceback__)


def _with_message(error: BaseException, words: str) -> BaseException:
    """Return an error that is displayed like another one, but with another message."""
    kind = type(error)
    shown: type[Exception] = type(kind.__name__, (Exception,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})
    return shown(words)


# Spans and metrics.

_NAMESPACE = "granite_storage"
_OUTCOME = f"{_NAMESPACE}.outcome"
_OPERATION = f"{_NAMESPACE}.operation"
_DIRECTION = f"{_NAMESPACE}.io.direction"
_PROVIDERS_CHECKED_EVERY = 0.1
_OF_API = ("opentelemetry.trace", "opentelemetry.metrics")
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class Instruments:
    """The instruments that record spans and metrics.

    Attributes:
        tracer: Makes the spans.
        bytes: Counts bytes that were stored and read.
        seconds: How long operations take.
        errors: Counts operations that raised.
        garbage: By how many seconds the oldest garbage is overdue.
        has_locations: Whether spans say locations, and what errors said.
        are_recorded: Returns whether an SDK records what they are given.
    """

    tracer: Tracer
    bytes: Counter
    seconds: Histogram
    errors: Counter
    garbage: Gauge
    has_locations: bool
    are_recorded: Callable[[], bool]

    @classmethod
    def of(
        cls, tracer: Tracer, meter: Meter, are_recorded: Callable[[], bool] = lambda: True, *, has_locations: bool | None = None
    ) -> Self:
        """Create the instruments; by default the environment decides whether locations are recorded."""
        if has_locations is None:
            has_locations = os.environ.get("GRANITE_STORAGE_TELEMETRY_LOCATIONS", "").lower() in ("1", "true")
        return cls(
            tracer,
            meter.create_counter(f"{_NAMESPACE}.io", "By", "Bytes of objects that were stored and read"),
            meter.create_histogram(
                f"{_NAMESPACE}.operation.duration",
                "s",
                "Duration of operations",
                explicit_bucket_boundaries_advisory=_SECONDS,
            ),
            meter.create_counter(f"{_NAMESPACE}.operation.errors", "{error}", "Operations that raised an error"),
            meter.create_gauge(f"{_NAMESPACE}.garbage.age", "s", "How long the oldest garbage has been waiting to be deleted"),
            has_locations,
            are_recorded,
        )


_instruments: Instruments | None = None


def load() -> None:
    """Import the API before the event loop is busy, because an import waits for the disk. Idempotent."""
    global _instruments
    if _instruments is not None or not IS_INSTALLED:
        return
    try:
        from opentelemetry import metrics, trace
    except ImportError:  # another package of the namespace
        return

    answer, valid_until = False, 0.0

    def are_recorded() -> bool:
        """Return whether the application has set a provider by now."""
        nonlocal answer, valid_until
        if not answer and time.monotonic() >= valid_until:  # asking takes longer than a span
            providers = (trace.get_tracer_provider(), metrics.get_meter_provider())
            answer = not all(type(one).__module__.startswith(_OF_API) for one in providers)
            valid_until = time.monotonic() + _PROVIDERS_CHECKED_EVERY
        return answer

    # Both follow a provider that is set later.
    _instruments = Instruments.of(trace.get_tracer(_NAMESPACE), metrics.get_meter(_NAMESPACE), are_recorded)


def is_active() -> bool:
    """Return whether anything is recorded, and so is worth finding out."""
    return _instruments is not None and _instruments.are_recorded()


def traced(operation: str, *, subject: int = 1) -> Callable[[Function], Function]:
    """Record each call of a function as a span and in the metrics.

    Args:
        operation: The name.
        subject: The positional argument that says which backend and policy it concerns: an upload that was prepared, a ref, the
            scope of a collection, or the key of a backend; of a list the first; the method's own object is 0.
    """

    def decorate(function: Function) -> Function:
        if not IS_INSTALLED:
            return function

        def begin(arguments: tuple[object, ...]) -> AbstractContextManager[_Operation | None]:
            found = arguments[subject] if len(arguments) > subject else None
            if isinstance(found, list):  # the refs of a page are of one policy, as a rule
                found = found[0] if found else None
            return begun(operation, found)

        if iscoroutinefunction(function):

            @wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                if not is_active():
                    return await function(*args, **kwargs)
                with begin(args) as running:
                    result = await function(*args, **kwargs)
                    if running is not None:
                        running.note_stored(result)
                return result

            return cast(Function, awaited)

        @wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if not is_active():
                return function(*args, **kwargs)
            with begin(args):
                return function(*args, **kwargs)

        return cast(Function, called)

    return decorate


def begun(operation: str, subject: object, *, is_current: bool = True) -> AbstractContextManager[_Operation | None]:
    """Return a context manager that records its block as an operation.

    Args:
        operation: Its name.
        subject: What it concerns; see `traced`.
        is_current: Whether spans within the block are children of its span; False for a generator, whose caller they would join.
    """
    if _instruments is None or not _instruments.are_recorded():
        return nullcontext()
    return _Operation(_instruments, operation, subject, is_current)


def count_read(ref: object, size: int) -> None:
    """Count bytes that were read of an object."""
    if _instruments is not None and size and _instruments.are_recorded():
        _instruments.bytes.add(size, {**_labels_of(ref), _DIRECTION: "read"})


def note_garbage(seconds: float, kind: Literal["pending", "orphan"], subject: object) -> None:
    """Record the age of the oldest garbage that a pass has left, 0 for none."""
    if _instruments is not None and _instruments.are_recorded():
        _instruments.garbage.set(max(seconds, 0.0), {**_labels_of(subject), f"{_NAMESPACE}.garbage.kind": kind})


class _Operation:
    __slots__ = ("_began", "_instruments", "_is_current", "_labels", "_operation", "_span", "_subject", "_token")

    def __init__(self, instruments: Instruments, operation: str, subject: object, is_current: bool) -> None:
        self._instruments = instruments
        self._operation = operation
        self._subject = subject
        self._is_current = is_current
        self._labels = _labels_of(subject)

    def note_stored(self, result: object) -> None:
        """Count the bytes of what a put has returned."""
        if self._operation == "put":
            size: int = getattr(result, "size", 0)
            self._span.set_attribute(f"{_NAMESPACE}.size", size)
            self._instruments.bytes.add(size, {**self._labels, _DIRECTION: "write"})

    def __enter__(self) -> Self:
        from opentelemetry import context, trace

        attributes = self._labels
        if self._instruments.has_locations and "location" in (found := fields_of(self._subject)):
            attributes = {**attributes, f"{_NAMESPACE}.location": found["location"]}
        self._span = self._instruments.tracer.start_span(f"{_NAMESPACE}.{self._operation}", attributes=attributes)
        self._token = context.attach(trace.set_span_in_context(self._span)) if self._is_current else None
        self._began = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        from opentelemetry import context

        seconds = time.perf_counter() - self._began
        if self._token is not None:
            context.detach(self._token)
        is_error = isinstance(error, Exception)
        outcome = {_OUTCOME: "ok" if error is None else "error" if is_error else "cancelled"}
        if is_error and error is not None:
            outcome["error.type"] = _name_of(type(error))
            self._describe(error)
        labels = {**self._labels, **outcome, _OPERATION: self._operation}
        self._instruments.seconds.record(seconds, labels)
        if is_error:
            self._instruments.errors.add(1, labels)
        if self._span.is_recording():
            self._span.set_attributes(outcome)
        self._span.end()

    def _describe(self, error: BaseException) -> None:
        from opentelemetry.trace import StatusCode

        name = _name_of(type(error))
        said = {"exception.message": redact(str(error))} if self._instruments.has_locations else {}
        self._span.add_event("exception", {"exception.type": name, **said})
        self._span.set_status(StatusCode.ERROR, name)


def _labels_of(subject: object) -> Mapping[str, str]:
    """Return the backend and the policy that something concerns."""
    found = {"backend": subject} if isinstance(subject, str) else fields_of(subject)
    return _labels(found.get("backend"), found.get("storage_key"))


@lru_cache(maxsize=1024)
def _labels(backend: str | None, storage_key: str | None) -> Mapping[str, str]:
    found = {f"{_NAMESPACE}.backend": backend, f"{_NAMESPACE}.storage_key": storage_key}
    return {name: value for name, value in found.items() if value is not None}


def _name_of(kind: type[BaseException]) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
