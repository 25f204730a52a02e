"""`gc`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import click

from granite_storage.cli.options import DRY_RUN, JSON, YES, Duration
from granite_storage.cli.output import Bar, shown_size
from granite_storage.cli.runtime import Desk, Exit, Settings, run
from granite_storage.gc import CollectedObject, Collection, Fate, GarbageCollectionReport, StorageGarbageCollector

__all__ = ["gc_command"]

_MOST_SHOWN = 20
_COUNTED = ("scanned", "referenced", "foreign", "young", "mentioned", "kept", "orphaned", "deleted")


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
