"""Checks of uploads before they are stored: by type, by inspectors such as `ImageLimits`, and by a virus scanner."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from granite_storage.inspection.base import Inspection, Inspector, Scanner, ScanResult, UploadPreview

if TYPE_CHECKING:
    from granite_storage.inspection.clamd import ClamdScanner
    from granite_storage.inspection.images import ImageLimits

__all__ = ["ClamdScanner", "ImageLimits", "Inspection", "Inspector", "ScanResult", "Scanner", "UploadPreview"]

_MODULES = {"ClamdScanner": "clamd", "ImageLimits": "images"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
