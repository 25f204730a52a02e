"""Variants to which more than one row refers once more, with a journal, whose worker looks for what refers to them."""

from __future__ import annotations

import logging

import pytest
from sqlalchemy import update

from granite_storage.exceptions import StaleAttachmentError
from granite_storage.orm.journal import variant_jobs
from tests.orm.databases import Database
from tests.orm.derivations import Upper, declared
from tests.orm.environment import Doc, OrmEnvironment, file, orm_environment
from tests.orm.sharing import SHARED, TAKEN
from tests.orm.test_shared_variants import require_kept, test_a_cascade

__all__ = ["test_a_cascade"]

pytestmark = pytest.mark.case("RE-03")


IN_QUESTION = [(what, how) for what in TAKEN for how in SHARED if how != "another column"]
"""The worker lets the rows of all columns of its journal's own bases have a new variant, so that none is left behind there."""


@pytest.mark.parametrize(("what", "how"), IN_QUESTION)
async def test_a_variant_stays_while_anything_refers_to_it(env: OrmEnvironment, what: str, how: str) -> None:
    if env.database.is_sqlite and how == "another schema":
        pytest.skip("rows with files in attached files are refused where there is a journal")
    await require_kept(env, what, how)


async def test_the_callers_own_transaction(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It keeps the journal's tables locked as well on SQLite, where the worker deletes the variant later."""
    monkeypatch.setattr(variant_jobs, "LONGEST_WAIT", 0.3)
    async with orm_environment(database, journaled=True) as env:
        with declared({"card": Upper(when="request")}):
            await env.add(Doc(id=1, file=file("x")))
            async with env.sessions() as session:
                doc = await session.get_one(Doc, 1)
                assert doc.file is not None
                await session.execute(update(Doc).values(title="changed"))
                with (
                    caplog.at_level(logging.WARNING, "granite_storage"),
                    pytest.raises(StaleAttachmentError, match=r"has locked the rows .* the caller's own"),
                ):
                    await doc.file.variant("card")
                assert [record for record in caplog.records if record.exc_info] == []
                if database.is_sqlite:
                    assert "1 variants that no row has taken are left to the journal's worker" in caplog.text
                await session.commit()
                await env.recover()
                await doc.file.variant("card")
            await env.check(file_1="x")
