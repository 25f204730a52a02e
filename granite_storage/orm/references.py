"""Reading the refs of a column, streamed from the server."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect, select, type_coerce

from granite_storage.exceptions import ConfigurationError
from granite_storage.orm.types import AttachmentType, StoredObjectRefType
from granite_storage.refs import StoredObjectRef

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

__all__ = ["iter_model_storage_refs"]

_AT_A_TIME = 500


async def iter_model_storage_refs(session: AsyncSession, model: type[Any], column: str) -> AsyncGenerator[StoredObjectRef, None]:
    """Yield the refs that the rows of a model hold, streamed from the server, never the whole table in memory.

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
    result = await session.stream_scalars(statement.execution_options(yield_per=_AT_A_TIME))
    try:
        async for ref in result:
            if ref is not None:
                yield ref
    finally:
        await result.close()
