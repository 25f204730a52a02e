"""What a transaction may do with files, one scenario each, on every database.

After each, the `env` fixture checks that the set of objects equals the set of references, that every referenced object has its
bytes, and that no connection is checked out.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import uuid
from typing import Any

import psycopg
import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, make_transient_to_detached, selectinload

from granite_storage import ContentTooLargeError, ObjectNotFoundError, StorageManager, StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import BackendUnavailableError, ConsumedSourceError
from granite_storage.orm import Attachment
from tests.orm.environment import (
    Booking,
    Child,
    Contract,
    Doc,
    Item,
    Node,
    Note,
    OrmEnvironment,
    Page,
    Parent,
    Passport,
    Person,
    Photo,
    Report,
    Tag,
    file,
    other_base,
)


class BoomError(Exception):
    """The application's own error."""


async def get(session: AsyncSession, number: int = 1) -> Doc:
    return await session.get_one(Doc, number)


class TestOneRow:
    async def test_insert(self, env: OrmEnvironment) -> None:
        doc = Doc(id=1, file=file("a"))
        await env.add(doc)
        await env.check(file_1="a")
        assert doc.file is not None
        assert await doc.file.read() == b"a"

    async def test_insert_of_two_columns(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        await env.check(file_1="a", other_1="b")

    async def test_insert_of_many_rows(self, env: OrmEnvironment) -> None:
        await env.add(*(Doc(id=number, file=file(str(number))) for number in range(1, 30)))
        await env.check(**{f"file_{number}": str(number) for number in range(1, 30)})

    async def test_insert_without_a_file(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1), Doc(id=2, file=None))
        await env.check()
        assert await env.objects() == set()

    async def test_insert_of_a_stream(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=Attachment(env.stream(b"a", b"b", b"c")), other=Attachment(io.BytesIO(b"d"))))
        await env.check(file_1="abc", other_1="d")

    async def test_replace(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            (await get(session)).file = file("b")
        await env.check(file_1="b")

    async def test_replace_by_the_same_filename_and_content(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a", "same.txt")))
        async with env.sessions.begin() as session:
            (await get(session)).file = file("a", "same.txt")
        await env.check(file_1="a")
        assert len(await env.objects()) == 1 + len(env.variants)

    async def test_set_none(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        async with env.sessions.begin() as session:
            (await get(session)).file = None
        await env.check(other_1="b")

    async def test_set_none_of_nothing(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1))
        async with env.sessions.begin() as session:
            (await get(session)).file = None
        await env.check()

    async def test_replace_nothing(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1))
        async with env.sessions.begin() as session:
            (await get(session)).file = file("a")
        await env.check(file_1="a")

    async def test_replace_twice_before_a_flush(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await get(session)
            doc.file = file("b")
            doc.file = file("c")
        await env.check(file_1="c")

    async def test_replace_twice_with_a_flush_between(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await get(session)
            doc.file = file("b")
            await session.flush()
            doc.file = file("c")
        await env.check(file_1="c")

    async def test_replace_what_was_just_inserted(self, env: OrmEnvironment) -> None:
        async with env.sessions.begin() as session:
            doc = Doc(id=1, file=file("a"))
            session.add(doc)
            await session.flush()
            doc.file = file("b")
        await env.check(file_1="b")

    async def test_insert_and_delete_in_one_transaction(self, env: OrmEnvironment) -> None:
        async with env.sessions.begin() as session:
            doc = Doc(id=1, file=file("a"))
            session.add(doc)
            await session.flush()
            await session.delete(doc)
        await env.check()

    async def test_delete(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a"), other=file("b")), Doc(id=2, file=file("c")))
        async with env.sessions.begin() as session:
            await session.delete(await get(session))
        await env.check(file_2="c")

    async def test_replace_and_delete(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await get(session)
            doc.file = file("b")
            await session.flush()
            await session.delete(doc)
        await env.check()

    async def test_assign_and_delete_before_a_flush(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await get(session)
            doc.file = file("b")
            await session.delete(doc)
        await env.check()

    async def test_undo_by_hand(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await get(session)
            old = doc.file
            doc.file = file("b")
            await session.flush()
            doc.file = old
        await env.check(file_1="a")

    async def test_undo_of_none(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await get(session)
            old, doc.file = doc.file, None
            await session.flush()
            doc.file = old
        await env.check(file_1="a")

    async def test_a_changed_title_touches_no_file(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        before = await env.objects()
        async with env.sessions.begin() as session:
            (await get(session)).title = "new"
        await env.check(file_1="a")
        assert await env.objects() == before

    async def test_row_of_the_same_key_after_a_delete(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        async with env.sessions.begin() as session:
            await session.delete(await get(session))
            session.add(Doc(id=1, file=file("c")))
        await env.check(file_1="c")

    async def test_row_of_the_same_key_without_a_file(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        async with env.sessions.begin() as session:
            await session.delete(await get(session))
            session.add(Doc(id=1, title="new"))
        assert await env.references() == {}
        await env.check()

    @pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
    async def test_two_rows_of_the_same_key_after_a_delete(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        async with env.sessions.begin() as session:
            await session.delete(await get(session))
            session.add_all([Doc(id=1, file=file("c")), Doc(id=1, file=file("d"), other=file("e"))])
        await env.check(file_1="d", other_1="e")

    @pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SAWarning")
    @pytest.mark.parametrize("columns", [{}, {"file": None}])
    async def test_two_rows_of_the_same_key_of_which_the_last_has_no_file(
        self, env: OrmEnvironment, columns: dict[str, None]
    ) -> None:
        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        async with env.sessions.begin() as session:
            await session.delete(await get(session))
            session.add_all([Doc(id=1, file=file("c")), Doc(id=1, other=file("d"), **columns)])
        await env.check(other_1="d")

    async def test_primary_key_and_file_changed_together(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await get(session)
            doc.id, doc.file = 2, file("b")
        await env.check(file_2="b")


class TestRollback:
    async def test_of_an_insert(self, env: OrmEnvironment) -> None:
        async with env.sessions() as session:
            session.add(Doc(id=1, file=file("a")))
            await session.flush()
            await session.rollback()
        await env.check()

    @pytest.mark.parametrize("change", ["replace", "none", "delete"])
    async def test_of_a_change(self, env: OrmEnvironment, change: str) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            doc = await get(session)
            if change == "delete":
                await session.delete(doc)
            else:
                doc.file = file("b") if change == "replace" else None
            await session.flush()
            await session.rollback()
        await env.check(file_1="a")

    async def test_by_an_exception_in_the_block(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        with pytest.raises(BoomError):
            async with env.sessions.begin() as session:
                (await get(session)).file = file("b")
                await session.flush()
                raise BoomError
        await env.check(file_1="a")

    async def test_before_any_flush(self, env: OrmEnvironment) -> None:
        with pytest.raises(BoomError):
            async with env.sessions.begin() as session:
                session.add(Doc(id=1, file=file("a")))
                raise BoomError
        assert env.backend.count("put_bytes") == 0

    @pytest.mark.case("DBF-07")
    async def test_by_closing_without_a_commit(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            (await get(session)).file = file("b")
            await session.flush()
        await env.check(file_1="a")

    async def test_by_a_reset(self, env: OrmEnvironment) -> None:
        session = env.sessions()
        session.add(Doc(id=1, file=file("a")))
        await session.flush()
        await session.reset()
        await session.close()
        await env.check()

    async def test_closed_session_is_used_again(self, env: OrmEnvironment) -> None:
        session = env.sessions()
        session.add(Doc(id=1, file=file("a")))
        await session.flush()
        await session.close()
        session.add(Doc(id=2, file=file("b")))
        await session.commit()
        await session.close()
        await env.check(file_2="b")

    async def test_same_session_after_a_rollback(self, env: OrmEnvironment) -> None:
        async with env.sessions() as session:
            session.add(Doc(id=1, file=file("a")))
            await session.flush()
            await session.rollback()
            session.add(Doc(id=1, file=file("b")))
            await session.commit()
            (await get(session)).file = file("c")
            await session.commit()
        await env.check(file_1="c")

    async def test_bytes_are_stored_again(self, env: OrmEnvironment) -> None:
        async with env.sessions() as session:
            doc = Doc(id=1, file=file("a"))
            session.add(doc)
            await session.flush()
            await session.rollback()
            assert doc.file is not None
            assert doc.file.is_pending
            session.add(doc)
            await session.commit()
        await env.check(file_1="a")

    async def test_streams_cannot_be_stored_again(self, env: OrmEnvironment) -> None:
        async with env.sessions() as session:
            doc = Doc(id=1, file=Attachment(iter([b"a"])))
            session.add(doc)
            await session.flush()
            await session.rollback()
            session.add(doc)
            with pytest.raises(ConsumedSourceError):
                await session.commit()
        await env.check()

    async def test_copies_are_made_again(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            copy = Doc(id=2, file=(await get(session)).file)
            session.add(copy)
            await session.flush()
            await session.rollback()
            session.add(copy)
            await session.commit()
        await env.check(file_1="a", file_2="a")

    async def test_by_an_integrity_error(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, code="x", file=file("a")))
        with pytest.raises(IntegrityError):
            await env.add(Doc(id=2, code="y", file=file("b")), Doc(id=3, code="x", file=file("c")))
        await env.check(file_1="a")

    async def test_of_a_flush_that_failed_inside_the_block(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, code="x", file=file("a")))
        async with env.sessions() as session:
            (await get(session)).file = file("b")
            await session.flush()
            session.add(Doc(id=2, code="x", file=file("c")))
            with pytest.raises(IntegrityError):
                await session.flush()
            await session.rollback()
            session.add(Doc(id=3, file=file("d")))
            await session.commit()
        await env.check(file_1="a", file_3="d")

    async def test_refused_commit(self, env: OrmEnvironment) -> None:
        if env.database.name == "mariadb":
            pytest.skip("MariaDB defers no constraint")
        await env.add(Person(id=1), Booking(id=1, person_id=1, file=file("a")))
        async with env.sessions() as session:
            booking = await session.get_one(Booking, 1)
            booking.file, booking.person_id = file("b"), 99
            session.add(Booking(id=2, person_id=98, file=file("c")))
            with pytest.raises(IntegrityError):
                await session.commit()
        assert await env.contents() == {("booking", 1, "file"): b"a"}

    async def test_refused_commit_of_a_block(self, env: OrmEnvironment) -> None:
        if env.database.name == "mariadb":
            pytest.skip("MariaDB defers no constraint")
        with pytest.raises(IntegrityError):
            await env.add(Booking(id=2, person_id=98, file=file("c")))
        await env.check()


class TestSavepoints:
    @pytest.mark.case("DBF-04")
    @pytest.mark.parametrize("outer", ["commit", "rollback"])
    @pytest.mark.parametrize("inner", ["release", "rollback"])
    @pytest.mark.parametrize("change", ["insert", "replace", "none", "delete", "bulk"])
    async def test_one_inside_another_transaction(self, env: OrmEnvironment, change: str, inner: str, outer: str) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            doc = await get(session)
            savepoint = await session.begin_nested()
            match change:
                case "insert":
                    session.add(Doc(id=2, file=file("b")))
                case "replace":
                    doc.file = file("b")
                case "none":
                    doc.file = None
                case "delete":
                    await session.delete(doc)
                case "bulk":
                    await session.execute(Doc.__table__.delete().where(Doc.id == 1))
            await session.flush()
            await (savepoint.commit() if inner == "release" else savepoint.rollback())
            assert env.backend.count("delete") == 0
            await (session.commit() if outer == "commit" else session.rollback())
        if inner == "rollback" or outer == "rollback":
            await env.check(file_1="a")
        else:
            await env.check(
                **{"insert": {"file_1": "a", "file_2": "b"}, "replace": {"file_1": "b"}}.get(change, {"file_1": None})
            )

    @pytest.mark.parametrize("outermost", ["commit", "rollback"])
    @pytest.mark.parametrize("middle", ["release", "rollback"])
    @pytest.mark.parametrize("inner", ["release", "rollback"])
    async def test_a_change_at_each_level(self, env: OrmEnvironment, inner: str, middle: str, outermost: str) -> None:
        await env.add(Doc(id=1, file=file("0")), Doc(id=2, file=file("x")))
        async with env.sessions() as session:
            doc = await get(session)
            doc.file = file("1")
            await session.flush()
            second = await session.begin_nested()
            doc.file = file("2")
            await session.flush()
            third = await session.begin_nested()
            doc.file = file("3")
            await session.delete(await get(session, 2))
            await session.flush()
            await (third.commit() if inner == "release" else third.rollback())
            await (second.commit() if middle == "release" else second.rollback())
            await (session.commit() if outermost == "commit" else session.rollback())
        level = "0" if outermost == "rollback" else "1" if middle == "rollback" else "2" if inner == "rollback" else "3"
        await env.check(file_1=level, file_2=None if level == "3" else "x")

    async def test_integrity_error_caught(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, code="x", file=file("a")))
        async with env.sessions.begin() as session:
            doc = await get(session)
            doc.file = file("b")
            with pytest.raises(IntegrityError):
                async with session.begin_nested():
                    session.add(Doc(id=2, code="x", file=file("c")))
            session.add(Doc(id=3, file=file("d")))
        await env.check(file_1="b", file_3="d")

    async def test_many_errors_caught(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, code="x"))
        async with env.sessions.begin() as session:
            for number in range(2, 8):
                with contextlib.suppress(IntegrityError):
                    async with session.begin_nested():
                        session.add(Doc(id=number, code="x" if number % 2 else str(number), file=file(str(number))))
        await env.check(file_2="2", file_4="4", file_6="6")

    async def test_put_outside_and_displaced_inside(self, env: OrmEnvironment) -> None:
        async with env.sessions.begin() as session:
            doc = Doc(id=1, file=file("a"))
            session.add(doc)
            await session.flush()
            with pytest.raises(BoomError):
                async with session.begin_nested():
                    doc.file = file("b")
                    await session.flush()
                    raise BoomError
        await env.check(file_1="a")

    async def test_displaced_outside_and_taken_back_inside(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await get(session)
            old, doc.file = doc.file, file("b")
            await session.flush()
            with pytest.raises(BoomError):
                async with session.begin_nested():
                    doc.file = old
                    await session.flush()
                    raise BoomError
        await env.check(file_1="b")

    async def test_moved_inside_and_rolled_back(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        async with env.sessions.begin() as session:
            one, two = await get(session, 1), await get(session, 2)
            with pytest.raises(BoomError):
                async with session.begin_nested():
                    one.file, two.file = two.file, one.file
                    await session.flush()
                    raise BoomError
        await env.check(file_1="a", file_2="b")

    async def test_rolled_back_then_the_same_again(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc, new = await get(session), file("b")
            for _ in range(3):
                savepoint = await session.begin_nested()
                doc.file = new
                await session.flush()
                await savepoint.rollback()
            doc.file = new
        await env.check(file_1="b")

    async def test_savepoint_before_anything_else(self, env: OrmEnvironment) -> None:
        async with env.sessions() as session:
            async with session.begin_nested():
                session.add(Doc(id=1, file=file("a")))
            await session.rollback()
        await env.check()

    async def test_commit_with_open_savepoints(self, env: OrmEnvironment) -> None:
        async with env.sessions() as session:
            session.add(Doc(id=1, file=file("a")))
            await session.begin_nested()
            session.add(Doc(id=2, file=file("b")))
            await session.begin_nested()
            session.add(Doc(id=3, file=file("c")))
            await session.commit()
        await env.check(file_1="a", file_2="b", file_3="c")

    async def test_close_with_open_savepoints(self, env: OrmEnvironment) -> None:
        async with env.sessions() as session:
            session.add(Doc(id=1, file=file("a")))
            await session.begin_nested()
            session.add(Doc(id=2, file=file("b")))
            await session.flush()
            await session.begin_nested()
            session.add(Doc(id=3, file=file("c")))
            await session.flush()
        await env.check()

    async def test_delete_and_insert_of_the_same_key(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            await session.delete(await get(session))
            await session.flush()
            with pytest.raises(BoomError):
                async with session.begin_nested():
                    session.add(Doc(id=1, file=file("b")))
                    await session.flush()
                    raise BoomError
        await env.check()


class TestFailedUploads:
    async def test_second_attribute(self, env: OrmEnvironment) -> None:
        env.backend.fail("put_bytes", error=BackendUnavailableError("out of reach", backend="store"), nth=2)
        with pytest.raises(BackendUnavailableError):
            await env.add(Doc(id=1, file=file("a"), other=file("b")))
        await env.check()

    async def test_one_of_many_rows(self, env: OrmEnvironment) -> None:
        env.backend.fail("put_bytes", error=BackendUnavailableError("out of reach", backend="store"), nth=7)
        with pytest.raises(BackendUnavailableError):
            await env.add(*(Doc(id=number, file=file(str(number))) for number in range(1, 20)))
        await env.check()

    async def test_stream_that_fails_midway(self, env: OrmEnvironment) -> None:
        with pytest.raises(BoomError):
            await env.add(Doc(id=1, file=file("a"), other=Attachment(env.stream(b"some", BoomError()))))
        await env.check()

    async def test_too_large(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        with pytest.raises(ContentTooLargeError):
            async with env.sessions.begin() as session:
                (await get(session)).file = file(b"x" * (1 << 21))
        await env.check(file_1="a")

    async def test_caught_and_given_up(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            doc = await get(session)
            doc.file, doc.other = file("b"), file(b"x" * (1 << 21))
            with pytest.raises(ContentTooLargeError):
                await session.flush()
            doc.file, doc.other = None, None
            await session.commit()
        await env.check()

    async def test_caught_and_tried_again(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        env.backend.fail("put_bytes", error=BackendUnavailableError("out of reach", backend="store"), nth=2)
        async with env.sessions() as session:
            doc = await get(session)
            doc.file, doc.other = file("b"), file("c")
            with pytest.raises(BackendUnavailableError):
                await session.flush()
            await session.commit()
        await env.check(file_1="b", other_1="c")

    async def test_failed_copy_after_an_upload(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        await env.lose(Doc(id=2), "file")
        async with env.sessions() as session:
            lost = (await get(session, 2)).file
            session.add(Doc(id=3, file=file("c"), other=lost))
            with pytest.raises(ObjectNotFoundError):
                await session.flush()
            session.expunge_all()
            await session.commit()
        await env.sql("DELETE FROM doc WHERE id = 2")
        await env.check(file_1="a")

    async def test_flush_refused_by_another_listener(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            doc = await get(session)
            doc.file = file("b")

            def refuse(*_: Any) -> None:
                raise BoomError

            event.listen(session.sync_session, "before_flush", refuse)
            with pytest.raises(BoomError):
                await session.flush()
            event.remove(session.sync_session, "before_flush", refuse)
            session.expunge_all()
            await session.commit()
        await env.check(file_1="a")

    async def test_flush_refused_by_another_listener_and_tried_again(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            doc = await get(session)
            doc.file, doc.other = file("b"), Attachment(io.BytesIO(b"c"))
            session.add(Doc(id=2, file=doc.other))

            def refuse(*_: Any) -> None:
                raise BoomError

            event.listen(session.sync_session, "before_flush", refuse)
            with pytest.raises(BoomError):
                await session.flush()
            event.remove(session.sync_session, "before_flush", refuse)
            await session.commit()
        await env.check(file_1="b", other_1="c", file_2="c")


class TestValues:
    async def test_copy(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            session.add(Doc(id=2, file=(await get(session)).file))
        await env.check(file_1="a", file_2="a")

    @pytest.mark.case("CON-05")
    async def test_same_one_on_two_new_rows(self, env: OrmEnvironment) -> None:
        shared = file("a")
        await env.add(Doc(id=1, file=shared), Doc(id=2, file=shared, other=shared))
        await env.check(file_1="a", file_2="a", other_2="a")
        async with env.sessions.begin() as session:
            await session.delete(await get(session))
        await env.check(file_2="a", other_2="a")

    async def test_copy_of_one_that_is_replaced_at_once(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await get(session)
            session.add(Doc(id=2, file=doc.file))
            doc.file = file("b")
        await env.check(file_1="b", file_2="a")

    async def test_copy_of_a_row_that_is_deleted_at_once(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await get(session)
            session.add(Doc(id=2, file=doc.file))
            await session.delete(doc)
        await env.check(file_2="a")

    async def test_swap(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        before = await env.objects()
        async with env.sessions.begin() as session:
            one, two = await get(session, 1), await get(session, 2)
            one.file, two.file = two.file, one.file
        await env.check(file_1="b", file_2="a")
        assert await env.objects() == before

    async def test_move_to_another_column(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        before = await env.objects()
        async with env.sessions.begin() as session:
            doc = await get(session)
            doc.other, doc.file = doc.file, None
        await env.check(other_1="a")
        assert await env.objects() == before

    async def test_move_over_another_file(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a"), other=file("b")))
        async with env.sessions.begin() as session:
            doc = await get(session)
            doc.other, doc.file = doc.file, None
        await env.check(other_1="a")

    async def test_move_in_two_flushes(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")), Doc(id=2))
        before = await env.objects()
        async with env.sessions.begin() as session:
            one, two = await get(session, 1), await get(session, 2)
            moving, one.file = one.file, None
            await session.flush()
            two.file = moving
        await env.check(file_2="a")
        assert await env.objects() == before

    async def test_one_given_up_for_two(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")), Doc(id=2), Doc(id=3))
        async with env.sessions.begin() as session:
            one, two, three = [await get(session, number) for number in (1, 2, 3)]
            two.file, three.file, one.file = one.file, one.file, None
        await env.check(file_2="a", file_3="a")

    async def test_round_of_three(self, env: OrmEnvironment) -> None:
        await env.add(*(Doc(id=number, file=file(str(number))) for number in (1, 2, 3)))
        async with env.sessions.begin() as session:
            one, two, three = [await get(session, number) for number in (1, 2, 3)]
            one.file, two.file, three.file = two.file, three.file, one.file
        await env.check(file_1="2", file_2="3", file_3="1")

    async def test_swap_rolled_back(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")))
        async with env.sessions() as session:
            one, two = await get(session, 1), await get(session, 2)
            one.file, two.file = two.file, one.file
            await session.flush()
            await session.rollback()
        await env.check(file_1="a", file_2="b")

    async def test_stored_before_and_taken(self, env: OrmEnvironment) -> None:
        early = await file("a").store(Doc.file)
        assert len(await env.objects()) == 1 + len(env.variants)
        await env.add(Doc(id=1, file=early))
        await env.check(file_1="a")
        assert env.backend.count("put_bytes") == 1 + len(env.variants)

    async def test_stored_before_and_rolled_back(self, env: OrmEnvironment) -> None:
        early = await file("a").store(Doc.file)
        async with env.sessions() as session:
            session.add(Doc(id=1, file=early))
            await session.flush()
            await session.rollback()
        await env.check()

    async def test_stored_before_and_taken_by_two(self, env: OrmEnvironment) -> None:
        early = await file("a").store(Doc.file)
        await env.add(Doc(id=1, file=early), Doc(id=2, file=early))
        await env.check(file_1="a", file_2="a")

    async def test_between_sessions(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as reading, env.sessions.begin() as session:
            session.add(Doc(id=2, file=(await get(reading)).file))
        await env.check(file_1="a", file_2="a")

    async def test_from_a_manager_of_another_base(self, env: OrmEnvironment) -> None:
        other = StorageManager(
            backends={"far": MemoryStorageBackend()},
            policies={"docs": StoragePolicy("docs", "far"), "x": StoragePolicy("x", "far")},
        )
        ref = await other.put_bytes(storage_key="x", model_name="m", entity_id="1", field_name="f", content=b"far")
        with other_base(other) as theirs:
            await env.add(Doc(id=1, file=Attachment._of(ref, theirs)))
        await env.check(file_1="far")
        assert await other.exists(ref)

    async def test_merge(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            detached = await get(session)
        detached.file = file("b")
        async with env.sessions.begin() as session:
            await session.merge(detached)
        await env.check(file_1="b")

    async def test_merge_without_a_change(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            detached = pickle.loads(pickle.dumps(await get(session)))  # noqa: S301
        async with env.sessions.begin() as session:
            await session.merge(detached)
        await env.check(file_1="a")

    async def test_merge_of_a_new_row(self, env: OrmEnvironment) -> None:
        async with env.sessions.begin() as session:
            await session.merge(Doc(id=1, file=file("a")))
        await env.check(file_1="a")

    async def test_detached_and_added_again(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as session:
            detached = await get(session)
        detached.file = file("b")
        async with env.sessions.begin() as session:
            session.add(detached)
        await env.check(file_1="b")

    async def test_expunge_before_a_flush(self, env: OrmEnvironment) -> None:
        async with env.sessions.begin() as session:
            doc = Doc(id=1, file=file("a"))
            session.add(doc)
            session.expunge(doc)
        await env.check()

    async def test_expunge_after_a_flush(self, env: OrmEnvironment) -> None:
        async with env.sessions.begin() as session:
            doc = Doc(id=1, file=file("a"))
            session.add(doc)
            await session.flush()
            session.expunge(doc)
        await env.check(file_1="a")


class TestWhatTheSessionDoesNotKnow:
    async def test_expired(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await get(session)
            session.expire(doc)
            doc.file = file("b")
        await env.check(file_1="b")

    async def test_expired_by_the_commit(self, env: OrmEnvironment) -> None:
        async with env.session(env.engine) as session:
            doc = Doc(id=1, file=file("a"))
            session.add(doc)
            await session.commit()
            doc.file = file("b")
            await session.commit()
            doc.file = None
            await session.commit()
        await env.check()

    async def test_expired_and_deleted(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await get(session)
            session.expire(doc)
            await session.delete(doc)
        await env.check()

    async def test_deferred(self, env: OrmEnvironment) -> None:
        await env.add(Note(id=1, scan=file("a")))
        async with env.sessions.begin() as session:
            (await session.get_one(Note, 1)).scan = file("b")
        assert await env.contents() == {("note", 1, "scan_ref"): b"b"}

    async def test_deferred_and_deleted(self, env: OrmEnvironment) -> None:
        await env.add(Note(id=1, scan=file("a")))
        async with env.sessions.begin() as session:
            await session.delete(await session.get_one(Note, 1))
        await env.check()

    async def test_changed_by_another_session(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions() as stale:
            doc = await get(stale)
            await stale.commit()
            async with env.sessions.begin() as session:
                (await get(session)).file = file("b")
            doc.file = file("c")
            await stale.commit()
        await env.check(file_1="c")

    async def test_deleted_with_a_file_of_another_session(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1))
        async with env.sessions() as stale:
            doc = await get(stale)
            await stale.commit()
            async with env.sessions.begin() as session:
                (await get(session)).file = file("b")
            await stale.delete(doc)
            await stale.commit()
        await env.check()

    async def test_row_changed_by_sql(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = await get(session)
            await session.execute(text("UPDATE doc SET title = 'x' WHERE id = 1"))
            doc.file = file("b")
        await env.check(file_1="b")

    async def test_stub_made_without_loading(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.sessions.begin() as session:
            doc = Doc(id=1)
            make_transient_to_detached(doc)
            session.add(doc)
            doc.file = file("b")
        await env.check(file_1="b")

    async def test_set_by_a_later_listener(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))

        def late(session: Session, *_: Any) -> None:
            for instance in session.dirty:
                instance.other = file("late")

        async with env.sessions() as session:
            event.listen(session.sync_session, "before_flush", late)
            (await get(session)).file = file("b")
            await session.commit()
        await env.check(file_1="b", other_1="late")

    async def test_set_in_the_midst_of_the_flush(self, env: OrmEnvironment) -> None:
        def late(_mapper: Any, _connection: Any, target: Doc) -> None:
            target.other = file("late")

        event.listen(Doc, "before_insert", late)
        try:
            await env.add(Doc(id=1, file=file("a")))
        finally:
            event.remove(Doc, "before_insert", late)
        await env.check(file_1="a", other_1="late")


async def family(session: AsyncSession) -> tuple[Parent, Child, Child]:
    """Return a parent and two children, whether they are its own or not."""
    return await session.get_one(Parent, 1), await session.get_one(Child, 1), await session.get_one(Child, 2)


class TestRelations:
    async def test_cascade_of_the_session(self, env: OrmEnvironment) -> None:
        await env.add(Parent(id=1, file=file("p"), children=[Child(id=1, file=file("c")), Child(id=2, file=file("d"))]))
        async with env.sessions.begin() as session:
            parent = await session.get_one(Parent, 1, options=[selectinload(Parent.children)])
            await session.delete(parent)
        await env.check()

    async def test_cascade_of_the_database(self, env: OrmEnvironment) -> None:
        await env.add(
            Parent(id=1, file=file("p"), children=[Child(id=1, file=file("c"), tags=[Tag(id=1, file=file("t"))])]),
            Parent(id=2, file=file("q"), children=[Child(id=2, file=file("d"), tags=[Tag(id=2, file=file("u"))])]),
        )
        async with env.sessions.begin() as session:
            await session.delete(await session.get_one(Parent, 1))
        assert sorted((await env.contents()).values()) == [b"d", b"q", b"u"]

    async def test_cascade_rolled_back(self, env: OrmEnvironment) -> None:
        await env.add(Parent(id=1, children=[Child(id=1, file=file("c"), tags=[Tag(id=1, file=file("t"))])]))
        async with env.sessions() as session:
            await session.delete(await session.get_one(Parent, 1))
            await session.flush()
            await session.rollback()
        assert sorted((await env.contents()).values()) == [b"c", b"t"]

    async def test_delete_orphan(self, env: OrmEnvironment) -> None:
        await env.add(Parent(id=1, children=[Child(id=1, file=file("c")), Child(id=2, file=file("d"))]))
        async with env.sessions.begin() as session:
            parent = await session.get_one(Parent, 1, options=[selectinload(Parent.children)])
            parent.children.remove(parent.children[0])
        assert list((await env.contents()).values()) == [b"d"]

    async def test_delete_orphan_in_a_savepoint_rolled_back(self, env: OrmEnvironment) -> None:
        await env.add(Parent(id=1, children=[Child(id=1, file=file("c"))]))
        async with env.sessions.begin() as session:
            parent = await session.get_one(Parent, 1, options=[selectinload(Parent.children)])
            savepoint = await session.begin_nested()
            parent.children.clear()
            await session.flush()
            await savepoint.rollback()
        assert list((await env.contents()).values()) == [b"c"]

    async def test_child_saved_from_its_parents_end(self, env: OrmEnvironment) -> None:
        await env.add(Parent(id=1, children=[Child(id=1, file=file("c"))]), Parent(id=2))
        async with env.sessions.begin() as session:
            one = await session.get_one(Parent, 1, options=[selectinload(Parent.children)])
            two = await session.get_one(Parent, 2, options=[selectinload(Parent.children)])
            two.children.append(one.children[0])
            await session.flush()
            await session.delete(one)
        assert list((await env.contents()).values()) == [b"c"]

    async def test_file_of_a_cascaded_row_moves_out(self, env: OrmEnvironment) -> None:
        await env.add(Parent(id=1, children=[Child(id=1, file=file("c"))]), Child(id=2))
        async with env.sessions.begin() as session:
            parent, one, two = await family(session)
            two.file, one.file = one.file, None
            await session.delete(parent)
        assert await env.contents() == {("child", 2, "file"): b"c"}

    async def test_file_of_a_cascaded_row_is_copied(self, env: OrmEnvironment) -> None:
        await env.add(Parent(id=1, children=[Child(id=1, file=file("c"))]), Child(id=2))
        async with env.sessions.begin() as session:
            parent = await session.get_one(Parent, 1)
            (await session.get_one(Child, 2)).file = (await session.get_one(Child, 1)).file
            await session.delete(parent)
        assert await env.contents() == {("child", 2, "file"): b"c"}

    async def test_row_comes_below_what_the_same_flush_deletes(self, env: OrmEnvironment) -> None:
        await env.add(Parent(id=1), Child(id=1, file=file("c"), tags=[Tag(id=1, file=file("t"))]), Child(id=2, file=file("d")))
        async with env.sessions.begin() as session:
            parent, child = await session.get_one(Parent, 1), await session.get_one(Child, 1)
            child.parent_id = 1
            await session.delete(parent)
        assert await env.contents() == {("child", 2, "file"): b"d"}

    async def test_file_is_put_below_what_the_same_flush_deletes(self, env: OrmEnvironment) -> None:
        await env.add(Parent(id=1), Child(id=1, file=file("c")))
        async with env.sessions.begin() as session:
            parent, child = await session.get_one(Parent, 1), await session.get_one(Child, 1)
            child.parent_id, child.file = 1, file("d")
            session.add(Child(id=2, parent_id=1, file=file("e")))
            await session.delete(parent)
        await env.check()

    async def test_file_moves_below_what_the_same_flush_deletes(self, env: OrmEnvironment) -> None:
        await env.add(Parent(id=1), Child(id=1, file=file("c")), Child(id=2))
        async with env.sessions.begin() as session:
            parent, one, two = await family(session)
            two.parent_id, two.file, one.file = 1, one.file, None
            await session.delete(parent)
        assert await env.contents() == {}

    async def test_file_that_was_given_up_goes_below_what_a_flush_deletes(self, env: OrmEnvironment) -> None:
        await env.add(Parent(id=1), Child(id=1, file=file("c")), Child(id=2))
        async with env.sessions.begin() as session:
            parent, one, two = await family(session)
            given, one.file = one.file, None
            await session.flush()
            two.parent_id, two.file = 1, given
            await session.delete(parent)
        assert await env.contents() == {}

    async def test_file_moves_out_of_a_row_that_comes_below_what_the_same_flush_deletes(self, env: OrmEnvironment) -> None:
        await env.add(Parent(id=1), Child(id=1, file=file("c")), Child(id=2))
        async with env.sessions.begin() as session:
            parent, one, two = await family(session)
            one.parent_id, two.file, one.file = 1, one.file, None
            await session.delete(parent)
        assert await env.contents() == {("child", 2, "file"): b"c"}

    async def test_branch_comes_below_what_the_same_flush_deletes(self, env: OrmEnvironment) -> None:
        await env.add(Node(id=1, file=file("1")), Node(id=2, file=file("2")))
        await env.add(Node(id=3, parent_id=2, file=file("3")))
        async with env.sessions.begin() as session:
            root, branch = await session.get_one(Node, 1), await session.get_one(Node, 2)
            branch.parent_id = 1
            await session.delete(root)
        await env.check()

    async def test_single_table_inheritance(self, env: OrmEnvironment) -> None:
        await env.add(Photo(id=1, file=file("a"), raw=file("b")), Item(id=2, file=file("c")))
        async with env.sessions.begin() as session:
            photo = await session.get_one(Photo, 1)
            photo.file, photo.raw = file("d"), None
        assert await env.contents() == {("item", 1, "file"): b"d", ("item", 2, "file"): b"c"}
        async with env.sessions.begin() as session:
            await session.delete(await session.get_one(Item, 1))
        assert await env.contents() == {("item", 2, "file"): b"c"}

    async def test_joined_inheritance(self, env: OrmEnvironment) -> None:
        await env.add(Report(id=1, file=file("a"), pdf=file("b")))
        async with env.sessions.begin() as session:
            report = await session.get_one(Report, 1)
            report.file, report.pdf = report.pdf, file("c")
        assert await env.contents() == {("item", 1, "file"): b"b", ("report", 1, "pdf"): b"c"}
        async with env.sessions.begin() as session:
            await session.delete(await session.get_one(Item, 1))
        await env.check()

    async def test_joined_inheritance_through_its_parent_expired(self, env: OrmEnvironment) -> None:
        await env.add(Report(id=1, file=file("a"), pdf=file("b")))
        async with env.sessions.begin() as session:
            item = await session.get_one(Item, 1)
            session.expire(item)
            await session.delete(item)
        await env.check()

    async def test_composite_key(self, env: OrmEnvironment) -> None:
        party = uuid.uuid4()
        contracts = [Contract(party=party, number=str(number), file=file(str(number))) for number in range(3)]
        await env.add(*contracts, Contract(number="0", file=file("x")))
        async with env.sessions.begin() as session:
            (await session.get_one(Contract, (party, "0"))).file = file("new")
            await session.delete(await session.get_one(Contract, (party, "1")))
        assert sorted((await env.contents()).values()) == [b"2", b"new", b"x"]

    async def test_composite_key_cascades(self, env: OrmEnvironment) -> None:
        contract = Contract(number="1", pages=[Page(id=1, file=file("a")), Page(id=2, file=file("b"))])
        await env.add(contract)
        async with env.sessions.begin() as session:
            await session.execute(Contract.__table__.delete())
        await env.check()

    async def test_client_side_key_names_the_location(self, env: OrmEnvironment) -> None:
        contract = Contract(number="7", file=file("a"))
        await env.add(contract)
        assert contract.file is not None
        assert str(contract.party) in contract.file.location

    async def test_primary_key_that_is_a_foreign_key(self, env: OrmEnvironment) -> None:
        await env.add(Person(id=1, passport=Passport(file=file("a"))))
        async with env.sessions.begin() as session:
            (await session.get_one(Passport, 1)).file = file("b")
        assert await env.contents() == {("passport", 1, "file"): b"b"}
        async with env.sessions.begin() as session:
            await session.delete(await session.get_one(Person, 1, options=[selectinload(Person.passport)]))
        await env.check()

    async def test_one_passport_for_another(self, env: OrmEnvironment) -> None:
        await env.add(Person(id=1, passport=Passport(file=file("a"))))
        async with env.sessions.begin() as session:
            person = await session.get_one(Person, 1, options=[selectinload(Person.passport)])
            person.passport = Passport(file=file("b"))
        assert await env.contents() == {("passport", 1, "file"): b"b"}


JOIN_MODES = ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]


class TestJoinedToAnExternalTransaction:
    @pytest.mark.case("DBF-25")
    @pytest.mark.parametrize("outer", ["commit", "rollback", "close"])
    @pytest.mark.parametrize("inner", ["commit", "rollback", "close"])
    @pytest.mark.parametrize("mode", JOIN_MODES)
    async def test_every_end(self, env: OrmEnvironment, mode: Any, inner: str, outer: str) -> None:
        await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("x")))
        async with env.engine.connect() as connection:
            transaction = await connection.begin()
            async with env.session(connection, join_transaction_mode=mode, expire_on_commit=False) as session:
                (await get(session)).file = file("b")
                await session.delete(await get(session, 2))
                session.add(Doc(id=3, file=file("c")))
                await session.flush()
                if inner != "close":
                    await (session.commit() if inner == "commit" else session.rollback())
            await end(connection, transaction, outer)
        # What SQLAlchemy says of the modes: only "create_savepoint" leaves the outer transaction alone.
        left_open = mode in ("conditional_savepoint", "rollback_only")
        committed = {
            "commit": outer == "commit" or mode == "control_fully",
            "rollback": False,
            "close": outer == "commit" and left_open,
        }[inner]
        await (env.check(file_1="b", file_3="c") if committed else env.check(file_1="a", file_2="x"))

    @pytest.mark.parametrize("outer", ["commit", "rollback"])
    @pytest.mark.parametrize("middle", ["release", "rollback"])
    @pytest.mark.parametrize("inner", ["commit", "rollback", "close"])
    @pytest.mark.parametrize("mode", JOIN_MODES)
    async def test_in_an_outer_savepoint(self, env: OrmEnvironment, mode: Any, inner: str, middle: str, outer: str) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.engine.connect() as connection:
            transaction = await connection.begin()
            savepoint = await connection.begin_nested()
            async with env.session(connection, join_transaction_mode=mode, expire_on_commit=False) as session:
                (await get(session)).file = file("b")
                await session.flush()
                if inner != "close":
                    await (session.commit() if inner == "commit" else session.rollback())
            if savepoint.is_active:
                await (savepoint.commit() if middle == "release" else savepoint.rollback())
            else:
                middle = "release"
            await end(connection, transaction, outer)
        survives = inner == "commit" or (inner == "close" and mode == "rollback_only")
        await env.check(file_1="b" if survives and middle == "release" and outer == "commit" else "a")

    @pytest.mark.parametrize("outer", ["commit", "rollback"])
    async def test_two_sessions_one_after_the_other(self, env: OrmEnvironment, outer: str) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.engine.connect() as connection:
            transaction = await connection.begin()
            for content in ("b", "c"):
                async with env.session(connection, join_transaction_mode="create_savepoint") as session:
                    (await get(session)).file = file(content)
                    await session.commit()
            await end(connection, transaction, outer)
        await env.check(file_1="c" if outer == "commit" else "a")

    async def test_one_of_two_sessions_rolled_back(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.engine.begin() as connection:
            for content in ("b", "c"):
                async with env.session(connection, join_transaction_mode="create_savepoint") as session:
                    (await get(session)).file = file(content)
                    await session.flush()
                    await (session.commit() if content == "b" else session.rollback())
        await env.check(file_1="b")

    async def test_commits_in_one_session(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.engine.connect() as connection:
            await connection.begin()
            async with env.session(connection, join_transaction_mode="create_savepoint") as session:
                for content in ("b", "c", "d"):
                    (await get(session)).file = file(content)
                    await session.commit()
                session.add(Doc(id=2, file=file("e")))
                await session.flush()
            assert env.backend.count("delete") == 0
            await connection.commit()
        await env.check(file_1="d")

    async def test_outer_rolled_back_before_the_session_ends(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.engine.connect() as connection:
            transaction = await connection.begin()
            async with env.session(connection, join_transaction_mode="create_savepoint") as session:
                (await get(session)).file = file("b")
                await session.flush()
                await transaction.rollback()
        await env.check(file_1="a")

    async def test_several_transactions_of_one_connection(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.engine.connect() as connection:
            for content, outer in (("b", "commit"), ("c", "rollback"), ("d", "commit"), ("e", "rollback")):
                transaction = await connection.begin()
                async with env.session(connection, join_transaction_mode="create_savepoint") as session:
                    (await get(session)).file = file(content)
                    await session.commit()
                await end(connection, transaction, outer)
        await env.check(file_1="d")

    async def test_savepoint_opened_after_the_session_worked(self, env: OrmEnvironment) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.engine.connect() as connection:
            await connection.begin()
            async with env.session(connection, join_transaction_mode="rollback_only") as session:
                (await get(session)).file = file("b")
                await session.flush()
                savepoint = await connection.begin_nested()
                await session.commit()
            await savepoint.rollback()
            await connection.commit()
        await env.check(file_1="b")


async def end(connection: Any, transaction: Any, how: str) -> None:
    """End an outer transaction, unless a session has ended it."""
    if how == "close" or not transaction.is_active:
        await connection.close()
    else:
        await (transaction.commit() if how == "commit" else transaction.rollback())


class TestTwoPhases:
    @pytest.fixture(autouse=True)
    def _on_psycopg(self, env: OrmEnvironment) -> None:
        if env.database.name != "psycopg":
            pytest.skip("only psycopg has two-phase transactions here")

    @pytest.mark.parametrize("how", ["commit", "prepare and commit", "rollback", "prepare and roll back", "close"])
    async def test_ends(self, env: OrmEnvironment, how: str) -> None:
        await env.add(Doc(id=1, file=file("a")))
        async with env.session(env.engine, twophase=True, expire_on_commit=False) as session:
            (await get(session)).file = file("b")
            await session.flush()
            if how.startswith("prepare"):
                await session.run_sync(Session.prepare)
            if how.endswith("commit"):
                await session.commit()
            elif how != "close":
                await session.rollback()
        await env.check(file_1="b" if how.endswith("commit") else "a")

    async def test_refused_prepare(self, env: OrmEnvironment) -> None:
        """SQLAlchemy goes on to roll back what was never prepared, and the driver may refuse that, at the close too."""

        async def refused() -> None:
            async with env.session(env.engine, twophase=True) as session:
                session.add(Booking(id=1, person_id=9, file=file("a")))
                await session.commit()

        with pytest.raises((DBAPIError, psycopg.Error)):
            await refused()
        await env.check()
