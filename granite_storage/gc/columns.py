"""Which columns may refer to an object: those of every base whose manager has the backend, and none that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import ARRAY, Column, MetaData, Table
from sqlalchemy.sql.type_api import TypeEngine
from sqlalchemy.types import TypeDecorator

from granite_storage.exceptions import CollectionRefusedError
from granite_storage.gc.territory import overlap
from granite_storage.orm._registry import active_bindings
from granite_storage.orm.types import AttachmentType, StoredObjectRefType

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

    from granite_storage.orm.binding import StorageBinding
    from granite_storage.orm.journal.tables import JournalTables

__all__ = ["ref_columns", "require_one_database", "sharing_bindings"]

_KINDS = (AttachmentType, StoredObjectRefType)


def sharing_bindings(binding: StorageBinding, backend: str) -> list[StorageBinding]:
    """Return the bindings whose rows may refer to objects of a backend: a binding itself, and those of other bases.

    Raises:
        CollectionRefusedError: One calls the backend by another name, or is in another database, or nobody knows in which.
    """
    others = [other for other in active_bindings() if other.metadata is not binding.metadata]
    return [binding, *(other for other in others if _shares(binding, other, backend))]


def ref_columns(bindings: Sequence[StorageBinding]) -> list[Column[Any]]:
    """Return every column of these bindings' bases that may refer to objects.

    Raises:
        CollectionRefusedError: One holds refs in a form that SQL cannot look into.
    """
    return [column for binding in bindings for column in _readable(binding.metadata)]


def require_one_database(
    sessions: async_sessionmaker[AsyncSession], columns: Sequence[Column[Any]], journals: Sequence[JournalTables]
) -> None:
    """Refuse tables in several databases: they cannot be looked at in one statement, and so not at one moment.

    Raises:
        CollectionRefusedError: They are.
    """
    session = sessions()
    tables = {column.table for column in columns}
    tables |= {table for journal in journals for table in (journal.intent, journal.reclaim)}
    homes = {table: session.get_bind(clause=table) for table in tables}
    if len({home.engine.url for home in homes.values()}) > 1:
        names = ", ".join(sorted(table.fullname for table in homes))
        raise CollectionRefusedError(
            f"the tables {names} are in several databases, which cannot be looked at in one moment: collect with"
            " iter_references, which reads them all"
        )


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


def _shares(binding: StorageBinding, other: StorageBinding, backend: str) -> bool:
    """Tell whether another binding's rows may refer to objects of a backend."""
    ours = binding.manager.backend(backend)
    keys = [key for key, theirs in other.manager.backends.items() if theirs is ours or overlap(theirs, ours)]
    if not keys:
        return False
    if keys != [backend]:
        raise CollectionRefusedError(
            f"{other!r} has the objects of the backend {backend!r} under the name {keys[0]!r}, so its references cannot be told"
        )
    if other.sessions is None:
        raise CollectionRefusedError(
            f"{other!r} has the objects of the backend {backend!r}, too, and no sessions to read its references with:"
            " bind_storage(Base, manager, sessions=...)"
        )
    if _home(other.sessions) is None or _home(other.sessions) != _home(binding.sessions):
        raise CollectionRefusedError(
            f"{other!r} has the objects of the backend {backend!r}, too, in another database, which cannot be looked at in one"
            " moment: collect with iter_references, which reads both"
        )
    return True


def _home(sessions: async_sessionmaker[AsyncSession] | None) -> object:
    bind = None if sessions is None else sessions.kw.get("bind")
    return None if bind is None else bind.engine.url
