"""A scanner that does what a test says, an environment whose policy holds what it cannot judge, and what a test asks of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

from sqlalchemy import select, text, update

from granite_storage.exceptions import ScannerUnavailableError
from granite_storage.inspection import ScanResult
from granite_storage.inspection.base import OnUnavailable
from granite_storage.orm import StorageJournal
from granite_storage.orm.journal.tables import clock
from tests.orm.databases import Database
from tests.orm.environment import Doc, OrmEnvironment, file, orm_environment

__all__ = ["Gate", "ScriptedScanner", "hold", "jobs", "journal_of", "make_due", "scan_env", "status", "stopped_while_scanning"]

Verdict = Literal["clean", "infected", "down"]


class Gate:
    """Where a scan waits until it is let through."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()


class ScriptedScanner:
    """Judges by content. What it has no verdict for it cannot judge."""

    on_unavailable: OnUnavailable = "hold"

    def __init__(self) -> None:
        self.verdicts: dict[bytes, Verdict] = {}
        self.default: Verdict = "down"
        self.gates: dict[bytes, Gate] = {}
        self.judged: Counter[bytes] = Counter()
        self.asked: Counter[bytes] = Counter()

    @staticmethod
    def new_gate() -> Gate:
        """Return a gate, for `gates`."""
        return Gate()

    async def scan(self, content: AsyncIterator[bytes], /) -> ScanResult:
        whole = b"".join([piece async for piece in content])
        self.asked[whole] += 1
        verdict = self.verdicts.get(whole, self.default)
        if verdict == "down":
            raise ScannerUnavailableError("nobody answers")
        if (gate := self.gates.get(whole)) is not None:
            gate.reached.set()
            await gate.opened.wait()
        self.judged[whole] += 1
        return ScanResult(verdict == "clean", "scripted 1.0", None if verdict == "clean" else "Test.Virus")


@contextlib.asynccontextmanager
async def scan_env(database: Database, **options: Any) -> AsyncIterator[tuple[OrmEnvironment, ScriptedScanner]]:
    """Give an environment with a journal and a scanner that is down."""
    scanner = ScriptedScanner()
    async with orm_environment(database, journaled=True, scanner=scanner, **options) as env:
        yield env, scanner


def journal_of(env: OrmEnvironment) -> StorageJournal:
    assert env.journal is not None
    return env.journal


async def hold(env: OrmEnvironment, content: str = "a", number: int = 1) -> None:
    """Add a row whose file is held."""
    await env.add(Doc(id=number, title=f"number {number}", file=file(content)))
    assert await status(env, number) == "pending"


async def scan_part(env: OrmEnvironment, number: int = 1) -> Mapping[str, Any] | None:
    """Return what a row says of its scan."""
    ref = (await env.references()).get(("doc", number, "file"))
    return None if ref is None else ref.scan


async def status(env: OrmEnvironment, number: int = 1) -> str | None:
    """Return the status of a row's scan; None where the row has no file, or says nothing of a scan."""
    part = await scan_part(env, number)
    return None if part is None else part["status"]


async def jobs(env: OrmEnvironment) -> list[Any]:
    """Return the jobs that are recorded."""
    async with env.engine.connect() as connection:
        return list(await connection.execute(select(journal_of(env).tables.job)))


async def make_due(env: OrmEnvironment) -> None:
    """Let every lease and every pause of jobs be over."""
    async with env.engine.begin() as connection:
        await connection.execute(update(journal_of(env).tables.job).values(due=clock(-1.0)))


async def raw(env: OrmEnvironment, number: int = 1) -> str:
    """Return the text of a row's JSON."""
    async with env.engine.connect() as connection:
        found = await connection.execute(text(f"SELECT CAST(file AS CHAR(2000)) FROM doc WHERE id = {number}"))  # noqa: S608
        return str(found.scalar_one()).rstrip()


@contextlib.asynccontextmanager
async def stopped_while_scanning(
    env: OrmEnvironment, scanner: ScriptedScanner, content: bytes, verdict: Verdict
) -> AsyncIterator[None]:
    """Let a worker scan one content, and go on with the verdict only once the block has ended; it has ended then, too."""
    scanner.verdicts[content] = verdict
    gate = scanner.gates[content] = Gate()
    working = asyncio.create_task(journal_of(env).recover())
    try:
        async with asyncio.timeout(30):
            await gate.reached.wait()
        yield
    finally:
        gate.opened.set()
        await working
