"""The triggers of SQLite: objects and references agree, whichever client writes the rows; with the cases of PostgreSQL."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Computed,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
    create_engine,
    event,
    func,
    select,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import ConfigurationError, StoredObjectRef
from granite_storage.cli.doctor import CheckResult, _check_journal
from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm import Attachment, AttachmentType, StoredObjectRefType, attachment, journal_tables, storage_triggers
from granite_storage.orm.journal.deletes import _renaming
from granite_storage.orm.journal.triggers import drop_triggers, find_trigger_problems
from granite_storage.orm.journal.variant_jobs import VariantJobs
from tests.orm.conftest import new_database
from tests.orm.databases import Database
from tests.orm.derivations import Upper
from tests.orm.environment import OrmEnvironment, file, orm_environment
from tests.orm.journal.guarded import locations, refused, run, stored, stored_with_variant
from tests.orm.journal.sharing import steps_are_watched, worker
from tests.orm.journal.test_recovery import expire, journal_of, rows


class Base(DeclarativeBase):
    pass


class Doc(Base):
    __tablename__ = "doc"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(100), default="", server_default="")
    code: Mapped[str | None] = mapped_column(String(10), unique=True)
    shelf: Mapped[int | None]
    place: Mapped[int | None]
    file: Mapped[Attachment | None] = attachment("docs")
    other: Mapped[Attachment | None] = attachment("docs")
    __table_args__ = (
        UniqueConstraint("shelf", "place"),
        Index("ix_title", "title", unique=True, sqlite_where=text("title <> ''")),
    )


class Link(Base):
    """Holds a ref by hand: nobody nominates it, and it is evidence all the same."""

    __tablename__ = "link"
    id: Mapped[int] = mapped_column(primary_key=True)
    ref: Mapped[StoredObjectRef | None] = mapped_column(StoredObjectRefType())


class Parent(Base):
    __tablename__ = "parent"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("docs")


class Child(Base):
    __tablename__ = "child"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int] = mapped_column(ForeignKey("parent.id", ondelete="CASCADE"))
    file: Mapped[Attachment | None] = attachment("docs")


class Grandchild(Base):
    __tablename__ = "grandchild"
    id: Mapped[int] = mapped_column(primary_key=True)
    child_id: Mapped[int] = mapped_column(ForeignKey("child.id", ondelete="CASCADE"))
    file: Mapped[Attachment | None] = attachment("docs")


class Node(Base):
    """Its rows cascade to others of the same table."""

    __tablename__ = "node"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("node.id", ondelete="CASCADE"))
    file: Mapped[Attachment | None] = attachment("docs")


class Word(Base):
    """Has no rowid, and a key that is the same in upper and lower case."""

    __tablename__ = "word"
    id: Mapped[str] = mapped_column(String(20, collation="NOCASE"), primary_key=True)
    file: Mapped[Attachment | None] = attachment("docs")
    __table_args__ = {"sqlite_with_rowid": False}


class Odd(Base):
    __tablename__ = "the 'odd' \"table\""
    id: Mapped[int] = mapped_column("Rowid", primary_key=True)
    file: Mapped[Attachment | None] = mapped_column("the 'odd' \"file\"", AttachmentType("docs"))


class Slot(Base):
    """Has unique values that are not those of the statement: one with a default, and one that is generated."""

    __tablename__ = "slot"
    id: Mapped[int] = mapped_column(primary_key=True)
    code: Mapped[str] = mapped_column(String(10), unique=True, server_default="x")
    number: Mapped[int | None]
    doubled: Mapped[int | None] = mapped_column(Computed("number * 2", persisted=True), unique=True)
    file: Mapped[Attachment | None] = attachment("docs")


class Picture(Base):
    """Has a variant that the journal's worker makes."""

    __tablename__ = "picture"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("docs", variants={"upper": Upper()})


journal_tables(Base.metadata)
storage_triggers(Base.metadata)


@pytest.fixture(scope="session")
async def database(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    """SQLite, with a database of these tests' own: its tables have triggers."""
    async with new_database(request, "sqlite-journal") as found:
        yield found


@pytest.fixture
async def env(database: Database) -> AsyncIterator[OrmEnvironment]:
    """Empty tables with triggers, an empty storage and a journal; afterwards recovery leaves what rows refer to, and no more."""
    async with orm_environment(database, journaled=True, base=Base) as env:
        async with env.engine.begin() as connection:
            for table in journal_tables(Base.metadata).all[:3]:
                await connection.execute(table.delete())
        yield env
        await env.recover()
        assert await env.objects() == await referenced(env)


async def referenced(env: OrmEnvironment) -> set[str]:
    return locations(*(await env.references()).values())


async def nominated(env: OrmEnvironment) -> set[str]:
    """Return what waits to be deleted; each object has one intent."""
    found = [row for row in await rows(env, "intent") if row.kind == "delete"]
    assert len({row.location for row in found}) == len(found)
    return {row.location for row in found}


async def fill(env: OrmEnvironment) -> dict[str, StoredObjectRef]:
    """Commit rows of each table."""
    first = {
        "doc": Doc(id=1, title="one", code="a", shelf=1, place=1, file=file("a")),
        "second": Doc(id=2, title="two", code="b", shelf=1, place=2, file=file("b")),
        "parent": Parent(id=1, file=file("p")),
        "node": Node(id=1, file=file("n")),
        "word": Word(id="Word", file=file("w")),
        "odd": Odd(id=1, file=file("o")),
        "slot": Slot(id=1, code="x", number=1, file=file("s")),
        "next": Slot(id=2, code="y", number=2, file=file("t")),
    }
    later = {"child": Child(id=1, parent_id=1, file=file("c")), "leaf": Node(id=2, parent_id=1, file=file("l"))}
    last = {"grandchild": Grandchild(id=1, child_id=1, file=file("g")), "twig": Node(id=3, parent_id=2, file=file("t"))}
    refs: dict[str, StoredObjectRef] = {}
    for group in (first, later, last):
        refs |= dict(zip(group, await stored(env, *group.values()), strict=True))
    return refs


TAKEN_OUT = {
    "DELETE FROM doc": {"doc", "second"},
    "DELETE FROM doc WHERE id = 1": {"doc"},
    "UPDATE doc SET file = NULL WHERE id = 2": {"second"},
    "UPDATE doc SET file = (SELECT p.file FROM parent p) WHERE id = 1": {"doc"},
    "UPDATE doc SET file = p.file FROM parent p WHERE doc.id = 1": {"doc"},
    "INSERT INTO doc (id) VALUES (1) ON CONFLICT (id) DO UPDATE SET file = excluded.file": {"doc"},
    "DELETE FROM parent": {"parent", "child", "grandchild"},
    "DELETE FROM node WHERE id = 1": {"node", "leaf", "twig"},
    "DELETE FROM word WHERE id = 'WORD'": {"word"},
    'DELETE FROM "the \'odd\' ""table"""': {"odd"},
    "UPDATE doc SET title = 'other' WHERE id = 1": set(),
    "UPDATE doc SET file = json_set(file, '$.content_type', 'text/plain') WHERE id = 1": set(),
    # What pushes rows out without deleting them.
    "REPLACE INTO doc (id) VALUES (1)": {"doc"},
    "REPLACE INTO doc (code) VALUES ('b')": {"second"},
    "REPLACE INTO doc (shelf, place) VALUES (1, 2)": {"second"},
    "REPLACE INTO doc (title) VALUES ('one')": {"doc"},
    "REPLACE INTO doc (id, code) VALUES (1, 'b')": {"doc", "second"},
    "REPLACE INTO doc (rowid) VALUES (2)": {"second"},
    "INSERT OR REPLACE INTO doc (id, code) SELECT id + 1, 'new' FROM doc WHERE id = 1": {"second"},
    "UPDATE OR REPLACE doc SET id = 2 WHERE id = 1": {"second"},
    "UPDATE OR REPLACE doc SET rowid = 2 WHERE id = 1": {"second"},
    "UPDATE OR REPLACE doc SET code = 'b' WHERE id = 1": {"second"},
    "UPDATE OR REPLACE doc SET place = 1 WHERE id = 2": {"doc"},
    "UPDATE OR REPLACE doc SET title = 'two', file = NULL WHERE id = 1": {"doc", "second"},
    "REPLACE INTO word VALUES ('WORD', NULL)": {"word"},
    'REPLACE INTO "the \'odd\' ""table""" ("Rowid") VALUES (1)': {"odd"},
    "REPLACE INTO parent VALUES (1, NULL)": {"parent", "child", "grandchild"},
    "REPLACE INTO slot (code) VALUES (NULL)": {"slot"},
    "REPLACE INTO slot (id) VALUES (9)": {"slot"},
    "UPDATE OR REPLACE slot SET code = NULL WHERE id = 2": {"slot"},
    "REPLACE INTO slot (code, number) VALUES ('z', 2)": {"next"},
    "UPDATE OR REPLACE slot SET number = 1 WHERE id = 2": {"slot"},
    "UPDATE slot SET number = 9, code = 'z' WHERE id = 2": set(),
}


@pytest.mark.parametrize("is_recursive", [False, True])
@pytest.mark.parametrize("statement", TAKEN_OUT)
async def test_what_a_statement_takes_out_of_rows(env: OrmEnvironment, statement: str, is_recursive: bool) -> None:
    refs = await fill(env)
    async with env.engine.connect() as connection:
        await connection.exec_driver_sql(f"PRAGMA recursive_triggers = {is_recursive:d}")
        await connection.rollback()
        await connection.execute(text(statement))
        await connection.commit()
        await connection.exec_driver_sql("PRAGMA recursive_triggers = 0")
    assert await nominated(env) == {refs[name].location for name in TAKEN_OUT[statement]}
    assert (await journal_of(env).recover()).deleted == len(TAKEN_OUT[statement])


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO doc (id, title) VALUES (1, 'x') ON CONFLICT (id) DO UPDATE SET title = excluded.title",
        "INSERT INTO doc (id) VALUES (1) ON CONFLICT DO NOTHING",
        "INSERT OR IGNORE INTO doc (id) VALUES (1)",
        "UPDATE OR IGNORE doc SET id = 2 WHERE id = 1",
        "UPDATE doc SET id = 3 WHERE id = 1",
    ],
)
async def test_what_might_be_pushed_out_and_stays(env: OrmEnvironment, statement: str) -> None:
    refs = await fill(env)
    await run(env, statement)
    assert await nominated(env) <= {refs["doc"].location, refs["second"].location}
    assert (await journal_of(env).recover()).deleted == 0


@pytest.mark.parametrize("how", ["ABORT", "FAIL", "IGNORE", "REPLACE", "ROLLBACK"])
async def test_what_is_nominated_twice(env: OrmEnvironment, how: str) -> None:
    """The conflict of the statement is not that of what its triggers write; the latest due time counts."""
    [ref] = await stored(env, Doc(id=1, file=file("a")))
    await run(env, "INSERT INTO doc (id, file) SELECT 2, file FROM doc", f"UPDATE OR {how} doc SET file = NULL WHERE id = 1")  # noqa: S608
    await run(env, "UPDATE granite_storage_intent SET due = '9000-01-01 00:00:00.000000'")
    await run(env, f"UPDATE OR {how} doc SET file = NULL WHERE id = 2")  # noqa: S608
    [intent] = await rows(env, "intent")
    assert (intent.location, intent.due.year) == (ref.location, 9000)
    await run(env, "UPDATE granite_storage_intent SET due = '2000-01-01 00:00:00.000000'")
    await run(env, f"INSERT OR {how} INTO doc (id, file) VALUES (3, {{ref}})", "DELETE FROM doc WHERE id = 3", ref=ref)  # noqa: S608
    [intent] = await rows(env, "intent")
    assert intent.due.year > 2000


@pytest.mark.parametrize("is_last", [False, True])
async def test_intents_are_found_by_their_locations(env: OrmEnvironment, is_last: bool) -> None:
    """Without statistics SQLite takes either of two indexes, as they were made; that over backends finds all of a backend's."""
    due, location = (index for index in sorted(journal_tables(Base.metadata).intent.indexes, key=lambda index: str(index.name)))
    async with env.engine.begin() as connection:
        for index in (due, location) if not is_last else (location, due):
            await connection.run_sync(index.drop)
            await connection.run_sync(index.create)
    async with env.engine.connect() as connection:
        made = await connection.scalar(text("SELECT sql FROM sqlite_master WHERE name = 'granite_storage_delete1_doc'"))
        made = made.replace('OLD."file"', "''").replace('OLD."id"', "1")
        renaming = str(_renaming(journal_tables(Base.metadata).intent).compile(dialect=connection.dialect))
        for statement in (made.partition("BEGIN")[2].rpartition(";")[0], renaming):
            values = ("",) * statement.count("?")
            plan = [row[3] for row in await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)]
            assert any(str(location.name) in line for line in plan), plan
            assert not any(str(due.name) in line for line in plan), plan


class TestGuard:
    async def test_an_object_that_is_unknown(self, env: OrmEnvironment) -> None:
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "DELETE FROM doc", "DELETE FROM granite_storage_intent")
        await env.backend.delete(ref.location)
        await stored(env, Doc(id=1, file=file("b")), Parent(id=1))
        for statement in (
            "INSERT INTO doc (id, file) VALUES (2, {ref})",
            "UPDATE doc SET file = {ref}",
            "INSERT INTO word VALUES ('a', {ref})",
            'INSERT INTO "the \'odd\' ""table""" VALUES (1, {ref})',
            # Rows of one statement do not vouch for each other, nor columns of one row.
            "INSERT INTO doc (id, file) VALUES (2, {ref}), (3, {ref})",
            "INSERT INTO doc (id, file, other) VALUES (2, {ref}, {ref})",
            "UPDATE doc SET file = {ref}, other = {ref}",
            "INSERT INTO doc (id, file) VALUES (2, {ref}), (1, {ref}) ON CONFLICT (id) DO UPDATE SET file = excluded.file",
            *(f"INSERT OR {how} INTO doc (id, file) VALUES (1, {{ref}})" for how in ("FAIL", "IGNORE", "REPLACE", "ROLLBACK")),  # noqa: S608
            *(f"UPDATE OR {how} doc SET file = {{ref}}" for how in ("FAIL", "IGNORE", "REPLACE", "ROLLBACK")),  # noqa: S608
        ):
            assert await refused(env, statement, ref=ref), statement
        assert len(await env.references()) == 1

    @pytest.mark.parametrize("moment", ["BEFORE", "AFTER"])
    async def test_rows_that_a_trigger_of_the_application_writes_do_not_vouch(self, env: OrmEnvironment, moment: str) -> None:
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "DELETE FROM doc", "DELETE FROM granite_storage_intent")
        await env.backend.delete(ref.location)
        await env.sql(
            f"CREATE TRIGGER copy_up {moment} INSERT ON doc BEGIN INSERT INTO parent VALUES (NEW.id, NEW.file);"  # noqa: S608
            " UPDATE doc SET title = NEW.id WHERE id = NEW.id; END"
        )
        try:
            assert await refused(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)
            # And what is known comes in by the same way.
            [known] = await stored(env, Word(id="a", file=file("b")))
            assert not await refused(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=known)
        finally:
            await env.sql("DROP TRIGGER copy_up")

    @pytest.mark.parametrize("moment", ["BEFORE", "AFTER"])
    async def test_a_trigger_of_the_application_that_keeps_what_is_deleted(self, env: OrmEnvironment, moment: str) -> None:
        """The row vouches for its object until it is deleted; afterwards its intent does, which may not be there yet."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        copy = "INSERT INTO parent VALUES (OLD.id, OLD.file)"
        await env.sql(f"CREATE TRIGGER keep {moment} DELETE ON doc BEGIN {copy}; END")
        try:
            assert await refused(env, "DELETE FROM doc") == (moment == "AFTER")
        finally:
            await env.sql("DROP TRIGGER keep")
        assert (await journal_of(env).recover()).kept == (moment == "BEFORE")
        assert await env.objects() == {ref.location}

    async def test_a_copy_of_what_a_row_holds(self, env: OrmEnvironment) -> None:
        await stored(env, Doc(id=1, file=file("a")), Word(id="a", file=file("b")))
        await run(env, "INSERT INTO doc (id, file, other) SELECT 2, file, file FROM doc")
        await run(env, "UPDATE doc SET other = (SELECT w.file FROM word w)", "INSERT INTO parent SELECT id, other FROM doc")
        await run(env, "REPLACE INTO doc (id, file, other) SELECT id, file, other FROM doc")
        await run(env, "DELETE FROM doc", "DELETE FROM word")
        assert (await journal_of(env).recover()).deleted == 1
        assert len(await env.objects()) == 1

    async def test_swaps(self, env: OrmEnvironment) -> None:
        one, two = await stored(env, Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        await run(env, "UPDATE doc SET file = CASE id WHEN 1 THEN {two} ELSE {one} END", one=one, two=two)
        await run(env, "UPDATE doc SET file = NULL, other = file")
        held = {key: ref.location for (_, key, _), ref in (await env.references()).items()}
        assert held == {1: two.location, 2: one.location}
        assert (await journal_of(env).recover()).kept == 2

    async def test_an_undo(self, env: OrmEnvironment) -> None:
        """By SQL, in the same transaction, after a savepoint, and after the COMMIT."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        async with env.engine.begin() as connection:
            async with connection.begin_nested():
                await run(connection, "DELETE FROM doc")
            await run(connection, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)
            savepoint = await connection.begin_nested()
            await run(connection, "DELETE FROM doc")
            await savepoint.rollback()
        await run(env, "DELETE FROM doc")
        await run(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)
        assert (await journal_of(env).recover()).kept == 1

    async def test_a_newer_intent_of_what_is_being_deleted(self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two rows share the object; the second one is deleted after the fence, and its intent is no evidence."""
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "INSERT INTO doc (id, file) SELECT 2, file FROM doc", "DELETE FROM doc WHERE id = 1")
        with steps_are_watched(monkeypatch):
            async with worker(env, "_check"):
                await run(env, "DELETE FROM doc")
                assert await nominated(env) == {ref.location}
                assert await refused(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)

    async def test_what_is_no_ref(self, env: OrmEnvironment) -> None:
        """It names no object, so there is nothing to guard or to nominate; what is no JSON is no value of the column."""
        for value in (
            "'{}'",
            "'null'",
            "'[1]'",
            """'{"variants"\\: [1, {}, {"location"\\: null}]}'""",
            """'{"variants"\\: "x"}'""",
        ):
            await run(env, f"INSERT INTO doc (id, file) VALUES (1, {value})", "UPDATE doc SET file = NULL", "DELETE FROM doc")  # noqa: S608
        assert await nominated(env) == set()
        with pytest.raises(Exception, match="malformed JSON"):
            await run(env, "INSERT INTO doc (id, file) VALUES (1, 'x')")


class TestVariants:
    @pytest.fixture
    async def ref(self, env: OrmEnvironment) -> StoredObjectRef:
        return await stored_with_variant(env)

    @pytest.mark.parametrize("statement", ["DELETE FROM doc", "REPLACE INTO doc (id) VALUES (1)", "UPDATE doc SET file = NULL"])
    async def test_they_have_their_original_as_their_source(
        self, env: OrmEnvironment, ref: StoredObjectRef, statement: str
    ) -> None:
        await run(env, statement)
        sources = {row.location: row.source for row in await rows(env, "intent")}
        assert sources == {one: None if one == ref.location else ref.location for one in locations(ref)}

    async def test_that_are_unknown(self, env: OrmEnvironment, ref: StoredObjectRef) -> None:
        unknown = ref.with_variants({"big": StoredObjectRef.from_dict({**ref.to_dict(), "location": "x", "variants": None})})
        for statement in ("INSERT INTO doc (id, file) VALUES (2, {ref})", "UPDATE doc SET file = {ref}"):
            assert await refused(env, statement, ref=unknown)


class TestSessions:
    async def test_an_undo(self, env: OrmEnvironment) -> None:
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        await run(env, "DELETE FROM doc")
        await env.add(Doc(id=2, file=Attachment.restore(ref)))
        assert await nominated(env) == set()

    async def test_an_undo_of_what_it_has_deleted_itself(self, env: OrmEnvironment) -> None:
        [ref] = await stored(env, Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            await session.delete(await session.get_one(Doc, 1))
        await env.add(Doc(id=2, file=Attachment.restore(ref)))
        assert await nominated(env) == set()

    async def test_its_uploads(self, env: OrmEnvironment) -> None:
        """Their intents are in the sidecar; what a flush notes for the triggers ends with it, and with a savepoint."""
        kept = await Attachment(b"a").store(Doc.file)
        async with env.sessions.begin() as session:
            session.add(Doc(id=1, file=kept, other=file("b")))
            with contextlib.suppress(ZeroDivisionError):
                async with session.begin_nested():
                    session.add(Doc(id=2, file=file("c")))
                    await session.flush()
                    raise ZeroDivisionError
            session.add(Doc(id=3, file=file("d")))
            await session.flush()
            assert await session.scalar(text("SELECT count(*) FROM granite_storage_decision")) == 0
        assert {key for _, key, _ in await env.references()} == {1, 3}

    async def test_an_upload_that_a_worker_has_reclaimed(self, env: OrmEnvironment) -> None:
        stored = await Attachment(b"a").store(Doc.file)
        await expire(env)
        await journal_of(env).recover()
        with pytest.raises(StaleAttachmentError):
            await env.add(Doc(id=1, file=stored))
        assert await rows(env, "decision") == []

    async def test_what_it_notes_and_does_not_delete(self, env: OrmEnvironment) -> None:
        """A listener fails after the note and before the flush, and the application commits: no row may come in by that."""
        async with env.sessions() as session:

            @event.listens_for(session.sync_session, "before_flush")
            def fail(*_: object) -> None:
                raise ZeroDivisionError

            session.add(doc := Doc(id=1, file=file("a")))
            with pytest.raises(ZeroDivisionError):
                await session.flush()
            assert doc.file is not None
            ref = doc.file.ref
            session.expunge(doc)
            event.remove(session.sync_session, "before_flush", fail)
            assert await session.scalar(text("SELECT count(*) FROM granite_storage_decision")) == 1
            await session.commit()
        await expire(env)
        await journal_of(env).recover()
        assert await env.objects() == set()
        assert await rows(env, "decision") == []
        assert await refused(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=ref)

    async def test_uploads_of_another_program(self, env: OrmEnvironment) -> None:
        """The triggers cannot reach the sidecar, so SQL that bypasses the sessions cannot bring in what is being stored."""
        stored = await Attachment(b"a").store(Doc.file)
        assert await refused(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", ref=stored.ref)
        await env.add(Doc(id=1, file=stored))

    async def test_a_variant_that_is_reclaimed_before_a_worker_sets_it(
        self, env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish = VariantJobs._publish

        async def late(self: VariantJobs, jobs: Any, made: Any, ids: Any) -> Any:
            await expire(env)
            await journal_of(env)._recover("store")
            return await publish(self, jobs, made, ids)

        await env.add(Picture(id=1, file=file("a")))
        with monkeypatch.context() as patch:
            patch.setattr(VariantJobs, "_publish", late)
            assert (await journal_of(env).recover()).derived == 0
        [job] = await rows(env, "job")
        assert (job.attempts, job.dead) == (0, False)
        assert await rows(env, "decision") == []
        await run(env, "UPDATE granite_storage_job SET due = '2000-01-01 00:00:00.000000'")
        assert (await journal_of(env).recover()).derived == 1

    async def test_triggers_are_none_of_the_application(self, env: OrmEnvironment) -> None:
        """A flush reads the rows of tables again that have triggers which it does not know."""
        statements: list[str] = []
        async with env.sessions() as session:
            connection = (await session.connection()).sync_connection

            @event.listens_for(connection, "before_cursor_execute")
            def note(*args: Any) -> None:
                statements.append(args[2])

            session.add(Doc(id=1, file=file("a")))
            await session.flush()
            await session.commit()
        assert [one for one in statements if one.startswith("SELECT doc.id")] == []


class TestRetention:
    async def test_of_its_policy_or_the_longest(self, env: OrmEnvironment) -> None:
        refs = await stored(env, *(Doc(id=number, file=file(str(number))) for number in range(4)))
        await journal_of(env).check()
        await env.sql("UPDATE granite_storage_meta SET value = '604800' WHERE name = 'retention\\:docs'")
        try:
            await run(env, "DELETE FROM doc WHERE id = 0", "UPDATE doc SET file = NULL WHERE id = 1")
            await run(env, "REPLACE INTO doc (id) VALUES (3)")
            await run(env, "UPDATE doc SET file = json_set(file, '$.storage_key', 'unknown')", "DELETE FROM doc")
            report = await journal_of(env).recover()
            assert (report.claimed, report.waiting) == (0, 4)
            assert await nominated(env) == locations(*refs)
            days = func.julianday(journal_tables(Base.metadata).intent.c.due) - func.julianday("now")
            async with env.engine.connect() as connection:
                assert {round(found) for found in await connection.scalars(select(days))} == {7}
        finally:
            await journal_of(env).check()
        async with env.engine.connect() as connection:
            found = await connection.execute(text("SELECT value FROM granite_storage_meta WHERE name = 'retention\\:docs'"))
        assert [float(value) for value in found.scalars()] == [0.0]


class TestChecks:
    async def problems(self, env: OrmEnvironment) -> list[str]:
        return await journal_of(env).find_trigger_problems()

    async def told_by_doctor(self, env: OrmEnvironment) -> list[CheckResult]:
        return [check.result async for check in _check_journal(env.binding) if check.what == "triggers"]

    async def test_what_is_wrong(self, env: OrmEnvironment, caplog: pytest.LogCaptureFixture) -> None:
        assert await self.problems(env) == []
        await env.sql("DROP TRIGGER granite_storage_delete1_doc")
        await env.sql("DROP TRIGGER granite_storage_update1_parent")
        await env.sql("CREATE TRIGGER granite_storage_update1_parent AFTER UPDATE ON parent BEGIN SELECT 1; END")
        await env.sql("DROP INDEX ix_granite_storage_location_link_ref")
        await env.sql("CREATE UNIQUE INDEX another ON child (file)")
        try:
            order = ("doc", "parent", "child", "link")
            found = {
                name: problem for problem in await self.problems(env) for name in order if f"{name} " in problem.partition(":")[0]
            }
            assert found["doc"].startswith("doc lacks the triggers granite_storage_delete1_doc: create them with create_all")
            assert found["parent"].startswith("the triggers granite_storage_update1_parent of parent are of another version")
            assert found["child"].startswith(
                "the triggers granite_storage_rekey_child, granite_storage_replace_child of child are of another version, or for"
                " other columns or unique indexes"
            )
            assert found["link"].startswith("link has no index over the locations in ref")
            assert len(await self.problems(env)) == 4
            with caplog.at_level(logging.WARNING, "granite_storage"):
                await journal_of(env).check()
            assert len([record for record in caplog.records if "not covered" in record.message]) == 4
            assert await self.told_by_doctor(env) == [CheckResult.BAD] * 4
        finally:
            async with env.engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
            assert await self.problems(env) == []
            assert await self.told_by_doctor(env) == [CheckResult.GOOD]
            await env.sql("DROP INDEX another")
            async with env.engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)

    @pytest.mark.parametrize("name", ["id", "file", "code", "place"])
    async def test_a_column_that_is_renamed_there_and_back(self, env: OrmEnvironment, name: str) -> None:
        """SQLite changes the text of triggers with it, and writes the name of a primary key in place of the rowid."""
        await env.sql(f"ALTER TABLE doc RENAME COLUMN {name} TO renamed")
        await env.sql(f"ALTER TABLE doc RENAME COLUMN renamed TO {name}")
        assert await self.problems(env) == []

    def test_they_are_dropped_with_their_tables(self, tmp_path: Path) -> None:
        """And only those: SQLite drops the triggers of a table by itself, but not those of others that name it."""
        engine = create_engine(f"sqlite:///{tmp_path}/app.db")
        own = text("SELECT tbl_name FROM sqlite_master WHERE type = 'trigger'")
        with engine.begin() as connection:
            Base.metadata.create_all(connection)
            assert find_trigger_problems(connection, Base.metadata) == []
            drop_triggers(connection, [Base.metadata.tables["doc"], Base.metadata.tables["link"]])
            assert "doc" not in set(connection.scalars(own))
            assert "parent" in set(connection.scalars(own))
            Base.metadata.drop_all(connection)
            assert list(connection.scalars(own)) == []
        engine.dispose()

    def test_another_file(self, tmp_path: Path) -> None:
        """A trigger reaches the tables of its own file only."""
        metadata = MetaData()
        Table("thing", metadata, Column("id", Integer, primary_key=True), Column("file", AttachmentType("docs")), schema="apart")
        journal_tables(metadata)
        storage_triggers(metadata)
        engine = create_engine("sqlite://")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"ATTACH '{tmp_path}/apart.db' AS apart")
            with pytest.raises(ConfigurationError, match="thing reach only the database apart, and not main"):
                metadata.create_all(connection)
        engine.dispose()
