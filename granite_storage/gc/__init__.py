"""The garbage collector: it finds the objects that no row refers to, and deletes them on request."""

from granite_storage.gc.collection import (
    CollectedObject,
    CollectionRun,
    DanglingReference,
    GarbageCollectionReport,
    OrphanStatus,
    StorageGarbageCollector,
)

__all__ = [
    "CollectedObject",
    "CollectionRun",
    "DanglingReference",
    "GarbageCollectionReport",
    "OrphanStatus",
    "StorageGarbageCollector",
]
