"""Helpers for tests: a temporary binding, the conformance suite for backends, fault injection, and fixtures.

The names below are loaded when they are first used: only the suite and the fixtures need pytest.
`pytest_plugins = ["granite_storage.testing.fixtures"]` in a `conftest.py` gives the fixtures.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from granite_storage.testing.conformance import BackendConformance
    from granite_storage.testing.faults import FaultInjectingBackend, Operation, RecordedCall
    from granite_storage.testing.kit import BoundStorage, SyncBoundStorage, bound_storage

__all__ = [
    "BackendConformance",
    "BoundStorage",
    "FaultInjectingBackend",
    "Operation",
    "RecordedCall",
    "SyncBoundStorage",
    "bound_storage",
]

_MODULES = {
    "BackendConformance": "conformance",
    "BoundStorage": "kit",
    "SyncBoundStorage": "kit",
    "bound_storage": "kit",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'faults')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
