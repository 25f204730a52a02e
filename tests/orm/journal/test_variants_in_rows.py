"""The variants in rows once more, with a journal; and their pending deletes, which an undo cancels."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select

from granite_storage import Attachment, StaleAttachmentError
from granite_storage.orm.journal.deletes import delete_id
from granite_storage.refs import StoredObjectRef
from tests.orm import test_variants_in_rows
from tests.orm.environment import Doc, OrmEnvironment
from tests.orm.journal.test_recovery import retention
from tests.orm.test_variants_in_rows import give, shown

globals().update({name: value for name, value in vars(test_variants_in_rows).items() if name.lower().startswith("test")})


async def given_up(env: OrmEnvironment, *names: str) -> StoredObjectRef:
    """Return what a row has held, with variants."""
    await env.add(Doc(id=1, file=Attachment(b"one")))
    await give(env, 1, *names)
    async with env.sessions.begin() as session:
        doc = await session.get_one(Doc, 1)
        assert doc.file is not None
        ref = doc.file.ref
        doc.file = None
    return ref


async def restore(env: OrmEnvironment, ref: StoredObjectRef) -> None:
    async with env.sessions.begin() as session:
        (await session.get_one(Doc, 1)).file = Attachment.restore(ref)


async def test_a_row_that_sql_has_copied_keeps_the_variants(env: OrmEnvironment) -> None:
    """The worker looks for a variant in the rows that hold its original."""
    await test_variants_in_rows.test_a_row_that_sql_has_copied_keeps_the_variants(env)


async def test_each_of_them_is_noted_with_its_original(env: OrmEnvironment) -> None:
    ref = await given_up(env, "thumb", "card")
    assert env.journal is not None
    assert ref.variants is not None
    intent = env.journal.tables.intent
    async with env.engine.connect() as connection:
        noted = {row.location: row.source for row in await connection.execute(select(intent))}
    assert noted == {ref.location: None, **{variant.location: ref.location for variant in ref.variants.values()}}


async def test_an_undo_brings_them_back(env: OrmEnvironment) -> None:
    ref = await given_up(env, "thumb", "card")
    await restore(env, ref)
    await env.recover()
    assert await shown(env) == {1: {"": b"one", "thumb": b"thumb of one", "card": b"card of one"}}


async def test_a_worker_waits_for_an_undo_that_is_not_committed(env: OrmEnvironment) -> None:
    ref = await given_up(env, "thumb", "card")
    assert env.journal is not None
    async with env.sessions.begin() as session:
        (await session.get_one(Doc, 1)).file = Attachment.restore(ref)
        await session.flush()
        await env.journal.recover()
    await env.recover()
    assert await shown(env) == {1: {"": b"one", "thumb": b"thumb of one", "card": b"card of one"}}


@pytest.mark.parametrize("fate", ["gone", "fenced"])
async def test_an_undo_leaves_out_what_no_longer_waits(env: OrmEnvironment, fate: str) -> None:
    ref = await given_up(env, "thumb", "card")
    assert env.journal is not None
    assert ref.variants is not None
    thumb = ref.variants["thumb"]
    own = delete_id(thumb.backend, thumb.location)
    if fate == "gone":
        await env.journal.settle([own])
    else:
        await env.journal._recoveries()[-1]._fence(env.journal.tables.intent.c.id == own)
    await restore(env, ref)
    await env.recover()
    assert await shown(env) == {1: {"": b"one", "card": b"card of one"}}


async def test_an_undo_that_is_rolled_back_leaves_them_to_be_deleted(env: OrmEnvironment) -> None:
    ref = await given_up(env, "thumb")
    with pytest.raises(ZeroDivisionError):
        async with env.sessions.begin() as session:
            (await session.get_one(Doc, 1)).file = Attachment.restore(ref)
            await session.flush()
            raise ZeroDivisionError
    await env.recover()
    assert await env.objects() == set()
    with pytest.raises(StaleAttachmentError):
        await restore(env, ref)


async def test_a_retention_keeps_them_as_long_as_the_original(env: OrmEnvironment) -> None:
    assert env.journal is not None
    with retention(timedelta(days=7)):
        await given_up(env, "thumb")
        await env.journal.recover()
        assert len(await env.objects()) == 2
    await env.recover()
    assert await env.objects() == set()
