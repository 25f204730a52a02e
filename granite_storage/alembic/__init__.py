"""Alembic migrations of columns of files; needs the extra `alembic`. `docs/migrations.md` shows how to use it."""

from granite_storage.exceptions import MissingDependencyError

try:
    import alembic as _alembic
except ImportError as _error:
    raise MissingDependencyError("granite_storage.alembic needs Alembic: pip install 'granite-storage[alembic]'") from _error

from granite_storage.alembic.columns import (
    add_column_once,
    add_storage_column,
    create_location_index,
    drop_converted_column,
    drop_location_index,
    drop_restored_column,
)
from granite_storage.alembic.journal import create_journal_tables, drop_journal_tables, upgrade_journal_tables
from granite_storage.alembic.operations import (
    ConversionReport,
    blob_to_storage,
    paths_to_storage,
    storage_to_blob,
    storage_to_paths,
    storage_to_text,
    text_to_storage,
)
from granite_storage.alembic.rendering import include_storage, render_storage
from granite_storage.alembic.sources import CopyOf, InPlace, PlainPath
from granite_storage.alembic.triggers import create_storage_triggers, drop_storage_triggers
from granite_storage.orm.columns import portable_storage_ref_type

__all__ = [
    "ConversionReport",
    "CopyOf",
    "InPlace",
    "PlainPath",
    "add_column_once",
    "add_storage_column",
    "blob_to_storage",
    "create_journal_tables",
    "create_location_index",
    "create_storage_triggers",
    "drop_converted_column",
    "drop_journal_tables",
    "drop_location_index",
    "drop_restored_column",
    "drop_storage_triggers",
    "include_storage",
    "paths_to_storage",
    "portable_storage_ref_type",
    "render_storage",
    "storage_to_blob",
    "storage_to_paths",
    "storage_to_text",
    "text_to_storage",
    "upgrade_journal_tables",
]

del _alembic
