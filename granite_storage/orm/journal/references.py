"""Where rows may refer to an object, as the worker asks before it deletes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from granite_storage.orm.indexed import with_location_column
from granite_storage.orm.types import location_of

if TYPE_CHECKING:
    from sqlalchemy import Column, ColumnElement
    from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["locations_of"]


async def locations_of(connection: AsyncConnection, columns: Sequence[Column[Any]]) -> list[ColumnElement[str]]:
    """Return the locations that columns of refs refer to, in SQL, spelled as their indexes are; whatever backend is named."""
    generated = await with_location_column(connection, columns)
    return [location_of(column, connection.dialect.name, is_generated=column in generated)[1] for column in columns]
