"""Objects that are scanned once they are stored: `StorageManager.scan`, which applications use that keep refs themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest

from granite_storage import ConfigurationError, StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.alembic import sources
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import (
    ChecksumMismatchError,
    InfectedContentError,
    InfectedObjectError,
    ObjectNotFoundError,
    ScannerUnavailableError,
    UnknownPolicyError,
)
from granite_storage.inspection import ScanResult, scanning
from granite_storage.inspection.base import OnUnavailable
from granite_storage.refs import require_scanned
from tests.inspection.support import INFECTED, UNAVAILABLE, ScriptedScanner

SLOT: dict[str, Any] = {"storage_key": "files", "model_name": "letter", "entity_id": "1", "field_name": "file"}


def make_manager(scanner: ScriptedScanner | None) -> StorageManager:
    return StorageManager(
        backends={"memory": MemoryStorageBackend()}, policies={"files": StoragePolicy("files", "memory", scanner=scanner)}
    )


async def held(manager: StorageManager, scanner: ScriptedScanner, content: bytes = b"content" * 300_000) -> StoredObjectRef:
    """Store what the scanner cannot judge; then it can."""
    scanner.fails, scanner.on_unavailable = UNAVAILABLE, "hold"
    ref = await manager.put_bytes(content=content, **SLOT)
    scanner.fails = None
    assert ref.scan is not None
    assert ref.scan["status"] == "pending"
    return ref


async def test_what_is_clean_is_served() -> None:
    scanner = ScriptedScanner()
    manager = make_manager(scanner)
    ref = await held(manager, scanner)
    newer = StoredObjectRef.from_dict({**ref.to_dict(), "of a newer version": 1})
    scanned = await manager.scan(newer)
    require_scanned(scanned)
    assert scanned.scan is not None
    assert (scanned.scan["status"], scanned.scan["by"]) == ("clean", "scripted 1")
    assert {**scanned.to_dict(), "scan": None} == {**newer.to_dict(), "scan": None}
    assert scanner.seen == [b"content" * 300_000]


async def test_what_is_infected_is_kept_and_not_served() -> None:
    scanner = ScriptedScanner()
    manager = make_manager(scanner)
    ref = await manager.scan(await held(manager, scanner, INFECTED))
    assert ref.scan is not None
    assert (ref.scan["status"], ref.scan["signature"]) == ("infected", "Eicar-Test")
    with pytest.raises(InfectedObjectError):
        require_scanned(ref)
    assert await manager.get(ref) == INFECTED


@pytest.mark.parametrize("trouble", ["unavailable", "fails", "reads nothing", "hangs", "says nothing"])
async def test_what_cannot_be_judged(trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scanner = ScriptedScanner()
    manager = make_manager(scanner)
    ref = await held(manager, scanner)
    match trouble:
        case "unavailable":
            scanner.fails = UNAVAILABLE
        case "fails":
            scanner.fails = ZeroDivisionError("a mistake")
        case "reads nothing":
            scanner.reads = False
        case "hangs":
            scanner.hangs = True
            monkeypatch.setattr(scanning, "_LONGEST_SCAN", 0.05)
        case _:
            monkeypatch.setattr(ScriptedScanner, "scan", say_nothing)
    with pytest.raises(ScannerUnavailableError):
        await manager.scan(ref)
    await manager.aclose()


async def say_nothing(self: ScriptedScanner, content: AsyncIterator[bytes], /) -> ScanResult:
    return None  # type: ignore[return-value]


@pytest.mark.parametrize("was_read", [True, False])
@pytest.mark.parametrize(
    "outcome", [ScanResult(True, "x 1"), ScanResult(False, "x 1", "bad"), UNAVAILABLE, TimeoutError("late"), None], ids=str
)
async def test_one_judgement_for_streams_and_objects(outcome: object, was_read: bool) -> None:
    """What a scanner says of an upload, it would say of the object."""

    class Stub:
        on_unavailable: OnUnavailable = "refuse"

        async def scan(self, content: AsyncIterator[bytes], /) -> ScanResult:
            if was_read:
                assert [piece async for piece in content]
            if isinstance(outcome, Exception):
                raise outcome
            return cast(ScanResult, outcome)

    said: list[str] = []
    plain = make_manager(None)
    ref = await plain.put_bytes(content=b"content", **SLOT)
    scanning = StorageManager(backends=plain.backends, policies={"files": StoragePolicy("files", "memory", scanner=Stub())})
    for scan in (partial(scanning.put_bytes, content=b"content", **SLOT), partial(scanning.scan, ref)):
        try:
            part = (await scan()).scan
            assert part is not None
            said.append(part["status"])
        except (ScannerUnavailableError, InfectedContentError) as error:
            said.append("infected" if isinstance(error, InfectedContentError) else str(error))
    assert said[0] == said[1]


async def test_an_object_that_cannot_be_read() -> None:
    """Its own error is raised, whatever the scanner makes of it."""

    class Hiding(ScriptedScanner):
        async def scan(self, content: AsyncIterator[bytes], /) -> ScanResult:
            try:
                return await super().scan(content)
            except ChecksumMismatchError as error:
                raise RuntimeError("something went wrong") from error

    scanner = Hiding()
    manager = make_manager(scanner)
    ref = await held(manager, scanner)
    with pytest.raises(ChecksumMismatchError):
        await manager.scan(replace(ref, checksum="sha256:" + "0" * 64))
    await manager.delete(ref)
    with pytest.raises(ObjectNotFoundError):
        await manager.scan(ref)


async def test_without_a_scanner() -> None:
    manager = make_manager(None)
    ref = await manager.put_bytes(content=b"x", **SLOT)
    with pytest.raises(ConfigurationError, match="has no scanner"):
        await manager.scan(ref)
    with pytest.raises(UnknownPolicyError):
        await manager.scan(replace(ref, storage_key="others"))


async def test_synchronous() -> None:
    scanner = ScriptedScanner()
    manager = make_manager(scanner)
    ref = await held(manager, scanner)
    scanned = await asyncio.to_thread(manager.sync.scan, ref)
    assert scanned.scan is not None
    assert scanned.scan["status"] == "clean"
    await asyncio.to_thread(manager.sync.close)


async def test_a_migration_holds_nothing_back() -> None:
    """It records no job, so what it stores is judged or refused, and nothing is left of it."""
    manager = make_manager(ScriptedScanner("hold", fails=UNAVAILABLE))
    place = sources.Place("files", "letter", (1,), "file")
    with pytest.raises(ScannerUnavailableError, match="run it again"):
        await sources.store_bytes(manager, place, b"content", None, None)
    assert [info async for info in manager.list(storage_key="files")] == []
