"""Finds the owners of objects: before an object is adopted, every column of refs in the database is searched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, FromClause, select
from sqlalchemy.exc import OperationalError

from granite_storage._engine import identities_of, may_overlap
from granite_storage.alembic._transactions import run
from granite_storage.alembic.sources import InPlace
from granite_storage.exceptions import BackendError
from granite_storage.manager import StorageManager
from granite_storage.orm.columns import as_found, join_variants, location_of, value_in, where_json
from granite_storage.orm.discovery import find_json_columns, find_with_refs
from granite_storage.orm.references import as_text, is_text, selected_text, text_encoding

Address = tuple[str, str]


class Owners:
    """The rows that own objects already, in any table and schema.

    Args:
        connection: The migration's connection.
        manager: The manager.
        target: The column that is being filled; it is asked though it may be empty now.
    """

    def __init__(self, connection: Connection, manager: StorageManager, target: Column[Any]) -> None:
        self._manager = manager
        found = [item for item in find_json_columns(connection) if item.is_readable and not item.is_foreign]
        columns = [as_found(item.schema, item.table, item.name) for item in found]
        self._columns = [target, *find_with_refs(connection, columns, None, is_sample=False)]
        self._keys_like = cache(self._find_keys_like)
        self._identities_of = cache(self._find_identities)

    def addresses(self, item: InPlace) -> set[Address]:
        """Return every address of an object: by each key of the manager that may lead to it."""
        return {(key, item.location) for key in self._keys_like(item.backend)}

    def find_taken(self, connection: Connection, items: Sequence[InPlace]) -> set[Address]:
        """Return the addresses of those objects that a row refers to, as its own or as a variant."""
        wanted = sorted({item.location for item in items if is_text(item.location)})
        if not wanted:
            return set()
        taken: set[Address] = set()
        rows = {row for column in self._columns for row in _find_rows(connection, column, wanted)}
        for item in items:
            keys = self._keys_like(item.backend)
            for backend, location, identity in rows:
                is_known = backend in self._manager.backends
                if location == item.location and (backend in keys or not is_known) and self._may_be_of(item.backend, identity):
                    taken.update(self.addresses(item))
        return taken

    def _find_keys_like(self, key: str) -> frozenset[str]:
        """Return the keys of the manager that may lead to the same objects as one of them does."""
        backend = self._manager.backend(key)
        backends = self._manager.backends.items()
        return frozenset(other for other, found in backends if run(may_overlap(backend, found)) is not False)

    def _may_be_of(self, key: str, identity: str) -> bool:
        """Return whether a ref with this identity, or none, may lead to the store of a backend."""
        identities = self._identities_of(key)
        return not identity or not identities or identity in identities

    def _find_identities(self, key: str) -> tuple[str, ...] | None:
        try:
            return run(identities_of(self._manager.backend(key)))
        except BackendError:
            return None


def _find_rows(connection: Connection, column: Column[Any], wanted: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return backend, location and identity of the refs of a column, and of their variants, that lead to one of the locations."""
    dialect = connection.dialect.name

    def find(source: FromClause, location: ColumnElement[str], *others: ColumnElement[str]) -> list[Any]:
        statement = select(*(selected_text(value, dialect) for value in (location, *others))).select_from(source)
        if column.table.schema is not None:
            statement = statement.execution_options(schema_translate_map={})
        return list(connection.execute(statement.where(location.in_(wanted))))

    backend, location = location_of(column, dialect)
    others = backend, value_in(column, "identity", dialect)
    try:
        rows = find(column.table, location, *others)
    except OperationalError:  # on SQLite one value that is no JSON fails the whole statement
        if dialect != "sqlite":
            raise
        rows = find(column.table, where_json(column, location), *others)
    source, variant = join_variants(column, dialect)
    rows += find(source, *(value_in(variant, key, dialect) for key in ("location", "backend", "identity")))
    encoding = text_encoding(connection)
    found = (tuple(as_text(value, encoding) for value in row) for row in rows)
    return [(backend, location, identity) for location, backend, identity in found]
