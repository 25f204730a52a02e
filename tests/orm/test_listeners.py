"""Listeners that change what a flush will do, after the library has planned it: objects and references agree all the same.

SQLAlchemy calls the listeners of a class before those of its subclasses, and these before those of one session, so any recipe for
soft deletes or audits may run after the library's own hook.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import delete, event, insert, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import ORMExecuteState, Session, make_transient, sessionmaker
from sqlalchemy.orm.attributes import get_history

from granite_storage.exceptions import InvalidReferenceError, StaleAttachmentError
from granite_storage.orm import Attachment
from tests.orm.environment import Child, Doc, Note, OrmEnvironment, Parent, Person, file


class OwnSession(Session):
    """A session class of the application's."""


Listener = Callable[..., Any]
Target = Callable[[AsyncSession], Any]

# Where an application puts its listeners; those on `Session` itself are called before or after ours, by the order of imports.
TARGETS: dict[str, Target] = {
    "Session, after ours": lambda _: Session,
    "Session, before ours": lambda _: Session,
    "a subclass": lambda _: OwnSession,
    "one session": lambda session: session.sync_session,
}


@contextlib.contextmanager
def listening(target: Any, name: str, listener: Listener, **options: Any) -> Iterator[None]:
    event.listen(target, name, listener, **options)
    try:
        yield
    finally:
        event.remove(target, name, listener)


@contextlib.asynccontextmanager
async def session_with(env: OrmEnvironment, where: str, listener: Listener, name: str = "before_flush") -> Any:
    """Give a session to which a listener belongs, and commit it."""
    sessions = async_sessionmaker(env.engine, expire_on_commit=False, sync_session_class=OwnSession)
    async with sessions() as session:
        options = {"insert": True} if where == "Session, before ours" else {}
        with listening(TARGETS[where](session), name, listener, **options):
            yield session
            await session.commit()


async def get(session: AsyncSession, number: int = 1) -> Doc:
    return await session.get_one(Doc, number)


def soft_delete(session: Session, *_: Any) -> None:
    """Keep what was to be deleted, and say that it is."""
    for instance in list(session.deleted):
        if isinstance(instance, Doc):
            instance.title = "deleted"
            session.add(instance)


def put_back(session: Session, *_: Any) -> None:
    """Let no file be replaced."""
    for instance in list(session.dirty):
        if isinstance(instance, Doc):
            old = get_history(instance, "file").deleted
            if old:
                instance.file = old[0]


def expire(session: Session, *_: Any) -> None:
    for instance in list(session.dirty):
        session.expire(instance)


def expunge_new(session: Session, *_: Any) -> None:
    for instance in list(session.new):
        if isinstance(instance, Doc):
            session.expunge(instance)


def archive(session: Session, *_: Any) -> None:
    """Keep the files of deleted rows in others."""
    for instance in list(session.deleted):
        if isinstance(instance, Doc) and instance.file is not None:
            session.add(Note(id=instance.id, scan=instance.file))


def insert_versions(session: Session, *_: Any) -> None:
    """Leave each changed row as it is, and insert what it was to become: SQLAlchemy's recipe of versioned rows."""
    for instance in list(session.dirty):
        if isinstance(instance, Doc) and session.is_modified(instance):
            make_transient(instance)
            instance.id += 10
            session.add(instance)


def archive_and_keep(session: Session, *_: Any) -> None:
    archive(session)
    soft_delete(session)


pytestmark = pytest.mark.case("RA-05")

everywhere = pytest.mark.parametrize("where", TARGETS)


class TestBeforeFlush:
    @everywhere
    async def test_soft_delete(self, env: OrmEnvironment, where: str) -> None:
        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        async with session_with(env, where, soft_delete) as session:
            await session.delete(await get(session))
        await env.check(file_1="a", other_1="b")
        async with env.sessions() as session:
            assert (await get(session)).title == "deleted"

    @everywhere
    async def test_soft_delete_of_one_of_two(self, env: OrmEnvironment, where: str) -> None:
        def keep_first(session: Session, *_: Any) -> None:
            session.add_all([doc for doc in session.deleted if isinstance(doc, Doc) and doc.id == 1])

        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        async with session_with(env, where, keep_first) as session:
            await session.delete(await get(session, 1))
            await session.delete(await get(session, 2))
        await env.check(file_1="a")

    @everywhere
    async def test_soft_delete_of_rows_that_take_others_along(self, env: OrmEnvironment, where: str) -> None:
        def keep(session: Session, *_: Any) -> None:
            session.add_all([instance for instance in session.deleted if isinstance(instance, Parent)])

        await env.add(Parent(id=1, file=file("p"), children=[Child(id=1, file=file("c"))]))
        async with session_with(env, where, keep) as session:
            session.add(Doc(id=1))
            await session.delete(await session.get_one(Parent, 1))
        assert sorted((await env.contents()).values()) == [b"c", b"p"]

    @everywhere
    @pytest.mark.parametrize("new", ["b", None])
    async def test_old_value_put_back(self, env: OrmEnvironment, where: str, new: str | None) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with session_with(env, where, put_back) as session:
            doc = await get(session)
            doc.title, doc.file = "new", None if new is None else file(new)
        await env.check(file_1="a")

    @everywhere
    async def test_old_value_put_back_of_a_row_whose_key_changes(self, env: OrmEnvironment, where: str) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with session_with(env, where, put_back) as session:
            doc = await get(session)
            doc.id, doc.file = 2, file("b")
        await env.check(file_2="a")

    @everywhere
    async def test_changed_row_expired(self, env: OrmEnvironment, where: str) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with session_with(env, where, expire) as session:
            (await get(session)).file = file("b")
            session.add(Doc(id=2, file=file("c")))
        await env.check(file_1="a", file_2="c")

    @everywhere
    async def test_new_row_expunged(self, env: OrmEnvironment, where: str) -> None:
        async with session_with(env, where, expunge_new) as session:
            session.add_all([Doc(id=1, file=file("a")), Note(id=1, scan=file("n"))])
        assert await env.contents() == {("note", 1, "scan_ref"): b"n"}

    @everywhere
    async def test_new_row_expunged_that_was_to_take_a_file_over(self, env: OrmEnvironment, where: str) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with session_with(env, where, expunge_new) as session:
            doc = await get(session)
            session.add(Doc(id=2, file=doc.file))
            doc.file = None
        await env.check()

    @everywhere
    async def test_file_moved_to_an_archive(self, env: OrmEnvironment, where: str) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with session_with(env, where, archive) as session:
            await session.delete(await get(session))
        assert await env.contents() == {("note", 1, "scan_ref"): b"a"}

    @everywhere
    async def test_file_copied_to_an_archive_and_the_row_kept(self, env: OrmEnvironment, where: str) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with session_with(env, where, archive_and_keep) as session:
            await session.delete(await get(session))
        assert await env.contents() == {("note", 1, "scan_ref"): b"a", ("doc", 1, "file"): b"a"}

    @everywhere
    async def test_row_kept_whose_file_was_to_move(self, env: OrmEnvironment, where: str) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with session_with(env, where, soft_delete) as session:
            doc = await get(session)
            session.add(Note(id=1, scan=doc.file))
            await session.delete(doc)
        assert await env.contents() == {("note", 1, "scan_ref"): b"a", ("doc", 1, "file"): b"a"}

    @everywhere
    async def test_value_put_back_that_was_to_move(self, env: OrmEnvironment, where: str) -> None:
        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))

        def put_first_back(session: Session, *_: Any) -> None:
            for doc in list(session.dirty):
                if isinstance(doc, Doc) and doc.id == 1 and get_history(doc, "file").deleted:
                    doc.file = get_history(doc, "file").deleted[0]

        async with session_with(env, where, put_first_back) as session:
            one, two = await get(session, 1), await get(session, 2)
            two.file, one.file = one.file, None
        await env.check(file_1="a", file_2="a")

    @everywhere
    async def test_another_file_assigned(self, env: OrmEnvironment, where: str) -> None:
        def censor(session: Session, *_: Any) -> None:
            for doc in [*session.new, *session.dirty]:
                if isinstance(doc, Doc):
                    doc.file = file("censored")

        await env.add(Doc(id=1, file=file("a")))
        async with session_with(env, where, censor) as session:
            (await get(session)).file = file("b")
            session.add(Doc(id=2, file=file("c")))
        await env.check(file_1="censored", file_2="censored")

    @everywhere
    async def test_row_deleted(self, env: OrmEnvironment, where: str) -> None:
        def delete_empty(session: Session, *_: Any) -> None:
            for doc in list(session.dirty):
                if isinstance(doc, Doc) and doc.file is None:
                    session.delete(doc)

        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        async with session_with(env, where, delete_empty) as session:
            (await get(session)).file = None
        await env.check()

    @everywhere
    async def test_error(self, env: OrmEnvironment, where: str) -> None:
        def fail(*_: Any) -> None:
            raise ZeroDivisionError

        await env.add(Doc(id=1, file=file("a")))
        with pytest.raises(ZeroDivisionError):
            async with session_with(env, where, fail) as session:
                (await get(session)).file = file("b")
                session.add(Doc(id=2, file=file("c")))
        await env.check(file_1="a")

    @everywhere
    async def test_rolled_back(self, env: OrmEnvironment, where: str) -> None:
        """What a listener has kept stays what it was, also where the transaction is rolled back."""
        await env.add(Doc(id=1, file=file("a")))
        with pytest.raises(ZeroDivisionError):
            async with session_with(env, where, archive_and_keep) as session:
                await session.delete(await get(session))
                await session.flush()
                raise ZeroDivisionError
        await env.check(file_1="a")

    @everywhere
    async def test_move_between_rows_that_become_versions(self, env: OrmEnvironment, where: str) -> None:
        await env.add(Doc(id=1, file=file("a")), Doc(id=2))
        async with session_with(env, where, insert_versions) as session:
            one, two = await get(session, 1), await get(session, 2)
            two.file, one.file = one.file, None
        await env.check(file_1="a", file_12="a")

    @everywhere
    async def test_swap_within_a_row_that_becomes_a_version(self, env: OrmEnvironment, where: str) -> None:
        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        async with session_with(env, where, insert_versions) as session:
            doc = await get(session)
            doc.file, doc.other = doc.other, doc.file
        await env.check(file_1="a", other_1="b", file_11="b", other_11="a")

    @everywhere
    async def test_replacement_that_becomes_a_version(self, env: OrmEnvironment, where: str) -> None:
        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        async with session_with(env, where, insert_versions) as session:
            (await get(session)).file = file("c")
        await env.check(file_1="a", other_1="b", file_11="c", other_11="b")

    @everywhere
    async def test_deleted_row_that_becomes_another(self, env: OrmEnvironment, where: str) -> None:
        """Its file was to move, and it is neither deleted nor what it was."""

        def add_anew(session: Session, *_: Any) -> None:
            for doc in list(session.deleted):
                make_transient(doc)
                doc.id += 10
                session.add(doc)

        await env.add(Doc(id=1, file=file("a")))
        async with session_with(env, where, add_anew) as session:
            doc = await get(session)
            session.add(Note(id=1, scan=doc.file))
            await session.delete(doc)
        assert await env.contents() == dict.fromkeys([("note", 1, "scan_ref"), ("doc", 1, "file"), ("doc", 11, "file")], b"a")
        await env.check()

    async def test_on_one_sessionmaker(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        inner = sessionmaker()
        sessions = async_sessionmaker(env.engine, sync_session_class=inner)
        with listening(inner, "before_flush", soft_delete):
            async with sessions.begin() as session:
                await session.delete(await get(session))
        await env.check(file_1="a")

    async def test_deleted_once_the_listener_is_gone(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await get(session)
            with listening(session.sync_session, "before_flush", soft_delete):
                await session.delete(doc)
                await session.flush()
            await session.delete(doc)
        await env.check()


class TestMappers:
    """Listeners of one class are called after those of all classes, which ours are."""

    @pytest.mark.parametrize("name", ["before_insert", "before_update"])
    async def test_file_assigned(self, env: OrmEnvironment, name: str) -> None:
        def assign(_: Any, __: Any, doc: Doc) -> None:
            doc.file = file("by the listener")

        await env.add(Doc(id=1, file=file("a")))
        with listening(Doc, name, assign):
            async with env.sessions.begin() as session:
                (await get(session)).title = "new"
                session.add(Doc(id=2, file=file("b")))
        if name == "before_insert":
            await env.check(file_1="a", file_2="by the listener")
        else:
            await env.check(file_1="by the listener", file_2="b")

    @pytest.mark.parametrize("new", ["b", None])
    async def test_old_value_put_back(self, env: OrmEnvironment, new: str | None) -> None:
        def put_back(_: Any, __: Any, doc: Doc) -> None:
            if old := get_history(doc, "file").deleted:
                doc.file = old[0]

        await env.add(Doc(id=1, file=file("a")))
        with listening(Doc, "before_update", put_back):
            async with env.sessions.begin() as session:
                doc = await get(session)
                doc.title, doc.file = "new", None if new is None else file(new)
        await env.check(file_1="a")

    async def test_value_put_back_that_was_to_move(self, env: OrmEnvironment) -> None:
        """Both rows would hold one object: the flush is refused."""

        def put_back(_: Any, __: Any, doc: Doc) -> None:
            if (old := get_history(doc, "file").deleted) and doc.id == 1:
                doc.file = old[0]

        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        with listening(Doc, "before_update", put_back), pytest.raises(StaleAttachmentError, match="still refers"):
            async with env.sessions.begin() as session:
                one, two = await get(session, 1), await get(session, 2)
                two.file, one.file = one.file, None
        await env.check(file_1="a", file_2="b")

    async def test_value_of_another_row_put_back(self, env: OrmEnvironment) -> None:
        def put_back(_: Any, __: Any, note: Note) -> None:
            if old := get_history(kept[0], "file").deleted:
                kept[0].file = old[0]

        kept: list[Doc] = []
        await env.add(Doc(id=1, file=file("a")), Note(id=1, scan=file("n")))
        with listening(Note, "before_update", put_back):
            async with env.sessions.begin() as session:
                kept.append(await get(session))
                kept[0].file = file("b")
                (await session.get_one(Note, 1)).title = "new"
        found = await env.contents()
        assert found[("note", 1, "scan_ref")] == b"n"
        assert found[("doc", 1, "file")] in (b"a", b"b")


class TestAttributes:
    """What the application listens to is what it assigns: that a flush puts a copy in the place of a file is none of it."""

    @staticmethod
    def given_once(doc: Doc, value: Any, old: Any, _: Any) -> Any:
        if isinstance(old, Attachment) and value is not None:
            raise AssertionError("a file is given once")
        return value

    @staticmethod
    def keep_old(_: Doc, value: Any, old: Any, __: Any) -> Any:
        return old if isinstance(old, Attachment) else value

    async def test_copy_to_a_new_row(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        with listening(Doc.file, "set", self.given_once, retval=True):
            async with env.sessions.begin() as session:
                doc = await get(session)
                session.add(Doc(id=2, file=doc.file))
        await env.check(file_1="a", file_2="a")

    async def test_copy_to_a_row_that_is_there(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")), Doc(id=2))
        with listening(Doc.file, "set", self.given_once, retval=True):
            async with env.sessions.begin() as session:
                one, two = await get(session, 1), await get(session, 2)
                two.file = one.file
        await env.check(file_1="a", file_2="a")

    async def test_copy_in_the_place_of_another_file(self, env: OrmEnvironment) -> None:
        """What the row held before is known after the copy: its object goes."""
        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        seen: list[Any] = []
        with listening(Doc.file, "set", lambda _, value, old, __: seen.append((value, old))):
            async with env.sessions.begin() as session:
                one, two = await get(session, 1), await get(session, 2)
                two.file = one.file
                await session.flush()
        assert [(type(value), type(old)) for value, old in seen] == [(Attachment, Attachment)]
        await env.check(file_1="a", file_2="a")

    async def test_one_file_for_two_rows(self, env: OrmEnvironment) -> None:
        with listening(Doc.file, "set", self.given_once, retval=True):
            given = file("a")
            await env.add(Doc(id=1, file=given), Doc(id=2, file=given))
        await env.check(file_1="a", file_2="a")

    async def test_old_value_kept_that_was_to_move(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")), Doc(id=2))
        with listening(Doc.file, "set", self.keep_old, retval=True):
            async with env.sessions.begin() as session:
                one, two = await get(session, 1), await get(session, 2)
                two.file, one.file = one.file, None
        await env.check(file_1="a", file_2="a")

    async def test_row_taken_over(self, env: OrmEnvironment) -> None:
        """A new instance empties what it does not set."""
        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        seen: list[Any] = []
        with listening(Doc.other, "set", lambda *arguments: seen.append(arguments)):
            async with env.sessions.begin() as session:
                await session.delete(await get(session))
                session.add(Doc(id=1, file=file("c")))
        assert not seen
        await env.check(file_1="c")


Rewriting = Callable[[Any], Any]

# What a listener may make of a bulk statement on one class: one on other rows, or on another class.
REWRITINGS: dict[str, Rewriting] = {
    "other rows": lambda _: delete(Doc).where(Doc.id == 2),
    "more rows": lambda _: delete(Doc).where(Doc.id < 3),
    "an update of the rows": lambda _: update(Doc).where(Doc.id == 2).values(file=None),
    "an update of another class": lambda _: update(Note).where(Note.id == 1).values(scan=None),
    "a table": lambda _: delete(Doc.__table__).where(Doc.__table__.c.id == 2),
}


class TestBulkStatements:
    @everywhere
    @pytest.mark.parametrize("given", ["delete", "update", "insert", "another class"])
    @pytest.mark.parametrize("rewriting", REWRITINGS)
    async def test_statement_replaced(self, env: OrmEnvironment, where: str, given: str, rewriting: str) -> None:
        def replace(state: ORMExecuteState) -> None:
            if state.is_insert or state.is_update or state.is_delete:
                state.statement = REWRITINGS[rewriting](state.statement)

        statements: dict[str, Any] = {
            "delete": delete(Doc).where(Doc.id == 1),
            "update": update(Doc).where(Doc.id == 1).values(file=None),
            "insert": insert(Doc).values(id=3),
            "another class": delete(Person).where(Person.id == 1),
        }
        await env.add(*(Doc(id=number, file=file(str(number))) for number in (1, 2)), Note(id=1, scan=file("n")))
        async with session_with(env, where, replace, "do_orm_execute") as session:
            await session.execute(statements[given])
        left = {("doc", 1, "file"): b"1", ("doc", 2, "file"): b"2", ("note", 1, "scan_ref"): b"n"}
        if rewriting == "an update of another class":
            del left[("note", 1, "scan_ref")]
        else:
            del left[("doc", 2, "file")]
        if rewriting == "more rows":
            del left[("doc", 1, "file")]
        await env.check()
        assert await env.contents() == left

    @everywhere
    async def test_statement_invoked_by_the_listener(self, env: OrmEnvironment, where: str) -> None:
        def invoke(state: ORMExecuteState) -> Any:
            if not state.is_delete:
                return None
            state.invoke_statement(delete(Note).where(Note.id == 1))
            return state.invoke_statement(delete(Doc).where(Doc.id == 2))

        await env.add(*(Doc(id=number, file=file(str(number))) for number in (1, 2)), Note(id=1, scan=file("n")))
        async with session_with(env, where, invoke, "do_orm_execute") as session:
            await session.execute(delete(Doc).where(Doc.id == 1))
        await env.check(file_1="1")

    @everywhere
    async def test_listener_is_called_once(self, env: OrmEnvironment, where: str) -> None:
        seen: list[Any] = []
        await env.add(Doc(id=1, file=file("a")))
        async with session_with(env, where, lambda state: seen.append(state.is_delete), "do_orm_execute") as session:
            result = await session.execute(delete(Doc).where(Doc.id == 1).returning(Doc.id))
            assert result.scalars().all() == [1]
        assert seen == [True]
        await env.check()

    @everywhere
    async def test_forbidden_statement_in_the_place_of_another(self, env: OrmEnvironment, where: str) -> None:
        def replace(state: ORMExecuteState) -> None:
            if state.is_delete:
                state.statement = update(Doc).values(file=Doc.other)

        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        with pytest.raises(InvalidReferenceError, match="None only"):
            async with session_with(env, where, replace, "do_orm_execute") as session:
                await session.execute(delete(Person))
        await env.check(file_1="a", other_1="b")


KEEPING = {
    "sqlite": ["CREATE TRIGGER keep BEFORE DELETE ON doc BEGIN SELECT RAISE(IGNORE); END"],
    "postgresql": [
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
        "CREATE TRIGGER keep BEFORE DELETE ON doc FOR EACH ROW EXECUTE FUNCTION keep()",
    ],
    # It cannot skip a row in silence.
    "mysql": ["CREATE TRIGGER keep BEFORE DELETE ON doc FOR EACH ROW SIGNAL SQLSTATE '45000'"],
}


@pytest.mark.filterwarnings("ignore:DELETE statement on table:sqlalchemy.exc.SAWarning")
async def test_trigger_that_keeps_deleted_rows(env: OrmEnvironment) -> None:
    """The database itself has soft deletes."""
    await env.add(Doc(id=1, file=file("a")))
    dialect = env.engine.dialect.name
    for statement in KEEPING[dialect]:
        await env.sql(statement)
    try:
        with contextlib.suppress(DBAPIError):
            async with env.sessions.begin() as session:
                await session.delete(await get(session))
        await env.check(file_1="a")
    finally:
        await env.sql("DROP FUNCTION keep CASCADE" if dialect == "postgresql" else "DROP TRIGGER keep")


async def test_selected_rows_are_not_touched(env: OrmEnvironment) -> None:
    """A listener that only reads changes nothing."""

    def read(session: Session, *_: Any) -> None:
        with session.no_autoflush:
            session.scalars(select(Doc)).all()

    await env.add(Doc(id=1, file=file("a")))
    async with session_with(env, "one session", read) as session:
        (await get(session)).file = file("b")
    await env.check(file_1="b")
