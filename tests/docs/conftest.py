"""What documents leave in this process, where each of them is run by more than one test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlmodel import SQLModel


@pytest.fixture(autouse=True)
def _no_model_left() -> Iterator[None]:
    """Let a document declare its SQLModel classes once more: they share one registry and one metadata."""
    tables, classes = set(SQLModel.metadata.tables), set(SQLModel._sa_registry._class_registry)
    yield
    for name in set(SQLModel.metadata.tables) - tables:
        SQLModel.metadata.remove(SQLModel.metadata.tables[name])
    for name in set(SQLModel._sa_registry._class_registry) - classes:
        del SQLModel._sa_registry._class_registry[name]
