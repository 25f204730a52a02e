"""Random histories of sessions, checked against a model that is two dictionaries.

Two sessions change the same rows in turns, with savepoints in any nesting, failures of the storage and of the database, and
identity maps that the other one has made stale. `GRANITE_SESSIONS` says how many histories to try and
`GRANITE_SEED` which; a failure says its seed, and the same seed gives the same histories.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from copy import deepcopy
from typing import Any, ClassVar, TypeAlias, TypeVar

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

from granite_storage.exceptions import BackendUnavailableError
from granite_storage.orm import Attachment
from tests.orm.databases import Database, sqlite
from tests.orm.environment import Doc, OrmEnvironment, file, orm_environment
from tests.tiers import repetitions, seed

EXAMPLES = repetitions("GRANITE_SESSIONS", default=16, exhaustive=2000)
SEED = seed()
STEPS = 14
COLUMNS = ["file", "other"]
LOCATIONS = select(*(getattr(Doc, name)["location"].as_string() for name in COLUMNS))

T = TypeVar("T")
Row: TypeAlias = dict[str, str | None]
Rows: TypeAlias = dict[int, Row]

sides = st.sampled_from([0, 1])
ids = st.integers(1, 4)
columns = st.sampled_from(COLUMNS)
contents = st.none() | st.sampled_from(["a", "b", "c", "a longer one"])


class Side:
    """A session, what its rows hold by the model, and the states to which its savepoints go back."""

    def __init__(self, session: AsyncSession) -> None:
        self.session = session
        self.rows: Rows | None = None
        self.savepoints: list[tuple[AsyncSessionTransaction, Rows]] = []
        self.seen: list[tuple[Attachment, str]] = []
        self.kept: set[Doc] = set()

    def among(self, number: int) -> int | None:
        """Return one of the rows that are there, or None if there are none: a step that does nothing finds nothing."""
        present = sorted(self.rows or ())
        return present[number % len(present)] if present else None


class Sessions(RuleBasedStateMachine):
    """Two sessions of which one writes at a time, as on SQLite."""

    env: ClassVar[OrmEnvironment]
    loop: ClassVar[asyncio.AbstractEventLoop]
    histories: ClassVar[int]

    @initialize(rows=st.dictionaries(ids, st.fixed_dictionaries({"file": contents, "other": contents}), max_size=3))
    def begin(self, rows: Rows) -> None:
        self.committed: Rows = deepcopy(rows)
        self.run(self._seed())
        self.two = [Side(self.env.sessions()), Side(self.env.sessions())]

    async def _seed(self) -> None:
        """Begin with these rows and their objects only, whatever a history that failed has left."""
        async with self.env.sessions.begin() as session:
            await session.execute(delete(Doc))
        for location in await self.env.objects():
            await self.env.backend.delete(location)
        await self.env.add(*(self._new(number, row) for number, row in self.committed.items()))

    @property
    def started(self) -> bool:
        return hasattr(self, "two")

    def teardown(self) -> None:
        if not self.started:
            return
        for side in self.two:
            self.run(side.session.close())
        self.agree()
        type(self).histories += 1

    # What the application does.

    @rule(side=sides, number=ids, first=contents, second=contents)
    def insert(self, side: int, number: int, first: str | None, second: str | None) -> None:
        one = self.writer(side)
        if number in one.rows:
            return
        row: Row = {"file": first, "other": second}
        one.session.add(self._new(number, row))
        one.rows[number] = row
        self.run(one.session.flush())

    @rule(side=sides, number=ids, column=columns, content=contents, flushes=st.booleans())
    def replace(self, side: int, number: int, column: str, content: str | None, flushes: bool) -> None:
        one = self.writer(side)
        number = one.among(number)
        if number is None:
            return
        doc = self.doc(one, number)
        if content is not None:
            self.see(one, doc, number, column)
        self.put(one, doc, number, column, None if content is None else file(content), content)
        if flushes:
            self.run(one.session.flush())

    @rule(side=sides, source=ids, from_column=columns, goal=ids, to_column=columns, keeps=st.booleans())
    def copy_or_move(self, side: int, source: int, from_column: str, goal: int, to_column: str, keeps: bool) -> None:
        one = self.writer(side)
        source, goal = one.among(source), one.among(goal)
        if source is None or (source, from_column) == (goal, to_column):
            return
        value = self.value(one, source, from_column)
        self.assign(one, goal, to_column, value, one.rows[source][from_column])
        if not keeps:
            self.assign(one, source, from_column, None, None)
        self.run(one.session.flush())

    @rule(side=sides, first=ids, first_column=columns, second=ids, second_column=columns)
    def swap(self, side: int, first: int, first_column: str, second: int, second_column: str) -> None:
        one = self.writer(side)
        first, second = one.among(first), one.among(second)
        if first is None:
            return
        values = self.value(one, first, first_column), self.value(one, second, second_column)
        held = one.rows[first][first_column], one.rows[second][second_column]
        self.assign(one, first, first_column, values[1], held[1])
        self.assign(one, second, second_column, values[0], held[0])
        self.run(one.session.flush())

    @rule(side=sides, number=ids, column=columns, which=st.integers(0, 5))
    def take_back(self, side: int, number: int, column: str, which: int) -> None:
        """Assign an attachment that a row held earlier in the same transaction."""
        one = self.writer(side)
        number = one.among(number)
        if number is None or not one.seen or one.savepoints:
            return
        attachment, content = one.seen[which % len(one.seen)]
        self.assign(one, number, column, attachment, content)
        self.run(one.session.flush())

    @rule(side=sides, number=ids)
    def delete(self, side: int, number: int) -> None:
        one = self.writer(side)
        if number not in one.rows:
            return
        self.run(one.session.delete(self.doc(one, number)))
        del one.rows[number]
        self.run(one.session.flush())

    @rule(side=sides, numbers=st.sets(ids, min_size=1), how=st.sampled_from([False, "fetch", "evaluate", "auto"]))
    def bulk_delete(self, side: int, numbers: set[int], how: Any) -> None:
        one = self.writer(side)
        self.run(one.session.flush())
        options = {"synchronize_session": how}
        self.run(one.session.execute(delete(Doc).where(Doc.id.in_(numbers)), execution_options=options))
        one.rows = {number: row for number, row in one.rows.items() if number not in numbers}
        one.session.expunge_all()

    @rule(side=sides, numbers=st.sets(ids, min_size=1), column=columns, listed=st.booleans())
    def bulk_update(self, side: int, numbers: set[int], column: str, listed: bool) -> None:
        one = self.writer(side)
        present = sorted(numbers & set(one.rows))
        if not present:
            return
        self.run(one.session.flush())
        if listed:
            self.run(one.session.execute(update(Doc), [{"id": number, column: None} for number in present]))
        else:
            self.run(one.session.execute(update(Doc).where(Doc.id.in_(numbers)).values({column: None})))
        for number in present:
            one.rows[number][column] = None
        one.session.expire_all()

    @rule(side=sides, number=ids)
    def forget(self, side: int, number: int) -> None:
        """Let a session not know what a row holds."""
        one = self.writer(side)
        number = one.among(number)
        if number is not None:
            self.run(one.session.flush())
            one.session.expire(self.doc(one, number))

    # What goes wrong.

    @rule(side=sides, number=ids, content=contents.filter(bool))
    def upload_fails(self, side: int, number: int, content: str) -> None:
        one = self.writer(side)
        number = one.among(number)
        if number is None:
            return
        self.run(one.session.flush())
        doc = self.doc(one, number)
        doc.file, doc.other = file(content), file(content)
        self.env.backend.fail("put_bytes", nth=2)
        with pytest.raises(BackendUnavailableError):
            self.run(one.session.flush())
        one.session.expire(doc)

    @rule(side=sides, content=contents.filter(bool))
    def insert_fails_in_a_savepoint(self, side: int, content: str) -> None:
        one = self.writer(side)
        if not one.rows:
            return
        self.run(one.session.flush())
        self.run(self._insert_twice(one, content))

    async def _insert_twice(self, one: Side, content: str) -> None:
        with contextlib.suppress(IntegrityError):
            async with one.session.begin_nested():
                one.session.add_all([Doc(id=50, code="x", file=file(content)), Doc(id=51, code="x", file=file(content))])

    # How transactions and savepoints end.

    @rule(side=sides)
    def savepoint(self, side: int) -> None:
        one = self.writer(side)
        if len(one.savepoints) < 3:
            one.savepoints.append((self.run(one.session.begin_nested()), deepcopy(one.rows)))

    @precondition(lambda self: self.open_savepoints())
    @rule(released=st.booleans())
    def end_savepoint(self, released: bool) -> None:
        side = next(side for side in self.two if side.savepoints)
        savepoint, before = side.savepoints.pop()
        if released:
            self.run(savepoint.commit())
        else:
            self.run(savepoint.rollback())
            side.rows, side.seen = before, []

    @precondition(lambda self: self.started and any(side.rows is not None for side in self.two))
    @rule(how=st.sampled_from(["commit", "commit", "rollback", "close"]))
    def end(self, how: str) -> None:
        side = next(side for side in self.two if side.rows is not None)
        self.run(getattr(side.session, how)())
        if how == "commit":
            assert side.rows is not None
            self.committed = side.rows
        side.rows, side.savepoints, side.seen = None, [], []
        self.agree()

    # What must be true.

    @invariant()
    def no_committed_file_is_missing(self) -> None:
        if self.started:
            referenced, objects = self.run(self._locations())
            assert referenced <= objects

    async def _locations(self) -> tuple[set[str], set[str]]:
        """Return where rows say that objects are, and where there are some; quickly, for it is asked after each step."""
        async with self.env.sessions() as session:
            rows = await session.execute(LOCATIONS)
            return {location for row in rows for location in row if location is not None}, await self.env.objects()

    def agree(self) -> None:
        """Check that rows, objects and model say the same."""
        expected = {f"{column}_{number}": content for number, row in self.committed.items() for column, content in row.items()}
        self.run(self.env.check(**(expected or {"file_0": None})))

    # Helpers.

    def open_savepoints(self) -> bool:
        return self.started and any(side.savepoints for side in self.two)

    def writer(self, side: int) -> Side:
        """Give the session that is writing, else the one that is asked for: SQLite has one at a time."""
        one = next((one for one in self.two if one.rows is not None), self.two[side])
        if one.rows is None:
            one.rows = deepcopy(self.committed)
            for (_, (number,), _), doc in list(one.session.identity_map.items()):
                if number not in one.rows:
                    one.session.expunge(doc)
        return one

    def doc(self, one: Side, number: int) -> Doc:
        """Load a row, and keep the instance: a session forgets at once what nobody holds, and then it is never stale."""
        doc: Doc = self.run(one.session.get_one(Doc, number))
        one.kept.add(doc)
        return doc

    def value(self, one: Side, number: int, column: str) -> Attachment | None:
        """Read what a row holds now: a stale value would be a lost update of the application."""
        doc = self.doc(one, number)
        if doc not in one.session.dirty:
            self.run(one.session.refresh(doc))
        self.see(one, doc, number, column)
        value: Attachment | None = self.run(one.session.run_sync(lambda _: getattr(doc, column)))
        return value

    def see(self, one: Side, doc: Doc, number: int, column: str) -> None:
        content = (one.rows or {})[number][column]
        value = doc.__dict__.get(column)
        if content is not None and isinstance(value, Attachment) and doc not in one.session.dirty and not self.is_stale(value):
            one.seen.append((value, content))

    def is_stale(self, value: Attachment) -> bool:
        return value.is_pending or value.location not in self.run(self.env.objects())

    def assign(self, one: Side, number: int, column: str, value: Attachment | None, content: str | None) -> None:
        self.put(one, self.doc(one, number), number, column, value, content)

    def put(self, one: Side, doc: Doc, number: int, column: str, value: Attachment | None, content: str | None) -> None:
        """Set an attribute, after a look at the row where a stale session remembers the same value: it would write nothing."""
        assert one.rows is not None
        if Doc.__table__.c[column].type.compare_values(doc.__dict__.get(column), value):
            with one.session.no_autoflush:
                self.run(one.session.refresh(doc, [column]))
        setattr(doc, column, value)
        one.rows[number][column] = content

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def _new(self, number: int, row: Row) -> Doc:
        return Doc(id=number, **{column: None if content is None else file(content) for column, content in row.items()})


@pytest.fixture(params=["asynchronous", "synchronous"])
def machine(request: pytest.FixtureRequest) -> Iterator[type[Sessions]]:
    """The machine on SQLite, with sessions of each kind."""
    with sqlite("sqlite") as database:
        database.is_synchronous = request.param == "synchronous"
        with running(Sessions, database):
            yield Sessions


@contextlib.contextmanager
def running(machine: type[Sessions], database: Database, **options: Any) -> Iterator[None]:
    """Give a machine an environment on a database, and a loop; keyword arguments go to the environment."""
    loop = asyncio.new_event_loop()
    context = orm_environment(database, **options)
    machine.histories = 0
    machine.env, machine.loop = loop.run_until_complete(context.__aenter__()), loop
    try:
        yield
    finally:
        loop.run_until_complete(context.__aexit__(None, None, None))
        loop.close()


def play(machine: type[Sessions], examples: int) -> None:
    """Play random histories, and check that all were played."""
    try:
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            hypothesis.seed(SEED)(machine),
            settings=settings(
                max_examples=examples,
                stateful_step_count=STEPS,
                deadline=None,
                print_blob=True,
                database=None,
                phases=[Phase.generate, Phase.shrink],
                verbosity=Verbosity.normal,
                suppress_health_check=list(HealthCheck),
            ),
        )
    except BaseException as error:
        error.add_note(f"GRANITE_SEED={SEED} GRANITE_SESSIONS={examples} replays it")
        raise
    assert machine.histories >= examples


@pytest.mark.case("CON-10")
@pytest.mark.timeout(1800)
def test_sessions(machine: type[Sessions]) -> None:
    play(machine, EXAMPLES)
