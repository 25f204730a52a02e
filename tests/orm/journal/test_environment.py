"""The check that every test with a journal ends with notices what it is there for."""

from __future__ import annotations

import pytest
from sqlalchemy import insert

from granite_storage.orm.journal.intents import new_id
from granite_storage.orm.journal.tables import COMMIT
from tests.orm.databases import Database
from tests.orm.environment import Doc, OrmEnvironment, file


@pytest.fixture
def database(asyncpg_database: Database) -> Database:
    """One database: what is tested here is not the library."""
    return asyncpg_database


async def test_an_upload_under_lease_is_noticed(env: OrmEnvironment) -> None:
    await env.add(Doc(id=1, file=file("a")))
    await file("b").store(Doc.file)
    with pytest.raises(AssertionError, match="orphans"):
        await env.check_recovery()
    await env.recover()


async def test_an_orphan_is_noticed(unchecked_env: OrmEnvironment) -> None:
    await unchecked_env.backend.put_bytes("doc/1/file/nobodys", b"a")
    with pytest.raises(AssertionError, match=r"orphans: .*nobodys"):
        await unchecked_env.check_recovery()


async def test_a_dangling_reference_is_noticed(unchecked_env: OrmEnvironment) -> None:
    doc = Doc(id=1, file=file("a"))
    await unchecked_env.add(doc)
    await unchecked_env.lose(doc, "file")
    with pytest.raises(AssertionError, match=r"dangling: .*doc/1/file"):
        await unchecked_env.check_recovery()


async def test_a_reference_that_recovery_lets_dangle_is_noticed(
    unchecked_env: OrmEnvironment, monkeypatch: pytest.MonkeyPatch
) -> None:
    doc = Doc(id=1, file=file("a"))
    await unchecked_env.add(doc)
    assert unchecked_env.journal is not None
    monkeypatch.setattr(unchecked_env.journal, "recover", lambda: unchecked_env.lose(doc, "file"))
    with pytest.raises(AssertionError, match=r"dangling: .*doc/1/file"):
        await unchecked_env.check_recovery()


async def test_a_row_that_stays_in_the_journal_is_noticed(unchecked_env: OrmEnvironment) -> None:
    assert unchecked_env.journal is not None
    async with unchecked_env.engine.begin() as connection:
        await connection.execute(insert(unchecked_env.journal.tables.decision).values(id=new_id(), outcome=COMMIT))
    with pytest.raises(AssertionError, match="not empty"):
        await unchecked_env.check_recovery()
