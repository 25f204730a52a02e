"""Repositories of advanced-alchemy whose `update_many` and `upsert_many` take attachments.

All other methods take them already. `SQLAlchemyAsyncRepository.update_many` sends one bulk UPDATE, which the session does not see
row by row, so it can set an attachment to None only, and raises `InvalidReferenceError` for any other; `upsert_many` calls it for
the rows that exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from granite_storage.exceptions import MissingDependencyError
from granite_storage.orm.attachment import Attachment

try:
    from advanced_alchemy.repository import SQLAlchemyAsyncRepository, SQLAlchemySyncRepository
    from advanced_alchemy.repository.typing import ModelT
except ImportError as _error:
    raise MissingDependencyError(
        "granite_storage.contrib.advanced_alchemy needs advanced-alchemy: pip install 'granite-storage[advanced-alchemy]'"
    ) from _error

__all__ = ["AttachmentAsyncRepository", "AttachmentSyncRepository"]


class AttachmentAsyncRepository(SQLAlchemyAsyncRepository[ModelT]):
    """A `SQLAlchemyAsyncRepository` for models with attachments, also beside its other subclasses.

    Example:
        ```python
        class DocumentRepository(AttachmentAsyncRepository[Document]):
            model_type = Document
        ```
    """

    async def update_many(self, data: list[ModelT], *, auto_commit: bool | None = None, **options: Any) -> list[ModelT]:
        """Update rows: one by one where there are attachments among the values, otherwise by one bulk UPDATE.

        Args:
            data: Instances with their primary keys, or dictionaries.
            auto_commit: Whether to commit afterwards; None for what the repository was made with.
            options: Those of `SQLAlchemyAsyncRepository.update_many`.
        """
        if not _has_attachments(data):
            return await super().update_many(data, auto_commit=auto_commit, **options)
        rest, last = _as_instances(self.model_type, data)
        updated = [await self.update(one, auto_commit=False, **options) for one in rest]
        return [*updated, await self.update(last, auto_commit=auto_commit, **options)]


class AttachmentSyncRepository(SQLAlchemySyncRepository[ModelT]):
    """A `SQLAlchemySyncRepository` for models with attachments; see `AttachmentAsyncRepository`."""

    def update_many(self, data: list[ModelT], *, auto_commit: bool | None = None, **options: Any) -> list[ModelT]:
        """Update rows; see `AttachmentAsyncRepository.update_many`."""
        if not _has_attachments(data):
            return super().update_many(data, auto_commit=auto_commit, **options)
        rest, last = _as_instances(self.model_type, data)
        updated = [self.update(one, auto_commit=False, **options) for one in rest]
        return [*updated, self.update(last, auto_commit=auto_commit, **options)]


def _has_attachments(data: Sequence[Any]) -> bool:
    values = (one if isinstance(one, dict) else vars(one) for one in data)
    return any(isinstance(value, Attachment) for one in values for value in one.values())


def _as_instances(model: type[ModelT], data: Sequence[Any]) -> tuple[list[ModelT], ModelT]:
    *rest, last = (model(**one) if isinstance(one, dict) else one for one in data)
    return rest, last
