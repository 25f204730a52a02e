"""The report of a collection."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["CollectedObject", "DanglingReference", "GarbageCollectionReport", "OrphanStatus"]


class OrphanStatus(StrEnum):
    """What became of an orphan."""

    ORPHANED = "orphan"
    DELETED = "deleted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class CollectedObject:
    """An object that a collection has found to be an orphan.

    Attributes:
        status: What became of it.
        backend: Its backend's key.
        location: Its address there.
        size: Its size in bytes.
        error: Why it could not be deleted.
    """

    status: OrphanStatus
    backend: str
    location: str
    size: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class DanglingReference:
    """A reference to an object that is missing.

    Attributes:
        backend: The backend's key.
        location: Where the object should be.
        message: What was found there.
    """

    backend: str
    location: str
    message: str


@dataclass(slots=True)
class GarbageCollectionReport:
    """What a collection has found and done, in objects and in bytes.

    Every object scanned is referenced, unmanaged, within the grace period, mentioned, referenced on the re-check, or an orphan.

    Attributes:
        storage_key: The policy whose objects were collected.
        backend: The backend that they are on.
        dry_run: Whether the run deletes nothing.
        scanned: How many objects were listed.
        scanned_bytes: Their bytes.
        referenced: How many of them are referenced.
        referenced_bytes: Their bytes.
        unmanaged: How many are unreferenced and have a name that this library does not generate; they are never touched.
        unmanaged_bytes: Their bytes.
        within_grace_period: How many are unreferenced and not older than the grace period.
        within_grace_period_bytes: Their bytes.
        mentioned: How many are unreferenced, but have their generated id in a column that is not one of refs: in JSON at any
            depth, in text, or in bytes. They are never deleted.
        mentioned_bytes: Their bytes.
        mentions: How many of them each column mentions, by its schema, table and name; the first thousand columns.
        unseen: The first thousand columns that may mention objects and could not be searched, or not in every row: those that
            this role may not read, those of other servers, those whose rows row-level security may hide, and those of a type
            that the collector does not know. They keep nothing.
        referenced_on_recheck: How many nothing referred to at first, but the re-check right before deleting found a row or an
            entry of the journal that does.
        referenced_on_recheck_bytes: Their bytes.
        orphaned: How many are orphans.
        orphaned_bytes: Their bytes.
        deleted: How many of them were deleted.
        deleted_bytes: Their bytes.
        failed: How many could not be deleted; each is logged, and a later run tries it again.
        failures: The first thousand of those.
        unfinished: How many stale temporary files and multipart uploads were removed, on the whole backend.
        unfinished_error: Why those could not be removed.
        dangling: The first thousand references found whose objects are missing; `verify` finds all.
        refusal: Why a run that is not dry would delete nothing; None where it would go ahead.
        complete: Whether the run has ended.
    """

    storage_key: str
    backend: str
    dry_run: bool
    scanned: int = 0
    scanned_bytes: int = 0
    referenced: int = 0
    referenced_bytes: int = 0
    unmanaged: int = 0
    unmanaged_bytes: int = 0
    within_grace_period: int = 0
    within_grace_period_bytes: int = 0
    mentioned: int = 0
    mentioned_bytes: int = 0
    mentions: dict[str, int] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)
    referenced_on_recheck: int = 0
    referenced_on_recheck_bytes: int = 0
    orphaned: int = 0
    orphaned_bytes: int = 0
    deleted: int = 0
    deleted_bytes: int = 0
    failed: int = 0
    failures: list[CollectedObject] = field(default_factory=list)
    unfinished: int = 0
    unfinished_error: str | None = None
    dangling: list[DanglingReference] = field(default_factory=list)
    refusal: str | None = None
    complete: bool = False

    @property
    def share(self) -> float:
        """Which part of the scanned objects are orphans, from 0 to 1."""
        return self.orphaned / self.scanned if self.scanned else 0.0
