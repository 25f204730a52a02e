"""`verify` and `recover`."""

from __future__ import annotations

from typing import Any

import click
from sqlalchemy import func, select

from granite_storage.cli.options import AFTER, AT_A_TIME, DRY_RUN, JSON, RATE, YES
from granite_storage.cli.output import shown_size
from granite_storage.cli.runtime import Desk, Exit, Settings, run
from granite_storage.exceptions import ConfigurationError
from granite_storage.orm.journal.journal import StorageJournal
from granite_storage.orm.journal.report import RecoveryReport
from granite_storage.orm.journal.tables import clock
from granite_storage.verification import Finding, Verification, verify

__all__ = ["recover_command", "verify_command"]


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
