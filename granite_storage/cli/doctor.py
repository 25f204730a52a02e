"""`doctor`: checks of the configuration, the database, the journal and the backends."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from itertools import combinations
from typing import Any

import click
from rich.text import Text
from sqlalchemy import Connection, inspect, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from granite_storage._engine import describe_mismatch, identities_of, may_overlap
from granite_storage._jobs import require_mounted
from granite_storage._tasks import shielded_cleanup
from granite_storage._words import count_of, describe_duration
from granite_storage.backends.base import StorageBackend
from granite_storage.cli.output import escape_text
from granite_storage.cli.runtime import JSON, CommandContext, Exit, command, in_options
from granite_storage.exceptions import BackendUnavailableError, CollectionRefusedError, StorageError
from granite_storage.gc import StorageGarbageCollector
from granite_storage.gc.database import ILLEGIBLE, DatabaseReferences
from granite_storage.locations import make_location
from granite_storage.manager import StorageManager
from granite_storage.orm._interfaces import are_triggers_declared, tables_of
from granite_storage.orm.binding import StorageBinding
from granite_storage.orm.columns import AttachmentType
from granite_storage.orm.journal.tables import clock

_TIMEOUT = 20.0
_SKEW = 5.0
_CONTENT = b"granite-storage doctor"


class CheckResult(Enum):
    """How a check ended."""

    GOOD = ("ok", "green")
    NOTE = ("note", "yellow")
    BAD = ("bad", "red")


@dataclass(frozen=True, slots=True)
class Check:
    """What was checked, and what was found."""

    result: CheckResult
    what: str
    message: str


@command("doctor")
@click.option("--read-only", is_flag=True, help="Write no probe object.")
@JSON
async def doctor_command(context: CommandContext, read_only: bool) -> Exit | None:
    """Check the set-up.

    It checks the configuration, the database with its tables, what its rows refer to, the journal and the backends.

    On each backend that a policy writes to, it stores, reads, lists and deletes a small object, unless --read-only is given. The
    exit code is 1 where something is bad; a note may be as you want it.
    """
    checks = [check async for check in _run_checks(context.binding, read_only=read_only)]
    if context.output.as_json:
        for check in checks:
            context.output.record({"result": check.result.value[0], "what": check.what, "message": check.message})
    else:
        rows = [
            (Text(check.result.value[0], style=check.result.value[1]), check.what, escape_text(check.message)) for check in checks
        ]
        context.output.table(["", "what", "found"], rows)
    return Exit.FOUND if any(check.result is CheckResult.BAD for check in checks) else None


async def _run_checks(binding: StorageBinding, *, read_only: bool) -> AsyncIterator[Check]:
    for check in _check_configuration(binding):
        yield check
    async for check in _check_database(binding):
        yield check
    referenced: set[str] = set()
    checks = await _check_references(binding, referenced)
    for check in checks:
        yield check
    if all(check.result is CheckResult.GOOD for check in checks):
        async for check in _check_collections(binding):
            yield check
    async for check in _check_journal(binding):
        yield check
    for key, backend in binding.manager.backends.items():
        prefixes = [policy.key_prefix for policy in binding.manager.policies.values() if policy.backend_key == key]
        if key in referenced and (unmounted := await _check_mounted(key, backend)) is not None:
            yield unmounted  # a probe would make the marker, which says that the disk is mounted
            continue
        async for check in _check_backend(key, backend, None if read_only or not prefixes else prefixes[0] or ""):
            yield check


def _check_configuration(binding: StorageBinding) -> list[Check]:
    columns = binding.ref_columns()
    managed = [column.type for column in columns if isinstance(column.type, AttachmentType)]
    checks = [Check(CheckResult.NOTE, "models", "no model has a column of refs: check that every model is imported")]
    if columns:
        said = f"{count_of(len(managed), 'attachment column')}, {count_of(len(columns) - len(managed), 'plain column')} of refs"
        checks = [Check(CheckResult.GOOD, "models", said)]
    for column_type in managed:
        try:
            column_type.manager_in(binding)
        except StorageError as error:
            checks.append(Check(CheckResult.BAD, f"column {column_type.label}", str(error)))
    unused = sorted(set(binding.manager.policies) - {column_type.storage_key for column_type in managed})
    if unused:
        checks.append(Check(CheckResult.NOTE, "policies", f"no attachment column uses {', '.join(unused)}"))
    return checks


async def _check_database(binding: StorageBinding) -> AsyncIterator[Check]:
    if (sessions := binding.own_sessions) is None:
        yield Check(CheckResult.BAD, "database", "the binding has no sessions: pass session_factory= to bind_storage()")
        return
    begun = time.monotonic()
    try:
        async with asyncio.timeout(_TIMEOUT), sessions() as session:
            table = next((column.table for column in binding.ref_columns()), None)
            connection = await session.connection(bind_arguments={} if table is None else {"clause": table})
            await connection.execute(text("SELECT 1"))
            name = connection.dialect.name
            yield Check(CheckResult.GOOD, "database", f"{name} answers within {time.monotonic() - begun:.2f} s")
            if name == "sqlite":
                async for check in _check_sqlite(connection):
                    yield check
            else:
                now = (await connection.execute(select(clock()))).scalar_one()
                yield _check_clock("the database's clock", now)
            yield await connection.run_sync(_check_tables, binding)
    except (SQLAlchemyError, OSError, TimeoutError) as error:
        yield Check(CheckResult.BAD, "database", f"{type(error).__name__}: {_first_line(error)}")


async def _check_references(binding: StorageBinding, referenced: set[str]) -> list[Check]:
    """Check for rows that lead to another store than before, and for what would stop the garbage collector.

    Args:
        binding: The binding.
        referenced: Gets the keys of the backends that rows refer to.
    """
    manager = binding.manager
    if (sessions := binding.own_sessions) is None or not manager.backends or not binding.ref_columns():
        return []
    checks: list[Check] = []
    refusals: dict[str, CheckResult] = {}
    misled: list[Check | None] = []
    counted: Counter[tuple[str, str | None]] = Counter()
    collected = dict.fromkeys(policy.backend_key for policy in manager.policies.values())
    try:
        async with asyncio.timeout(_TIMEOUT):
            # By backend: each has its identities, and its own bases whose rows may refer to its objects.
            for number, backend_key in enumerate(collected or list(manager.backends)[:1]):
                source = DatabaseReferences(binding, sessions, backend_key)
                try:
                    await source.require_fit(allow_restored_database=False)
                except CollectionRefusedError as error:
                    refusals.setdefault(str(error), CheckResult.NOTE)
                if number == 0:
                    counted = await source.count_by_store()
                    referenced.update(key for key, _ in counted)
                    misled = [await _check_store(binding, *store, number) for store, number in sorted(counted.items(), key=str)]
                for kind, refusal in await source.find_refusals():
                    # The others are counted above, of this base; rows of another one may have them alone.
                    if kind == ILLEGIBLE or not any(misled):
                        refusals.setdefault(refusal, CheckResult.BAD)
            said = ((result, in_options(f"would be refused: {refusal}")) for refusal, result in refusals.items())
            checks += [Check(result, "garbage collection", message) for result, message in said]
            checks += [check for check in misled if check is not None] + await _find_overlaps(manager)
        if not checks:
            total = counted.total()
            led = "reference leads to the store that it was", "references lead to the store that they were"
            said_of_all = f"{count_of(total, *led)} written to" if total else "no row has any yet"
            checks.append(Check(CheckResult.GOOD, "references", said_of_all))
    except TimeoutError:
        checks.append(Check(CheckResult.NOTE, "references", f"could not be counted within {_TIMEOUT:.0f} s"))
    except (StorageError, SQLAlchemyError, OSError) as error:
        checks.append(Check(CheckResult.BAD, "references", f"{type(error).__name__}: {_first_line(error)}"))
    return checks


async def _check_collections(binding: StorageBinding) -> AsyncIterator[Check]:
    """Say what a collection of each policy would be refused for once it compares the references with the objects."""
    collector = StorageGarbageCollector(binding.manager, binding=binding)
    checks: dict[Check, list[str]] = {}
    try:
        async with asyncio.timeout(_TIMEOUT):
            for storage_key in sorted(binding.manager.policies):
                if (check := await _check_collection(collector, storage_key)) is not None:
                    checks.setdefault(check, []).append(storage_key)
        if not checks:
            checks[Check(CheckResult.GOOD, "garbage collection", "a dry run with the defaults is not refused")] = []
    except TimeoutError:
        said = f"a dry run took longer than {_TIMEOUT:.0f} s: granite-storage gc --dry-run shows what would be refused"
        checks[Check(CheckResult.NOTE, "garbage collection", said)] = []
    for check, storage_keys in checks.items():
        of = f" (of {', '.join(storage_keys)})" if storage_keys else ""
        yield Check(check.result, check.what, f"{check.message}{of}")


async def _check_collection(collector: StorageGarbageCollector, storage_key: str) -> Check | None:
    what = "garbage collection"
    try:
        report = await collector.collect(storage_key=storage_key)
    except CollectionRefusedError as error:
        return Check(CheckResult.NOTE, what, in_options(f"would be refused: {error}"))
    except (StorageError, SQLAlchemyError, OSError) as error:
        return Check(CheckResult.BAD, what, f"would fail: {type(error).__name__}: {_first_line(error)}")
    return None if report.refusal is None else Check(CheckResult.NOTE, what, in_options(f"would be refused: {report.refusal}"))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else "no answer"


async def _check_store(binding: StorageBinding, backend_key: str, identity: str | None, number: int) -> Check | None:
    backend = binding.manager.backends.get(backend_key)
    if backend is None:
        known = ", ".join(sorted(binding.manager.backends))
        names = count_of(number, "reference names", "references name")
        said = f"{names} the backend {backend_key!r}, which the manager does not have (there are: {known})"
        return Check(CheckResult.BAD, "references", said)
    identities = None if identity is None else await identities_of(backend)
    if identities is None or identity is None or identity in identities:
        return None
    mismatch = describe_mismatch(backend_key, identity, next(iter(identities), None))
    leads = count_of(number, "reference leads", "references lead")
    return Check(CheckResult.BAD, "references", f"{leads} to another store than before: {mismatch}")


async def _find_overlaps(manager: StorageManager) -> list[Check]:
    pairs = combinations(sorted(manager.backends), 2)
    overlapping = [pair for pair in pairs if await may_overlap(manager.backends[pair[0]], manager.backends[pair[1]])]
    said = "lead to the same objects: give the manager one backend for each store"
    return [Check(CheckResult.BAD, "backends", f"{one!r} and {other!r} {said}") for one, other in overlapping]


async def _check_sqlite(connection: AsyncConnection) -> AsyncIterator[Check]:
    driver: Any = (await connection.get_raw_connection()).driver_connection
    if driver.in_transaction:
        yield Check(CheckResult.GOOD, "SQLite transactions", "SQLAlchemy begins them itself, so reads and savepoints are in them")
    else:
        yield Check(
            CheckResult.NOTE,
            "SQLite transactions",
            "the driver begins none before the first write, so reads are outside of them; savepoints still work."
            " SQLAlchemy's BEGIN recipe changes that",
        )
    if not (await connection.execute(text("PRAGMA foreign_keys"))).scalar_one():
        yield Check(CheckResult.NOTE, "SQLite foreign keys", "not enforced: ON DELETE CASCADE deletes nothing")


def _check_tables(connection: Connection, binding: StorageBinding) -> Check:
    inspector = inspect(connection)
    journal = tables_of(binding.metadata) if binding.journal is not None else None
    tables = dict.fromkeys([*(column.table for column in binding.ref_columns()), *(() if journal is None else journal.all)])
    missing = [table.fullname for table in tables if not inspector.has_table(table.name, schema=table.schema)]
    lacking = [
        f"{column.table.fullname}.{column.name}"
        for column in binding.ref_columns()
        if column.table.fullname not in missing
        and column.name not in {found["name"] for found in inspector.get_columns(column.table.name, schema=column.table.schema)}
    ]
    if missing or lacking:
        return Check(CheckResult.BAD, "tables", f"missing: {', '.join([*missing, *lacking])}: create them, or run the migrations")
    return Check(CheckResult.GOOD, "tables", count_of(len(tables), "table exists", "tables exist"))


async def _check_journal(binding: StorageBinding) -> AsyncIterator[Check]:
    if binding.journal is None:
        yield Check(CheckResult.NOTE, "journal", "none: only the garbage collector deletes what a crash leaves behind")
        return
    try:
        async with asyncio.timeout(_TIMEOUT):
            await binding.journal.check()
            report = await binding.journal.count_jobs()
            problems = await binding.journal.find_trigger_problems()
        lease = describe_duration(binding.journal.lease)
        yield Check(CheckResult.GOOD, "journal", f"the database meets the journal's requirements; a lease lasts {lease}")
        for problem in problems:
            yield Check(CheckResult.BAD, "triggers", problem)
        if are_triggers_declared(binding.metadata) and not problems:
            yield Check(CheckResult.GOOD, "triggers", "every table with files has them")
        said: list[str] = []
        if report.held:
            said.append(f"{count_of(report.held, 'object is', 'objects are')} held until scanned")
        if report.failed:
            said.append(f"{count_of(len(report.failed), 'job has', 'jobs have')} failed for good")
        if report.underivable:
            said.append(f"{count_of(report.underivable, 'variant')} cannot be made: the recipes refuse the originals")
        if said:
            yield Check(CheckResult.BAD if report.failed else CheckResult.NOTE, "jobs", "; ".join(said))
    except (StorageError, SQLAlchemyError, OSError, TimeoutError) as error:
        yield Check(CheckResult.BAD, "journal", in_options(f"{type(error).__name__}: {error}"))


async def _check_backend(key: str, backend: StorageBackend, prefix: str | None) -> AsyncIterator[Check]:
    """Check a backend; with a prefix to write below, also that it stores, lists and deletes."""
    what = f"backend {key}"
    begun = time.monotonic()
    location = make_location(
        key_prefix=prefix or None, model_name="granite", entity_id="doctor", field_name="probe", original_filename="probe.txt"
    )
    doing = "looking for an object"
    try:
        async with asyncio.timeout(_TIMEOUT):
            await backend.exists(location)
            if prefix is None:
                yield await _check_unwritten(what, key, backend, begun)
                return
            try:
                doing = "storing a probe"
                await backend.put_bytes(location, _CONTENT, content_type="text/plain")
                doing = "reading the probe"
                modified = (await backend.stat(location)).modified
                async with aclosing(await backend.open(location)) as reader:
                    content = await reader.read()
                doing = "listing the probe"
                listed = [info.location async for info in backend.iter_objects(location)]
            finally:
                if doing != "looking for an object":
                    await shielded_cleanup(backend.delete(location), f"deleting the probe {location!r}")
            doing = "deleting the probe"
            gone = not await backend.exists(location)
    except (StorageError, OSError, TimeoutError) as error:
        yield Check(CheckResult.BAD, what, f"{doing} failed: {type(error).__name__}: {error}")
        return
    if content != _CONTENT or listed != [location] or not gone:
        yield Check(CheckResult.BAD, what, "the probe was not read, listed or deleted correctly")
        return
    yield Check(CheckResult.GOOD, what, f"stores, reads, lists and deletes ({time.monotonic() - begun:.2f} s)")
    yield _check_clock(f"clock of {key}", modified)


async def _check_mounted(key: str, backend: StorageBackend) -> Check | None:
    """Return what is wrong with a backend that rows refer to, and whose folder has no marker."""
    try:
        await require_mounted(key, backend)
    except BackendUnavailableError as error:
        return Check(CheckResult.BAD, f"backend {key}", f"rows refer to it, and {error}")
    except (StorageError, OSError):
        return None  # the check of the backend says more
    return None


async def _check_unwritten(what: str, key: str, backend: StorageBackend, begun: float) -> Check:
    try:
        await require_mounted(key, backend)
    except BackendUnavailableError:
        return Check(
            CheckResult.NOTE, what, "its folder has no marker file: nothing was written to it yet, or its disk is not mounted"
        )
    return Check(CheckResult.GOOD, what, f"answers within {time.monotonic() - begun:.2f} s; nothing was written")


def _check_clock(what: str, then: datetime) -> Check:
    aware = then if then.tzinfo is not None else then.replace(tzinfo=UTC)
    seconds = (datetime.now(UTC) - aware).total_seconds()
    if abs(seconds) <= _SKEW:
        return Check(CheckResult.GOOD, what, f"agrees with this machine's within {_SKEW:.0f} s")
    return Check(CheckResult.NOTE, what, f"is {abs(seconds):.0f} s {'behind' if seconds > 0 else 'ahead of'} this machine's")
