"""Which columns may refer to an object: those of every base in the same database, and those that only the database knows of."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sqlalchemy import ARRAY, Column, Connection, MetaData, Table, inspect
from sqlalchemy.sql.type_api import TypeEngine
from sqlalchemy.types import TypeDecorator

from granite_storage._engine import may_overlap
from granite_storage.exceptions import CollectionRefusedError
from granite_storage.gc.statements import RefColumn
from granite_storage.orm._registry import active_bindings
from granite_storage.orm.discovery import FoundColumn, as_found, find_text_columns, resolve
from granite_storage.orm.legibility import find_with_refs
from granite_storage.orm.types import AttachmentType, StoredObjectRefType

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from granite_storage.orm.binding import StorageBinding

__all__ = ["BoundBase", "bound_bases", "find_columns", "require_one_database"]

logger: logging.Logger = logging.getLogger("granite_storage")

_KINDS = (AttachmentType, StoredObjectRefType)


@dataclass(frozen=True, slots=True)
class BoundBase:
    """A base whose rows may refer to the objects in question.

    Attributes:
        binding: Its binding.
        here: The keys under which its manager has the very place of those objects.
    """

    binding: StorageBinding
    here: frozenset[str]

    @property
    def columns(self) -> list[Column[Any]]:
        """Every column of the base that may refer to objects.

        Raises:
            CollectionRefusedError: One holds refs in a form that SQL cannot look into.
        """
        return _readable(self.binding.metadata)


async def bound_bases(binding: StorageBinding, backend: str) -> list[BoundBase]:
    """Return the bases whose rows may refer to objects of a backend: that of a binding, and all others in its database.

    Raises:
        CollectionRefusedError: One in another database may have these objects, or it is unknown in which one it is.
    """
    ours = binding.manager.backend(backend)
    bases = [BoundBase(binding, frozenset({backend}))]
    for other in active_bindings():
        if other.metadata is binding.metadata:
            continue
        if other.sessions is not None and _home(other.sessions) is not None and _home(other.sessions) == _home(binding.sessions):
            here = frozenset(key for key, theirs in other.manager.backends.items() if theirs is ours)
            bases.append(BoundBase(other, here))
            continue
        for key, theirs in other.manager.backends.items():
            shares = await may_overlap(ours, theirs)
            if shares is None or shares:
                raise CollectionRefusedError(_refusal(other, key, backend, is_certain=shares is True))
    return bases


def require_one_database(sessions: async_sessionmaker[AsyncSession], tables: Iterable[Table]) -> None:
    """Refuse tables in several databases: they cannot be looked at in one statement, and so not at one moment.

    Raises:
        CollectionRefusedError: They are.
    """
    session = sessions()
    homes = {table: session.get_bind(clause=table) for table in tables}
    if len({home.engine.url for home in homes.values()}) > 1:
        names = ", ".join(sorted(table.fullname for table in homes))
        raise CollectionRefusedError(
            f"the tables {names} are in several databases, which cannot be looked at in one moment: collect with"
            " iter_references, which reads them all"
        )


def find_columns(connection: Connection, bases: Sequence[BoundBase], identities: Sequence[str] | None) -> list[RefColumn]:
    """Return every column that may refer to the objects in question, as the database names it; blocking.

    Those are the columns of the bases; the columns of the same name in tables of the same name in other schemas, such as those
    of other tenants; and beside any of them the columns of JSON of which no model knows, where they hold references: of a model
    that was not imported, or of a table that was renamed or copied. Of these a sample is looked at: what it does not show is
    found as mentions (`granite_storage.gc.mentions`), right before anything is deleted. Columns that no base has are passed over
    where all their references say that they are of another store. Where none says that it is of this one, as those of earlier
    versions say nothing, their references protect, and nothing that they hold stops the run.

    Args:
        connection: A connection of the application's sessions.
        bases: The bases.
        identities: Those that the store of the objects answers to; None where it knows none.

    Raises:
        CollectionRefusedError: The table or the column of a model is nowhere, or a table of the same name may not be read.
    """
    found = find_text_columns(connection)
    columns: dict[tuple[str, str, str], RefColumn] = {}
    namesakes: dict[tuple[str, str, str], RefColumn] = {}
    for base in bases:
        for column in base.columns:
            own, others = _find_column(connection, column, base, found)
            for target, some in ((columns, own), (namesakes, others)):
                for ref_column in some:
                    _add(target, ref_column)
    others = [ref_column for key, ref_column in namesakes.items() if key not in columns]
    for ref_column in _with_refs(connection, others, identities, is_certain=True, is_sample=False):
        _add(columns, ref_column)
    doubtful = [replace(item, known=None, here=frozenset(), is_declared=False) for item in others if item not in columns.values()]
    for ref_column in _with_refs(connection, doubtful, identities, is_sample=False):
        _add(columns, ref_column)
    schemas = {schema for schema, _, _ in columns}
    unknown = [
        RefColumn(as_found(item.schema, item.table, item.name), None, frozenset(), is_declared=False)
        for item in found
        if item.is_json
        and item.schema in schemas
        and item.is_readable
        and not item.is_foreign
        and (item.schema, item.table, item.name) not in columns.keys() | namesakes.keys()
    ]
    for ref_column in _with_refs(connection, unknown, identities, is_sample=True):
        logger.warning("%s holds references, and no model of a bound base has it: their objects are kept", ref_column.label)
        _add(columns, ref_column)
    return list(columns.values())


def _find_column(
    connection: Connection, column: Column[Any], base: BoundBase, found: Sequence[FoundColumn]
) -> tuple[list[RefColumn], list[RefColumn]]:
    """Return the column that a model's leads to, and those of the same name in other schemas."""
    known = frozenset(base.binding.manager.backends)
    keys = list(column.table.primary_key)
    real = resolve(connection, column.table)
    namesakes = [
        item
        for item in found
        if (item.table, item.name) == (column.table.name, column.name) and item.schema != (real or [None])[0]
    ]
    hidden = [f"{item.schema}.{item.table}" for item in namesakes if not item.is_readable]
    namesakes = [item for item in namesakes if item.is_json]
    if hidden:
        raise CollectionRefusedError(
            f"this role may not read {', '.join(hidden)}, which may refer to objects as {column.table.fullname} does: grant it"
            " SELECT there, or give the binding sessions of a role that may"
        )
    if real is None and not namesakes:
        raise CollectionRefusedError(
            f"the table {column.table.fullname} of a model is in no schema of the database: create it, or run the migrations"
        )

    if real is not None and not _has_column(connection, *real, column.name, found):
        raise CollectionRefusedError(
            f"the table {column.table.fullname} has no column {column.name} in the database, though a model has it: run the"
            " migrations"
        )

    def ref_column(schema: str, table: str) -> RefColumn:
        return RefColumn(as_found(schema, table, column.name, keys=keys), known, base.here, is_declared=True)

    own = [] if real is None else [ref_column(*real)]
    return own, [ref_column(item.schema, item.table) for item in namesakes]


def _has_column(connection: Connection, schema: str, table: str, name: str, found: Sequence[FoundColumn]) -> bool:
    if any((item.schema, item.table, item.name) == (schema, table, name) for item in found):
        return True
    # It may be of another type there, such as TEXT, and its name may be spelled otherwise where case does not count.
    return any(item["name"].casefold() == name.casefold() for item in inspect(connection).get_columns(table, schema=schema))


def _add(columns: dict[tuple[str, str, str], RefColumn], new: RefColumn) -> None:
    """Add a column; what two bases say of the same one is put together."""
    table = new.column.table
    key = (str(table.schema), table.name, new.column.name)
    before = columns.get(key)
    if before is not None:
        known = None if before.known is None or new.known is None else before.known | new.known
        new = replace(before, known=known, here=before.here | new.here)
    columns[key] = new


def _with_refs(
    connection: Connection,
    columns: Sequence[RefColumn],
    identities: Sequence[str] | None,
    *,
    is_certain: bool = False,
    is_sample: bool,
) -> list[RefColumn]:
    """Return those columns that have a reference which may, or certainly does, lead to the store in question."""
    wanted = [item.column for item in columns]
    found = set(find_with_refs(connection, wanted, identities, is_certain=is_certain, is_sample=is_sample))
    return [item for item in columns if item.column in found]


def _readable(metadata: MetaData) -> list[Column[Any]]:
    columns = list(_columns(metadata))
    for column in columns:
        if not isinstance(column.type, _KINDS):
            raise CollectionRefusedError(
                f"the column {column.table.fullname}.{column.name} holds refs inside of {column.type!r}, where the garbage"
                " collector cannot look for them: use StoredObjectRefType itself, or collect with iter_references"
            )
    return columns


def _columns(metadata: MetaData) -> Iterator[Column[Any]]:
    table: Table
    for table in metadata.tables.values():
        for column in table.columns:
            if _has_refs(column.type):
                yield column


def _has_refs(kind: TypeEngine[Any]) -> bool:
    """Tell whether a type is one of refs, or is made of one: a decorator, a list, or what stands in for it on some database."""
    if isinstance(kind, _KINDS):
        return True
    inside = [*kind._variant_mapping.values()]
    if isinstance(kind, TypeDecorator):
        inside.append(kind.impl_instance)
    if isinstance(kind, ARRAY):
        inside.append(kind.item_type)
    return any(map(_has_refs, inside))


def _refusal(other: StorageBinding, key: str, backend: str, *, is_certain: bool) -> str:
    has = "has" if is_certain else "may have"
    places = "" if is_certain else ", because one of the two backends does not tell its places (SupportsPlaces)"
    what = f"{other!r} {has} the objects of the backend {backend!r} under the key {key!r}{places}"
    if other.sessions is None:
        return f"{what}, and it has no sessions to read its references with: bind_storage(Base, manager, sessions=...)"
    return f"{what}, in another database, which cannot be looked at in one moment: collect with iter_references, which reads both"


def _home(sessions: async_sessionmaker[AsyncSession] | None) -> object:
    bind = None if sessions is None else sessions.kw.get("bind")
    return None if bind is None else bind.engine.url
