"""sqladmin with attachments, over HTTP: each action, with both kinds of sessions."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from sqladmin import Admin
from sqladmin.authentication import AuthenticationBackend
from starlette.applications import Starlette
from starlette.requests import Request

from granite_storage.contrib.sqladmin import AttachmentAdmin
from tests.contrib.panels import ENGINES, MAX_SIZE, NOTHING, Contract, Panel, User, database, names_of, picture, png, text_of


class UserAdmin(AttachmentAdmin, model=User):
    column_list = (User.id, User.name, User.avatar, User.cv, User.photos)
    column_searchable_list = (User.name,)
    column_sortable_list = (User.name,)
    save_as = True


class ContractAdmin(AttachmentAdmin, model=Contract):
    column_list = (Contract.title,)
    column_details_exclude_list = (Contract.scan,)
    form_columns = (Contract.title, Contract.scan)
    instances: ClassVar[list[ContractAdmin]] = []

    def __init__(self) -> None:
        super().__init__()
        self.instances.append(self)


class TokenAuthentication(AuthenticationBackend):
    async def authenticate(self, request: Request) -> bool:
        return request.headers.get("authorization") == "Bearer admin"


@pytest.fixture(params=ENGINES)
async def panel(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Panel]:
    async with database(request.param, tmp_path) as (engine, manager):
        app = Starlette()
        admin = Admin(app, engine, authentication_backend=TokenAuthentication("secret"))
        admin.add_view(UserAdmin)
        admin.add_view(ContractAdmin)
        transport = httpx.ASGITransport(app)
        headers = {"Authorization": "Bearer admin"}
        async with httpx.AsyncClient(transport=transport, base_url="http://test/admin", headers=headers) as client:
            yield Panel(client, engine, manager)


async def create(panel: Panel, name: str = "Ada", status: int = 302, path: str = "/user/create", **fields: Any) -> httpx.Response:
    files = {key: value for key, value in fields.items() if isinstance(value, tuple)}
    data = {"name": name, "save": "Save", **{key: value for key, value in fields.items() if not isinstance(value, tuple)}}
    answer = await panel.client.post(path, data=data, files={"avatar": NOTHING, "cv": NOTHING, **files})
    assert answer.status_code == status, text_of(answer.text)
    return answer


async def edit(panel: Panel, pk: int = 1, status: int = 302, **fields: Any) -> httpx.Response:
    return await create(panel, status=status, path=f"/user/edit/{pk}", **fields)


def sources(page: httpx.Response, tag: str = "img") -> list[str]:
    return [one.replace("&amp;", "&") for one in re.findall(rf'<{tag} src="([^"]*)"', page.text)]


class TestForms:
    async def test_create(self, panel: Panel) -> None:
        page = await panel.client.get("/user/create")
        assert 'accept="image/*"' in page.text
        await create(panel, avatar=png(), cv=("cv.txt", b"about me", "text/plain"))
        [user] = await panel.check()
        assert (user.avatar.original_filename, user.avatar.content_type) == ("me.png", "image/png")
        assert user.avatar.variants["thumb"] is not None
        assert await user.cv.read() == b"about me"

    async def test_create_without_files(self, panel: Panel) -> None:
        await create(panel)
        [user] = await panel.check()
        assert (user.avatar, user.cv) == (None, None)

    async def test_edit_that_keeps_the_file(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        [before] = await panel.check()
        await edit(panel, name="Grace", **{"avatar-action": "keep"})
        [user] = await panel.check()
        assert (user.name, user.avatar) == ("Grace", before.avatar)

    async def test_kept_file_is_not_written(self, panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
        """So that one that another user puts in its place meanwhile stays."""
        written: list[str] = []

        async def on_model_change(_: Any, data: dict[str, Any], model: Any, is_created: bool, request: Request) -> None:
            written.extend(data)

        await create(panel, avatar=png())
        monkeypatch.setattr(UserAdmin, "on_model_change", on_model_change)
        await edit(panel, **{"cv-action": "clear"})
        assert written == ["name", "cv"]

    async def test_edit_that_replaces_the_file(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        await edit(panel, avatar=png("new.png", "red"), **{"avatar-action": "replace"})
        [user] = await panel.check()
        assert user.avatar.original_filename == "new.png"
        assert await user.avatar.read() == picture("red")

    async def test_edit_that_clears_the_file(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        await edit(panel, **{"avatar-action": "clear"})
        [user] = await panel.check()
        assert user.avatar is None

    @pytest.mark.parametrize("action", ["clear", "keep"])
    async def test_contradicting_choice(self, panel: Panel, action: str) -> None:
        await create(panel, avatar=png())
        page = await edit(panel, status=400, name="Grace", avatar=png("new.png"), **{"avatar-action": action})
        assert "A file is chosen, but" in page.text
        assert 'value="Grace"' in page.text
        [user] = await panel.check()
        assert (user.name, user.avatar.original_filename) == ("Ada", "me.png")

    async def test_replace_without_a_file(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        assert "Choose the new file." in (await edit(panel, status=400, **{"avatar-action": "replace"})).text
        await panel.check()

    async def test_form_without_choices_and_files(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        answer = await panel.client.post("/user/edit/1", data={"name": "Grace", "save": "Save"})
        assert answer.status_code == 302
        [user] = await panel.check()
        assert (user.name, user.avatar.original_filename) == ("Grace", "me.png")

    async def test_saved_as_new(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        await edit(panel, name="Grace", save="Save as new", **{"avatar-action": "keep"})
        ada, grace = await panel.check()
        assert grace.avatar != ada.avatar
        assert await grace.avatar.read() == await ada.avatar.read()

    async def test_saved_as_new_without_its_object(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        [ada] = await panel.rows()
        await panel.manager.delete(ada.avatar.ref)
        page = await edit(panel, status=400, name="Grace", save="Save as new", **{"avatar-action": "keep"})
        assert "The file does not exist." in page.text
        assert ada.avatar.ref.location not in page.text
        assert len(await panel.rows()) == 1

    async def test_unknown_action(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        page = await edit(panel, status=400, avatar=png("new.png"), **{"avatar-action": "evil"})
        assert "Choose Keep, Replace or Clear." in page.text
        assert [user.avatar.original_filename for user in await panel.check()] == ["me.png"]

    async def test_required_file(self, panel: Panel) -> None:
        page = await panel.client.post("/contract/create", data={"title": "One", "save": "Save"}, files={"scan": NOTHING})
        assert page.status_code == 400
        assert "A file is required." in page.text
        assert 'value="One"' in page.text
        scan = {"scan": ("one.pdf", b"%PDF-1.7", "application/pdf")}
        page = await panel.client.post("/contract/create", data={"title": "One", "save": "Save"}, files=scan)
        assert page.status_code == 302
        form = await panel.client.get("/contract/edit/1")
        assert ('value="keep"' in form.text, 'value="clear"' in form.text) == (True, False)
        asked = {"title": "Two", "save": "Save", "scan-action": "clear"}
        assert (await panel.client.post("/contract/edit/1", data=asked, files={"scan": NOTHING})).status_code == 400
        assert (await panel.client.post("/contract/edit/1", data={**asked, "scan-action": "keep"})).status_code == 302
        await panel.check()
        assert [(one.title, one.scan.original_filename) for one in await panel.rows(Contract)] == [("Two", "one.pdf")]


PHOTOS = ["a.png", "b.png", "c.png"]


class TestCollections:
    async def create(self, panel: Panel, *names: str, status: int = 302, path: str = "create", **data: Any) -> httpx.Response:
        files = [("photos", png(name)) for name in names] or [("photos", NOTHING)]
        answer = await panel.client.post(f"/user/{path}", data={"name": "Ada", "save": "Save", **data}, files=files)
        assert answer.status_code == status, text_of(answer.text)
        return answer

    async def test_create(self, panel: Panel) -> None:
        assert re.search(r'name="photos"[^>]* multiple', (await panel.client.get("/user/create")).text)
        await self.create(panel, *PHOTOS)
        [user] = await panel.check()
        assert names_of(user) == PHOTOS
        page = await panel.client.get("/user/edit/1")
        assert re.findall(r'name="photos-order" value="(\d)"', page.text) == ["1", "2", "3"]
        assert len(sources(page)) == 3
        answer = await panel.client.get(sources(page)[1])
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
        for path in ("/user/list", "/user/details/1"):
            assert len(sources(await panel.client.get(path))) == 3
        assert (await panel.client.get("/user/file/photos/1?file=9")).status_code == 404
        assert "a.png, b.png, c.png" in (await panel.client.get("/user/export/csv")).text
        assert (await panel.client.get("/user/export/json")).json()[0]["photos"] == "a.png, b.png, c.png"

    async def test_reorder_remove_and_add(self, panel: Panel) -> None:
        await self.create(panel, *PHOTOS)
        await self.create(panel, path="edit/1", **{"photos-order": ["3", "1", "2"]})
        [user] = await panel.check()
        assert names_of(user) == ["c.png", "a.png", "b.png"]
        await self.create(panel, "d.png", path="edit/1", **{"photos-order": ["3", "2", "1"], "photos-removed": ["2"]})
        [user] = await panel.check()
        assert names_of(user) == ["c.png", "a.png", "d.png"]

    async def test_edit_of_another_field(self, panel: Panel) -> None:
        await self.create(panel, *PHOTOS)
        answer = await panel.client.post("/user/edit/1", data={"name": "Grace", "save": "Save"})
        assert answer.status_code == 302
        [user] = await panel.check()
        assert (user.name, names_of(user)) == ("Grace", PHOTOS)

    async def test_too_many(self, panel: Panel) -> None:
        page = await self.create(panel, *PHOTOS, "d.png", status=400)
        assert "3 files" in page.text
        assert await panel.check() == []
        await self.create(panel, *PHOTOS)
        page = await self.create(panel, "d.png", path="edit/1", status=400, **{"photos-order": ["3", "2", "1"]})
        assert re.findall(r'name="photos-order" value="(\d)"', page.text) == ["3", "2", "1"]
        [user] = await panel.check()
        assert names_of(user) == PHOTOS

    async def test_one_that_is_refused(self, panel: Panel) -> None:
        files = [("photos", png("a.png")), ("photos", ("page.png", b"<html><script>", "image/png"))]
        page = await panel.client.post("/user/create", data={"name": "Ada", "save": "Save"}, files=files)
        assert page.status_code == 400
        assert "but it is text" in page.text
        assert await panel.check() == []

    async def test_saved_as_new(self, panel: Panel) -> None:
        await self.create(panel, *PHOTOS)
        asked = {"name": "Grace", "save": "Save as new", "photos-order": ["3", "2", "1"], "photos-removed": ["2"]}
        await self.create(panel, path="edit/1", **asked)
        ada, grace = await panel.check()
        assert (names_of(ada), names_of(grace)) == (PHOTOS, ["c.png", "a.png"])

    async def test_hook_of_the_application(self, panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
        async def on_model_change(_: Any, data: dict[str, Any], model: Any, is_created: bool, request: Request) -> None:
            data["name"] = data["name"].upper()

        monkeypatch.setattr(UserAdmin, "on_model_change", on_model_change)
        await self.create(panel, *PHOTOS)
        await self.create(panel, path="edit/1", **{"photos-removed": ["1", "2"]})
        [user] = await panel.check()
        assert (user.name, names_of(user)) == ("ADA", ["c.png"])


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
        page = await create(panel, status=400, **{"avatar": png(), field: file})
        form = page.text[page.text.index(f'name="{field}"') :]
        assert reason in form[: form.index("</small>") if "</small>" in form else form.index("</fieldset>")]
        assert 'value="Ada"' in page.text
        assert await panel.check() == []
        await create(panel, avatar=png())
        page = await edit(panel, status=400, **{field: file, f"{field}-action": "replace"})
        assert reason in page.text
        assert 'value="keep"' in page.text
        [user] = await panel.check()
        assert user.avatar.original_filename == "me.png"

    async def test_row_that_the_database_refuses(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        assert "UNIQUE" in (await create(panel, status=400, avatar=png("other.png"))).text
        await create(panel, "Grace")
        await edit(panel, 2, status=400, avatar=png("other.png"), **{"avatar-action": "replace"})
        assert [user.avatar and user.avatar.original_filename for user in await panel.check()] == ["me.png", None]


class TestPages:
    async def test_list_and_details_show_the_files(self, panel: Panel) -> None:
        await create(panel, avatar=png(), cv=("<b>.txt", b"about me", "text/plain"))
        for path in ("/user/list", "/user/details/1", "/user/edit/1"):
            page = await panel.client.get(path)
            assert page.status_code == 200
            [thumb] = sources(page)
            assert thumb.endswith("?variant=thumb")
            answer = await panel.client.get(thumb)
            assert (answer.status_code, answer.headers["content-disposition"][:6]) == (200, "inline")
            assert "&lt;b&gt;.txt" in page.text or "_b_.txt" in page.text
            assert "8 bytes" in page.text
        answer = await panel.client.get("/user/file/avatar/1")
        assert (answer.content, answer.headers["content-type"]) == (picture(), "image/png")

    async def test_row_that_holds_no_ref(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        await panel.spoil()
        for path in ("/user/list", "/user/details/1", "/user/edit/1"):
            page = await panel.client.get(path)
            assert (page.status_code, "unreadable" in page.text) == (200, True)
        assert (await panel.client.get("/user/file/avatar/1")).status_code == 404

    async def test_search_and_sort(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        await create(panel, "Grace", avatar=png())
        page = await panel.client.get("/user/list?search=Gra&sortBy=name&sort=desc")
        assert ("Grace" in page.text, "Ada" in page.text) == (True, False)

    async def test_export(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        await create(panel, "Grace")
        answer = await panel.client.get("/user/export/csv")
        assert answer.text.splitlines()[1:] == ["1,Ada,me.png,None,", "2,Grace,None,None,"]
        rows = (await panel.client.get("/user/export/json")).json()
        assert [row["avatar"] for row in rows] == ["me.png", None]

    async def test_pretty_export(self, panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(UserAdmin, "use_pretty_export", True)
        await create(panel, avatar=png())
        assert "1,Ada,me.png," in (await panel.client.get("/user/export/csv")).text

    async def test_delete_and_bulk_delete(self, panel: Panel) -> None:
        for name in ("Ada", "Grace", "Joan"):
            await create(panel, name, avatar=png(), cv=("cv.txt", b"about me", "text/plain"))
        assert (await panel.client.delete("/user/delete?pks=1")).status_code == 200
        assert [user.name for user in await panel.check()] == ["Grace", "Joan"]
        assert (await panel.client.delete("/user/delete?pks=2,3")).status_code == 200
        assert await panel.check() == []


@pytest.mark.parametrize("panel", ["async"], indirect=True)  # the sessions make no difference
class TestServing:
    async def test_nobody_else_gets_a_file(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        answer = await panel.client.get("/user/file/avatar/1", headers={"Authorization": ""})
        assert (answer.status_code, answer.headers["location"]) == (302, "http://test/admin/login")

    async def test_permissions_of_the_view(self, panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
        await create(panel, avatar=png())
        monkeypatch.setattr(UserAdmin, "can_view_details", False)
        assert (await panel.client.get("/user/file/avatar/1")).status_code == 200
        monkeypatch.setattr(UserAdmin, "can_edit", False)
        assert (await panel.client.get("/user/file/avatar/1")).status_code == 403
        assert sources(await panel.client.get("/user/list")) == []

    async def test_hidden_attribute(self, panel: Panel) -> None:
        scan = {"scan": ("one.pdf", b"%PDF-1.7", "application/pdf")}
        await panel.client.post("/contract/create", data={"title": "One", "save": "Save"}, files=scan)
        assert (await panel.client.get("/contract/file/scan/1")).status_code == 200  # the form shows it
        view = ContractAdmin.instances[-1]
        view._form_prop_names = ["title"]
        assert (await panel.client.get("/contract/file/scan/1")).status_code == 404

    @pytest.mark.parametrize(
        "path", ["avatar/7", "cv/1", "name/1", "nothing/1", "avatar/1?variant=other", "avatar/abc", "avatar/%00"]
    )
    async def test_missing_file(self, panel: Panel, path: str) -> None:
        await create(panel, avatar=png())
        assert (await panel.client.get(f"/user/file/{path}")).status_code == 404

    async def test_what_a_browser_would_run_is_a_download(self, panel: Panel) -> None:
        await create(panel, cv=("page.html", b"<script>alert(1)</script>", "text/html"))
        answer = await panel.client.get("/user/file/cv/1")
        assert answer.headers["content-disposition"].startswith("attachment")
        assert answer.headers["content-type"] == "application/octet-stream"
