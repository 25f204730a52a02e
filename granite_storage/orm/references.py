"""References in SQL: the refs of a column or of a whole base, and the rows and journals that refer to an object."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar
from uuid import UUID

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Dialect,
    FromClause,
    LargeBinary,
    Select,
    Table,
    Text,
    and_,
    case,
    cast,
    func,
    inspect,
    null,
    or_,
    select,
    type_coerce,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.horizontal_shard import ShardedSession

from granite_storage._documentation import Page
from granite_storage._engine import identities_of
from granite_storage._tasks import shielded
from granite_storage.exceptions import BackendError, ConfigurationError, InvalidReferenceError
from granite_storage.locations import GENERATED_ID_LENGTH, GENERATED_STEM, generated_id, matches_generated_name
from granite_storage.orm._util import group, schema_on
from granite_storage.orm.columns import (
    AttachmentType,
    StoredObjectRefType,
    join_variants,
    json_in,
    location_of,
    value_in,
    where_json,
)
from granite_storage.orm.locking import among, read_catalogue
from granite_storage.orm.schemas import FoundTable, Identities, OtherSchema, find_in_schemas, judge_namesakes, name_of, options_of
from granite_storage.refs import StoredObjectRef, iter_refs

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

    from granite_storage.manager import StorageManager
    from granite_storage.orm._interfaces import Binding, JournalTables


P = ParamSpec("P")
T = TypeVar("T")

_BATCH_SIZE = 500
_PATIENCE = 5.0
"""How long a cancelled caller waits for the statements that are in progress, in seconds."""


def asked_to_the_end(method: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Let the statements of a short transaction end before a cancellation of its caller is raised.

    SQLAlchemy closes the connection of a statement that is cut off, but not its cursor: on SQLite the file then stays locked
    until the garbage collector finds that. On the other databases the outcome of a COMMIT would be unknown.
    """

    @wraps(method)
    async def asked(*args: P.args, **kwargs: P.kwargs) -> T:
        return await shielded(method(*args, **kwargs), timeout=_PATIENCE)

    return asked


async def iter_model_storage_refs(session: AsyncSession, model: type[Any], column: str) -> AsyncGenerator[StoredObjectRef, None]:
    """Yield the refs in the rows of a model, streamed from the server, without loading the whole table into memory.

    Each is followed by those of its variants, so that every object that a row refers to is yielded.

    Args:
        session: An open session; the caller closes it.
        model: The mapped class.
        column: The name of its attachment or ref attribute.

    The statement's cursor stays open until the iteration ends; one that ends early is closed by `contextlib.aclosing`.

    Raises:
        ConfigurationError: The attribute holds no refs.
        InvalidReferenceError: A row holds something that is not a ref.
    """
    attribute = inspect(model).column_attrs.get(column)
    found = None if attribute is None else attribute.columns[0]
    if found is None or not isinstance(found.type, AttachmentType | StoredObjectRefType):
        raise ConfigurationError(f"{model.__name__}.{column} is not a column of refs")
    mapped = getattr(model, column)
    statement = select(type_coerce(mapped, StoredObjectRefType())).where(mapped.is_not(None))
    result = await session.stream_scalars(statement.execution_options(yield_per=_BATCH_SIZE))
    try:
        async for ref in result:
            if ref is not None:
                for one in iter_refs(ref):
                    yield one
    finally:
        await result.close()


# The generated columns that MariaDB needs for an index over locations.


def find_location_columns(connection: Connection, columns: Collection[Column[Any]]) -> set[Column[Any]]:
    """Return which columns of refs have a generated column with their locations; only on MariaDB there are any."""
    if connection.dialect.name not in ("mysql", "mariadb") or not columns:
        return set()
    catalogue = read_catalogue(connection, list(columns))
    places = {column: catalogue.place(schema_on(connection, column.table), column) for column in columns}
    return {column for column, place in places.items() if place is not None and place.is_generated}


# Every ref of a base, as the database has it: in the order of primary keys, a page at a time.
#
# The statements are Core statements, on connections of the application's sessions, so that no loader criteria and no filter for
# soft-deleted rows hide anything. Each page is a transaction of its own: a scan of any length holds no snapshot and no cursor,
# and needs the memory of one page.


@dataclass(frozen=True, slots=True)
class RowValue:
    """The value of one column in one row.

    Attributes:
        table: The table.
        primary_key: The row's primary key, in the order of the table's columns.
        column: The column.
        raw: The value as the database has it; text, unless something else was written there.
        ref: The ref, or None if the value is not one.
        error: Why the value is not a ref, or None.
        other_schema: The schema of the row; None for the one that the sessions lead to.
    """

    table: Table
    primary_key: tuple[Any, ...]
    column: Column[Any]
    raw: Any
    ref: StoredObjectRef | None = None
    error: InvalidReferenceError | None = None
    other_schema: OtherSchema | None = None

    @property
    def is_managed(self) -> bool:
        """Whether it is in an attachment column, whose objects the library stores and deletes."""
        return isinstance(self.column.type, AttachmentType)

    @property
    def label(self) -> str:
        """The name of the column in the models."""
        return f"{self.table.fullname}.{self.column.name}"

    @property
    def table_name(self) -> str:
        """The name of the table in messages, with its schema where the row is in another one than the sessions lead to."""
        return name_of(self.table, self.other_schema)

    @property
    def options(self) -> Mapping[str, Any]:
        """The execution options that lead a statement on the table to that of the row."""
        return options_of(self.table, self.other_schema)


@dataclass(frozen=True, slots=True)
class RowValues:
    """A row, its primary key, the values of its columns of refs, and the key after which a later scan continues."""

    key: str
    primary_key: tuple[Any, ...]
    values: tuple[RowValue, ...]


class Scan:
    """Reads every row with refs of a binding's base, in every schema of its databases.

    Args:
        binding: What `bind_storage(..., session_factory=...)` returned.
        schemas: The schemas to read, as the database calls them; none for all.

    Attributes:
        unseen: In words what may have refs and could not be read when the rows were last looked for.

    Raises:
        ConfigurationError: The binding has no sessions, or a table has no primary key to read it by.
    """

    def __init__(self, binding: Binding, schemas: Collection[str] = ()) -> None:
        if (sessions := binding.own_sessions) is None:
            raise ConfigurationError(
                "reading the rows needs sessions: bind_storage(Base, manager, session_factory=async_sessionmaker(...))",
                see=Page.BINDING,
            )
        if isinstance(schemas, str):
            raise ConfigurationError(f"schemas must be a collection of names, not {schemas!r}")
        self._sessions = sessions
        self._manager = binding.manager
        self._schemas = frozenset(schemas)
        self._columns: dict[Table, list[Column[Any]]] = {}
        self._found: list[FoundTable] = []
        self.unseen: list[str] = []
        for column in sorted(binding.ref_columns(), key=lambda column: column.table.fullname):
            self._columns.setdefault(column.table, []).append(column)
        for table in self._columns:
            if not len(table.primary_key):
                raise ConfigurationError(f"the table {table.fullname} has no primary key to identify its rows: give it one")

    def require_key(self, key: str) -> None:
        """Raise `ConfigurationError` unless a text is the key of a row.

        Raises:
            ConfigurationError: It is none of this base's.
        """
        self._place(key)

    async def require_schemas(self) -> None:
        """Refuse schemas that have none of the tables.

        Raises:
            ConfigurationError: There is one.
        """
        if self._schemas:
            await self._look()

    async def rows(self, *, after: str | None = None) -> AsyncGenerator[RowValues, None]:
        """Yield the rows with a value in a column of refs, table by table: first those that the sessions lead to.

        Args:
            after: The key of the last row that was processed; None for all rows.

        Raises:
            ConfigurationError: The key is none of this base's, or a schema has none of the tables.
        """
        last, primary_key = (None, None) if after is None else self._place(after)
        await self._look()
        for found in self._found:
            if last is not None and found.order < last.order:
                continue
            key = primary_key if last is not None and found.order == last.order else None
            while True:
                page = await self._read(found, _any(found.columns), key)
                for row in page:
                    yield row
                if len(page) < _BATCH_SIZE:
                    break
                key = page[-1].primary_key

    async def count(self) -> int:
        """Return the number of these rows."""
        await self._look()
        return await self._count()

    @asked_to_the_end
    async def _count(self) -> int:
        total = 0
        for found in self._found:
            async with self._connection(found.table) as connection:
                statement = select(func.count()).select_from(found.table).where(_any(found.columns))
                total += (await connection.execute(statement, execution_options=found.options)).scalar_one()
        return total

    async def read_again(self, held: RowValue) -> RowValue | None:
        """Return the current value of a column; None if it is NULL or the row is gone."""
        found = FoundTable(held.table, (held.column,), held.other_schema)
        rows = await self._read(found, among(held.table, [held.primary_key]))
        return next((value for row in rows for value in row.values), None)

    @asked_to_the_end
    async def _look(self) -> None:
        """Find the tables; those of one database together."""
        identities: Identities | None = None
        found: list[FoundTable] = []
        unseen: list[str] = []
        session: AsyncSession
        async with self._sessions() as session:
            if isinstance(session.sync_session, ShardedSession):
                raise ConfigurationError(
                    "the sessions are sharded, and which shard has a row is known for instances alone: bind the sessions of each"
                    " shard in turn, and do this for each"
                )
            for tables in group(self._columns, lambda table: session.get_bind(clause=table)).values():
                connection = await session.connection(bind_arguments={"clause": tables[0]})
                columns = [column for table in tables for column in self._columns[table]]
                own, namesakes, hidden = await connection.run_sync(find_in_schemas, columns, self._schemas)
                found += own
                unseen += hidden
                if namesakes:
                    identities = identities or await _identities_of_all(self._manager)
                    chosen = bool(self._schemas)
                    more, hidden = await connection.run_sync(judge_namesakes, namesakes, identities, are_chosen=chosen)
                    found += more
                    unseen += hidden
        self._found, self.unseen = sorted(found, key=lambda item: item.order), unseen

    @asked_to_the_end
    async def _read(
        self, found: FoundTable, is_wanted: ColumnElement[bool], after: tuple[Any, ...] | None = None
    ) -> list[RowValues]:
        """Return a page of the rows after a primary key."""
        columns, keys = found.columns, list(found.table.primary_key)
        async with self._connection(found.table) as connection:
            read, encoding = _reader(connection.dialect), await connection.run_sync(text_encoding)
            statement = select(*keys, *(_selected(column, connection.dialect) for column in columns)).where(is_wanted)
            statement = following(statement, keys, after).order_by(*keys).limit(_BATCH_SIZE)
            rows = list(await connection.execute(statement, execution_options=found.options))
        page: list[RowValues] = []
        for row in rows:
            primary_key = tuple(row[: len(keys)])
            values = zip(columns, row[len(keys) :], strict=True)
            held = (_value(found, primary_key, column, raw, read, encoding) for column, raw in values)
            present = tuple(value for value in held if value is not None)
            page.append(RowValues(_text_of(found, primary_key), primary_key, present))
        return page

    @asynccontextmanager
    async def _connection(self, table: Table) -> AsyncIterator[AsyncConnection]:
        session: AsyncSession
        async with self._sessions() as session:
            yield await session.connection(bind_arguments={"clause": table})

    def _place(self, key: str) -> tuple[FoundTable, tuple[Any, ...]]:
        try:
            name, *values = json.loads(key)
            schema, name = (None, name) if isinstance(name, str) else name
            table = next(table for table in self._columns if table.fullname == name)
            other_schema = None if schema is None else OtherSchema(str(schema))
            primary_key = tuple(_parse_key_value(column, value) for column, value in zip(table.primary_key, values, strict=True))
        except (ValueError, TypeError, StopIteration, ArithmeticError) as error:
            raise ConfigurationError(f"{key[:120]!r} is not the key of a row of this base") from error
        return FoundTable(table, (), other_schema), primary_key


async def _identities_of_all(manager: StorageManager) -> Identities:
    """Return the identities that the backends of a manager have; one that is unavailable now counts as without any."""
    known: list[str] = []
    is_complete = True
    for backend in manager._engine.backends.values():
        try:
            told = await identities_of(backend)
        except BackendError:
            told = None
        known += told or ()
        is_complete = is_complete and told is not None
    return Identities(tuple(known), is_complete)


def as_stored(column: Column[Any], dialect: Dialect) -> ColumnElement[Any]:
    """Return a column as text, undecoded, so that values that cannot be decoded are selected too."""
    return cast(column, Text) if dialect.name == "postgresql" else type_coerce(column, Text())


def keeping_other_columns(column: Column[Any]) -> dict[Column[Any], Column[Any]]:
    """Return the values with which an UPDATE of a column lets others of its table be, though they change with each UPDATE."""
    others = (item for item in column.table.columns if item is not column and item.computed is None)
    return {item: item for item in others if item.onupdate is not None or item.server_onupdate is not None}


def _selected(column: Column[Any], dialect: Dialect) -> ColumnElement[Any]:
    """Return an expression that selects any value of a column: on SQLite one invalid text would fail every row."""
    return cast(column, LargeBinary) if dialect.name == "sqlite" else as_stored(column, dialect)


def is_text(value: str) -> bool:
    """Return whether a string can be a parameter: one with a lone surrogate cannot be encoded."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _any(columns: Sequence[Column[Any]]) -> ColumnElement[bool]:
    return or_(*(column.is_not(None) for column in columns))


def following(statement: Select[Any], keys: Sequence[Column[Any]], after: tuple[Any, ...] | None) -> Select[Any]:
    """Limit a statement to rows after a primary key; the first criterion is implied by the second, and uses the index."""
    if after is None:
        return statement
    ways = [
        and_(*(column == value for column, value in zip(keys[:count], after[:count], strict=True)), keys[count] > after[count])
        for count in range(len(keys))
    ]
    return statement.where(keys[0] >= after[0], or_(*ways))


def _reader(dialect: Dialect) -> Callable[[Any], Any]:
    read: Callable[[Any], Any] = StoredObjectRefType().dialect_impl(dialect).result_processor(dialect, None)  # type: ignore[assignment]  # it has one
    return read


def _value(
    found: FoundTable, primary_key: tuple[Any, ...], column: Column[Any], raw: Any, read: Callable[[Any], Any], encoding: str
) -> RowValue | None:
    table, other_schema = found.table, found.other_schema
    if raw is None:
        return None
    try:
        raw = raw.decode(encoding) if isinstance(raw, bytes) else raw
        ref = read(raw)
    except UnicodeDecodeError as error:
        problem = InvalidReferenceError(f"the column does not contain text in {encoding.upper()}: {error.reason}")
        return RowValue(table, primary_key, column, raw, error=problem, other_schema=other_schema)
    except InvalidReferenceError as error:
        return RowValue(table, primary_key, column, raw, error=error, other_schema=other_schema)
    return None if ref is None else RowValue(table, primary_key, column, raw, ref, other_schema=other_schema)


def _text_of(found: FoundTable, primary_key: tuple[Any, ...]) -> str:
    name = found.table.fullname
    table = name if found.other_schema is None else [found.other_schema.name, name]
    return json.dumps([table, *primary_key], ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str:
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if isinstance(value, date | time) else str(value)  # a datetime is a date


def _parse_key_value(column: Column[Any], value: Any) -> Any:
    """Return a part of a primary key from its text."""
    try:
        kind = column.type.python_type
    except NotImplementedError:
        return value
    if not isinstance(value, str) or kind is str:
        return value
    if kind in (datetime, date, time):
        return kind.fromisoformat(value)
    if kind is bytes:
        return bytes.fromhex(value)
    return kind(value) if kind in (UUID, Decimal, int) else value


# The references to an object: in rows, and in the intents of a journal.
#
# The worker and the garbage collector search here before they delete. It is one statement, and so one snapshot: between two
# statements a transaction could move an object from one place to the other, and both would miss it.


_MOST_PARAMETERS = 20_000
_MOST_LOCATIONS = 1000
_COUNTS_FROM_THE_END = (14,)
"""The version of PostgreSQL since which `split_part` does."""

UTF_8 = "utf-8"
_ENCODING = "granite_storage_text_encoding"
"""The key under which a connection keeps the encoding of its database."""

_STEM_AS_GLOB = "[0-9a-f]" * 12 + "7" + "[0-9a-f]" * 3 + "[89ab]" + "[0-9a-f]" * 15


def most_at_once(columns: Sequence[Column[Any]], journals: Sequence[JournalTables] = ()) -> int:
    """Return how many locations fit into one statement: each is in it twice for every table, and four times for every column."""
    return max(1, min(_MOST_LOCATIONS, _MOST_PARAMETERS // (2 * (2 * len(columns) + 2 * len(journals) + 1))))


async def find_references(
    connection: AsyncConnection,
    columns: Sequence[Column[Any]],
    locations: Sequence[str],
    *,
    journals: Sequence[JournalTables] = (),
    extra: bool = False,
) -> set[tuple[str, str]]:
    """Return which objects are referenced, as pairs of backend and location, by one statement, whatever the backend key.

    A variant is referenced by the row whose ref nests it, as an original is.

    Args:
        connection: A connection in a transaction that has read nothing yet, at READ COMMITTED or stronger.
        columns: Every column that may refer to an object.
        locations: The objects in question; of others nothing is said, unless an `extra` names them.
        journals: The journals whose entries hold an object, too.
        extra: Whether to read every row for references that say the object otherwise: by another location with the same
            generated id, or in their `extra`.
    """
    dialect = connection.dialect
    ids = sorted({found for found in map(generated_id, locations) if found is not None}) if extra else []
    # This reads the catalogue of the database only: that a column exists does not depend on any row.
    generated = await connection.run_sync(find_location_columns, columns)
    parts = [
        _referring(refs, dialect, locations, ids, extra=extra)
        for column in columns
        for refs in _refs_in(column, dialect.name, is_generated=column in generated)
    ]
    noted = [table.c for journal in journals for table in (journal.intent, journal.reclaim)]
    parts += [_among(entry.backend, entry.location, dialect, locations, ids) for entry in noted]
    if not parts:
        return set()
    held: set[tuple[str, str]] = set()
    wanted = {*locations, *ids}
    encoding = await connection.run_sync(text_encoding)
    for backend, location, names in await connection.execute(union_all(*parts)):
        if location is not None:
            held.add((as_text(backend, encoding), as_text(location, encoding)))
        if names is not None:
            found = ((as_text(backend, encoding), name) for name in named_in(json.loads(names)))
            held.update((of, name) for of, name in found if name in wanted or generated_id(name) in wanted)
    return held


def references_among(locations: Sequence[str], held: Iterable[str]) -> set[str]:
    """Return the locations that are referenced, or have the generated id of one that is and so are the same object."""
    found = set(held)
    ids = {generated_id(location) for location in found} - {None}
    return {location for location in locations if location in found or generated_id(location) in ids}


def named_in(extra: Any) -> Iterator[str]:
    """Yield the strings in a ref's `extra`, at any depth, that have the form of a location, such as a derived object's."""
    match extra:
        case str():
            if "/" in extra and matches_generated_name(extra):
                yield extra
        case dict():
            for value in extra.values():
                yield from named_in(value)
        case list():
            for value in extra:
                yield from named_in(value)


_Refs: TypeAlias = tuple[FromClause, ColumnElement[Any], ColumnElement[str], ColumnElement[str]]
"""Refs in SQL: where they are, their JSON, their backends and their locations."""


def _refs_in(column: Column[Any], dialect: str, *, is_generated: bool = False) -> list[_Refs]:
    """Return the refs of a column, and those of the variants that they nest."""
    source, variant = join_variants(column, dialect)
    return [
        (column.table, column, *location_of(column, dialect, is_generated=is_generated)),
        (source, variant, value_in(variant, "backend", dialect), value_in(variant, "location", dialect)),
    ]


def select_extra(column: Column[Any], dialect: str) -> Iterator[Select[*tuple[Any, ...]]]:
    """Select backend, NULL, and `extra` as JSON text, of the refs of a column and of their variants that may name an object."""
    for source, ref, backend, _ in _refs_in(column, dialect):
        text, names_one = _extra_of(ref, dialect)
        yield _selected_ref(dialect, backend, extra=text).select_from(source).where(names_one)


def _selected_ref(
    dialect: str,
    backend: ColumnElement[str],
    location: ColumnElement[str] | None = None,
    extra: ColumnElement[Any] | None = None,
) -> Select[*tuple[Any, ...]]:
    """Select the backend, the location and `extra` of refs; what is not given is NULL."""
    nowhere = cast(null(), LargeBinary if dialect == "sqlite" else Text())
    return select(
        selected_text(backend, dialect).label("backend"),
        (nowhere if location is None else selected_text(location, dialect)).label("location"),
        (cast(null(), Text()) if extra is None else extra).label("extra"),
    )


def as_text(value: str | bytes | None, encoding: str) -> str:
    """Decode a selected text: SQLite returns bytes in the database's encoding, which may contain a lone surrogate."""
    if value is None or isinstance(value, str):
        return value or ""
    try:
        return value.decode(encoding, "surrogatepass")
    except UnicodeDecodeError:
        return value.decode(encoding, "surrogateescape" if encoding == UTF_8 else "replace")


def text_encoding(connection: Connection) -> str:
    """Return the encoding of texts that a database returns as bytes; blocking.

    Only SQLite returns any: its databases are in UTF-8, or in UTF-16 of either byte order, and attached ones are as the main one.
    """
    if connection.dialect.name != "sqlite":
        return UTF_8
    if _ENCODING not in connection.info:
        connection.info[_ENCODING] = connection.exec_driver_sql("PRAGMA encoding").scalar_one().lower()
    found: str = connection.info[_ENCODING]
    return found


def _referring(
    refs: _Refs, dialect: Dialect, locations: Sequence[str], ids: Sequence[str], *, extra: bool
) -> Select[*tuple[Any, ...]]:
    """Select backend, location and `extra` of refs, in one scan; those to which nothing leads by any of these are left out."""
    source, ref, backend, location = refs
    if not extra:
        return _among(backend, location, dialect, locations, ids).select_from(source)
    if dialect.name == "sqlite":
        location = where_json(ref, location)
    text, names_one = _extra_of(ref, dialect.name)
    selected = _selected_ref(dialect.name, backend, location, cast(case((names_one, text)), Text())).select_from(source)
    return selected.where(or_(_is_among(location, dialect, locations, ids), names_one))


def _among(
    backend: ColumnElement[str], location: ColumnElement[str], dialect: Dialect, locations: Sequence[str], ids: Sequence[str]
) -> Select[*tuple[Any, ...]]:
    """Select backend, location and NULL, of refs with one of the locations or one of the generated ids."""
    return _selected_ref(dialect.name, backend, location).where(_is_among(location, dialect, locations, ids))


def _is_among(
    location: ColumnElement[str], dialect: Dialect, locations: Sequence[str], ids: Sequence[str]
) -> ColumnElement[bool]:
    wanted: ColumnElement[bool] = location.in_(locations)
    return or_(wanted, _id_in(location, dialect).in_(ids)) if ids else wanted


def selected_text(value: ColumnElement[str], dialect: str) -> ColumnElement[Any]:
    """Return an expression that selects any text; `as_text` decodes it in the `text_encoding` of the connection."""
    return cast(value, LargeBinary) if dialect == "sqlite" else value


def _id_in(location: ColumnElement[str], dialect: Dialect) -> ColumnElement[Any]:
    """Return the first characters of the last segment."""
    if dialect.name == "sqlite":
        folder = func.rtrim(location, func.replace(location, "/", ""))
        return func.substr(location, func.length(folder) + 1, GENERATED_ID_LENGTH)
    if dialect.name != "postgresql":
        return func.left(func.substring_index(location, "/", -1), GENERATED_ID_LENGTH)
    if (dialect.server_version_info or ()) >= _COUNTS_FROM_THE_END:
        return func.left(func.split_part(location, "/", -1), GENERATED_ID_LENGTH)
    return func.left(func.substring(location, "[^/]*$"), GENERATED_ID_LENGTH)


def _extra_of(column: ColumnElement[Any], dialect: str) -> tuple[ColumnElement[Any], ColumnElement[bool]]:
    """Return `extra` as JSON text, and whether it contains the form of a generated name, whose digits are never escaped."""
    if dialect == "postgresql":
        text: ColumnElement[Any] = cast(json_in(column, "extra", dialect), Text())
        # Without one it is NULL here, which costs no comparison.
        return text, value_in(cast(column, JSONB), "extra", dialect).op("~", is_comparison=True)(f"{GENERATED_STEM}-")
    text = json_in(column, "extra", dialect)
    if dialect == "sqlite":
        text = where_json(column, text)
        return text, text.op("GLOB", is_comparison=True)(f"*{_STEM_AS_GLOB}-*")
    return text, text.op("REGEXP", is_comparison=True)(f"{GENERATED_STEM}-")
