"""Makes variants of existing files: those that are missing, those of changed recipes, or all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from granite_storage._jobs import (
    MOST_KEPT,
    RowReport,
    RowRun,
    Rows,
    ends_run,
    require_in_force,
    require_mounted,
    retry_unavailable,
)
from granite_storage.derived.base import require_choice
from granite_storage.exceptions import (
    ConfigurationError,
    DerivationRefusedError,
    InfectedObjectError,
    ObjectNotFoundError,
    ScanPendingError,
    StaleAttachmentError,
    StorageError,
)
from granite_storage.orm.columns import AttachmentType
from granite_storage.orm.references import RowValue, RowValues
from granite_storage.orm.uploads import on_original_opened
from granite_storage.orm.variants import Which, is_kept
from granite_storage.refs import StoredObjectRef

if TYPE_CHECKING:
    from granite_storage.orm.binding import StorageBinding

__all__ = [
    "Rederivation",
    "RederivationReport",
    "RederivationStatus",
    "RederivedVariant",
    "rederive",
    "require_columns",
    "require_names",
]

_CONCURRENCY = 4
_TRIES = 3


class RederivationStatus(StrEnum):
    """The outcome for a variant, or for an effect of a file.

    A variant is refused where its recipe can make none of the original, which is not a failure.
    """

    MADE = "made"
    DROPPED = "dropped"
    CALLED = "effect called"
    RECORDED = "left to the worker"
    HELD = "held for a scanner"
    CHANGED = "changed meanwhile"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class RederivedVariant:
    """A variant, or an effect, that a run has processed.

    Attributes:
        status: What became of it.
        table: The table's name, with its schema where it has one.
        primary_key: The row's primary key.
        column: The column's name.
        name: The name of the variant or of the effect; empty where the row's value cannot be read, so that none can be made.
        ref: The original; None where the column holds something that is not a ref.
        message: Why it was not made.
    """

    status: RederivationStatus
    table: str
    primary_key: tuple[Any, ...]
    column: str
    name: str
    ref: StoredObjectRef | None
    message: str = ""


@dataclass(slots=True)
class RederivationReport(RowReport):
    """The results of a run; `rows`, `key` and `complete` are those of every job over rows.

    Attributes:
        counts: How many variants and effects were processed, by what became of them.
        failures: The first thousand that failed.
        bytes_read: How many bytes the originals have that were opened to make variants, each counted once for each attempt, also
            for one that was refused or has failed.
    """

    counts: Counter[RederivationStatus] = field(default_factory=Counter)
    failures: list[RederivedVariant] = field(default_factory=list)
    bytes_read: int = 0

    @property
    def failed(self) -> int:
        """The number of failures."""
        return self.counts[RederivationStatus.FAILED]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is to be done for one value of a row: a variant to be made, one to be dropped, or an effect to be called."""

    kind: str
    name: str


class Rederivation(RowRun[RederivedVariant, RederivationReport]):
    """The result of `rederive`: iterate over it for what it processes, or await it for the report."""

    def __init__(self, rows: Rows, which: Which, columns: Collection[str], names: Collection[str], drop_undeclared: bool) -> None:
        super().__init__(RederivationReport(), rows)
        self._which: Which = which
        self._columns = frozenset(columns)
        self._names = frozenset(names)
        self._drop_undeclared = drop_undeclared
        self._is_of_all_schemas = not rows.schemas
        self._is_whole = rows.after is None and not rows.schemas
        self._effects: Mapping[str, Sequence[str]] = {}

    async def waiting(self) -> dict[tuple[str, str, str], int]:
        """Return the amount of pending work by column, variant or effect, and kind, without changing anything.

        The name of the variant is empty for the kind `unreadable value`: rows whose values are not refs.
        """
        await self._find_effects()
        found: Counter[tuple[str, str, str]] = Counter()
        async with aclosing(self._scan.rows(after=self.report.key)) as rows:
            async for row in rows:
                for held in row.values:
                    label = f"{held.table_name}.{held.column.name}"
                    found.update((label, wanted.name, wanted.kind) for wanted in self._wanted(held))
        self.report.unseen = list(self._scan.unseen)
        return dict(found)

    async def _items(self) -> AsyncGenerator[RederivedVariant, None]:
        await self._find_effects()
        async with aclosing(super()._items()) as items:
            async for item in items:
                yield item
        journal = self._binding.journal
        if journal is None or not self.report.complete:
            return
        if self._is_whole and self._effects:
            await (await journal.effect_jobs()).note_passes(self._effects)
        if self._drop_undeclared and self._is_of_all_schemas and not self._names and not self._columns:
            jobs = await journal.variant_jobs()
            for backend in journal.manager.backends:
                await jobs.end_idle(backend, undeclared=True)

    def _record(self, item: RederivedVariant) -> None:
        self.report.counts[item.status] += 1
        if item.status is RederivationStatus.FAILED and len(self.report.failures) < MOST_KEPT:
            self.report.failures.append(item)

    async def _find_effects(self) -> None:
        journal = self._binding.journal
        found = {} if journal is None else await (await journal.effect_jobs()).find_pending(self._which)
        self._effects = {
            column: chosen
            for column, names in found.items()
            if (chosen := [name for name in names if self._concerns(name)]) and (not self._columns or column in self._columns)
        }

    async def _process_row(self, row: RowValues) -> Sequence[RederivedVariant]:
        return [await self._process(held, wanted) for held in row.values for wanted in self._wanted(held)]

    def _wanted(self, held: RowValue) -> Iterator[_Wanted]:
        """Yield what is to be done for a value."""
        column_type = held.column.type
        if not isinstance(column_type, AttachmentType) or (self._columns and held.label not in self._columns):
            return
        if held.ref is None:
            if column_type.variants or held.label in self._effects:
                yield _Wanted("unreadable value", "")
            return
        for declared in column_type.variants.values():
            if not declared.is_for(held.ref):
                continue
            is_missing = declared.name not in (held.ref.variants or {})
            # One that is made when it is asked for is missing until then, and not by mistake.
            is_asked_for = declared.name in self._names if is_missing and declared.recipe.when == "request" else True
            if is_asked_for and self._concerns(declared.name) and not is_kept(held.ref, declared, self._which):
                yield _Wanted(
                    "missing" if is_missing else "other recipe" if not declared.is_in(held.ref) else "again", declared.name
                )
        for name in self._effects.get(held.label, ()):
            yield _Wanted("effect", name)
        if self._drop_undeclared:
            for name in held.ref.variants or {}:
                if name not in column_type.variants and self._concerns(name):
                    yield _Wanted("undeclared", name)

    def _concerns(self, name: str) -> bool:
        return not self._names or name in self._names

    async def _process(self, held: RowValue, wanted: _Wanted) -> RederivedVariant:
        """Do what is wanted for a value; where a writer has replaced the file, for the new one."""
        error: Exception | None = held.error
        for _ in range(_TRIES):
            if held.ref is None:
                return _processed(RederivationStatus.FAILED, held, wanted, held.error)
            if held.other_schema is not None and held.other_schema.doubt:
                return _processed(RederivationStatus.FAILED, held, wanted, held.other_schema.doubt)
            try:
                return await self._do(held, held.ref, wanted)
            except (ScanPendingError, InfectedObjectError) as problem:
                return _processed(RederivationStatus.HELD, held, wanted, problem)
            except (StorageError, SQLAlchemyError) as problem:
                if ends_run(problem):
                    raise
                error = problem
            found = await self._scan.read_again(held)
            if found is None or wanted not in self._wanted(found):
                return _processed(RederivationStatus.CHANGED, held, wanted, "a writer changed it first")
            is_same = found.ref is not None and found.ref.location == held.ref.location
            if is_same and not isinstance(error, StaleAttachmentError | SQLAlchemyError):
                if isinstance(error, ObjectNotFoundError):
                    await require_mounted(held.ref.backend, self._binding.manager.backend(held.ref.backend))
                is_refused = isinstance(error, DerivationRefusedError)
                return _processed(RederivationStatus.REFUSED if is_refused else RederivationStatus.FAILED, held, wanted, error)
            held = found
        return _processed(RederivationStatus.FAILED, held, wanted, error)

    async def _do(self, held: RowValue, ref: StoredObjectRef, wanted: _Wanted) -> RederivedVariant:
        column_type: AttachmentType = held.column.type  # type: ignore[assignment]  # nothing is wanted of other columns
        if wanted.kind == "undeclared":
            dropped = await self._binding.drop_variant(column_type, ref, wanted.name, options=held.options)
            return _processed(RederivationStatus.DROPPED if dropped else RederivationStatus.CHANGED, held, wanted)
        if wanted.kind == "effect" and self._binding.journal is not None:
            effects = await self._binding.journal.effect_jobs()
            called = await effects.call_now(column_type, ref, wanted.name)
            await self._budget.spend(ref.size)
            if called is None:
                return _processed(RederivationStatus.RECORDED, held, wanted, "another worker calls it")
            message = "" if called else "it is recorded, and a worker of the journal tries it again; its report has the error"
            return _processed(RederivationStatus.CALLED if called else RederivationStatus.FAILED, held, wanted, message)
        seen = (ref.variants or {}).get(wanted.name)
        now = await self._make(column_type, held, ref, wanted.name)
        made = (now.variants or {})[wanted.name]
        is_new = made.recipe == column_type.variants[wanted.name].digest and (seen is None or made.location != seen.location)
        return _processed(RederivationStatus.MADE if is_new else RederivationStatus.CHANGED, held, wanted)

    async def _make(self, column_type: AttachmentType, held: RowValue, ref: StoredObjectRef, name: str) -> StoredObjectRef:
        """Make a variant, and spend the bytes of the originals that were opened for it, also where its recipe fails."""
        opened: list[int] = []
        before = on_original_opened.set(opened.append)
        try:
            made = await retry_unavailable(
                lambda: self._binding.make_variant(column_type, ref, name, which=self._which, options=held.options)
            )
        except Exception:
            await self._spend(sum(opened))
            raise
        finally:
            on_original_opened.reset(before)
        await self._spend(sum(opened))
        return made

    async def _spend(self, size: int) -> None:
        self.report.bytes_read += size
        await self._budget.spend(size)


def rederive(
    binding: StorageBinding,
    *,
    which: Which = "missing",
    columns: Collection[str] = (),
    names: Collection[str] = (),
    drop_undeclared: bool = False,
    concurrency: int = _CONCURRENCY,
    after: str | None = None,
    bytes_per_second: float | None = None,
    schemas: Collection[str] = (),
) -> Rederivation:
    """Make the variants of existing files, while the application keeps reading and writing.

    Run it once every process declares a new variant or a changed recipe. Each variant is made, and set in its row, exactly as
    when it is requested: by compare-and-set on the file, so a writer that replaces the file meanwhile wins. A replaced variant
    is deleted like a replaced file: with a journal after its retention. At every moment each row shows variants of its own file
    that exist.

    Effects are called as if their files had just been added to the rows: those for which no run has covered all rows yet, with
    `"stale"` also those whose version has changed since, with `"all"` all. A run from the first row to the last is recorded,
    unless it was limited to some schemas or could not see all rows. A call that fails is recorded in the journal, whose worker
    tries it again.

    The rows are those of the schema that the sessions lead to, and then of every other schema of the database that has the
    table, as those of tenants. One whose refs do not say that they are of a store of this application is left unchanged, and
    what its rows lack is a failure, unless `schemas` names it. What cannot be read is in `report.unseen`, and then
    `report.complete` is false, and no pass is noted.

    It may be stopped, cancelled or killed at any time; another run does what is left.

    Args:
        binding: What `bind_storage(..., session_factory=...)` returned; it must be active.
        which: `"missing"`; `"stale"`: those of another recipe than the column declares now, too; or `"all"`. One that is made
            when it is asked for (`when="request"`) and is missing is made only where `names` contains it.
        columns: The columns of the files, as `table.column`; empty for all.
        names: The variants and effects; empty for all.
        drop_undeclared: Whether variants that their columns do not declare any more leave the rows, and are deleted.
        concurrency: How many rows are processed at a time.
        after: The `report.key` of an earlier run, to continue after it.
        bytes_per_second: The most bytes of originals that are read per second; None for no limit.
        schemas: The schemas, by their names in the database; empty for all. Tables in a schema that is named count as the
            application's own.

    Returns:
        A job: `async for item in rederive(...)` yields each variant as it is processed, `await rederive(...)` returns the report.

    Raises:
        ConfigurationError: No column declares what is asked for, the binding has no sessions or is not active, a table has no
            primary key, or `after` is not a key of it; while it runs: a schema has none of the tables.
        BackendUnavailableError: While it runs: a backend is unavailable, or a local folder has no marker file.
        StorageFullError: While it runs: a backend is full.
    """
    require_choice("which", which, Which)
    require_in_force(binding)
    require_columns(binding, columns)
    require_names(binding, names, drop_undeclared=drop_undeclared)
    rows = Rows(binding, concurrency, after, bytes_per_second, schemas)
    return Rederivation(rows, which, columns, names, drop_undeclared)


def require_columns(binding: StorageBinding, columns: Collection[str]) -> None:
    """Raise `ConfigurationError` unless each is an attachment column of a binding, as `table.column`."""
    known = sorted(f"{item.table.fullname}.{item.column.name}" for item in _attachment_types(binding))
    if unknown := sorted(set(columns).difference(known)):
        raise ConfigurationError(f"{unknown[0]!r} is not an attachment column (there are: {', '.join(known) or 'none'})")


def require_names(binding: StorageBinding, names: Collection[str], *, drop_undeclared: bool) -> None:
    """Raise `ConfigurationError` for variants and effects that no column declares, unless such are to be dropped."""
    declared = sorted({name for item in _attachment_types(binding) for name in (*item.variants, *item.effects)})
    if (unknown := sorted(set(names).difference(declared))) and not drop_undeclared:
        raise ConfigurationError(
            f"no column declares a variant or an effect {unknown[0]!r} (there are: {', '.join(declared) or 'none'})"
        )


def _attachment_types(binding: StorageBinding) -> list[AttachmentType]:
    return [column.type for column in binding.ref_columns() if isinstance(column.type, AttachmentType)]


def _processed(status: RederivationStatus, held: RowValue, wanted: _Wanted, message: object = "") -> RederivedVariant:
    return RederivedVariant(status, held.table_name, held.primary_key, held.column.name, wanted.name, held.ref, str(message))
