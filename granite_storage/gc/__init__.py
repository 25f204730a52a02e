"""The garbage collector: it finds the objects that no row refers to, and deletes them on request."""

from granite_storage.gc.collection import CollectionRun
from granite_storage.gc.collector import StorageGarbageCollector
from granite_storage.gc.report import CollectedObject, DanglingReference, GarbageCollectionReport, OrphanStatus

__all__ = [
    "CollectedObject",
    "CollectionRun",
    "DanglingReference",
    "GarbageCollectionReport",
    "OrphanStatus",
    "StorageGarbageCollector",
]
