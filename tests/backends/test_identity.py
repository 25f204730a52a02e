"""The identity of a store: written once, kept in each ref, and missed where a backend's key leads to another store."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from granite_storage import ObjectNotFoundError, StorageManager, StoragePolicy, StoredObjectRef
from granite_storage.backends._identity import IdentityObject
from granite_storage.backends.base import Place, StorageBackend, SupportsIdentity, overlap
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.backends.obstore import ObjectStoreBackend
from granite_storage.backends.wrappers import PrefixedBackend
from granite_storage.exceptions import AccessDeniedError, ObjectExistsError
from granite_storage.testing import FaultInjectingBackend
from tests.faults.s3_proxy import answer, fault_proxy
from tests.servers import S3Server

MARKER = ".granite-storage"
WHERE: dict[str, Any] = {"model_name": "m", "entity_id": "1", "field_name": "f"}


def manager_of(backend: StorageBackend) -> StorageManager:
    return StorageManager(backends={"files": backend}, policies={"files": StoragePolicy("files", "files")})


async def put(manager: StorageManager) -> StoredObjectRef:
    return await manager.put_bytes(storage_key="files", **WHERE, content=b"...")


@pytest.fixture
async def bucket(moto_server: S3Server) -> AsyncIterator[str]:
    async with moto_server.bucket() as bucket:
        yield bucket


@pytest.mark.case("RA-03")
async def test_a_ref_keeps_the_identity_of_its_store(tmp_path: Path) -> None:
    async with manager_of(LocalStorageBackend(tmp_path)) as manager:
        ref, other = await put(manager), await manager.put_stream(storage_key="files", **WHERE, stream=[b"a", b"b"])
        copy = await manager.copy(ref, **WHERE)
    assert ref.identity == other.identity == copy.identity == (tmp_path / MARKER).read_text().strip()
    assert ref.extra is None
    again = StoredObjectRef.from_dict(json.loads(json.dumps(ref.to_dict())))
    assert (again, again.identity) == (ref, ref.identity)
    assert pickle.loads(pickle.dumps(ref)).identity == ref.identity  # noqa: S301  # our own
    assert StoredObjectRef.from_dict({**ref.to_dict(), "identity": None}) == ref  # as an older version wrote it
    assert ref.with_identity(None).identity is None
    async with manager_of(LocalStorageBackend(tmp_path)) as manager:
        assert (await put(manager)).identity == ref.identity


@pytest.mark.case("RA-03")
async def test_a_read_that_finds_nothing_says_that_the_key_leads_elsewhere(tmp_path: Path) -> None:
    async with manager_of(LocalStorageBackend(tmp_path / "one")) as manager:
        ref = await put(manager)
    for name in ("never used", "in use"):
        async with manager_of(LocalStorageBackend(tmp_path / "two")) as manager:
            for read in (manager.get(ref), manager.stat(ref), manager.copy(ref, **WHERE)):
                with pytest.raises(ObjectNotFoundError, match=f"written to the store {ref.identity}, and the backend 'files'"):
                    await read
            if name == "never used":
                await put(manager)


@pytest.mark.case("RA-03")
async def test_another_process_is_told_the_same_of_a_missing_object(tmp_path: Path) -> None:
    """An object that is gone from its own store is only not found."""
    async with manager_of(LocalStorageBackend(tmp_path)) as manager:
        ref = await put(manager)
        await manager.delete(ref)
        for wanted in (ref, ref.with_identity(None)):
            with pytest.raises(ObjectNotFoundError) as caught:
                await manager.get(wanted)
            assert "written to" not in str(caught.value)


@pytest.mark.case("RA-03")
async def test_objects_that_were_moved_are_at_home_once_a_person_says_so(tmp_path: Path) -> None:
    async with manager_of(LocalStorageBackend(tmp_path / "old")) as manager:
        old = await put(manager)
    async with manager_of(LocalStorageBackend(tmp_path / "new")) as manager:
        new = await put(manager)
        with (tmp_path / "new" / MARKER).open("a") as marker:
            marker.write(f"{old.identity}\n")
        with pytest.raises(ObjectNotFoundError) as caught:
            await manager.get(old)
        assert "written to" not in str(caught.value)
        assert (await put(manager)).identity == new.identity


@pytest.mark.parametrize("marker", ["absent", "empty", "torn", "of a person"])
async def test_processes_that_are_first_at_the_same_time_agree(tmp_path: Path, marker: str) -> None:
    content = {"empty": b"", "torn": b"0190b6", "of a person": b"# do not delete\n\n"}
    if marker in content:
        (tmp_path / MARKER).write_bytes(content[marker])
    backends = [LocalStorageBackend(tmp_path) for _ in range(8)]
    answers = await asyncio.gather(*(backend.identities(create=True) for backend in backends for _ in range(2)))
    assert len({answer[0] for answer in answers}) == 1
    assert (await backends[0].identities())[0] == answers[0][0]
    assert (tmp_path / MARKER).read_bytes().startswith(content.get(marker, b""))


async def test_a_marker_that_was_removed_is_written_again(tmp_path: Path) -> None:
    backend = LocalStorageBackend(tmp_path)
    await backend.put_bytes("a", b"a")
    (tmp_path / MARKER).unlink()
    assert await backend.identities() == ()
    assert await backend.identities(create=True)


async def test_another_disk_under_the_same_path_has_its_own(tmp_path: Path) -> None:
    backend = LocalStorageBackend(tmp_path / "disk")
    async with manager_of(LocalStorageBackend(tmp_path / "other")) as manager:
        other = await put(manager)
    manager = manager_of(backend)
    first = await put(manager)
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    (tmp_path / "other").rename(tmp_path / "disk")
    await put(manager)
    assert (await put(manager)).identity == other.identity != first.identity
    await manager.aclose()


async def test_an_upload_does_not_fail_where_the_store_keeps_no_identity(caplog: pytest.LogCaptureFixture) -> None:
    faults: Any = FaultInjectingBackend(MemoryStorageBackend())
    faults.fail("identities", times=2, error=AccessDeniedError("on purpose"))
    async with manager_of(faults) as manager:
        with caplog.at_level(logging.WARNING, "granite_storage"):
            refs = [await put(manager) for _ in range(3)]
    assert [ref.identity for ref in refs] == [None] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "the identity of the backend 'files' could not be written, so new refs do not record their store: on purpose"
    ]
    assert faults.count("identities") == 1


async def test_an_identity_that_is_out_of_reach_for_a_moment_is_asked_for_again() -> None:
    faults: Any = FaultInjectingBackend(MemoryStorageBackend())
    faults.fail("identities")
    async with manager_of(faults) as manager:
        assert (await put(manager)).identity is None
        assert (await put(manager)).identity is not None


async def test_first_writer_gives_a_bucket_its_identity(moto_server: S3Server, bucket: str) -> None:
    backends: list[SupportsIdentity] = [moto_server.backend(bucket, prefix="app") for _ in range(4)]
    options = moto_server.obstore_options()
    backends += [ObjectStoreBackend(f"s3://{bucket}/app", **options) for _ in range(2)]
    answers = await asyncio.gather(*(backend.identities(create=True) for backend in backends))
    # moto looks for the object first and stores it afterwards, so that the first answers may differ
    final = await backends[0].identities()
    assert {answer[0] for answer in answers} >= {final[0]}
    late, above = moto_server.backend(bucket, prefix="app"), moto_server.backend(bucket)
    assert (await late.identities(create=True))[0] == final[0]
    assert await above.identities() == ()
    for backend in (*backends, late, above):
        await backend.aclose()  # type: ignore[attr-defined]


@pytest.mark.case("RA-03")
async def test_second_writer_has_the_identity_of_the_first() -> None:
    """The marker is created between the check for it and the write, which does not replace it."""
    stored: list[bytes] = []

    async def read() -> bytes:
        if not stored:
            raise ObjectNotFoundError("there is no marker yet")
        return stored[0]

    async def write(_: bytes) -> None:
        stored.append(b"the-first-one\n")
        raise ObjectExistsError("another process was faster")

    marker = IdentityObject()
    for _ in range(2):
        assert await marker.identities(read, write, create=True) == ("the-first-one",)
    assert stored == [b"the-first-one\n"]


async def test_a_bucket_in_which_a_missing_object_is_forbidden(moto_server: S3Server, bucket: str) -> None:
    """S3 says so to those who may not list it."""
    with fault_proxy(moto_server.endpoint_url) as proxy:
        proxy.on("GetObject", answer(403, "AccessDenied"), times=1)
        backend = moto_server.backend(bucket, endpoint_url=proxy.url)
        made = await backend.identities(create=True)
        assert made
        direct = moto_server.backend(bucket)
        assert await direct.identities() == made
        await direct.aclose()
        await backend.aclose()


async def test_a_bucket_that_may_only_be_read(moto_server: S3Server, bucket: str) -> None:
    with fault_proxy(moto_server.endpoint_url) as proxy:
        proxy.on("PutObject", answer(403, "AccessDenied"), times=10)
        backend = moto_server.backend(bucket, endpoint_url=proxy.url)
        assert await backend.identities() == ()
        with pytest.raises(AccessDeniedError):
            await backend.identities(create=True)
        await backend.aclose()


async def test_a_prefix_is_a_store_of_its_own() -> None:
    memory = MemoryStorageBackend()
    seven, eight = PrefixedBackend(memory, "tenants/7"), PrefixedBackend(memory, "tenants/8")
    (identity,) = await memory.identities()
    assert isinstance(seven, SupportsIdentity)
    assert isinstance(eight, SupportsIdentity)
    assert await seven.identities(create=True) == (f"{identity}/tenants/7",)
    assert await seven.identities() != await eight.identities()


async def test_what_was_moved_below_a_prefix(tmp_path: Path) -> None:
    """As by a bucket whose backend had the prefix itself before."""
    (tmp_path / MARKER).write_text("this-store\nmoved-here//tenants/7\n")
    backend = LocalStorageBackend(tmp_path)
    for nested in (PrefixedBackend(backend, "tenants/7"), PrefixedBackend(PrefixedBackend(backend, "tenants"), "7")):
        assert isinstance(nested, SupportsIdentity)
        assert await nested.identities() == ("this-store/tenants/7", "moved-here")
    other = PrefixedBackend(backend, "tenants/70")
    assert isinstance(other, SupportsIdentity)
    assert "moved-here" not in await other.identities()
    await backend.aclose()


async def places_of(backend: Any) -> frozenset[Place]:
    try:
        places: frozenset[Place] = await backend.places()
        return places
    finally:
        await backend.aclose()


@pytest.mark.case("RA-01")
async def test_names_of_one_folder(tmp_path: Path) -> None:
    (tmp_path / "real/inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "other").mkdir()
    (tmp_path / "far/deep").mkdir(parents=True)
    (tmp_path / "to deep").symlink_to(tmp_path / "far/deep")
    (tmp_path / "far/real").symlink_to(tmp_path / "real")
    (tmp_path / "too early").symlink_to(tmp_path / "real/not/there/yet")
    real = await places_of(LocalStorageBackend(tmp_path / "real"))
    for same in ("link", "real/", "link/../link", "link/inside", "link/not/there/yet", ".", "to deep/../real", "too early"):
        assert overlap(real, await places_of(LocalStorageBackend(f"{tmp_path}/{same}"))), same
    for same in ("link", "real", "real/inside"):
        assert overlap(real, await places_of(ObjectStoreBackend(f"file://{tmp_path}/{same}"))), same
    for other in ("other", "really", "other/real"):
        assert not overlap(real, await places_of(LocalStorageBackend(tmp_path / other))), other
    assert not overlap(real, await places_of(ObjectStoreBackend(f"file://{tmp_path}/other")))
    inside = PrefixedBackend(LocalStorageBackend(tmp_path), "real/inside")
    assert overlap(real, await places_of(inside))
    assert not overlap(real, await places_of(PrefixedBackend(LocalStorageBackend(tmp_path), "other")))


async def test_a_folder_is_known_by_its_inode(tmp_path: Path) -> None:
    """As a bind mount has another path and the same inode."""
    before = await places_of(LocalStorageBackend(tmp_path / "root/below"))
    (tmp_path / "root").mkdir()
    real = await places_of(LocalStorageBackend(tmp_path / "root/below"))
    (tmp_path / "root").rename(tmp_path / "mounted elsewhere")
    moved = await places_of(LocalStorageBackend(tmp_path / "mounted elsewhere/below"))
    assert overlap(real, moved)
    assert not overlap(before, frozenset(place for place in moved if place.store == "disk"))


@pytest.mark.case("RA-01")
async def test_names_of_one_bucket(moto_server: S3Server) -> None:
    """Nothing is asked of a server, so none has to be there."""
    server, port = moto_server.endpoint_url.rpartition(":")[::2]
    spelled = {"host": server.partition("//")[2], "port": port}

    def s3(bucket: str = "b", endpoint: str | None = "http://{host}:{port}", **options: Any) -> Any:
        options["endpoint_url"] = None if endpoint is None else endpoint.format(**spelled)
        return moto_server.backend(bucket, **options)

    def obstore(path: str = "b", endpoint: str | None = "http://{host}:{port}") -> Any:
        options = moto_server.obstore_options()
        options["config"]["endpoint"] = None if endpoint is None else endpoint.format(**spelled)
        options["config"] = {key: value for key, value in options["config"].items() if value is not None}
        return ObjectStoreBackend(f"s3://{path}", **options)

    here = await places_of(s3())
    for same in (
        s3(endpoint="http://{host}:{port}/"),
        s3(endpoint="http://localhost:{port}"),
        s3(prefix="app/"),
        obstore(),
        obstore("b/app/uploads"),
        obstore(endpoint="http://LOCALHOST:{port}/"),
        PrefixedBackend(obstore(), "tenants/7"),
    ):
        assert overlap(here, await places_of(same)), same
    for other in (s3("b2"), s3(endpoint="http://elsewhere:{port}"), obstore("b2"), s3(endpoint=None), obstore(endpoint=None)):
        assert not overlap(here, await places_of(other)), other
    amazon = await places_of(s3(endpoint=None))
    assert overlap(amazon, await places_of(obstore(endpoint=None)))
    assert overlap(amazon, await places_of(s3(endpoint="https://s3.eu-central-1.amazonaws.com")))
    app, other_app = await places_of(s3(prefix="app")), await places_of(s3(prefix="app2"))
    assert not overlap(app, other_app)


async def test_names_of_other_stores() -> None:
    from obstore.store import AzureStore, GCSStore, HTTPStore, MemoryStore

    shared = MemoryStore()
    azure = {"account_name": "account", "account_key": "c2VjcmV0"}
    same: list[tuple[Any, Any]] = [
        (shared, shared),
        (HTTPStore("https://h.example/a"), HTTPStore("https://H.example:443/a/b")),
        (GCSStore("b"), GCSStore("b", prefix="x")),
        (AzureStore("c", config=azure), AzureStore("c", config=azure, prefix="x")),  # type: ignore[arg-type]
    ]
    for one, other in same:
        assert overlap(await places_of(ObjectStoreBackend(one)), await places_of(ObjectStoreBackend(other)))
    different = [shared, MemoryStore(), HTTPStore("https://h.example/c"), GCSStore("b2"), AzureStore("c", config=azure)]  # type: ignore[arg-type]
    found = [await places_of(ObjectStoreBackend(store)) for store in different]
    assert not any(overlap(one, other) for number, one in enumerate(found) for other in found[:number])
