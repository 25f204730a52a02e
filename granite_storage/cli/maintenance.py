"""The commands that maintain all objects: `verify`, `recover`, `gc`, `migrate` and `derive`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click
from sqlalchemy import case, func, literal, select

from granite_storage._documentation import Page
from granite_storage._jobs import RowReport
from granite_storage._words import count_of
from granite_storage.cli.output import format_size, option_after
from granite_storage.cli.runtime import (
    DRY_RUN,
    JSON,
    YES,
    CommandContext,
    Duration,
    Exit,
    Settings,
    in_options,
    of_a_job,
    require_rows,
    run,
    usage_of,
)
from granite_storage.exceptions import CollectionRefusedError, ConfigurationError
from granite_storage.gc import CollectedObject, CollectionRun, GarbageCollectionReport, OrphanStatus, StorageGarbageCollector
from granite_storage.migration import MigratedObject, Migration, MigrationStatus, migrate
from granite_storage.orm.journal.jobs import EFFECT, SCAN, VARIANT
from granite_storage.orm.journal.journal import StorageJournal
from granite_storage.orm.journal.tables import DELETE, STAGING, UPLOAD, FailedReclaim, RecoveryReport, clock
from granite_storage.orm.variants import Which
from granite_storage.rederivation import (
    Rederivation,
    RederivationStatus,
    RederivedVariant,
    rederive,
    require_columns,
    require_names,
)
from granite_storage.verification import Finding, Verification, verify

if TYPE_CHECKING:
    from sqlalchemy import Table
    from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["derive_command", "gc_command", "migrate_command", "recover_command", "verify_command"]

_MOST_SHOWN = 20
_STATES = ("due", "later", "dead")
_WORK = {UPLOAD: "upload to check", STAGING: "direct upload to check", DELETE: "delete", SCAN: "scan"}
_ALWAYS_SHOWN = ("scanned", "referenced", "orphaned")


def _show_row(
    context: CommandContext,
    key: str,
    said: str,
    item: Finding | MigratedObject | RederivedVariant,
    style: str,
    *,
    column: str,
    **more: object,
) -> None:
    """Show what became of a value of a row."""
    if context.output.as_json:
        where = {"table": item.table, "primary_key": item.primary_key, "column": item.column}
        context.output.record({key: said, **where, **more, "message": item.message})
        return
    row = ", ".join(map(str, item.primary_key))
    context.output.line(f"{said}: {item.table} {row} {column}: {item.message}", style)


def _show_waiting(
    context: CommandContext, records: Sequence[Mapping[str, Any]], headers: Sequence[str], rows: Sequence[Any], nothing: str
) -> None:
    """Show what there is to do."""
    if context.output.as_json:
        context.output.record({"waiting": records})
    elif rows:
        context.output.table(headers, rows)
    else:
        context.output.line(nothing)


def _show_unseen(context: CommandContext, report: RowReport) -> None:
    """Show what could not be read, which a report of JSON has anyway."""
    if not context.output.as_json:
        for said in report.unseen:
            context.output.line(f"not seen: {in_options(said)}", "red")


def _require_policy(context: CommandContext, storage_key: str | None) -> None:
    """Refuse a --storage-key that no policy has."""
    if storage_key is not None:
        with usage_of("--storage-key"):
            context.binding.manager.policy(storage_key)


# verify


@click.command("verify")
@click.option("--storage-key", metavar="KEY", help="Only the references of this policy.")
@click.option("--deep", is_flag=True, help="Read all bytes and compare their checksums.")
@of_a_job
@JSON
@click.pass_obj
def verify_command(
    settings: Settings,
    storage_key: str | None,
    deep: bool,
    job: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Compare every reference with its object.

    Nothing is changed. The exit code is 1 where something is wrong; an unknown checksum is reported, and is not wrong.
    """

    async def work(context: CommandContext) -> Exit | None:
        _require_policy(context, storage_key)
        await require_rows(context.binding, job)
        verification = verify(context.binding, storage_key=storage_key, deep=deep, **job)
        try:
            await _verify(context, verification)
        finally:
            _show_verification(context, verification)
        return Exit.FOUND if verification.report.problems or verification.report.unseen else None

    run(settings, work, as_json=as_json)


async def _verify(context: CommandContext, verification: Verification) -> None:
    report = verification.report
    total = await verification.count()
    with context.stoppable(verification.stop), context.output.progress("verifying", total) as bar:
        async for item in verification.on_progress(lambda: bar.reach(report.rows, report.bytes_read)):
            style = "yellow" if item.is_harmless or item.is_replaceable else "red"
            more = {"variant": item.variant, "ref": None if item.ref is None else item.ref.to_dict()}
            _show_row(context, "finding", item.problem.value, item, style, column=item.column, **more)


def _show_verification(context: CommandContext, verification: Verification) -> None:
    report = verification.report
    if context.output.as_json:
        counts = {problem.value: number for problem, number in report.counts.items()}
        known: dict[str, Any] = {"rows": report.rows, "checked": report.checked, "bytes_read": report.bytes_read}
        known["replaceable"] = report.replaceable
        known |= {"counts": counts, "key": report.key, "complete": report.complete, "unseen": report.unseen}
        context.output.record({"report": known})
    else:
        facts = {"references checked": f"{report.checked:,}", "problems": f"{report.problems:,}"}
        facts |= {f"  {problem.value}": f"{number:,}" for problem, number in sorted(report.counts.items())}
        if report.replaceable:
            facts["of variants, which can be made again"] = f"{report.replaceable:,}"
        if report.bytes_read:
            facts["bytes read"] = format_size(report.bytes_read)
        context.output.facts(facts)
        _show_unseen(context, report)
    if not verification.has_ended and report.key is not None:
        context.output.note(f"not complete; to continue, pass {option_after(report.key)}")


# recover


@click.command("recover")
@click.option("--retry-dead-letters", is_flag=True, help="Retry dead letters.")
@YES
@DRY_RUN
@JSON
@click.pass_obj
def recover_command(settings: Settings, retry_dead_letters: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Let the journal do everything that is due.

    It deletes uploads that no transaction has kept, and objects that rows have released; it has held files scanned, makes
    variants and calls effects. Without --yes it shows what is due now and later, and asks where something is due now.

    The exit code is 1 while something has failed. A file of which a recipe can make no variant is no failure: the run that finds
    it says so, and no later one does.
    """

    async def work(context: CommandContext) -> Exit | None:
        journal = context.binding.journal
        if journal is None:
            raise ConfigurationError(
                "the application has no journal: pass journal=StorageJournal(engine) to bind_storage()", see=Page.JOURNAL
            )
        if dry_run or not yes:
            plan = await _show_due(context, journal)
            is_idle = not any(item["due"] or (retry_dead_letters and item["dead"]) for item in plan)
            if is_idle and plan:
                context.output.note("nothing is due now")
            if dry_run or is_idle or not context.confirm("Do what is due now?", yes=False):
                return None
        if retry_dead_letters:
            retried = count_of(await journal.retry_dead_letters(), "dead letter")
            context.output.note(f"{retried} will be retried")
        report = await journal.recover()
        _show_recovery(context, report)
        return Exit.FOUND if report.failed or report.unknown_backends else None

    run(settings, work, as_json=as_json)


async def _show_due(context: CommandContext, journal: StorageJournal) -> list[dict[str, Any]]:
    """Show, and return, what the journal has to do, by backend and kind of work."""
    await journal.check()
    sessions = context.binding.own_sessions
    if sessions is None:
        raise ConfigurationError("the binding has no sessions: pass session_factory= to bind_storage()", see=Page.BINDING)
    tables = journal.tables
    async with sessions() as session:
        connection = await session.connection(bind_arguments={"clause": tables.intent})
        counted = await _count_due(connection, [tables.intent, tables.reclaim, tables.job], journal.execution_options)
    if journal.sidecar is not None:
        beside = journal.sidecar.tables
        async with journal.sidecar.looking() as (_, connection):
            counted += await _count_due(connection, [beside.intent, beside.reclaim], {})
    plan = [
        {"backend": backend, "work": work, **{state: counted[backend, work, state] for state in _STATES}}
        for backend, work in sorted({(backend, work) for backend, work, _ in counted})
    ]
    headers = ["backend", "work", "due now", "later", "dead letters"]
    _show_waiting(context, plan, headers, [list(row.values()) for row in plan], "nothing is waiting")
    return plan


async def _count_due(
    connection: AsyncConnection, tables: Sequence[Table], options: Mapping[str, Any]
) -> Counter[tuple[str, str, str]]:
    """Count the rows of tables by backend, work, and whether they are due, due later, or dead letters."""
    counted: Counter[tuple[str, str, str]] = Counter()
    for table in tables:
        is_due = case((table.c.due <= clock(), 1), else_=0)
        is_dead = case((table.c.dead, 1), else_=0) if "dead" in table.c else literal(0)
        is_late = case((table.c.emptied, 1), else_=0) if "emptied" in table.c else literal(0)
        kind = table.c.key if "key" in table.c else table.c.kind
        # Grouped by what they are called: PostgreSQL takes equal parameters for different ones.
        found = select(table.c.backend, kind.label("kind"), is_late.label("late"), is_dead.label("dead"), is_due.label("due"))
        rows = found.subquery("found")
        statement = select(*rows.c, func.count()).group_by(*rows.c)
        for row in await connection.execute(statement, execution_options=dict(options)):
            backend, name, late, dead, due, number = tuple(row)
            state = "dead" if dead else "due" if due else "later"
            counted[backend, "upload to check again" if late else _describe_work(name), state] += number
    return counted


def _describe_work(kind: str) -> str:
    if kind in _WORK:
        return _WORK[kind]
    what = "variant" if kind.startswith(VARIANT) else "effect"
    return f"{what} {kind.removeprefix(VARIANT).removeprefix(EFFECT)}"


def _show_recovery(context: CommandContext, report: RecoveryReport) -> None:
    failed, refused = ([_describe_failure(item) for item in items] for items in (report.failed, report.refused))
    counts = {name: number for name, number in asdict(report).items() if isinstance(number, int)}
    if context.output.as_json:
        unknown = sorted(report.unknown_backends)
        context.output.record({"report": {**counts, "failed": failed, "refused": refused, "unknown_backends": unknown}})
        return
    facts: dict[str, object] = {name.replace("_", " "): f"{number:,}" for name, number in counts.items()}
    if report.unknown_backends:
        facts["unknown backends"] = ", ".join(sorted(report.unknown_backends))
    context.output.facts({**facts, "failed": len(failed)})
    for item in failed:
        later = "a dead letter" if item["next"] is None else f"again at {item['next']:%Y-%m-%d %H:%M:%S} UTC"
        context.output.line(f"failed: {item['backend']}:{item['location']}: {item['error']} ({later})", "red")
    for item in refused:
        context.output.line(f"refused: {item['backend']}:{item['location']}: {item['error']} (no failure)", "yellow")


def _describe_failure(item: FailedReclaim) -> dict[str, Any]:
    known = {"backend": item.backend, "location": item.location, "error": item.error}
    return {**known, "attempts": item.attempts, "next": item.next_attempt}


# gc


@click.command("gc")
@click.option("--storage-key", "storage_keys", multiple=True, metavar="KEY", help="Only this policy; may be repeated.")
@click.option("--grace", type=Duration(), default="24h", show_default=True, help="How old an orphan must be, such as 7d.")
@click.option(
    "--max-share",
    type=click.FloatRange(0, 1),
    default=0.25,
    show_default=True,
    metavar="SHARE",
    help="Delete nothing if more than this share of the objects are orphans.",
)
@click.option("--allow-restored-database", is_flag=True, help="Collect even though no worker ran for a long time.")
@click.option("--allow-no-references", is_flag=True, help="Collect even if no row refers to any of the objects.")
@YES
@DRY_RUN
@JSON
@click.pass_obj
def gc_command(
    settings: Settings,
    storage_keys: Sequence[str],
    grace: timedelta,
    max_share: float,
    allow_restored_database: bool,
    allow_no_references: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete the objects that nothing refers to.

    The application may keep running. Without --yes the command shows what it has found, and asks; --dry-run ends there. The exit
    code is 1 where something could not be deleted, a reference leads to no object, or a dry run shows that what was found can
    hardly be true. It is 3 where a run is refused: then nothing is deleted.
    """
    accepted = {"allow_restored_database": allow_restored_database, "allow_no_references": allow_no_references}

    async def work(context: CommandContext) -> Exit | None:
        collector = StorageGarbageCollector(
            context.binding.manager, binding=context.binding, grace_period=grace, max_deleted_share=max_share
        )
        wrong = False
        for storage_key in storage_keys:
            _require_policy(context, storage_key)
        for storage_key in storage_keys or sorted(context.binding.manager.policies):
            if dry_run or not yes:
                looked = collector.collection(storage_key=storage_key, dry_run=True, **accepted)
                await _collect(context, looked)
                wrong = wrong or _is_wrong(looked.report)
                if context.stopped_by or dry_run or not _may_delete(context, looked.report):
                    continue
            collection = collector.collection(storage_key=storage_key, dry_run=False, **accepted)
            await _collect(context, collection)
            wrong = wrong or _is_wrong(collection.report)
            if context.stopped_by:
                break
        return Exit.FOUND if wrong else None

    run(settings, work, as_json=as_json)


async def _collect(context: CommandContext, collection: CollectionRun) -> None:
    report, shown = collection.report, 0
    doing = f"{'looking through' if report.dry_run else 'collecting'} {report.storage_key}"
    try:
        with context.stoppable(collection.stop), context.output.progress(doing, None, "objects") as bar:
            async for item in collection.on_progress(lambda: bar.reach(report.scanned, report.deleted_bytes)):
                shown += 1
                if context.output.as_json or item.status is OrphanStatus.FAILED or (report.dry_run and shown <= _MOST_SHOWN):
                    _show_object(context, item)
    except CollectionRefusedError:
        _show_report(context, report, is_refused=True)
        raise
    except BaseException:
        _show_report(context, report)
        raise
    _show_report(context, report)


def _may_delete(context: CommandContext, report: GarbageCollectionReport) -> bool:
    if report.refusal is not None or not report.orphaned:
        return False
    question = f"Delete {count_of(report.orphaned, 'orphan')} of {report.storage_key!r} ({format_size(report.orphaned_bytes)})?"
    return context.confirm(question, yes=False)


def _is_wrong(report: GarbageCollectionReport) -> bool:
    return bool(report.failed or report.dangling or report.refusal or report.unfinished_error)


def _show_object(context: CommandContext, item: CollectedObject) -> None:
    if context.output.as_json:
        said = {"object": item.status.value, "backend": item.backend, "location": item.location, "size": item.size}
        context.output.record({**said, **({"error": item.error} if item.error else {})})
        return
    error = f": {item.error}" if item.error else ""
    style = "red" if item.status is OrphanStatus.FAILED else None
    context.output.line(f"{item.status.value}: {item.backend}:{item.location} ({format_size(item.size)}){error}", style)


def _show_report(context: CommandContext, report: GarbageCollectionReport, *, is_refused: bool = False) -> None:
    if context.output.as_json:
        failures = [{"location": item.location, "error": item.error} for item in report.failures]
        refusal = None if report.refusal is None else in_options(report.refusal)
        context.output.record({"report": {**asdict(report), "failures": failures, "refusal": refusal}})
    elif report.scanned or not is_refused:
        _show_facts(context, report)
    if not report.complete and not is_refused:
        context.output.note("not complete; no referenced object was deleted. To continue, run the same command")


def _show_facts(context: CommandContext, report: GarbageCollectionReport) -> None:
    facts: dict[str, Any] = {"policy": f"{report.storage_key} on {report.backend}"}
    counts = asdict(report)
    for name, number in counts.items():
        if f"{name}_bytes" in counts and (number or name in _ALWAYS_SHOWN):
            facts[name] = f"{number:,} ({format_size(counts[f'{name}_bytes'])})"
    if report.failed:
        facts["failed"] = f"{report.failed:,}"
    if report.unfinished:
        facts["unfinished writes removed"] = f"{report.unfinished:,}"
    if report.dry_run and report.orphaned > _MOST_SHOWN:
        context.output.line(f"... and {report.orphaned - _MOST_SHOWN:,} more; --json lists all")
    context.output.facts(facts)
    for column, number in list(report.mentions.items())[:_MOST_SHOWN]:
        context.output.line(f"kept: {column} mentions {number:,} of them, and is not a column of refs", "yellow")
    for column in report.unseen[:_MOST_SHOWN]:
        context.output.line(f"not searched, or not in every row: {column}", "yellow")
    for found in report.dangling[:_MOST_SHOWN]:
        context.output.line(f"dangling: {found.backend}:{found.location}: {found.message}", "red")
    if len(report.dangling) > _MOST_SHOWN:
        context.output.line(f"... and {len(report.dangling) - _MOST_SHOWN:,} more; the command verify finds all", "red")
    if report.unfinished_error is not None:
        context.output.line(f"unfinished writes could not be removed: {report.unfinished_error}", "red")
    if report.refusal is not None and report.dry_run:
        context.output.line(f"nothing would be deleted: {in_options(report.refusal)}", "yellow")


# migrate


@click.command("migrate")
@click.option("--storage-key", required=True, metavar="KEY", help="The policy whose objects to move.")
@click.option("--to", "to_backend", required=True, metavar="BACKEND", help="The backend to move them to.")
@of_a_job
@YES
@DRY_RUN
@JSON
@click.pass_obj
def migrate_command(
    settings: Settings,
    storage_key: str,
    to_backend: str,
    job: Mapping[str, Any],
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Move the objects of a policy to another backend.

    The application may keep running; its policy must write to the new backend already. Each object is copied and verified, its
    row is changed, and the old object is deleted as one that was replaced. Without --yes the command shows what there is to move,
    and asks.
    """

    async def work(context: CommandContext) -> Exit | None:
        _require_policy(context, storage_key)
        with usage_of("--to"):
            context.binding.manager.backend(to_backend)
        await require_rows(context.binding, job)
        migration = migrate(context.binding, storage_key=storage_key, to_backend=to_backend, **job)
        if dry_run or not yes:
            count = await _show_plan(context, migration)
            _show_unseen(context, migration.report)
            if dry_run or not count:
                return Exit.FOUND if migration.report.unseen else None
            if not context.confirm(f"Move them to {to_backend!r}, and delete the old objects?", yes=yes):
                return None
        try:
            await _move(context, migration)
        finally:
            _show_migration(context, migration)
        return None if migration.report.complete and not migration.report.failed else Exit.FOUND

    run(settings, work, as_json=as_json)


async def _show_plan(context: CommandContext, migration: Migration) -> int:
    waiting = await migration.waiting()
    records = [{"backend": key, "objects": number, "bytes": size} for key, (number, size) in waiting.items()]
    rows = [(key, number, format_size(size)) for key, (number, size) in sorted(waiting.items())]
    _show_waiting(context, records, ["on backend", "objects", "bytes"], rows, "nothing is left to move")
    return sum(number for number, _ in waiting.values())


async def _move(context: CommandContext, migration: Migration) -> None:
    report = migration.report
    total = await migration.count()
    with context.stoppable(migration.stop), context.output.progress("moving", total) as bar:
        done = 0

        def show() -> None:
            nonlocal done
            if report.passes > 1 and done == 0:
                done = report.rows
                bar.restart("re-checking")
            bar.reach(report.rows - done, report.bytes_moved)

        async for moved in migration.on_progress(show):
            if context.output.as_json or moved.status is MigrationStatus.FAILED:
                _show_row(context, "object", moved.status.value, moved, "red", column=moved.column)


def _show_migration(context: CommandContext, migration: Migration) -> None:
    report = migration.report
    counts = {name: getattr(report, name) for name in ("moved", "bytes_moved", "changed", "manual", "failed")}
    if context.output.as_json:
        context.output.record({"report": {**counts, "key": report.key, "complete": report.complete, "unseen": report.unseen}})
    else:
        facts = {"moved": f"{report.moved:,} ({format_size(report.bytes_moved)})", "failed": f"{report.failed:,}"}
        if report.changed:
            facts["changed meanwhile"] = f"{report.changed:,}"
        if report.manual:
            facts["left to the application"] = f"{report.manual:,} in plain columns of refs"
        context.output.facts(facts)
        _show_unseen(context, report)
    if not migration.has_ended:
        onward = "" if report.key is None else f" and {option_after(report.key)}"
        context.output.note(f"not complete; every row refers to an existing object. To continue, run the same command{onward}")


# derive


@click.command("derive")
@click.option("--only-missing", is_flag=True, help="Make what is missing.  [default]")
@click.option("--stale", is_flag=True, help="Also replace what another recipe, or version of an effect, has made.")
@click.option("--all", "everything", is_flag=True, help="Make everything again.")
@click.option("--column", "columns", multiple=True, metavar="TABLE.COLUMN", help="Only this column; may be repeated.")
@click.option("--variant", "names", multiple=True, metavar="NAME", help="Only this variant or effect; may be repeated.")
@click.option("--drop-undeclared", is_flag=True, help="Also delete variants that their columns no longer declare.")
@of_a_job
@YES
@DRY_RUN
@JSON
@click.pass_obj
def derive_command(
    settings: Settings,
    only_missing: bool,
    stale: bool,
    everything: bool,
    columns: Sequence[str],
    names: Sequence[str],
    drop_undeclared: bool,
    job: Mapping[str, Any],
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Make the variants of files that rows hold already, and call their effects.

    The application may keep running. By default nothing is replaced or deleted, and nothing is asked. With --stale, --all or
    --drop-undeclared variants leave their rows and are deleted as files that were replaced: without --yes the command shows what
    there is to do, and asks. The rate counts the bytes of the originals.
    """
    if only_missing + stale + everything > 1:
        raise click.UsageError("--only-missing, --stale and --all exclude each other: pass one of them")
    which: Which = "all" if everything else "stale" if stale else "missing"
    deletes = which != "missing" or drop_undeclared

    async def work(context: CommandContext) -> Exit | None:
        with usage_of("--column"):
            require_columns(context.binding, columns)
        with usage_of("--variant"):
            require_names(context.binding, names, drop_undeclared=drop_undeclared)
        await require_rows(context.binding, job)
        derivation = rederive(context.binding, which=which, columns=columns, names=names, drop_undeclared=drop_undeclared, **job)
        if dry_run or (deletes and not yes):
            count = await _show_underived(context, derivation)
            _show_unseen(context, derivation.report)
            if dry_run or not count:
                return Exit.FOUND if derivation.report.unseen else None
            if not context.confirm("Make these, and delete what they take the places of?", yes=yes):
                return None
        try:
            await _derive(context, derivation)
        finally:
            _show_rederivation(context, derivation)
        return None if derivation.report.complete and not derivation.report.failed else Exit.FOUND

    run(settings, work, as_json=as_json)


_NO_VARIANT = "(all)"


async def _show_underived(context: CommandContext, derivation: Rederivation) -> int:
    waiting = sorted((await derivation.waiting()).items())
    headers = ["column", "variant", "because", "files"]
    rows = [(column, name or _NO_VARIANT, kind, number) for (column, name, kind), number in waiting]
    _show_waiting(context, [dict(zip(headers, row, strict=True)) for row in rows], headers, rows, "nothing to make")
    return sum(number for _, number in waiting)


async def _derive(context: CommandContext, derivation: Rederivation) -> None:
    report = derivation.report
    total = await derivation.count()
    with context.stoppable(derivation.stop), context.output.progress("deriving", total) as bar:
        async for item in derivation.on_progress(lambda: bar.reach(report.rows, report.bytes_read)):
            if context.output.as_json or item.status in (RederivationStatus.FAILED, RederivationStatus.REFUSED):
                style = "red" if item.status is RederivationStatus.FAILED else "yellow"
                _show_row(
                    context,
                    "object",
                    item.status.value,
                    item,
                    style,
                    column=f"{item.column} {item.name}".rstrip(),
                    variant=item.name,
                )


def _show_rederivation(context: CommandContext, derivation: Rederivation) -> None:
    report = derivation.report
    counts = {status.value: number for status, number in sorted(report.counts.items())}
    if context.output.as_json:
        known: dict[str, Any] = {"rows": report.rows, "bytes_read": report.bytes_read, "counts": counts, "failed": report.failed}
        known |= {"key": report.key, "complete": report.complete, "unseen": report.unseen}
        context.output.record({"report": known})
    else:
        shown = {"rows": f"{report.rows:,}", **{name: f"{number:,}" for name, number in counts.items()}}
        context.output.facts({**shown, "originals read": format_size(report.bytes_read)})
        _show_unseen(context, report)
    if not derivation.has_ended:
        onward = "" if report.key is None else f" and {option_after(report.key)}"
        context.output.note(f"not complete; every row is consistent. To continue, run the same command{onward}")
