"""Views that differ from one for each model: two of one model, subclasses, `lazy="raise"`, other keys, and renamed columns."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import sqladmin
from sqlalchemy import Engine, String, create_engine, event, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, selectinload
from sqlalchemy.pool import NullPool
from starlette.applications import Starlette
from starlette.requests import Request
from starlette_admin.contrib import sqla
from starlette_admin.contrib.sqla import ModelView

from granite_storage import Attachment, StorageManager, StoragePolicy, attachment, bind_storage
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.contrib.sqladmin import AttachmentAdmin
from granite_storage.contrib.starlette_admin import AttachmentField, AttachmentPlugin
from granite_storage.exceptions import ConfigurationError, UnknownVariantError
from granite_storage.orm.collections import AttachmentList, attachments
from tests.contrib.panels import text_of


class Base(DeclarativeBase):
    pass


class Note(Base):
    """A note, whose name has a column of another name."""

    __tablename__ = "view_note"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column("name_column", String(50), unique=True)
    kind: Mapped[str] = mapped_column(String(20))
    file: Mapped[Attachment | None] = attachment("documents")
    secret: Mapped[Attachment | None] = attachment("documents")
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_on": "kind", "polymorphic_identity": "note"}


class Memo(Note):
    __mapper_args__: ClassVar[dict[str, Any]] = {"polymorphic_identity": "memo"}


class Album(Base):
    __tablename__ = "view_album"
    title: Mapped[str] = mapped_column(String(50), primary_key=True)
    photos: Mapped[AttachmentList] = attachments("documents", lazy="raise")


class BossNotes(ModelView):
    key = "boss"
    fields = ("id", "name", "file")

    def is_accessible(self, request: Request) -> bool:
        return request.headers.get("x-user") == "boss"


class StaffNotes(ModelView):
    key = "staff"
    fields = ("id", "name", "file", "secret")


class Albums(ModelView):
    fields = ("title", AttachmentField(Album.photos))
    show_pk_in_forms = True


class NoteAdmin(AttachmentAdmin, model=Note):
    column_list = (Note.id, Note.file)


class AlbumAdmin(AttachmentAdmin, model=Album):
    column_list = (Album.title, Album.photos)
    column_details_list = (Album.title,)
    form_include_pk = True


class Panels:
    """Both panels on one database, a client, and the statements of the last request."""

    def __init__(self, engine: Engine | AsyncEngine, client: httpx.AsyncClient) -> None:
        self._engine = engine
        self.client = client
        self.statements: list[str] = []
        of = engine.sync_engine if isinstance(engine, AsyncEngine) else engine
        event.listen(of, "before_cursor_execute", lambda *arguments: self.statements.append(arguments[2]))

    async def get(self, path: str, user: str = "staff", status: int = 200) -> str:
        self.statements.clear()
        response = await self.client.get(path, headers={"x-user": user})
        assert response.status_code == status, text_of(response.text)[-2000:]
        return response.text

    async def links(self, path: str, user: str = "staff") -> list[str]:
        """Return the links of files on a page, all of which can be followed."""
        page = await self.get(path, user)
        found = [html.unescape(link) for link in re.findall(r'href="([^"]*(?:plugins/granite-storage|/file/)[^"]*)"', page)]
        for link in found:
            await self.get(link, user)
        return found

    async def add(self, *rows: Any) -> None:
        if isinstance(self._engine, AsyncEngine):
            async with AsyncSession(self._engine) as session:
                session.add_all(rows)
                await session.commit()
        else:
            await asyncio.to_thread(self._add, self._engine, rows)

    @staticmethod
    def _add(engine: Engine, rows: tuple[Any, ...]) -> None:
        with Session(engine) as session:
            session.add_all(rows)
            session.commit()

    async def photos(self) -> dict[str, list[str]]:
        statement = select(Album).options(selectinload(Album.photos))
        if isinstance(self._engine, AsyncEngine):
            async with AsyncSession(self._engine) as session:
                albums = list(await session.scalars(statement))
        else:
            with Session(self._engine) as session:
                albums = list(session.scalars(statement))
        return {album.title: [str(photo.file) for photo in album.photos] for album in albums}


@pytest.fixture(params=["async", "sync"])
async def panels(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Panels]:
    manager = StorageManager(
        backends={"memory": MemoryStorageBackend()}, policies={"documents": StoragePolicy("documents", "memory")}
    )
    binding = bind_storage(Base, manager)
    engine: Engine | AsyncEngine
    if request.param == "async":
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/panels.db", poolclass=NullPool)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
    else:
        engine = create_engine(f"sqlite:///{tmp_path}/panels.db", poolclass=NullPool)
        Base.metadata.create_all(engine)
    app = Starlette()
    first = sqla.Admin(engine, secret_key="s" * 32, base_url="/first", route_name="first", plugins=[AttachmentPlugin()])
    for view in (BossNotes(Note), StaffNotes(Note), Albums(Album)):
        first.add_view(view)
    first.mount_to(app)
    second = sqladmin.Admin(app, engine, base_url="/second")
    for each in (NoteAdmin, AlbumAdmin):
        second.add_view(each)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        await client.get("/first/staff/list")
        client.headers["X-CSRFToken"] = client.cookies["starlette_admin_csrftoken"]
        yield Panels(engine, client)
    binding.unbind()
    await manager.aclose()
    if isinstance(engine, AsyncEngine):
        await engine.dispose()
    else:
        engine.dispose()


def file(content: bytes = b"a", name: str = "a.txt") -> Attachment:
    return Attachment(content, filename=name, content_type="text/plain")


async def test_two_views_of_one_model(panels: Panels) -> None:
    """Each links to the files by itself, so that those who may see its rows may follow the links."""
    await panels.add(Note(name="a", file=file(), secret=file()))
    files = "http://test/first/plugins/granite-storage"
    for page in ("list", "detail?pk=1", "edit?pk=1"):
        assert await panels.links(f"/first/staff/{page}") == [f"{files}/staff/file?pk=1", f"{files}/staff/secret?pk=1"]
        assert await panels.links(f"/first/staff/{page}", "boss") == await panels.links(f"/first/staff/{page}")
        assert await panels.links(f"/first/boss/{page}", "boss") == [f"{files}/boss/file?pk=1"]
    await panels.get(f"{files}/boss/file?pk=1", status=403)


async def test_rows_of_a_subclass(panels: Panels) -> None:
    await panels.add(Memo(name="a", file=file()))
    for page in ("list", "detail?pk=1", "edit?pk=1"):
        assert len(await panels.links(f"/first/staff/{page}")) == 1
    assert len(await panels.links("/second/note/list")) == 1


class TestCollectionsThatAreNotLoaded:
    @pytest.mark.parametrize("page", ["/first/album/list", "/second/album/list"])
    async def test_lists_take_as_many_statements_for_ten_rows(self, panels: Panels, page: str) -> None:
        counts = []
        for number in range(2):
            await panels.add(*(Album(title=f"{number}-{one}", photos=[file(), file()]) for one in range(1 + 9 * number)))
            links = await panels.links(page)
            assert len(links) == 2 + 18 * number
            await panels.get(page)
            counts.append(len(panels.statements))
        assert counts[0] == counts[1] <= 3

    async def test_pages_and_files(self, panels: Panels) -> None:
        await panels.add(Album(title="a", photos=[file(), file()]))
        for page in ("/first/album/detail?pk=a", "/first/album/edit?pk=a", "/second/album/list", "/second/album/edit/a"):
            assert len(await panels.links(page)) == 2
        await panels.get("/second/album/details/a")

    async def test_edits(self, panels: Panels) -> None:
        await panels.add(Album(title="a", photos=[file()]))
        for path, status in {"/first/album/edit?pk=a": 303, "/second/album/edit/a": 302}.items():
            data, files = {"title": "a", "save": "Save"}, {"photos": ("b.txt", b"b", "text/plain")}
            response = await panels.client.post(path, data=data, files=files)
            assert response.status_code == status, text_of(response.text)[-2000:]
        assert await panels.photos() == {"a": ["a.txt", "b.txt", "b.txt"]}

    async def test_deletes(self, panels: Panels) -> None:
        await panels.add(*(Album(title=title, photos=[file()]) for title in "ab"))
        assert (await panels.client.post("/first/_api/album/row-action?pk=a&name=delete")).status_code == 200
        assert (await panels.client.delete("/second/album/delete?pks=b")).status_code == 200
        assert await panels.photos() == {}


@pytest.mark.parametrize("title", ["a?b#c", "100 %41", "a/b", "ü;'\"<b>"])
async def test_keys_that_a_url_has_to_escape(panels: Panels, title: str) -> None:
    await panels.add(Album(title=title, photos=[file()]))
    for page in ("/first/album/list", "/second/album/list"):
        assert len(await panels.links(page)) == 1


async def test_delete_of_keys_that_no_row_can_have(panels: Panels) -> None:
    response = await panels.client.post("/first/_api/staff/action?pks=1&pks=x&name=delete")
    assert response.status_code == 404


async def test_refusal_that_names_a_column(panels: Panels) -> None:
    """Its message is at the field of the attribute, not at the first one."""
    await panels.add(Note(name="a"))
    page = await panels.client.post("/first/staff/create", data={"name": "a"})
    assert page.status_code == 422
    message = page.text[page.text.index('id="name-error"') :]
    assert "UNIQUE constraint failed: view_note.name_column" in message[: message.index("</div>")]


@pytest.mark.parametrize(("content", "shown"), [(b"a", "1 byte"), (b"ab", "2 bytes")])
async def test_sizes(panels: Panels, content: bytes, shown: str) -> None:
    await panels.add(Note(name="a", file=file(content)))
    for page in ("/first/staff/list", "/second/note/list"):
        assert f"<small>{shown}</small>" in await panels.get(page)


class TestPreviews:
    """A preview that cannot be is refused when the panel is set up."""

    @pytest.mark.parametrize("attribute", [Note.file, Album.photos])
    def test_unknown_variant(self, attribute: Any) -> None:
        with pytest.raises(UnknownVariantError, match=rf"{attribute} declares no variant 'nope' .*there are: none"):
            AttachmentField(attribute, preview="nope")

        class Unknown(AttachmentAdmin, model=attribute.class_):
            attachment_previews: ClassVar[dict[str, str]] = {attribute.key: "nope"}

        with pytest.raises(UnknownVariantError, match=rf"{attribute} declares no variant 'nope'"):
            Unknown()

    @pytest.mark.parametrize("name", ["name", "nope"])
    def test_attribute_without_files(self, name: str) -> None:
        class Unknown(AttachmentAdmin, model=Note):
            attachment_previews: ClassVar[dict[str, str]] = {name: "thumb"}

        with pytest.raises(ConfigurationError, match=rf"{name} is not an attribute of attachments, so it has no preview 'thumb'"):
            Unknown()
