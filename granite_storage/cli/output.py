"""The output of commands: results on the standard output, everything else on the standard error."""

from __future__ import annotations

import json
import shlex
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def escape_text(text: object) -> str:
    """Escape what a terminal would execute or misrender: control characters, bidirectional overrides, lone surrogates."""
    return "".join(character if unicodedata.category(character) not in _UNSAFE else _escape(character) for character in str(text))


def format_size(size: float) -> str:
    """Return a number of bytes for a person."""
    for unit in _UNITS:
        if size < 1000 or unit == _UNITS[-1]:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("the last unit takes any size")


def option_after(key: str) -> str:
    """Return the option that continues after a row, quoted for a shell: the row's key may be text of users."""
    return f"--after {shlex.quote(key)}"


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"


class Output:
    """Writes results for a person or for a program, and notes and progress beside them.

    Args:
        as_json: Whether the result is for a program: one JSON object per line.
    """

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._stream = sys.stdout
        reconfigure = getattr(self._stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
        plain: dict[str, Any] = {"markup": False, "highlight": False, "emoji": False}
        self._console = Console(file=self._stream, **plain)
        self._errors = Console(file=sys.stderr, **plain)
        self._progress: Progress | None = None

    @property
    def raw(self) -> BinaryIO:
        """The standard output, for bytes."""
        return cast(BinaryIO, self._stream.buffer)

    def record(self, values: Mapping[str, Any]) -> None:
        """Write an object for a program."""
        self._stream.write(json.dumps(values, default=str) + "\n")
        self._stream.flush()

    def line(self, text: str, style: str | None = None) -> None:
        """Write a line for a person; above the progress bar where both are on one terminal."""
        console = self._console
        if self._progress is not None and self._stream.isatty():
            console = self._progress.console
        console.print(Text(escape_text(text), style=style or ""), soft_wrap=True)

    def item(self, values: Mapping[str, Any], text: str, style: str | None = None) -> None:
        """Write an object for a program, or a line for a person."""
        if self.as_json:
            self.record(values)
        else:
            self.line(text, style)

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Write a table for a person; numbers stand on the right."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        lines = [list(row) for row in rows]
        for index, header in enumerate(headers):
            numbers = bool(lines) and all(isinstance(line[index], int) for line in lines)
            table.add_column(header, justify="right" if numbers else "left", overflow="fold")
        for line in lines:
            table.add_row(*(cell if isinstance(cell, Text) else Text(escape_text(cell)) for cell in line))
        self._console.print(table)

    def facts(self, values: Mapping[str, object]) -> None:
        """Write names and values, one below the other."""
        width = max(map(len, values), default=0)
        for name, value in values.items():
            self._console.print(Text.assemble((f"{name:<{width}}", "bold"), "  ", escape_text(value)), soft_wrap=True)

    def note(self, text: str, style: str | None = None) -> None:
        """Write a note for a person, on the standard error."""
        for line in text.split("\n"):
            self._errors.print(Text(escape_text(line), style=style or ""), soft_wrap=True)

    @contextmanager
    def progress(self, what: str, total: int | None, unit: str = "rows") -> Iterator[Bar]:
        """Show the progress of a long job with its rate and remaining time, on a terminal."""
        columns: list[ProgressColumn] = [
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            _CountColumn(unit),
            TimeRemainingColumn(compact=True),
        ]
        progress = Progress(*columns, console=self._errors, transient=True, disable=not self._errors.is_terminal)
        with progress:
            self._progress = progress
            try:
                yield Bar(progress, progress.add_task(what, total=total))
            finally:
                self._progress = None


class Bar:
    """A progress bar."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress = progress
        self._task = task

    def reach(self, number: int, size: int = 0) -> None:
        """Show how much is done."""
        self._progress.update(self._task, completed=number, size=size)

    def restart(self, what: str) -> None:
        """Start again, for another pass."""
        self._progress.reset(self._task, description=what)


class _CountColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        total = "?" if task.total is None else f"{task.total:,.0f}"
        said = f"{task.completed:,.0f}/{total} {self._unit}"
        if task.speed:
            said += f", {task.speed:,.0f}/s"
        size = task.fields.get("size")
        return Text(said + (f", {format_size(size)}" if size else ""))
