"""Where attachments are: on a mapper, in a table, and below a table by cascades of the database."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Column, ForeignKeyConstraint, MetaData, Table
from sqlalchemy.orm import InstanceState, Mapper

from granite_storage.orm.types import AttachmentType, StoredObjectRefType

__all__ = ["Slot", "Tables", "keys_of", "primary_key_of", "slots_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """An attachment attribute of a mapped class."""

    key: str
    column: Column[Any]
    home: AttachmentType


# By the identity of the mapper: it is asked for each row of each flush, and a weak dictionary takes several times as long.
_slots: dict[int, tuple[Slot, ...]] = {}
_slots_declared = 0


def slots_of(mapper: Mapper[Any]) -> tuple[Slot, ...]:
    """Return the attachment attributes of a mapper, inherited ones included."""
    global _slots_declared
    if _slots_declared != AttachmentType.declared:
        # A class that is mapped already may have been given another column.
        _slots.clear()
        _slots_declared = AttachmentType.declared
    slots = _slots.get(id(mapper))
    if slots is None:
        slots = _slots[id(mapper)] = tuple(
            Slot(prop.key, column, column.type)
            for prop in mapper.column_attrs
            for column in prop.columns
            if isinstance(column, Column) and isinstance(column.type, AttachmentType) and isinstance(column.table, Table)
        )
        weakref.finalize(mapper, _slots.pop, id(mapper), None).atexit = False
    return slots


def primary_key_of(state: InstanceState[Any], table: Table) -> tuple[Any, ...]:
    """Return the primary key by which a table of an instance's mapper knows its row, as it is in the database.

    A row that was inserted by the flush that is under way has the one that its instance says.
    """
    mapper: Mapper[Any] = state.mapper
    instance: Any = state.obj()
    identity = state.identity or mapper.primary_key_from_instance(instance)
    by_attribute = {
        mapper.get_property_by_column(column).key: value for column, value in zip(mapper.primary_key, identity, strict=True)
    }
    return tuple(by_attribute[mapper.get_property_by_column(column).key] for column in table.primary_key)


def keys_of(state: InstanceState[Any], table: Table) -> set[tuple[Any, ...]]:
    """Return the primary keys that the row of an instance may have while a flush changes it: the old one and the new one.

    Nothing is loaded; a part of a key that the instance does not know is None.
    """
    names = [state.mapper.get_property_by_column(column).key for column in table.primary_key]
    current = tuple(state.dict.get(name) for name in names)
    return {current} if state.identity is None else {current, primary_key_of(state, table)}


class Tables:
    """What a metadata's tables have to do with attachments; made once per binding, refreshed as any are added."""

    def __init__(self, metadata: MetaData) -> None:
        self._metadata = metadata
        self._seen = (-1, -1)
        self._attachments: dict[str, tuple[Column[Any], ...]] = {}
        self._cascades: dict[str, list[ForeignKeyConstraint]] = {}
        self._leading: set[str] = set()
        self._refs: list[Column[Any]] = []
        self._by_mapper: weakref.WeakKeyDictionary[Mapper[Any], tuple[Table, ...]] = weakref.WeakKeyDictionary()

    def find(self, table: Any) -> Table | None:
        """Return the metadata's own table for one that a statement holds in an annotated form."""
        if getattr(table, "metadata", None) is not self._metadata:
            return None
        found: Table | None = self._metadata.tables.get(getattr(table, "fullname", ""))
        return found

    def attachments(self, table: Table) -> tuple[Column[Any], ...]:
        """Return the attachment columns of a table."""
        self._refresh()
        return self._attachments.get(table.fullname, ())

    def cascades(self, table: Table) -> Sequence[ForeignKeyConstraint]:
        """Return the foreign keys by which deleting a row of `table` deletes rows that lead to attachments."""
        self._refresh()
        return [
            constraint
            for constraint in self._cascades.get(table.fullname, ())
            if constraint.table.fullname in self._leading or constraint.table.fullname in self._attachments
        ]

    def concerns(self, table: Table) -> bool:
        """Tell whether a table has attachments, or deleting its rows deletes some elsewhere."""
        self._refresh()
        return table.fullname in self._attachments or table.fullname in self._leading

    def concerned(self, mapper: Mapper[Any]) -> tuple[Table, ...]:
        """Return the tables of a mapper that `concerns` holds for."""
        self._refresh()
        found = self._by_mapper.get(mapper)
        if found is None:
            found = self._by_mapper[mapper] = tuple(
                table for table in mapper.tables if isinstance(table, Table) and self.concerns(table)
            )
        return found

    def refs(self) -> list[Column[Any]]:
        """Return every column that holds refs, managed and plain ones."""
        self._refresh()
        return self._refs

    def all_attachments(self) -> list[Column[Any]]:
        """Return every attachment column."""
        self._refresh()
        return [column for columns in self._attachments.values() for column in columns]

    def _refresh(self) -> None:
        tables = self._metadata.tables
        seen = len(tables), AttachmentType.declared
        if seen == self._seen:
            return
        self._attachments, self._cascades = {}, {}
        self._by_mapper.clear()
        self._refs = []
        for name, table in tables.items():
            columns = tuple(column for column in table.columns if isinstance(column.type, AttachmentType))
            if columns:
                self._attachments[name] = columns
            self._refs += [column for column in table.columns if isinstance(column.type, AttachmentType | StoredObjectRefType)]
            for constraint in table.foreign_key_constraints:
                if (constraint.ondelete or "").upper() == "CASCADE":
                    self._cascades.setdefault(_referred_name(constraint), []).append(constraint)
        self._leading = self._tables_that_lead_to_attachments()
        self._seen = seen

    def _tables_that_lead_to_attachments(self) -> set[str]:
        leading: set[str] = set()
        while True:
            found = {
                parent
                for parent, constraints in self._cascades.items()
                for constraint in constraints
                if constraint.table.fullname in self._attachments or constraint.table.fullname in leading
            }
            if found <= leading:
                return leading
            leading |= found


def _referred_name(constraint: ForeignKeyConstraint) -> str:
    return constraint.elements[0].target_fullname.rpartition(".")[0]
