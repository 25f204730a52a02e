"""Attachments in admin panels, over HTTP: each action, in both panels, with both kinds of sessions."""

from __future__ import annotations

import asyncio
import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import URL

from tests.contrib.panels import BOTH, MAX_SIZE, NOTHING, PANELS, Contract, Panel, names_of, opened, picture, png, sources
from tests.orm.databases import mariadb, postgres_database
from tests.services import service

PDF = ("one.pdf", b"%PDF-1.7", "application/pdf")
PHOTOS = ["a.png", "b.png", "c.png"]


class TestForms:
    async def test_create(self, panel: Panel) -> None:
        page = await panel.client.get(panel.path("create"))
        assert 'accept="image/*"' in page.text
        await panel.create(avatar=png(), cv=("cv.txt", b"about me", "text/plain"))
        [user] = await panel.check()
        assert (user.avatar.original_filename, user.avatar.content_type) == ("me.png", "image/png")
        assert user.avatar.variants["thumb"] is not None
        assert await user.cv.read() == b"about me"

    async def test_create_without_files(self, panel: Panel) -> None:
        await panel.create()
        [user] = await panel.check()
        assert (user.avatar, user.cv) == (None, None)

    async def test_edit_that_keeps_the_file(self, panel: Panel) -> None:
        await panel.create(avatar=png())
        [before] = await panel.check()
        await panel.edit(name="Grace", **{"avatar-action": "keep"})
        [user] = await panel.check()
        assert (user.name, user.avatar) == ("Grace", before.avatar)

    async def test_edit_that_replaces_the_file(self, panel: Panel) -> None:
        await panel.create(avatar=png())
        await panel.edit(avatar=png("new.png", "red"), **{"avatar-action": "replace"})
        [user] = await panel.check()
        assert user.avatar.original_filename == "new.png"
        assert await user.avatar.read() == picture("red")

    async def test_edit_that_clears_the_file(self, panel: Panel) -> None:
        await panel.create(avatar=png())
        await panel.edit(**{"avatar-action": "clear"})
        [user] = await panel.check()
        assert user.avatar is None

    @pytest.mark.parametrize("action", ["clear", "keep"])
    async def test_contradicting_choice(self, panel: Panel, action: str) -> None:
        await panel.create(avatar=png())
        page = await panel.edit(ok=False, name="Grace", avatar=png("new.png"), **{"avatar-action": action})
        assert "A file is chosen, but" in page.text
        assert 'value="Grace"' in page.text
        [user] = await panel.check()
        assert (user.name, user.avatar.original_filename) == ("Ada", "me.png")

    @pytest.mark.parametrize("action", ["evil", "", ["keep", "clear"], ["clear", "keep"], ["replace", "replace"]])
    async def test_choice_that_is_none(self, panel: Panel, action: Any) -> None:
        await panel.create(avatar=png())
        page = await panel.edit(ok=False, avatar=png("new.png"), **{"avatar-action": action})
        assert "Choose Keep, Replace or Clear." in page.text
        assert [user.avatar.original_filename for user in await panel.check()] == ["me.png"]

    async def test_two_files_for_one(self, panel: Panel) -> None:
        files = [("avatar", png("a.png")), ("avatar", png("b.png"))]
        page = await panel.send(panel.path("create"), False, files, name="Ada")
        assert "Choose only one file" in page.text
        assert await panel.check() == []

    async def test_replace_without_a_file(self, panel: Panel) -> None:
        await panel.create(avatar=png())
        assert "Choose the new file." in (await panel.edit(ok=False, **{"avatar-action": "replace"})).text
        await panel.check()

    async def test_form_without_choices_and_files(self, panel: Panel) -> None:
        await panel.create(avatar=png())
        await panel.send(panel.path("edit"), True, name="Grace")
        [user] = await panel.check()
        assert (user.name, user.avatar.original_filename) == ("Grace", "me.png")

    async def test_required_file(self, panel: Panel) -> None:
        create, edit = panel.path("create", model="contract"), panel.path("edit", model="contract")
        page = await panel.send(create, False, {"scan": NOTHING}, title="One")
        assert "A file is required." in page.text
        assert 'value="One"' in page.text
        await panel.send(create, True, {"scan": PDF}, title="One")
        form = await panel.client.get(edit)
        assert ('value="keep"' in form.text, 'value="clear"' in form.text) == (True, False)
        asked = {"title": "Two", "scan-action": "clear"}
        page = await panel.send(edit, False, {"scan": NOTHING}, **asked)
        assert "A file is required." in page.text
        await panel.send(edit, True, **{**asked, "scan-action": "keep"})
        await panel.check()
        assert [(one.title, one.scan.original_filename) for one in await panel.rows(Contract)] == [("Two", "one.pdf")]


class TestCollections:
    async def test_create(self, panel: Panel) -> None:
        assert re.search(r'name="photos"[^>]* multiple', (await panel.client.get(panel.path("create"))).text)
        await panel.save_photos(*PHOTOS, action="create")
        [user] = await panel.check()
        assert names_of(user) == PHOTOS
        page = await panel.client.get(panel.path("edit"))
        assert re.findall(r'name="photos-order" value="(\d)"', page.text) == ["1", "2", "3"]
        assert len(sources(page)) == 3
        answer = await panel.client.get(sources(page)[1])
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
        for action in ("list", "details"):
            assert len(sources(await panel.client.get(panel.path(action)))) == 3
        assert (await panel.client.get(panel.file("photos", file=9))).status_code == 404
        for form in ("csv", "json"):
            assert "a.png, b.png, c.png" in (await panel.export(form)).text

    async def test_reorder_remove_and_add(self, panel: Panel) -> None:
        await panel.save_photos(*PHOTOS, action="create")
        await panel.save_photos(**{"photos-order": ["3", "1", "2"]})
        [user] = await panel.check()
        assert names_of(user) == ["c.png", "a.png", "b.png"]
        await panel.save_photos("d.png", **{"photos-order": ["3", "2", "1"], "photos-removed": ["2"]})
        [user] = await panel.check()
        assert names_of(user) == ["c.png", "a.png", "d.png"]

    async def test_keys_of_no_file(self, panel: Panel) -> None:
        await panel.save_photos(*PHOTOS, action="create")
        await panel.save_photos(**{"photos-order": ["9" * 5000, "x", "3", "-1"], "photos-removed": ["9" * 5000, "", "7"]})
        [user] = await panel.check()
        assert names_of(user) == ["c.png", "a.png", "b.png"]

    async def test_edit_of_another_field(self, panel: Panel) -> None:
        await panel.save_photos(*PHOTOS, action="create")
        await panel.send(panel.path("edit"), True, name="Grace")
        [user] = await panel.check()
        assert (user.name, names_of(user)) == ("Grace", PHOTOS)

    async def test_too_many(self, panel: Panel) -> None:
        page = await panel.save_photos(*PHOTOS, "d.png", action="create", ok=False)
        assert "3 files" in panel.error_at(page.text, "photos")
        assert await panel.check() == []
        await panel.save_photos(*PHOTOS, action="create")
        page = await panel.save_photos("d.png", ok=False, **{"photos-order": ["3", "2", "1"]})
        assert re.findall(r'name="photos-order" value="(\d)"', page.text) == ["3", "2", "1"]
        [user] = await panel.check()
        assert names_of(user) == PHOTOS

    async def test_one_that_is_refused(self, panel: Panel) -> None:
        files = [("photos", png("a.png")), ("photos", ("page.png", b"<html><script>", "image/png"))]
        page = await panel.send(panel.path("create"), False, files, name="Ada")
        assert "but it is text" in page.text
        assert await panel.check() == []


class TestRefusals:
    @pytest.mark.parametrize(
        ("field", "file", "reason"),
        [
            ("avatar", ("big.png", picture() + bytes(MAX_SIZE), "image/png"), f"larger than {MAX_SIZE} bytes"),
            ("avatar", ("page.png", b"<html><script>", "image/png"), "but it is text (text/html)"),
            ("cv", ("bad.txt", b"about me", "text/plain"), "This name is not allowed."),
        ],
        ids=["size", "type", "validator"],
    )
    async def test_file_that_is_refused(self, panel: Panel, field: str, file: Any, reason: str) -> None:
        page = await panel.create(ok=False, **{"avatar": png(), field: file})
        assert reason in panel.error_at(page.text, field)
        assert 'value="Ada"' in page.text
        assert await panel.check() == []
        await panel.create(avatar=png())
        page = await panel.edit(ok=False, **{field: file, f"{field}-action": "replace"})
        assert reason in page.text
        assert 'value="keep"' in page.text
        [user] = await panel.check()
        assert user.avatar.original_filename == "me.png"

    async def test_row_that_the_database_refuses(self, panel: Panel) -> None:
        await panel.create(avatar=png())
        await panel.create("Grace")
        replacing = panel.edit(2, ok=False, avatar=png("other.png"), **{"avatar-action": "replace"})
        for page in (await panel.create(ok=False, avatar=png("other.png")), await replacing):
            assert "The database refuses this row: UNIQUE constraint failed" in page.text
            assert 'value="Ada"' in page.text
            assert "INSERT" not in page.text
            assert "UPDATE" not in page.text
        assert [user.avatar and user.avatar.original_filename for user in await panel.check()] == ["me.png", None]


class TestPages:
    async def test_list_and_details_show_the_files(self, panel: Panel) -> None:
        await panel.create(avatar=png(), cv=("<b>.txt", b"about me", "text/plain"))
        for action in ("list", "details", "edit"):
            page = await panel.client.get(panel.path(action))
            assert page.status_code == 200
            [thumb] = sources(page)
            assert re.search(r"[?&]variant=thumb$", thumb)
            answer = await panel.client.get(thumb)
            assert (answer.status_code, answer.headers["content-disposition"][:6]) == (200, "inline")
            assert "<b>.txt" not in page.text
            assert ".txt <small>8 bytes</small>" in page.text
        answer = await panel.client.get(panel.file("avatar"))
        assert (answer.content, answer.headers["content-type"]) == (picture(), "image/png")

    async def test_row_that_holds_no_ref(self, panel: Panel) -> None:
        await panel.create(avatar=png())
        await panel.spoil()
        for action in ("list", "details", "edit"):
            page = await panel.client.get(panel.path(action))
            assert (page.status_code, "unreadable" in page.text) == (200, True)
        assert (await panel.client.get(panel.file("avatar"))).status_code == 404

    async def test_search_and_sort(self, panel: Panel) -> None:
        await panel.create(avatar=png())
        await panel.create("Grace", avatar=png())
        page = await panel.client.get(panel.search)
        assert ("Grace" in page.text, "Ada" in page.text) == (True, False)

    async def test_delete_and_bulk_delete(self, panel: Panel) -> None:
        for name in ("Ada", "Grace", "Joan"):
            await panel.create(name, avatar=png(), cv=("cv.txt", b"about me", "text/plain"))
        await panel.delete(1)
        assert [user.name for user in await panel.check()] == ["Grace", "Joan"]
        await panel.delete(2, 3)
        assert await panel.check() == []


@pytest.mark.parametrize("panel", BOTH[::2], indirect=True, ids="-".join)  # the sessions make no difference
class TestServing:
    async def test_nobody_else_gets_a_file(self, panel: Panel) -> None:
        await panel.create(avatar=png())
        answer = await panel.client.get(panel.file("avatar"), headers={"Authorization": ""})
        assert answer.status_code in (302, 303)
        assert answer.headers["location"].startswith("http://test/admin/login")

    async def test_permissions_of_the_view(self, panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
        await panel.create(avatar=png())
        panel.forbid(monkeypatch, "details")
        assert (await panel.client.get(panel.file("avatar"))).status_code == 200
        panel.forbid(monkeypatch, "edit")
        assert (await panel.client.get(panel.file("avatar"))).status_code == 403

    @pytest.mark.parametrize(
        ("name", "pk"),
        [("avatar", 7), ("cv", 1), ("name", 1), ("nothing", 1), ("avatar", "abc"), ("avatar", "%00"), ("avatar", 10**30)],
    )
    async def test_missing_file(self, panel: Panel, name: str, pk: object) -> None:
        await panel.create(avatar=png())
        assert (await panel.client.get(panel.file(name, pk))).status_code == 404

    @pytest.mark.parametrize("pk", [7, "abc", "%00", 10**30])
    async def test_page_of_a_missing_row(self, panel: Panel, pk: object) -> None:
        for action in ("details", "edit"):
            assert (await panel.client.get(panel.path(action, pk))).status_code == 404
        assert (await panel.client.post(panel.path("edit", pk), data={**panel.constant, "name": "Ada"})).status_code == 404

    async def test_missing_variant(self, panel: Panel) -> None:
        await panel.create(avatar=png())
        assert (await panel.client.get(panel.file("avatar", variant="other"))).status_code == 404

    async def test_what_a_browser_would_run_is_a_download(self, panel: Panel) -> None:
        await panel.create(cv=("page.html", b"<script>alert(1)</script>", "text/html"))
        answer = await panel.client.get(panel.file("cv"))
        assert answer.headers["content-disposition"].startswith("attachment")
        assert answer.headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize("name", PANELS)
@pytest.mark.parametrize(
    ("driver", "kind"),
    [
        ("asyncpg", "async"),
        pytest.param("psycopg", "sync", marks=pytest.mark.exhaustive("its errors are of the classes that SQLite's are of")),
        pytest.param("mariadb", "async", marks=pytest.mark.exhaustive("its errors are of the classes that SQLite's are of")),
    ],
)
async def test_what_other_databases_refuse(name: str, driver: str, kind: str, tmp_path: Path, postgres_server: URL) -> None:
    """Each driver says in its own way that a key is out of range, or that a constraint is broken."""
    context = service("MariaDB", mariadb()) if driver == "mariadb" else postgres_database(postgres_server, driver)
    async with contextlib.AsyncExitStack() as stack:
        found = await asyncio.to_thread(context.__enter__)  # a thread of its own, because it runs an event loop
        stack.push_async_callback(asyncio.to_thread, context.__exit__, None, None, None)
        panel = await stack.enter_async_context(opened(PANELS[name], kind, tmp_path, found.url))
        await panel.create(avatar=png())
        for pk in (7, 2**31, 2**63, 10**30, -(10**30)):
            for path in (panel.file("avatar", pk), panel.path("details", pk), panel.path("edit", pk)):
                assert (await panel.client.get(path)).status_code == 404
        page = await panel.create(ok=False, avatar=png("other.png"))
        assert re.search(r"The database refuses this row: .*(?i:duplicate)", page.text)
        assert len(await panel.check()) == 1
