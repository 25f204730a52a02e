"""What admin panels get from clients that mean harm, and from several at the same time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from sqlalchemy import Delete, delete
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from granite_storage import Attachment
from granite_storage.orm.collections import file_class
from tests.contrib.panels import BOTH, NOTHING, Panel, User, names_of, png, text_of

PHOTOS = ["a.png", "b.png", "c.png"]
SCRIPT = '"><script>alert(1)</script>'
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


@pytest.mark.parametrize("panel", BOTH[::2], indirect=True, ids="-".join)  # the sessions make no difference
class TestNames:
    @pytest.mark.parametrize("name", [f"{SCRIPT}.txt", "x' onclick='alert(1).txt", "{{ 7 * 7 }}.txt", "a\u202egnp.txt"])
    async def test_in_pages(self, panel: Panel, name: str) -> None:
        await panel.create(avatar=png(f"{SCRIPT}.png"), cv=(name, b"text", f"text/plain; {SCRIPT}"))
        for action in ("list", "details", "edit"):
            page = (await panel.client.get(panel.path(action))).text
            assert ".txt" in page
            assert not any(sign in page for sign in ("<script>alert", "' onclick='alert", "49.txt", "\u202e"))

    @pytest.mark.parametrize("name", ["../../etc/passwd", "C:\\windows\\x.txt", "a\r\nSet-Cookie: x=1.txt", "\x00.txt", "."])
    async def test_in_paths_and_headers(self, panel: Panel, name: str) -> None:
        await panel.create(cv=(name, b"text", "text/plain"))
        [user] = await panel.check()
        assert ".." not in user.cv.ref.location
        assert user.cv.original_filename in (None, "passwd", "x.txt", "a%0D%0ASet-Cookie: x=1.txt", "%00.txt")
        answer = await panel.client.get(panel.file("cv"))
        assert answer.content == b"text"
        assert "x=1" not in answer.headers.get("set-cookie", "")

    async def test_picture_with_a_script(self, panel: Panel) -> None:
        await panel.create(cv=("me.svg", SVG, "image/svg+xml"))
        page = await panel.client.get(panel.path("details"))
        assert "/file/cv/" in page.text or "/user/cv?" in page.text
        assert f'<img src="{panel.file("cv")}' not in page.text
        assert "me.svg" in page.text
        answer = await panel.client.get(panel.file("cv"))
        assert answer.headers["content-disposition"].startswith("attachment")
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["x-content-type-options"] == "nosniff"


class TestForms:
    async def test_text_in_place_of_a_file(self, panel: Panel) -> None:
        await panel.save_photos("a.png", action="create", avatar="x")
        for data in ({"avatar": "x"}, {"photos": "x"}, {"avatar": "x", "avatar-action": "keep"}):
            await panel.send(panel.path("edit"), True, name="Ada", **data)
        page = await panel.send(panel.path("edit"), False, name="Ada", **{"avatar": "x", "avatar-action": "replace"})
        assert "Choose the new file." in page.text
        [user] = await panel.check()
        assert (user.avatar, names_of(user)) == (None, ["a.png"])

    async def test_photos_of_another_row(self, panel: Panel) -> None:
        await panel.save_photos(*PHOTOS, action="create")
        await panel.send(panel.path("create"), True, [("photos", png("x.png"))], name="Eve")
        others = {"photos-order": ["1", "2", "4"], "photos-removed": ["1", "2", "3"]}
        await panel.send(panel.path("edit", 2), True, [("photos", NOTHING)], name="Eve", **others)
        assert [names_of(user) for user in await panel.check()] == [PHOTOS, ["x.png"]]

    async def test_all_at_once(self, panel: Panel) -> None:
        await panel.save_photos(*PHOTOS, action="create")
        await panel.save_photos("d.png", "e.png", "f.png", **{"photos-removed": ["1", "2", "3"]})
        assert [names_of(user) for user in await panel.check()] == [["d.png", "e.png", "f.png"]]
        await panel.save_photos(**{"photos-removed": ["4", "5", "6", "4"], "photos-order": ["4", "4", "5"]})
        assert [names_of(user) for user in await panel.check()] == [[]]


class TestAtTheSameTime:
    def meanwhile(self, panel: Panel, patch: pytest.MonkeyPatch, statement: Delete) -> None:
        """Let another transaction execute a statement while a file is stored."""
        store = Attachment.store

        def execute() -> None:
            with Session(panel.engine) as session, session.begin():  # type: ignore[arg-type]
                session.execute(statement)

        async def store_slowly(attachment: Attachment, attribute: Any) -> Attachment:
            patch.undo()
            if isinstance(panel.engine, AsyncEngine):
                async with AsyncSession(panel.engine) as session, session.begin():
                    await session.execute(statement)
            else:
                await asyncio.to_thread(execute)
            return await store(attachment, attribute)

        patch.setattr(Attachment, "store", store_slowly)

    async def test_photo_is_deleted_while_it_is_moved(self, panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
        await panel.save_photos("a.png", "b.png", action="create")
        photo = file_class(User.photos)
        self.meanwhile(panel, monkeypatch, delete(photo).where(photo.id == 2))
        data = {**panel.constant, "name": "Ada", "photos-order": ["2", "1"]}
        answer = await panel.client.post(panel.path("edit"), data=data, files=[("photos", png("d.png"))])
        [user] = await panel.check()
        if answer.status_code == panel.saved:  # sqladmin loads the row once more
            assert names_of(user) == ["a.png", "d.png"]
        else:
            assert (answer.status_code, names_of(user)) == (panel.refused, ["a.png"])
            assert "Another user has deleted this row, or a file of it" in text_of(answer.text)

    async def test_row_is_deleted_while_it_is_edited(self, panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
        await panel.create(avatar=png())
        self.meanwhile(panel, monkeypatch, delete(User).where(User.id == 1))
        data = {**panel.constant, "name": "Ada", "avatar-action": "replace"}
        answer = await panel.client.post(panel.path("edit"), data=data, files={"avatar": png("other.png"), "cv": NOTHING})
        assert answer.status_code in (404, panel.refused)
        assert answer.status_code == 404 or "Another user has deleted this row" in text_of(answer.text)
        assert await panel.check() == []

    async def test_forms_sent_twice(self, panel: Panel) -> None:
        async def send(action: str, number: int, **data: str) -> int:
            form = {**panel.constant, "name": "Ada", **data}
            answer = await panel.client.post(panel.path(action), data=form, files={"avatar": png(f"{number}.png")})
            return answer.status_code

        created = await asyncio.gather(*(send("create", number) for number in range(3)))
        assert sorted(created) == sorted([panel.saved, panel.refused, panel.refused])
        assert len(await panel.check()) == 1
        edited = await asyncio.gather(*(send("edit", number, **{"avatar-action": "replace"}) for number in range(3)))
        assert edited == [panel.saved] * 3
        await panel.check()
