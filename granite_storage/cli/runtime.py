"""Running a command: the application's binding, an event loop, signals, and exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

import click
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from granite_storage._documentation import Page
from granite_storage.cli.output import Output
from granite_storage.exceptions import ConfigurationError, InvalidLocationError, StorageError
from granite_storage.orm.binding import StorageBinding
from granite_storage.orm.references import Scan

_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?(?:/s)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_FACTORS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}

# What a context of Flask, or of Quart, says that is missing.
_NEEDS_CONTEXT = "outside of application context"
_GIVE_CONTEXT = (
    "the sessions of the application need an application context: let --app name a function that pushes one, as by"
    " app.app_context().push(), and returns the binding"
)
_BACKGROUND = "\n(Background on this error"
"""How the part of SQLAlchemy's messages begins that names a page of its documentation."""
_OPTIONS = {
    "raise max_deleted_share": "raise --max-share",
    "allow_no_references=True": "--allow-no-references",
    "allow_restored_database=True": "--allow-restored-database",
    "await journal.allow_restored_database()": "granite-storage gc --allow-restored-database",
    "verify()": "granite-storage verify",
    "name its schema (schemas=...)": "name its schema with --schema",
    "pass iter_references": "collect in Python with iter_references",
}
"""What messages of the library tell to do, and the command line calls otherwise."""

# Finding the application's binding.


async def load_binding(name: str) -> StorageBinding:
    """Import what `module:attribute` names and return it, or what it returns where it is a callable, sync or async.

    Args:
        name: The name.

    Raises:
        ConfigurationError: It cannot be imported, or is not a binding; the message says where, the cause is the error itself.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigurationError(
            f"--app must be module:attribute, such as myapp.storage:binding, not {name!r}", see=Page.COMMAND_LINE
        )
    found = _get_attribute(_import_module(module), attribute, name)
    if not isinstance(found, StorageBinding) and callable(found):
        found = await _call_factory(found, name)
    if not isinstance(found, StorageBinding):
        raise ConfigurationError(
            f"--app {name} is a {type(found).__name__}: name what bind_storage() returned, or a callable that returns it",
            see=Page.COMMAND_LINE,
        )
    return found


def _import_module(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{module}.".startswith(f"{missing}."):
            raise ConfigurationError(
                f"there is no module {missing!r} here: pass --app-dir with the folder that contains it", see=Page.COMMAND_LINE
            ) from error
        raise _wrap_failure(f"importing {module!r}", error) from error


def _get_attribute(found: Any, attribute: str, name: str) -> Any:
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ConfigurationError(
                f"--app {name} does not exist: there is no {part!r} in {name.partition(':')[0]!r}", see=Page.COMMAND_LINE
            ) from error
    return found


async def _call_factory(factory: Any, name: str) -> Any:
    try:
        found = factory()
        return await found if inspect.isawaitable(found) else found
    except Exception as error:
        raise _wrap_failure(f"calling {name!r}", error) from error


def _wrap_failure(what: str, error: Exception) -> ConfigurationError:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename.startswith(f"{sys.path[0]}{os.sep}")]
    place = f" ({(own or frames)[-1].filename}, line {(own or frames)[-1].lineno})"
    return ConfigurationError(f"{what} failed: {type(error).__name__}: {error}{place}")


# Running a command.


class Exit(IntEnum):
    """The exit codes; a command that a signal has ended exits with 128 and the signal's number."""

    DONE = 0
    FOUND = 1
    USAGE = 2
    FAILED = 3


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of the command line.

    Attributes:
        app: `module:attribute`.
        app_dir: Where to look for the module.
        debug: Whether errors come with their traceback.
    """

    app: str | None
    app_dir: Path
    debug: bool


@dataclass
class CommandContext:
    """What a command works with.

    Attributes:
        binding: The application's binding.
        output: Where it writes its result.
        stopped_by: The signal that asked it to stop, if any.
    """

    binding: StorageBinding
    output: Output
    stopped_by: signal.Signals | None = None
    _stop: Callable[[], None] | None = None
    _task: asyncio.Task[object] | None = field(default_factory=asyncio.current_task)

    @contextmanager
    def stoppable(self, stop: Callable[[], None]) -> Iterator[None]:
        """Let the first signal stop the work in the block, instead of cancelling it."""
        self._stop = stop
        try:
            yield
        finally:
            self._stop = None

    def confirm(self, question: str) -> bool:
        """Ask before something is deleted; refuse where there is no terminal to ask on."""
        if not sys.stdin.isatty():
            raise click.UsageError(
                "the command needs a confirmation, and there is no terminal: pass --yes, or --dry-run to delete nothing"
            )
        loop = asyncio.get_running_loop()
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            agreed = click.confirm(question, err=True)
        except click.Abort:
            # The loop has seen the signal as well, and would handle it once its handler were added again.
            self.output.note("\nnothing was done")
            self.stopped_by = signal.SIGINT
            return False
        loop.add_signal_handler(signal.SIGINT, self.on_signal, signal.SIGINT)
        if not agreed:
            self.output.note("nothing was done")
        return agreed

    def on_signal(self, received: signal.Signals) -> None:
        """Stop the command: in an orderly way at the first signal, where it can, and at once at the second."""
        first, self.stopped_by = self.stopped_by is None, received
        if first and self._stop is not None:
            self.output.note("stopping once the work in progress is done; interrupt again to cancel it")
            self._stop()
        elif self._task is not None:
            self._task.cancel()


Work = Callable[[CommandContext], Awaitable["Exit | None"]]


def command(name: str) -> Callable[[Callable[..., Awaitable[Exit | None]]], click.Command]:
    """Make a command of a coroutine function, which gets the context and the options; `JSON` is an option of the output."""

    def decorate(function: Callable[..., Awaitable[Exit | None]]) -> click.Command:
        @click.command(name)
        @click.pass_obj
        @functools.wraps(function)
        def called(settings: Settings, /, as_json: bool = False, **options: Any) -> None:
            _run(settings, lambda context: function(context, **options), as_json=as_json)

        return called

    return decorate


def _run(settings: Settings, work: Work, *, as_json: bool) -> None:
    """Run a command with the application's binding, and exit with its code."""
    if settings.app is None:
        raise click.UsageError("no application is given: pass --app module:attribute, or set GRANITE_STORAGE_APP")
    output = Output(as_json=as_json)
    sys.path.insert(0, os.path.abspath(settings.app_dir))
    try:
        # What the application prints or logs is not part of the result.
        with contextlib.redirect_stdout(sys.stderr):
            code = asyncio.run(_run_command(settings.app, work, output))
    except (click.ClickException, click.exceptions.Exit):
        raise
    except (KeyboardInterrupt, asyncio.CancelledError):
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader of the result has closed the pipe; nothing must be written at the interpreter's exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.DONE
    except Exception as error:  # noqa: BLE001  # a program's last resort: it says what went wrong, and how to see more
        _show_error(error, output, debug=settings.debug)
        code = Exit.FAILED
    sys.exit(code)


def _show_error(error: Exception, output: Output, *, debug: bool) -> None:
    if debug:
        traceback.print_exception(error)
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    see = None
    if isinstance(error, StorageError):
        said, see = in_options(str(error)), error.docs
    elif isinstance(error, RuntimeError) and _NEEDS_CONTEXT in str(error):
        said, see = _GIVE_CONTEXT, Page.COMMAND_LINE.url
    elif isinstance(error, OSError) and error.strerror and error.filename is not None:
        said = f"{error.filename}: {error.strerror}"
    else:
        said = f"{type(error).__name__}: {str(error).split(_BACKGROUND, 1)[0]}"
    output.note(f"error: {said}", "red")
    if see is not None:
        output.note(f"see {see}")
    elif not debug and not isinstance(error, StorageError | SQLAlchemyError | OSError):
        output.note("this error is unexpected: pass --debug to see its traceback")


def in_options(text: str) -> str:
    """Return a message of the library in the words of the command line: options and commands instead of arguments and calls."""
    for argument, option in _OPTIONS.items():
        text = text.replace(argument, option)
    return text


@contextmanager
def usage_of(option: str) -> Iterator[None]:
    """Report an error in the block as a usage error: an option or an argument has an impossible value."""
    try:
        yield
    except (ConfigurationError, InvalidLocationError) as error:
        raise click.UsageError(f"{option}: {in_options(str(error))}") from error


async def require_rows(binding: StorageBinding, job: Mapping[str, Any]) -> None:
    """Refuse a key for --after that is none of a row of the application, and a --schema without its tables."""
    scan = Scan(binding, job.get("schemas", ()))
    if (after := job.get("after")) is not None:
        with usage_of("--after"):
            scan.require_key(after)
    with usage_of("--schema"):
        await scan.require_schemas()


async def _run_command(app: str, work: Work, output: Output) -> int:
    binding = await load_binding(app)
    async with _close_afterwards(binding):
        context = CommandContext(binding, output)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, context.on_signal, number)
        try:
            code = await work(context)
        except asyncio.CancelledError:
            if context.stopped_by is None:
                raise
            output.note("cancelled")
            code = None
    return 128 + context.stopped_by if context.stopped_by is not None else code or Exit.DONE


@asynccontextmanager
async def _close_afterwards(binding: StorageBinding) -> AsyncIterator[None]:
    """Close what the application opened: nothing but this command runs in the process."""
    try:
        async with binding.manager:
            yield
    finally:
        if binding.journal is not None:
            await binding.journal.aclose()
        engine = None if binding.session_factory is None else binding.session_factory.kw.get("bind")
        with contextlib.suppress(SQLAlchemyError):
            if isinstance(engine, AsyncEngine):
                await engine.dispose()
            elif isinstance(engine, Engine):
                await asyncio.to_thread(engine.dispose)


# Options that several commands have.


class ByteCount(click.ParamType[float]):
    """A number of bytes, such as `10MB` or `512KiB`."""

    name = "bytes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Read a number and its unit; what has none counts bytes."""
        found = _COUNT.fullmatch(str(value).strip())
        if found is None or not float(found[1]):
            self.fail(f"{value!r} is not a number of bytes above 0, such as 10MB", param, ctx)
        factor: int = (1024 if found[3] else 1000) ** _FACTORS[found[2].lower()]
        return float(found[1]) * factor


class Duration(click.ParamType[timedelta]):
    """A time, such as `24h`, `90m` or `7d`."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Read a number and its unit."""
        found = _DURATION.fullmatch(str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is not a time, such as 24h, 90m or 7d", param, ctx)
        return timedelta(seconds=float(found[1]) * _SECONDS[found[2]])


JSON = click.option("--json", "as_json", is_flag=True, help="Write JSON for a program: one object per line.")
YES = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Only show what would be done.")


def of_a_job(function: Callable[..., Awaitable[Exit | None]]) -> Callable[..., Awaitable[Exit | None]]:
    """Give a command the options of a job over rows; its function gets them in `job`, as the arguments of the job."""

    @click.option("--after", metavar="KEY", help="Continue after this key, which an earlier run has printed.")
    @click.option("--concurrency", type=click.IntRange(min=1), metavar="N", help="How many rows to process at a time.")
    @click.option("--rate", type=ByteCount(), metavar="BYTES", help="The most bytes per second, such as 10MB.")
    @click.option("--schema", "schemas", multiple=True, metavar="NAME", help="Only this schema; may be repeated.")
    @functools.wraps(function)
    def collected(
        *args: Any, after: str | None, concurrency: int | None, rate: float | None, schemas: Sequence[str], **others: Any
    ) -> Awaitable[Exit | None]:
        given = {"after": after, "concurrency": concurrency, "bytes_per_second": rate, "schemas": schemas or None}
        return function(*args, job={name: value for name, value in given.items() if value is not None}, **others)

    return collected
