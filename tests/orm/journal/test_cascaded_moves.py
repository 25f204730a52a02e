"""Files that go by a cascade in the flush that has just moved them: one intent each, because an undo cancels only one."""

from __future__ import annotations

from sqlalchemy import func, select

from tests.orm.environment import Child, OrmEnvironment, Parent, file


async def test_a_file_that_was_given_up_before_has_one_intent(env: OrmEnvironment) -> None:
    assert env.journal is not None
    intent = env.journal.tables.intent
    await env.add(Parent(id=1), Child(id=1, file=file("c")), Child(id=2))
    async with env.sessions.begin() as session:
        parent = await session.get_one(Parent, 1)
        one, two = await session.get_one(Child, 1), await session.get_one(Child, 2)
        given, one.file = one.file, None
        await session.flush()
        two.parent_id, two.file = 1, given
        await session.delete(parent)
        await session.flush()
        assert await session.scalar(select(func.count()).select_from(intent)) == 1
    assert await env.contents() == {}
