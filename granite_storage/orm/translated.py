"""Bulk statements with a `schema_translate_map` of their own: what they displace is in other schemas than the session's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Delete, Insert, Result, Update
from sqlalchemy.orm import ORMExecuteState

from granite_storage.exceptions import ConfigurationError
from granite_storage.orm._registry import active_bindings
from granite_storage.orm.bulk import execute_bulk

__all__ = ["on_execute"]

_MAP = "schema_translate_map"


def on_execute(state: ORMExecuteState) -> Result[Any] | None:
    """See a statement that a session executes, with the session's connection translating as the statement does.

    Other listeners may put another statement in the place of one that writes: it is looked at when all of them were called.

    Raises:
        ConfigurationError: The session is a sharded one, so that the statement may have several connections.
    """
    statement = state.statement
    if len(state._events_todo) > 1 and isinstance(statement, Insert | Update | Delete):
        # This runs those that are still to be called, and then this one by itself, with a state of the statement that is left.
        state._events_todo.append(on_execute)
        return state.invoke_statement()
    if _MAP not in state.execution_options or not isinstance(statement, Update | Delete) or not _is_known(statement):
        return execute_bulk(state)
    if getattr(state.session, "connection_callable", None) is not None:
        raise ConfigurationError(
            "a bulk statement on rows with attachments cannot have a schema_translate_map of its own in a sharded session:"
            " set it on the shards' engines"
        )
    if state.is_orm_statement and state.execution_options.get("autoflush", True):
        # The statement would flush before it runs, and the flush has the session's map.
        state.session._autoflush()
    connection = state.session.connection(bind_arguments={"clause": statement, **state.bind_arguments})
    with _translating(connection, state.execution_options[_MAP]):
        return execute_bulk(state)


def _is_known(statement: Update | Delete) -> bool:
    name = getattr(statement.table, "name", None)
    return any(table.name == name for binding in active_bindings() for table in binding.metadata.tables.values())


@contextmanager
def _translating(connection: Connection, mapping: Any) -> Iterator[None]:
    usual = connection.get_execution_options().get(_MAP)
    connection.execution_options(schema_translate_map=mapping)
    try:
        yield
    finally:
        connection.execution_options(schema_translate_map=usual)
