"""What a pass of recovery tells of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

__all__ = ["FailedReclaim", "RecoveryReport"]


@dataclass(frozen=True, slots=True)
class FailedReclaim:
    """An object that could not be deleted.

    Attributes:
        backend: Its backend's key.
        location: Its address there.
        error: What went wrong the last time.
        attempts: How often it was tried.
        next_attempt: When it is tried again; None for a dead letter, which is not.
    """

    backend: str
    location: str
    error: str
    attempts: int
    next_attempt: datetime | None


@dataclass(slots=True)
class RecoveryReport:
    """What a pass of recovery did, and what it left for later.

    Attributes:
        claimed: How many intents and unfinished reclaims it took over.
        deleted: How many objects it deleted, or found to be gone already.
        kept: How many it kept because a row refers to them.
        confirmed: How many late looks at the place of a deleted upload ended its row.
        leased: How many uploads are still under their leases.
        waiting: How many deletes wait for their retention, or for a transaction under way.
        failed: What could not be deleted, each with its next attempt.
        unknown_backends: Backends that rows of the journal name and the manager does not have; nothing of theirs is touched.
    """

    claimed: int = 0
    deleted: int = 0
    kept: int = 0
    confirmed: int = 0
    leased: int = 0
    waiting: int = 0
    failed: list[FailedReclaim] = field(default_factory=list)
    unknown_backends: set[str] = field(default_factory=set)

    def add(self, other: RecoveryReport) -> None:
        """Take over what another pass did."""
        self.claimed += other.claimed
        self.deleted += other.deleted
        self.kept += other.kept
        self.confirmed += other.confirmed
        self.failed += other.failed
