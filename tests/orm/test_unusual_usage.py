"""Unusual but legal uses of sessions, statements and instances: objects and references must still agree afterwards."""

from __future__ import annotations

import asyncio
import pickle
import uuid
from typing import Any

import pytest
from sqlalchemy import (
    bindparam,
    case,
    delete,
    event,
    insert,
    null,
    select,
    text,
    update,
)
from sqlalchemy.exc import MissingGreenlet, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, aliased, load_only, make_transient, make_transient_to_detached, undefer
from sqlalchemy.util import await_only

from granite_storage.exceptions import StorageError
from tests.orm.environment import Child, Contract, Doc, Item, Note, OrmEnvironment, Parent, Photo, Report, file


class TestSessions:
    async def test_binds(self, env: OrmEnvironment) -> None:
        async with AsyncSession(binds={Doc: env.engine}) as session:
            session.add(Doc(id=1, file=file("a")))
            await session.commit()
        await env.check(file_1="a")
        async with AsyncSession(binds={Doc: env.engine}) as session:
            session.add(Doc(id=2, file=file("b")))
            await session.flush()
        await env.check(file_1="a")
        async with AsyncSession(binds={Doc: env.engine}) as session:
            await session.execute(delete(Doc))
            await session.commit()
        await env.check()

    @pytest.mark.case("RB-20")
    async def test_an_attribute_read_without_an_await_while_a_file_waits_for_its_flush(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, title="t", file=file("a")))
        async with env.sessions() as session:
            document = await session.get_one(Doc, 1)
            session.expire(document)
            document.file = file("b")
            with pytest.raises(MissingGreenlet, match=r"await session\.flush\(\)"):
                _ = document.title
            await session.flush()
            await session.refresh(document, ["title"])
            assert document.title == "t"
            await session.commit()
        await env.check(file_1="b")

    async def test_subclass_of_session(self, env: OrmEnvironment) -> None:
        class Own(Session):
            pass

        async with AsyncSession(env.engine, sync_session_class=Own) as session:
            session.add(Doc(id=1, file=file("a")))
            await session.commit()
        await env.check(file_1="a")

    async def test_a_key_is_used_again_whose_row_another_session_has_deleted(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            kept = await session.get_one(Doc, 1)
            await session.commit()
            session.expire(kept)
            async with env.sessions.begin() as other:
                await other.execute(delete(Doc))
            session.add(Doc(id=1, file=file("b")))
            await session.commit()
            assert kept not in session
        await env.check(file_1="b")

    async def test_a_key_is_used_again_whose_row_went_with_a_savepoint(self, env: OrmEnvironment) -> None:
        async with env.sessions() as session:
            savepoint = await session.begin_nested()
            session.add(Doc(id=1, file=file("a")))
            await session.flush()
            session.expunge_all()
            kept = await session.get_one(Doc, 1)
            session.expire(kept)
            await savepoint.rollback()
            session.add(Doc(id=1, file=file("b")))
            await session.commit()
            assert kept not in session
        await env.check(file_1="b")

    async def test_autoflush_off(self, env: OrmEnvironment) -> None:
        async with AsyncSession(env.engine, autoflush=False) as session:
            session.add(Doc(id=1, file=file("a")))
            assert await session.get(Doc, 1) is None
            await session.commit()
        await env.check(file_1="a")

    async def test_autobegin_off(self, env: OrmEnvironment) -> None:
        async with AsyncSession(env.engine, autobegin=False) as session:
            async with session.begin():
                session.add(Doc(id=1, file=file("a")))
            async with session.begin():
                (await session.get_one(Doc, 1)).file = file("b")
        await env.check(file_1="b")

    async def test_added_after_flush(self, env: OrmEnvironment) -> None:
        """A listener adds a row once the flush is done; the commit flushes again."""
        async with AsyncSession(env.engine) as session:
            added: list[Doc] = []

            def after_flush_postexec(_: Session, __: Any) -> None:
                if not added:
                    added.append(Doc(id=2, file=file("b")))
                    session.add(added[0])

            event.listen(session.sync_session, "after_flush_postexec", after_flush_postexec)
            session.add(Doc(id=1, file=file("a")))
            await session.commit()
        await env.check(file_1="a", file_2="b")

    async def test_added_before_commit(self, env: OrmEnvironment) -> None:
        async with AsyncSession(env.engine) as session:

            def before_commit(_: Session) -> None:
                session.add(Doc(id=2, file=file("b")))

            event.listen(session.sync_session, "before_commit", before_commit, once=True)
            session.add(Doc(id=1, file=file("a")))
            await session.commit()
        await env.check(file_1="a", file_2="b")

    async def test_savepoint_in_a_listener(self, env: OrmEnvironment) -> None:
        async with AsyncSession(env.engine) as session:

            def after_flush(inner: Session, _: Any) -> None:
                inner.connection().exec_driver_sql("SAVEPOINT own")
                inner.connection().exec_driver_sql("RELEASE SAVEPOINT own")

            event.listen(session.sync_session, "after_flush", after_flush)
            session.add(Doc(id=1, file=file("a")))
            await session.commit()
        await env.check(file_1="a")

    async def test_error_in_a_listener_after_the_flush(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))

        def fails(*_: Any) -> None:
            raise ZeroDivisionError

        for name in ("after_flush", "after_flush_postexec", "before_commit"):
            async with AsyncSession(env.engine) as session:
                event.listen(session.sync_session, name, fails)
                (await session.get_one(Doc, 1)).file = file("b")
                with pytest.raises(ZeroDivisionError):
                    await session.commit()
            await env.check(file_1="a")

    async def test_error_in_a_listener_after_the_commit(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))

        def fails(*_: Any) -> None:
            raise ZeroDivisionError

        async with AsyncSession(env.engine) as session:
            event.listen(session.sync_session, "after_commit", fails)
            (await session.get_one(Doc, 1)).file = file("b")
            with pytest.raises(ZeroDivisionError):
                await session.commit()
        async with asyncio.timeout(10):  # a task of its own may see to it, and on MariaDB asks the rows first
            while env.journal is None and len(await env.objects()) > 1:  # noqa: ASYNC110  # there is no event to wait for
                await asyncio.sleep(0.01)
        await env.check(file_1="b")

    @pytest.mark.parametrize("pause", [0, 0.2])
    async def test_error_after_the_commit_in_a_session_that_nobody_closes(self, env: OrmEnvironment, pause: float) -> None:
        """`sessions.begin()` leaves it open: the displaced object goes all the same, though no transaction of it ever ends."""
        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        sessions: list[AsyncSession] = []

        def fails(*_: Any) -> None:
            if pause:
                await_only(asyncio.sleep(pause))
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            async with env.sessions.begin() as session:
                sessions.append(session)
                event.listen(session.sync_session, "after_commit", fails)
                await session.delete(await session.get_one(Doc, 1))
                (await session.get_one(Doc, 2)).file = file("c")
        async with asyncio.timeout(10):
            while len(await env.objects()) > 1:  # noqa: ASYNC110  # there is no event to wait for
                await asyncio.sleep(0.01)
        await session.close()
        await env.check(file_2="c")

    async def test_error_after_the_commit_in_a_joined_session(self, env: OrmEnvironment) -> None:
        """Nothing goes before the outer transaction has committed."""
        await env.add(Doc(id=1, file=file("a")))

        def fails(*_: Any) -> None:
            raise ZeroDivisionError

        async with env.engine.connect() as connection:
            outer = await connection.begin()
            session = AsyncSession(connection, join_transaction_mode="create_savepoint")
            event.listen(session.sync_session, "after_commit", fails)
            await session.delete(await session.get_one(Doc, 1))
            with pytest.raises(ZeroDivisionError):
                await session.commit()
            await asyncio.sleep(0.1)
            assert len(await env.objects()) == 1
            await outer.commit()
        assert await env.objects() == set()
        await session.close()


class TestInstances:
    async def test_made_transient_and_added_again(self, env: OrmEnvironment) -> None:
        """The first row keeps its object; the second has a copy."""
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await session.get_one(Doc, 1)
            make_transient(doc)
            doc.id = 2
            session.add(doc)
        await env.check(file_1="a", file_2="a")

    async def test_stub_that_is_made_detached(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = Doc(id=1)
            make_transient_to_detached(doc)
            session.add(doc)
            doc.file = file("b")
        await env.check(file_1="b")
        async with env.sessions.begin() as session:
            doc = Doc(id=1)
            make_transient_to_detached(doc)
            session.add(doc)
            await session.delete(doc)
        await env.check()

    async def test_merged_without_loading(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            doc = await session.get_one(Doc, 1)
        copied = pickle.loads(pickle.dumps(doc))  # noqa: S301  # it was pickled here
        async with env.sessions.begin() as session:
            merged = await session.merge(copied, load=False)
            merged.file = file("b")
        await env.check(file_1="b")

    async def test_refreshed_with_a_pending_file(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await session.get_one(Doc, 1)
            doc.file = file("b")
            with session.no_autoflush:
                await session.refresh(doc)
            assert doc.file is not None
            assert await doc.file.read() == b"a"
        await env.check(file_1="a")

    async def test_expired_with_a_pending_file(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await session.get_one(Doc, 1)
            doc.file = file("b")
            session.expire(doc, ["file"])
        await env.check(file_1="a")

    async def test_deleted_attribute(self, env: OrmEnvironment) -> None:
        """SQLAlchemy does not flush it; nothing is lost."""
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            doc = await session.get_one(Doc, 1)
            del doc.file
            with pytest.raises(KeyError):
                await session.commit()
        await env.check(file_1="a")

    async def test_primary_key_changes(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 1)).id = 7
        await env.check(file_7="a")

    async def test_loaded_in_part(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a"), other=file("x")), Note(id=1, scan=file("n")))
        async with env.sessions.begin() as session:
            doc = (await session.scalars(select(Doc).options(load_only(Doc.title)))).one()
            doc.file = file("b")
            note = (await session.scalars(select(Note).options(undefer(Note.scan)))).one()
            note.scan = None
        await env.check(file_1="b", other_1="x")

    async def test_raiseload(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = (await session.scalars(select(Doc).options(load_only(Doc.title, raiseload=True)))).one()
            doc.file = file("b")
        await env.check(file_1="b")
        async with env.sessions.begin() as session:
            doc = (await session.scalars(select(Doc).options(load_only(Doc.title, raiseload=True)))).one()
            await session.delete(doc)
        await env.check()


class TestStatements:
    async def test_insert_of_a_list(self, env: OrmEnvironment) -> None:
        async with env.sessions() as session:
            with pytest.raises(StorageError):
                await session.execute(insert(Doc), [{"id": 1, "file": file("a")}, {"id": 2, "file": file("b")}])
        await env.check()

    async def test_insert_of_a_list_without_files(self, env: OrmEnvironment) -> None:
        async with env.sessions.begin() as session:
            rows = await session.scalars(
                insert(Doc).returning(Doc), [{"id": 1, "title": "a"}, {"id": 2, "file": None, "title": "b"}]
            )
            assert [row.file for row in rows] == [None, None]
        await env.check()

    @pytest.mark.parametrize(
        "value",
        [
            lambda: Doc.other,
            lambda: case((Doc.id == 1, Doc.other), else_=Doc.file),
            lambda: text("other"),
            lambda: text("NULL"),
            lambda: select(Doc.other).scalar_subquery(),
        ],
    )
    async def test_update_that_copies_a_ref(self, env: OrmEnvironment, value: Any) -> None:
        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        async with env.sessions() as session:
            with pytest.raises(StorageError):
                await session.execute(update(Doc).values(file=value()))
            await session.rollback()
        await env.check(file_1="a", other_1="b")

    @pytest.mark.parametrize("how", ["selected", "columns", "added"])
    async def test_update_inside_a_with_that_copies_a_ref(self, env: OrmEnvironment, how: str) -> None:
        """It is refused where the database could do it, and where it could not: two columns would share an object."""
        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        copying = update(Doc).values(file=Doc.other).returning(Doc.id).cte("copying")
        statement = {
            "selected": select(copying),
            "columns": select(copying.c.id),
            "added": select(Note.id).add_cte(copying),
        }[how]
        async with env.sessions() as session:
            with pytest.raises(StorageError):
                await session.execute(statement)
            await session.rollback()
        await env.check(file_1="a", other_1="b")

    async def test_update_to_null(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        async with env.sessions.begin() as session:
            await session.execute(update(Doc).values(file=null()))
        await env.check(other_1="b")

    async def test_update_of_an_alias(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        other = aliased(Doc)
        async with env.sessions.begin() as session:
            await session.execute(update(Doc).where(Doc.id.in_(select(other.id))).values(file=None))
        await env.check()

    async def test_update_with_a_bound_parameter(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        async with env.sessions.begin() as session:
            await session.execute(update(Doc).where(Doc.id == bindparam("number")).values(file=None), {"number": 1})
        await env.check(file_2="b")

    async def test_update_of_a_subclass(self, env: OrmEnvironment) -> None:
        """The file is in the table of the parent class."""
        await env.add(Report(id=1, file=file("a"), pdf=file("b")), Item(id=2, kind="item", file=file("c")))
        async with env.sessions.begin() as session:
            await session.execute(update(Report).values(pdf=None))
            await session.execute(update(Item).where(Item.id == 2).values(file=None))
        await env.check()
        assert len(await env.objects()) == 1

    async def test_update_of_a_file_of_the_parent_class(self, env: OrmEnvironment) -> None:
        await env.add(Report(id=1, file=file("a"), pdf=file("b")), Photo(id=2, file=file("c"), raw=file("d")))
        async with env.sessions.begin() as session:
            await session.execute(update(Photo).values(file=None))
        await env.check()
        assert len(await env.objects()) == 3

    async def test_delete_with_a_join(self, env: OrmEnvironment) -> None:
        await env.add(Parent(id=1, file=file("p"), children=[Child(id=1, file=file("c"))]), Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            await session.execute(delete(Doc).where(Doc.id == select(Parent.id).scalar_subquery()))
        await env.check()

    async def test_returning_the_file_that_goes(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            gone = (await session.scalars(delete(Doc).returning(Doc.file))).one()
            assert gone is not None
            assert gone.size == 1
        await env.check()

    @pytest.mark.parametrize("how", ["bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings"])
    async def test_legacy_bulk(self, env: OrmEnvironment, how: str) -> None:
        await env.add(Doc(id=1, file=file("a")))

        def work(session: Session) -> None:
            if how == "bulk_save_objects":
                session.bulk_save_objects([Doc(id=2, file=file("b"))])
            elif how == "bulk_insert_mappings":
                session.bulk_insert_mappings(Doc, [{"id": 2, "file": file("b")}])  # type: ignore[arg-type]
            else:
                session.bulk_update_mappings(Doc, [{"id": 1, "file": file("b")}])  # type: ignore[arg-type]

        async with env.sessions() as session:
            with pytest.raises((StorageError, SQLAlchemyError)):
                await session.run_sync(work)
            await session.rollback()
        await env.check(file_1="a")


class TestKeys:
    @pytest.mark.parametrize("number", ["a/b", "..", "", " ", "x\\y", "None", "né\u202e", "a" * 20, "a.b."])
    async def test_strings(self, env: OrmEnvironment, number: str) -> None:
        party = uuid.uuid4()
        await env.add(Contract(party=party, number=number, file=file("a")))
        [location] = await env.objects()
        assert location.split("/")[0] == "contract"
        assert len(location.split("/")) == 4
        assert "None" not in location.split("/")[1] or number == "None"

    async def test_one_part_is_unknown(self, env: OrmEnvironment) -> None:
        """No part of a location is ever the word None."""
        await env.add(Contract(number="7", file=file("a")), Doc(file=file("b")), Item(kind="item", file=file("c")))
        assert not [location for location in await env.objects() if "None" in location]

    async def test_negative(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=-5, file=file("a")))
        [location] = await env.objects()
        assert location.startswith("doc/-5/file/")
