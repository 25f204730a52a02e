"""Deletes that the database refuses: both panels show its message, and nothing is deleted."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.contrib.panels import BOTH, NOTHING, Contract, Panel

SCAN = ("scan.pdf", b"%PDF-1.7", "application/pdf")


async def keep(panel: Panel, table: str) -> None:
    """Let the database refuse deletes from a table."""
    await panel.sql(f"CREATE TRIGGER kept BEFORE DELETE ON {table} BEGIN SELECT RAISE(ABORT, 'it is kept'); END")


async def delete(panel: Panel, *keys: int) -> httpx.Response:
    if panel.saved == 302:
        return await panel.client.delete(f"/user/delete?pks={','.join(map(str, keys))}")
    pks = "&".join(f"pks={key}" for key in keys)
    path = f"/_api/user/action?{pks}" if len(keys) > 1 else f"/_api/user/row-action?pk={keys[0]}"
    return await panel.client.post(f"{path}&name=delete")


async def test_one(panel: Panel) -> None:
    await panel.create()
    await keep(panel, "panel_user")
    answer = await delete(panel, 1)
    assert answer.status_code < 500
    assert "it is kept" in answer.text.replace("%20", " ").replace("+", " ")
    assert len(await panel.check()) == 1


of_starlette_admin: Any = pytest.mark.parametrize("panel", BOTH[2:], indirect=True, ids="-".join)


@of_starlette_admin
async def test_several(panel: Panel) -> None:
    await panel.create()
    await panel.create("Grace")
    await keep(panel, "panel_user")
    answer = await delete(panel, 1, 2)
    assert (answer.status_code, answer.json()) == (400, {"msg": "The database refuses this row: it is kept"})
    assert len(await panel.check()) == 2


@of_starlette_admin
async def test_one_within_a_form(panel: Panel) -> None:
    await panel.create()
    form = {"name": "Ada", "inlines.contract.0.title": "One"}
    await panel.send("/user/edit?pk=1", True, {"avatar": NOTHING, "inlines.contract.0.scan": SCAN}, **form)
    await keep(panel, "panel_contract")
    form |= {"inlines.contract.0.pk": "1", "inlines.contract.0.DELETE": "on"}
    page = await panel.send("/user/edit?pk=1", False, {"avatar": NOTHING, "inlines.contract.0.scan": NOTHING}, **form)
    assert "The database refuses this row: it is kept" in page.text
    await panel.check()
    assert len(await panel.rows(Contract)) == 1
