"""What documents leave in this process, where each of them is run by more than one test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy.orm.clsregistry import _ModuleMarker
from sqlmodel import SQLModel


@pytest.fixture(autouse=True)
def _no_model_left() -> Iterator[None]:
    """Let a document declare its SQLModel classes once more: they share one registry and one metadata."""
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
