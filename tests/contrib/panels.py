"""What the tests of admin panels share: models with files, both panels over HTTP, and what must hold after each request.

A test takes the fixture `panel`, which is each panel with each kind of sessions, or those that a `parametrize` names.
"""

from __future__ import annotations

import io
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlencode

import httpx
import pytest
import sqladmin
from PIL import Image
from sqladmin.authentication import AuthenticationBackend
from sqlalchemy import CheckConstraint, ForeignKey, String, create_engine, make_url, select, text
from sqlalchemy.engine import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, selectinload, sessionmaker
from sqlalchemy.pool import NullPool
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette_admin.auth import AdminUser, BaseAuthProvider
from starlette_admin.contrib import sqla
from starlette_admin.contrib.sqla import InlineModelView, ModelView

from granite_storage import Attachment, StorageManager, StoragePolicy, attachment, bind_storage
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.contrib.sqladmin import AttachmentAdmin
from granite_storage.contrib.starlette_admin import AttachmentField, AttachmentPlugin
from granite_storage.derived import ImageVariant
from granite_storage.exceptions import ContentRejectedError
from granite_storage.inspection.base import UploadPreview
from granite_storage.orm.collections import AttachmentList, attachments
from tests.orm.values import locations

ENGINES = ("async", "sync")
MAX_SIZE = 20_000


class Base(DeclarativeBase):
    pass


def refuse_bad_names(upload: UploadPreview) -> None:
    if upload.filename == "bad.txt":
        raise ContentRejectedError("this name is not allowed")


class User(Base):
    __tablename__ = "panel_user"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)
    avatar: Mapped[Attachment | None] = attachment("images", variants={"thumb": ImageVariant(fit=(32, 32))})
    cv: Mapped[Attachment | None] = attachment("documents", validate=refuse_bad_names)
    photos: Mapped[AttachmentList] = attachments("images", max_files=3, variants={"thumb": ImageVariant(fit=(32, 32))})


class Contract(Base):
    __tablename__ = "panel_contract"
    __table_args__ = (CheckConstraint("title <> 'taken'", name="free"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(50))
    owner_id: Mapped[int | None] = mapped_column(ForeignKey("panel_user.id", ondelete="SET NULL"))
    scan: Mapped[Attachment] = attachment("documents")


def picture(colour: str = "teal") -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (64, 48), colour).save(written, "PNG")
    return written.getvalue()


def png(name: str = "me.png", colour: str = "teal") -> tuple[str, bytes, str]:
    return name, picture(colour), "image/png"


class _Empty(str):
    """An empty file name, which httpx would leave out, and a browser sends."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return True


NOTHING = (_Empty(), b"", "application/octet-stream")
"""What a browser sends for a file input that was left empty."""


@dataclass
class Panel:
    """A panel, a client that uses it, and the database and the storage behind it.

    Attributes:
        saved: The status of a form that was saved.
        refused: The status of a form that is shown again.
        constant: What each form has besides the values of its fields.
        search: The page of the users whose name contains "Gra".
    """

    client: httpx.AsyncClient
    engine: Engine | AsyncEngine
    manager: StorageManager
    saved: ClassVar[int]
    refused: ClassVar[int]
    constant: ClassVar[dict[str, str]] = {}
    search: ClassVar[str]

    @classmethod
    def open(cls, engine: Engine | AsyncEngine) -> Starlette:
        """Return an application with the panel."""
        raise NotImplementedError

    async def enter(self) -> None:
        """Prepare the client."""

    def path(self, action: str, pk: object = 1, model: str = "user") -> str:
        """Return the path of a page: `list`, `details`, `create` or `edit`."""
        raise NotImplementedError

    def file(self, name: str, pk: object = 1, **query: object) -> str:
        """Return the path of a user's file."""
        raise NotImplementedError

    async def export(self, form: str) -> httpx.Response:
        """Return the users as `csv` or `json`."""
        raise NotImplementedError

    async def delete(self, *keys: int) -> None:
        """Delete users."""
        raise NotImplementedError

    def forbid(self, patch: pytest.MonkeyPatch, action: str) -> None:
        """Let nobody see the `details` of users, or `edit` them."""
        raise NotImplementedError

    def error_at(self, page: str, field: str) -> str:
        """Return what a form says of one of its fields."""
        raise NotImplementedError

    async def send(self, path: str, ok: bool, files: Any = None, **data: Any) -> httpx.Response:
        """Post a form."""
        answer = await self.client.post(path, data={**self.constant, **data}, files=files)
        assert answer.status_code == (self.saved if ok else self.refused), text_of(answer.text)[-3000:]
        return answer

    async def create(self, name: str = "Ada", ok: bool = True, path: str | None = None, **fields: Any) -> httpx.Response:
        """Create a user, or post the form of one to another path."""
        files = {key: value for key, value in fields.items() if isinstance(value, tuple)}
        data = {key: value for key, value in fields.items() if not isinstance(value, tuple)}
        inputs = {"avatar": NOTHING, "cv": NOTHING, **files}
        return await self.send(path or self.path("create"), ok, inputs, **{"name": name, **data})

    async def edit(self, pk: int = 1, ok: bool = True, **fields: Any) -> httpx.Response:
        """Edit a user."""
        return await self.create(ok=ok, path=self.path("edit", pk), **fields)

    async def save_photos(self, *names: str, ok: bool = True, action: str = "edit", **data: Any) -> httpx.Response:
        """Edit or create a user with photos."""
        files = [("photos", png(name)) for name in names] or [("photos", NOTHING)]
        return await self.send(self.path(action), ok, files, **{"name": "Ada", **data})

    async def rows(self, model: type[Any] = User) -> list[Any]:
        """Return the rows in order."""
        options = [selectinload(User.photos)] if model is User else []
        statement = select(model).order_by(model.id).options(*options)
        if isinstance(self.engine, AsyncEngine):
            async with AsyncSession(self.engine) as session:
                return list(await session.scalars(statement))
        with Session(self.engine) as session:
            return list(session.scalars(statement))

    async def spoil(self) -> None:
        """Write something that is no ref into the avatar of each user."""
        await self.sql("UPDATE panel_user SET avatar = '{}'")

    async def sql(self, statement: str) -> None:
        """Run SQL past the panel."""
        if isinstance(self.engine, AsyncEngine):
            async with self.engine.begin() as connection:
                await connection.execute(text(statement))
        else:
            with self.engine.begin() as connection:
                connection.execute(text(statement))

    async def check(self) -> list[Any]:
        """Return the users, after comparing the objects in the storage with what all rows refer to."""
        users = await self.rows()
        files = [file for user in users for file in (user.avatar, user.cv, *(one.file for one in user.photos))]
        files += [one.scan for one in await self.rows(Contract)]
        refs = [file.ref for file in files if file is not None]
        refs += [variant for ref in refs for variant in (ref.variants or {}).values()]
        assert await locations(self.manager) == {ref.location for ref in refs}
        return users


@asynccontextmanager
async def database(kind: str, folder: Path, url: URL | None = None) -> AsyncIterator[tuple[Engine | AsyncEngine, StorageManager]]:
    """An empty database, an SQLite file unless a URL is given, and the manager that the models are bound to."""
    policies = {
        "images": StoragePolicy("images", "memory", max_size=MAX_SIZE, accept=("image/*",)),
        "documents": StoragePolicy("documents", "memory", max_size=MAX_SIZE),
    }
    manager = StorageManager(backends={"memory": MemoryStorageBackend()}, policies=policies)
    binding = bind_storage(Base, manager)
    driver = "sqlite" if kind == "sync" else "sqlite+aiosqlite"
    url = url or make_url(f"{driver}:///{folder / 'panel.db'}")
    engine: Engine | AsyncEngine
    if kind == "async":
        engine = create_async_engine(url, poolclass=NullPool)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
    else:
        engine = create_engine(url, poolclass=NullPool)
        Base.metadata.create_all(engine)
    try:
        yield engine, manager
    finally:
        if isinstance(engine, AsyncEngine):
            await engine.dispose()
        else:
            engine.dispose()
        binding.unbind()
        await manager.aclose()


@asynccontextmanager
async def opened(panel: type[Panel], kind: str, folder: Path, url: URL | None = None) -> AsyncIterator[Panel]:
    """A panel on an empty database."""
    async with database(kind, folder, url) as (engine, manager):
        transport = httpx.ASGITransport(panel.open(engine))
        headers = {"Authorization": "Bearer admin"}
        async with httpx.AsyncClient(transport=transport, base_url="http://test/admin", headers=headers) as client:
            found = panel(client, engine, manager)
            await found.enter()
            yield found


def names_of(user: Any) -> list[str]:
    return [str(one.file) for one in user.photos]


def sources(page: httpx.Response, tag: str = "img") -> list[str]:
    return [one.replace("&amp;", "&") for one in re.findall(rf'<{tag} src="([^"]*)"', page.text)]


def text_of(html: str) -> str:
    """Return what a page says, without its tags."""
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


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


class _TokenBackend(AuthenticationBackend):
    async def authenticate(self, request: Request) -> bool:
        return request.headers.get("authorization") == "Bearer admin"


class SQLAdmin(Panel):
    """sqladmin."""

    saved = 302
    refused = 400
    constant: ClassVar[dict[str, str]] = {"save": "Save"}
    search = "/user/list?search=Gra&sortBy=name&sort=desc"

    @classmethod
    def open(cls, engine: Engine | AsyncEngine) -> Starlette:
        app = Starlette()
        admin = sqladmin.Admin(app, engine, authentication_backend=_TokenBackend("secret"))
        admin.add_view(UserAdmin)
        admin.add_view(ContractAdmin)
        return app

    def path(self, action: str, pk: object = 1, model: str = "user") -> str:
        return f"/{model}/{action}" + (f"/{pk}" if action in ("details", "edit") else "")

    def file(self, name: str, pk: object = 1, **query: object) -> str:
        return f"/user/file/{name}/{pk}" + (f"?{urlencode(query)}" if query else "")

    async def export(self, form: str) -> httpx.Response:
        return await self.client.get(f"/user/export/{form}")

    async def delete(self, *keys: int) -> None:
        answer = await self.client.delete(f"/user/delete?pks={','.join(map(str, keys))}")
        assert answer.status_code == 200

    def forbid(self, patch: pytest.MonkeyPatch, action: str) -> None:
        patch.setattr(UserAdmin, {"details": "can_view_details", "edit": "can_edit"}[action], False)

    def error_at(self, page: str, field: str) -> str:
        form = page[page.index(f'name="{field}"') :]
        return form[: form.index("</small>") if "</small>" in form else form.index("</fieldset>")]


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


class _TokenProvider(BaseAuthProvider):
    async def authenticate(self, request: Request) -> AdminUser | None:
        return AdminUser("admin") if request.headers.get("authorization") == "Bearer admin" else None

    def get_routes(self, templates: Any) -> list[Route]:
        return [Route(f"/{name}", lambda _: Response(), name=name) for name in ("login", "logout")]


class StarletteAdmin(Panel):
    """starlette-admin."""

    saved = 303
    refused = 422
    search = "/user/list?q=Gra&order_by=name%20desc"

    @classmethod
    def open(cls, engine: Engine | AsyncEngine) -> Starlette:
        app, sessions = cls._application(is_async=isinstance(engine, AsyncEngine))
        sessions.configure(bind=engine)
        return app

    @staticmethod
    @cache  # the panel compiles its templates once for each application, which takes longer than most tests
    def _application(*, is_async: bool) -> tuple[Starlette, Any]:
        app = Starlette()
        sessions: Any = (async_sessionmaker if is_async else sessionmaker)(expire_on_commit=False)
        admin = sqla.Admin(sessions, auth_provider=_TokenProvider(), secret_key="secret", plugins=[AttachmentPlugin()])
        admin.add_view(UserView(User))
        admin.add_view(ContractView(Contract))
        admin.mount_to(app)
        return app, sessions

    async def enter(self) -> None:
        await self.client.get("/user/list")
        self.client.headers["X-CSRFToken"] = self.client.cookies["starlette_admin_csrftoken"]

    def path(self, action: str, pk: object = 1, model: str = "user") -> str:
        page = "detail" if action == "details" else action
        return f"/{model}/{page}" + (f"?pk={pk}" if action in ("details", "edit") else "")

    def file(self, name: str, pk: object = 1, **query: object) -> str:
        return f"/plugins/granite-storage/user/{name}?" + urlencode({"pk": pk, **query}, safe="%")

    async def export(self, form: str) -> httpx.Response:
        return await self.client.post("/_api/user/action?name=export", data={"format": form, "scope": "page"})

    async def delete(self, *keys: int) -> None:
        pks = "&".join(f"pks={key}" for key in keys)
        path = f"/_api/user/action?{pks}" if len(keys) > 1 else f"/_api/user/row-action?pk={keys[0]}"
        answer = await self.client.post(f"{path}&name=delete")
        assert answer.status_code < 400, text_of(answer.text)

    def forbid(self, patch: pytest.MonkeyPatch, action: str) -> None:
        patch.setattr(UserView, {"details": "can_view_detail", "edit": "can_edit"}[action], lambda *_: False)

    def error_at(self, page: str, field: str) -> str:
        message = page[page.index(f'id="{field}-error"') :]
        return message[: message.index("</div>")]


PANELS: dict[str, type[Panel]] = {"sqladmin": SQLAdmin, "starlette-admin": StarletteAdmin}
BOTH = [(panel, kind) for panel in PANELS for kind in ENGINES]
"""Each panel with each kind of sessions."""
