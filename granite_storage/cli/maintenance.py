"""The commands that maintain all objects: `verify`, `recover`, `gc`, `migrate` and `derive`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click
from sqlalchemy import case, func, literal, select

from granite_storage._documentation import Page
from granite_storage._jobs import Item, RowReport, RowRun
from granite_storage._words import count_of
from granite_storage.cli.output import Bar, format_size, option_after
from granite_storage.cli.runtime import (
    DRY_RUN,
    JSON,
    YES,
    CommandContext,
    Duration,
    Exit,
    command,
    in_options,
    of_a_job,
    require_rows,
    usage_of,
)
from granite_storage.exceptions import CollectionRefusedError, ConfigurationError
from granite_storage.gc import CollectedObject, CollectionRun, GarbageCollectionReport, OrphanStatus, StorageGarbageCollector
from granite_storage.migration import MigratedObject, MigrationStatus, migrate
from granite_storage.orm.journal.jobs import EFFECT, SCAN, VARIANT
from granite_storage.orm.journal.journal import StorageJournal
from granite_storage.orm.journal.tables import DELETE, STAGING, UPLOAD, FailedReclaim, RecoveryReport, clock
from granite_storage.orm.variants import Which
from granite_storage.rederivation import (
    RederivationStatus,
    RederivedVariant,
    rederive,
    require_columns,
    require_names,
)
from granite_storage.verification import Finding, verify

if TYPE_CHECKING:
    from sqlalchemy import Table
    from sqlalchemy.ext.asyncio import AsyncConnection

_MOST_SHOWN = 20
_STATES = ("due", "later", "dead")
_WORK = {UPLOAD: "upload to check", STAGING: "direct upload to check", DELETE: "delete", SCAN: "scan"}
_ALWAYS_SHOWN = ("scanned", "referenced", "orphaned")
_NO_VARIANT = "(all)"
_SHOWN = {RederivationStatus.FAILED: "red", RederivationStatus.REFUSED: "yellow"}


def _show_row(
    context: CommandContext,
    key: str,
    problem: str,
    item: Finding | MigratedObject | RederivedVariant,
    style: str,
    *,
    column: str,
    **more: object,
) -> None:
    """Show what became of a value of a row."""
    where = {"table": item.table, "primary_key": item.primary_key, "column": item.column}
    row = ", ".join(map(str, item.primary_key))
    text = f"{problem}: {item.table} {row} {column}: {item.message}"
    context.output.item({key: problem, **where, **more, "message": item.message}, text, style)


def _show_waiting(context: CommandContext, records: Sequence[Mapping[str, Any]], headers: Sequence[str], nothing: str) -> None:
    """Show what there is to do."""
    if context.output.as_json:
        context.output.record({"waiting": records})
    elif records:
        shown = ({**record, "bytes": format_size(record["bytes"])} if "bytes" in record else record for record in records)
        context.output.table(headers, [list(record.values()) for record in shown])
    else:
        context.output.line(nothing)


def _show_unseen(context: CommandContext, report: RowReport) -> None:
    """Show what could not be read; a JSON report contains it anyway."""
    if not context.output.as_json:
        for schema in report.unseen:
            context.output.line(f"not seen: {in_options(schema)}", "red")


async def _run_job(
    context: CommandContext,
    job: RowRun[Item, Any],
    doing: str,
    *,
    show: Callable[[Item], None],
    reach: Callable[[Bar], None],
    describe: Callable[[], tuple[Mapping[str, Any], Mapping[str, object]]],
    state: str,
) -> None:
    """Do a job over rows, and show its items and, whatever ends it, its report.

    Args:
        context: The command.
        job: The job.
        doing: What it does, beside the bar.
        show: Shows an item.
        reach: Shows on the bar how much is done.
        describe: Returns the report for a program, and for a person.
        state: What holds where it has not come to its end.
    """
    report = job.report
    try:
        total = await job.count()
        with context.stoppable(job.stop), context.output.progress(doing, total) as bar:
            async for item in job.on_progress(lambda: reach(bar)):
                show(item)
    finally:
        counts, facts = describe()
        if context.output.as_json:
            rest = {"key": report.key, "complete": report.complete, "unseen": report.unseen}
            context.output.record({"report": {**counts, **rest}})
        else:
            context.output.facts(facts)
            _show_unseen(context, report)
        if not job.has_ended:
            onward = "" if report.key is None else f" and {option_after(report.key)}"
            context.output.note(f"not complete; {state}. To continue, run the same command{onward}")


def _require_policy(context: CommandContext, storage_key: str | None) -> None:
    """Refuse a --storage-key that no policy has."""
    if storage_key is not None:
        with usage_of("--storage-key"):
            context.binding.manager.policy(storage_key)


# verify


@command("verify")
@click.option("--storage-key", metavar="KEY", help="Only the references of this policy.")
@click.option("--deep", is_flag=True, help="Read all bytes and compare their checksums.")
@of_a_job
@JSON
async def verify_command(context: CommandContext, storage_key: str | None, deep: bool, job: Mapping[str, Any]) -> Exit | None:
    """Compare every reference with its object.

    Nothing is changed. The exit code is 1 where something is wrong; an unknown checksum is reported, and is not wrong.
    """
    _require_policy(context, storage_key)
    await require_rows(context.binding, job)
    verification = verify(context.binding, storage_key=storage_key, deep=deep, **job)
    report = verification.report

    def show(item: Finding) -> None:
        style = "yellow" if item.is_harmless or item.is_replaceable else "red"
        more = {"variant": item.variant, "ref": None if item.ref is None else item.ref.to_dict()}
        _show_row(context, "finding", item.problem.value, item, style, column=item.column, **more)

    def describe() -> tuple[dict[str, Any], dict[str, str]]:
        counts = {problem.value: number for problem, number in report.counts.items()}
        known = {"rows": report.rows, "checked": report.checked, "bytes_read": report.bytes_read}
        facts = {"references checked": f"{report.checked:,}", "problems": f"{report.problems:,}"}
        facts |= {f"  {name}": f"{number:,}" for name, number in sorted(counts.items())}
        if report.replaceable:
            facts["of variants, which can be made again"] = f"{report.replaceable:,}"
        if report.bytes_read:
            facts["bytes read"] = format_size(report.bytes_read)
        return {**known, "replaceable": report.replaceable, "counts": counts}, facts

    def reach(bar: Bar) -> None:
        bar.reach(report.rows, report.bytes_read)

    state = "the remaining rows were not checked"
    await _run_job(context, verification, "verifying", show=show, reach=reach, describe=describe, state=state)
    return Exit.FOUND if report.problems or report.unseen else None


# recover


@command("recover")
@click.option("--retry-dead-letters", is_flag=True, help="Retry dead letters.")
@YES
@DRY_RUN
@JSON
async def recover_command(context: CommandContext, retry_dead_letters: bool, yes: bool, dry_run: bool) -> Exit | None:
    """Let the journal do everything that is due.

    It deletes uploads that no transaction has kept, and objects that rows have released; it has held files scanned, makes
    variants and calls effects. Without --yes it shows what is due now and later, and asks where something is due now.

    The exit code is 1 while something has failed. A file that a recipe refuses is not a failure: the run that finds
    it says so, and no later one does.
    """
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
        if dry_run or is_idle or not context.confirm("Do what is due now?"):
            return None
    if retry_dead_letters:
        retried = count_of(await journal.retry_dead_letters(), "dead letter")
        context.output.note(f"{retried} will be retried")
    report = await journal.recover()
    _show_recovery(context, report)
    return Exit.FOUND if report.failed or report.unknown_backends else None


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
    _show_waiting(context, plan, headers, "nothing is waiting")
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


@command("gc")
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
async def gc_command(
    context: CommandContext,
    storage_keys: Sequence[str],
    grace: timedelta,
    max_share: float,
    yes: bool,
    dry_run: bool,
    **accepted: bool,
) -> Exit | None:
    """Delete the objects that nothing refers to.

    The application may keep running. Without --yes the command shows what it has found, and asks; --dry-run ends there. The exit
    code is 1 where something could not be deleted, a reference leads to no object, or a dry run shows that what was found can
    hardly be true. It is 3 where a run is refused: then nothing is deleted.
    """
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


async def _collect(context: CommandContext, collection: CollectionRun) -> None:
    report, shown = collection.report, 0
    doing = f"{'looking through' if report.dry_run else 'collecting'} {report.storage_key}"
    try:
        with context.stoppable(collection.stop), context.output.progress(doing, None, "objects") as bar:
            async for item in collection.on_progress(lambda: bar.reach(report.scanned, report.deleted_bytes)):
                shown += 1
                if context.output.as_json or item.status is OrphanStatus.FAILED or (report.dry_run and shown <= _MOST_SHOWN):
                    _show_object(context, item)
    except BaseException as error:
        _show_report(context, report, is_refused=isinstance(error, CollectionRefusedError))
        raise
    _show_report(context, report)


def _may_delete(context: CommandContext, report: GarbageCollectionReport) -> bool:
    if report.refusal is not None or not report.orphaned:
        return False
    question = f"Delete {count_of(report.orphaned, 'orphan')} of {report.storage_key!r} ({format_size(report.orphaned_bytes)})?"
    return context.confirm(question)


def _is_wrong(report: GarbageCollectionReport) -> bool:
    return bool(report.failed or report.dangling or report.refusal or report.unfinished_error)


def _show_object(context: CommandContext, item: CollectedObject) -> None:
    shown = {"object": item.status.value, "backend": item.backend, "location": item.location, "size": item.size}
    text = f"{item.status.value}: {item.backend}:{item.location} ({format_size(item.size)})"
    if item.error:
        shown, text = {**shown, "error": item.error}, f"{text}: {item.error}"
    context.output.item(shown, text, "red" if item.status is OrphanStatus.FAILED else None)


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


@command("migrate")
@click.option("--storage-key", required=True, metavar="KEY", help="The policy whose objects to move.")
@click.option("--to", "to_backend", required=True, metavar="BACKEND", help="The backend to move them to.")
@of_a_job
@YES
@DRY_RUN
@JSON
async def migrate_command(
    context: CommandContext, storage_key: str, to_backend: str, job: Mapping[str, Any], yes: bool, dry_run: bool
) -> Exit | None:
    """Move the objects of a policy to another backend.

    The application may keep running; its policy must write to the new backend already. Each object is copied and verified, its
    row is changed, and the old object is deleted as one that was replaced. Without --yes the command shows what there is to move,
    and asks.
    """
    _require_policy(context, storage_key)
    with usage_of("--to"):
        context.binding.manager.backend(to_backend)
    await require_rows(context.binding, job)
    migration = migrate(context.binding, storage_key=storage_key, to_backend=to_backend, **job)
    report = migration.report
    if dry_run or not yes:
        waiting = sorted((await migration.waiting()).items())
        records = [{"backend": key, "objects": number, "bytes": size} for key, (number, size) in waiting]
        _show_waiting(context, records, ["on backend", "objects", "bytes"], "nothing is left to move")
        if not _may_start(context, report, records, f"Move them to {to_backend!r}, and delete the old objects?", dry_run=dry_run):
            return Exit.FOUND if report.unseen else None
    before = 0

    def reach(bar: Bar) -> None:
        nonlocal before
        if report.passes > 1 and before == 0:
            before = report.rows
            bar.restart("re-checking")
        bar.reach(report.rows - before, report.bytes_moved)

    def show(item: MigratedObject) -> None:
        if context.output.as_json or item.status is MigrationStatus.FAILED:
            _show_row(context, "object", item.status.value, item, "red", column=item.column)

    def describe() -> tuple[dict[str, Any], dict[str, str]]:
        facts = {"moved": f"{report.moved:,} ({format_size(report.bytes_moved)})", "failed": f"{report.failed:,}"}
        if report.changed:
            facts["changed meanwhile"] = f"{report.changed:,}"
        if report.manual:
            facts["left to the application"] = f"{report.manual:,} in plain columns of refs"
        return {name: getattr(report, name) for name in ("moved", "bytes_moved", "changed", "manual", "failed")}, facts

    state = "every row refers to an existing object"
    await _run_job(context, migration, "moving", show=show, reach=reach, describe=describe, state=state)
    return None if report.complete and not report.failed else Exit.FOUND


def _may_start(context: CommandContext, report: RowReport, waiting: Sequence[object], question: str, *, dry_run: bool) -> bool:
    """Ask whether to do what is waiting, unless nothing is, or it is only shown."""
    _show_unseen(context, report)
    return not dry_run and bool(waiting) and context.confirm(question)


# derive


def _require_one(context: click.Context, option: click.Parameter, is_given: bool) -> bool:
    """Refuse a second one of the flags that exclude each other, before the application is loaded."""
    if is_given and context.meta.setdefault(__name__, option) is not option:
        raise click.UsageError("--only-missing, --stale and --all exclude each other: pass one of them", context)
    return is_given


@command("derive")
@click.option("--only-missing", is_flag=True, callback=_require_one, expose_value=False, help="Make what is missing.  [default]")
@click.option(
    "--stale",
    is_flag=True,
    callback=_require_one,
    help="Also replace what another recipe, or version of an effect, has made.",
)
@click.option("--all", "everything", is_flag=True, callback=_require_one, help="Make everything again.")
@click.option("--column", "columns", multiple=True, metavar="TABLE.COLUMN", help="Only this column; may be repeated.")
@click.option("--variant", "names", multiple=True, metavar="NAME", help="Only this variant or effect; may be repeated.")
@click.option("--drop-undeclared", is_flag=True, help="Also delete variants that their columns no longer declare.")
@of_a_job
@YES
@DRY_RUN
@JSON
async def derive_command(
    context: CommandContext,
    stale: bool,
    everything: bool,
    columns: Sequence[str],
    names: Sequence[str],
    drop_undeclared: bool,
    job: Mapping[str, Any],
    yes: bool,
    dry_run: bool,
) -> Exit | None:
    """Make the variants of files that rows hold already, and call their effects.

    The application may keep running. By default nothing is replaced or deleted, and nothing is asked. With --stale, --all or
    --drop-undeclared variants leave their rows and are deleted as files that were replaced: without --yes the command shows what
    there is to do, and asks. The rate counts the bytes of the originals.
    """
    which: Which = "all" if everything else "stale" if stale else "missing"
    with usage_of("--column"):
        require_columns(context.binding, columns)
    with usage_of("--variant"):
        require_names(context.binding, names, drop_undeclared=drop_undeclared)
    await require_rows(context.binding, job)
    derivation = rederive(context.binding, which=which, columns=columns, names=names, drop_undeclared=drop_undeclared, **job)
    report = derivation.report
    if dry_run or ((which != "missing" or drop_undeclared) and not yes):
        headers = ["column", "variant", "because", "files"]
        records = [
            dict(zip(headers, (column, name or _NO_VARIANT, kind, number), strict=True))
            for (column, name, kind), number in sorted((await derivation.waiting()).items())
        ]
        _show_waiting(context, records, headers, "nothing to make")
        question = "Make these, and delete what they take the places of?"
        if not _may_start(context, report, records, question, dry_run=dry_run):
            return Exit.FOUND if report.unseen else None

    def show(item: RederivedVariant) -> None:
        if context.output.as_json or item.status in _SHOWN:
            column = f"{item.column} {item.name}".rstrip()
            style = _SHOWN.get(item.status, "")
            _show_row(context, "object", item.status.value, item, style, column=column, variant=item.name)

    def describe() -> tuple[dict[str, Any], dict[str, str]]:
        counts = {status.value: number for status, number in sorted(report.counts.items())}
        known = {"rows": report.rows, "bytes_read": report.bytes_read, "counts": counts, "failed": report.failed}
        facts = {"rows": f"{report.rows:,}", **{name: f"{number:,}" for name, number in counts.items()}}
        return known, {**facts, "originals read": format_size(report.bytes_read)}

    def reach(bar: Bar) -> None:
        bar.reach(report.rows, report.bytes_read)

    state = "every row is consistent"
    await _run_job(context, derivation, "deriving", show=show, reach=reach, describe=describe, state=state)
    return None if report.complete and not report.failed else Exit.FOUND
