"""Frameworks and the kit for tests, for mypy and pyright only: nothing here is run."""

from __future__ import annotations

from typing import assert_type

from litestar import Litestar, post
from litestar.di import NamedDependency
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from granite_storage import Attachment, ObjectInfo, StorageJournal, StorageManager, StoragePolicy, attachment
from granite_storage.contrib.advanced_alchemy import AttachmentAsyncRepository, AttachmentSyncRepository
from granite_storage.contrib.litestar import StoragePlugin, provide_upload_form
from granite_storage.testing import BoundStorage, FaultInjectingBackend, SyncBoundStorage, bound_storage
from granite_storage.web import UploadForm


class Base(DeclarativeBase):
    pass


class Document(Base):
    __tablename__ = "document"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("documents")


@post("/", dependencies={"form": provide_upload_form({"file": Document.file}, required=["file"])})
async def create(form: NamedDependency[UploadForm], storage: NamedDependency[StorageManager]) -> None: ...


def make_app(storage: StorageManager, journal: StorageJournal) -> Litestar:
    return Litestar([create], plugins=[StoragePlugin(storage, journal=journal, dependency="storage", retry_after=3)])


class Repository(AttachmentAsyncRepository[Document]):
    model_type = Document


class SyncRepository(AttachmentSyncRepository[Document]):
    model_type = Document


async def update(repository: Repository, synchronous: SyncRepository) -> None:
    assert_type(await repository.update_many([Document(id=1)], auto_commit=True), list[Document])
    assert_type(synchronous.update_many([Document(id=1)]), list[Document])


async def use_kit() -> None:
    async with bound_storage(Base, policies={"documents": StoragePolicy("documents", "any")}) as kit:
        assert_type(kit, BoundStorage)
        assert_type(kit.sessions(), AsyncSession)
        assert_type(kit.faults, FaultInjectingBackend)
        assert_type(await kit.objects(), list[ObjectInfo])
        await kit.assert_no_orphans()


def use_synchronous_kit() -> None:
    with bound_storage(Base) as kit:
        assert_type(kit, SyncBoundStorage)
        assert_type(kit.sessions(), Session)
        assert_type(kit.objects(), list[ObjectInfo])
