"""The moments at which a child dies or stops: before, after, and in the COMMIT of every step that the library takes.

They are set by wrapping its functions in the child; the library knows nothing of them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from granite_storage._engine import Engine
from granite_storage.backends import _local_tree, _s3_upload
from granite_storage.orm.attachment import AttachmentState
from granite_storage.orm.journal.intents import Intents
from granite_storage.orm.journal.jobs import JobQueue
from granite_storage.orm.journal.recovery import Recovery
from granite_storage.orm.journal.variant_jobs import VariantJobs
from granite_storage.orm.transactions import UnitOfWork

__all__ = ["MIDDLE", "POINTS", "RECOVERY", "Point", "Trap", "points_for"]


@dataclass(frozen=True)
class Step:
    """A function that is one step.

    Attributes:
        name: What the points at it are called by.
        owner: Whose function it is.
        function: Its name.
        commits: Whether it has a transaction of its own.
        needs: Where it happens at all: `s3`, `local`, `postgres`; `worker` where it is a worker's.
        most: The latest time at which it is trapped: a step that is rare is trapped early.
        matters: Tells by its result and its arguments whether it did anything.
    """

    name: str
    owner: Any
    function: str
    commits: bool = False
    needs: frozenset[str] = frozenset()
    most: int = 6
    matters: Callable[[Any, tuple[Any, ...]], bool] = lambda result, arguments: True

    def points(self) -> list[Point]:
        moments = ["before", "after", *(("before the COMMIT of", "during the COMMIT of") if self.commits else ())]
        return [Point(f"{moment} {self.name}", self.needs, self.most) for moment in moments]


@dataclass(frozen=True)
class Point:
    """A moment in the course of a child."""

    name: str
    needs: frozenset[str] = frozenset()
    most: int = 6


def _found_something(result: Any, _: tuple[Any, ...]) -> bool:
    return bool(result)


def _fenced_something(result: Any, _: tuple[Any, ...]) -> bool:
    return bool(result[0])


def _was_given_something(_: Any, arguments: tuple[Any, ...]) -> bool:
    return bool(arguments[1])


def _needs(*names: str) -> frozenset[str]:
    return frozenset(names)


UPLOADER = [
    Step("the intents", Intents, "record", commits=True),
    Step("the renewal of a lease", Intents, "renew", commits=True, most=1),
    Step("an upload", AttachmentState, "put"),
    Step("a copy", Engine, "copy", most=3),
    Step("the publication of a file", _local_tree.AtomicFile, "publish", needs=_needs("local")),
    Step("the creation of an upload in parts", _s3_upload.MultipartUpload, "create", needs=_needs("s3"), most=2),
    Step("the note of an upload id", Intents, "note_upload_id", commits=True, needs=_needs("s3"), most=2),
    Step("a part", _s3_upload.MultipartUpload, "_send_part", needs=_needs("s3"), most=3),
    Step("the request that makes an object", _s3_upload.ObjectWriter, "_published", needs=_needs("s3")),
    Step("taking the intents back", Intents, "consume"),
    Step("a decision", Intents, "_decide", needs=_needs("postgres", "snapshots"), most=2),
    Step("the intents to delete", Intents, "displace"),
    Step("undoing a delete", Intents, "find_deletes", most=2),
    Step("what follows the end of a transaction", UnitOfWork, "end"),
]

RECOVERY = [
    Step("the fence", Recovery, "_fence", commits=True, needs=_needs("worker"), matters=_fenced_something),
    Step("taking over a fenced row", Recovery, "_resume", commits=True, needs=_needs("worker"), most=2, matters=_found_something),
    Step("the reference check", Recovery, "_check", needs=_needs("worker")),
    Step("the delete", Recovery, "_remove", needs=_needs("worker")),
    Step("the conclusion", Recovery, "_conclude", commits=True, needs=_needs("worker"), matters=_was_given_something),
    Step("lifting a fence", Recovery, "_let_go", commits=True, needs=_needs("worker"), most=2, matters=_was_given_something),
]

DERIVERS = [
    Step("taking over jobs", JobQueue, "_claim", commits=True, needs=_needs("worker"), matters=_found_something),
    Step("making variants", VariantJobs, "_make_all", needs=_needs("worker"), most=3),
    Step("publishing variants", VariantJobs, "_publish", commits=True, needs=_needs("worker"), most=3),
]

MIDDLE = "in the middle of a stream"
_DIALECT = {
    "do_commit": "COMMIT",
    "do_rollback": "ROLLBACK",
    "do_savepoint": "SAVEPOINT",
    "do_rollback_to_savepoint": "ROLLBACK TO SAVEPOINT",
    "do_release_savepoint": "RELEASE SAVEPOINT",
}
_OWN = [
    *(Point(f"{moment} the COMMIT") for moment in ("before", "during", "after")),
    *(Point(f"{moment} the ROLLBACK") for moment in ("before", "after")),
    *(Point(f"after the {name}", most=3) for name in _DIALECT.values() if "SAVEPOINT" in name),
]
POINTS = [*(point for step in UPLOADER + RECOVERY + DERIVERS for point in step.points()), Point(MIDDLE), *_OWN]


def points_for(*, abilities: set[str]) -> list[Point]:
    """Return the points that a child can come to that has these abilities."""
    return [point for point in POINTS if point.needs <= abilities]


_step: ContextVar[str | None] = ContextVar("step", default=None)
_LONGEST_COMMIT = 0.002


@dataclass
class Trap:
    """Kills or stops this process when it comes to a point for the n-th time.

    Attributes:
        point: The point's name.
        count: At which time.
        number: The signal.
        said: Is told before it happens.
        sprung: Whether it has happened.
    """

    point: str
    count: int
    number: signal.Signals
    said: Callable[[str], None]
    sprung: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reach(self, point: str) -> None:
        """Come to a point."""
        if self._is_it(point):
            self._spring()

    @contextlib.contextmanager
    def during(self, point: str) -> Iterator[None]:
        """Do what a point is in the middle of: it happens some time in there, or shortly afterwards."""
        if self._is_it(point):
            threading.Thread(target=self._spring_soon, daemon=True).start()
        yield

    def _is_it(self, point: str) -> bool:
        if point != self.point:
            return False
        with self._lock:
            self.count -= 1
            return self.count == 0

    def _spring_soon(self) -> None:
        time.sleep(random.uniform(0, _LONGEST_COMMIT))
        self._spring()

    def _spring(self) -> None:
        self.said(f"reached: {self.point}")
        self.sprung = True
        os.kill(os.getpid(), self.number)

    def set(self, engine: AsyncEngine, *others: Any) -> None:
        """Wrap every step, and what the engine's sessions do; and the COMMITs of other databases' dialects."""
        for step in UPLOADER + RECOVERY + DERIVERS:
            setattr(step.owner, step.function, self._wrapped(step))
        for dialect in (engine.dialect, *others):
            for function, name in _DIALECT.items():
                self._wrap_dialect(dialect, function, name)

    def _wrapped(self, step: Step) -> Any:
        original = getattr(step.owner, step.function)
        if inspect.iscoroutinefunction(original):

            @functools.wraps(original)
            async def waiting(*args: Any, **kwargs: Any) -> Any:
                with self._inside(step):
                    result = await original(*args, **kwargs)
                self._after(step, result, args)
                return result

            return waiting

        @functools.wraps(original)
        def plain(*args: Any, **kwargs: Any) -> Any:
            with self._inside(step):
                result = original(*args, **kwargs)
            self._after(step, result, args)
            return result

        return plain

    @contextlib.contextmanager
    def _inside(self, step: Step) -> Iterator[None]:
        self.reach(f"before {step.name}")
        token = _step.set(step.name if step.commits else _step.get())
        try:
            yield
        finally:
            _step.reset(token)

    def _after(self, step: Step, result: Any, args: tuple[Any, ...]) -> None:
        if step.matters(result, args):
            self.reach(f"after {step.name}")

    def _wrap_dialect(self, dialect: Any, function: str, name: str) -> None:
        original = getattr(dialect, function)

        def wrapped(*args: Any) -> None:
            # The journal's connections share the dialect; their COMMITs are those of the steps.
            step = _step.get()
            what = f"the {name}" if step is None else f"the {name} of {step}"
            self.reach(f"before {what}")
            with self.during(f"during {what}"):
                original(*args)
            self.reach(f"after {what}")

        setattr(dialect, function, wrapped)
