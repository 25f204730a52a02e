"""The local disk: what lies where, with which permissions, and what no name or link can reach."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from granite_storage import BackendUnavailableError, ConfigurationError, ObjectNotFoundError, StoredObjectRef
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.exceptions import BackendError, InvalidLocationError, ObjectExistsError
from granite_storage.locations import RESERVED_PREFIX
from tests.core.support import PLACE, chunks_of, left_below, local_manager

MARKER = ".granite-storage"


@pytest.fixture(params=[True, False], ids=["fsync", "no-fsync"])
def local(request: pytest.FixtureRequest, tmp_path: Path) -> LocalStorageBackend:
    return LocalStorageBackend(tmp_path / "root", fsync=request.param)


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


async def listed(backend: LocalStorageBackend, prefix: str = "", start_after: str | None = None) -> list[str]:
    return [info.location async for info in backend.iter_objects(prefix, start_after=start_after)]


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_an_object_is_one_file_at_its_location(local: LocalStorageBackend) -> None:
    await local.put_bytes("doc/1/file/a.txt", b"content")
    assert (local.root_dir / "doc/1/file/a.txt").read_bytes() == b"content"
    assert left_below(local.root_dir) == ["doc", "doc/1", "doc/1/file", "doc/1/file/a.txt"]
    assert (local.root_dir / MARKER).is_file()
    assert await local.is_mounted()


async def test_a_root_that_was_never_written_to_has_no_marker(tmp_path: Path) -> None:
    backend = LocalStorageBackend(tmp_path)
    assert not await backend.exists("a/b")
    assert await listed(backend) == []
    assert not await backend.is_mounted()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.case("DSK-08")
@pytest.mark.parametrize("umask", [0o000, 0o077], indirect=True)
@pytest.mark.parametrize("fsync", [True, False])
async def test_modes_do_not_depend_on_the_umask(umask: int, fsync: bool, tmp_path: Path) -> None:
    backend = LocalStorageBackend(tmp_path / "root", fsync=fsync)
    await backend.put_bytes("a/b/c", b"1")
    await backend.put_stream("a/b/d", chunks_of(b"1" * (1 << 20), b"2"))
    await backend.copy("a/b/c", "a/x/e")
    assert {mode_of(tmp_path / "root" / name) for name in ("a/b/c", "a/b/d", "a/x/e")} == {0o640}
    assert {mode_of(tmp_path / "root" / name) for name in ("", "a", "a/b", "a/x")} == {0o750}


@pytest.mark.case("DSK-08")
async def test_modes_can_be_chosen(tmp_path: Path) -> None:
    backend = LocalStorageBackend(tmp_path / "root", file_mode=0o600, dir_mode=0o700)
    await backend.put_bytes("a/b", b"1")
    assert mode_of(tmp_path / "root/a/b") == 0o600
    assert mode_of(tmp_path / "root/a") == 0o700


async def test_a_set_group_id_bit_is_inherited(local: LocalStorageBackend) -> None:
    local.root_dir.mkdir()
    local.root_dir.chmod(0o2770)
    await local.put_bytes("a/b/c", b"1")
    assert mode_of(local.root_dir / "a") == mode_of(local.root_dir / "a/b") == 0o2750
    assert mode_of(local.root_dir) == 0o2770


@pytest.mark.parametrize(
    "arguments",
    [{"root_dir": ""}, {"file_mode": 0o200}, {"dir_mode": 0o600}, {"file_mode": 0o1640}, {"dir_mode": -1}, {"max_threads": 0}],
)
def test_a_configuration_that_cannot_work_is_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        LocalStorageBackend(**{"root_dir": "uploads", **arguments})  # type: ignore[arg-type]


HOSTILE = [
    "../x",
    "/etc/shadow",
    "file:///x",
    "\\\\host\\share",
    "a/../b",
    "a//b",
    "a/",
    "./a",
    "",
    "a/\x00",
    "a\\b",
    "a/.",
    "..",
]


@pytest.mark.case("LOC-19")
@pytest.mark.parametrize("location", [*HOSTILE, f"a/{RESERVED_PREFIX}x.tmp", MARKER])
async def test_an_unsafe_location_is_refused_before_the_disk_is_touched(location: str, tmp_path: Path) -> None:
    backend = LocalStorageBackend(tmp_path / "root")
    calls = [
        lambda: backend.put_bytes(location, b"1"),
        lambda: backend.put_stream(location, chunks_of(b"1")),
        lambda: backend.open(location),
        lambda: backend.stat(location),
        lambda: backend.exists(location),
        lambda: backend.delete(location),
        lambda: backend.copy(location, "b"),
        lambda: backend.copy("b", location),
    ]
    for call in calls:
        with pytest.raises(InvalidLocationError):
            await call()
    assert not (tmp_path / "root").exists()


@pytest.mark.case("LOC-15")
async def test_a_sibling_whose_name_begins_alike_is_out_of_reach(tmp_path: Path) -> None:
    (tmp_path / "media-private").mkdir()
    (tmp_path / "media-private/x").write_bytes(b"secret")
    manager = local_manager(tmp_path / "media")
    async with manager:
        ref = StoredObjectRef("files", "store", "../media-private/x", 6, "")
        for call in (manager.get, manager.exists, manager.delete, manager.stat):
            with pytest.raises(InvalidLocationError):
                await call(ref)
        with pytest.raises(InvalidLocationError):
            await manager.copy(ref, **PLACE)
    assert (tmp_path / "media-private/x").read_bytes() == b"secret"


@pytest.mark.case("LOC-19")
@pytest.mark.parametrize("level", ["folder", "file"])
async def test_a_link_below_the_root_is_never_followed(level: str, local: LocalStorageBackend, tmp_path: Path) -> None:
    await local.put_bytes("a/kept", b"kept")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_bytes(b"secret")
    if level == "folder":
        (local.root_dir / "a/link").symlink_to(outside)
        location = "a/link/x"
    else:
        (local.root_dir / "a/link").symlink_to(outside / "x")
        location = "a/link"
    for reading in (local.open, local.stat):
        with pytest.raises(ObjectNotFoundError):
            await reading(location)
    assert not await local.exists(location)
    await local.delete(location)
    assert await listed(local) == ["a/kept"]
    with pytest.raises(BackendError):
        await local.put_bytes(location, b"overwritten")
    with pytest.raises(BackendError):
        await local.put_stream(location, chunks_of(b"1" * (1 << 20), b"overwritten"))
    assert (outside / "x").read_bytes() == b"secret"
    assert [path.name for path in outside.iterdir()] == ["x"]
    assert (local.root_dir / "a/link").is_symlink()


async def test_only_regular_files_are_objects(local: LocalStorageBackend) -> None:
    await local.put_bytes("a/b", b"1")
    os.mkfifo(local.root_dir / "a/fifo")
    for location in ("a/fifo", "a"):
        with pytest.raises(ObjectNotFoundError):
            await asyncio.wait_for(local.open(location), 60)
        with pytest.raises(ObjectNotFoundError):
            await local.stat(location)
        await local.delete(location)
        assert not await local.exists(location)
    assert (local.root_dir / "a/fifo").exists()
    assert await listed(local) == ["a/b"]


async def test_an_object_in_the_place_of_a_folder_refuses_the_write(local: LocalStorageBackend) -> None:
    await local.put_bytes("a/b", b"1")
    with pytest.raises(BackendError):
        await local.put_bytes("a/b/c", b"2")
    with pytest.raises(ObjectExistsError):
        await local.put_bytes("a", b"2")
    assert left_below(local.root_dir) == ["a", "a/b"]


async def test_one_of_many_writers_of_a_location_wins(local: LocalStorageBackend) -> None:
    contents = [str(number).encode() * 10 for number in range(24)]
    results = await asyncio.gather(*(local.put_bytes("a/b", content) for content in contents), return_exceptions=True)
    winners = [content for content, result in zip(contents, results, strict=True) if result is None]
    assert len(winners) == 1
    assert [type(result) for result in results if result is not None] == [ObjectExistsError] * 23
    assert (local.root_dir / "a/b").read_bytes() == winners[0]
    assert left_below(local.root_dir) == ["a", "a/b"]


async def test_folders_are_pruned_as_far_as_they_are_empty(local: LocalStorageBackend) -> None:
    await local.put_bytes("a/b/c/d", b"1")
    await local.put_bytes("a/x", b"1")
    await local.delete("a/b/c/d")
    assert left_below(local.root_dir) == ["a", "a/x"]
    await local.delete("a/x")
    assert left_below(local.root_dir) == []
    assert local.root_dir.is_dir()
    assert await local.is_mounted()


async def test_pruning_never_takes_a_writers_folder(local: LocalStorageBackend) -> None:
    """Writers and deleters of the same folders, side by side: every write that returned is there until it is deleted."""
    stop = time.monotonic() + 1.5

    async def churn(worker: int) -> int:
        rounds = 0
        while time.monotonic() < stop:
            location = f"a/b/{worker % 3}/{worker}-{rounds}"
            content = location.encode()
            if worker % 2:
                await local.put_bytes(location, content)
            else:
                await local.put_stream(location, chunks_of(content * 40_000, content))
                content = content * 40_000 + content
            reader = await local.open(location)
            assert reader.info.size == len(content)
            await reader.aclose()
            await local.delete(location)
            rounds += 1
        return rounds

    rounds = await asyncio.gather(*(churn(worker) for worker in range(8)))
    assert min(rounds) > 0
    assert left_below(local.root_dir) == []


@pytest.mark.case("GCX-10")
async def test_stale_temporary_files_are_swept_and_others_stay(local: LocalStorageBackend) -> None:
    await local.put_bytes("a/b/kept", b"1")
    old, new = (local.root_dir / f"a/b/{RESERVED_PREFIX}{name}.tmp" for name in ("00ff", "11ee"))
    lonely = local.root_dir / f"lonely/{RESERVED_PREFIX}22dd.tmp"
    lonely.parent.mkdir()
    for path in (old, new, lonely):
        path.write_bytes(b"half")
    two_days_ago = time.time() - 2 * 86400
    for path in (old, lonely, local.root_dir / "a/b/kept"):
        os.utime(path, (two_days_ago, two_days_ago))
    assert await listed(local) == ["a/b/kept"]
    assert await local.cleanup_incomplete(older_than=timedelta(days=1)) == 2
    assert left_below(local.root_dir) == ["a", "a/b", f"a/b/{new.name}", "a/b/kept"]
    assert await local.cleanup_incomplete(older_than=timedelta(0)) == 1
    assert (local.root_dir / MARKER).exists()


NAMES = st.text(st.sampled_from("abt-/.é\U0001f600z0~"), min_size=1, max_size=8).filter(
    lambda name: all(part not in {"", ".", ".."} for part in name.split("/"))
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(NAMES, max_size=12), prefix=st.sampled_from(["", "a", "a/", "t", "t-", "é"]), after=st.none() | NAMES)
def test_the_listing_is_in_the_byte_order_of_utf8(
    tmp_path_factory: pytest.TempPathFactory, names: set[str], prefix: str, after: str | None
) -> None:
    root = tmp_path_factory.mktemp("listing")

    async def check() -> None:
        backend = LocalStorageBackend(root, fsync=False)
        stored = []
        for name in names:
            try:
                await backend.put_bytes(name, b"1")
            except BackendError:
                continue
            stored.append(name)
        wanted = sorted(name for name in stored if name.startswith(prefix) and (after is None or name.encode() > after.encode()))
        wanted.sort(key=str.encode)
        assert await listed(backend, prefix, after) == wanted

    asyncio.run(check())


async def test_names_that_cannot_be_locations_are_passed_over(local: LocalStorageBackend) -> None:
    await local.put_bytes("a/b", b"1")
    for name in (b"bad\xff", b"with\nnewline", b"back\\slash"):
        (local.root_dir / "a" / os.fsdecode(name)).write_bytes(b"foreign")
    assert await listed(local) == ["a/b"]


async def test_a_file_that_vanishes_during_a_listing_is_passed_over(local: LocalStorageBackend) -> None:
    for number in range(1500):
        (local.root_dir / f"a/{number // 100:02}").mkdir(parents=True, exist_ok=True)
        (local.root_dir / f"a/{number // 100:02}/{number:04}").write_bytes(b"")
    seen = []
    async for info in local.iter_objects():
        seen.append(info.location)
        if len(seen) == 1:
            for number in range(1100, 1500):
                (local.root_dir / f"a/{number // 100:02}/{number:04}").unlink()
    assert seen[:1000] == [f"a/{number // 100:02}/{number:04}" for number in range(1000)]
    assert len(seen) == 1100


async def test_a_copy_shares_nothing_with_its_source(local: LocalStorageBackend) -> None:
    content = os.urandom(9 << 20)
    await local.put_bytes("a/source", content)
    await local.copy("a/source", "b/target")
    assert (local.root_dir / "a/source").stat().st_ino != (local.root_dir / "b/target").stat().st_ino
    await local.delete("a/source")
    assert (local.root_dir / "b/target").read_bytes() == content


async def test_the_root_may_be_a_link_that_the_operator_made(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "disk")
    backend = LocalStorageBackend(tmp_path / "root")
    await backend.put_bytes("a/b", b"1")
    assert (tmp_path / "disk/a/b").read_bytes() == b"1"


@pytest.mark.case("DSK-13")
async def test_a_root_that_was_removed_and_made_again_is_not_taken_for_the_same(local: LocalStorageBackend) -> None:
    await local.put_bytes("a/b", b"1")
    local.root_dir.rename(local.root_dir.with_name("elsewhere"))
    for call in (lambda: local.put_bytes("a/c", b"1"), lambda: local.stat("a/b"), lambda: local.exists("a/b")):
        with pytest.raises(BackendUnavailableError, match="mounted"):
            await call()
    local.root_dir.mkdir()
    for call in (lambda: local.put_bytes("a/c", b"1"), lambda: local.stat("a/b"), lambda: local.exists("a/b")):
        with pytest.raises(BackendUnavailableError, match="mounted"):
            await call()
    assert list(local.root_dir.iterdir()) == []


async def test_the_first_writes_of_a_root_may_come_at_once(tmp_path: Path) -> None:
    for attempt in range(30):
        backend = LocalStorageBackend(tmp_path / str(attempt), fsync=False)
        await asyncio.gather(*(backend.put_bytes(f"a/{number}", b"1") for number in range(12)))
        assert len(await listed(backend)) == 12
