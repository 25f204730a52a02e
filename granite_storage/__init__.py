"""Asyncio-native file storage: files that commit and roll back with your rows.

The names in `__all__` are loaded on first use, so that importing the package costs next to nothing. Everything else is imported
from its module: backends from `granite_storage.backends.local`, `.memory`, `.s3` and `.obstore`, whose packages are extras; the
other errors from `granite_storage.exceptions`; reports from `granite_storage.gc`, `.migration`, `.verification` and `.orm`.
"""

from __future__ import annotations

from importlib import import_module
from sys import modules as _loaded
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from granite_storage.backends.base import ObjectInfo, StorageBackend
    from granite_storage.exceptions import (
        BackendUnavailableError,
        ChecksumMismatchError,
        ConfigurationError,
        ContentTooLargeError,
        ObjectNotFoundError,
        StaleAttachmentError,
        StorageError,
    )
    from granite_storage.gc import StorageGarbageCollector
    from granite_storage.manager import StorageManager
    from granite_storage.orm import (
        Attachment,
        AttachmentType,
        StorageBinding,
        StorageJournal,
        StoredContentMixin,
        StoredObjectRefType,
        attachment,
        bind_storage,
        iter_model_storage_refs,
        journal_tables,
        portable_storage_ref_type,
    )
    from granite_storage.policies import StoragePolicy
    from granite_storage.readers import StoredObjectReader
    from granite_storage.refs import StoredObjectRef
    from granite_storage.streams import SizeLimitedStream

__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "AttachmentType",
    "BackendUnavailableError",
    "ChecksumMismatchError",
    "ConfigurationError",
    "ContentTooLargeError",
    "ObjectInfo",
    "ObjectNotFoundError",
    "SizeLimitedStream",
    "StaleAttachmentError",
    "StorageBackend",
    "StorageBinding",
    "StorageError",
    "StorageGarbageCollector",
    "StorageJournal",
    "StorageManager",
    "StoragePolicy",
    "StoredContentMixin",
    "StoredObjectReader",
    "StoredObjectRef",
    "StoredObjectRefType",
    "attachment",
    "bind_storage",
    "iter_model_storage_refs",
    "journal_tables",
    "portable_storage_ref_type",
]

_MODULES = {
    "Attachment": "orm",
    "AttachmentType": "orm",
    "ObjectInfo": "backends.base",
    "SizeLimitedStream": "streams",
    "StorageBackend": "backends.base",
    "StorageBinding": "orm",
    "StorageGarbageCollector": "gc",
    "StorageJournal": "orm",
    "StorageManager": "manager",
    "StoragePolicy": "policies",
    "StoredContentMixin": "orm",
    "StoredObjectReader": "readers",
    "StoredObjectRef": "refs",
    "StoredObjectRefType": "orm",
    "attachment": "orm",
    "bind_storage": "orm",
    "iter_model_storage_refs": "orm",
    "journal_tables": "orm",
    "portable_storage_ref_type": "orm",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'exceptions')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    # An imported submodule is an attribute of its package.
    return sorted({*__all__, *(name for name in globals() if f"{__name__}.{name}" in _loaded and not name.startswith("_"))})
