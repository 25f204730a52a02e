"""Attachments on models, for mypy and pyright only: nothing here is run."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import assert_type

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column, selectinload
from starlette.datastructures import UploadFile

from granite_storage import (
    Attachment,
    AttachmentType,
    StorageBinding,
    StorageGarbageCollector,
    StorageManager,
    StoredContentMixin,
    StoredObjectReader,
    StoredObjectRef,
    StoredObjectRefType,
    attachment,
    bind_storage,
    iter_model_storage_refs,
)
from granite_storage.gc import CollectedObject, DanglingReference, GarbageCollectionReport, OrphanStatus
from granite_storage.orm import (
    AttachedFile,
    AttachmentList,
    append_files,
    attachments,
    count_files,
    file_class,
    sign_urls,
    sign_urls_sync,
    sum_sizes,
)


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("documents")
    cover: Mapped[Attachment] = attachment("covers", entity_id=lambda document: f"cover-{document.id}", nullable=False)
    ref: Mapped[StoredObjectRef | None] = mapped_column(StoredObjectRefType)


class Report(StoredContentMixin, Base):
    __tablename__ = "report"
    __stored_content_field_name__ = "pdf"
    id: Mapped[int] = mapped_column(primary_key=True)
    pdf: Mapped[Attachment | None] = attachment("documents")


class DataclassBase(MappedAsDataclass, DeclarativeBase):
    pass


class Letter(DataclassBase):
    __tablename__ = "letter"
    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    subject: Mapped[str]
    scan: Mapped[Attachment | None] = attachment("documents", default=None)
    seal: Mapped[Attachment | None] = mapped_column(AttachmentType("documents"), default=None)


class Album(Base):
    __tablename__ = "album"
    id: Mapped[int] = mapped_column(primary_key=True)
    photos: Mapped[AttachmentList] = attachments("photos", max_files=20, max_total_size=1 << 20, lazy="selectin")


class Folder(DataclassBase):
    __tablename__ = "folder"
    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    papers: Mapped[AttachmentList] = attachments("documents", default_factory=AttachmentList)


async def use_several(album: Album, upload: UploadFile, session: AsyncSession) -> None:
    assert_type(album.photos, AttachmentList)
    album.photos.append(Attachment(b"abc"))
    album.photos.append(b"abc")
    album.photos.insert(0, upload)
    album.photos.extend([upload, Attachment(b"abc"), album.photos[0].copy()])
    album.photos.move(album.photos[0], 1)
    album.photos.reorder([photo.id for photo in album.photos])
    album.photos.sort(key=lambda photo: photo.position)
    album.photos[0] = Attachment(b"abc")
    album.photos[0].file = Attachment(b"abc")
    album.photos[0].caption = None
    album.photos[0].extra = {"likes": 1}
    album.photos = AttachmentList([b"abc", upload])
    assert_type(album.photos[0], AttachedFile)
    assert_type(album.photos[0].file, Attachment)
    assert_type(append_files(album, Album.photos, [upload, b"abc"]), list[AttachedFile])
    photo_class = file_class(Album.photos)
    assert_type(photo_class, type[AttachedFile])
    session.add(photo_class(b"abc", caption="text", parent_id=1))
    found = await session.scalars(select(photo_class).where(photo_class.caption == "text").order_by(photo_class.position))
    assert_type(found.one(), AttachedFile)
    count: int | None = await session.scalar(select(count_files(Album.photos)).where(Album.id == 1))
    size: int | None = await session.scalar(select(sum_sizes(Album.photos)).where(Album.id == count))
    await session.get(Album, size, options=[selectinload(Album.photos)])
    Folder(AttachmentList([b"abc"])).papers.clear()


def bind(manager: StorageManager, sessions: async_sessionmaker[AsyncSession]) -> None:
    binding = bind_storage(Base, manager, session_factory=sessions)
    assert_type(binding, StorageBinding)
    assert_type(binding.manager, StorageManager)
    binding.unbind()


async def use(document: Document, upload: UploadFile, session: AsyncSession) -> None:
    document.file = Attachment(b"abc", filename="a.txt", content_type="text/plain", extra={"k": 1})
    document.file = Attachment.from_upload(upload)
    document.file = await Attachment(upload).store(Document.file)
    document.file = None
    document.file = document.cover
    document.cover = Attachment(b"")
    loaded: Attachment | None = await session.scalar(select(Document.file))
    document.file = loaded
    assert_type(document.cover.ref, StoredObjectRef)
    assert_type(document.cover.size, int)
    assert_type(document.cover.checksum, str)
    assert_type(document.cover.location, str)
    assert_type(document.cover.content_type, str | None)
    assert_type(document.cover.original_filename, str | None)
    assert_type(document.cover.is_pending, bool)
    assert_type(document.cover.manager, StorageManager)
    assert_type(await document.cover.read(), bytes)
    assert_type(await document.cover.exists(), bool)
    hour = timedelta(hours=1)
    assert_type(document.cover.public_url, str)
    assert_type(await document.cover.url(expires_in=hour, stable_for=hour, disposition="inline", filename="a"), str)
    assert_type(document.cover.sync.url(expires_in=hour), str)
    assert_type(await document.cover.manager.urls([document.cover.ref], expires_in=hour, stable_for=hour), list[str])
    assert_type(document.cover.manager.sync.urls([document.cover.ref], expires_in=hour), list[str])
    await sign_urls([document.file, document.cover, document.cover.variants["a"]], expires_in=hour)
    sign_urls_sync([document.file, document.cover.variants["a"]], expires_in=hour, disposition="inline", stable_for=hour)
    async with document.cover.open(offset=1024, length=1, verify=False) as reader:
        assert_type(reader, StoredObjectReader)
    await session.scalars(select(Document).where(Document.file["size"].as_integer() > 1, Document.file.is_not(None)))
    await session.scalars(select(Document).where(Document.file == document.cover, Document.ref == document.cover.ref))


def dataclasses() -> Letter:
    Letter("hello")
    return Letter("hello", Attachment(b"scan"), seal=Attachment(b"seal"))


async def mixin(report: Report, upload: UploadFile) -> None:
    assert_type(report.set_content(b"", filename="a", content_type="b", extra={}), Attachment)
    assert_type(report.set_content_from_stream([b""]), Attachment)
    assert_type(report.set_content_from_uploadfile(upload), Attachment)
    assert_type(await report.replace_content(b""), tuple[StoredObjectRef | None, StoredObjectRef])
    assert_type(await report.get_content(), bytes)
    assert_type(await report.get_content_text("utf-8"), str)
    async with report.open_content(offset=1) as reader:
        assert_type(reader, StoredObjectReader)
    assert_type(await report.delete_content(), bool)
    report.clear_content_reference()


async def references(session: AsyncSession) -> None:
    refs = iter_model_storage_refs(session, Document, "file")
    assert_type(refs, AsyncGenerator[StoredObjectRef, None])
    async for ref in refs:
        assert_type(ref, StoredObjectRef)


async def collect(manager: StorageManager, sessions: async_sessionmaker[AsyncSession]) -> None:
    binding = bind_storage(Base, manager, session_factory=sessions)
    collector = StorageGarbageCollector(manager, binding=binding, grace_period=timedelta(days=1), max_deleted_share=0.1)
    report = await collector.collect(storage_key="documents", dry_run=False, allow_restored_database=True)
    assert_type(report, GarbageCollectionReport)
    assert_type(report.dangling, list[DanglingReference])
    run = collector.collection(storage_key="documents")
    async for item in run:
        assert_type(item, CollectedObject)
        assert_type(item.status, OrphanStatus)
    async with collector.run_every(timedelta(hours=6), storage_keys=["documents"]):
        pass


async def collect_by_hand(manager: StorageManager, session: AsyncSession, refs: list[StoredObjectRef | None]) -> None:
    StorageGarbageCollector(manager, lambda: refs)
    StorageGarbageCollector(manager, lambda: iter_model_storage_refs(session, Document, "file"))

    async def given() -> list[StoredObjectRef]:
        return []

    StorageGarbageCollector(manager, given)
