"""starlette-admin with attachments, over HTTP: each action, with both kinds of sessions."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import sessionmaker
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette_admin.auth import AdminUser, BaseAuthProvider
from starlette_admin.contrib.sqla import Admin, InlineModelView, ModelView

from granite_storage.contrib.starlette_admin import AttachmentField, AttachmentPlugin
from granite_storage.exceptions import ConfigurationError
from tests.contrib.panels import ENGINES, MAX_SIZE, NOTHING, Contract, Panel, User, database, names_of, picture, png, text_of


class ContractInline(InlineModelView):
    model = Contract
    fk_attr = "owner_id"
    fields = ("title", "scan")


class UserView(ModelView):
    inlines = (ContractInline,)
    fields = ("id", "name", "avatar", AttachmentField(User.cv, help_text="A PDF"), AttachmentField(User.photos))
    inline_editable_fields = ("name",)


class ContractView(ModelView):
    exclude_fields_from_list = ("scan",)


class TokenAuthentication(BaseAuthProvider):
    async def authenticate(self, request: Request) -> AdminUser | None:
        return AdminUser("admin") if request.headers.get("authorization") == "Bearer admin" else None

    def get_routes(self, templates: Any) -> list[Route]:
        return [Route(f"/{name}", lambda _: Response(), name=name) for name in ("login", "logout")]


@cache  # the panel compiles its templates once for each application, which takes longer than most tests
def application(kind: str) -> tuple[Starlette, Any]:
    app = Starlette()
    sessions: Any = (async_sessionmaker if kind == "async" else sessionmaker)(expire_on_commit=False)
    admin = Admin(sessions, auth_provider=TokenAuthentication(), secret_key="secret", plugins=[AttachmentPlugin()])
    admin.add_view(UserView(User))
    admin.add_view(ContractView(Contract))
    admin.mount_to(app)
    return app, sessions


@pytest.fixture(params=ENGINES)
async def panel(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Panel]:
    async with database(request.param, tmp_path) as (engine, manager):
        app, sessions = application(request.param)
        sessions.configure(bind=engine)
        transport = httpx.ASGITransport(app)
        headers = {"Authorization": "Bearer admin"}
        async with httpx.AsyncClient(transport=transport, base_url="http://test/admin", headers=headers) as client:
            await client.get("/user/list")
            client.headers["X-CSRFToken"] = client.cookies["starlette_admin_csrftoken"]
            yield Panel(client, engine, manager)


async def create(panel: Panel, name: str = "Ada", status: int = 303, path: str = "/user/create", **fields: Any) -> httpx.Response:
    files = {key: value for key, value in fields.items() if isinstance(value, tuple)}
    data = {"name": name, **{key: value for key, value in fields.items() if not isinstance(value, tuple)}}
    answer = await panel.client.post(path, data=data, files={"avatar": NOTHING, "cv": NOTHING, **files})
    assert answer.status_code == status, text_of(answer.text)
    return answer


async def edit(panel: Panel, pk: int = 1, status: int = 303, **fields: Any) -> httpx.Response:
    return await create(panel, status=status, path=f"/user/edit?pk={pk}", **fields)


def sources(page: httpx.Response, tag: str = "img") -> list[str]:
    return [one.replace("&amp;", "&") for one in re.findall(rf'<{tag} src="([^"]*)"', page.text)]


FILE = "/plugins/granite-storage/user"


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
        page = await edit(panel, status=422, name="Grace", avatar=png("new.png"), **{"avatar-action": action})
        assert "A file is chosen, but" in page.text
        assert 'value="Grace"' in page.text
        [user] = await panel.check()
        assert (user.name, user.avatar.original_filename) == ("Ada", "me.png")

    async def test_replace_without_a_file(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        assert "Choose the new file." in (await edit(panel, status=422, **{"avatar-action": "replace"})).text
        await panel.check()

    async def test_form_without_choices_and_files(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        answer = await panel.client.post("/user/edit?pk=1", data={"name": "Grace"})
        assert answer.status_code == 303
        [user] = await panel.check()
        assert (user.name, user.avatar.original_filename) == ("Grace", "me.png")

    async def test_required_file(self, panel: Panel) -> None:
        page = await panel.client.post("/contract/create", data={"title": "One"}, files={"scan": NOTHING})
        assert page.status_code == 422
        assert "A file is required." in page.text
        assert 'value="One"' in page.text
        scan = {"scan": ("one.pdf", b"%PDF-1.7", "application/pdf")}
        assert (await panel.client.post("/contract/create", data={"title": "One"}, files=scan)).status_code == 303
        form = await panel.client.get("/contract/edit?pk=1")
        assert ('value="keep"' in form.text, 'value="clear"' in form.text) == (True, False)
        asked = {"title": "Two", "scan-action": "clear"}
        assert (await panel.client.post("/contract/edit?pk=1", data=asked, files={"scan": NOTHING})).status_code == 422
        assert (await panel.client.post("/contract/edit?pk=1", data={**asked, "scan-action": "keep"})).status_code == 303
        await panel.check()
        assert [(one.title, one.scan.original_filename) for one in await panel.rows(Contract)] == [("Two", "one.pdf")]

    async def test_inline_edit_of_another_field(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        answer = await panel.client.post("/_api/user/inline-edit?pk=1&field=name", data={"name": "Grace"})
        assert answer.status_code == 200, text_of(answer.text)
        [user] = await panel.check()
        assert (user.name, user.avatar.original_filename) == ("Grace", "me.png")


PHOTOS = ["a.png", "b.png", "c.png"]


class TestCollections:
    async def create(self, panel: Panel, *names: str, status: int = 303, path: str = "create", **data: Any) -> httpx.Response:
        files = [("photos", png(name)) for name in names] or [("photos", NOTHING)]
        answer = await panel.client.post(f"/user/{path}", data={"name": "Ada", **data}, files=files)
        assert answer.status_code == status, text_of(answer.text)
        return answer

    async def edit(self, panel: Panel, *names: str, **data: Any) -> httpx.Response:
        return await self.create(panel, *names, path="edit?pk=1", **data)

    async def test_create(self, panel: Panel) -> None:
        assert re.search(r'name="photos"[^>]* multiple', (await panel.client.get("/user/create")).text)
        await self.create(panel, *PHOTOS)
        [user] = await panel.check()
        assert names_of(user) == PHOTOS
        page = await panel.client.get("/user/edit?pk=1")
        assert re.findall(r'name="photos-order" value="(\d)"', page.text) == ["1", "2", "3"]
        assert len(sources(page)) == 3
        answer = await panel.client.get(sources(page)[1])
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/webp")
        for path in ("/user/list", "/user/detail?pk=1"):
            assert len(sources(await panel.client.get(path))) == 3
        assert (await panel.client.get(f"{FILE}/photos?pk=1&file=9")).status_code == 404
        answer = await panel.client.post("/_api/user/action?name=export", data={"format": "csv", "scope": "page"})
        assert "a.png, b.png, c.png" in answer.text

    async def test_reorder_remove_and_add(self, panel: Panel) -> None:
        await self.create(panel, *PHOTOS)
        await self.edit(panel, **{"photos-order": ["3", "1", "2"]})
        [user] = await panel.check()
        assert names_of(user) == ["c.png", "a.png", "b.png"]
        await self.edit(panel, "d.png", **{"photos-order": ["3", "2", "1"], "photos-removed": ["2"]})
        [user] = await panel.check()
        assert names_of(user) == ["c.png", "a.png", "d.png"]

    async def test_edit_of_another_field(self, panel: Panel) -> None:
        await self.create(panel, *PHOTOS)
        assert (await panel.client.post("/user/edit?pk=1", data={"name": "Grace"})).status_code == 303
        [user] = await panel.check()
        assert (user.name, names_of(user)) == ("Grace", PHOTOS)

    async def test_too_many(self, panel: Panel) -> None:
        page = await self.create(panel, *PHOTOS, "d.png", status=422)
        assert "3 files" in page.text
        assert await panel.check() == []
        await self.create(panel, *PHOTOS)
        page = await self.edit(panel, "d.png", status=422, **{"photos-order": ["3", "2", "1"]})
        assert re.findall(r'name="photos-order" value="(\d)"', page.text) == ["1", "2", "3"]
        [user] = await panel.check()
        assert names_of(user) == PHOTOS

    async def test_one_that_is_refused(self, panel: Panel) -> None:
        files = [("photos", png("a.png")), ("photos", ("page.png", b"<html><script>", "image/png"))]
        page = await panel.client.post("/user/create", data={"name": "Ada"}, files=files)
        assert page.status_code == 422
        assert "but it is text" in page.text
        assert await panel.check() == []


class TestInlineRows:
    """The rows of contracts in the form of their owner."""

    async def save(self, panel: Panel, status: int = 303, files: Any = None, **data: Any) -> httpx.Response:
        form = {"name": "Ada", **{f"inlines.contract.{key}": value for key, value in data.items()}}
        parts = {f"inlines.contract.{key}": value for key, value in (files or {}).items()}
        answer = await panel.client.post("/user/edit?pk=1", data=form, files={"avatar": NOTHING, **parts})
        assert answer.status_code == status, text_of(answer.text)[-2000:]
        return answer

    async def test_single_files(self, panel: Panel) -> None:
        await create(panel)
        pdf = ("one.pdf", b"%PDF-1.7", "application/pdf")
        await self.save(panel, **{"0.title": "One"}, files={"0.scan": pdf})
        page = await panel.client.get("/user/edit?pk=1")
        assert "one.pdf" in page.text
        rows: dict[str, Any] = {"0.pk": "1", "0.title": "First", "1.title": "Two"}
        page = await self.save(panel, 422, **rows, files={"0.scan": NOTHING, "1.scan": NOTHING})
        assert "A file is required." in page.text
        await self.save(panel, **rows, **{"0.scan-action": "keep"}, files={"0.scan": NOTHING, "1.scan": ("two.pdf", *pdf[1:])})
        await panel.check()
        found = [(one.title, one.owner_id, str(one.scan)) for one in await panel.rows(Contract)]
        assert found == [("First", 1, "one.pdf"), ("Two", 1, "two.pdf")]


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
        page = await create(panel, status=422, **{"avatar": png(), field: file})
        message = page.text[page.text.index(f'id="{field}-error"') :]
        assert reason in message[: message.index("</div>")]
        assert 'value="Ada"' in page.text
        assert await panel.check() == []
        await create(panel, avatar=png())
        page = await edit(panel, status=422, **{field: file, f"{field}-action": "replace"})
        assert reason in page.text
        assert 'value="keep"' in page.text
        [user] = await panel.check()
        assert user.avatar.original_filename == "me.png"

    async def test_other_field_that_is_refused(self, panel: Panel) -> None:
        await create(panel, "", status=422, avatar=png())
        assert await panel.check() == []

    async def test_row_that_the_database_refuses(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        await create(panel, "Grace")
        page = await create(panel, status=422, avatar=png("other.png"))
        print(text_of(page.text))
        page = await edit(panel, 2, status=422, avatar=png("other.png"), **{"avatar-action": "replace"})
        print(text_of(page.text))
        assert [user.avatar and user.avatar.original_filename for user in await panel.check()] == ["me.png", None]

    async def test_attribute_without_files(self) -> None:
        with pytest.raises(ConfigurationError, match=r"User\.name"):
            AttachmentField(User.name)


class TestPages:
    async def test_list_and_details_show_the_files(self, panel: Panel) -> None:
        await create(panel, avatar=png(), cv=("cv.txt", b"about me", "text/plain"))
        for path in ("/user/list", "/user/detail?pk=1", "/user/edit?pk=1"):
            page = await panel.client.get(path)
            assert page.status_code == 200
            [thumb] = sources(page)
            assert thumb.endswith("&variant=thumb")
            answer = await panel.client.get(thumb)
            assert (answer.status_code, answer.headers["content-disposition"][:6]) == (200, "inline")
            assert "cv.txt <small>8 bytes</small>" in page.text
        answer = await panel.client.get(f"{FILE}/avatar?pk=1")
        assert (answer.content, answer.headers["content-type"]) == (picture(), "image/png")

    async def test_row_that_holds_no_ref(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        await panel.spoil()
        for path in ("/user/list", "/user/detail?pk=1", "/user/edit?pk=1"):
            page = await panel.client.get(path)
            assert (page.status_code, "unreadable" in page.text) == (200, True)
        assert (await panel.client.get(f"{FILE}/avatar?pk=1")).status_code == 404

    async def test_search_and_sort(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        await create(panel, "Grace", avatar=png())
        page = await panel.client.get("/user/list?q=Gra&order_by=name%20desc")
        assert ("Grace" in page.text, "Ada" in page.text) == (True, False)

    async def test_export(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        await create(panel, "Grace")
        answer = await panel.client.post("/_api/user/action?name=export", data={"format": "csv", "scope": "page"})
        assert answer.text.splitlines()[1:] == ["1,Ada,me.png,,", "2,Grace,,,"]
        answer = await panel.client.post("/_api/user/action?name=export", data={"format": "json", "scope": "page"})
        assert [row["Avatar"] for row in answer.json()] == ["me.png", ""]

    async def test_delete_and_bulk_delete(self, panel: Panel) -> None:
        for name in ("Ada", "Grace", "Joan"):
            await create(panel, name, avatar=png(), cv=("cv.txt", b"about me", "text/plain"))
        answer = await panel.client.post("/_api/user/row-action?pk=1&name=delete")
        assert answer.status_code < 400, text_of(answer.text)
        assert [user.name for user in await panel.check()] == ["Grace", "Joan"]
        answer = await panel.client.post("/_api/user/action?pks=2&pks=3&name=delete")
        assert answer.status_code < 400, text_of(answer.text)
        assert await panel.check() == []


@pytest.mark.parametrize("panel", ["async"], indirect=True)  # the sessions make no difference
class TestServing:
    async def test_nobody_else_gets_a_file(self, panel: Panel) -> None:
        await create(panel, avatar=png())
        answer = await panel.client.get(f"{FILE}/avatar?pk=1", headers={"Authorization": ""})
        assert answer.status_code in (303, 403)
        assert answer.content != picture()

    async def test_permissions_of_the_view(self, panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
        await create(panel, avatar=png())
        monkeypatch.setattr(UserView, "can_view_detail", lambda *_: False)
        assert (await panel.client.get(f"{FILE}/avatar?pk=1")).status_code == 200
        monkeypatch.setattr(UserView, "can_edit", lambda *_: False)
        assert (await panel.client.get(f"{FILE}/avatar?pk=1")).status_code == 403

    async def test_hidden_attribute(self, panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
        await create(panel, avatar=png())
        monkeypatch.setattr(UserView, "can_access_field", lambda _, __, field, **___: field.name != "avatar")
        assert (await panel.client.get(f"{FILE}/avatar?pk=1")).status_code == 404

    @pytest.mark.parametrize(
        "path", ["user/avatar?pk=7", "user/avatar?pk=x", "user/avatar", "user/cv?pk=1", "user/name?pk=1", "other/avatar?pk=1"]
    )
    async def test_missing_file(self, panel: Panel, path: str) -> None:
        await create(panel, avatar=png())
        assert (await panel.client.get(f"/plugins/granite-storage/{path}")).status_code == 404

    async def test_what_a_browser_would_run_is_a_download(self, panel: Panel) -> None:
        await create(panel, cv=("page.html", b"<script>alert(1)</script>", "text/html"))
        answer = await panel.client.get(f"{FILE}/cv?pk=1")
        assert answer.headers["content-disposition"].startswith("attachment")
        assert answer.headers["content-type"] == "application/octet-stream"
