"""Filling one column from another, some rows at a time: what all conversions have in common.

Each step is a transaction: it locks some rows, has their new values made, and writes them. A row whose new column is set is
done, so a conversion that was broken off goes on where it stood. Objects of a step whose transaction has not begun to commit are
removed again; of a program that was killed, the objects of one step at most are left without a row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from sqlalchemy import Column, ColumnElement, Connection, Table, and_, select, update

from granite_storage.alembic._transactions import Op, columns_of, count, key_pages, online, own_transactions, table_with
from granite_storage.orm.locking import among

__all__ = ["ConversionReport", "Made", "Progress", "Row", "Work", "convert"]

logger: logging.Logger = logging.getLogger("granite_storage")

Row: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """How far a conversion has come; what rows were done in an earlier run is not counted.

    Attributes:
        table: The table.
        source: The column that is read.
        target: The column that is written.
        total: How many rows were to be done when it began.
        stored: How many objects were stored, or how many values were brought back.
        adopted: How many objects were adopted where they lie.
        skipped: How many rows have nothing to convert, and keep an empty target.
    """

    table: str
    source: str
    target: str
    total: int
    stored: int = 0
    adopted: int = 0
    skipped: int = 0

    @property
    def done(self) -> int:
        """How many rows were looked at."""
        return self.stored + self.adopted + self.skipped


Progress: TypeAlias = Callable[[ConversionReport], object]


@dataclass(frozen=True, slots=True)
class Made:
    """The new value of a row.

    Attributes:
        value: What its column is set to; None leaves it empty.
        undo: Removes what was stored for it.
        is_adopted: Whether an object was adopted for it.
    """

    value: Any
    undo: Callable[[], None] | None = None
    is_adopted: bool = False


Work: TypeAlias = Callable[[Connection, Table, Sequence[Row]], Sequence[Made]]


@dataclass(frozen=True, slots=True)
class Conversion:
    """Which column is filled from which.

    Attributes:
        table: The table's name.
        source: The column that is read.
        target: The column that is written.
        schema: The table's schema.
        refs: Which of both holds refs.
        also_read: Other columns that the work needs.
        at_a_time: How many rows a step takes.
    """

    table: str
    source: str
    target: str
    schema: str | None
    refs: str
    also_read: Sequence[str]
    at_a_time: int


def convert(op: Op, what: Conversion, work: Work, progress: Progress | None) -> ConversionReport:
    """Convert every row that is not done yet."""
    connection = online(op, "converting a column")
    if _is_over(connection, what):
        return ConversionReport(what.table, what.source, what.target, 0)
    other = what.target if what.refs == what.source else what.source
    table = table_with(connection, what.table, what.schema, refs=what.refs, others=[other, *what.also_read])
    source, target = table.c[what.source], table.c[what.target]
    waiting = and_(source.is_not(None), target.is_(None))
    with own_transactions(op) as step:
        connection = op.get_bind()
        report = ConversionReport(what.table, what.source, what.target, count(connection, table, waiting))
        for keys in key_pages(connection, table, waiting, what.at_a_time):
            made: Sequence[Made] = []
            unwritten: _UnwrittenError | None = None
            try:
                with step():
                    made = _step(connection, table, target, and_(among(table, keys), waiting), work)
            except _UnwrittenError as error:
                unwritten = error
            if unwritten is not None:
                unwritten.undo()
                raise unwritten.cause  # out here it keeps the causes of its own
            report = _counted(report, made)
            _tell(report, progress)
    return report


def _is_over(connection: Connection, what: Conversion) -> bool:
    """Tell whether a later step of the same migration has dropped the source in a run that was broken off afterwards."""
    found = columns_of(connection, what.table, what.schema)
    if what.source in found or what.target not in found:
        return False
    logger.warning("%s.%s is not there, so %s is taken as converted already", what.table, what.source, what.target)
    return True


def _step(connection: Connection, table: Table, target: Column[Any], where: ColumnElement[bool], work: Work) -> Sequence[Made]:
    keys = list(table.primary_key)
    statement = select(*(column for column in table.c if column is not target)).where(where).order_by(*keys)
    rows = [dict(row) for row in connection.execute(statement.with_for_update()).mappings()]
    made = work(connection, table, rows)
    try:
        for row, item in zip(rows, made, strict=True):
            if item.value is not None:
                own = among(table, [tuple(row[column.name] for column in keys)])
                connection.execute(update(table).where(own).values({target: item.value}))
    except BaseException as error:
        raise _UnwrittenError(made, error) from error
    return made


class _UnwrittenError(Exception):
    """The rows of a step could not be written, so its objects have no use."""

    def __init__(self, made: Sequence[Made], cause: BaseException) -> None:
        super().__init__(made, cause)
        self.cause = cause
        self._made = made

    def undo(self) -> None:
        for item in self._made:
            if item.undo is not None:
                item.undo()


def _counted(report: ConversionReport, made: Sequence[Made]) -> ConversionReport:
    skipped = sum(item.value is None for item in made)
    adopted = sum(item.is_adopted for item in made)
    return replace(
        report,
        stored=report.stored + len(made) - skipped - adopted,
        adopted=report.adopted + adopted,
        skipped=report.skipped + skipped,
    )


def _tell(report: ConversionReport, progress: Progress | None) -> None:
    logger.info("%s.%s -> %s: %d of %d rows", report.table, report.source, report.target, report.done, report.total)
    if progress is not None:
        progress(report)
