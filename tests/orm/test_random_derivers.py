"""The random histories of sessions once more, on files with variants, while a worker and requests make what is missing.

Each row may show only variants of its very file. One that is made in the flush it always has; those that are made later, or when
they are asked for, it has once that was done. Objects are what rows refer to, variants included.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis.stateful import precondition, rule

from granite_storage.orm.journal import variant_jobs
from granite_storage.refs import iter_refs
from tests.orm.databases import Database, postgres_database, sqlite
from tests.orm.derivations import Upper, declared_everywhere
from tests.orm.environment import Doc
from tests.orm.test_random_sessions import EXAMPLES, Rows, Sessions, columns, ids, play, running

RECIPES = {"flushed": Upper("flushed", when="flush"), "asked": Upper("asked", when="request")}
LATER = {"later": Upper("later", when="later")}


class Derivers(Sessions):
    """The same sessions, with variants of their files."""

    made = 0
    shown = 0

    async def _seed(self) -> None:
        await self.env.recover()
        await super()._seed()
        await self.env.recover()

    @precondition(lambda self: self.started)
    @rule(number=ids, column=columns)
    def ask(self, number: int, column: str) -> None:
        """Ask for a variant of what a row has committed, once the session that is writing has ended."""
        if any(side.rows is not None for side in self.two):
            self.end("commit")
        if not self.committed:
            return
        number = sorted(self.committed)[number % len(self.committed)]
        content = self.committed[number][column]
        if content is None:
            return
        self.run(self._ask(number, column, content.encode()))
        type(self).made += 1

    async def _ask(self, number: int, column: str, content: bytes) -> None:
        async with self.env.sessions() as session:
            doc = await session.get_one(Doc, number)
        variant = await getattr(doc, column).variant("asked")
        assert await variant.read() == RECIPES["asked"].result(content)

    @precondition(lambda self: self.started and self.env.journal is not None)
    @rule()
    def work(self) -> None:
        """Let a worker do what is due, whatever the sessions are in the middle of."""
        assert self.env.journal is not None
        with pytest.MonkeyPatch.context() as patch:
            if any(side.rows is not None for side in self.two):
                # What a session has locked stays locked while the worker waits for it.
                patch.setattr(variant_jobs, "LONGEST_WAIT", 0.05)
            report = self.run(self.env.journal.recover())
        type(self).made += report.derived

    async def _locations(self) -> tuple[set[str], set[str]]:
        references = await self.env.references()
        return {one.location for ref in references.values() for one in iter_refs(ref)}, await self.env.objects()

    def agree(self) -> None:
        if self.env.journal is None:
            super().agree()
        else:
            self.run(self.env.check_recovery())
        self.run(self._require_own_variants(self.committed))

    async def _require_own_variants(self, rows: Rows) -> None:
        references = await self.env.references()
        recipes = RECIPES | LATER
        expected = {("doc", number, column) for number, row in rows.items() for column, held in row.items() if held is not None}
        assert set(references) == expected
        for (_, number, column), ref in references.items():
            content = (rows[number][column] or "").encode()
            assert await self.env.manager.get(ref) == content
            variants = ref.variants or {}
            assert "flushed" in variants
            for name, variant in variants.items():
                assert await self.env.manager.get(variant) == recipes[name].result(content)
                type(self).shown += name != "flushed"


@pytest.fixture(scope="session", params=["sqlite-begin", "asyncpg"])
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """A database for the loop of the machine."""
    server = None if request.param == "sqlite-begin" else request.getfixturevalue("postgres_server")
    with sqlite(request.param) if server is None else postgres_database(server, request.param) as found:
        yield found


@pytest.fixture
def machine(database: Database) -> Iterator[type[Derivers]]:
    """The machine on SQLite, and on PostgreSQL with a journal."""
    recipes = RECIPES if database.is_sqlite else RECIPES | LATER
    Derivers.made = Derivers.shown = 0
    with declared_everywhere(recipes), running(Derivers, database, journaled=not database.is_sqlite):
        yield Derivers


@pytest.mark.timeout(1800)
def test_derivers(machine: type[Derivers]) -> None:
    examples = max(EXAMPLES // 2, 8)
    play(machine, examples)
    assert machine.made
    assert machine.shown
