"""Clean up after documents, each of which more than one test runs in this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy.orm.clsregistry import _ModuleMarker
from sqlmodel import SQLModel


@pytest.fixture(autouse=True)
def _no_model_left() -> Iterator[None]:
    """Remove a document's SQLModel classes, which share one registry and metadata, so that it can declare them again."""
    registry = SQLModel._sa_registry._class_registry
    tables, classes = set(SQLModel.metadata.tables), set(registry)
    yield
    for name in set(SQLModel.metadata.tables) - tables:
        SQLModel.metadata.remove(SQLModel.metadata.tables[name])
    for name in set(registry) - classes:
        del registry[name]
    modules = registry.get("_sa_module_registry")
    if isinstance(modules, _ModuleMarker):
        modules._remove_item("__main__")
