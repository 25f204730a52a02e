"""What is moved into a public policy's backend is stored with the headers of the policy, and so is what is derived from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import Attachment, ConfigurationError, StorageManager, StoragePolicy, attachment, bind_storage
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.derived import Derivation, DerivationSource, Derived
from granite_storage.migration import migrate
from granite_storage.policies import PublicURL
from tests.orm.databases import sqlite


async def page(source: DerivationSource) -> Derivation:
    return Derivation(b"<p>")


class Base(DeclarativeBase):
    pass


class Drawing(Base):
    __tablename__ = "drawing"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("drawings", variants={"page": Derived(page, content_type="text/html")})


async def test_moved_and_derived(tmp_path: Path) -> None:
    backends = {"old": MemoryStorageBackend(), "new": MemoryStorageBackend()}
    with sqlite("sqlite") as database:
        async with database.opened(Base.metadata) as engine:
            sessions = async_sessionmaker(engine, expire_on_commit=False)
            for key in ("old", "new"):
                public = PublicURL("https://cdn.example.com") if key == "new" else None
                policies = {"drawings": StoragePolicy("drawings", key, public=public)}
                async with StorageManager(backends=backends, policies=policies) as manager:
                    binding = bind_storage(Base, manager, session_factory=sessions)
                    if key == "old":
                        async with sessions.begin() as session:
                            session.add(Drawing(id=1, file=Attachment(b"<svg/>", filename="a.svg", content_type="image/svg+xml")))
                    else:
                        await _require_not_moved(manager, sessions)
                        assert (await migrate(binding, storage_key="drawings", to_backend="new")).failed == 0
                        async with sessions.begin() as session:
                            session.add(Drawing(id=2, file=Attachment(b"<svg/>", filename="b.svg", content_type="image/svg+xml")))
                    async with sessions() as session:
                        drawings = [await session.get_one(Drawing, number) for number in ((1,) if key == "old" else (1, 2))]
                    binding.unbind()
                    types = {
                        (await backends[key].stat(location)).content_type
                        for drawing in drawings
                        for file in (drawing.file, drawing.file and drawing.file.variants["page"])
                        if file is not None
                        for location in [file.location]
                    }
                    assert types == ({"image/svg+xml", "text/html"} if key == "old" else {"application/octet-stream"})
            assert len([info async for info in backends["new"].iter_objects("drawing/")]) == 4


async def _require_not_moved(manager: StorageManager, sessions: async_sessionmaker) -> None:  # type: ignore[type-arg]
    """Where the policy writes elsewhere, an object has no public URL before it is moved."""
    async with sessions() as session:
        drawing = await session.get_one(Drawing, 1)
    assert drawing.file is not None
    with pytest.raises(ConfigurationError, match="migrate"):
        _ = drawing.file.public_url
