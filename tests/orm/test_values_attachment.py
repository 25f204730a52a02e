"""An attachment as a value: pending and stored, found again however it was loaded, pickled and back."""

from __future__ import annotations

import asyncio
import copy
import io
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, text, type_coerce, union_all
from sqlalchemy.exc import MissingGreenlet, UnboundExecutionError
from sqlalchemy.orm import Session, aliased, defer, joinedload, selectinload, with_polymorphic
from starlette.datastructures import Headers, UploadFile

from granite_storage import ContentTooLargeError, StorageManager, StoredObjectRef
from granite_storage.exceptions import ConsumedSourceError, InvalidReferenceError, UnboundAttachmentError
from granite_storage.orm import Attachment, StorageBinding, bind_storage
from tests.orm.values import (
    Base,
    Document,
    Film,
    Folder,
    Item,
    Photo,
    Receipt,
    Sessions,
    add,
    locations,
    make_manager,
)

ROOT = Path(__file__).parents[2]


async def stream(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


class TestPending:
    def test_it_knows_what_was_given_and_nothing_else(self) -> None:
        file = Attachment(b"abc", filename="../a.txt", content_type="text/plain")
        assert file.is_pending
        assert (file.original_filename, file.content_type) == ("../a.txt", "text/plain")
        assert repr(file) == "<Attachment pending filename='../a.txt'>"
        for use in ("ref", "size", "checksum", "location"):
            with pytest.raises(UnboundAttachmentError, match="not stored yet"):
                getattr(file, use)

    async def test_it_cannot_be_read(self, binding: StorageBinding) -> None:
        file = Attachment(b"abc")
        with pytest.raises(UnboundAttachmentError, match="belongs to no column"):
            await file.read()
        with pytest.raises(UnboundAttachmentError, match="belongs to no column"):
            file.open()
        with pytest.raises(UnboundAttachmentError, match="belongs to no column"):
            await file.exists()

    @pytest.mark.parametrize(
        "content",
        [
            "text",
            None,
            3,
            {"location": "x"},
            Path("x"),
            StoredObjectRef("d", "m", "x", 1, ""),
            Attachment(b""),
            io.StringIO("text"),
        ],
        ids=lambda content: type(content).__name__,
    )
    def test_it_is_made_of_bytes_or_a_stream(self, content: Any) -> None:
        with pytest.raises(TypeError):
            Attachment(content)

    @pytest.mark.parametrize(
        "extra",
        [
            {"note": "a\0b"},
            {"note\0": 1},
            {"notes": ["fine", {"deep": "\ud800"}]},
            {"\udfff": None},
            {"when": object()},
            {"number": float("nan")},
            ["no", "mapping"],
        ],
        ids=["NUL", "NUL in a key", "lone surrogate", "lone surrogate in a key", "object", "NaN", "list"],
    )
    def test_extra_that_a_database_refuses_is_refused_at_once(self, extra: Any) -> None:
        """PostgreSQL would refuse some of these at the flush, after the upload, and SQLite would not."""
        with pytest.raises(InvalidReferenceError, match="extra"):
            Attachment(b"abc", extra=extra)

    def test_extra_is_as_it_was_given(self) -> None:
        given = {"text": "a \\u0000 that is only spelled out, \U0001f600", "list": [1]}
        file = Attachment(b"abc", extra=given)
        given["text"] = "changed"
        assert file._state.extra == {"text": "a \\u0000 that is only spelled out, \U0001f600", "list": [1]}

    @pytest.mark.parametrize(
        "make",
        [
            lambda: b"abc",
            lambda: bytearray(b"abc"),
            lambda: memoryview(b"abc"),
            lambda: io.BytesIO(b"abc"),
            lambda: stream(b"a", b"bc"),
            lambda: iter([b"a", b"bc"]),
            lambda: UploadFile(io.BytesIO(b"abc")),
        ],
        ids=["bytes", "bytearray", "memoryview", "file", "async generator", "iterator", "upload"],
    )
    async def test_every_source_is_stored(self, sessions: Sessions, binding: StorageBinding, make: Any) -> None:
        document = await add(sessions, Document(file=Attachment(make())))
        assert document.file.size == 3
        assert await document.file.read() == b"abc"


class TestStored:
    async def test_it_shows_its_ref_without_io(self, sessions: Sessions, binding: StorageBinding) -> None:
        given = Attachment(b"abc", filename="dir/a b.txt", content_type="text/plain", extra={"page": 1})
        document = await add(sessions, Document(id=7, file=given))
        assert document.file is given
        assert not given.is_pending
        assert given.ref.extra == {"page": 1}
        assert (given.size, given.checksum) == (3, given.ref.checksum)
        assert (given.content_type, given.original_filename) == ("text/plain", "a b.txt")
        assert given.location == given.ref.location
        assert given.location.startswith("docs/document/7/file/")
        assert repr(given) == "<Attachment size=3 filename='a b.txt'>"

    async def test_it_reads_opens_and_exists(self, sessions: Sessions, binding: StorageBinding, manager: StorageManager) -> None:
        document = await add(sessions, Document(file=Attachment(b"0123456789")))
        file = document.file
        assert file.manager is manager
        assert await file.exists()
        assert await file.read() == b"0123456789"
        async with file.open(offset=2, length=3) as reader:
            assert await reader.read() == b"234"
        reader = await file.open(verify=True)
        assert b"".join([chunk async for chunk in reader]) == b"0123456789"
        await manager.delete(file.ref)
        assert not await file.exists()

    @pytest.mark.case("REF-10")
    async def test_its_ref_cannot_be_changed_in_place(self, sessions: Sessions, binding: StorageBinding) -> None:
        document = await add(sessions, Document(file=Attachment(b"a", extra={"k": 0})))
        with pytest.raises(TypeError, match="read-only"):
            document.file.ref.extra["k"] = 1
        with pytest.raises(AttributeError):
            document.file.ref = None

    async def test_path_in_a_client_name_is_not_followed(self, sessions: Sessions, binding: StorageBinding) -> None:
        document = await add(sessions, Document(id=1, file=Attachment(b"", filename="../../etc/passwd")))
        assert document.file.original_filename == "passwd"
        assert document.file.location.startswith("docs/document/1/file/")


class TestFromUpload:
    async def test_it_takes_name_and_type(self, sessions: Sessions, binding: StorageBinding) -> None:
        headers = Headers({"content-type": "image/png"})
        upload = UploadFile(io.BytesIO(b"png"), filename="me.png", headers=headers)
        document = await add(sessions, Document(file=Attachment.from_upload(upload, extra={"width": 3})))
        ref = document.file.ref
        assert (ref.size, ref.content_type, ref.original_filename, ref.extra) == (3, "image/png", "me.png", {"width": 3})
        assert not upload.file.closed

    async def test_an_upload_without_a_name(self, sessions: Sessions, binding: StorageBinding) -> None:
        document = await add(sessions, Document(file=Attachment.from_upload(UploadFile(io.BytesIO(b"x")))))
        assert (document.file.content_type, document.file.original_filename) == (None, None)


class TestAfterARollback:
    async def roll_back(self, sessions: Sessions, document: Document) -> None:
        async with sessions() as session:
            session.add(document)
            await session.flush()
            await session.rollback()

    async def test_bytes_can_be_stored_again(self, sessions: Sessions, binding: StorageBinding, manager: StorageManager) -> None:
        document = Document(file=Attachment(b"abc", filename="a.txt"))
        await self.roll_back(sessions, document)
        assert document.file is not None
        assert document.file.is_pending
        assert await locations(manager) == set()
        await add(sessions, document)
        assert await document.file.read() == b"abc"
        assert await locations(manager) == {document.file.location}

    async def test_a_stream_says_that_it_was_consumed(
        self, sessions: Sessions, binding: StorageBinding, manager: StorageManager
    ) -> None:
        document = Document(file=Attachment(stream(b"abc")))
        await self.roll_back(sessions, document)
        with pytest.raises(ConsumedSourceError, match="make a new attachment"):
            await add(sessions, document)
        assert await locations(manager) == set()

    async def test_a_failed_upload_has_consumed_its_stream_too(self, sessions: Sessions, binding: StorageBinding) -> None:
        document = Document(thumbnail=Attachment(stream(bytes(900), bytes(900))))
        with pytest.raises(ContentTooLargeError):
            await add(sessions, document)
        with pytest.raises(ConsumedSourceError):
            await add(sessions, document)

    async def test_a_copy_can_be_made_again(self, sessions: Sessions, binding: StorageBinding, manager: StorageManager) -> None:
        original = await add(sessions, Document(file=Attachment(b"abc", filename="a.txt")))
        copied = Document(file=original.file)
        await self.roll_back(sessions, copied)
        await add(sessions, copied)
        assert copied.file is not None
        assert copied.file.original_filename == "a.txt"
        assert copied.file.location != original.file.location
        assert await locations(manager) == {copied.file.location, original.file.location}

    async def test_a_copy_of_what_was_rolled_back_along_with_it(
        self, sessions: Sessions, binding: StorageBinding, manager: StorageManager
    ) -> None:
        file = Attachment(b"abc", filename="a.txt")
        pair = [Document(file=file), Document(file=file)]
        async with sessions() as session:
            session.add_all(pair)
            await session.flush()
            await session.rollback()
        copied = pair[1] if pair[0].file is file else pair[0]
        await add(sessions, copied)
        assert copied.file is not None
        assert await copied.file.read() == b"abc"
        assert copied.file.original_filename == "a.txt"
        assert await locations(manager) == {copied.file.location}


class TestStore:
    async def test_it_uploads_now_and_the_row_takes_the_object(
        self, sessions: Sessions, binding: StorageBinding, manager: StorageManager
    ) -> None:
        file = await Attachment(stream(b"abc"), filename="a.txt").store(Document.file)
        before = await locations(manager)
        assert before == {file.location}
        assert await file.read() == b"abc"
        document = await add(sessions, Document(file=file))
        assert document.file is file
        assert await locations(manager) == before

    async def test_twice_is_once(self, binding: StorageBinding, manager: StorageManager) -> None:
        file = Attachment(b"abc")
        assert await file.store(Document.file) is file
        ref = file.ref
        await file.store(Document.file)
        assert file.ref is ref
        assert len(await locations(manager)) == 1

    async def test_the_limit_of_the_policy_holds(self, binding: StorageBinding, manager: StorageManager) -> None:
        with pytest.raises(ContentTooLargeError):
            await Attachment(bytes(1001)).store(Document.thumbnail)
        assert await locations(manager) == set()

    @pytest.mark.parametrize("column", [Document.title, Receipt.ref, "file", None], ids=str)
    async def test_it_takes_an_attachment_attribute(self, binding: StorageBinding, column: Any) -> None:
        with pytest.raises(TypeError, match=r"Document\.file"):
            await Attachment(b"").store(column)

    async def test_unbound_it_says_so_and_keeps_its_stream(self) -> None:
        file = Attachment(stream(b"abc"))
        with pytest.raises(UnboundAttachmentError, match=r"document\.file has no storage manager: call bind_storage"):
            await file.store(Document.file)
        binding = bind_storage(Base, make_manager())
        await file.store(Document.file)
        assert await file.read() == b"abc"
        binding.unbind()


LOADS = {
    "entities": lambda s: s.scalar(select(Document)),
    "columns": lambda s: s.scalar(select(Document.file)),
    "labelled": lambda s: s.scalar(select(Document.file.label("anything"))),
    "alias": lambda s: s.scalar(select(aliased(Document))),
    "column of an alias": lambda s: s.scalar(select(aliased(Document).file)),
    "subquery": lambda s: s.scalar(select(select(Document.file).subquery().c.file)),
    "cte": lambda s: s.scalar(select(select(Document.file).cte().c.file)),
    "alias of a subquery": lambda s: s.scalar(select(aliased(Document, select(Document).subquery()))),
    "union": lambda s: s.scalar(union_all(select(Document.file), select(Document.file).where(text("0")))),
    "entities of a union": lambda s: s.scalar(
        select(Document).from_statement(union_all(select(Document), select(Document).where(text("0"))))
    ),
    "table": lambda s: s.scalar(select(Document.__table__.c.file)),
    "raw SQL": lambda s: s.scalar(text("SELECT file FROM document").columns(file=Document.file.type)),
    "raw SQL for entities": lambda s: s.scalar(select(Document).from_statement(text("SELECT * FROM document"))),
    "type_coerce": lambda s: s.scalar(select(type_coerce(text("document.file"), Document.file.type)).select_from(Document)),
    "get": lambda s: s.get(Document, 1),
    "relationship": lambda s: s.scalar(select(Folder).options(selectinload(Folder.documents))),
    "joined relationship": lambda s: s.scalar(select(Folder).options(joinedload(Folder.documents))),
}


class TestLoaded:
    @pytest.fixture(autouse=True)
    async def _document(self, sessions: Sessions, binding: StorageBinding) -> None:
        await add(sessions, Folder(documents=[Document(file=Attachment(b"abc"))]))

    @pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
    async def test_however(self, sessions: Sessions, manager: StorageManager, load: Any) -> None:
        async with sessions() as session:
            found = await load(session)
        found = found.documents[0] if isinstance(found, Folder) else found
        file = found.file if isinstance(found, Document) else found
        assert isinstance(file, Attachment)
        assert file.manager is manager
        assert await file.read() == b"abc"

    async def test_refreshed_expired_and_deferred(self, sessions: Sessions, manager: StorageManager) -> None:
        async with sessions() as session:
            document = (await session.scalars(select(Document).options(defer(Document.file)))).one()
            await session.refresh(document, ["file"])
            assert document.file is not None
            assert document.file.manager is manager
            session.expunge_all()
            document = await session.get_one(Document, 1)
            session.expire(document)
            await session.refresh(document)
            assert document.file is not None
            assert await document.file.read() == b"abc"

    async def test_merged(self, sessions: Sessions, manager: StorageManager) -> None:
        async with sessions() as session:
            detached = await session.get_one(Document, 1)
        before = await locations(manager)
        async with sessions.begin() as session:
            merged = await session.merge(detached)
            assert merged.file is not None
            assert await merged.file.read() == b"abc"
            assert not session.is_modified(merged)
        assert await locations(manager) == before

    async def test_inherited(self, sessions: Sessions, manager: StorageManager) -> None:
        await add(sessions, Photo(file=Attachment(b"photo")))
        await add(sessions, Film(file=Attachment(b"film"), poster=Attachment(b"poster")))
        async with sessions() as session:
            everything = with_polymorphic(Item, "*")
            photo, film = await session.scalars(select(everything).order_by(everything.id))
            contents = [await file.read() for file in (photo.file, film.file, film.poster)]
            assert contents == [b"photo", b"film", b"poster"]
            assert [file.location.split("/")[-4] for file in (photo.file, film.file, film.poster)] == ["item", "item", "film"]
            assert await session.scalar(select(Photo.file).where(Photo.file.is_not(None))) is not None

    async def test_in_a_session_of_its_own_loop(self, sessions: Sessions) -> None:
        async with sessions() as session:
            files = list(await session.scalars(select(Document.file)))
        assert await asyncio.gather(*(file.read() for file in files if file)) == [b"abc"]


class TestPickled:
    def test_pending_bytes(self) -> None:
        for content in (b"abc", bytearray(b"abc"), memoryview(b"abc")):
            back = pickle.loads(pickle.dumps(Attachment(content, filename="a.txt", extra={"k": 1})))  # noqa: S301
            assert back.is_pending
            assert back.original_filename == "a.txt"

    async def test_pending_bytes_can_be_stored_after_it(self, sessions: Sessions, binding: StorageBinding) -> None:
        back = pickle.loads(pickle.dumps(Attachment(memoryview(b"abc"), filename="a.txt")))  # noqa: S301
        document = await add(sessions, Document(file=back))
        assert await document.file.read() == b"abc"

    def test_a_pending_stream_cannot_be(self) -> None:
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(Attachment(io.BytesIO(b"abc")))

    async def test_stored_in_the_same_process(self, sessions: Sessions, binding: StorageBinding, manager: StorageManager) -> None:
        document = await add(sessions, Document(file=Attachment(b"abc" * 1000)))
        pickled = pickle.dumps(document.file)
        assert b"abcabc" not in pickled
        back = pickle.loads(pickled)  # noqa: S301
        assert back.ref == document.file.ref
        assert back.manager is manager
        assert await back.read() == b"abc" * 1000
        again = pickle.loads(pickle.dumps(back))  # noqa: S301
        assert again.manager is manager

    async def test_with_its_row_and_into_a_session_again(
        self, sessions: Sessions, binding: StorageBinding, manager: StorageManager
    ) -> None:
        document = await add(sessions, Document(title="a", file=Attachment(b"abc")))
        before = await locations(manager)
        async with sessions.begin() as session:
            back = pickle.loads(pickle.dumps(document))  # noqa: S301
            back.title = "b"
            merged = await session.merge(back)
            assert await merged.file.read() == b"abc"
        assert await locations(manager) == before

    async def test_before_the_commit_it_does_not_take_the_bytes_along(self, sessions: Sessions, binding: StorageBinding) -> None:
        async with sessions.begin() as session:
            document = Document(file=Attachment(b"abc" * 1000))
            session.add(document)
            await session.flush()
            assert b"abcabc" not in pickle.dumps(document.file)

    async def test_broken(self, sessions: Sessions, binding: StorageBinding) -> None:
        await add(sessions, Document())
        async with sessions.begin() as session:
            await session.execute(text("UPDATE document SET file = '[]'"))
        async with sessions() as session:
            back = pickle.loads(pickle.dumps(await session.scalar(select(Document.file))))  # noqa: S301
        with pytest.raises(InvalidReferenceError):
            _ = back.ref

    async def test_stored_in_another_process(self, sessions: Sessions, binding: StorageBinding, tmp_path: Path) -> None:
        document = await add(sessions, Document(file=Attachment(b"abc")))
        program = (
            "import pickle, sys\n"
            "file = pickle.load(sys.stdin.buffer)\n"
            "print(file.size)\n"
            "try: file.manager\n"
            "except Exception as error: print(type(error).__name__)\n"
            "from granite_storage.orm import bind_storage\n"
            "from tests.orm.values import Base, make_manager\n"
            "manager = make_manager()\n"
            "bind_storage(Base, manager)\n"
            "print(file.manager is manager)\n"
        )
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, input=pickle.dumps(document.file), capture_output=True, cwd=ROOT, check=True)
        assert done.stdout.decode().split() == ["3", "UnboundAttachmentError", "True"]

    async def test_loaded_and_pickled_where_no_base_is_bound(self, sessions: Sessions, manager: StorageManager) -> None:
        binding = bind_storage(Base, manager)
        await add(sessions, Document(file=Attachment(b"abc")))
        binding.unbind()
        async with sessions() as session:
            pickled = pickle.dumps((await session.get_one(Document, 1)).file)
        back = pickle.loads(pickled)  # noqa: S301
        assert back.size == 3
        with pytest.raises(UnboundAttachmentError):
            await back.read()
        binding = bind_storage(Base, manager)
        assert await back.read() == b"abc"
        binding.unbind()

    async def test_unbound_it_says_so(self, sessions: Sessions, manager: StorageManager) -> None:
        binding = bind_storage(Base, manager)
        document = await add(sessions, Document(file=Attachment(b"abc")))
        pickled = pickle.dumps(document.file)
        binding.unbind()
        back = pickle.loads(pickled)  # noqa: S301
        with pytest.raises(UnboundAttachmentError, match=r"document\.file was unpickled, and no"):
            await back.read()


class TestCopied:
    def test_a_copy_is_the_same_value(self) -> None:
        file = Attachment(io.BytesIO(b"abc"))
        assert copy.copy(file) is file
        assert copy.deepcopy({"file": file})["file"] is file

    async def test_a_deepcopied_row(self, sessions: Sessions, binding: StorageBinding) -> None:
        document = await add(sessions, Document(file=Attachment(b"abc")))
        assert await copy.deepcopy(document.file).read() == b"abc"


class TestRefused:
    @pytest.mark.parametrize(
        "value",
        [{"location": "x"}, '{"location": "x"}', b"bytes", 3, StoredObjectRef("documents", "memory", "x", 1, "")],
        ids=lambda value: type(value).__name__,
    )
    async def test_at_the_assignment(self, sessions: Sessions, binding: StorageBinding, value: Any) -> None:
        document = await add(sessions, Document(file=Attachment(b"abc")))
        before = document.file
        with pytest.raises(InvalidReferenceError, match=r"Document\.file .* not"):
            document.file = value
        assert document.file is before
        with pytest.raises(InvalidReferenceError):
            Document(file=value)
        with pytest.raises(InvalidReferenceError):
            Photo(file=value)

    async def test_past_the_assignment_at_the_flush(
        self, sessions: Sessions, binding: StorageBinding, manager: StorageManager
    ) -> None:
        document = Document()
        document.__dict__["file"] = {"location": "x"}
        with pytest.raises(InvalidReferenceError):
            await add(sessions, document)
        assert await locations(manager) == set()

    async def test_unbound_nothing_is_written(self, sessions: Sessions) -> None:
        async with sessions() as session:
            session.add(Document(file=Attachment(b"abc")))
            with pytest.raises(Exception, match="bind_storage"):
                await session.flush()

    async def test_a_synchronous_session_without_a_database(
        self, sessions: Sessions, binding: StorageBinding, manager: StorageManager
    ) -> None:
        def flush() -> None:
            with Session() as session:
                session.add(Document(file=Attachment(b"abc")))
                with pytest.raises(UnboundExecutionError):
                    session.flush()

        await asyncio.to_thread(flush)
        assert await locations(manager) == set()

    @pytest.mark.case("RB-20")
    async def test_the_session_of_an_async_session_without_an_await(
        self, sessions: Sessions, binding: StorageBinding, manager: StorageManager
    ) -> None:
        async with sessions() as session:
            session.add(Document(file=Attachment(b"abc")))
            with pytest.raises(MissingGreenlet, match=r"await session\.flush\(\)"):
                session.sync_session.flush()
            assert await locations(manager) == set()
            await session.commit()
        assert len(await locations(manager)) == 1
