"""Whether the database may write something else into a row than a flush has told it to."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine, text

from granite_storage.orm._engines import root_engine

if TYPE_CHECKING:
    from sqlalchemy import Table

__all__ = ["has_triggers"]

_SECONDS = 60.0
"""How long an answer counts: a trigger that is made meanwhile may leave an object to the garbage collector, and loses none."""

_POSTGRESQL = text("""
    SELECT EXISTS (
        SELECT 1 FROM pg_trigger WHERE NOT tgisinternal
            AND (tgrelid = to_regclass(:name) OR tgrelid IN (SELECT relid FROM pg_partition_tree(to_regclass(:name))))
    ) OR EXISTS (SELECT 1 FROM pg_class WHERE oid = to_regclass(:name) AND relkind = 'r' AND relhasrules)
""")
_MARIADB = text("""
    SELECT EXISTS (
        SELECT 1 FROM information_schema.triggers
        WHERE event_object_schema = COALESCE(:schema, DATABASE()) AND event_object_table = :table
    )
""")
_answers: WeakKeyDictionary[Engine, dict[tuple[str | None, str], tuple[float, bool]]] = WeakKeyDictionary()


def has_triggers(connection: Connection, table: Table) -> bool:
    """Tell whether a table has triggers or rules of its own, by the catalogue of the database; remembered for a minute.

    MariaDB shows them only to roles with the privilege TRIGGER, and to others none.
    """
    translated: dict[str | None, str | None] = connection.get_execution_options().get("schema_translate_map") or {}
    schema = translated.get(table.schema, table.schema)
    answers = _answers.setdefault(root_engine(connection.engine), {})
    until, answer = answers.get((schema, table.name), (0.0, False))
    if time.monotonic() >= until:
        answer = _ask(connection, schema, table.name)
        answers[schema, table.name] = (time.monotonic() + _SECONDS, answer)
    return answer


def _ask(connection: Connection, schema: str | None, table: str) -> bool:
    quote = connection.dialect.identifier_preparer.quote
    match connection.dialect.name:
        case "postgresql":
            name = ".".join(quote(part) for part in (schema, table) if part)
            found: Any = connection.execute(_POSTGRESQL, {"name": name}).scalar()
        case "sqlite":
            # A trigger may be a temporary one, of a table in another file.
            schemas = {"temp", *(row[1] for row in connection.exec_driver_sql("PRAGMA database_list"))}
            parts = [
                f"SELECT 1 FROM {quote(one)}.sqlite_master"  # noqa: S608  # quoted
                " WHERE type = 'trigger' AND tbl_name = :table COLLATE NOCASE"
                for one in sorted(schemas)
            ]
            found = connection.execute(text(" UNION ALL ".join(parts)), {"table": table}).first()
        case _:
            found = connection.execute(_MARIADB, {"schema": schema, "table": table}).scalar()
    return bool(found)
