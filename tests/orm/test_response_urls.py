"""URLs of attachments and variants, and response models that show them."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, cast

import httpx
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, TypeAdapter
from pydantic_core import PydanticSerializationError
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import ConfigurationError, StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.backends.s3 import S3StorageBackend
from granite_storage.backends.wrappers import WrappedBackend
from granite_storage.derived import ImageVariant
from granite_storage.exceptions import UnboundAttachmentError
from granite_storage.orm import (
    AttachedFile,
    Attachment,
    AttachmentList,
    AttachmentVariant,
    WithURL,
    attachment,
    attachments,
    bind_storage,
    sign_urls,
    sign_urls_sync,
)
from granite_storage.policies import PublicURL
from granite_storage.signing import UrlSigner
from granite_storage.testing import FaultInjectingBackend
from tests.inspection.support import png
from tests.orm.values import Sessions, sqlite, write_raw

HOUR = timedelta(hours=1)
CDN = "https://cdn.example.com"


class Base(DeclarativeBase):
    pass


class Post(Base):
    __tablename__ = "post"
    id: Mapped[int] = mapped_column(primary_key=True)
    photo: Mapped[Attachment | None] = attachment("photos", variants={"thumb": ImageVariant(fit=(8, 8))})
    scan: Mapped[Attachment | None] = attachment("scans")
    pages: Mapped[AttachmentList] = attachments("scans", lazy="selectin")
    prints: Mapped[AttachmentList] = attachments("photos", lazy="selectin")


class PostOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: int
    photo: Annotated[Attachment, WithURL()] | None
    scan: Annotated[Attachment | None, WithURL(signed=True)]


class PagesOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    pages: Annotated[AttachmentList, WithURL(signed=True)]
    prints: list[Annotated[AttachedFile, WithURL()]]


class PlainOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    scan: Attachment | None


class ThumbOut(BaseModel):
    thumb: Annotated[AttachmentVariant, WithURL()]
    signed: Annotated[AttachmentVariant, WithURL(signed=True)] | None = None


@pytest.fixture
def backend() -> FaultInjectingBackend:
    return FaultInjectingBackend(MemoryStorageBackend())


@pytest.fixture
async def manager(backend: WrappedBackend) -> AsyncIterator[StorageManager]:
    policies = {
        "photos": StoragePolicy("photos", "memory", key_prefix="photos", public=PublicURL(CDN)),
        "scans": StoragePolicy("scans", "memory", key_prefix="scans"),
    }
    signer = UrlSigner("https://files.example", keys={"k": "s" * 32})
    async with StorageManager(backends={"memory": backend}, policies=policies, url_signer=signer) as manager:
        yield manager


@pytest.fixture
async def sessions(manager: StorageManager, tmp_path: Path) -> AsyncIterator[Sessions]:
    async with sqlite(tmp_path, Base, "urls.db") as sessions:
        binding = bind_storage(Base, manager, session_factory=sessions)
        yield sessions
        binding.unbind()


async def added(sessions: Sessions, **files: Any) -> Post:
    post = Post(**files)
    async with sessions.begin() as session:
        session.add(post)
    return post


def picture() -> Attachment:
    return Attachment(png(20, 10), filename="a b.png", content_type="image/png")


async def test_of_an_attachment(sessions: Sessions, manager: StorageManager) -> None:
    post = await added(sessions, photo=picture(), scan=Attachment(b"abc"))
    assert post.photo is not None
    assert post.scan is not None
    assert post.photo.public_url == f"{CDN}/{post.photo.location}" == manager.public_url(post.photo.ref)
    thumb = post.photo.variants["thumb"]
    assert thumb is not None
    assert thumb.public_url == f"{CDN}/{thumb.location}"
    assert thumb.public_url.endswith("-thumb.webp")
    with pytest.raises(ConfigurationError, match="not public"):
        _ = post.scan.public_url
    pending = Attachment(b"abc")
    with pytest.raises(UnboundAttachmentError, match="flush"):
        _ = pending.public_url
    with pytest.raises(UnboundAttachmentError, match="flush"):
        await pending.url(expires_in=HOUR)
    for file in (post.scan, thumb):
        url = await file.url(expires_in=HOUR, stable_for=timedelta(days=3), disposition="inline", filename="x.png")
        assert url == await manager.url(
            file.ref, expires_in=HOUR, stable_for=timedelta(days=3), disposition="inline", filename="x.png"
        )


class Signed(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    files: list[Annotated[Attachment | AttachmentVariant, WithURL(signed=True)] | None]


def test_synchronous(tmp_path: Path) -> None:
    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session

    policies = {name: StoragePolicy(name, "memory", key_prefix=name) for name in ("photos", "scans")}
    signer = UrlSigner("https://files.example", keys={"k": "s" * 32})
    manager = StorageManager(backends={"memory": MemoryStorageBackend()}, policies=policies, url_signer=signer)
    engine = create_engine(f"sqlite:///{tmp_path / 'sync.db'}")
    Base.metadata.create_all(engine)
    binding = bind_storage(Base, manager)
    with Session(engine, expire_on_commit=False) as session:
        post = Post(photo=picture())
        session.add(post)
        session.commit()
        assert post.photo is not None
        thumb = post.photo.variants["thumb"]
        assert thumb is not None
        for file in (post.photo, thumb):
            url = file.sync.url(expires_in=HOUR, stable_for=timedelta(days=3))
            assert url == manager.sync.url(file.ref, expires_in=HOUR, stable_for=timedelta(days=3))
        signed = Signed.model_validate({"files": [post.photo, thumb, None]})
        sign_urls_sync([post.photo, thumb, None], expires_in=HOUR, disposition="inline", stable_for=timedelta(days=3))
        first, second, third = json.loads(signed.model_dump_json())["files"]
        assert first["url"] == post.photo.sync.url(expires_in=HOUR, disposition="inline", stable_for=timedelta(days=3))
        assert second["url"] == thumb.sync.url(expires_in=HOUR, disposition="inline", stable_for=timedelta(days=3))
        assert third is None
    binding.unbind()
    manager.sync.close()
    engine.dispose()


async def test_synchronous_code_of_an_asynchronous_session(sessions: Sessions) -> None:
    post = await added(sessions, scan=Attachment(b"abc"))
    with pytest.raises(ConfigurationError, match=r"sign_urls_sync\(\) would block.*'await sign_urls\(...\)'"):
        sign_urls_sync([post.scan], expires_in=HOUR)
    async with sessions() as session:
        await session.run_sync(lambda _: sign_urls_sync([post.scan], expires_in=HOUR))
    assert json.loads(PostOut.model_validate(post).model_dump_json())["scan"]["url"].startswith("https://files.example/k.")


class TestModels:
    async def test_in_fastapi(self, sessions: Sessions, backend: FaultInjectingBackend) -> None:
        for number in range(3):
            await added(sessions, photo=picture(), scan=Attachment(b"abc" * number))
        await added(sessions)
        app = FastAPI()

        @app.get("/posts", response_model=list[PostOut])
        async def posts() -> Any:
            async with sessions() as session:
                found = (await session.scalars(select(Post).order_by(Post.id))).all()
            await sign_urls([post.scan for post in found], expires_in=HOUR, stable_for=HOUR)
            return found

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            first, second = (await client.get("/posts")).json(), (await client.get("/posts")).json()
            schemas = (await client.get("/openapi.json")).json()["components"]["schemas"]
        assert [set(post["photo"]) for post in first[:3]] == [
            {"size", "content_type", "original_filename", "checksum", "url"}
        ] * 3
        assert all(post["photo"]["url"].startswith(f"{CDN}/photos/post/") for post in first[:3])
        assert all(post["scan"]["url"].startswith("https://files.example/k.") for post in first[:3])
        assert first[3] == {"id": 4, "photo": None, "scan": None}
        assert first == second
        shown = next(schema for schema in json.loads(json.dumps(schemas))["PostOut"]["properties"]["photo"]["anyOf"])
        assert shown["properties"]["url"]["anyOf"] == [{"type": "string", "format": "uri"}, {"type": "null"}]
        assert "url" in shown["required"]

    async def test_a_list_in_one_batch(
        self, sessions: Sessions, manager: StorageManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        posts = [await added(sessions, scan=Attachment(b"abc")) for _ in range(3)]
        batches: list[int] = []

        async def urls(manager: StorageManager, refs: Any, **options: Any) -> Any:
            batches.append(len(refs))
            return await sign(manager, refs, **options)

        sign = StorageManager.urls
        monkeypatch.setattr(StorageManager, "urls", urls)
        await sign_urls([post.scan for post in posts], expires_in=HOUR)
        assert batches == [3]

    async def test_collections_in_one_batch(
        self, sessions: Sessions, backend: FaultInjectingBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        posts = [await added(sessions, pages=[b"a", b"bc"], prints=[picture()]) for _ in range(3)]
        batches: list[int] = []

        async def urls(manager: StorageManager, refs: Any, **options: Any) -> Any:
            batches.append(len(refs))
            return await sign(manager, refs, **options)

        sign = StorageManager.urls
        monkeypatch.setattr(StorageManager, "urls", urls)
        with pytest.raises(PydanticSerializationError, match=r"none was signed: 'await sign_urls"):
            PagesOut.model_validate(posts[0]).model_dump_json()
        await sign_urls([post.pages for post in posts], expires_in=HOUR)
        assert batches == [6]
        shown = json.loads(PagesOut.model_validate(posts[1]).model_dump_json())
        assert [(page["id"], page["file"]["size"]) for page in shown["pages"]] == [
            (page.id, page.file.size) for page in posts[1].pages
        ]
        assert all(page["file"]["url"].startswith("https://files.example/k.") for page in shown["pages"])
        assert shown["prints"][0]["file"]["url"] == posts[1].prints[0].file.public_url
        assert PagesOut.model_validate(posts[1]).model_dump()["pages"] == posts[1].pages
        schema = PagesOut.model_json_schema(mode="serialization")["properties"]
        for name in ("pages", "prints"):
            item = schema[name]["items"]
            assert item["properties"]["file"]["properties"]["url"]["anyOf"][0]["format"] == "uri"
            assert set(item["required"]) == {"id", "caption", "file"}

    async def test_one_file_of_each_kind(self, sessions: Sessions) -> None:
        post = await added(sessions, pages=[b"a", b"b"], scan=Attachment(b"c"))
        adapter = TypeAdapter(Annotated[AttachedFile | None, WithURL(signed=True)])
        await sign_urls(post.pages[0], expires_in=HOUR)
        assert "url" in json.loads(adapter.dump_json(post.pages[0]))["file"]
        assert adapter.dump_json(None) == b"null"
        with pytest.raises(PydanticSerializationError, match="none was signed"):
            adapter.dump_json(post.pages[1])
        await sign_urls([None, (post.pages, [post.scan])], expires_in=HOUR)
        assert "url" in json.loads(adapter.dump_json(post.pages[1]))["file"]
        assert post.scan is not None
        await sign_urls(post.scan, expires_in=HOUR)

    @pytest.mark.parametrize("wrong", ["photo", [b"photo"], [5], {"photo": None}])
    async def test_nothing_that_has_a_url(self, sessions: Sessions, wrong: Any) -> None:
        with pytest.raises(TypeError, match="URLs are signed for attachments, variants, files of collections"):
            await sign_urls(wrong, expires_in=HOUR)

    @pytest.mark.parametrize("source", [str, list[Attachment], dict[str, Attachment], Attachment | str])
    def test_on_something_else(self, source: Any) -> None:
        with pytest.raises(ConfigurationError, match="annotate the element"):
            TypeAdapter(Annotated[source, WithURL()])

    async def test_durations_that_are_numbers(self, sessions: Sessions, manager: StorageManager, tmp_path: Path) -> None:
        """Each place that takes a duration says that it takes a timedelta."""
        post = await added(sessions, scan=Attachment(b"abc"))
        assert post.scan is not None
        scan, ref, seconds = post.scan, post.scan.ref, cast(Any, 60)
        signer = manager.url_signer
        assert signer is not None
        local = LocalStorageBackend(tmp_path)
        s3 = S3StorageBackend("bucket")
        calls: list[Callable[[], Any]] = [
            lambda: sign_urls([], expires_in=seconds),
            lambda: sign_urls([scan], expires_in=HOUR, stable_for=seconds),
            lambda: scan.url(expires_in=seconds),
            lambda: manager.url(ref, expires_in=seconds),
            lambda: manager.url(ref, expires_in=HOUR, stable_for=seconds),
            lambda: manager.urls([], expires_in=seconds),
            lambda: signer.sign(ref, expires_in=seconds),
            lambda: signer.sign(ref, expires_in=HOUR, stable_for=seconds),
            lambda: local.cleanup_incomplete(older_than=seconds),
            lambda: s3.cleanup_incomplete(older_than=seconds),
            lambda: s3.presign_get("a", expires_in=seconds),
        ]
        for call in calls:
            with pytest.raises(TypeError, match=r"(expires_in|stable_for|older_than) must be a timedelta, such as"):
                await call()

    async def test_variants(self, sessions: Sessions) -> None:
        post = await added(sessions, photo=picture())
        assert post.photo is not None
        thumb = post.photo.variants["thumb"]
        assert thumb is not None
        await sign_urls([thumb, None], expires_in=HOUR)
        again = post.photo.variants["thumb"]  # another object for the same variant
        shown = json.loads(ThumbOut(thumb=thumb, signed=again).model_dump_json())
        assert shown["thumb"]["url"] == thumb.public_url
        assert shown["signed"]["url"].startswith("https://files.example/k.")

    async def test_none_that_was_not_asked_for(self, sessions: Sessions) -> None:
        """Neither a model without the marker nor a signed one without the call shows a URL."""
        post = await added(sessions, scan=Attachment(b"abc"))
        out = PostOut.model_validate(post)
        with pytest.raises(PydanticSerializationError, match=r"none was signed: 'await sign_urls"):
            out.model_dump_json()
        await sign_urls([post.scan], expires_in=HOUR)
        assert set(json.loads(PlainOut.model_validate(post).model_dump_json())["scan"]) == {
            "size",
            "content_type",
            "original_filename",
            "checksum",
        }
        assert post.scan is not None
        assert "url" not in dict(post.scan)
        assert "url" in json.loads(out.model_dump_json())["scan"]
        assert out.model_dump()["scan"] is post.scan
        loaded = pickle.loads(pickle.dumps(post.scan))  # noqa: S301
        with pytest.raises(PydanticSerializationError, match="none was signed"):
            PostOut(id=1, photo=None, scan=loaded).model_dump_json()

    async def test_expired(self, sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
        post = await added(sessions, scan=Attachment(b"abc"))
        await sign_urls([post.scan], expires_in=HOUR)
        later = time.time() + 3600
        monkeypatch.setattr("granite_storage.orm.urls.time.time", lambda: later)
        with pytest.raises(PydanticSerializationError, match="expired"):
            PostOut.model_validate(post).model_dump_json()

    async def test_a_public_url_of_a_private_policy(self, sessions: Sessions) -> None:
        class Wrong(BaseModel):
            model_config = ConfigDict(from_attributes=True)
            scan: Annotated[Attachment, WithURL()]

        post = await added(sessions, scan=Attachment(b"abc"))
        with pytest.raises(PydanticSerializationError, match="not public"):
            Wrong.model_validate(post).model_dump_json()

    async def test_what_no_scanner_has_let_pass(self, sessions: Sessions) -> None:
        post = await added(sessions, photo=picture(), scan=Attachment(b"abc"))
        for name in ("photo", "scan"):
            state = getattr(post, name)._state
            state.correct(StoredObjectRef.from_dict({**state.ref.to_dict(), "scan": {"status": "pending"}}))
        await sign_urls([post.scan], expires_in=HOUR)
        shown = json.loads(PostOut.model_validate(post).model_dump_json())
        assert shown["photo"]["url"] is None
        assert shown["scan"]["url"] is None

    async def test_a_damaged_row(self, sessions: Sessions, caplog: pytest.LogCaptureFixture) -> None:
        await added(sessions, scan=Attachment(b"abc"))
        await write_raw(sessions, json.dumps({"size": 1}), "post.scan")
        async with sessions() as session:
            (damaged,) = (await session.scalars(select(Post))).all()
        await sign_urls([damaged.scan], expires_in=HOUR)
        assert json.loads(PostOut.model_validate(damaged).model_dump_json())["scan"] is None
