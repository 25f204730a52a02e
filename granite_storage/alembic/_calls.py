"""Calls of the library's functions in the migrations that autogenerate writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from alembic.autogenerate import renderers
from alembic.operations import ops

if TYPE_CHECKING:
    from alembic.autogenerate.api import AutogenContext

__all__ = ["CallOp"]


class CallOp(ops.MigrateOperation):
    """A call of a function of `granite_storage.alembic` in a migration.

    Args:
        name: The function.
        arguments: What it takes after `op`.
        undo: Returns the call in the downgrade.
        comment: What the migration says behind the call.
        options: Its keyword arguments; those that are None or empty are left out.
    """

    def __init__(
        self, name: str, *arguments: object, undo: Callable[[], ops.MigrateOperation], comment: str = "", **options: object
    ) -> None:
        self.name, self.arguments, self.undo, self.comment, self.options = name, arguments, undo, comment, options

    def reverse(self) -> ops.MigrateOperation:
        return self.undo()

    def to_diff_tuple(self) -> tuple[Any, ...]:
        return (self.name, *self.arguments)


@renderers.dispatch_for(CallOp)
def _render(autogen_context: AutogenContext, operation: CallOp) -> str:
    autogen_context.imports.add(f"from granite_storage.alembic import {operation.name}")
    options = [f"{name}={value!r}" for name, value in operation.options.items() if value]
    return f"{operation.name}({', '.join(['op', *map(repr, operation.arguments), *options])}){operation.comment}"
