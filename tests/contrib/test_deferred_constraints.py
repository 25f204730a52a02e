"""Constraints that the database checks at the COMMIT, which starlette-admin sends after it has made its response."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event, text, update
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.contrib.panels import BOTH, NOTHING, PANELS, Booking, BookingView, Contract, Panel, opened, png
from tests.orm.databases import postgres_database

TICKET = ("ticket.pdf", b"%PDF-1.7", "application/pdf")
OTHER = ("other.pdf", b"%PDF-1.4", "application/pdf")
of_starlette_admin = pytest.mark.parametrize("panel", BOTH[2:], indirect=True, ids="-".join)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, postgres_server: URL) -> URL | None:
    """Return the URL of a PostgreSQL server, or None for an SQLite file."""
    return postgres_server if request.param == "postgresql" else None


@pytest.fixture(params=BOTH, ids="-".join)
async def panel(request: pytest.FixtureRequest, url: URL | None, tmp_path: Path) -> AsyncIterator[Panel]:
    """Each panel with each kind of sessions, on the databases that defer constraints."""
    name, kind = request.param
    async with contextlib.AsyncExitStack() as stack:
        found = None
        if url is not None:
            context = postgres_database(url, "asyncpg" if kind == "async" else "psycopg")
            found = (await asyncio.to_thread(context.__enter__)).url  # a thread of its own, because it runs an event loop
            stack.push_async_callback(asyncio.to_thread, context.__exit__, None, None, None)
        panel = await stack.enter_async_context(opened(PANELS[name], kind, tmp_path, found))
        if url is None:
            engine = panel.engine.sync_engine if isinstance(panel.engine, AsyncEngine) else panel.engine
            event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys = ON"))
        await panel.create()
        yield panel


async def save(panel: Panel, ok: bool = True, action: str = "create", ticket: Any = TICKET, **data: Any) -> httpx.Response:
    return await panel.send(panel.path(action, model="booking"), ok, {"ticket": ticket}, **{"seat": 1, **data})


async def bookings(panel: Panel) -> list[tuple[int, int | None, str]]:
    await panel.check()
    return [(one.seat, one.user_id, str(one.ticket)) for one in await panel.rows(Booking)]


REFUSED = "The database refuses this row: "


@of_starlette_admin
class TestForms:
    async def test_create(self, panel: Panel) -> None:
        page = await save(panel, False, user_id=7)
        assert REFUSED in page.text
        assert await bookings(panel) == []
        await save(panel, user_id=1)
        assert await bookings(panel) == [(1, 1, "ticket.pdf")]

    async def test_edit(self, panel: Panel) -> None:
        await save(panel, user_id=1)
        page = await save(panel, False, "edit", OTHER, user_id=7, seat=2)
        assert REFUSED in page.text
        assert 'value="7"' in page.text
        assert await bookings(panel) == [(1, 1, "ticket.pdf")]
        await save(panel, True, "edit", OTHER, user_id=1, seat=2)
        assert await bookings(panel) == [(2, 1, "other.pdf")]

    async def test_edit_in_the_list(self, panel: Panel) -> None:
        await save(panel, user_id=1)
        path = "/_api/booking/inline-edit?pk=1&field=user_id"
        answer = await panel.client.post(path, data={"user_id": "7"})
        assert (answer.status_code, REFUSED in answer.text) == (422, True)
        assert await bookings(panel) == [(1, 1, "ticket.pdf")]
        assert (await panel.client.post(path, data={"user_id": ""})).status_code == 200
        assert await bookings(panel) == [(1, None, "ticket.pdf")]

    async def test_hook_of_the_application(self, panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
        """Statements after the check find the constraints deferred."""

        async def repr_(view: Any, obj: Any, request: Any) -> str:
            if isinstance(obj, Booking):
                for user in (8, 1):
                    done = request.state.session.execute(update(Booking).values(user_id=user))
                    if isinstance(panel.engine, AsyncEngine):
                        await done
            return ""

        monkeypatch.setattr(BookingView, "repr", repr_)
        await save(panel, user_id=1)
        assert await bookings(panel) == [(1, 1, "ticket.pdf")]


class TestDeletes:
    async def test_row_that_others_refer_to(self, panel: Panel) -> None:
        await panel.edit(avatar=png())
        async with connection_of(panel) as run:
            await run("INSERT INTO panel_booking (id, seat, user_id) VALUES (1, 1, 1)")
        answer = await delete(panel, 1)
        assert "foreign key" in answer.text.lower().replace("%20", " ").replace("+", " ")
        [user] = await panel.check()
        assert user.avatar.original_filename == "me.png"
        async with connection_of(panel) as run:
            await run("DELETE FROM panel_booking")
        await delete(panel, 1)
        assert await panel.check() == []

    @of_starlette_admin
    async def test_several(self, panel: Panel) -> None:
        await panel.create("Grace", avatar=png())
        async with connection_of(panel) as run:
            await run("INSERT INTO panel_booking (id, seat, user_id) VALUES (1, 1, 2)")
        answer = await delete(panel, 1, 2)
        assert (answer.status_code, REFUSED in answer.json()["msg"]) == (400, True)
        assert len(await panel.check()) == 2


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@of_starlette_admin
class TestRefusedDeletes:
    """What the database refuses at once."""

    async def test_row(self, panel: Panel) -> None:
        async with connection_of(panel) as run:
            await run(KEPT.format(table="panel_user"))
        answer = await delete(panel, 1)
        assert (answer.status_code, answer.json()) == (400, {"msg": f"{REFUSED}it is kept"})
        assert len(await panel.check()) == 1

    async def test_row_within_a_form(self, panel: Panel) -> None:
        form = {"name": "Ada", "inlines.contract.0.title": "One"}
        files = {"avatar": NOTHING, "inlines.contract.0.scan": TICKET}
        await panel.send("/user/edit?pk=1", True, files, **form)
        async with connection_of(panel) as run:
            await run(KEPT.format(table="panel_contract"))
        form |= {"inlines.contract.0.pk": "1", "inlines.contract.0.DELETE": "on"}
        page = await panel.send("/user/edit?pk=1", False, {"avatar": NOTHING, "inlines.contract.0.scan": NOTHING}, **form)
        assert f"{REFUSED}it is kept" in page.text
        await panel.check()
        assert len(await panel.rows(Contract)) == 1


KEPT = "CREATE TRIGGER kept BEFORE DELETE ON {table} BEGIN SELECT RAISE(ABORT, 'it is kept'); END"


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
async def test_seat_that_is_taken(panel: Panel) -> None:
    await save(panel)
    page = await save(panel, False)
    assert "one_each" in page.text
    await save(panel, seat=2)
    second = (await panel.rows(Booking))[1].id
    page = await panel.send(panel.path("edit", second, "booking"), False, {"ticket": OTHER}, seat=1)
    assert "one_each" in page.text
    assert await bookings(panel) == [(1, None, "ticket.pdf"), (2, None, "ticket.pdf")]


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
@of_starlette_admin
async def test_row_that_was_wrong_before(panel: Panel) -> None:
    """SQLite can have rows that no COMMIT would accept: they keep nobody from saving others."""
    async with connection_of(panel) as run:
        await run("PRAGMA foreign_keys = OFF")
        await run("INSERT INTO panel_booking (id, seat, user_id) VALUES (1, 1, 7)")
    await save(panel, user_id=1)
    page = await save(panel, False, user_id=8)
    assert REFUSED in page.text
    assert await bookings(panel) == [(1, 7, "None"), (1, 1, "ticket.pdf")]


async def delete(panel: Panel, *keys: int) -> httpx.Response:
    if panel.saved == 302:
        return await panel.client.delete(f"/user/delete?pks={','.join(map(str, keys))}")
    pks = "&".join(f"pks={key}" for key in keys)
    path = f"/_api/user/action?{pks}" if len(keys) > 1 else f"/_api/user/row-action?pk={keys[0]}"
    return await panel.client.post(f"{path}&name=delete")


@contextlib.asynccontextmanager
async def connection_of(panel: Panel) -> AsyncIterator[Any]:
    """Give what runs SQL past the panel, in one transaction."""
    if isinstance(panel.engine, AsyncEngine):
        async with panel.engine.connect() as connection:
            await connection.execution_options(isolation_level="AUTOCOMMIT")

            async def run(statement: str) -> None:
                await connection.execute(text(statement))

            yield run
    else:
        with panel.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT")

            async def run_here(statement: str) -> None:
                connection.execute(text(statement))

            yield run_here
