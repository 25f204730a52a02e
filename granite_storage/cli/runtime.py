"""Running a command: the application's binding, an event loop, signals, and exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import click
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from granite_storage.cli.loading import load_binding
from granite_storage.cli.output import Output
from granite_storage.exceptions import StorageError
from granite_storage.orm.binding import StorageBinding

__all__ = ["Desk", "Exit", "Settings", "run"]


class Exit(IntEnum):
    """What the exit codes mean; 128 and a signal's number for a command that a signal has ended."""

    DONE = 0
    FOUND = 1
    USAGE = 2
    FAILED = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """What the user said of the application and of how to speak.

    Attributes:
        app: `module:attribute`.
        app_dir: Where to look for the module.
        debug: Whether errors come with their traceback.
    """

    app: str | None
    app_dir: Path
    debug: bool


@dataclass
class Desk:
    """What a command works with.

    Attributes:
        binding: The application's.
        output: What it says its answer through.
        stopped_by: The signal that asked it to stop, if one did.
    """

    binding: StorageBinding
    output: Output
    stopped_by: signal.Signals | None = None
    _stop: Callable[[], None] | None = None
    _task: asyncio.Task[object] | None = field(default_factory=asyncio.current_task)

    @contextmanager
    def stoppable(self, stop: Callable[[], None]) -> Iterator[None]:
        """Let the first signal end the work inside well, instead of breaking it off."""
        self._stop = stop
        try:
            yield
        finally:
            self._stop = None

    def confirm(self, question: str, *, yes: bool) -> bool:
        """Ask before something is deleted; refuse where nobody can be asked."""
        if yes:
            return True
        if not sys.stdin.isatty():
            raise click.UsageError(
                "this deletes something, and there is no terminal to ask at: say --yes, or --dry-run to look only"
            )
        loop = asyncio.get_running_loop()
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            agreed = click.confirm(question, err=True)
        except click.Abort:
            # The loop has seen the signal as well, and would act on it if it were told of it again.
            self.output.note("\nnothing was done")
            self.stopped_by = signal.SIGINT
            return False
        loop.add_signal_handler(signal.SIGINT, self.on_signal, signal.SIGINT)
        if not agreed:
            self.output.note("nothing was done")
        return agreed

    def on_signal(self, received: signal.Signals) -> None:
        """Stop: well at the first time, where the command knows how to, and at once at the second."""
        first, self.stopped_by = self.stopped_by is None, received
        if first and self._stop is not None:
            self.output.note("stopping: what is under way is done to its end (once more to break it off)")
            self._stop()
        elif self._task is not None:
            self._task.cancel()


Work = Callable[[Desk], Awaitable["Exit | None"]]


def run(settings: Settings, work: Work, *, as_json: bool = False) -> None:
    """Do the work of a command with the application's binding, and leave the program with its exit code."""
    if settings.app is None:
        raise click.UsageError("say where the application's binding is: --app module:attribute, or GRANITE_STORAGE_APP")
    output = Output(as_json=as_json)
    sys.path.insert(0, os.path.abspath(settings.app_dir))
    try:
        # What the application prints or logs is not the answer.
        with contextlib.redirect_stdout(sys.stderr):
            code = asyncio.run(_at_desk(settings.app, work, output))
    except (click.ClickException, click.exceptions.Exit):
        raise
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # Whoever read the answer has seen enough; nothing is to be written at the interpreter's end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.DONE
    except Exception as error:  # noqa: BLE001  # a program's last resort: it says what went wrong, and how to see more
        _tell(error, output, debug=settings.debug)
        code = Exit.FAILED
    sys.exit(code)


def _tell(error: Exception, output: Output, *, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, StorageError):
        output.note(f"error: {error}", "red")
        return
    said = str(error).split("\n(Background on this error", 1)[0]
    output.note(f"error: {type(error).__name__}: {said}", "red")
    if not debug and not isinstance(error, SQLAlchemyError | OSError):
        output.note("this was not foreseen; --debug shows where it comes from")


async def _at_desk(app: str, work: Work, output: Output) -> int:
    binding = await load_binding(app)
    async with _closed_afterwards(binding):
        desk = Desk(binding, output)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, desk.on_signal, number)
        try:
            code = await work(desk)
        except asyncio.CancelledError:
            if desk.stopped_by is None:
                raise
            output.note("broken off")
            code = None
    return 128 + desk.stopped_by if desk.stopped_by is not None else code or Exit.DONE


@asynccontextmanager
async def _closed_afterwards(binding: StorageBinding) -> AsyncIterator[None]:
    """Close what the application opened: nothing but this command runs in the process."""
    try:
        async with binding.manager:
            yield
    finally:
        if binding.journal is not None:
            await binding.journal.aclose()
        engine = None if binding.sessions is None else binding.sessions.kw.get("bind")
        if isinstance(engine, AsyncEngine):
            with contextlib.suppress(SQLAlchemyError):
                await engine.dispose()
