"""Compares every reference with its object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias

from granite_storage._jobs import (
    MOST_KEPT,
    RowReport,
    RowRun,
    Rows,
    rate_limited,
    require_mounted,
    retry_unavailable,
)
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    BackendUnavailableError,
    ChecksumMismatchError,
    InvalidLocationError,
    InvalidReferenceError,
    ObjectNotFoundError,
    SizeMismatchError,
    StorageError,
    UnknownBackendError,
)
from granite_storage.orm.references import RowValue, RowValues
from granite_storage.readers import require_recorded_size
from granite_storage.refs import StoredObjectRef

if TYPE_CHECKING:
    from granite_storage.orm.binding import StorageBinding

__all__ = ["Finding", "Problem", "Verification", "VerificationReport", "verify"]

_CONCURRENCY = 16
_ATTEMPTS = 3

_Named: TypeAlias = "tuple[str | None, StoredObjectRef]"
"""A ref, and its name among the variants of another; None where it is that of the row."""


class Problem(StrEnum):
    """The kinds of findings about a reference."""

    MISSING = "missing"
    WRONG_SIZE = "wrong size"
    WRONG_CHECKSUM = "wrong checksum"
    UNDECODABLE = "undecodable"
    UNKNOWN_BACKEND = "unknown backend"
    DENIED = "permission denied"
    UNREADABLE = "unreadable"
    UNKNOWN_CHECKSUM = "unknown checksum"


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem of a reference, or something unknown about it.

    Attributes:
        problem: The kind of problem.
        table: The table's name, with its schema where it has one.
        primary_key: The row's primary key.
        column: The column's name.
        ref: The ref, where the column contains one; that of the variant where it is about one.
        message: What exactly was found.
        variant: The name of the variant that it is about; None where it is about the object of the row itself.
    """

    problem: Problem
    table: str
    primary_key: tuple[Any, ...]
    column: str
    ref: StoredObjectRef | None
    message: str
    variant: str | None = None

    @property
    def is_harmless(self) -> bool:
        """Whether the object may be intact: it is unknown what its checksum should be."""
        return self.problem is Problem.UNKNOWN_CHECKSUM

    @property
    def is_replaceable(self) -> bool:
        """Whether nothing is lost: the object is a variant, which can be made again from its original."""
        return self.variant is not None


@dataclass(slots=True)
class VerificationReport(RowReport):
    """The results of a verification; `rows`, `key` and `complete` are those of every job over rows.

    Attributes:
        checked: How many references were compared with their objects; those to variants are counted by themselves.
        bytes_read: How many bytes of objects were read; 0 where it is not deep.
        counts: The number of findings of each kind.
        replaceable: How many of the findings that are not harmless are about variants, which can be made again.
        findings: The first thousand of them.
    """

    checked: int = 0
    bytes_read: int = 0
    counts: Counter[Problem] = field(default_factory=Counter)
    replaceable: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def problems(self) -> int:
        """The number of findings that are not harmless."""
        return self.counts.total() - self.counts[Problem.UNKNOWN_CHECKSUM]


class Verification(RowRun[Finding, VerificationReport]):
    """The result of `verify`: iterate over it for the findings, or await it for the report."""

    def __init__(self, rows: Rows, storage_key: str | None, deep: bool) -> None:
        super().__init__(VerificationReport(), rows)
        self._manager = rows.binding.manager
        self._storage_key = storage_key
        self._deep = deep
        self._mounted: set[str] = set()

    def _record(self, item: Finding) -> None:
        report = self.report
        report.counts[item.problem] += 1
        report.replaceable += item.is_replaceable and not item.is_harmless
        if len(report.findings) < MOST_KEPT:
            report.findings.append(item)

    async def _process_row(self, row: RowValues) -> Sequence[Finding]:
        return [finding for held in row.values for finding in await self._verify_value(held)]

    def _named(self, held: RowValue) -> list[_Named]:
        """Return the refs of a value that have the storage key, by the names of their variants."""
        if held.ref is None:
            return []
        named: list[_Named] = [(None, held.ref), *(held.ref.variants or {}).items()]
        return [(name, ref) for name, ref in named if self._storage_key is None or ref.storage_key == self._storage_key]

    async def _verify_value(self, held: RowValue) -> list[Finding]:
        """Compare a value; where something is wrong, re-check the row, whose file may have been replaced meanwhile."""
        self.report.checked += len(self._named(held)) if held.ref is not None else 1
        for _ in range(_ATTEMPTS):
            findings = await self._compare_all(held)
            if all(finding.is_harmless for finding in findings):
                return findings
            found = await self._scan.read_again(held)
            if found is None:
                return []
            if found.raw == held.raw:
                return findings
            held = found
        return []  # it is replaced faster than it can be checked

    async def _compare_all(self, held: RowValue) -> list[Finding]:
        if held.ref is None:  # it may have the storage key
            return [_finding(Problem.UNDECODABLE, held, None, None, held.error)]
        compared = [await self._compare(held, name, ref) for name, ref in self._named(held)]
        return [finding for finding in compared if finding is not None]

    async def _compare(self, held: RowValue, name: str | None, ref: StoredObjectRef) -> Finding | None:
        try:
            await self._require_mounted(ref)
            await retry_unavailable(lambda: self._require_object(ref))
        except BackendUnavailableError:
            raise
        except StorageError as error:
            if isinstance(error, ObjectNotFoundError):
                # Its disk may have been unmounted since the last check.
                self._mounted.discard(ref.backend)
                await self._require_mounted(ref)
            return _finding(_problem(error), held, name, ref, error)
        if ref.checksum:
            return None
        return _finding(Problem.UNKNOWN_CHECKSUM, held, name, ref, "the ref has no checksum to compare with")

    async def _require_object(self, ref: StoredObjectRef) -> None:
        if not self._deep:
            require_recorded_size(ref, (await self._manager.stat(ref)).size)
            return
        async with self._manager.open(ref, verify=True) as reader, aclosing(rate_limited(reader, self._budget)) as chunks:
            async for chunk in chunks:
                self.report.bytes_read += len(chunk)

    async def _require_mounted(self, ref: StoredObjectRef) -> None:
        if ref.backend not in self._mounted:
            await require_mounted(ref.backend, self._manager.backend(ref.backend))
            self._mounted.add(ref.backend)


def verify(
    binding: StorageBinding,
    *,
    storage_key: str | None = None,
    deep: bool = False,
    concurrency: int = _CONCURRENCY,
    after: str | None = None,
    bytes_per_second: float | None = None,
    schemas: Collection[str] = (),
) -> Verification:
    """Compare every reference with its object, without changing rows or objects.

    Variants are checked like other objects. A finding about a variant names it, and says that it can be made again.

    Every attachment column and every plain column of refs is read, all rows of them, in the order of the primary keys: in the
    schema that the sessions lead to, and then in every other schema of the database that has the table, as those of tenants.
    What may have refs and cannot be read is in `report.unseen`, and then `report.complete` is false. A file that a writer
    replaces meanwhile is re-checked before it is reported. An unavailable backend ends the run with its error: an object that
    could not be checked, or may not be read, is never reported as missing.

    Args:
        binding: The result of `bind_storage(..., session_factory=...)`.
        storage_key: The policy of the references; None for all, including those of removed policies.
        deep: Whether to read all bytes and compare their checksums too, instead of the sizes only.
        concurrency: How many rows are checked at a time.
        after: The `report.key` of an earlier run, to continue after it.
        bytes_per_second: The most bytes that a deep run reads per second; None for no limit.
        schemas: The schemas, by their names in the database; empty for all. Tables in a schema that is named count as the
            application's own.

    Returns:
        A job: `async for finding in verify(...)` yields the findings as they occur, `await verify(...)` returns the report.

    Raises:
        UnknownPolicyError: There is no such policy.
        ConfigurationError: The binding has no sessions, a table has no primary key, or `after` is not a key of it; while it
            runs: a schema has none of the tables.
        BackendUnavailableError: While it runs: a backend is unavailable, or a local folder has no marker file.
    """
    if storage_key is not None:
        binding.manager.policy(storage_key)
    return Verification(Rows(binding, concurrency, after, bytes_per_second, schemas), storage_key, deep)


_PROBLEMS: Mapping[type[StorageError], Problem] = {
    ObjectNotFoundError: Problem.MISSING,
    SizeMismatchError: Problem.WRONG_SIZE,
    ChecksumMismatchError: Problem.WRONG_CHECKSUM,
    AccessDeniedError: Problem.DENIED,
    UnknownBackendError: Problem.UNKNOWN_BACKEND,
    InvalidLocationError: Problem.UNDECODABLE,
    InvalidReferenceError: Problem.UNDECODABLE,
    BackendError: Problem.UNREADABLE,  # any other one of its family, which therefore comes last
}


def _problem(error: StorageError) -> Problem:
    for kind, problem in _PROBLEMS.items():
        if isinstance(error, kind):
            return problem
    raise error


def _finding(problem: Problem, held: RowValue, name: str | None, ref: StoredObjectRef | None, message: object) -> Finding:
    said = str(message)
    if name is not None:
        said = f"the variant {name!r}: {said}"
        if problem is not Problem.UNKNOWN_CHECKSUM:
            said += "; nothing is lost, as it can be made again from its original"
    return Finding(problem, held.table_name, held.primary_key, held.column.name, ref, said, name)
