"""Attachments compared with each other and, in SQL, with what rows hold."""

from __future__ import annotations

import pickle

import pytest
from sqlalchemy import func, select

from granite_storage.orm import Attachment
from tests.orm.environment import Doc, OrmEnvironment, file

pytestmark = [pytest.mark.case("RB-15"), pytest.mark.parametrize("database", ["sqlite", "asyncpg"], indirect=True)]


async def loaded(env: OrmEnvironment, number: int = 1) -> Attachment:
    async with env.sessions() as session:
        found = (await session.get_one(Doc, number)).file
        assert found is not None
        return found


async def test_two_of_one_object(env: OrmEnvironment) -> None:
    stored = file("a")
    await env.add(Doc(id=1, file=stored), Doc(id=2, file=file("a")))
    one, other = await loaded(env), await loaded(env)
    assert one is not other
    assert stored == one == other == pickle.loads(pickle.dumps(one))  # noqa: S301
    assert hash(stored) == hash(one) == hash(other)
    assert len({stored, one, other}) == 1
    assert one in [other]
    different = await loaded(env, 2)
    assert one != different
    assert len({one, different}) == 2
    assert one != "a"
    assert one is not None


async def test_pending(env: OrmEnvironment) -> None:
    pending, same = file("a", "/home/me/a.txt"), file("a", "/home/me/a.txt")
    assert pending == pending
    assert pending != same
    assert len({pending, same}) == 2


async def test_hash_stays_when_it_is_stored_and_when_it_is_rolled_back(env: OrmEnvironment) -> None:
    attachment = file("a", "../x/a\u202e.txt")
    kept = {attachment: 1}
    async with env.sessions() as session:
        session.add(Doc(id=1, file=attachment))
        await session.flush()
        assert kept[attachment] == 1
        await session.rollback()
        assert kept[attachment] == 1
        session.add(Doc(id=2, file=attachment))
        await session.commit()
    assert kept[attachment] == kept[await loaded(env, 2)] == 1


async def test_broken(env: OrmEnvironment) -> None:
    await env.add(Doc(id=1, file=file("a")))
    sound = await loaded(env)
    async with env.sessions() as session:
        await env.sql("UPDATE doc SET file = '{}' WHERE id = 1")
        one, other = await loaded(env), await loaded(env)
        await session.rollback()
    assert one == one
    assert one not in (other, sound)
    assert len({one, other, sound}) == 3
    await env.manager.delete(sound.ref)
    await env.sql("DELETE FROM doc")


async def test_in_sql(env: OrmEnvironment) -> None:
    await env.add(Doc(id=1, file=file("a")), Doc(id=2, file=file("b")), Doc(id=3))
    stored, pending = await loaded(env), file("a")

    async with env.sessions() as session:

        async def numbers(*criteria: object) -> list[int]:
            return list(await session.scalars(select(Doc.id).where(*criteria).order_by(Doc.id)))  # type: ignore[arg-type]

        assert await numbers(Doc.file == stored) == [1]
        assert await numbers(Doc.file != stored) == [2]
        assert await numbers(Doc.file == pending) == []
        assert await numbers(Doc.file != pending) == [1, 2]
        assert await numbers(Doc.file.in_([pending, stored])) == [1]
        assert await numbers(Doc.file.in_([pending])) == []
        assert await numbers(Doc.file.not_in([pending, stored])) == [2]
        assert await session.scalar(select(func.count()).where(Doc.file == pending)) == 0


async def test_upsert_of_a_repository(env: OrmEnvironment) -> None:
    """A repository looks for a row by all that the new one has, before it adds it."""
    new = Doc(id=1, title="t", file=file("a"))
    async with env.sessions.begin() as session:
        found = await session.scalar(select(Doc).where(Doc.title == new.title, Doc.file == new.file))
        assert found is None
        session.add(new)
    await env.check(file_1="a")
