"""What only starlette-admin does with attachments: inline rows and edits, hooks of the application, and its export."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from sqlalchemy import event
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import object_session
from starlette.requests import Request
from starlette_admin.exceptions import FormValidationError

from granite_storage.contrib.starlette_admin import AttachmentField
from granite_storage.exceptions import BackendUnavailableError, ConfigurationError
from tests.contrib.panels import BOTH, NOTHING, Contract, Panel, User, UserView, png, text_of

PDF = ("one.pdf", b"%PDF-1.7", "application/pdf")
own = pytest.mark.parametrize("panel", BOTH[2:], indirect=True, ids="-".join)


@own
class TestInlineRows:
    """The rows of contracts in the form of their owner."""

    async def save(self, panel: Panel, ok: bool = True, files: Any = None, **data: Any) -> httpx.Response:
        form = {"name": "Ada", **{f"inlines.contract.{key}": value for key, value in data.items()}}
        parts = {f"inlines.contract.{key}": value for key, value in (files or {}).items()}
        return await panel.send("/user/edit?pk=1", ok, {"avatar": NOTHING, **parts}, **form)

    async def test_single_files(self, panel: Panel) -> None:
        await panel.create()
        await self.save(panel, **{"0.title": "One"}, files={"0.scan": PDF})
        page = await panel.client.get("/user/edit?pk=1")
        assert "one.pdf" in page.text
        rows: dict[str, Any] = {"0.pk": "1", "0.title": "First", "1.title": "Two"}
        page = await self.save(panel, False, **rows, files={"0.scan": NOTHING, "1.scan": NOTHING})
        assert "A file is required." in page.text
        await self.save(panel, **rows, **{"0.scan-action": "keep"}, files={"0.scan": NOTHING, "1.scan": ("two.pdf", *PDF[1:])})
        await panel.check()
        found = [(one.title, one.owner_id, str(one.scan)) for one in await panel.rows(Contract)]
        assert found == [("First", 1, "one.pdf"), ("Two", 1, "two.pdf")]

    async def test_row_that_the_database_refuses(self, panel: Panel) -> None:
        await panel.create()
        page = await self.save(panel, False, **{"0.title": "taken"}, files={"0.scan": PDF})
        await panel.check()
        assert "The database refuses this row: CHECK constraint failed" in page.text
        assert await panel.rows(Contract) == []


@own
class TestInlineEdits:
    async def test_another_field(self, panel: Panel) -> None:
        await panel.create(avatar=png())
        answer = await panel.client.post("/_api/user/inline-edit?pk=1&field=name", data={"name": "Grace"})
        assert answer.status_code == 200, text_of(answer.text)
        [user] = await panel.check()
        assert (user.name, user.avatar.original_filename) == ("Grace", "me.png")

    async def test_value_that_the_database_refuses(self, panel: Panel) -> None:
        await panel.create()
        await panel.create("Grace")
        answer = await panel.client.post("/_api/user/inline-edit?pk=1&field=name", data={"name": "Grace"})
        assert answer.status_code == 422
        assert "The database refuses this row: UNIQUE constraint failed" in answer.text


@own
class TestHooks:
    @pytest.fixture
    def raised(self, monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
        """What a hook of the application raises before a row is created."""
        errors: list[Exception] = []

        async def before_create(_: Any, request: Request, data: dict[str, Any], obj: Any) -> None:
            raise errors[0]

        monkeypatch.setattr(UserView, "before_create", before_create)
        return errors

    async def test_error_of_the_storage(self, panel: Panel, raised: list[Exception]) -> None:
        raised.append(BackendUnavailableError("the disk at /srv/secret is away", backend="memory"))
        page = await panel.create(ok=False, avatar=png())
        assert "/srv/secret" not in page.text
        assert panel.error_at(page.text, "name")
        assert await panel.check() == []

    async def test_error_of_another_kind(self, panel: Panel, raised: list[Exception]) -> None:
        raised.append(RuntimeError("a mistake"))
        with pytest.raises(RuntimeError, match="a mistake"):
            await panel.create(avatar=png())
        assert await panel.check() == []

    async def test_refusal_of_the_application(self, panel: Panel, raised: list[Exception]) -> None:
        raised.append(FormValidationError({"avatar": "Not today."}))
        page = await panel.create(ok=False, avatar=png())
        assert "Not today." in panel.error_at(page.text, "avatar")
        assert await panel.check() == []

    async def test_constraint_that_is_checked_at_the_commit(self, panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(_: Any) -> None:
            raise IntegrityError("COMMIT", None, Exception("FOREIGN KEY constraint failed"))

        async def after_create(_: Any, request: Request, obj: Any) -> None:
            event.listen(object_session(obj), "before_commit", refuse, once=True)

        monkeypatch.setattr(UserView, "after_create", after_create)
        with pytest.raises(IntegrityError):  # which is the panel's, and the server's 500
            await panel.create(avatar=png())
        assert await panel.check() == []


@own
async def test_other_field_that_is_refused(panel: Panel) -> None:
    await panel.create("", ok=False, avatar=png())
    assert await panel.check() == []


@own
async def test_export(panel: Panel) -> None:
    await panel.create(avatar=png())
    await panel.create("Grace")
    assert (await panel.export("csv")).text.splitlines()[1:] == ["1,Ada,me.png,,", "2,Grace,,,"]
    assert [row["Avatar"] for row in (await panel.export("json")).json()] == ["me.png", ""]


@own
async def test_hidden_attribute(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    await panel.create(avatar=png())
    monkeypatch.setattr(UserView, "can_access_field", lambda _, __, field, **___: field.name != "avatar")
    assert (await panel.client.get(panel.file("avatar"))).status_code == 404


@own
@pytest.mark.parametrize("path", ["user/avatar", "other/avatar?pk=1"])
async def test_incomplete_address(panel: Panel, path: str) -> None:
    await panel.create(avatar=png())
    assert (await panel.client.get(f"/plugins/granite-storage/{path}")).status_code == 404


def test_attribute_without_files() -> None:
    with pytest.raises(ConfigurationError, match=r"User\.name"):
        AttachmentField(User.name)
