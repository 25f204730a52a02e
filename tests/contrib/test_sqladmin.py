"""What only sqladmin does with attachments: rows that are saved as new, hooks of the application, and its export."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.requests import Request

from tests.contrib.panels import BOTH, ContractAdmin, Panel, UserAdmin, names_of, png, sources

pytestmark = pytest.mark.parametrize("panel", BOTH[:2], indirect=True, ids="-".join)
PHOTOS = ["a.png", "b.png", "c.png"]


async def test_kept_file_is_not_written(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one that another user puts in its place meanwhile stays."""
    written: list[str] = []

    async def on_model_change(_: Any, data: dict[str, Any], model: Any, is_created: bool, request: Request) -> None:
        written.extend(data)

    await panel.create(avatar=png())
    monkeypatch.setattr(UserAdmin, "on_model_change", on_model_change)
    await panel.edit(**{"cv-action": "clear"})
    assert written == ["name", "cv"]


class TestSavedAsNew:
    async def test_files(self, panel: Panel) -> None:
        await panel.create(avatar=png())
        await panel.edit(name="Grace", save="Save as new", **{"avatar-action": "keep"})
        ada, grace = await panel.check()
        assert grace.avatar != ada.avatar
        assert await grace.avatar.read() == await ada.avatar.read()

    async def test_file_whose_object_is_gone(self, panel: Panel) -> None:
        await panel.create(avatar=png())
        [ada] = await panel.rows()
        await panel.manager.delete(ada.avatar.ref)
        page = await panel.edit(ok=False, name="Grace", save="Save as new", **{"avatar-action": "keep"})
        assert "The file does not exist." in page.text
        assert ada.avatar.ref.location not in page.text
        assert len(await panel.rows()) == 1

    async def test_collection(self, panel: Panel) -> None:
        await panel.save_photos(*PHOTOS, action="create")
        asked = {"name": "Grace", "save": "Save as new", "photos-order": ["3", "2", "1"], "photos-removed": ["2"]}
        await panel.save_photos(**asked)
        ada, grace = await panel.check()
        assert (names_of(ada), names_of(grace)) == (PHOTOS, ["c.png", "a.png"])


async def test_hook_of_the_application(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def on_model_change(_: Any, data: dict[str, Any], model: Any, is_created: bool, request: Request) -> None:
        data["name"] = data["name"].upper()

    monkeypatch.setattr(UserAdmin, "on_model_change", on_model_change)
    await panel.save_photos(*PHOTOS, action="create")
    await panel.save_photos(**{"photos-removed": ["1", "2"]})
    [user] = await panel.check()
    assert (user.name, names_of(user)) == ("ADA", ["c.png"])


async def test_export(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    await panel.create(avatar=png())
    await panel.create("Grace")
    assert (await panel.export("csv")).text.splitlines()[1:] == ["1,Ada,me.png,None,", "2,Grace,None,None,"]
    assert [row["avatar"] for row in (await panel.export("json")).json()] == ["me.png", None]
    monkeypatch.setattr(UserAdmin, "use_pretty_export", True)
    assert "1,Ada,me.png," in (await panel.export("csv")).text


async def test_list_without_permissions(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    await panel.create(avatar=png())
    panel.forbid(monkeypatch, "details")
    panel.forbid(monkeypatch, "edit")
    assert sources(await panel.client.get("/user/list")) == []


async def test_hidden_attribute(panel: Panel) -> None:
    scan = {"scan": ("one.pdf", b"%PDF-1.7", "application/pdf")}
    await panel.send("/contract/create", True, scan, title="One")
    assert (await panel.client.get("/contract/file/scan/1")).status_code == 200  # the form shows it
    view = ContractAdmin.instances[-1]
    view._form_prop_names = ["title"]
    assert (await panel.client.get("/contract/file/scan/1")).status_code == 404
