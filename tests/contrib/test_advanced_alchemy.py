"""Repositories and services of advanced-alchemy, of both kinds: after each call, objects are what rows refer to."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import attrs
import msgspec
import pytest
from advanced_alchemy.exceptions import NotFoundError
from advanced_alchemy.filters import OrderBy
from advanced_alchemy.repository import SQLAlchemyAsyncRepository, SQLAlchemySyncRepository
from advanced_alchemy.service import SQLAlchemyAsyncRepositoryService, SQLAlchemySyncRepositoryService
from pydantic import BaseModel
from sqlalchemy import String
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from granite_storage import Attachment, attachment
from granite_storage.contrib.advanced_alchemy import AttachmentAsyncRepository, AttachmentSyncRepository
from granite_storage.exceptions import BackendUnavailableError, InvalidReferenceError
from granite_storage.orm import AttachmentList, attachments
from granite_storage.testing import SyncBoundStorage, bound_storage
from tests.orm.conftest import new_database
from tests.orm.databases import Database
from tests.orm.derivations import Upper


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "aa_document"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    title: Mapped[str] = mapped_column(String(50), unique=True)
    file: Mapped[Attachment | None] = attachment("documents", variants={"upper": Upper(when="flush")})


class Record(Base):
    """Attributes whose columns have other names, one of them with a default, and a collection."""

    __tablename__ = "aa_record"
    id: Mapped[int] = mapped_column("record_id", primary_key=True, autoincrement=False)
    label: Mapped[str] = mapped_column("label_column", String(50))
    state: Mapped[str | None] = mapped_column("state_column", String(50), default="open")
    scan: Mapped[Attachment | None] = attachment("documents", name="scan_column")
    other: Mapped[Attachment | None] = attachment("documents")
    pages: Mapped[AttachmentList] = attachments("documents", lazy="raise")


class AsyncRecords(SQLAlchemyAsyncRepositoryService[Record, Any]):
    class Repository(AttachmentAsyncRepository[Record]):
        model_type = Record

    repository_type = Repository


class SyncRecords(SQLAlchemySyncRepositoryService[Record, Any]):
    class Repository(AttachmentSyncRepository[Record]):
        model_type = Record

    repository_type = Repository


class AsyncService(SQLAlchemyAsyncRepositoryService[Document, Any]):
    class Repository(AttachmentAsyncRepository[Document]):
        model_type = Document

    repository_type = Repository
    match_fields = "title"


class SyncService(SQLAlchemySyncRepositoryService[Document, Any]):
    class Repository(AttachmentSyncRepository[Document]):
        model_type = Document

    repository_type = Repository
    match_fields = "title"


class PydanticData(BaseModel, arbitrary_types_allowed=True):
    id: int
    title: str
    file: Attachment | None = None


class MsgspecData(msgspec.Struct):
    id: int
    title: str
    file: Attachment | None = None


@attrs.define
class AttrsData:
    id: int
    title: str
    file: Attachment | None = None


@dataclasses.dataclass
class DataclassData:
    id: int
    title: str
    file: Attachment | None = None


def file(content: str) -> Attachment:
    return Attachment(content.encode(), filename=f"{content}.txt")


async def call(work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a method of either kind; a synchronous one in a thread."""
    if inspect.iscoroutinefunction(work):
        return await work(*arguments, **options)
    return await asyncio.to_thread(work, *arguments, **options)


class Shelf:
    """Documents in a database, and the service that changes them."""

    def __init__(self, kit: Any, service: Any) -> None:
        self.kit = kit
        self._service = service

    async def run(self, method: str, *arguments: Any, **options: Any) -> dict[int, str | None]:
        """Call a method in a transaction, check that objects are what rows refer to, and return the contents of all rows."""
        async with self.service() as service:
            await call(getattr(service, method), *arguments, **options)
            await call(service.repository.session.commit)
        return await self.contents()

    @asynccontextmanager
    async def service(self) -> AsyncIterator[Any]:
        """Give a service with a session of its own; check all afterwards."""
        session = self.kit.sessions()
        try:
            yield self._service(session=session)
        finally:
            await call(session.close)
            await call(self.kit.assert_no_orphans)

    async def contents(self) -> dict[int, str | None]:
        read = self.kit.storage.sync.get if isinstance(self.kit, SyncBoundStorage) else self.kit.storage.get
        async with self.service() as service:
            rows = await call(service.get_many, OrderBy("id"))
            return {row.id: None if row.file is None else (await call(read, row.file.ref)).decode() for row in rows}


@pytest.fixture(scope="session")
async def postgres(request: pytest.FixtureRequest) -> AsyncIterator[Database]:
    async with new_database(request, "asyncpg") as found:
        yield found


@pytest.fixture(params=["sqlite", "sqlite-sync", "asyncpg"])
async def shelf(request: pytest.FixtureRequest, postgres: Database) -> AsyncIterator[Shelf]:
    """Three documents, the last one without a file; on SQLite with both kinds of sessions, and on PostgreSQL."""
    async with AsyncExitStack() as stack:
        if request.param == "sqlite-sync":
            bound = bound_storage(Base)
            shelf = Shelf(await asyncio.to_thread(bound.__enter__), SyncService)
            stack.push_async_callback(asyncio.to_thread, bound.__exit__, None, None, None)
        else:
            engine = None
            if request.param == "asyncpg":
                engine = await stack.enter_async_context(postgres.opened(Base.metadata))
            shelf = Shelf(await stack.enter_async_context(bound_storage(Base, engine=engine)), AsyncService)
        rows = [{"id": 1, "title": "a", "file": file("a1")}, {"id": 2, "title": "b", "file": file("b1")}, {"id": 3, "title": "c"}]
        assert await shelf.run("create_many", rows) == {1: "a1", 2: "b1", 3: None}
        yield shelf


class Records(Shelf):
    async def contents(self) -> dict[int, Any]:
        read = self.kit.storage.sync.get if isinstance(self.kit, SyncBoundStorage) else self.kit.storage.get

        async def content(one: Attachment | None) -> str | None:
            return None if one is None else (await call(read, one.ref)).decode()

        async with self.service() as service:
            found: dict[int, Any] = {}
            for row in await call(service.get_many, OrderBy("id"), load=[Record.pages]):
                pages = [await content(page.file) for page in row.pages]
                found[row.id] = row.label, row.state, await content(row.scan), await content(row.other), pages
            return found


@pytest.fixture(params=["async", "sync"])
async def records(request: pytest.FixtureRequest) -> AsyncIterator[Records]:
    """Two records with files."""
    async with AsyncExitStack() as stack:
        bound = bound_storage(Base)
        if request.param == "sync":
            records = Records(await asyncio.to_thread(bound.__enter__), SyncRecords)
            stack.push_async_callback(asyncio.to_thread, bound.__exit__, None, None, None)
        else:
            records = Records(await stack.enter_async_context(bound), AsyncRecords)
        both = [Record(id=n, label="a", state="new", scan=file("a"), other=file("o"), pages=[b"p", b"q"]) for n in (1, 2)]
        await records.run("create_many", both)
        yield records


UNTOUCHED = ("a", "new", "a", "o", ["p", "q"])


@pytest.mark.parametrize("way", ["update", "service", "update_many", "instances", "generator", "upsert_many"])
async def test_all_attributes_are_written(records: Records, way: str) -> None:
    """Those whose columns have other names, and the files of collections; None does not replace what has a default."""
    values: dict[str, Any] = {"id": 1, "label": "b", "state": None, "scan": file("b"), "other": file("r"), "pages": [b"x"]}
    async with records.service() as service:
        repository = service.repository
        if way == "service":
            await call(service.update, values)
        elif way == "update":
            await call(repository.update, Record(**values))
        elif way == "generator":
            await call(repository.update_many, ({**values, "id": number} for number in (1, 2)))
        elif way == "upsert_many":
            new = {"id": 3, "label": "c", "scan": file("c"), "pages": [b"c"]}
            await call(repository.upsert_many, [Record(**values), Record(**new)])
        else:
            await call(repository.update_many, [values if way == "update_many" else Record(**values)])
        await call(repository.session.commit)
    written = ("b", "new", "b", "r", ["x"])
    others = {2: written if way == "generator" else UNTOUCHED}
    assert await records.contents() == {
        1: written,
        **others,
        **({3: ("c", "open", "c", None, ["c"])} if way == "upsert_many" else {}),
    }


async def test_attributes_that_are_not_set_stay(records: Records) -> None:
    await records.run("update_many", [Record(id=1, label="b")])
    assert await records.contents() == {1: ("b", *UNTOUCHED[1:]), 2: UNTOUCHED}
    await records.run("update_many", [{"id": 1, "pages": [b"x"]}, {"id": 2, "pages": []}])
    assert await records.contents() == {1: ("b", *UNTOUCHED[1:4], ["x"]), 2: (*UNTOUCHED[:4], [])}


async def test_a_row_of_another_session(records: Records) -> None:
    async with records.service() as service:
        row = await call(service.get, 1, load=[Record.pages])
        first = row.pages[0].id
    row.label = "b"
    row.pages.pop()
    async with records.service() as service:
        await call(service.repository.update, row, auto_commit=True)
    async with records.service() as service:
        assert [page.id for page in (await call(service.get, 1, load=[Record.pages])).pages] == [first]
    assert await records.contents() == {1: ("b", *UNTOUCHED[1:4], ["p"]), 2: UNTOUCHED}


async def test_create(shelf: Shelf) -> None:
    assert await shelf.run("create", {"id": 4, "title": "d", "file": file("d1")}) == {1: "a1", 2: "b1", 3: None, 4: "d1"}
    assert (await shelf.run("create", Document(id=5, title="e", file=file("e1"))))[5] == "e1"


async def test_update(shelf: Shelf) -> None:
    assert (await shelf.run("update", {"file": file("a2")}, item_id=1))[1] == "a2"
    assert (await shelf.run("update", {"title": "new"}, item_id=1))[1] == "a2"
    assert (await shelf.run("update", Document(id=1, title="a", file=file("a3"))))[1] == "a3"
    assert (await shelf.run("update", Document(id=1, title="newer")))[1] == "a3"
    assert (await shelf.run("update", {"file": None}, item_id=1))[1] is None


async def test_update_of_a_loaded_row(shelf: Shelf) -> None:
    async with shelf.service() as service:
        row = await call(service.get, 1)
        row.file = file("a2")
        await call(service.update, row, auto_commit=True)
    assert (await shelf.contents())[1] == "a2"


async def test_update_many(shelf: Shelf) -> None:
    rows: list[Any] = [{"id": 1, "file": file("a2")}, Document(id=2, title="b", file=file("b2")), {"id": 3, "file": file("c2")}]
    assert await shelf.run("update_many", rows) == {1: "a2", 2: "b2", 3: "c2"}
    assert await shelf.run("update_many", [{"id": 1, "file": None}, {"id": 2, "file": None}]) == {1: None, 2: None, 3: "c2"}
    assert await shelf.run("update_many", []) == {1: None, 2: None, 3: "c2"}


async def test_update_many_of_loaded_rows(shelf: Shelf) -> None:
    async with shelf.service() as service:
        rows = [await call(service.get, number) for number in (1, 2, 3)]
        rows[0].title, rows[1].file = "new", file("b2")
        await call(service.update_many, rows, auto_commit=True)
    assert await shelf.contents() == {1: "a1", 2: "b2", 3: None}


async def test_update_many_of_a_row_that_is_not_there(shelf: Shelf) -> None:
    with pytest.raises(NotFoundError):
        await shelf.run("update_many", [{"id": 1, "file": file("a2")}, {"id": 9, "file": file("x")}])
    assert await shelf.contents() == {1: "a1", 2: "b1", 3: None}


async def test_update_many_is_committed_as_a_whole(shelf: Shelf) -> None:
    shelf.kit.faults.fail("put_bytes", nth=3)  # the file of the second row, after the variant of the first
    with pytest.raises(BackendUnavailableError):
        await shelf.run("update_many", [{"id": 1, "file": file("a2")}, {"id": 2, "file": file("b2")}], auto_commit=True)
    assert await shelf.contents() == {1: "a1", 2: "b1", 3: None}


async def test_upsert(shelf: Shelf) -> None:
    assert (await shelf.run("upsert", {"id": 4, "title": "d", "file": file("d1")}))[4] == "d1"
    assert (await shelf.run("upsert", {"title": "d", "file": file("d2")}, match_fields=["title"]))[4] == "d2"
    assert (await shelf.run("upsert", {"id": 1, "title": "a", "file": file("a2")}, item_id=1))[1] == "a2"


@pytest.mark.parametrize("no_merge", [False, True])
async def test_upsert_many(shelf: Shelf, no_merge: bool) -> None:
    rows = [{"id": 1, "title": "a", "file": file("a2")}, {"id": 4, "title": "d", "file": file("d1")}]
    found = await shelf.run("upsert_many", rows, match_fields=["title"], no_merge=no_merge)
    assert found == {1: "a2", 2: "b1", 3: None, 4: "d1"}
    found = await shelf.run("upsert_many", [{"id": 1, "title": "a"}, {"id": 5, "title": "e"}], match_fields=["title"])
    assert found == {1: "a2", 2: "b1", 3: None, 4: "d1", 5: None}


async def test_get_or_upsert_and_get_and_update(shelf: Shelf) -> None:
    assert (await shelf.run("get_or_upsert", title="a", file=file("a2"), match_fields=["title"]))[1] == "a2"
    assert (await shelf.run("get_and_update", title="a", file=file("a3"), match_fields=["title"]))[1] == "a3"


async def test_delete(shelf: Shelf) -> None:
    assert await shelf.run("delete", 1) == {2: "b1", 3: None}
    assert await shelf.run("delete_many", [2, 3]) == {}


async def test_delete_where(shelf: Shelf) -> None:
    assert await shelf.run("delete_where", Document.title == "b") == {1: "a1", 3: None}


@pytest.mark.parametrize("method", ["create_many", "update_many", "upsert_many"])
async def test_an_upload_that_fails(shelf: Shelf, method: str) -> None:
    rows = [{"id": number, "title": str(number), "file": file("x")} for number in ((4, 5) if method == "create_many" else (1, 2))]
    shelf.kit.faults.fail("put_bytes", nth=3)
    with pytest.raises(BackendUnavailableError):
        await shelf.run(method, rows)
    assert await shelf.contents() == {1: "a1", 2: "b1", 3: None}


async def test_the_repository_of_the_library_says_what_it_cannot(shelf: Shelf) -> None:
    class Plain(SQLAlchemyAsyncRepository[Document]):
        model_type = Document

    class PlainSync(SQLAlchemySyncRepository[Document]):
        model_type = Document

    async with shelf.service() as service:
        session = service.repository.session
        repository = PlainSync(session=session) if isinstance(session, Session) else Plain(session=session)
        with pytest.raises(InvalidReferenceError, match=r"may set the attachment aa_document\.file to None only"):
            await call(repository.update_many, [Document(id=1, title="a", file=file("a2"))])
    assert await shelf.contents() == {1: "a1", 2: "b1", 3: None}


@pytest.mark.parametrize("auto_commit", [False, True])
@pytest.mark.parametrize("data", [dict, Document, PydanticData, MsgspecData, AttrsData, DataclassData])
async def test_data_of_each_kind(shelf: Shelf, data: Callable[..., Any], auto_commit: bool) -> None:
    """Every method takes what a service converts to a model, and a file that it leaves out is set to None."""

    async def run(method: str, *arguments: Any, **options: Any) -> dict[int, str | None]:
        return await shelf.run(method, *arguments, auto_commit=auto_commit, **options)

    def row(number: int, content: str | None = None) -> Any:
        return data(id=number, title=f"t{number}", file=content and file(content))

    await run("delete_where", Document.id < 4)
    assert await run("create", row(1, "a1")) == {1: "a1"}
    assert await run("create_many", [row(2, "b1"), row(3)]) == {1: "a1", 2: "b1", 3: None}
    assert await run("update", row(1, "a2"), item_id=1) == {1: "a2", 2: "b1", 3: None}
    assert await run("update_many", [row(1, "a3"), row(2), row(3, "c3")]) == {1: "a3", 2: None, 3: "c3"}
    assert await run("upsert", row(1, "a4")) == {1: "a4", 2: None, 3: "c3"}
    found = await run("upsert_many", [row(1, "a5"), row(4, "d5")], match_fields=["id"])
    assert found == {1: "a5", 2: None, 3: "c3", 4: "d5"}
    found = await run("upsert_many", [row(1), row(4)], match_fields=["id"])
    assert found == {1: None, 2: None, 3: "c3", 4: None}
    assert await run("get_or_upsert", title="t3", file=file("c6"), match_fields=["title"]) == {1: None, 2: None, 3: "c6", 4: None}
    assert await run("delete", 3) == {1: None, 2: None, 4: None}
    assert await run("delete_many", [1, 2, 4]) == {}
