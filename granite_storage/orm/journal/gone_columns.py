"""Tables and columns that triggers name and that are gone: on PostgreSQL and MariaDB their text follows no rename."""

from __future__ import annotations

import json
from collections.abc import Iterable

from sqlalchemy import Connection, text

from granite_storage.orm._util import UNTRANSLATED

__all__ = ["comment_of", "describe_gone", "describe_made_for", "find_gone_columns"]

_BEGINNING = "granite_storage: "


def comment_of(columns: Iterable[tuple[str, str, str]]) -> str:
    """Return the comment of a trigger function: the columns that it names, by schema, table and name."""
    return _BEGINNING + json.dumps([list(column) for column in sorted(set(columns))])


def find_gone_columns(connection: Connection, schema: str) -> list[str]:
    """Return in words which triggers of the tables of a schema on PostgreSQL name columns that are gone."""
    relations: dict[str, list[str]] = {}
    rows = connection.execute(_GONE, {"schema": schema}, execution_options=UNTRANSLATED)
    for schema, table, column, has_table, relation in rows:
        gone = f"the column {column} of {schema}.{table}" if has_table else f"the table {schema}.{table}"
        if relation not in (found := relations.setdefault(gone, [])):
            found.append(relation)
    return [describe_gone(found, gone, "statements which write files to their rows fail") for gone, found in relations.items()]


def describe_gone(tables: Iterable[str], gone: str, consequence: str) -> str:
    """Return in words that triggers name something that is gone, and what to do.

    Args:
        tables: The tables that have the triggers.
        gone: What is gone.
        consequence: What follows from it.
    """
    return f"the triggers of {', '.join(tables)} name {gone}, which is gone, so that {consequence}. {_REMEDY}"


def describe_made_for(tables: Iterable[str], gone: str) -> str:
    """Return in words that something of the models is gone for which the triggers of tables were made, and what to do."""
    return f"the triggers of {', '.join(tables)} were made for {gone} of the models, which is gone. {_REMEDY}"


_REMEDY = (
    "Rename it back; or deploy models with the new name, and create the triggers again with create_all, or by a migration with"
    " create_storage_triggers(op, ...)"
)


_GONE = text("""
    SELECT x.place ->> 0, x.place ->> 1, x.place ->> 2,
        EXISTS (
            SELECT FROM pg_class k JOIN pg_namespace m ON m.oid = k.relnamespace
            WHERE m.nspname = x.place ->> 0 AND k.relname = x.place ->> 1
        ),
        concat(n.nspname, '.', c.relname)
    FROM pg_trigger t
    JOIN pg_class c ON c.oid = t.tgrelid AND NOT c.relispartition
    JOIN pg_namespace n ON n.oid = c.relnamespace
    CROSS JOIN LATERAL obj_description(t.tgfoid, 'pg_proc') d(said)
    CROSS JOIN LATERAL jsonb_array_elements(
        CASE WHEN starts_with(d.said, :beginning) THEN CAST(split_part(d.said, :beginning, 2) AS jsonb) ELSE '[]' END
    ) x(place)
    WHERE t.tgname = 'granite_storage_delete' AND n.nspname = :schema
        AND NOT EXISTS (
            SELECT FROM pg_class k JOIN pg_namespace m ON m.oid = k.relnamespace JOIN pg_attribute a ON a.attrelid = k.oid
            WHERE m.nspname = x.place ->> 0 AND k.relname = x.place ->> 1 AND a.attname = x.place ->> 2
                AND a.attnum > 0 AND NOT a.attisdropped
        )
    ORDER BY 1, 2, 3, 5
""").bindparams(beginning=_BEGINNING)
