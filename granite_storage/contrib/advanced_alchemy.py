"""Repositories of advanced-alchemy whose `update`, `update_many` and `upsert_many` take attachments.

All other methods take them already. `SQLAlchemyAsyncRepository.update_many` sends one bulk UPDATE, which the session does not see
row by row, so it can set an attachment to None only, and raises `InvalidReferenceError` for any other; `upsert_many` calls it for
the rows that exist. Its `update` does not copy an attribute whose column has another name, nor new elements of a relationship.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import inspect
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.attributes import instance_state

from granite_storage.exceptions import MissingDependencyError
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.collections import declared_collection

try:
    from advanced_alchemy.repository import SQLAlchemyAsyncRepository, SQLAlchemySyncRepository
    from advanced_alchemy.repository.typing import ModelT
except ImportError as _error:
    raise MissingDependencyError(
        "granite_storage.contrib.advanced_alchemy needs advanced-alchemy: pip install 'granite-storage[advanced-alchemy]'"
    ) from _error

# How the row of an update is found.
_FINDING = ("id_attribute", "load", "execution_options", "with_for_update", "bind_group")
_DEFAULTS = ("default", "server_default", "onupdate", "server_onupdate")

__all__ = ["AttachmentAsyncRepository", "AttachmentSyncRepository"]


class AttachmentAsyncRepository(SQLAlchemyAsyncRepository[ModelT]):
    """A `SQLAlchemyAsyncRepository` for models with attachments, also beside its other subclasses.

    Example:
        ```python
        class DocumentRepository(AttachmentAsyncRepository[Document]):
            model_type = Document
        ```
    """

    async def update(self, data: ModelT, **options: Any) -> ModelT:
        """Update a row by the attributes that are set on an instance, collections of attachments among them.

        Args:
            data: The row itself, or an instance that is not in the session, with its primary key.
            options: Those of `SQLAlchemyAsyncRepository.update`.
        """
        if data not in self.session and (values := _pop_overlooked(data)):
            row: Any = await self.get(_key_of(self, data, options), **_find_by(options))
            if collections := _collections_among(self.model_type, values):
                await self.session.refresh(row, collections)
            _set_values(row, values)
        return await super().update(data, **options)

    async def update_many(self, data: Iterable[ModelT], *, auto_commit: bool | None = None, **options: Any) -> list[ModelT]:
        """Update rows: one by one where there are attachments among the values, otherwise by one bulk UPDATE.

        Args:
            data: Instances with their primary keys, or dictionaries.
            auto_commit: Whether to commit afterwards; None for what the repository was made with.
            options: Those of `SQLAlchemyAsyncRepository.update_many`.
        """
        data = list(data)
        if not _are_rows_needed(self.model_type, data):
            return await super().update_many(data, auto_commit=auto_commit, **options)
        rest, last = _as_instances(self.model_type, data)
        updated = [await self.update(one, auto_commit=False, **options) for one in rest]
        return [*updated, await self.update(last, auto_commit=auto_commit, **options)]


class AttachmentSyncRepository(SQLAlchemySyncRepository[ModelT]):
    """A `SQLAlchemySyncRepository` for models with attachments; see `AttachmentAsyncRepository`."""

    def update(self, data: ModelT, **options: Any) -> ModelT:
        """Update a row; see `AttachmentAsyncRepository.update`."""
        if data not in self.session and (values := _pop_overlooked(data)):
            row: Any = self.get(_key_of(self, data, options), **_find_by(options))
            if collections := _collections_among(self.model_type, values):
                self.session.refresh(row, collections)
            _set_values(row, values)
        return super().update(data, **options)

    def update_many(self, data: Iterable[ModelT], *, auto_commit: bool | None = None, **options: Any) -> list[ModelT]:
        """Update rows; see `AttachmentAsyncRepository.update_many`."""
        data = list(data)
        if not _are_rows_needed(self.model_type, data):
            return super().update_many(data, auto_commit=auto_commit, **options)
        rest, last = _as_instances(self.model_type, data)
        updated = [self.update(one, auto_commit=False, **options) for one in rest]
        return [*updated, self.update(last, auto_commit=auto_commit, **options)]


def _key_of(repository: Any, data: Any, options: Mapping[str, Any]) -> Any:
    attribute = options.get("id_attribute")
    if attribute is None and repository.has_composite_pk:
        return repository.get_primary_key_value(data)
    return repository.get_id_attribute_value(data, id_attribute=attribute)


def _find_by(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _FINDING if name in options}


def _collections_among(model: type, names: Iterable[str]) -> list[str]:
    return [name for name in names if declared_collection(getattr(model, name, None)) is not None]


def _renamed(model: type) -> dict[str, Any]:
    """Return the columns whose attributes have another name, by that name; advanced-alchemy looks for the column's."""
    mapper: Mapper[Any] = inspect(model)
    return {prop.key: prop.columns[0] for prop in mapper.column_attrs if prop.columns[0].key != prop.key}


def _pop_overlooked(data: Any) -> dict[str, Any]:
    """Return the values that advanced-alchemy's `update` would not copy from an instance, without the collections on it."""
    state, values = instance_state(data), vars(data)
    renamed = {name: column for name, column in _renamed(type(data)).items() if name in values}
    found = {
        name: values[name]
        for name, column in renamed.items()  # as there, None does not replace what has a default
        if values[name] is not None or all(getattr(column, default, None) is None for default in _DEFAULTS)
    }
    for name in _collections_among(type(data), list(values)):
        found[name] = list(values[name])
        setattr(data, name, [])  # its files are of no row, or the session would insert this instance with them
        state._reset(values, name)
    return found


def _set_values(row: Any, values: Mapping[str, Any]) -> None:
    collections = _collections_among(type(row), values)
    for name, value in values.items():
        if name in collections:  # the files of a row that another session has loaded are those that this one has loaded
            own = {file.id: file for file in getattr(row, name)}
            setattr(row, name, [own.get(file.id, file) for file in value])
        else:
            setattr(row, name, value)


def _are_rows_needed(model: type, data: Sequence[Any]) -> bool:
    """Return whether the values are more than one bulk UPDATE can write."""
    for one in data:
        values = one if isinstance(one, dict) else vars(one)
        if any(isinstance(value, Attachment) for value in values.values()) or _collections_among(model, values):
            return True
        if not isinstance(one, dict) and not values.keys().isdisjoint(_renamed(model)):
            return True
    return False


def _as_instances(model: type[ModelT], data: Sequence[Any]) -> tuple[list[ModelT], ModelT]:
    *rest, last = (model(**one) if isinstance(one, dict) else one for one in data)
    return rest, last
