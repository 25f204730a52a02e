"""Sources that are there once, in two attachments: at once, one after the other, after a rollback, and by `put_stream`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import io
import itertools
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from starlette.datastructures import UploadFile

from granite_storage import SizeLimitedStream, StorageManager, streams
from granite_storage.exceptions import ConsumedSourceError, ContentTooLargeError
from granite_storage.orm import Attachment
from tests.core.support import SLOT
from tests.orm.values import Document, Sessions, add, locations

CHUNKS = [os.urandom(45_000) for _ in range(20)]
CONTENT = b"".join(CHUNKS)
PLACE = {**SLOT, "storage_key": "documents"}

pytestmark = pytest.mark.usefixtures("binding")


class Pipe(io.RawIOBase):
    """A raw file that cannot seek."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self._file = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)


class AsyncRead:
    def __init__(self) -> None:
        self._file = io.BytesIO(CONTENT)

    async def read(self, size: int) -> bytes:
        await asyncio.sleep(0)
        return self._file.read(size)


class SlottedRead:
    """A file that cannot have a weak reference."""

    __slots__ = ("_file",)

    def __init__(self) -> None:
        self._file = io.BytesIO(CONTENT)

    def read(self, size: int) -> bytes:
        return self._file.read(size)


class AsyncChunks:
    def __init__(self) -> None:
        self._chunks = iter(CHUNKS)

    def __aiter__(self) -> AsyncChunks:
        return self

    async def __anext__(self) -> bytes:
        await asyncio.sleep(0)
        for chunk in self._chunks:
            return chunk
        raise StopAsyncIteration


class SharedIterator:
    """An iterable whose iterators are one."""

    def __init__(self) -> None:
        self._chunks = generator()

    def __iter__(self) -> Iterator[bytes]:
        return self._chunks


def generator() -> Iterator[bytes]:
    yield from CHUNKS


async def async_generator() -> AsyncIterator[bytes]:
    for chunk in CHUNKS:
        await asyncio.sleep(0)
        yield chunk


ITERATORS: dict[str, Callable[[], Any]] = {
    "generator": generator,
    "async generator": async_generator,
    "async iterator": AsyncChunks,
    "map": lambda: map(bytes, CHUNKS),
    "iterator of a list": lambda: iter(CHUNKS),
    "chain": lambda: itertools.chain(CHUNKS),
    "one iterator behind an iterable": SharedIterator,
}
FILES: dict[str, Callable[[], Any]] = {
    "raw file": Pipe,
    "buffered file": lambda: io.BufferedReader(Pipe()),
    "gzip file": lambda: gzip.GzipFile(fileobj=Pipe(gzip.compress(CONTENT, 1)), mode="rb"),
    "async read": AsyncRead,
    "file with slots": SlottedRead,
    "upload": lambda: UploadFile(Pipe(), filename="a"),  # type: ignore[arg-type]
    "upload with a size": lambda: UploadFile(Pipe(), size=len(CONTENT), filename="a"),  # type: ignore[arg-type]
}
SOURCES = pytest.mark.parametrize("make", [*ITERATORS.values(), *FILES.values()], ids=[*ITERATORS, *FILES])


@SOURCES
@pytest.mark.case("RA-06")
class TestOnce:
    async def test_two_attachments_at_once(self, sessions: Sessions, manager: StorageManager, make: Callable[[], Any]) -> None:
        source = make()
        with pytest.raises(ConsumedSourceError):
            async with sessions.begin() as session:
                session.add_all([Document(file=Attachment(source)), Document(file=Attachment(source))])
        assert await locations(manager) == set()

    async def test_one_after_the_other(self, sessions: Sessions, manager: StorageManager, make: Callable[[], Any]) -> None:
        source = make()
        async with sessions() as session:
            first = Document(file=Attachment(source))
            session.add(first)
            await session.flush()
            assert first.file is not None
            assert await first.file.read() == CONTENT
            session.add(Document(file=Attachment(source)))
            with pytest.raises(ConsumedSourceError, match="already read"):
                await session.commit()
        assert await locations(manager) == set()

    async def test_again_after_the_commit(self, sessions: Sessions, manager: StorageManager, make: Callable[[], Any]) -> None:
        source = make()
        await add(sessions, Document(file=Attachment(source)))
        with pytest.raises(ConsumedSourceError, match="already read"):
            await add(sessions, Document(file=Attachment(source)))
        assert len(await locations(manager)) == 1

    async def test_again_when_the_first_attachment_is_gone(
        self, sessions: Sessions, manager: StorageManager, make: Callable[[], Any]
    ) -> None:
        """Such as in a transaction that is tried again after its upload has failed half-way."""
        source = make()
        with contextlib.suppress(ContentTooLargeError):
            await add(sessions, Document(thumbnail=Attachment(source)))
        gc.collect()
        with pytest.raises(ConsumedSourceError, match="already read"):
            await add(sessions, Document(file=Attachment(source)))
        assert await locations(manager) == set()

    async def test_again_after_a_rollback(self, sessions: Sessions, manager: StorageManager, make: Callable[[], Any]) -> None:
        source = make()
        async with sessions() as session:
            first = Document(file=Attachment(source))
            session.add(first)
            await session.flush()
            await session.rollback()
            session.add(Document(file=Attachment(source)))
            with pytest.raises(ConsumedSourceError, match="already read"):
                await session.commit()
        assert await locations(manager) == set()


@pytest.mark.case("RA-06")
@pytest.mark.parametrize("wrap", [lambda file: UploadFile(file, filename="a"), lambda file: file], ids=["upload", "file"])
async def test_the_file_of_an_upload_is_the_upload(sessions: Sessions, wrap: Callable[[Any], Any]) -> None:
    file: Any = Pipe()
    await add(sessions, Document(file=Attachment(UploadFile(file, filename="a"))))
    with pytest.raises(ConsumedSourceError):
        await add(sessions, Document(file=Attachment(wrap(file))))


@pytest.mark.case("RA-06")
async def test_a_limit_around_a_stream_is_that_stream(sessions: Sessions, manager: StorageManager) -> None:
    source = generator()
    await add(sessions, Document(file=Attachment(SizeLimitedStream(source, None))))
    for again in (source, SizeLimitedStream(source, None)):
        with pytest.raises(ConsumedSourceError):
            await add(sessions, Document(file=Attachment(again)))
    assert len(await locations(manager)) == 1


@pytest.mark.case("RA-06")
async def test_what_the_manager_has_stored_is_not_there_for_an_attachment(sessions: Sessions, manager: StorageManager) -> None:
    for source in (generator(), iter(CHUNKS), map(bytes, CHUNKS), Pipe()):
        await manager.put_stream(**PLACE, stream=source)
        with pytest.raises(ConsumedSourceError):
            await add(sessions, Document(file=Attachment(source)))


async def test_what_yields_its_chunks_again_is_stored_again(sessions: Sessions) -> None:
    class Chunks:
        def __iter__(self) -> Iterator[bytes]:
            return generator()

    for source in (CHUNKS, tuple(CHUNKS), Chunks(), io.BytesIO(CONTENT), SizeLimitedStream(CHUNKS, None)):
        documents = [Document(file=Attachment(source)) for _ in range(1 if isinstance(source, SizeLimitedStream) else 3)]
        async with sessions.begin() as session:
            session.add_all(documents[:2])
        await add(sessions, documents[-1])
        assert [await document.file.read() for document in documents if document.file] == [CONTENT] * len(documents)


async def test_another_source_at_the_same_address_is_another(sessions: Sessions) -> None:
    for _ in range(20):
        document = await add(sessions, Document(file=Attachment(iter([b"x"]))))
        assert document.file.size == 1


@pytest.mark.case("RA-06")
def test_a_source_that_nothing_else_refers_to_is_let_go() -> None:
    readings = streams._Readings()
    held = iter([b"x"])
    for source in (held, *(iter([b"x"]) for _ in range(20))):
        with readings.claim(source):
            pass
    del source
    with readings.claim(held) as was_begun:
        assert was_begun
    with readings.claim(iter([b"x"])) as was_begun:
        assert not was_begun
    assert held in readings._kept.values()
    assert len(readings._kept) == 2


@pytest.mark.case("RA-06")
def test_sources_in_cycles_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_MOST_KEPT", 10)
    readings = streams._Readings()
    sources = [iter([b"x"]) for _ in range(30)]
    for source in sources:
        with readings.claim(source):
            pass
    assert list(readings._kept.values()) == sources[-10:]


def test_a_fork_reads_nothing_of_what_its_parent_reads() -> None:
    source = generator()
    with streams._readings.claim(source):
        streams._readings.forget_current()  # as in the child
        with streams._readings.claim(source):
            pass


@pytest.mark.case("RA-06")
class TestPutStream:
    async def test_reads_on_where_a_stream_stands(self, manager: StorageManager) -> None:
        for source in (generator(), async_generator(), iter(CHUNKS), Pipe()):
            refs = [await manager.put_stream(**PLACE, stream=source) for _ in range(2)]
            assert [ref.size for ref in refs] == [len(CONTENT), 0]

    async def test_an_upload_that_cannot_seek_is_read_once(self, manager: StorageManager) -> None:
        upload: Any = UploadFile(Pipe(), filename="a")  # type: ignore[arg-type]
        await manager.put_stream(**PLACE, stream=upload)
        with pytest.raises(ConsumedSourceError):
            await manager.put_stream(**PLACE, stream=upload)

    @pytest.mark.parametrize("is_limited", [False, True])
    @pytest.mark.parametrize("kind", ["generator", "async generator", "file"])
    async def test_two_readings_at_once_are_refused(self, manager: StorageManager, kind: str, is_limited: bool) -> None:
        go, gate = asyncio.Event(), threading.Event()

        def blocking() -> Iterator[bytes]:
            yield b"first"
            assert gate.wait(60)
            yield b"second"

        async def waiting() -> AsyncIterator[bytes]:
            yield b"first"
            await go.wait()
            yield b"second"

        class File:
            chunks = blocking()

            def read(self, _: int) -> bytes:
                return next(self.chunks, b"")

        source: Any = {"generator": blocking, "async generator": waiting, "file": File}[kind]()

        def given() -> Any:
            return SizeLimitedStream(source, None) if is_limited else source

        readings = [asyncio.ensure_future(manager.put_stream(**PLACE, stream=given())) for _ in range(2)]
        done, (first,) = await asyncio.wait(readings, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(ConsumedSourceError, match="a stream of its own"):
            await done.pop()
        go.set()
        gate.set()
        assert await manager.get(await first) == b"firstsecond"
