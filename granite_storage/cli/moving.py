"""`migrate`."""

from __future__ import annotations

from typing import Any

import click

from granite_storage.cli.options import AFTER, AT_A_TIME, DRY_RUN, JSON, RATE, YES
from granite_storage.cli.output import shown_size
from granite_storage.cli.runtime import Desk, Exit, Settings, run
from granite_storage.migration import Migration, Moved, Verdict, migrate

__all__ = ["migrate_command"]


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
