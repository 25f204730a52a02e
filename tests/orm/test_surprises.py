"""Programs that nobody expects, and after which objects and references agree all the same."""

from __future__ import annotations

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
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, aliased, load_only, make_transient, make_transient_to_detached, undefer

from granite_storage.exceptions import StorageError
from tests.orm.world import Child, Contract, Doc, Item, Note, Parent, Photo, Report, World, file


class TestSessions:
    async def test_binds(self, world: World) -> None:
        async with AsyncSession(binds={Doc: world.engine}) as session:
            session.add(Doc(id=1, file=file("a")))
            await session.commit()
        await world.check(file_1="a")
        async with AsyncSession(binds={Doc: world.engine}) as session:
            session.add(Doc(id=2, file=file("b")))
            await session.flush()
        await world.check(file_1="a")
        async with AsyncSession(binds={Doc: world.engine}) as session:
            await session.execute(delete(Doc))
            await session.commit()
        await world.check()

    async def test_subclass_of_session(self, world: World) -> None:
        class Own(Session):
            pass

        async with AsyncSession(world.engine, sync_session_class=Own) as session:
            session.add(Doc(id=1, file=file("a")))
            await session.commit()
        await world.check(file_1="a")

    async def test_a_key_is_used_again_whose_row_another_session_has_deleted(self, world: World) -> None:
        await world.add(Doc(id=1, file=file("a")))
        async with world.sessions() as session:
            kept = await session.get_one(Doc, 1)
            await session.commit()
            session.expire(kept)
            async with world.sessions.begin() as other:
                await other.execute(delete(Doc))
            session.add(Doc(id=1, file=file("b")))
            await session.commit()
            assert kept not in session
        await world.check(file_1="b")

    async def test_a_key_is_used_again_whose_row_went_with_a_savepoint(self, world: World) -> None:
        async with world.sessions() as session:
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
        await world.check(file_1="b")

    async def test_autoflush_off(self, world: World) -> None:
        async with AsyncSession(world.engine, autoflush=False) as session:
            session.add(Doc(id=1, file=file("a")))
            assert await session.get(Doc, 1) is None
            await session.commit()
        await world.check(file_1="a")

    async def test_autobegin_off(self, world: World) -> None:
        async with AsyncSession(world.engine, autobegin=False) as session:
            async with session.begin():
                session.add(Doc(id=1, file=file("a")))
            async with session.begin():
                (await session.get_one(Doc, 1)).file = file("b")
        await world.check(file_1="b")

    async def test_added_after_flush(self, world: World) -> None:
        """A listener adds a row once the flush is done; the commit flushes again."""
        async with AsyncSession(world.engine) as session:
            added: list[Doc] = []

            def after_flush_postexec(_: Session, __: Any) -> None:
                if not added:
                    added.append(Doc(id=2, file=file("b")))
                    session.add(added[0])

            event.listen(session.sync_session, "after_flush_postexec", after_flush_postexec)
            session.add(Doc(id=1, file=file("a")))
            await session.commit()
        await world.check(file_1="a", file_2="b")

    async def test_added_before_commit(self, world: World) -> None:
        async with AsyncSession(world.engine) as session:

            def before_commit(_: Session) -> None:
                session.add(Doc(id=2, file=file("b")))

            event.listen(session.sync_session, "before_commit", before_commit, once=True)
            session.add(Doc(id=1, file=file("a")))
            await session.commit()
        await world.check(file_1="a", file_2="b")

    async def test_savepoint_in_a_listener(self, world: World) -> None:
        async with AsyncSession(world.engine) as session:

            def after_flush(inner: Session, _: Any) -> None:
                inner.connection().exec_driver_sql("SAVEPOINT own")
                inner.connection().exec_driver_sql("RELEASE SAVEPOINT own")

            event.listen(session.sync_session, "after_flush", after_flush)
            session.add(Doc(id=1, file=file("a")))
            await session.commit()
        await world.check(file_1="a")

    async def test_error_in_a_listener_after_the_flush(self, world: World) -> None:
        await world.add(Doc(id=1, file=file("a")))

        def fails(*_: Any) -> None:
            raise ZeroDivisionError

        for name in ("after_flush", "after_flush_postexec", "before_commit"):
            async with AsyncSession(world.engine) as session:
                event.listen(session.sync_session, name, fails)
                (await session.get_one(Doc, 1)).file = file("b")
                with pytest.raises(ZeroDivisionError):
                    await session.commit()
            await world.check(file_1="a")

    async def test_error_in_a_listener_after_the_commit(self, world: World) -> None:
        await world.add(Doc(id=1, file=file("a")))

        def fails(*_: Any) -> None:
            raise ZeroDivisionError

        async with AsyncSession(world.engine) as session:
            event.listen(session.sync_session, "after_commit", fails)
            (await session.get_one(Doc, 1)).file = file("b")
            with pytest.raises(ZeroDivisionError):
                await session.commit()
        await world.check(file_1="b")


class TestInstances:
    async def test_made_transient_and_added_again(self, world: World) -> None:
        """The first row keeps its object; the second has a copy."""
        await world.add(Doc(id=1, file=file("a")))
        async with world.sessions.begin() as session:
            doc = await session.get_one(Doc, 1)
            make_transient(doc)
            doc.id = 2
            session.add(doc)
        await world.check(file_1="a", file_2="a")

    async def test_stub_that_is_made_detached(self, world: World) -> None:
        await world.add(Doc(id=1, file=file("a")))
        async with world.sessions.begin() as session:
            doc = Doc(id=1)
            make_transient_to_detached(doc)
            session.add(doc)
            doc.file = file("b")
        await world.check(file_1="b")
        async with world.sessions.begin() as session:
            doc = Doc(id=1)
            make_transient_to_detached(doc)
            session.add(doc)
            await session.delete(doc)
        await world.check()

    async def test_merged_without_loading(self, world: World) -> None:
        await world.add(Doc(id=1, file=file("a")))
        async with world.sessions() as session:
            doc = await session.get_one(Doc, 1)
        copied = pickle.loads(pickle.dumps(doc))  # noqa: S301  # it was pickled here
        async with world.sessions.begin() as session:
            merged = await session.merge(copied, load=False)
            merged.file = file("b")
        await world.check(file_1="b")

    async def test_refreshed_with_a_pending_file(self, world: World) -> None:
        await world.add(Doc(id=1, file=file("a")))
        async with world.sessions.begin() as session:
            doc = await session.get_one(Doc, 1)
            doc.file = file("b")
            with session.no_autoflush:
                await session.refresh(doc)
            assert doc.file is not None
            assert await doc.file.read() == b"a"
        await world.check(file_1="a")

    async def test_expired_with_a_pending_file(self, world: World) -> None:
        await world.add(Doc(id=1, file=file("a")))
        async with world.sessions.begin() as session:
            doc = await session.get_one(Doc, 1)
            doc.file = file("b")
            session.expire(doc, ["file"])
        await world.check(file_1="a")

    async def test_deleted_attribute(self, world: World) -> None:
        """SQLAlchemy does not flush it; nothing is lost."""
        await world.add(Doc(id=1, file=file("a")))
        async with world.sessions() as session:
            doc = await session.get_one(Doc, 1)
            del doc.file
            with pytest.raises(KeyError):
                await session.commit()
        await world.check(file_1="a")

    async def test_primary_key_changes(self, world: World) -> None:
        await world.add(Doc(id=1, file=file("a")))
        async with world.sessions.begin() as session:
            (await session.get_one(Doc, 1)).id = 7
        await world.check(file_7="a")

    async def test_loaded_in_part(self, world: World) -> None:
        await world.add(Doc(id=1, file=file("a"), other=file("x")), Note(id=1, scan=file("n")))
        async with world.sessions.begin() as session:
            doc = (await session.scalars(select(Doc).options(load_only(Doc.title)))).one()
            doc.file = file("b")
            note = (await session.scalars(select(Note).options(undefer(Note.scan)))).one()
            note.scan = None
        await world.check(file_1="b", other_1="x")

    async def test_raiseload(self, world: World) -> None:
        await world.add(Doc(id=1, file=file("a")))
        async with world.sessions.begin() as session:
            doc = (await session.scalars(select(Doc).options(load_only(Doc.title, raiseload=True)))).one()
            doc.file = file("b")
        await world.check(file_1="b")
        async with world.sessions.begin() as session:
            doc = (await session.scalars(select(Doc).options(load_only(Doc.title, raiseload=True)))).one()
            await session.delete(doc)
        await world.check()


class TestStatements:
    async def test_insert_of_a_list(self, world: World) -> None:
        async with world.sessions() as session:
            with pytest.raises(StorageError):
                await session.execute(insert(Doc), [{"id": 1, "file": file("a")}, {"id": 2, "file": file("b")}])
        await world.check()

    async def test_insert_of_a_list_without_files(self, world: World) -> None:
        async with world.sessions.begin() as session:
            rows = await session.scalars(
                insert(Doc).returning(Doc), [{"id": 1, "title": "a"}, {"id": 2, "file": None, "title": "b"}]
            )
            assert [row.file for row in rows] == [None, None]
        await world.check()

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
    async def test_update_that_copies_a_ref(self, world: World, value: Any) -> None:
        await world.add(Doc(id=1, file=file("a"), other=file("b")))
        async with world.sessions() as session:
            with pytest.raises(StorageError):
                await session.execute(update(Doc).values(file=value()))
            await session.rollback()
        await world.check(file_1="a", other_1="b")

    @pytest.mark.parametrize("how", ["selected", "columns", "added"])
    async def test_update_inside_a_with_that_copies_a_ref(self, world: World, how: str) -> None:
        """It is refused where the database could do it, and where it could not: two columns would share an object."""
        await world.add(Doc(id=1, file=file("a"), other=file("b")))
        copying = update(Doc).values(file=Doc.other).returning(Doc.id).cte("copying")
        statement = {
            "selected": select(copying),
            "columns": select(copying.c.id),
            "added": select(Note.id).add_cte(copying),
        }[how]
        async with world.sessions() as session:
            with pytest.raises(StorageError):
                await session.execute(statement)
            await session.rollback()
        await world.check(file_1="a", other_1="b")

    async def test_update_to_null(self, world: World) -> None:
        await world.add(Doc(id=1, file=file("a"), other=file("b")))
        async with world.sessions.begin() as session:
            await session.execute(update(Doc).values(file=null()))
        await world.check(other_1="b")

    async def test_update_of_an_alias(self, world: World) -> None:
        await world.add(Doc(id=1, file=file("a")))
        other = aliased(Doc)
        async with world.sessions.begin() as session:
            await session.execute(update(Doc).where(Doc.id.in_(select(other.id))).values(file=None))
        await world.check()

    async def test_update_with_a_bound_parameter(self, world: World) -> None:
        await world.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        async with world.sessions.begin() as session:
            await session.execute(update(Doc).where(Doc.id == bindparam("number")).values(file=None), {"number": 1})
        await world.check(file_2="b")

    async def test_update_of_a_subclass(self, world: World) -> None:
        """The file is in the table of the parent class."""
        await world.add(Report(id=1, file=file("a"), pdf=file("b")), Item(id=2, kind="item", file=file("c")))
        async with world.sessions.begin() as session:
            await session.execute(update(Report).values(pdf=None))
            await session.execute(update(Item).where(Item.id == 2).values(file=None))
        await world.check()
        assert len(await world.objects()) == 1

    async def test_update_of_a_file_of_the_parent_class(self, world: World) -> None:
        await world.add(Report(id=1, file=file("a"), pdf=file("b")), Photo(id=2, file=file("c"), raw=file("d")))
        async with world.sessions.begin() as session:
            await session.execute(update(Photo).values(file=None))
        await world.check()
        assert len(await world.objects()) == 3

    async def test_delete_with_a_join(self, world: World) -> None:
        await world.add(Parent(id=1, file=file("p"), children=[Child(id=1, file=file("c"))]), Doc(id=1, file=file("a")))
        async with world.sessions.begin() as session:
            await session.execute(delete(Doc).where(Doc.id == select(Parent.id).scalar_subquery()))
        await world.check()

    async def test_returning_the_file_that_goes(self, world: World) -> None:
        await world.add(Doc(id=1, file=file("a")))
        async with world.sessions.begin() as session:
            gone = (await session.scalars(delete(Doc).returning(Doc.file))).one()
            assert gone is not None
            assert gone.size == 1
        await world.check()

    @pytest.mark.parametrize("how", ["bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings"])
    async def test_legacy_bulk(self, world: World, how: str) -> None:
        await world.add(Doc(id=1, file=file("a")))

        def work(session: Session) -> None:
            if how == "bulk_save_objects":
                session.bulk_save_objects([Doc(id=2, file=file("b"))])
            elif how == "bulk_insert_mappings":
                session.bulk_insert_mappings(Doc, [{"id": 2, "file": file("b")}])  # type: ignore[arg-type]
            else:
                session.bulk_update_mappings(Doc, [{"id": 1, "file": file("b")}])  # type: ignore[arg-type]

        async with world.sessions() as session:
            with pytest.raises((StorageError, SQLAlchemyError)):
                await session.run_sync(work)
            await session.rollback()
        await world.check(file_1="a")


class TestKeys:
    @pytest.mark.parametrize("number", ["a/b", "..", "", " ", "x\\y", "None", "né\u202e", "a" * 20, "a.b."])
    async def test_strings(self, world: World, number: str) -> None:
        party = uuid.uuid4()
        await world.add(Contract(party=party, number=number, file=file("a")))
        [location] = await world.objects()
        assert location.split("/")[0] == "contract"
        assert len(location.split("/")) == 4
        assert "None" not in location.split("/")[1] or number == "None"

    async def test_one_part_is_unknown(self, world: World) -> None:
        """No part of a location is ever the word None."""
        await world.add(Contract(number="7", file=file("a")), Doc(file=file("b")), Item(kind="item", file=file("c")))
        assert not [location for location in await world.objects() if "None" in location]

    async def test_negative(self, world: World) -> None:
        await world.add(Doc(id=-5, file=file("a")))
        [location] = await world.objects()
        assert location.startswith("doc/-5/file/")
