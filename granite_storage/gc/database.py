"""References in the application's database: every column of every base in it, and columns of which no model knows."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    ARRAY,
    Column,
    ColumnElement,
    CompoundSelect,
    Connection,
    FromClause,
    LargeBinary,
    MetaData,
    Select,
    Table,
    and_,
    case,
    cast,
    collate,
    false,
    func,
    inspect,
    literal,
    literal_column,
    not_,
    select,
    text,
    union_all,
)
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncResult
from sqlalchemy.sql.type_api import TypeEngine
from sqlalchemy.types import TypeDecorator

from granite_storage._engine import describe_mismatch, identities_of, may_overlap
from granite_storage._words import describe_duration
from granite_storage.exceptions import CollectionRefusedError
from granite_storage.gc.mentions import Mention, find_mentions
from granite_storage.gc.merge import PAGE, Reference, SortedSpool, merge_pages, require_byte_order
from granite_storage.gc.references import ReferenceSource
from granite_storage.orm._interfaces import JournalTables, active_bindings, tables_of
from granite_storage.orm._util import batches, put_barrier
from granite_storage.orm.columns import AttachmentType, StoredObjectRefType, as_found, join_variants, value_in, where_json
from granite_storage.orm.discovery import (
    FoundColumn,
    find_text_columns,
    find_with_refs,
    has_value,
    is_legible,
    may_nest,
)
from granite_storage.orm.journal.database import find_gap, find_sidecar
from granite_storage.orm.journal.tables import journal_tables
from granite_storage.orm.locking import find_named, resolve
from granite_storage.orm.references import (
    UTF_8,
    as_text,
    find_references,
    most_at_once,
    named_in,
    references_among,
    select_extra,
    selected_text,
    text_encoding,
)

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from granite_storage.orm._interfaces import Binding, Sidecar
    from granite_storage.orm.binding import StorageBinding

logger: logging.Logger = logging.getLogger("granite_storage")

_KINDS = (AttachmentType, StoredObjectRefType)
_COLUMNS_IN_A_STATEMENT = 100
ELSEWHERE, HERE, UNKNOWN_BACKEND, UNKNOWN_IDENTITY, ILLEGIBLE = range(5)
"""What a reference leads to: an object of another backend; one of the collected backend; a backend that no manager has; another
store than its backend leads to now; nothing, because it is not a reference. From the third on a run ends."""

# The statements: every reference in the byte order of its location, and the first value that is none.


@dataclass(frozen=True, slots=True)
class RefColumn:
    """A column that may refer to objects.

    Attributes:
        column: The column, of a table that is named as the database names it.
        known: The keys of backends that its refs may name; None where no manager is known that could tell.
        here: Those of them that lead to the objects in question.
        is_declared: Whether a model has it, so that each of its values has to be a reference.
    """

    column: Column[Any]
    known: frozenset[str] | None
    here: frozenset[str]
    is_declared: bool

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.column.table.fullname}.{self.column.name}"


def select_locations(columns: Sequence[RefColumn], dialect: str, identities: Sequence[str] | None) -> Select[*tuple[Any, ...]]:
    """Select location and kind of all references in the byte order of the locations; any other value is `ILLEGIBLE`.

    A ref that nests variants is as many references; one whose variants cannot be read is none.

    It is one statement, so a reference that moves from one column to another meanwhile is seen in one of them.

    Args:
        columns: Every column that may refer to objects.
        dialect: The name of the database.
        identities: Those that the store of the objects in question answers to; None where it has none to compare with.
    """
    parts = [part for column in columns for part in _locations(column, dialect, identities)]
    found = union_all(*parts).subquery("found")
    location = selected_text(found.c.location, dialect)
    return select(location, found.c.kind).order_by(_collate_bytes(found.c.location, dialect))


def select_first(column: RefColumn, dialect: str, kind: int, identities: Sequence[str] | None) -> Select[*tuple[Any, ...]]:
    """Select the primary key, the backend and the identity of a row whose reference, or that to a variant, is of a kind.

    For `ILLEGIBLE` it is a row whose value is not a reference, or has variants that cannot be read.
    """
    ref = column.column
    found: list[Select[*tuple[Any, ...]]] = []
    for value, source in _values(ref, dialect):
        legible = is_legible(value, dialect)
        if kind == ILLEGIBLE:
            wanted = not_(_is_legible_whole(value, dialect, is_variant=value is not ref))
        else:
            wanted = case((legible, _kind(value, column, dialect, identities))) == literal_column(str(kind))
        said = (case((legible, selected_text(value_in(value, key, dialect), dialect))) for key in ("backend", "identity"))
        keys = (key.label(f"key_{number}") for number, key in enumerate(ref.table.primary_key))
        found.append(select(*keys, *said).select_from(source).where(has_value(ref, dialect), wanted))
    return select(union_all(*found).subquery("found")).limit(1)


def select_counts(column: RefColumn, dialect: str) -> CompoundSelect[*tuple[Any, ...]]:
    """Select backend, identity and number of the references of a column, and of those to variants by themselves."""
    found: list[Select[*tuple[Any, ...]]] = []
    for value, source in _values(column.column, dialect):
        backend, identity = (value_in(value, key, dialect) for key in ("backend", "identity"))
        legible = is_legible(value, dialect)
        if dialect == "sqlite":  # reading a value that is no JSON fails there
            backend, identity = (case((legible, text)) for text in (backend, identity))
        counted = select(selected_text(backend, dialect), selected_text(identity, dialect), func.count())
        found.append(counted.select_from(source).where(legible).group_by(backend, identity))
    return union_all(*found)


def _values(column: Column[Any], dialect: str) -> list[tuple[ColumnElement[Any], FromClause]]:
    """Return the values of a column, and those of the variants in them, each with the table that they are in."""
    variants, variant = join_variants(column, dialect)
    return [(column, column.table), (variant, variants)]


def _is_legible_whole(value: ColumnElement[Any], dialect: str, *, is_variant: bool) -> ColumnElement[bool]:
    """Return the criterion that a value is a reference, and has what can be variants; never NULL."""
    return case((is_legible(value, dialect), may_nest(value, dialect, is_variant=is_variant)), else_=false())


def _locations(column: RefColumn, dialect: str, identities: Sequence[str] | None) -> list[Select[*tuple[Any, ...]]]:
    found: list[Select[*tuple[Any, ...]]] = []
    for value, source in _values(column.column, dialect):
        is_variant = value is not column.column
        kind = _kind(value, column, dialect, identities)
        location = value_in(value, "location", dialect)
        if dialect == "sqlite":
            location = where_json(value, location)
        if column.is_declared:
            criterion = None if is_variant else has_value(column.column, dialect)
            legible = _is_legible_whole(value, dialect, is_variant=is_variant)
            kind = case((legible, kind), else_=literal_column(str(ILLEGIBLE)))
        else:
            criterion = is_legible(value, dialect)
        one = select(location.label("location"), kind.label("kind")).select_from(source)
        found.append(one if criterion is None else one.where(criterion))
    return found


def _kind(ref: ColumnElement[Any], column: RefColumn, dialect: str, identities: Sequence[str] | None) -> ColumnElement[int]:
    backend, identity = (value_in(ref, key, dialect) for key in ("backend", "identity"))
    here: ColumnElement[Any] = literal_column(str(HERE))
    if identities is not None:
        misled = and_(identity.is_not(None), identity.not_in(identities))
        here = case((misled, literal_column(str(UNKNOWN_IDENTITY))), else_=here)
    kinds: list[tuple[ColumnElement[bool], Any]] = [(backend.in_(column.here), here)]
    if column.known is not None:
        kinds.append((backend.not_in(column.known), literal_column(str(UNKNOWN_BACKEND))))
    return case(*kinds, else_=literal_column(str(ELSEWHERE)))


def _collate_bytes(location: ColumnElement[str], dialect: str) -> ColumnElement[Any]:
    if dialect == "postgresql":
        return collate(location, "C")
    return location if dialect == "sqlite" else cast(location, LargeBinary())


# Which columns may refer to an object.


@dataclass(frozen=True, slots=True)
class BoundBase:
    """A base whose rows may refer to the objects in question.

    Attributes:
        binding: Its binding.
        here: The keys under which its manager has the very place of those objects.
    """

    binding: Binding
    here: frozenset[str]

    @property
    def columns(self) -> list[Column[Any]]:
        """Every column of the base that may refer to objects.

        Raises:
            CollectionRefusedError: One holds refs in a form that SQL cannot look into.
        """
        tables = self.binding.metadata.tables.values()
        columns = [column for table in tables for column in table.columns if _has_refs(column.type)]
        for column in columns:
            if not isinstance(column.type, _KINDS):
                raise CollectionRefusedError(
                    f"the column {column.table.fullname}.{column.name} contains refs inside {column.type!r}, where the garbage "
                    "collector cannot read them: use StoredObjectRefType itself, or pass iter_references"
                )
        return columns


async def bound_bases(binding: StorageBinding, backend: str) -> list[BoundBase]:
    """Return the bases whose rows may refer to objects of a backend: that of a binding, and all others in its database.

    Raises:
        CollectionRefusedError: One in another database may have these objects, or it is unknown in which one it is.
    """
    ours = binding.manager._engine.backend(backend)
    bases = [BoundBase(binding, frozenset({backend}))]
    for other in active_bindings():
        if other.metadata is binding.metadata:
            continue
        url = _database_url(other.session_factory)
        if url is not None and url == _database_url(binding.session_factory):
            here = frozenset(key for key, theirs in other.manager._engine.backends.items() if theirs is ours)
            bases.append(BoundBase(other, here))
            continue
        for key, theirs in other.manager._engine.backends.items():
            shares = await may_overlap(ours, theirs)
            if shares is None or shares:
                raise CollectionRefusedError(_refusal(other, key, backend, is_certain=shares is True))
    return bases


def require_one_database(sessions: async_sessionmaker[AsyncSession], tables: Iterable[Table]) -> None:
    """Refuse tables in several databases, which no statement can read at one moment.

    Raises:
        CollectionRefusedError: They are.
    """
    session = sessions()
    binds = {table: session.get_bind(clause=table) for table in tables}
    if len({bind.engine.url for bind in binds.values()}) > 1:
        names = ", ".join(sorted(table.fullname for table in binds))
        raise CollectionRefusedError(
            f"the tables {names} are in several databases, which cannot be read in one snapshot: pass iter_references, which"
            " reads them all"
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

    def add_those_with_refs(candidates: Sequence[RefColumn], *, is_certain: bool = False, is_sample: bool = False) -> list[str]:
        """Add the columns that have a reference which may, or certainly does, lead to the store; return their names."""
        wanted = [item.column for item in candidates]
        some = set(find_with_refs(connection, wanted, identities, is_certain=is_certain, is_sample=is_sample))
        added = [item for item in candidates if item.column in some]
        for item in added:
            _add(columns, item)
        return [item.label for item in added]

    others = [ref_column for key, ref_column in namesakes.items() if key not in columns]
    add_those_with_refs(others, is_certain=True)
    add_those_with_refs(
        [replace(item, known=None, here=frozenset(), is_declared=False) for item in others if item not in columns.values()]
    )
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
    for label in add_those_with_refs(unknown, is_sample=True):
        logger.warning("%s contains references and belongs to no model of a bound base; their objects are kept", label)
    return list(columns.values())


def _find_column(
    connection: Connection, column: Column[Any], base: BoundBase, found: Sequence[FoundColumn]
) -> tuple[list[RefColumn], list[RefColumn]]:
    """Return the column that a model's leads to, and those of the same name in other schemas."""
    known = frozenset(base.binding.manager._engine.backends)
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
            " SELECT, or give the binding sessions of a role that has it"
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
        return RefColumn(as_found(schema, table, column.name, keys=tuple(keys)), known, base.here, is_declared=True)

    own = [] if real is None else [ref_column(*real)]
    return own, [ref_column(item.schema, item.table) for item in namesakes]


def _has_column(connection: Connection, schema: str, table: str, name: str, found: Sequence[FoundColumn]) -> bool:
    if any((item.schema, item.table, item.name) == (schema, table, name) for item in found):
        return True
    # It may be of another type there, such as TEXT, and its name may be spelled otherwise where case does not count.
    return any(item["name"].casefold() == name.casefold() for item in inspect(connection).get_columns(table, schema=schema))


def _add(columns: dict[tuple[str, str, str], RefColumn], new: RefColumn) -> None:
    """Add a column; what two bases say about the same one is merged."""
    table = new.column.table
    key = (str(table.schema), table.name, new.column.name)
    before = columns.get(key)
    if before is not None:
        known = None if before.known is None or new.known is None else before.known | new.known
        new = replace(before, known=known, here=before.here | new.here)
    columns[key] = new


def _has_refs(kind: TypeEngine[Any]) -> bool:
    """Return whether a type is one of refs, or is made of one: a decorator, a list, or what stands in for it on some database."""
    if isinstance(kind, _KINDS):
        return True
    inside = [*kind._variant_mapping.values()]
    if isinstance(kind, TypeDecorator):
        inside.append(kind.impl_instance)
    if isinstance(kind, ARRAY):
        inside.append(kind.item_type)
    return any(map(_has_refs, inside))


def _refusal(other: Binding, key: str, backend: str, *, is_certain: bool) -> str:
    has = "has" if is_certain else "may have"
    places = "" if is_certain else ", because one of the two backends does not tell its places (SupportsPlaces)"
    what = f"{other!r} {has} the objects of the backend {backend!r} under the key {key!r}{places}"
    if other.session_factory is None:
        return f"{what}, and it has no sessions to read its references with: pass session_factory= to bind_storage()"
    return f"{what}, in another database, which cannot be read in the same snapshot: pass iter_references, which reads both"


def _database_url(sessions: async_sessionmaker[AsyncSession] | None) -> object:
    bind = None if sessions is None else sessions.kw.get("bind")
    if bind is None:
        return None
    url = bind.engine.url
    return url.set(drivername=url.get_backend_name())  # two drivers lead to the same database


# The source of references for a collection.


class DatabaseReferences(ReferenceSource):
    """What the rows of a database refer to, and the objects that its journals know of.

    The statements are Core ones, on connections of the application's sessions: no loader criteria or filter for soft-deleted
    rows hides anything, and no translation of schemas redirects them. Each is a transaction of its own.

    Args:
        binding: What `bind_storage(..., session_factory=...)` returned.
        sessions: Its sessions.
        backend: The key of the backend whose objects are collected.
    """

    def __init__(self, binding: StorageBinding, sessions: async_sessionmaker[AsyncSession], backend: str) -> None:
        self._binding = binding
        self._sessions = sessions
        self._backend = backend
        self._clause: Table | None = None
        self._dialect = ""
        self._encoding = UTF_8
        self._identities: tuple[str, ...] | None = None
        self._ref_columns: list[RefColumn] = []
        self._journals: list[JournalTables] = []
        self._sidecars: list[Sidecar] = []

    @property
    def batch_size(self) -> int:
        """The most locations that `find_references` takes."""
        return most_at_once(self._columns[:_COLUMNS_IN_A_STATEMENT], self._journals)

    async def require_fit(self, *, allow_restored_database: bool) -> None:
        """Refuse a database that may hide references, forget what it has committed, or have been restored from a backup."""
        bases = await bound_bases(self._binding, self._backend)
        declared = [column for base in bases for column in base.columns]
        if not declared:
            raise CollectionRefusedError(
                "no model has a column of refs: make sure that every model is imported before bind_storage() is called"
            )
        self._clause = declared[0].table
        journals = [tables for tables in (tables_of(base.binding.metadata) for base in bases) if tables is not None]
        of_journals = [table for tables in journals for table in (tables.intent, tables.reclaim)]
        require_one_database(self._sessions, [*(column.table for column in declared), *of_journals])
        self._identities = await identities_of(self._binding.manager._engine.backend(self._backend))
        await self._inspect_database(bases, journals)
        if allow_restored_database and self._binding.journal is not None:
            await self._binding.journal.allow_restored_database()
        bound = dict.fromkeys(base.binding.journal for base in bases)
        self._sidecars = [journal.sidecar for journal in bound if journal is not None and journal.sidecar is not None]
        for journal in bound:
            if journal is not None:
                async with self._connection(translated=True) as connection:
                    await require_heartbeat(connection, journal.tables, journal.sidecar)

    @asynccontextmanager
    async def in_order(self) -> AsyncIterator[AsyncIterator[list[Reference]]]:
        """Yield the locations of all references: streamed in order, and those of `extra` sorted on disk."""
        async with SortedSpool() as named, AsyncExitStack() as stack:
            async with aclosing(self._iter_named()) as locations:
                async for location, is_here in locations:
                    await named.add(location, is_here)
            chunks = list(batches(self._ref_columns, _COLUMNS_IN_A_STATEMENT))
            # More streams at a time would each hold a connection, and a database in UTF-16 has an order of its own.
            if len(chunks) > 1 or self._encoding != UTF_8:
                for chunk in chunks:
                    async with aclosing(self._iter_referenced(chunk)) as pages:
                        async for page in pages:
                            for location, is_here in page:
                                await named.add(location, is_here)
                yield named.pages()
                return
            referred = await stack.enter_async_context(aclosing(self._iter_referenced(chunks[0])))
            ordered = require_byte_order(referred, "the database's references")
            yield ordered if named.is_empty else merge_pages(ordered, named.pages())

    async def find_references(self, locations: Sequence[str]) -> set[str]:
        """Return the locations that are referenced, or whose generated id is, in a snapshot of this moment."""
        names, held = await self._look_in_sidecars(locations)
        chunks = list(batches(self._columns, _COLUMNS_IN_A_STATEMENT))
        if len(chunks) == 1 and self._dialect != "sqlite":
            # A snapshot that is older than the locks of the statement would show nothing of a table that was truncated since.
            options: dict[str, Any] = {"isolation_level": "READ COMMITTED"} if self._dialect == "postgresql" else {}
            async with self._connection(**options) as connection:
                held = await find_references(connection, self._columns, locations, journals=self._journals, extra=True)
            return references_among(locations, (location for _, location in held))
        async with self._snapshot() as connection:
            if self._dialect == "sqlite":
                await self._require_named(connection, names)
            for number, chunk in enumerate(chunks):
                journals = self._journals if number == 0 else []
                held |= await find_references(connection, chunk, locations, journals=journals, extra=True)
        return references_among(locations, (location for _, location in held))

    async def _look_in_sidecars(self, locations: Sequence[str]) -> tuple[set[str], set[tuple[str, str]]]:
        """Return the names of the sidecars of journals, and which of the objects they know of.

        Before the rows are read: a worker forgets an upload in the sidecar only once a committed row refers to its object.
        """
        names: set[str] = set()
        held: set[tuple[str, str]] = set()
        for sidecar in self._sidecars:
            async with sidecar.looking() as (name, connection):
                names.add(name)
                held |= await find_references(connection, [], locations, journals=[sidecar.tables], extra=True)
        return names, held

    async def _require_named(self, connection: AsyncConnection, names: set[str]) -> None:
        """Refuse a database that names another sidecar than those that were looked into, in the snapshot of its references."""
        named = {name for tables in self._journals if (name := await find_sidecar(connection, tables)) is not None}
        if named != names:
            raise CollectionRefusedError(
                "the journal of the database uses another sidecar than the one that was read, or this process has no journal: "
                "bind its base with journal=StorageJournal(...) and the sidecar path of its other processes, and try again"
            )

    async def find_mentions(self, locations: Sequence[str]) -> AsyncGenerator[Mention, None]:
        """Yield what mentions one of the locations outside of the models' columns of refs, in one snapshot of the database.

        It reads every table that this role may read, once. The tables of a journal and the models' columns of refs are left to
        `find_references`.
        """
        references = [item.column for item in self._ref_columns if item.is_declared]
        journals = [table for tables in self._journals for table in (tables.intent, tables.reclaim, tables.job)]
        async with _refused_if_unreadable(DBAPIError), self._snapshot(compiled_cache=None) as connection:  # none comes twice
            found = find_mentions(connection, locations, self._identities, references=references, journals=journals)
            async with aclosing(found):
                async for mention in found:
                    yield mention

    async def count_by_store(self) -> Counter[tuple[str, str | None]]:
        """Count the references of the binding's base by the backend and the store's identity that they name, None for none."""
        counted: Counter[tuple[str, str | None]] = Counter()
        for item in self._ref_columns:
            if item.is_declared and self._backend in item.here:
                async with self._connection() as connection:
                    for backend, identity, number in await connection.execute(select_counts(item, connection.dialect.name)):
                        named = as_text(backend, self._encoding), as_text(identity, self._encoding) or None
                        counted[named] += number
        return counted

    async def find_refusals(self) -> list[tuple[int, str]]:
        """Return why values of rows would end a collection, without sorting all references: a row of each kind, and its kind.

        `require_fit` comes before.
        """
        if not self._ref_columns:  # it was refused before they were found
            return []
        found = [(kind, await self._find_refusal(kind)) for kind in (ILLEGIBLE, UNKNOWN_BACKEND, UNKNOWN_IDENTITY)]
        return [(kind, refusal) for kind, refusal in found if refusal is not None]

    async def make_durable(self) -> None:
        """Commit durably, which makes every commit that was seen before durable as well."""
        async with self._connection() as connection:
            await commit_durably(connection)

    @property
    def _columns(self) -> list[Column[Any]]:
        return [item.column for item in self._ref_columns]

    async def _inspect_database(self, bases: Sequence[BoundBase], declared: Sequence[JournalTables]) -> None:
        """Find the columns and journals of the database, and refuse one that cannot be relied on."""
        async with _refused_if_unreadable(), self._connection(translated=True) as connection:
            self._dialect = connection.dialect.name
            self._encoding = await connection.run_sync(text_encoding)
            await require_fit(connection)
            self._ref_columns = await connection.run_sync(find_columns, bases, self._identities)
            self._journals = await connection.run_sync(_journals_in, declared, self._columns)
            await _require_all_rows(connection, [item.column for item in self._ref_columns if item.is_declared])

    async def _iter_referenced(self, columns: Sequence[RefColumn]) -> AsyncGenerator[list[Reference], None]:
        wrong: int | None = None
        async with _refused_if_unreadable(), self._connection() as connection:
            statement = select_locations(columns, connection.dialect.name, self._identities)
            async with _streamed(connection, statement) as result:
                async for page in result.partitions():
                    wrong = next((kind for _, kind in page if kind >= UNKNOWN_BACKEND), None)
                    if wrong is not None:
                        break
                    yield [(as_text(location, self._encoding), kind == HERE) for location, kind in page]
        if wrong is not None:
            raise CollectionRefusedError(await self._find_refusal(wrong) or _describe_illegible("a row that has changed since"))

    async def _iter_named(self) -> AsyncGenerator[Reference, None]:
        """Yield what the `extra` of refs and of their variants name, whatever backend those refs name."""
        for chunk in batches(self._ref_columns, _COLUMNS_IN_A_STATEMENT):
            async with self._connection() as connection:
                dialect = connection.dialect.name
                parts = [part for item in chunk for part in select_extra(item.column, dialect)]
                async with _streamed(connection, union_all(*parts)) as result:
                    async for of_backend, _, extra in result:
                        for location in named_in(json.loads(extra)):
                            yield location, as_text(of_backend, self._encoding) == self._backend

    async def _find_refusal(self, kind: int) -> str | None:
        """Return what is wrong with a row whose value is not a reference, or leads to an unknown place; None without one."""
        async with self._connection() as connection:
            dialect = connection.dialect.name
            for item in self._ref_columns:
                found = None
                if item.is_declared:
                    found = (await connection.execute(select_first(item, dialect, kind, self._identities))).first()
                if found is not None:
                    *key, backend, identity = found
                    where = f"{item.label} of the row {', '.join(map(str, key))}"
                    said = as_text(backend, self._encoding), as_text(identity, self._encoding)
                    return self._describe(kind, where, *said)
        return None

    def _describe(self, kind: int, where: str, backend: str, identity: str) -> str:
        if kind == ILLEGIBLE:
            return _describe_illegible(where)
        if kind == UNKNOWN_IDENTITY:
            current = next(iter(self._identities or ()), None)
            return f"{where} refers to an object of another store: {describe_mismatch(backend, identity, current)}"
        known = ", ".join(sorted(self._binding.manager._engine.backends))
        return (
            f"{where} names the backend {backend!r}, which the manager does not have (there are: {known}), so it is unknown which"
            " object it refers to: give the manager that backend, or update the rows to the key that it has now"
        )

    @asynccontextmanager
    async def _snapshot(self, **options: Any) -> AsyncIterator[AsyncConnection]:
        """Open a connection on which several statements see the same moment."""
        level: dict[str, Any] = {} if self._dialect == "sqlite" else {"isolation_level": "REPEATABLE READ"}
        async with self._connection(**level, **options) as connection:
            if self._dialect == "sqlite":
                driver: Any = (await connection.get_raw_connection()).driver_connection
                if not driver.in_transaction:  # Python's driver begins none to read
                    await connection.exec_driver_sql("BEGIN")
            yield connection

    @asynccontextmanager
    async def _connection(self, *, translated: bool = False, **options: Any) -> AsyncIterator[AsyncConnection]:
        """Open a connection of the sessions; it translates no schemas, unless it is to be `translated`."""
        session: AsyncSession
        if not translated:
            options["schema_translate_map"] = {}
        async with self._sessions() as session:
            yield await session.connection(bind_arguments={"clause": self._clause}, execution_options=options)


def _journals_in(
    connection: Connection, declared: Sequence[JournalTables], columns: Sequence[Column[Any]]
) -> list[JournalTables]:
    """Return the tables of every journal in the schemas of the columns and of the declared ones: each tenant may have its own."""
    schemas = {str(column.table.schema) for column in columns}
    schemas |= {real[0] for tables in declared if (real := resolve(connection, tables.intent)) is not None}
    template = _journal_in(None)
    needed = {template.intent.name, template.reclaim.name}
    # By any of their columns: MariaDB shows a role only those that it has rights on.
    names = sorted({column.name for table in (template.intent, template.reclaim) for column in table.columns})
    found: dict[str, set[str]] = {}
    for schema, name, *_ in find_named(connection, sorted(needed), names):
        found.setdefault(schema, set()).add(name)
    return [_journal_in(schema) for schema, has in sorted(found.items()) if schema in schemas and needed <= has]


@lru_cache(maxsize=1024)  # statements of the same tables are compiled once
def _journal_in(schema: str | None) -> JournalTables:
    return journal_tables(MetaData(), schema=schema)


def _describe_illegible(where: str) -> str:
    return (
        f"{where} contains a value that is not a reference, so it is unknown which object it refers to: correct it; verify()"
        " finds all such values, and nothing is deleted until then"
    )


@asynccontextmanager
async def _refused_if_unreadable(kind: type[DBAPIError] = ProgrammingError) -> AsyncIterator[None]:
    try:
        yield
    except kind as error:
        raise CollectionRefusedError(f"the references could not be read, so nothing is deleted: {error.orig}") from error


@asynccontextmanager
async def _streamed(connection: AsyncConnection, statement: Any) -> AsyncIterator[AsyncResult[*tuple[Any, ...]]]:
    """Execute a statement whose rows are fetched a page at a time."""
    result = await connection.stream(statement.execution_options(yield_per=PAGE))
    try:
        yield result
    finally:
        await result.close()


# Databases that may hide references, or forget what they have committed, are refused.


_BEGUN = text("SELECT transaction_timestamp()")


async def require_fit(connection: AsyncConnection) -> None:
    """Refuse a connection or a database that the collector cannot rely on.

    Args:
        connection: One of the application's sessions.

    Raises:
        CollectionRefusedError: The message says what to do.
    """
    if await connection.get_isolation_level() == "READ UNCOMMITTED":
        raise CollectionRefusedError(
            "the sessions use READ UNCOMMITTED, which can miss a reference that moves between two columns: give the binding "
            "sessions that use READ COMMITTED or stronger"
        )
    match connection.dialect.name:
        case "postgresql":
            await _require_fit_postgresql(connection)
        case "mysql" | "mariadb":
            await _require_fit_mariadb(connection)
        case "sqlite":
            pass
        case other:
            raise CollectionRefusedError(
                f"the garbage collector does not support the database {other!r}: pass iter_references instead of binding"
            )


async def require_heartbeat(connection: AsyncConnection, tables: JournalTables, sidecar: Sidecar | None = None) -> None:
    """Refuse a database in which no worker was running for long: it may have been restored from a backup, or be another one.

    Raises:
        CollectionRefusedError: There is such a gap; `allow_restored_database=True` removes it.
    """
    if sidecar is not None:
        await sidecar.require_beat(connection, tables, CollectionRefusedError)
    gap = await find_gap(connection, tables)
    if gap is not None:
        raise CollectionRefusedError(
            f"no worker of the journal was running for {describe_duration(gap)}: the database may have been restored from a"
            " backup, and objects without a row may belong to rows that are still to be restored. Once you are sure that this"
            " is the right database, pass allow_restored_database=True"
        )


async def _require_fit_postgresql(connection: AsyncConnection) -> None:
    begun = [(await connection.execute(_BEGUN)).scalar_one() for _ in range(2)]
    if begun[0] != begun[1]:
        raise CollectionRefusedError("the sessions use AUTOCOMMIT: give the binding sessions that use transactions")
    if (await connection.execute(text("SELECT pg_is_in_recovery()"))).scalar_one():
        raise CollectionRefusedError(
            "the database is a standby, which may lag behind the primary: give the binding sessions on the primary"
        )


async def _require_all_rows(connection: AsyncConnection, columns: Sequence[Column[Any]]) -> None:
    """Refuse columns some of whose rows may be hidden from this role.

    Raises:
        CollectionRefusedError: PostgreSQL's row-level security may hide some.
    """
    if connection.dialect.name != "postgresql":
        return
    preparer = connection.dialect.identifier_preparer
    for table in dict.fromkeys(column.table for column in columns):
        name = preparer.format_table(table)
        if (await connection.execute(select(func.row_security_active(literal(name))))).scalar_one():
            raise CollectionRefusedError(
                f"row-level security may hide rows of {name} from this role: give the binding sessions of a role that sees all "
                "rows"
            )


async def _require_fit_mariadb(connection: AsyncConnection) -> None:
    row = (await connection.execute(text("SELECT @@global.read_only, @@innodb_flush_log_at_trx_commit"))).one()
    if row[0]:
        raise CollectionRefusedError(
            "the database is read-only, and may be a replica that lags behind: give the binding sessions on the primary"
        )
    if row[1] != 1:
        raise CollectionRefusedError(
            f"innodb_flush_log_at_trx_commit is {row[1]}, so a crash can undo a committed transaction and bring back a row whose"
            " object is deleted: set it to 1"
        )


# A commit that no crash of the database can undo, nor any commit before it.


async def commit_durably(connection: AsyncConnection) -> None:
    """Return once everything that other transactions have committed, and this program has seen, is durable.

    With `synchronous_commit = off` PostgreSQL acknowledges commits that a crash may undo; a synchronous commit that has written
    something makes all commits before it durable. MariaDB is durable at each commit, as `require_fit` has checked; SQLite
    follows its `PRAGMA synchronous`.
    """
    if connection.dialect.name == "postgresql":
        await put_barrier(connection)
    await connection.commit()
