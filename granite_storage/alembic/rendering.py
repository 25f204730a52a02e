"""Autogenerate: what it renders for columns of refs, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from alembic.autogenerate import comparators, renderers
from alembic.operations import ops
from alembic.util import DispatchPriority
from sqlalchemy import column, func, literal, select

from granite_storage.alembic._calls import CallOp
from granite_storage.alembic.triggers import compare_triggers
from granite_storage.orm.columns import (
    LOCATION_COLUMN_PREFIX,
    LOCATION_INDEX_PREFIX,
    AttachmentType,
    StoredObjectRefType,
    location_column_name,
    location_index_name,
)

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext
    from sqlalchemy import Connection

__all__ = ["include_storage", "render_storage"]

RenderItem: TypeAlias = Callable[[str, Any, "AutogenContext"], str | Literal[False]]

_IMPORT = "from granite_storage import portable_storage_ref_type"
_registered = False


def include_storage(context: object = None) -> None:
    """Let autogenerate render columns of refs; call it once in `env.py`, before `context.run_migrations()`.

    Columns of `attachment()` and `StoredObjectRefType` are rendered as `portable_storage_ref_type()`, with its import. Indexes
    that `create_location_index` made are left alone, though no model declares them. What `storage_triggers` declares is created,
    replaced and dropped. All other arguments of `context.configure`
    keep working: a `render_item` of your own is called first.

    Args:
        context: Alembic's context, as `env.py` has it; it is not used, and may be left out.

    Example:
        ```python
        from granite_storage.alembic import include_storage

        include_storage(context)
        ```
    """
    global _registered
    if not _registered:
        comparators.dispatch_for("schema", priority=DispatchPriority.LAST)(_prepare)
        _registered = True


def render_storage(kind: str, item: Any, autogen_context: AutogenContext) -> str | Literal[False]:
    """Render a type of the library, as a `render_item` for `context.configure`; False for everything else.

    `include_storage` does this by itself; the function is for those who compose their `render_item` by hand.
    """
    if kind != "type" or not isinstance(item, AttachmentType | StoredObjectRefType):
        return False
    autogen_context.imports.add(_IMPORT)
    return "portable_storage_ref_type()"


def _prepare(autogen_context: AutogenContext, upgrade_ops: ops.UpgradeOps, _: object) -> None:
    """Alembic calls it once it has compared the tables, before anything is rendered."""
    own = autogen_context.opts.get("render_item")
    if not isinstance(own, _Composed):
        autogen_context.opts["render_item"] = _Composed(own)
    outlived = [
        _location_index("drop_location_index", "create_location_index", *place)
        for operation in upgrade_ops.ops
        for place in _outlived(operation, autogen_context.connection)
    ]
    _exclude_location_indexes(upgrade_ops)
    if autogen_context.dialect is not None and autogen_context.dialect.name == "sqlite":
        _drop_later_indexes(upgrade_ops)
    upgrade_ops.ops[:0] = outlived
    compare_triggers(autogen_context, upgrade_ops)


def _location_index(name: str, opposite: str, table: str, column: str, schema: str | None) -> CallOp:
    """Return the call of one of the functions for indexes over locations; a downgrade calls the opposite one."""
    undo = partial(_location_index, opposite, name, table, column, schema)
    return CallOp(name, table, column, schema=schema, undo=undo)


def _outlived(operation: ops.MigrateOperation, connection: Connection | None) -> list[tuple[str, str, str | None]]:
    """Return the columns that an operation drops though their index depends on them, which MariaDB and SQLite refuse."""
    if not isinstance(operation, ops.ModifyTableOps):
        return []
    dropped = [item.column_name for item in operation.ops if isinstance(item, ops.DropColumnOp)]
    indexes = _indexes_of_sqlite(connection, operation) if dropped else set()
    return [
        (operation.table_name, name, operation.schema)
        for name in dropped
        if location_column_name(name) in dropped or location_index_name(operation.table_name, name) in indexes
    ]


def _indexes_of_sqlite(connection: Connection | None, operation: ops.ModifyTableOps) -> set[str]:
    """Return the names of a table's indexes on SQLite, where those on expressions are not reflected."""
    if connection is None or connection.dialect.name != "sqlite":
        return set()
    table, schema = literal(operation.table_name), literal(operation.schema or "main")
    return set(connection.scalars(select(column("name")).select_from(func.pragma_index_list(table, schema))))


class _AfterColumn(ops.MigrateOperation):
    """Nothing in an upgrade that adds a column of refs; in its downgrade the call that drops an index which came later."""

    def __init__(self, table: str, column: str, schema: str | None) -> None:
        self._place = table, column, schema

    def reverse(self) -> ops.MigrateOperation:
        return _location_index("drop_location_index", "create_location_index", *self._place)

    def to_diff_tuple(self) -> tuple[Any, ...]:
        return ("drop_location_index in the downgrade", *self._place)


@renderers.dispatch_for(_AfterColumn)
def _render_nothing(autogen_context: AutogenContext, operation: _AfterColumn) -> list[str]:
    return []


def _drop_later_indexes(upgrade_ops: ops.UpgradeOps) -> None:
    """Let the downgrade of each column of refs that is added drop its index first, which a later migration may create."""
    added = [
        (operation.table_name, item.column.name, operation.schema)
        for operation in upgrade_ops.ops
        if isinstance(operation, ops.ModifyTableOps)
        for item in operation.ops
        if isinstance(item, ops.AddColumnOp) and isinstance(item.column.type, AttachmentType | StoredObjectRefType)
    ]
    upgrade_ops.ops.extend(_AfterColumn(*place) for place in added)


class _Composed:
    """Calls the project's own `render_item` first."""

    def __init__(self, own: RenderItem | None) -> None:
        self._own = own

    def __call__(self, kind: str, item: Any, autogen_context: AutogenContext) -> str | Literal[False]:
        rendered: str | Literal[False] = self._own(kind, item, autogen_context) if self._own else False
        return render_storage(kind, item, autogen_context) if rendered is False else rendered


def _exclude_location_indexes(container: ops.OpContainer) -> None:
    for operation in container.ops:
        if isinstance(operation, ops.OpContainer):
            _exclude_location_indexes(operation)
    container.ops[:] = [operation for operation in container.ops if not _is_excluded(operation)]


def _is_excluded(operation: ops.MigrateOperation) -> bool:
    match operation:
        case ops.DropIndexOp():
            return str(operation.index_name).startswith(LOCATION_INDEX_PREFIX)
        case ops.DropColumnOp():
            return operation.column_name.startswith(LOCATION_COLUMN_PREFIX)
        case ops.ModifyTableOps():
            return not operation.ops
        case _:
            return False
