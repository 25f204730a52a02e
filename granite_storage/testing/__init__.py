"""What users test with: the conformance suite for backends, a backend that fails when told to, and pytest fixtures.

The names below are loaded when they are first used: only the suite and the fixtures need pytest.
`pytest_plugins = ["granite_storage.testing.fixtures"]` in a `conftest.py` gives the fixtures.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from granite_storage.testing.conformance import BackendConformance
    from granite_storage.testing.faults import FaultInjectingBackend, Operation, RecordedCall

__all__ = ["BackendConformance", "FaultInjectingBackend", "Operation", "RecordedCall"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "conformance" if name == "BackendConformance" else "faults"
    value: object = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
