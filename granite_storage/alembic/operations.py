"""Turning columns of content or of paths into columns of files, and back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

from sqlalchemy import Column, ColumnElement, Connection, Table, and_, select, update

from granite_storage._jobs import require_concurrency
from granite_storage.alembic._owners import Owners
from granite_storage.alembic._transactions import (
    Op,
    closing,
    columns_of,
    count,
    key_pages,
    own_transactions,
    reflect_table,
    require_online,
    run,
)
from granite_storage.alembic.sources import (
    CopyOf,
    InPlace,
    Place,
    Stored,
    adopt,
    all_or_none,
    copy_content,
    copy_object,
    naming,
    remove,
    store_bytes,
)
from granite_storage.alembic.sources import Work as StoreWork
from granite_storage.exceptions import ObjectNotFoundError
from granite_storage.manager import StorageManager
from granite_storage.orm.locking import among
from granite_storage.refs import StoredObjectRef

__all__ = [
    "ConversionReport",
    "Made",
    "Progress",
    "Row",
    "Work",
    "blob_to_storage",
    "convert",
    "paths_to_storage",
    "storage_to_blob",
    "storage_to_paths",
    "storage_to_text",
    "text_to_storage",
]

logger: logging.Logger = logging.getLogger("granite_storage")

Row: TypeAlias = Mapping[str, Any]
Of: TypeAlias = "str | Callable[[Row], str | None] | None"
_ROWS_OF_PATHS = 100

# Filling one column from another, some rows at a time.
#
# Each step is a transaction: it locks some rows, makes their new values, and writes them. A row whose new column is set is
# done, so an interrupted conversion continues where it was. The objects of a step are removed again where its transaction has
# not started to commit; a killed program leaves at most the objects of one step without a row.


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """The progress of a conversion; rows that an earlier run has converted are not counted.

    Attributes:
        table: The table.
        source: The column that is read.
        target: The column that is written.
        total: How many rows were to be converted when it started.
        stored: How many objects were stored, or values restored.
        adopted: How many objects were adopted where they are.
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
        """The number of processed rows."""
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
        refs: Which of the two contains refs.
        also_read: Other columns that the work needs.
        rows_per_step: How many rows a step takes.
    """

    table: str
    source: str
    target: str
    schema: str | None
    refs: str
    also_read: Sequence[str]
    rows_per_step: int


def convert(op: Op, what: Conversion, work: Work, progress: Progress | None) -> ConversionReport:
    """Convert every row that is not converted yet."""
    connection = require_online(op, "converting a column")
    if _is_finished(connection, what):
        return ConversionReport(what.table, what.source, what.target, 0)
    other = what.target if what.refs == what.source else what.source
    table = reflect_table(connection, what.table, what.schema, refs=what.refs, others=[other, *what.also_read])
    source, target = table.c[what.source], table.c[what.target]
    waiting = and_(source.is_not(None), target.is_(None))
    with own_transactions(op) as step:
        connection = op.get_bind()
        report = ConversionReport(what.table, what.source, what.target, count(connection, table, waiting))
        for keys in key_pages(connection, table, waiting, what.rows_per_step):
            with ExitStack() as unwritten, step():
                rows = _lock_rows(connection, table, target, and_(among(table, keys), waiting))
                made = work(connection, table, rows)
                unwritten.callback(_undo, made)  # after the ROLLBACK of the step
                _write(connection, table, target, rows, made)
                unwritten.pop_all()  # a COMMIT that fails may have happened
            report = _add_counts(report, made)
            logger.info("%s.%s -> %s: %d of %d rows", what.table, what.source, what.target, report.done, report.total)
            if progress is not None:
                progress(report)
    return report


def _is_finished(connection: Connection, what: Conversion) -> bool:
    """Return whether an earlier, interrupted run of the same migration has dropped the source already."""
    found = columns_of(connection, what.table, what.schema)
    if what.source in found or what.target not in found:
        return False
    logger.warning("%s.%s does not exist, so %s is treated as converted already", what.table, what.source, what.target)
    return True


def _lock_rows(connection: Connection, table: Table, target: Column[Any], where: ColumnElement[bool]) -> list[Row]:
    statement = select(*(column for column in table.c if column is not target)).where(where).order_by(*table.primary_key)
    return [dict(row) for row in connection.execute(statement.with_for_update()).mappings()]


def _write(connection: Connection, table: Table, target: Column[Any], rows: Sequence[Row], made: Sequence[Made]) -> None:
    for row, item in zip(rows, made, strict=True):
        if item.value is not None:
            connection.execute(update(table).where(among(table, [_key(table, row)])).values({target: item.value}))


def _undo(made: Sequence[Made]) -> None:
    """Remove the objects of a step whose rows could not be written."""
    for item in made:
        if item.undo is not None:
            item.undo()


def _add_counts(report: ConversionReport, made: Sequence[Made]) -> ConversionReport:
    skipped, adopted = sum(item.value is None for item in made), sum(item.is_adopted for item in made)
    stored = len(made) - skipped - adopted
    return replace(report, stored=report.stored + stored, adopted=report.adopted + adopted, skipped=report.skipped + skipped)


# The operations that migrations call.


def text_to_storage(
    op: Op,
    manager: StorageManager,
    table: str,
    source: str,
    target: str,
    *,
    storage_key: str,
    encoding: str = "utf-8",
    content_type: Of = "text/plain; charset=utf-8",
    filename: Of = None,
    also_read: Sequence[str] = (),
    schema: str | None = None,
    concurrency: int = 8,
    progress: Progress | None = None,
) -> ConversionReport:
    """Store each text of a column as an object, and write its ref to another column. NULL stays NULL.

    Rows are locked, stored, read back and written some at a time, each time in a transaction of its own, so memory is that of
    `concurrency` values. A row whose target is set is left alone: run an interrupted conversion again to continue it. What the
    migration did before is committed when it starts. Nothing of the source changes.

    Args:
        op: Alembic's `op`.
        manager: The manager; it is opened and closed on an event loop of its own.
        table: The table.
        source: The column with the text.
        target: The column of refs, which must exist; see `add_storage_column`.
        storage_key: The policy to store under.
        encoding: How the text becomes bytes.
        content_type: The media type, or a function that takes the row as a mapping.
        filename: The file's name, or such a function.
        also_read: Columns that those functions need, beside the primary key.
        schema: The table's schema.
        concurrency: How many rows are converted at a time; a killed program leaves at most as many objects without a row.
        progress: Called with a report after each step, which is also logged.

    Returns:
        The report of this run.

    Raises:
        ConfigurationError: A column or the primary key is missing, or there is no database (`--sql`).
        ChecksumMismatchError: An object was read back with other content than was stored.
        StorageError: An object could not be stored. Every error names the row in a note; rows converted before stay converted.
    """

    def encode(row: Row) -> bytes:
        return str(row[source]).encode(encoding)

    conversion = Conversion(table, source, target, schema, target, also_read, require_concurrency(concurrency))
    return _store_contents(op, manager, storage_key, conversion, encode, content_type, filename, progress)


def blob_to_storage(
    op: Op,
    manager: StorageManager,
    table: str,
    source: str,
    target: str,
    *,
    storage_key: str,
    content_type: Of = None,
    filename: Of = None,
    also_read: Sequence[str] = (),
    schema: str | None = None,
    concurrency: int = 8,
    progress: Progress | None = None,
) -> ConversionReport:
    """Store each value of a binary column as an object; otherwise as `text_to_storage`."""

    def encode(row: Row) -> bytes:
        return bytes(row[source])

    conversion = Conversion(table, source, target, schema, target, also_read, require_concurrency(concurrency))
    return _store_contents(op, manager, storage_key, conversion, encode, content_type, filename, progress)


def paths_to_storage(
    op: Op,
    manager: StorageManager,
    table: str,
    source: str,
    target: str,
    *,
    storage_key: str,
    mapping: Callable[[Any], InPlace | CopyOf | None],
    skip_missing: bool = False,
    schema: str | None = None,
    concurrency: int = 8,
    progress: Progress | None = None,
) -> ConversionReport:
    """Convert the values of another library, such as paths, keys or URLs, to refs; otherwise as `text_to_storage`.

    An object in one of the manager's backends is adopted where it is: it is read once for its size and checksum, and not moved.
    One that another row refers to already is copied, because an object has one owner: every column of refs in the database is
    asked, in any table and schema, by every key of the manager that leads to the object. Anything else that the mapping returns
    is copied in; anything but a regular file is `ObjectNotFoundError`.

    Args:
        op: Alembic's `op`.
        manager: The manager.
        table: The table.
        source: The column with the paths.
        target: The column of refs.
        storage_key: The policy that the refs belong to, and that copies are stored under.
        mapping: Takes the value, and returns an `InPlace`, a `CopyOf`, or None for no file; `PlainPath` is one.
        skip_missing: Whether a row whose object is missing keeps no ref, and is counted as skipped; otherwise it is an error.
        schema: The table's schema.
        concurrency: How many objects are read or stored at a time.
        progress: Called with a report after each step.

    Raises:
        InvalidLocationError: A location is not valid in the library.
        InvalidReferenceError: A media type that the mapping returns cannot be kept.
        ObjectNotFoundError: The object of a path is missing.
        TypeError: The mapping returns something else. A note at each error names the row.
    """
    storing = _Storing(manager, storage_key, target, require_concurrency(concurrency))
    owners: Owners | None = None

    def find(connection: Connection, table: Table, rows: Sequence[Row]) -> list[Made]:
        nonlocal owners
        found = [_map_path(mapping, row[source], _label(table, row)) for row in rows]
        owners = owners or Owners(connection, manager, table.c[target])
        taken = owners.find_taken(connection, [item for item in found if isinstance(item, InPlace)])
        works: list[Callable[[Place], StoreWork]] = []
        for item in found:
            works.append(partial(_store_item, manager, item, taken, skip_missing))
            if isinstance(item, InPlace):
                taken = {*taken, *owners.addresses(item)}
        return storing.store(table, rows, works)

    with closing(manager):
        return convert(op, Conversion(table, source, target, schema, target, (), _ROWS_OF_PATHS), find, progress)


def storage_to_text(
    op: Op,
    manager: StorageManager,
    table: str,
    source: str,
    target: str,
    *,
    encoding: str = "utf-8",
    schema: str | None = None,
    concurrency: int = 8,
    progress: Progress | None = None,
) -> ConversionReport:
    """Restore the content of a column of refs to a text column, for a downgrade; verified, in steps, resumable.

    The objects stay where they are, because it is unknown whether the migration will commit. Those without a reference afterwards
    are orphans. So are their variants, which are not restored: they stay as long as the column of refs is there.

    Raises:
        ObjectNotFoundError: An object is missing.
        ChecksumMismatchError: Its bytes do not have the checksum of its ref.
        UnicodeDecodeError: It is not text in this encoding.
    """

    async def read(ref: StoredObjectRef) -> Any:
        return (await manager.get(ref)).decode(encoding)

    conversion = Conversion(table, source, target, schema, source, (), require_concurrency(concurrency))
    return _restore(op, manager, conversion, read, progress)


def storage_to_blob(
    op: Op,
    manager: StorageManager,
    table: str,
    source: str,
    target: str,
    *,
    schema: str | None = None,
    concurrency: int = 8,
    progress: Progress | None = None,
) -> ConversionReport:
    """Restore the content of a column of refs to a binary column; otherwise as `storage_to_text`."""
    conversion = Conversion(table, source, target, schema, source, (), require_concurrency(concurrency))
    return _restore(op, manager, conversion, manager.get, progress)


def storage_to_paths(
    op: Op,
    table: str,
    source: str,
    target: str,
    *,
    mapping: Callable[[StoredObjectRef], str],
    schema: str | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write the path, key or URL of each object for another library, for a downgrade; no object is changed.

    Variants have no path in the other column. They stay as long as the column of refs is there, and are orphans afterwards.

    Args:
        op: Alembic's `op`.
        table: The table.
        source: The column of refs.
        target: The column of paths.
        mapping: Returns the value to write; `PlainPath.back` is one.
        schema: The table's schema.
        progress: Called with a report after each step.
    """

    def path_of(row: Row, label: str) -> str:
        with naming(label):
            path: object = mapping(StoredObjectRef.from_dict(row[source]))
            if not isinstance(path, str):
                raise TypeError(f"mapping must return a str, not {path!r:.120}")
            return path

    def work(_: Connection, table: Table, rows: Sequence[Row]) -> list[Made]:
        return [Made(path_of(row, _label(table, row))) for row in rows]

    return convert(op, Conversion(table, source, target, schema, source, (), _ROWS_OF_PATHS), work, progress)


def _restore(
    op: Op,
    manager: StorageManager,
    conversion: Conversion,
    read: Callable[[StoredObjectRef], Coroutine[Any, Any, Any]],
    progress: Progress | None,
) -> ConversionReport:
    def content_of(row: Row, label: str) -> Any:
        with naming(label):
            return run(read(StoredObjectRef.from_dict(row[conversion.source])))

    def restore(_: Connection, table: Table, rows: Sequence[Row]) -> list[Made]:
        return [Made(content_of(row, _label(table, row))) for row in rows]

    with closing(manager):
        return convert(op, conversion, restore, progress)


class _Storing:
    """Stores objects for rows."""

    def __init__(self, manager: StorageManager, storage_key: str, target: str, concurrency: int) -> None:
        manager.policy(storage_key)
        self.manager = manager
        self._storage_key = storage_key
        self._target = target
        self._concurrency = concurrency

    def store(self, table: Table, rows: Sequence[Row], works: Sequence[Callable[[Place], StoreWork]]) -> list[Made]:
        """Store an object for each row, or none at all; each row has its own work, which stores at the row's place."""
        named: list[tuple[str, Callable[[], StoreWork]]] = []
        for row, work in zip(rows, works, strict=True):
            place = Place(self._storage_key, table.name, _key(table, row), self._target)
            named.append((_label(table, row), partial(work, place)))
        return [self._to_made(stored) for stored in run(all_or_none(self.manager, named, self._concurrency))]

    def _to_made(self, stored: Stored | None) -> Made:
        if stored is None:
            return Made(None)
        if not stored.is_own:
            return Made(stored.ref.to_dict(), is_adopted=True)
        return Made(stored.ref.to_dict(), undo=lambda: run(remove(self.manager, stored.ref)))


def _store_contents(
    op: Op,
    manager: StorageManager,
    storage_key: str,
    conversion: Conversion,
    encode: Callable[[Row], bytes],
    content_type: Of,
    filename: Of,
    progress: Progress | None,
) -> ConversionReport:
    def work_of(row: Row, label: str) -> Callable[[Place], StoreWork]:
        with naming(label):
            content, kind, name = encode(row), _resolve(content_type, row), _resolve(filename, row)
        return lambda place: store_bytes(manager, place, content, kind, name)

    def store(_: Connection, table: Table, rows: Sequence[Row]) -> list[Made]:
        return storing.store(table, rows, [work_of(row, _label(table, row)) for row in rows])

    storing = _Storing(manager, storage_key, conversion.target, conversion.rows_per_step)
    with closing(manager):
        return convert(op, conversion, store, progress)


def _key(table: Table, row: Row) -> tuple[Any, ...]:
    return tuple(row[column.name] for column in table.primary_key)


def _label(table: Table, row: Row) -> str:
    """Return a row as it is named in messages."""
    return f"{table.name} {_key(table, row)}"


def _map_path(mapping: Callable[[Any], InPlace | CopyOf | None], value: Any, label: str) -> InPlace | CopyOf | None:
    with naming(label):
        item: object = mapping(value)
        if item is None or isinstance(item, InPlace | CopyOf):
            return item
        raise TypeError(f"mapping must return an InPlace, a CopyOf or None, not {item!r:.120}")


async def _store_item(
    manager: StorageManager, item: InPlace | CopyOf | None, taken: set[tuple[str, str]], skip_missing: bool, place: Place
) -> Stored | None:
    """Adopt or copy what a value leads to."""
    try:
        match item:
            case None:
                return None
            case CopyOf():
                return await copy_content(manager, place, item)
            case InPlace() if item.address in taken:
                return await copy_object(manager, place, item)
            case InPlace():
                return await adopt(manager, place, item)
    except (ObjectNotFoundError, FileNotFoundError):
        if skip_missing:
            return None
        raise


def _resolve(given: Of, row: Row) -> str | None:
    return given(row) if callable(given) else given
