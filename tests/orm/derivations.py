"""Recipes that a test scripts, columns that declare them, and what a test asks of the variants in rows."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import select, update

from granite_storage import StoredObjectRef
from granite_storage.derived import Derivation, DerivationSource, Missing, Recipe, When
from granite_storage.exceptions import DerivationFailedError, DerivationRefusedError
from granite_storage.orm import AttachmentType, StorageJournal
from granite_storage.orm.journal.tables import clock
from tests.orm.environment import Base, Doc, OrmEnvironment

__all__ = [
    "Gate",
    "Upper",
    "column_type",
    "declared",
    "declared_everywhere",
    "expected",
    "jobs",
    "journal_of",
    "make_due",
    "ref_of",
    "shown",
    "stopped_in",
]


class Gate:
    """Where a recipe waits until it is let through."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()


class Upper:
    """Makes text upper-case, behind a word of its own; by its content an original may be refused, or fail for now."""

    def __init__(
        self,
        word: str = "",
        *,
        when: When = "later",
        missing: Missing = "nothing",
        version: int = 1,
        folder: Path | None = None,
        accept: tuple[str, ...] | None = None,
    ) -> None:
        self.word = word
        self.when: When = when
        self.missing: Missing = missing
        self.version = version
        self.folder = folder
        self.accept = accept
        self.made: Counter[bytes] = Counter()
        self.refused: set[bytes] = set()
        self.failing: set[bytes] = set()
        self.error: BaseException | None = None
        self.media: dict[str, Any] = {}
        self.gate: Gate | None = None

    def digest(self, name: str, /) -> str:
        return f"upper:{self.word}:{self.version}:{name}"

    def result(self, content: bytes) -> bytes:
        """Return what it makes of a content."""
        return f"{self.word}{self.version}:".encode() + content.upper()

    @contextlib.asynccontextmanager
    async def make(self, source: DerivationSource, /) -> AsyncIterator[Derivation]:
        async with source.open() as chunks:
            content = b"".join([chunk async for chunk in chunks])
        if self.gate is not None:
            self.gate.reached.set()
            await self.gate.opened.wait()
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if content in self.refused:
            raise DerivationRefusedError("no text")
        if content in self.failing:
            raise DerivationFailedError("the process has died")
        self.made[content] += 1
        made = self.result(content)
        if self.folder is None:
            yield Derivation(made, "text/x-upper", {"letters": len(made), **self.media}, f"{self.word or 'upper'}.txt")
            await asyncio.sleep(0)
            return
        path = self.folder / f"{len(self.made)}-{sum(self.made.values())}"
        await asyncio.to_thread(path.write_bytes, made)
        try:
            yield Derivation(path, "text/x-upper")
        finally:
            await asyncio.to_thread(path.unlink)


def column_type(name: str = "file", model: Any = Doc) -> AttachmentType:
    """Return the type of a column."""
    found = model.__table__.c[name].type
    assert isinstance(found, AttachmentType)
    return found


@contextlib.contextmanager
def declared(recipes: Mapping[str, Recipe], *others: tuple[str, Mapping[str, Recipe]], model: Any = Doc) -> Iterator[None]:
    """Let a column, `file` of `doc`, declare variants while the block runs, and others as well."""
    with contextlib.ExitStack() as stack:
        for name, some in (("file", recipes), *others):
            found, made = column_type(name, model), AttachmentType("docs", variants=some)
            stack.callback(_declare, found, dict(found._variants))
            _declare(found, made._variants)
        yield


@contextlib.contextmanager
def declared_everywhere(recipes: Mapping[str, Recipe]) -> Iterator[None]:
    """Let every attachment column of the models declare variants while the block runs."""
    types = [column.type for table in Base.metadata.tables.values() for column in table.columns]
    with contextlib.ExitStack() as stack:
        for found in types:
            if isinstance(found, AttachmentType):
                stack.callback(_declare, found, dict(found._variants))
                _declare(found, AttachmentType("docs", variants=recipes)._variants)
        yield


def _declare(found: AttachmentType, variants: Mapping[str, Any]) -> None:
    found._variants.clear()  # SQLAlchemy has copies of the type, which share it
    found._variants.update(variants)


def journal_of(env: OrmEnvironment) -> StorageJournal:
    assert env.journal is not None
    return env.journal


async def jobs(env: OrmEnvironment) -> list[Any]:
    """Return the jobs that are recorded, by their keys."""
    async with env.engine.connect() as connection:
        job = journal_of(env).tables.job
        return list(await connection.execute(select(job).order_by(job.c.key)))


async def make_due(env: OrmEnvironment) -> None:
    """Let every lease and every pause of jobs be over."""
    async with env.engine.begin() as connection:
        await connection.execute(update(journal_of(env).tables.job).values(due=clock(-1.0)))


async def ref_of(env: OrmEnvironment, number: int = 1, column: str = "file") -> StoredObjectRef:
    return (await env.references())["doc", number, column]


async def shown(env: OrmEnvironment, number: int = 1, column: str = "file") -> dict[str, bytes]:
    """Return the variants that a row has, read from the storage."""
    ref = (await env.references()).get(("doc", number, column))
    variants = {} if ref is None else ref.variants or {}
    return {name: await env.manager.get(variant) for name, variant in variants.items()}


def expected(recipes: Mapping[str, Upper], content: bytes | str) -> dict[str, bytes]:
    """Return what the variants of a content are."""
    data = content.encode() if isinstance(content, str) else content
    return {name: recipe.result(data) for name, recipe in recipes.items()}


@contextlib.asynccontextmanager
async def stopped_in(env: OrmEnvironment, recipe: Upper) -> AsyncIterator[None]:
    """Let a worker make a variant, and go on only once the block has ended; it has ended then, too."""
    gate = recipe.gate = Gate()
    working = asyncio.create_task(journal_of(env).recover())
    try:
        async with asyncio.timeout(30):
            await gate.reached.wait()
        recipe.gate = None
        yield
    finally:
        gate.opened.set()
        await working
