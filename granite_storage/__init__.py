"""Asyncio-native file storage: files that commit and roll back with your rows.

The names below are loaded when they are first used, so that importing the package costs next to nothing. Backends are imported
from their own modules (`granite_storage.backends.local`, `.memory`, `.s3`), because each may need packages of its own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from granite_storage.backends.base import ObjectInfo, StorageBackend
    from granite_storage.exceptions import (
        AccessDeniedError,
        BackendError,
        BackendUnavailableError,
        ChecksumMismatchError,
        CollectionRefusedError,
        ConfigurationError,
        ConsumedSourceError,
        ContentError,
        ContentTooLargeError,
        EmptyUploadError,
        InvalidLocationError,
        InvalidReferenceError,
        MissingDependencyError,
        ObjectExistsError,
        ObjectNotFoundError,
        SizeMismatchError,
        StaleAttachmentError,
        StorageError,
        StorageFullError,
        StreamTimeoutError,
        UnboundAttachmentError,
        UnknownBackendError,
        UnknownPolicyError,
    )
    from granite_storage.gc import (
        CollectedObject,
        CollectionRun,
        DanglingReference,
        GarbageCollectionReport,
        OrphanStatus,
        StorageGarbageCollector,
    )
    from granite_storage.manager import StorageManager
    from granite_storage.migration import MigratedObject, Migration, MigrationReport, MigrationStatus, migrate
    from granite_storage.orm import (
        Attachment,
        AttachmentType,
        FailedReclaim,
        JournalTables,
        RecoveryReport,
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
    from granite_storage.verification import Finding, Problem, Verification, VerificationReport, verify

__version__ = "0.1.0.dev0"

__all__ = [
    "AccessDeniedError",
    "Attachment",
    "AttachmentType",
    "BackendError",
    "BackendUnavailableError",
    "ChecksumMismatchError",
    "CollectedObject",
    "CollectionRefusedError",
    "CollectionRun",
    "ConfigurationError",
    "ConsumedSourceError",
    "ContentError",
    "ContentTooLargeError",
    "DanglingReference",
    "EmptyUploadError",
    "FailedReclaim",
    "Finding",
    "GarbageCollectionReport",
    "InvalidLocationError",
    "InvalidReferenceError",
    "JournalTables",
    "MigratedObject",
    "Migration",
    "MigrationReport",
    "MigrationStatus",
    "MissingDependencyError",
    "ObjectExistsError",
    "ObjectInfo",
    "ObjectNotFoundError",
    "OrphanStatus",
    "Problem",
    "RecoveryReport",
    "SizeLimitedStream",
    "SizeMismatchError",
    "StaleAttachmentError",
    "StorageBackend",
    "StorageBinding",
    "StorageError",
    "StorageFullError",
    "StorageGarbageCollector",
    "StorageJournal",
    "StorageManager",
    "StoragePolicy",
    "StoredContentMixin",
    "StoredObjectReader",
    "StoredObjectRef",
    "StoredObjectRefType",
    "StreamTimeoutError",
    "UnboundAttachmentError",
    "UnknownBackendError",
    "UnknownPolicyError",
    "Verification",
    "VerificationReport",
    "__version__",
    "attachment",
    "bind_storage",
    "iter_model_storage_refs",
    "journal_tables",
    "migrate",
    "portable_storage_ref_type",
    "verify",
]

_ROOMS = {
    "Attachment": "orm",
    "AttachmentType": "orm",
    "CollectedObject": "gc",
    "CollectionRun": "gc",
    "DanglingReference": "gc",
    "FailedReclaim": "orm",
    "OrphanStatus": "gc",
    "Finding": "verification",
    "GarbageCollectionReport": "gc",
    "JournalTables": "orm",
    "Migration": "migration",
    "MigrationReport": "migration",
    "MigratedObject": "migration",
    "ObjectInfo": "backends.base",
    "Problem": "verification",
    "RecoveryReport": "orm",
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
    "MigrationStatus": "migration",
    "Verification": "verification",
    "VerificationReport": "verification",
    "attachment": "orm",
    "bind_storage": "orm",
    "iter_model_storage_refs": "orm",
    "journal_tables": "orm",
    "migrate": "migration",
    "portable_storage_ref_type": "orm",
    "verify": "verification",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_ROOMS.get(name, 'exceptions')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
