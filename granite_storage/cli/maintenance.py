"""The commands that look after all objects: `verify`, `recover`, `gc` and `migrate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import click
from sqlalchemy import func, select

from granite_storage.cli.output import Bar, shown_size
from granite_storage.cli.runtime import AFTER, AT_A_TIME, DRY_RUN, JSON, RATE, YES, Desk, Duration, Exit, Settings, run
from granite_storage.exceptions import ConfigurationError
from granite_storage.gc import CollectedObject, Collection, Fate, GarbageCollectionReport, StorageGarbageCollector
from granite_storage.migration import Migration, Moved, Verdict, migrate
from granite_storage.orm.journal.journal import StorageJournal
from granite_storage.orm.journal.tables import RecoveryReport, clock
from granite_storage.verification import Finding, Verification, verify

__all__ = ["gc_command", "migrate_command", "recover_command", "verify_command"]

_MOST_SHOWN = 20
_COUNTED = ("scanned", "referenced", "foreign", "young", "mentioned", "kept", "orphaned", "deleted")

# verify


@click.command("verify")
@click.option("--storage-key", metavar="KEY", help="Only the references of this policy.")
@click.option("--deep", is_flag=True, help="Read all bytes and compare their checksums.")
@AFTER
@AT_A_TIME
@RATE
@JSON
@click.pass_obj
def verify_command(
    settings: Settings,
    storage_key: str | None,
    deep: bool,
    after: str | None,
    at_a_time: int | None,
    rate: float | None,
    as_json: bool,
) -> None:
    """Compare every reference with its object.

    Nothing is changed. The exit code is 1 where something is wrong; a checksum that is unknown is told, and is not wrong.
    """
    more: dict[str, Any] = {} if at_a_time is None else {"at_a_time": at_a_time}

    async def work(desk: Desk) -> Exit | None:
        verification = verify(desk.binding, storage_key=storage_key, deep=deep, after=after, bytes_per_second=rate, **more)
        try:
            await _look(desk, verification)
        finally:
            _tell_verification(desk, verification)
        return Exit.FOUND if verification.report.problems else None

    run(settings, work, as_json=as_json)


async def _look(desk: Desk, verification: Verification) -> None:
    report = verification.report
    total = await verification.count()
    with desk.stoppable(verification.stop), desk.output.progress("verifying", total) as bar:
        async for finding in verification.noticed(lambda: bar.reach(report.rows, report.bytes_read)):
            _tell_finding(desk, finding)


def _tell_finding(desk: Desk, finding: Finding) -> None:
    if desk.output.as_json:
        desk.output.record(
            {
                "finding": finding.problem.value,
                "table": finding.table,
                "primary_key": finding.primary_key,
                "column": finding.column,
                "ref": None if finding.ref is None else finding.ref.to_dict(),
                "message": finding.message,
            }
        )
        return
    row = ", ".join(map(str, finding.primary_key))
    style = "yellow" if finding.is_harmless else "red"
    desk.output.line(f"{finding.problem.value}: {finding.table} {row} {finding.column}: {finding.message}", style)


def _tell_verification(desk: Desk, verification: Verification) -> None:
    report = verification.report
    if desk.output.as_json:
        counts = {problem.value: number for problem, number in report.counts.items()}
        known = {"rows": report.rows, "checked": report.checked, "bytes_read": report.bytes_read}
        desk.output.record({"report": {**known, "counts": counts, "key": report.key, "complete": report.complete}})
    else:
        facts = {"references checked": f"{report.checked:,}", "problems": f"{report.problems:,}"}
        facts |= {f"  {problem.value}": f"{number:,}" for problem, number in sorted(report.counts.items())}
        if report.bytes_read:
            facts["bytes read"] = shown_size(report.bytes_read)
        desk.output.facts(facts)
    if not report.complete and report.key is not None:
        desk.output.note(f"not complete; go on with: --after '{report.key}'")


# recover


@click.command("recover")
@click.option("--revive", is_flag=True, help="Try the deletes again that were given up.")
@YES
@DRY_RUN
@JSON
@click.pass_obj
def recover_command(settings: Settings, revive: bool, yes: bool, dry_run: bool, as_json: bool) -> None:
    """Let the journal do all that is due.

    It deletes what no transaction has taken and what rows have given up. Without --yes it shows what is due, and asks.
    """

    async def work(desk: Desk) -> Exit | None:
        journal = desk.binding.journal
        if journal is None:
            raise ConfigurationError("the application has no journal: bind_storage(..., journal=StorageJournal(engine))")
        if dry_run or not yes:
            await _tell_due(desk, journal)
        if dry_run or not desk.confirm("Delete what is due and no row refers to?", yes=yes):
            return None
        if revive:
            desk.output.note(f"{await journal.revive_dead_letters():,} deletes that were given up are tried again")
        report = await journal.recover()
        _tell_recovery(desk, report)
        return Exit.FOUND if report.failed or report.unknown_backends else None

    run(settings, work, as_json=as_json)


async def _tell_due(desk: Desk, journal: StorageJournal) -> None:
    await journal.check()
    intent, reclaim = journal.tables.intent, journal.tables.reclaim
    rows: list[dict[str, Any]] = []
    sessions = desk.binding.sessions
    if sessions is None:
        raise ConfigurationError("the binding has no sessions: bind_storage(Base, manager, sessions=...)")
    async with sessions() as session:
        connection = await session.connection(bind_arguments={"clause": intent})
        for state, table in (("written down", intent), ("taken over", reclaim)):
            due = (
                func.count().filter(table.c.due <= clock())
                if connection.dialect.name == "postgresql"
                else func.sum(table.c.due <= clock())
            )
            statement = select(table.c.backend, table.c.kind, due, func.count()).group_by(table.c.backend, table.c.kind)
            for backend, kind, number, of in await connection.execute(statement, execution_options=journal.execution_options):
                rows.append({"backend": backend, "kind": kind, "state": state, "due": int(number or 0), "of": of})
    if desk.output.as_json:
        desk.output.record({"waiting": rows})
    elif rows:
        desk.output.table(["backend", "kind", "state", "due", "of"], [list(row.values()) for row in rows])
    else:
        desk.output.line("nothing waits")


def _tell_recovery(desk: Desk, report: RecoveryReport) -> None:
    failed = [
        {
            "backend": item.backend,
            "location": item.location,
            "error": item.error,
            "attempts": item.attempts,
            "next": item.next_attempt,
        }
        for item in report.failed
    ]
    counts = {name: getattr(report, name) for name in ("claimed", "deleted", "kept", "confirmed", "leased", "waiting")}
    if desk.output.as_json:
        desk.output.record({"report": {**counts, "failed": failed, "unknown_backends": sorted(report.unknown_backends)}})
        return
    facts: dict[str, object] = {name: f"{number:,}" for name, number in counts.items()}
    if report.unknown_backends:
        facts["unknown backends"] = ", ".join(sorted(report.unknown_backends))
    desk.output.facts({**facts, "failed": len(failed)})
    for item in failed:
        later = "given up" if item["next"] is None else f"again at {item['next']:%Y-%m-%d %H:%M:%S} UTC"
        desk.output.line(f"failed: {item['backend']}:{item['location']}: {item['error']} ({later})", "red")


# gc


@click.command("gc")
@click.option("--storage-key", "storage_keys", multiple=True, metavar="KEY", help="Only this policy; may be given again.")
@click.option("--grace", type=Duration(), default="24h", show_default=True, help="How old an orphan must be, such as 7d.")
@click.option(
    "--max-share",
    type=click.FloatRange(0, 1),
    default=0.25,
    show_default=True,
    metavar="SHARE",
    help="Delete nothing where more than this part of the objects are orphans.",
)
@click.option("--accept-restore", is_flag=True, help="This is the right database, though no worker was at work for long.")
@click.option("--accept-empty", is_flag=True, help="This is the right database, though it refers to none of the objects.")
@YES
@DRY_RUN
@JSON
@click.pass_obj
def gc_command(
    settings: Settings,
    storage_keys: Sequence[str],
    grace: timedelta,
    max_share: float,
    accept_restore: bool,
    accept_empty: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete the objects that nothing refers to.

    The application may go on. Without --yes it looks, shows what it has found, and asks; --dry-run ends there. The exit code is 1
    where something could not be deleted, a reference leads to no object, or nothing would be deleted because what was found can
    hardly be true.
    """
    accepted = {"accept_restore": accept_restore, "accept_empty": accept_empty}

    async def work(desk: Desk) -> Exit | None:
        collector = StorageGarbageCollector(
            desk.binding.manager, binding=desk.binding, grace_period=grace, max_deleted_share=max_share
        )
        wrong = False
        for storage_key in storage_keys or sorted(desk.binding.manager.policies):
            desk.binding.manager.policy(storage_key)
            if dry_run or not yes:
                looked = collector.collection(storage_key=storage_key, dry_run=True, **accepted)
                await _collect(desk, looked)
                wrong = wrong or _is_wrong(looked.report)
                if desk.stopped_by or dry_run or not _may_delete(desk, looked.report):
                    continue
            collection = collector.collection(storage_key=storage_key, dry_run=False, **accepted)
            await _collect(desk, collection)
            wrong = wrong or _is_wrong(collection.report)
            if desk.stopped_by:
                break
        return Exit.FOUND if wrong else None

    run(settings, work, as_json=as_json)


async def _collect(desk: Desk, collection: Collection) -> None:
    report, shown = collection.report, 0
    doing = f"{'looking through' if report.dry_run else 'collecting'} {report.storage_key}"
    try:
        with desk.stoppable(collection.stop), desk.output.progress(doing, None, "objects") as bar:
            async for item in collection.noticed(lambda: _reach(bar, report)):
                shown += 1
                if desk.output.as_json or item.fate is Fate.FAILED or (report.dry_run and shown <= _MOST_SHOWN):
                    _tell_object(desk, item)
    finally:
        _tell_report(desk, report)


def _reach(bar: Bar, report: GarbageCollectionReport) -> None:
    bar.reach(report.scanned, report.deleted_bytes)


def _may_delete(desk: Desk, report: GarbageCollectionReport) -> bool:
    if report.refusal is not None or not report.orphaned:
        return False
    question = f"Delete {report.orphaned:,} orphans of {report.storage_key!r} ({shown_size(report.orphaned_bytes)})?"
    return desk.confirm(question, yes=False)


def _is_wrong(report: GarbageCollectionReport) -> bool:
    return bool(report.failed or report.dangling or report.refusal or report.unfinished_error)


def _tell_object(desk: Desk, item: CollectedObject) -> None:
    if desk.output.as_json:
        said = {"object": item.fate.value, "backend": item.backend, "location": item.location, "size": item.size}
        desk.output.record({**said, **({"error": item.error} if item.error else {})})
        return
    error = f": {item.error}" if item.error else ""
    style = "red" if item.fate is Fate.FAILED else None
    desk.output.line(f"{item.fate.value}: {item.backend}:{item.location} ({shown_size(item.size)}){error}", style)


def _tell_report(desk: Desk, report: GarbageCollectionReport) -> None:
    if desk.output.as_json:
        failures = [{"location": item.location, "error": item.error} for item in report.failures]
        desk.output.record({"report": {**asdict(report), "failures": failures}})
    else:
        _tell_person(desk, report)
    if not report.complete:
        desk.output.note("not complete; nothing that is referred to was deleted. Go on with the same command")


def _tell_person(desk: Desk, report: GarbageCollectionReport) -> None:
    facts: dict[str, Any] = {"policy": f"{report.storage_key} on {report.backend}"}
    for name in _COUNTED:
        number, size = getattr(report, name), getattr(report, f"{name}_bytes")
        if number or name in ("scanned", "referenced", "orphaned"):
            facts[name] = f"{number:,} ({shown_size(size)})"
    if report.failed:
        facts["failed"] = f"{report.failed:,}"
    if report.unfinished:
        facts["unfinished writes removed"] = f"{report.unfinished:,}"
    if report.dry_run and report.orphaned > _MOST_SHOWN:
        desk.output.line(f"... and {report.orphaned - _MOST_SHOWN:,} more; --json names all")
    desk.output.facts(facts)
    for column, number in list(report.mentions.items())[:_MOST_SHOWN]:
        desk.output.line(f"kept: {column} mentions {number:,} of them, and is no column of references", "yellow")
    for column in report.unseen[:_MOST_SHOWN]:
        desk.output.line(f"not looked at, or not in every row: {column}", "yellow")
    for found in report.dangling[:_MOST_SHOWN]:
        desk.output.line(f"dangling: {found.backend}:{found.location}: {found.message}", "red")
    if len(report.dangling) > _MOST_SHOWN:
        desk.output.line(f"... and {len(report.dangling) - _MOST_SHOWN:,} more; the command verify finds all", "red")
    if report.unfinished_error is not None:
        desk.output.line(f"unfinished writes could not be removed: {report.unfinished_error}", "red")
    if report.refusal is not None and report.dry_run:
        desk.output.line(f"nothing would be deleted: {report.refusal}", "yellow")


# migrate


@click.command("migrate")
@click.option("--storage-key", required=True, metavar="KEY", help="Whose objects.")
@click.option("--to", "to_backend", required=True, metavar="BACKEND", help="The backend that they shall be on.")
@AFTER
@AT_A_TIME
@RATE
@YES
@DRY_RUN
@JSON
@click.pass_obj
def migrate_command(
    settings: Settings,
    storage_key: str,
    to_backend: str,
    after: str | None,
    at_a_time: int | None,
    rate: float | None,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Move the objects of a policy to another backend.

    The application may go on; its policy must write to the new backend already. Each object is copied and verified, its row is
    changed, and the old object is deleted as one that was replaced. Without --yes it shows what there is to move, and asks.
    """
    more: dict[str, Any] = {} if at_a_time is None else {"at_a_time": at_a_time}

    async def work(desk: Desk) -> Exit | None:
        migration = migrate(
            desk.binding, storage_key=storage_key, to_backend=to_backend, after=after, bytes_per_second=rate, **more
        )
        if dry_run or not yes:
            count = await _tell_plan(desk, migration)
            if dry_run or not count or not desk.confirm(f"Move them to {to_backend!r}, and delete the old objects?", yes=yes):
                return None
        try:
            await _move(desk, migration)
        finally:
            _tell_migration(desk, migration)
        return None if migration.report.complete and not migration.report.failed else Exit.FOUND

    run(settings, work, as_json=as_json)


async def _tell_plan(desk: Desk, migration: Migration) -> int:
    waiting = await migration.waiting()
    if desk.output.as_json:
        desk.output.record({"waiting": [{"backend": key, "objects": n, "bytes": size} for key, (n, size) in waiting.items()]})
    elif waiting:
        rows = [(key, number, shown_size(size)) for key, (number, size) in sorted(waiting.items())]
        desk.output.table(["on backend", "objects", "bytes"], rows)
    else:
        desk.output.line("nothing is left to move")
    return sum(number for number, _ in waiting.values())


async def _move(desk: Desk, migration: Migration) -> None:
    report = migration.report
    total = await migration.count()
    with desk.stoppable(migration.stop), desk.output.progress("moving", total) as bar:
        done = 0

        def show() -> None:
            nonlocal done
            if report.passes > 1 and done == 0:
                done = report.rows
                bar.restart("looking again")
            bar.reach(report.rows - done, report.bytes_moved)

        async for moved in migration.noticed(show):
            if desk.output.as_json or moved.verdict is Verdict.FAILED:
                _tell_moved(desk, moved)


def _tell_moved(desk: Desk, moved: Moved) -> None:
    if desk.output.as_json:
        what = {"table": moved.table, "primary_key": moved.primary_key, "column": moved.column, "message": moved.message}
        desk.output.record({"object": moved.verdict.value, **what})
        return
    row = ", ".join(map(str, moved.primary_key))
    desk.output.line(f"{moved.verdict.value}: {moved.table} {row} {moved.column}: {moved.message}", "red")


def _tell_migration(desk: Desk, migration: Migration) -> None:
    report = migration.report
    counts = {name: getattr(report, name) for name in ("moved", "bytes_moved", "changed", "manual", "failed")}
    if desk.output.as_json:
        desk.output.record({"report": {**counts, "key": report.key, "complete": report.complete}})
    else:
        facts = {"moved": f"{report.moved:,} ({shown_size(report.bytes_moved)})", "failed": f"{report.failed:,}"}
        if report.changed:
            facts["changed meanwhile"] = f"{report.changed:,}"
        if report.manual:
            facts["left to the application"] = f"{report.manual:,} in plain columns of refs"
        desk.output.facts(facts)
    if not report.complete:
        onward = "" if report.key is None else f" and --after '{report.key}'"
        desk.output.note(f"not complete; every row refers to an object that is there. Go on with the same command{onward}")
