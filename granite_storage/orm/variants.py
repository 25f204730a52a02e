"""Variants in the rows: how they are read and set, and how one is made when it is asked for.

A variant is set by compare-and-set on the location of its original. The rows that hold the original are locked, and their values
read under the lock. Each must still hold under the variant's name what was seen there before the variant was made. Then the whole
value is written as it was read, with the variant in it, and no other column. Nothing that was read before the lock is written
back: another variant may have come meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary

from sqlalchemy import Column, ColumnElement, Connection, bindparam, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from granite_storage._documentation import Page
from granite_storage._tasks import contained, shielded, shielded_cleanup, wait_uncancelled
from granite_storage._telemetry import fields_of
from granite_storage.exceptions import ConfigurationError, InvalidReferenceError, StaleAttachmentError
from granite_storage.locations import matches_generated_name, uuid7_hex
from granite_storage.orm._interfaces import Binding, ColumnType, DeclaredVariant, StoredObject, leave_out
from granite_storage.orm._util import is_busy
from granite_storage.orm.columns import AttachmentType, location_of, portable_storage_ref_type, where_json
from granite_storage.orm.flush import current_transaction
from granite_storage.orm.locking import among, find_shared, take_write_lock
from granite_storage.orm.references import as_stored, find_location_columns, keeping_other_columns
from granite_storage.orm.transactions import require_transactions, unit_of, watch
from granite_storage.orm.uploads import make_variant, prepare_variant, remove
from granite_storage.refs import StoredObjectRef, require_scanned

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker

    from granite_storage.manager import StorageManager


logger: logging.Logger = logging.getLogger("granite_storage")

T = TypeVar("T")

Which: TypeAlias = Literal["missing", "stale", "all"]
"""Which variants are made: those that are missing, those of another recipe as well, or all of them again."""

LONGEST_WAIT = 30.0
"""Seconds that a variant waits for transactions that have locked the rows of its original."""


@dataclass(frozen=True, slots=True, eq=False)
class Holding:
    """A row that holds an object, and the value of its column.

    Attributes:
        column: The column.
        is_row: The criterion of the row, for as long as it holds the object.
        value: Its JSON.
        options: The execution options that lead to the table.
    """

    column: Column[Any]
    is_row: ColumnElement[bool]
    value: dict[str, Any]
    options: Mapping[str, Any]

    @property
    def column_type(self) -> AttachmentType:
        """The type of the column."""
        return cast("AttachmentType", self.column.type)

    @property
    def ref(self) -> StoredObjectRef:
        """The value as a ref; raises `InvalidReferenceError` where it is none."""
        return StoredObjectRef.from_dict(self.value)

    @property
    def variants(self) -> dict[str, dict[str, Any]]:
        """The JSON of its variants, by their names."""
        found = self.value.get("variants")
        if found is None:
            return {}
        if not isinstance(found, dict) or not all(isinstance(variant, dict) for variant in found.values()):
            raise InvalidReferenceError(f"the row of the object {self.value['location']!r} has variants that cannot be read")
        return found

    def wants(self, name: str, recipe: str | None) -> bool:
        """Return whether the column declares a variant of this original, and the row does not have it by this recipe."""
        declared, found = self.column_type.variants.get(name), self.variants.get(name)
        if declared is None or declared.digest != recipe or (found is not None and found.get("recipe") == recipe):
            return False
        return declared.accept is None or declared.is_for(self.ref)

    def takes(self, name: str, made: MadeVariant) -> bool:
        """Return whether the row still holds what was seen before, and is to have the variant that was made."""
        declared = self.column_type.variants.get(name)
        is_forced = made.replaces_same and declared is not None and declared.digest == made.ref.recipe
        return is_forced or self.wants(name, made.ref.recipe)

    def location_of(self, name: str) -> str | None:
        """Return the location of a variant; None where it is missing."""
        return self.variants.get(name, {}).get("location")


@dataclass(frozen=True, slots=True)
class MadeVariant:
    """A variant that is stored, and that no row refers to yet.

    Attributes:
        ref: Its ref.
        seen: What the rows of its original held under its name before it was made: locations, and None where it was missing.
        replaces_same: Whether it takes the place of one by the same recipe, too.
    """

    ref: StoredObjectRef
    seen: frozenset[str | None]
    replaces_same: bool = False


def is_kept(held: StoredObjectRef, declared: DeclaredVariant, which: Which) -> bool:
    """Return whether a ref has a variant that need not be made."""
    return (which == "missing" and declared.name in (held.variants or {})) or (which == "stale" and declared.is_in(held))


def read_holdings(
    connection: Connection, column: Column[Any], is_here: ColumnElement[bool], place: tuple[str, str], options: Mapping[str, Any]
) -> list[Holding]:
    """Return the rows of a column that hold an object, without locking them.

    Args:
        connection: The connection.
        column: The column.
        is_here: The criterion for the rows.
        place: The backend and the location of the object: the same location elsewhere is another object.
        options: The execution options that lead to the table.
    """
    found = connection.execute(select(as_stored(column, connection.dialect)).where(is_here), execution_options=options)
    values = (value_of(raw, place) for (raw,) in found)
    return [Holding(column, is_here, value, options) for value in values if value is not None]


def lock_holdings(
    connection: Connection, column: Column[Any], is_here: ColumnElement[bool], place: tuple[str, str], options: Mapping[str, Any]
) -> list[Holding]:
    """Lock the rows of a column that hold an object, in the order of their primary keys, and return what they hold now.

    The arguments are those of `read_holdings`.
    """
    table, keys = column.table, list(column.table.primary_key)
    holdings: list[Holding] = []
    # Row by row: on MariaDB a list may lock other rows on the way.
    for row in connection.execute(select(*keys).where(is_here).order_by(*keys), execution_options=options).all():
        is_row = among(table, [tuple(row)]) & is_here
        locked = select(as_stored(column, connection.dialect)).where(is_row).with_for_update(key_share=True)
        values = [value_of(raw, place) for (raw,) in connection.execute(locked, execution_options=options)]
        holdings += [Holding(column, is_row, value, options) for value in values if value is not None]
    return holdings


def choose_rows(holdings: Sequence[Holding], made: Mapping[str, MadeVariant]) -> dict[str, list[Holding]]:
    """Return which variants may be set, and in which of the locked rows.

    A row that has a variant by the same recipe keeps it, unless it is made again, and one whose column does not declare it does
    not get it. Of the others each must hold what was seen before, or the variant is left out: an older recipe must not replace
    the result of a newer one.
    """
    chosen: dict[str, list[Holding]] = {}
    for name, variant in made.items():
        lacking = [holding for holding in holdings if holding.takes(name, variant)]
        if lacking and all(holding.location_of(name) in variant.seen for holding in lacking):
            chosen[name] = lacking
    return chosen


def write_variants(
    connection: Connection, chosen: Mapping[str, Sequence[Holding]], made: Mapping[str, MadeVariant]
) -> list[StoredObjectRef]:
    """Set variants in locked rows, one UPDATE for each; return those that they take the places of.

    Those that are chosen and were not made are taken out.

    Raises:
        StaleAttachmentError: A row does not hold the object any more, though it is locked.
    """
    displaced: list[StoredObjectRef] = []
    for holding in dict.fromkeys(holding for holdings in chosen.values() for holding in holdings):
        names = [name for name, holdings in chosen.items() if holding in holdings]
        variants = holding.variants
        displaced += [StoredObjectRef.from_dict(variants[name]) for name in names if name in variants]
        left = {name: variant for name, variant in variants.items() if name in made or name not in names}
        now = {**left, **{name: made[name].ref.to_dict() for name in names if name in made}}
        value = {name: part for name, part in holding.value.items() if name != "variants"} | ({"variants": now} if now else {})
        write_value(connection, holding, value)
    return displaced


def write_value(connection: Connection, holding: Holding, value: dict[str, Any]) -> None:
    """Write a value into a locked row, and no other column.

    Raises:
        StaleAttachmentError: It does not hold the object any more, though it is locked.
    """
    new = bindparam(None, value, type_=portable_storage_ref_type())
    values = {holding.column: new, **keeping_other_columns(holding.column)}
    written = update(holding.column.table).where(holding.is_row).values(values)
    if connection.execute(written, execution_options=holding.options).rowcount != 1:
        raise StaleAttachmentError(f"a locked row no longer refers to the object at {holding.value['location']!r}")


def undeclared_in(holdings: Sequence[Holding], names: Iterable[str]) -> dict[str, list[Holding]]:
    """Return which of the locked rows have variants of these names that their columns do not declare."""
    found = {
        name: [item for item in holdings if name in item.variants and name not in item.column_type.variants] for name in names
    }
    return {name: some for name, some in found.items() if some}


def entity_of(source: StoredObjectRef) -> str:
    """Return the segment of an original's location that names its row, where the library has generated it; else a new one."""
    segments = source.location.split("/")
    is_generated = matches_generated_name(source.location) and len(segments) > 3
    return segments[-3] if is_generated else uuid7_hex()


def not_committed(source: StoredObjectRef) -> StaleAttachmentError:
    """Return the error for an original that no committed row holds."""
    return StaleAttachmentError(
        f"no committed row refers to the object at {source.location!r}, so its variant cannot be recorded: commit the "
        "transaction that stores it first, or load the row again if it has received another file"
    )


def locked_for_long(location: str, seconds: float) -> StaleAttachmentError:
    """Return the error for rows of an original that stayed locked; the transaction that has locked them is not known."""
    return StaleAttachmentError(
        f"a transaction has locked the rows of the object at {location!r} for {seconds:.0f} s. It may be the caller's own: end"
        " one that has written or locked such a row, or on SQLite anything, before you await the variant. If it is another one,"
        " try again"
    )


def value_of(raw: Any, place: tuple[str, str]) -> dict[str, Any] | None:
    """Return a value of a column as it is, if it holds the object at a place."""
    try:
        value = json.loads(raw)
    except (TypeError, ValueError):
        return None
    return value if isinstance(value, dict) and (value.get("backend"), value.get("location")) == place else None


# Variants that are made when they are asked for. Callers in one process that ask for the same one share the work.


@dataclass(slots=True, eq=False)
class _Shared:
    task: asyncio.Task[Any]
    waiting: int = 0


_shared: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Hashable, _Shared]] = WeakKeyDictionary()


async def share(key: Hashable, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Return the result of some work, which all callers with the same key share; it is cancelled with the last of them."""
    in_progress = _shared.setdefault(asyncio.get_running_loop(), {})
    entry = in_progress.get(key)
    if entry is None:
        entry = in_progress[key] = _Shared(asyncio.create_task(_contain(work)))
        entry.task.add_done_callback(lambda _: _forget(in_progress, key, entry))
    entry.waiting += 1
    try:
        result: T = await asyncio.shield(entry.task)
    except asyncio.CancelledError:
        if entry.waiting == 1 and not entry.task.done():
            _forget(in_progress, key, entry)
            entry.task.cancel()
            await wait_uncancelled(entry.task)
        raise
    finally:
        entry.waiting -= 1
    return result


async def _contain(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    with contained("making a variant"):  # callers that share it are not being cancelled
        return await work()


def _forget(in_progress: dict[Hashable, _Shared], key: Hashable, entry: _Shared) -> None:
    if in_progress.get(key) is entry:
        del in_progress[key]


# Without a journal: the object is deleted again unless its row has it; where that is unknown, it is kept.


class _Outcome(Enum):
    UNSET = auto()
    IN_DOUBT = auto()
    SET = auto()


async def make_without_journal(
    binding: Binding,
    column_type: ColumnType,
    source: StoredObjectRef,
    declared: DeclaredVariant,
    *,
    which: Which = "missing",
    options: Mapping[str, Any],
) -> StoredObjectRef:
    """Make a variant of the object of a committed row, and return what the row holds then.

    Args:
        binding: The binding.
        column_type: The column.
        source: The original.
        declared: The variant.
        which: Whether it is made though the row has it.
        options: The execution options that lead to the table of the row.

    Raises:
        ConfigurationError: The base was bound without a session factory.
        StaleAttachmentError: No committed row holds the object, or others have locked it for long.
        ScanPendingError: A virus scanner has not judged the original yet.
        InfectedObjectError: It found something in it.
        DerivationRefusedError: The variant cannot be made of this original.
        DerivationFailedError: It could not be made now.
        StorageError: It could not be stored.
    """
    manager = column_type.manager_in(binding)
    setting = _Setting(_require_sessions(binding), column_type, manager, source, declared.name, options)
    holdings = await shielded(setting.read())
    if not holdings:
        raise not_committed(source)
    held = holdings[0].ref
    if is_kept(held, declared, which):
        return held
    require_scanned(held)
    prepared = prepare_variant(manager, column_type, entity_of(held), held.location, held.storage_key, declared)
    seen = frozenset(holding.location_of(declared.name) for holding in holdings)
    stored: list[StoredObjectRef] = []
    try:
        await make_variant(manager, held, prepared, declared, stored.append)
        await shielded(setting.run({declared.name: MadeVariant(stored[0], seen, which == "all")}))
    finally:
        if setting.outcome is _Outcome.IN_DOUBT:
            logger.warning(
                "it is unknown whether a row has the variant %r, which stays", prepared.location, extra=fields_of(prepared)
            )
        elif setting.outcome is _Outcome.UNSET and stored:
            await shielded_cleanup(setting.remove_unless_taken(stored), "deleting a variant that no row has taken")
    if setting.held is None or declared.name not in (setting.held.variants or {}):
        raise not_committed(source)
    return setting.held


async def drop_without_journal(
    binding: Binding, column_type: ColumnType, source: StoredObjectRef, name: str, *, options: Mapping[str, Any]
) -> bool:
    """Take a variant that its column does not declare out of the rows of its original; return whether one had it.

    Raises:
        ConfigurationError: The base was bound without a session factory.
        StaleAttachmentError: Others have locked the row for long.
    """
    setting = _Setting(_require_sessions(binding), column_type, column_type.manager_in(binding), source, name, options)
    await shielded(setting.run({}))
    return setting.outcome is _Outcome.SET


def _require_sessions(binding: Binding) -> async_sessionmaker[AsyncSession]:
    if (sessions := binding.own_sessions) is None:
        raise ConfigurationError(
            "making a variant on request needs sessions: bind_storage(..., session_factory=...)", see=Page.BINDING
        )
    return sessions


def _find(
    connection: Connection, find: Callable[..., list[Holding]], column: Column[Any], source: StoredObjectRef
) -> list[Holding]:
    is_generated = column in find_location_columns(connection, [column])
    _, location = location_of(column, connection.dialect.name, is_generated=is_generated)
    if connection.dialect.name == "sqlite":  # a JSON function fails there on a value that is not JSON
        location = where_json(column, location)
    return find(connection, column, location == source.location, (source.backend, source.location), {})


@dataclass(slots=True, eq=False)
class _Setting:
    """Sets a variant in the rows of its original, or takes it out, in a transaction of its own.

    What rows no longer have is displaced as by a flush: the end of the transaction decides whether it is deleted, after every
    other row that may refer to it was searched.

    Attributes:
        sessions: The sessions.
        column_type: The column of the rows.
        manager: The manager.
        source: The original.
        name: The name of the variant.
        options: The execution options of the connection, which lead to the table of the rows.
        has_written: Whether rows were written.
        outcome: Whether rows have it.
        held: What a row holds now.
    """

    sessions: async_sessionmaker[AsyncSession]
    column_type: ColumnType
    manager: StorageManager
    source: StoredObjectRef
    name: str
    options: Mapping[str, Any]
    has_written: bool = False
    outcome: _Outcome = _Outcome.UNSET
    held: StoredObjectRef | None = None

    async def read(self) -> list[Holding]:
        """Return the rows that hold the original."""
        async with self.sessions() as session:
            connection = await self._connect(session)
            return await connection.run_sync(_find, read_holdings, self.column_type.column, self.source)

    async def run(self, made: Mapping[str, MadeVariant]) -> None:
        """Set what was made where the rows hold what was seen; without it take out what is not declared."""
        async with self.sessions() as session:
            connection = await self._connect(session)
            # SQLite bounds the wait itself, and a statement that is cut off there leaves the file locked.
            limit = None if connection.dialect.name == "sqlite" else LONGEST_WAIT
            began = time.monotonic()
            try:
                async with asyncio.timeout(limit):
                    is_set = await session.run_sync(self._write, made)
            except TimeoutError:
                raise locked_for_long(self.source.location, LONGEST_WAIT) from None
            except DBAPIError as error:
                if connection.dialect.name != "sqlite" or not is_busy(error.orig):
                    raise
                raise locked_for_long(self.source.location, time.monotonic() - began) from error
            if is_set:
                self.outcome = _Outcome.IN_DOUBT
                await session.commit()
                self.outcome = _Outcome.SET

    async def _connect(self, session: AsyncSession) -> AsyncConnection:
        return await session.connection(bind_arguments=self._leading, execution_options=dict(self.options) or None)

    async def remove_unless_taken(self, stored: Sequence[StoredObjectRef]) -> None:
        """Delete variants after a transaction that did not commit; they stay where a row has them nevertheless.

        A table that knows no transactions keeps what was written into it.
        """
        objects = self._objects(stored)
        if self.has_written:
            async with self.sessions() as session:
                connection = await session.connection(bind_arguments=self._leading)
                objects = leave_out(objects, await connection.run_sync(find_shared, objects))
        await remove(objects, [])

    def _objects(self, refs: Iterable[StoredObjectRef]) -> list[StoredObject]:
        return [StoredObject(self.manager, ref, source=self.source.location) for ref in refs]

    @property
    def _leading(self) -> dict[str, Any]:
        """The arguments with which a session gives the connection to the table."""
        return {"clause": self.column_type.table}

    def _write(self, session: Session, made: Mapping[str, MadeVariant]) -> bool:
        column, connection = self.column_type.column, session.connection(bind_arguments=self._leading)
        require_transactions(connection)
        take_write_lock(connection, column.table)
        holdings = _find(connection, lock_holdings, column, self.source)
        chosen = choose_rows(holdings, made) if made else undeclared_in(holdings, [self.name])
        self.has_written = bool(chosen)
        if displaced := self._objects(write_variants(connection, chosen, made)):
            watch(session, connection)
            unit_of(session).frame(current_transaction(session)).log += [(item, False) for item in displaced]
        held = next((holding.ref for holding in holdings), None)
        new = {name: variant.ref for name, variant in made.items()}
        self.held = held.with_variants({**(held.variants or {}), **new}) if held and chosen else held
        return bool(chosen)
