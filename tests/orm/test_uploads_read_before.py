"""Uploads that somebody has read, wrapped or closed before they are stored, and those that a form has left empty."""

from __future__ import annotations

import gc
import gzip
import io
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from inspect import isawaitable
from pathlib import Path
from typing import Any

import aiofiles
import pytest
from aiohttp.web_request import FileField
from litestar.datastructures import UploadFile as LitestarUploadFile
from multidict import CIMultiDict, CIMultiDictProxy
from sqlalchemy.exc import IntegrityError
from starlette.datastructures import Headers, UploadFile
from werkzeug.datastructures import FileStorage

from granite_storage import SizeLimitedStream, StorageManager
from granite_storage.exceptions import ConsumedSourceError, EmptyUploadError, SizeMismatchError
from granite_storage.orm import Attachment
from tests.core.support import SLOT
from tests.orm.values import Document, Report, Sessions, add, locations

CONTENT = os.urandom(4000)
PNG = Headers({"content-type": "image/png"})
PLACE = {**SLOT, "storage_key": "documents"}


pytestmark = pytest.mark.usefixtures("binding")


def spooled(max_size: int = 1 << 20) -> Any:
    file = tempfile.SpooledTemporaryFile(max_size=max_size)  # noqa: SIM115  # as the frameworks do
    file.write(CONTENT)
    file.seek(0)
    return file


class DjangoUpload:
    """What Django's `UploadedFile` has."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.name, self.content_type, self.size = "me.png", "image/png", len(CONTENT)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def chunks(self, chunk_size: int = 65536) -> Iterator[bytes]:
        self.file.seek(0)
        while data := self.file.read(chunk_size):
            yield data


class Uploads:
    """Makes an upload of every kind, and closes it after the test."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self.path = folder / "me.png"
        self.path.write_bytes(CONTENT)
        self.stack = stack

    async def starlette(self) -> Any:
        return UploadFile(self.stack.enter_context(spooled()), size=len(CONTENT), filename="me.png", headers=PNG)

    async def starlette_on_disk(self) -> Any:
        return UploadFile(self.stack.enter_context(spooled(max_size=10)), size=len(CONTENT), filename="me.png", headers=PNG)

    async def litestar(self) -> Any:
        upload = LitestarUploadFile("image/png", "me.png", CONTENT)
        self.stack.push_async_callback(upload.close)
        return upload

    async def litestar_on_disk(self) -> Any:
        upload = LitestarUploadFile("image/png", "me.png", CONTENT, max_spool_size=10)
        self.stack.push_async_callback(upload.close)
        return upload

    async def werkzeug(self) -> Any:
        return FileStorage(self.stack.enter_context(spooled()), "me.png", "file", "image/png")

    async def django(self) -> Any:
        return DjangoUpload(self.stack.enter_context(spooled()))


class Files(Uploads):
    """Files without a client's name are taken by `from_upload` and by `Attachment`."""

    async def plain_file(self) -> Any:
        return self.stack.enter_context(self.path.open("rb"))

    async def unbuffered_file(self) -> Any:
        return self.stack.enter_context(self.path.open("rb", buffering=0))

    async def bytes_io(self) -> Any:
        return io.BytesIO(CONTENT)

    async def spooled_file(self) -> Any:
        return self.stack.enter_context(spooled())

    async def named_temporary_file(self) -> Any:
        file = self.stack.enter_context(tempfile.NamedTemporaryFile())  # noqa: SIM115
        file.write(CONTENT)
        file.seek(0)
        return file

    async def aiofiles_handle(self) -> Any:
        return await self.stack.enter_async_context(aiofiles.open(self.path, "rb"))


UPLOADS = [name for name in vars(Uploads) if not name.startswith("_")]
FILES = UPLOADS + [name for name in vars(Files) if not name.startswith("_")]
READ = pytest.mark.parametrize("size", [4, -1], ids=["sniffed", "hashed"])
MAKERS: dict[str, Callable[[Any], Attachment]] = {"from_upload": Attachment.from_upload, "Attachment": Attachment}


async def read(upload: Any, size: int = -1) -> bytes:
    content: bytes | Awaitable[bytes] = upload.read(size)
    return await content if isawaitable(content) else content


@READ
@pytest.mark.case("RA-06")
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("make", MAKERS)
async def test_a_file_read_before_is_stored_whole(sessions: Sessions, tmp_path: Path, kind: str, make: str, size: int) -> None:
    async with AsyncExitStack() as stack:
        file = await getattr(Files(tmp_path, stack), kind)()
        assert await read(file, size)
        document = await add(sessions, Document(file=MAKERS[make](file)))
        assert not getattr(file, "closed", False)
    assert await document.file.read() == CONTENT


@READ
@pytest.mark.case("RA-06")
@pytest.mark.parametrize("kind", [kind for kind in UPLOADS if kind != "django"])
@pytest.mark.parametrize("is_wrapped", [False, True])
async def test_put_stream_stores_an_upload_whole(
    manager: StorageManager, tmp_path: Path, kind: str, size: int, is_wrapped: bool
) -> None:
    async with AsyncExitStack() as stack:
        upload = await getattr(Uploads(tmp_path, stack), kind)()
        await read(upload, size)
        ref = await manager.put_stream(**PLACE, stream=SizeLimitedStream(upload, 5000) if is_wrapped else upload)
    assert await manager.get(ref) == CONTENT


@pytest.mark.case("RA-06")
@pytest.mark.parametrize("kind", FILES)
async def test_a_file_is_stored_again_after_a_rollback(
    sessions: Sessions, manager: StorageManager, tmp_path: Path, kind: str
) -> None:
    async with AsyncExitStack() as stack:
        document = Document(file=Attachment.from_upload(await getattr(Files(tmp_path, stack), kind)()))
        for _ in range(2):
            async with sessions() as session:
                session.add(document)
                await session.flush()
                await session.rollback()
        assert await locations(manager) == set()
        await add(sessions, document)
    assert document.file is not None
    assert await document.file.read() == CONTENT
    assert await locations(manager) == {document.file.location}


@pytest.mark.case("RA-06")
async def test_a_request_that_tries_again_after_an_integrity_error(sessions: Sessions, manager: StorageManager) -> None:
    await add(sessions, Document(id=1))
    upload = UploadFile(io.BytesIO(CONTENT), size=len(CONTENT), filename="me.png")
    with pytest.raises(IntegrityError):
        await add(sessions, Document(id=1, file=Attachment.from_upload(upload)))
    document = await add(sessions, Document(id=2, file=Attachment.from_upload(upload)))
    assert await document.file.read() == CONTENT
    assert await locations(manager) == {document.file.location}


@pytest.mark.case("RA-06")
async def test_one_upload_in_two_attachments_of_one_flush(sessions: Sessions) -> None:
    content = os.urandom(900_000)
    upload = UploadFile(io.BytesIO(content), filename="me.png")
    pair = [Document(file=Attachment.from_upload(upload)), Document(file=Attachment(upload.file))]
    async with sessions.begin() as session:
        session.add_all(pair)
    assert [await document.file.read() for document in pair if document.file] == [content, content]


@pytest.mark.case("RA-06")
@pytest.mark.parametrize("kind", FILES)
async def test_a_closed_file_is_an_error_and_stores_nothing(
    sessions: Sessions, manager: StorageManager, tmp_path: Path, kind: str
) -> None:
    async with AsyncExitStack() as stack:
        file = await getattr(Files(tmp_path, stack), kind)()
        closing = file.close()
        if isawaitable(closing):
            await closing
        with pytest.raises(ConsumedSourceError, match="closed"):
            await add(sessions, Document(file=Attachment.from_upload(file)))
    assert await locations(manager) == set()


@pytest.mark.case("RA-06")
async def test_an_upload_that_a_reader_of_lines_has_closed(sessions: Sessions) -> None:
    upload = UploadFile(io.BytesIO(b"a,b\n1,2\n"), filename="table.csv")
    assert list(io.TextIOWrapper(upload.file)) == ["a,b\n", "1,2\n"]  # which closes the file when it is collected
    gc.collect()
    with pytest.raises(ConsumedSourceError):
        await add(sessions, Document(file=Attachment.from_upload(upload)))


class Pipe:
    """An upload that cannot seek."""

    filename, content_type = "me.png", "image/png"

    def __init__(self, size: Any, seek: type[Exception] | Exception | None = None) -> None:
        self._file = io.BytesIO(CONTENT)
        self.size = size
        self.read = self._file.read
        if seek is not None:
            self.seek = self._seek
            self._error = seek

    def _seek(self, _: int) -> int:
        raise self._error


@pytest.mark.case("RA-06")
@pytest.mark.parametrize("seek", [None, io.UnsupportedOperation, NotImplementedError])
class TestWithoutSeeking:
    async def test_it_is_stored_once(self, sessions: Sessions, seek: type[Exception] | None) -> None:
        document = Document(file=Attachment.from_upload(Pipe(len(CONTENT), seek)))
        async with sessions() as session:
            session.add(document)
            await session.flush()
            assert document.file is not None
            assert await document.file.read() == CONTENT
            await session.rollback()
        with pytest.raises(ConsumedSourceError):
            await add(sessions, document)

    @pytest.mark.parametrize("size", [len(CONTENT) - 1, len(CONTENT) + 1, 0])
    async def test_it_must_come_to_its_size(
        self, sessions: Sessions, manager: StorageManager, seek: type[Exception] | None, size: int
    ) -> None:
        document = Document(file=Attachment.from_upload(Pipe(size, seek)))
        with pytest.raises(SizeMismatchError):
            await add(sessions, document)
        with pytest.raises(ConsumedSourceError):
            await add(sessions, document)
        with pytest.raises(SizeMismatchError):
            await manager.put_stream(**PLACE, stream=Pipe(size, seek))
        assert await locations(manager) == set()

    @READ
    async def test_what_was_read_before_is_missed(
        self, sessions: Sessions, manager: StorageManager, seek: type[Exception] | None, size: int
    ) -> None:
        upload = Pipe(len(CONTENT), seek)
        upload.read(size)
        with pytest.raises(SizeMismatchError) as caught:
            await add(sessions, Document(file=Attachment.from_upload(upload)))
        assert caught.value.expected == len(CONTENT)
        assert await locations(manager) == set()

    @pytest.mark.parametrize("size", [None, True, "4000", -1])
    async def test_what_is_no_size_says_nothing(self, sessions: Sessions, seek: type[Exception] | None, size: Any) -> None:
        document = await add(sessions, Document(file=Attachment.from_upload(Pipe(size, seek))))
        assert await document.file.read() == CONTENT


@pytest.mark.case("RA-06")
async def test_a_disk_that_fails_while_seeking_is_no_file_without_seek(sessions: Sessions, manager: StorageManager) -> None:
    with pytest.raises(OSError, match="worn out"):
        await add(sessions, Document(file=Attachment.from_upload(Pipe(None, OSError(5, "worn out")))))
    assert await locations(manager) == set()


@pytest.mark.case("RA-06")
async def test_a_reader_that_verifies_reads_once(sessions: Sessions) -> None:
    original = await add(sessions, Document(file=Attachment(CONTENT)))
    async with original.file.open(verify=True) as reader:
        copied = await add(sessions, Document(file=Attachment(reader)))
    assert await copied.file.read() == CONTENT
    async with original.file.open(verify=True) as reader:
        await reader.read(4)
        with pytest.raises(ConsumedSourceError, match="verifies"):
            await add(sessions, Document(file=Attachment(reader)))


class TestNames:
    @pytest.mark.case("RB-20")
    @pytest.mark.parametrize("kind", UPLOADS)
    async def test_an_upload_keeps_its_name_and_type(
        self, sessions: Sessions, manager: StorageManager, tmp_path: Path, kind: str
    ) -> None:
        async with AsyncExitStack() as stack:
            upload = await getattr(Uploads(tmp_path, stack), kind)()
            documents = [
                await add(sessions, Document(file=made)) for made in (Attachment(upload), Attachment.from_upload(upload))
            ]
            refs = [document.file.ref for document in documents]
            refs.append(await manager.put_stream(**PLACE, stream=upload))
            report = Report()
            report.set_content_from_stream(upload)
            refs.append((await add(sessions, report)).pdf.ref)
        assert {(ref.original_filename, ref.content_type) for ref in refs} == {("me.png", "image/png")}

    @pytest.mark.case("RB-20")
    async def test_what_is_said_explicitly_wins(self, manager: StorageManager) -> None:
        upload = UploadFile(io.BytesIO(b"x"), filename="me.png", headers=PNG)
        made = Attachment(upload, filename="you.txt", content_type="text/plain")
        assert (made.original_filename, made.content_type) == ("you.txt", "text/plain")
        ref = await manager.put_stream(**PLACE, stream=upload, original_filename="you.txt", content_type="text/plain")
        assert (ref.original_filename, ref.content_type) == ("you.txt", "text/plain")

    @pytest.mark.parametrize("kind", ["plain_file", "named_temporary_file", "aiofiles_handle"])
    async def test_a_path_of_this_machine_is_no_clients_name(self, tmp_path: Path, kind: str) -> None:
        async with AsyncExitStack() as stack:
            file = await getattr(Files(tmp_path, stack), kind)()
            assert Attachment.from_upload(file).original_filename is None

    async def test_an_upload_around_a_file(self, sessions: Sessions) -> None:
        file = io.BytesIO(CONTENT)
        file.read()
        field = FileField("file", "me.png", file, "image/png", CIMultiDictProxy(CIMultiDict()))  # type: ignore[arg-type]
        document = await add(sessions, Document(file=Attachment.from_upload(field)))
        assert (await document.file.read(), document.file.original_filename) == (CONTENT, "me.png")

    @pytest.mark.case("RE-15")
    @pytest.mark.parametrize(
        "given", ["", "x" * 300, "tëxt/plain", "text/plain\x01", "a\tb", ";;;;", "text", "a/b, c/d", 'a/b; c="d']
    )
    async def test_a_media_type_that_cannot_be_kept(self, sessions: Sessions, manager: StorageManager, given: str) -> None:
        upload = UploadFile(io.BytesIO(b"x"), filename="a", headers=Headers({"content-type": given}))
        document = await add(sessions, Document(file=Attachment.from_upload(upload)))
        assert document.file.content_type is None
        assert (await manager.put_stream(**PLACE, stream=upload)).content_type is None


class Unseekable(io.BytesIO):
    """Bytes that come through a pipe."""

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation


def gzipped(content: bytes) -> gzip.GzipFile:
    return gzip.GzipFile(fileobj=Unseekable(gzip.compress(content)), mode="rb")


async def stored(sessions: Sessions, attachment: Attachment) -> bytes:
    return await (await add(sessions, Document(file=attachment))).file.read()


@pytest.mark.case("RA-09")
class TestLeftEmpty:
    KINDS = pytest.mark.parametrize(
        "upload",
        [
            UploadFile(io.BytesIO(), size=0, filename=""),
            UploadFile(io.BytesIO(), filename=""),
            FileStorage(io.BytesIO(), ""),
            FileStorage(),
            LitestarUploadFile("application/octet-stream", ""),
        ],
        ids=["starlette", "of unknown size", "werkzeug", "werkzeug's default", "litestar"],
    )

    @KINDS
    async def test_it_is_no_upload(self, sessions: Sessions, manager: StorageManager, upload: Any) -> None:
        document = await add(sessions, Document(file=Attachment(b"kept")))
        with pytest.raises(EmptyUploadError, match="no file was chosen"):
            Attachment.from_upload(upload)
        with pytest.raises(EmptyUploadError):
            Attachment(upload)
        with pytest.raises(EmptyUploadError):
            await manager.put_stream(**PLACE, stream=upload)
        async with sessions() as session:
            found = await session.get_one(Document, document.id)
        assert found.file is not None
        assert await found.file.read() == b"kept"
        assert len(await locations(manager)) == 1

    async def test_where_only_reading_tells(self, sessions: Sessions, manager: StorageManager) -> None:
        class Unknown:
            filename, content_type = "", None

            async def read(self, size: int) -> bytes:
                return b""

        with pytest.raises(EmptyUploadError):
            await add(sessions, Document(file=Attachment.from_upload(Unknown())))
        assert await locations(manager) == set()

    @pytest.mark.parametrize("content", [CONTENT, b""])
    async def test_a_file_without_a_name_is_no_empty_input(
        self, sessions: Sessions, manager: StorageManager, content: bytes
    ) -> None:
        class Named(io.BytesIO):
            filename = ""

        for make in MAKERS.values():
            assert await stored(sessions, make(gzipped(content))) == content
            assert await stored(sessions, make(Named(content))) == content
        ref = await manager.put_stream(**PLACE, stream=gzipped(content))
        assert (await manager.get(ref), ref.original_filename) == (content, None)

    async def test_looking_whether_an_upload_is_empty_loses_nothing(self, sessions: Sessions) -> None:
        for name in ("", "a"):
            upload = UploadFile(gzipped(CONTENT), filename=name)  # type: ignore[arg-type]
            made = Attachment.from_optional_upload(upload)
            assert made is not None
            assert await stored(sessions, made) == CONTENT
        with pytest.raises(EmptyUploadError):
            await stored(sessions, Attachment.from_upload(UploadFile(gzipped(b""), filename="")))  # type: ignore[arg-type]

    @pytest.mark.parametrize("kind", [kind for kind in FILES if "aiofiles" not in kind])
    async def test_looking_moves_no_file(self, tmp_path: Path, kind: str) -> None:
        async with AsyncExitStack() as stack:
            file = await getattr(Files(tmp_path, stack), kind)()
            inner = getattr(file, "file", getattr(file, "stream", file))
            inner.seek(7)
            upload = UploadFile(inner, filename="")
            assert Attachment.from_optional_upload(upload) is not None
            assert inner.tell() == 7

    @pytest.mark.parametrize("make", [tempfile.TemporaryFile, tempfile.NamedTemporaryFile, tempfile.SpooledTemporaryFile])
    def test_in_every_temporary_file(self, make: Any) -> None:
        with make() as file:
            assert Attachment.from_optional_upload(UploadFile(file, filename="")) is None
            assert Attachment.from_optional_upload(FileStorage(file, "")) is None

    async def test_a_path_that_was_decompressed_is_no_clients_name(self, manager: StorageManager, tmp_path: Path) -> None:
        with gzip.open(tmp_path / "a.gz", "wb") as file:
            file.write(CONTENT)
        with gzip.open(tmp_path / "a.gz") as file:
            file.read(100)
            ref = await manager.put_stream(**PLACE, stream=file)
        assert (ref.original_filename, await manager.get(ref)) == (None, CONTENT[100:])

    @KINDS
    def test_it_is_none_where_that_is_asked_for(self, upload: Any) -> None:
        assert Attachment.from_optional_upload(upload) is None

    @pytest.mark.parametrize("absent", [None, ""])
    def test_a_field_that_is_not_there(self, absent: str | None) -> None:
        assert Attachment.from_optional_upload(absent) is None

    def test_a_text_is_no_file(self) -> None:
        with pytest.raises(TypeError, match="multipart/form-data"):
            Attachment.from_optional_upload("me.png")

    async def test_an_empty_file_with_a_name_and_a_file_without_a_name_are_uploads(self, sessions: Sessions) -> None:
        for upload, size in ((UploadFile(io.BytesIO(), filename="a"), 0), (UploadFile(io.BytesIO(b"x"), filename=""), 1)):
            made = Attachment.from_optional_upload(upload, extra={"k": 1})
            assert made is not None
            document = await add(sessions, Document(file=made))
            assert (document.file.size, document.file.ref.extra) == (size, {"k": 1})
