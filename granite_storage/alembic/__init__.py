"""Alembic migrations that know files; the extra `alembic` brings what it needs. `docs/migrations.md` shows how to use it."""

from granite_storage.exceptions import MissingDependencyError

try:
    import alembic as _alembic
except ImportError as _error:
    raise MissingDependencyError("granite_storage.alembic needs Alembic: pip install 'granite-storage[alembic]'") from _error

from granite_storage.alembic.rendering import include_storage, render_storage
from granite_storage.orm.types import portable_storage_ref_type

__all__ = ["include_storage", "portable_storage_ref_type", "render_storage"]

del _alembic
