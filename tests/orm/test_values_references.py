"""`iter_model_storage_refs`: every ref of a column, and never the whole table in memory."""

from __future__ import annotations

import json
from collections.abc import Awaitable
from contextlib import aclosing
from typing import Any

import psutil
import pytest
from sqlalchemy import insert

from granite_storage import ConfigurationError, StoredObjectRef
from granite_storage.exceptions import InvalidReferenceError
from granite_storage.orm import Attachment, bind_storage, iter_model_storage_refs, references
from tests.orm.values import (
    Base,
    Document,
    Film,
    Item,
    Photo,
    Receipt,
    Sessions,
    add,
    make_manager,
    write_raw,
)

MANY = 20_000


def a_ref(number: int) -> StoredObjectRef:
    return StoredObjectRef("documents", "memory", f"docs/{number}", number, "", extra={"padding": "x" * 100})


async def test_managed_and_plain_columns(sessions: Sessions) -> None:
    binding = bind_storage(Base, make_manager())
    documents = [Document(file=Attachment(b"%d" % number)) for number in range(3)]
    async with sessions.begin() as session:
        session.add_all([*documents, Document(), Receipt(ref=a_ref(1)), Receipt()])
    async with sessions() as session:
        found = [ref async for ref in iter_model_storage_refs(session, Document, "file")]
        assert found == [document.file.ref for document in documents if document.file]
        assert [ref async for ref in iter_model_storage_refs(session, Receipt, "ref")] == [a_ref(1)]
    binding.unbind()


async def test_inherited_columns_are_those_of_the_model(sessions: Sessions) -> None:
    binding = bind_storage(Base, make_manager())
    photo = await add(sessions, Photo(file=Attachment(b"photo")))
    film = await add(sessions, Film(file=Attachment(b"film"), poster=Attachment(b"poster")))
    async with sessions() as session:

        async def refs(model: type[Item], column: str) -> set[StoredObjectRef]:
            return {ref async for ref in iter_model_storage_refs(session, model, column)}

        assert await refs(Item, "file") == {photo.file.ref, film.file.ref}
        assert await refs(Photo, "file") == {photo.file.ref}
        assert await refs(Film, "file") == {film.file.ref}
        assert await refs(Film, "poster") == {film.poster.ref}
    binding.unbind()


@pytest.mark.parametrize("column", ["title", "folder", "nothing", "id"])
async def test_a_column_without_refs_is_refused(sessions: Sessions, column: str) -> None:
    async with sessions() as session:
        with pytest.raises(ConfigurationError, match=f"Document.{column} is not a column of refs"):
            await anext(iter_model_storage_refs(session, Document, column))


async def test_a_broken_value_raises(sessions: Sessions) -> None:
    await add(sessions, Document())
    await write_raw(sessions, "{broken")
    async with sessions() as session:
        with pytest.raises(InvalidReferenceError):
            await anext(iter_model_storage_refs(session, Document, "file"))


async def test_an_iteration_that_ends_early_lets_go(sessions: Sessions) -> None:
    async with sessions.begin() as session:
        await session.execute(insert(Receipt), [{"ref": a_ref(number)} for number in range(2000)])
    async with sessions() as session:
        async with aclosing(iter_model_storage_refs(session, Receipt, "ref")) as refs:
            assert await anext(refs) == a_ref(0)
        await add(sessions, Receipt())


async def test_cancelled_count_waits_once(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statements that do not end are cut off after a time, which one wait inside another would double."""
    depths = [0]

    async def shielded(work: Awaitable[Any], *, timeout: float) -> Any:
        depths.append(depths[-1] + 1)
        try:
            return await work
        finally:
            depths.append(depths[-1] - 1)

    monkeypatch.setattr(references, "shielded", shielded)
    binding = bind_storage(Base, make_manager(), session_factory=sessions)
    await add(sessions, Document(file=Attachment(b"a")))
    assert await references.Scan(binding).count() == 1
    assert max(depths) == 1
    binding.unbind()


async def test_memory_stays_flat(sessions: Sessions) -> None:
    text = json.dumps(a_ref(7).to_dict())
    async with sessions.begin() as session:
        connection = await session.connection()
        for _ in range(10):
            statement = f"INSERT INTO receipt (ref) VALUES {', '.join(['(?)'] * (MANY // 10))}"  # noqa: S608
            await connection.exec_driver_sql(statement, (text,) * (MANY // 10))
    process, seen, sizes = psutil.Process(), 0, []
    async with sessions() as session:
        async for ref in iter_model_storage_refs(session, Receipt, "ref"):
            assert ref.size == 7
            seen += 1
            if seen % 1000 == 0:
                sizes.append(process.memory_info().rss)
    assert seen == MANY
    assert max(sizes) - sizes[1] < 8 * 1024 * 1024
