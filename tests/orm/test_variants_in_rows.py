"""The variants in a row's value go where their original goes, and are deleted with it, whatever the session knows of them."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import delete, select, text, type_coerce, update

from granite_storage import Attachment
from granite_storage.orm.columns import StoredObjectRefType
from granite_storage.refs import StoredObjectRef, iter_refs
from tests.orm.environment import Base, Child, Doc, Node, OrmEnvironment, Parent


async def give(env: OrmEnvironment, id: int, *names: str, column: str = "file", table: str = "doc") -> None:
    """Add variants to the file of a row, as a worker does: past every session."""
    found = Base.metadata.tables[table]
    async with env.engine.begin() as connection:
        held = type_coerce(found.c[column], StoredObjectRefType())
        ref: StoredObjectRef = (await connection.execute(select(held).where(found.c.id == id))).scalar_one()
        made = dict(ref.variants or {})
        for name in names:
            made[name] = await put_variant(env, ref, name)
        value = type_coerce(ref.with_variants(made), StoredObjectRefType())
        await connection.execute(update(found).where(found.c.id == id).values({column: value}))


async def put_variant(env: OrmEnvironment, ref: StoredObjectRef, name: str) -> StoredObjectRef:
    content = name.encode() + b" of " + await env.manager.get(ref)
    return await env.manager.put_bytes(content=content, storage_key="docs", model_name="doc", entity_id="1", field_name=name)


async def shown(env: OrmEnvironment) -> dict[int, dict[str, bytes]]:
    """Return what each row of `doc` shows: the content of its file and of the variants, by name."""
    async with env.sessions() as session:
        docs = (await session.scalars(select(Doc).where(Doc.file.is_not(None)))).all()
    found: dict[int, dict[str, bytes]] = {}
    for doc in docs:
        assert doc.file is not None
        names = ["", *(doc.file.ref.variants or ())]
        found[doc.id] = {name: await env.manager.get(ref) for name, ref in zip(names, iter_refs(doc.file.ref), strict=True)}
    return found


class TestLeaving:
    """What a row loses, it loses with all variants, those included that came after the session had read the row."""

    @pytest.fixture
    async def loaded(self, env: OrmEnvironment) -> Any:
        """A session that has read the row before it has got its second variant."""
        await env.add(Doc(id=1, file=Attachment(b"one")))
        await give(env, 1, "thumb")
        async with env.sessions() as session:
            doc = await session.get_one(Doc, 1)
            assert doc.file is not None
            assert set(doc.file.ref.variants or ()) == {"thumb"}
            await session.commit()
            await give(env, 1, "card")
            yield session, doc

    async def test_replaced(self, env: OrmEnvironment, loaded: Any) -> None:
        session, doc = loaded
        doc.file = Attachment(b"two")
        await session.commit()
        assert await shown(env) == {1: {"": b"two"}}

    async def test_cleared(self, env: OrmEnvironment, loaded: Any) -> None:
        session, doc = loaded
        doc.file = None
        await session.commit()
        assert await shown(env) == {}

    async def test_deleted(self, env: OrmEnvironment, loaded: Any) -> None:
        session, doc = loaded
        await session.delete(doc)
        await session.commit()
        assert await shown(env) == {}

    async def test_moved(self, env: OrmEnvironment, loaded: Any) -> None:
        session, doc = loaded
        other = Doc(id=2, file=doc.file)
        doc.file = None
        session.add(other)
        await session.commit()
        assert await shown(env) == {2: {"": b"one", "thumb": b"thumb of one", "card": b"card of one"}}

    async def test_moved_away_and_back_in_one_transaction(self, env: OrmEnvironment, loaded: Any) -> None:
        session, doc = loaded
        file, doc.file = doc.file, None
        await session.flush()
        doc.file = file
        await session.commit()
        assert await shown(env) == {1: {"": b"one", "thumb": b"thumb of one", "card": b"card of one"}}

    async def test_moved_in_a_savepoint_that_is_rolled_back(self, env: OrmEnvironment, loaded: Any) -> None:
        session, doc = loaded
        savepoint = await session.begin_nested()
        file, doc.file = doc.file, None
        session.add(Doc(id=2, file=file))
        await session.flush()
        await savepoint.rollback()
        await session.commit()
        assert await shown(env) == {1: {"": b"one", "thumb": b"thumb of one", "card": b"card of one"}}

    async def test_rolled_back(self, env: OrmEnvironment, loaded: Any) -> None:
        session, doc = loaded
        doc.file = Attachment(b"two")
        await session.flush()
        await session.rollback()
        assert await shown(env) == {1: {"": b"one", "thumb": b"thumb of one", "card": b"card of one"}}

    async def test_swapped(self, env: OrmEnvironment, loaded: Any) -> None:
        session, doc = loaded
        await env.add(Doc(id=2, file=Attachment(b"two")))
        other = await session.get_one(Doc, 2)
        await session.commit()
        await give(env, 2, "thumb")
        doc.file, other.file = other.file, doc.file
        await session.commit()
        assert await shown(env) == {
            1: {"": b"two", "thumb": b"thumb of two"},
            2: {"": b"one", "thumb": b"thumb of one", "card": b"card of one"},
        }

    async def test_deleted_in_bulk(self, env: OrmEnvironment, loaded: Any) -> None:
        session, _ = loaded
        await session.execute(delete(Doc))
        await session.commit()
        assert await shown(env) == {}

    async def test_cleared_in_bulk(self, env: OrmEnvironment, loaded: Any) -> None:
        session, _ = loaded
        await session.execute(update(Doc).values(file=None))
        await session.commit()
        assert await shown(env) == {}

    async def test_another_attribute_is_changed(self, env: OrmEnvironment, loaded: Any) -> None:
        session, doc = loaded
        doc.title = "new"
        await session.commit()
        assert await shown(env) == {1: {"": b"one", "thumb": b"thumb of one", "card": b"card of one"}}

    async def test_assigned_as_it_was_read(self, env: OrmEnvironment, loaded: Any) -> None:
        """A stale value of the same object is no change, and never written over the variants that came since."""
        session, doc = loaded
        file, doc.file = doc.file, None
        doc.file, doc.title = file, "new"
        await session.commit()
        assert await shown(env) == {1: {"": b"one", "thumb": b"thumb of one", "card": b"card of one"}}


async def test_a_copy_has_none_of_the_variants(env: OrmEnvironment) -> None:
    """They are of the original, which keeps them."""
    await env.add(Doc(id=1, file=Attachment(b"one")))
    await give(env, 1, "thumb")
    async with env.sessions.begin() as session:
        doc = await session.get_one(Doc, 1)
        session.add(Doc(id=2, file=doc.file))
    assert await shown(env) == {1: {"": b"one", "thumb": b"thumb of one"}, 2: {"": b"one"}}


@pytest.mark.parametrize("through", ["database", "session"])
async def test_a_cascade(env: OrmEnvironment, through: str) -> None:
    await env.add(Parent(id=1, children=[Child(id=1, file=Attachment(b"one"))]))
    await give(env, 1, "thumb", table="child")
    async with env.sessions.begin() as session:
        parent = await session.get_one(Parent, 1)
        if through == "session":
            await session.run_sync(lambda _: parent.children[:])
        await session.delete(parent)
    await env.recover()
    assert await env.objects() == set()


async def test_a_tree_of_cascades(env: OrmEnvironment) -> None:
    await env.add(Node(id=1))
    await env.add(Node(id=2, parent_id=1, file=Attachment(b"one")))
    await env.add(Node(id=3, parent_id=2, file=Attachment(b"two")))
    await give(env, 2, "thumb", table="node")
    await give(env, 3, "thumb", "card", table="node")
    async with env.sessions.begin() as session:
        await session.delete(await session.get_one(Node, 1))
    await env.recover()
    assert await env.objects() == set()


async def test_a_row_that_sql_has_copied_keeps_the_variants(env: OrmEnvironment) -> None:
    """Two rows then share original and variants, which stay until the last of them goes."""
    await env.add(Doc(id=1, file=Attachment(b"one")), Doc(id=2))
    await give(env, 1, "thumb")
    await env.sql("UPDATE doc SET file = (SELECT file FROM (SELECT * FROM doc) AS d WHERE d.id = 1) WHERE id = 2")
    async with env.sessions.begin() as session:
        await session.delete(await session.get_one(Doc, 1))
    await env.recover()
    assert await shown(env) == {2: {"": b"one", "thumb": b"thumb of one"}}
    async with env.sessions.begin() as session:
        await session.execute(text("SELECT 1"))
        await session.delete(await session.get_one(Doc, 2))
    await env.recover()
    assert await env.objects() == set()
