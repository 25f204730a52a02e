"""A disk that is full, slow, read-only or gone, and a process that is killed or loses its power."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from granite_storage import BackendUnavailableError
from granite_storage.backends import _local_tree
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.exceptions import AccessDeniedError, BackendError, StorageFullError
from granite_storage.locations import RESERVED_PREFIX
from tests.core.support import (
    PROJECT,
    SLOT,
    Lag,
    chunks_of,
    eventually,
    files_below,
    in_new_process,
    left_below,
    local_manager,
    many,
)

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; where the test may not mount one, a limit on the size of files does the same."""
    mount = tmp_path / "mount"
    mount.mkdir()
    mounted = subprocess.run(
        [str(shutil.which("mount")), "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)], capture_output=True, check=False
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if mounted.returncode:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
    yield mount
    if mounted.returncode:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    else:
        subprocess.run([str(shutil.which("umount")), "-l", str(mount)], check=True)


@pytest.mark.case("DSK-01")
@pytest.mark.parametrize("fsync", [True, False])
async def test_a_full_disk_leaves_nothing_and_the_next_small_upload_works(small_disk: Path, fsync: bool) -> None:
    backend = LocalStorageBackend(small_disk / "root", fsync=fsync)
    with pytest.raises(StorageFullError) as raised:
        await backend.put_stream("a/b/large", many(os.urandom(256 * 1024), 12))
    assert raised.value.location == "a/b/large"
    with pytest.raises(StorageFullError):
        await backend.put_bytes("a/b/large", bytes(3 * MIB))
    assert files_below(small_disk / "root") == []
    await backend.put_bytes("a/b/small", b"1" * 1000)
    assert files_below(small_disk / "root") == ["a/b/small"]


KILLED = """
import asyncio, os, signal, sys
from granite_storage.backends import _local_tree
from granite_storage.backends.local import LocalStorageBackend

root, fsync, fatal = sys.argv[1], sys.argv[2] == "True", int(sys.argv[3])
count = 0

def dying(name):
    original = getattr(os, name)
    def call(*arguments, **options):
        global count
        count += 1
        if count == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    return call

async def main():
    backend = LocalStorageBackend(root, fsync=fsync)
    await backend.put_bytes("a/first", b"first")
    for name in ("open", "write", "fchmod", "fsync", "link", "unlink", "mkdir", "close"):
        setattr(_local_tree.os, name, dying(name))
    await backend.put_bytes("a/b/second", b"second" * 1000)
    print("stored", flush=True)
    os._exit(0)

asyncio.run(main())
"""


@pytest.mark.case("DSK-03")
@pytest.mark.parametrize("fsync", [True, False])
def test_a_kill_before_any_system_call_leaves_all_or_nothing(fsync: bool, tmp_path: Path) -> None:
    """The process is killed before its first, second, third, ... call until it gets through."""
    for fatal in itertools.count(1):
        root = tmp_path / str(fatal)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(root), str(fsync), str(fatal)],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=False,
        )
        asyncio.run(_check_after_kill(root, finished=done.stdout == "stored\n"))
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert fatal > 8


async def _check_after_kill(root: Path, *, finished: bool) -> None:
    backend = LocalStorageBackend(root)
    found = [info.location async for info in backend.iter_objects()]
    assert found in (["a/b/second", "a/first"], ["a/first"])
    assert (root / "a/first").read_bytes() == b"first"
    if "a/b/second" in found:
        assert (root / "a/b/second").read_bytes() == b"second" * 1000
    else:
        assert not finished
    for path in root.rglob(f"{RESERVED_PREFIX}*.tmp"):
        os.utime(path, (0, 0))
    await backend.cleanup_incomplete(older_than=timedelta(days=1))
    assert files_below(root) == sorted(found)


RECORDED = """
import asyncio, json, os, sys
from granite_storage.backends import _local_tree
from granite_storage.backends.local import LocalStorageBackend

effects, names = [], {}

def name_of(descriptor):
    return os.readlink(f"/proc/self/fd/{descriptor}")

def recording(name, note):
    original = getattr(os, name)
    def call(*arguments, **options):
        result = original(*arguments, **options)
        effects.append(note(arguments, options))
        return result
    return call

async def main():
    root = sys.argv[1]
    backend = LocalStorageBackend(root)
    _local_tree.os.mkdir = recording("mkdir", lambda a, o: ["entry", name_of(o["dir_fd"]), a[0]])
    _local_tree.os.link = recording("link", lambda a, o: ["entry", name_of(o["dst_dir_fd"]), a[1]])
    _local_tree.os.write = recording("write", lambda a, o: ["data", name_of(a[0])])
    _local_tree.os.fsync = recording("fsync", lambda a, o: ["fsync", name_of(a[0])])
    for location in sys.argv[2:]:
        await backend.put_bytes(location, b"content")
        effects.append(["returned", location])
    print(json.dumps(effects))

asyncio.run(main())
"""


@pytest.mark.case("DSK-04")
def test_nothing_that_a_power_loss_can_take_is_left_when_a_write_returns(tmp_path: Path) -> None:
    """Whatever subset of the effects that were not synchronised reaches the disk, a returned location resolves to its bytes."""
    root = tmp_path / "root"
    root.mkdir()
    locations = ["d1/d2/first", "d1/d2/second", "d1/d3/third"]
    effects = json.loads(in_new_process(RECORDED, root, *locations))
    volatile: set[tuple[str, str]] = set()
    safe: set[tuple[str, str]] = set()
    returned: list[str] = []
    images = 0
    for effect in effects:
        match effect:
            case ["entry", folder, name]:
                volatile.add((folder, name))
            case ["data", file]:
                volatile.add((file, "bytes"))
            case ["fsync", path]:
                synchronised = {item for item in volatile if item[0] == path}
                safe |= synchronised
                volatile -= synchronised
            case ["returned", location]:
                returned.append(location)
        for size in range(len(volatile) + 1):
            for lucky in itertools.combinations(sorted(volatile), size):
                images += 1
                for location in returned:
                    assert _resolves(str(root), location, safe | set(lucky)), (location, effect)
    assert returned == locations
    assert images > 20
    assert {path for kind, path in ((e[0], e[1]) for e in effects) if kind == "fsync"} >= {
        str(root),
        f"{root}/d1",
        f"{root}/d1/d2",
    }


def _resolves(root: str, location: str, durable: set[tuple[str, str]]) -> bool:
    folder = root
    for segment in location.split("/"):
        if (folder, segment) not in durable:
            return False
        folder = f"{folder}/{segment}"
    # The bytes were synchronised under the temporary name, beside the target.
    parent = os.path.dirname(folder)
    return any(os.path.dirname(file) == parent and what == "bytes" for file, what in durable)


@pytest.mark.case("DSK-05")
async def test_the_temporary_file_lies_beside_its_target(tmp_path: Path) -> None:
    """So it is on the same file system, and publishing can never become a copy."""
    backend = LocalStorageBackend(tmp_path / "root")
    seen: list[list[str]] = []

    async def watching() -> AsyncIterator[bytes]:
        yield b"1" * MIB
        yield b"2" * MIB
        seen.append(await asyncio.to_thread(left_below, tmp_path / "root"))
        yield b"3"

    await backend.put_stream("a/b/c", watching())
    names = [name for name in seen[0] if name.endswith(".tmp")]
    assert len(names) == 1
    assert os.path.dirname(names[0]) == "a/b"


CROWDED = """
import asyncio, os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from granite_storage import BackendUnavailableError
from granite_storage.backends.local import LocalStorageBackend

async def slow(content):
    yield content
    await asyncio.sleep(0.01)
    yield content

async def main():
    backend = LocalStorageBackend(sys.argv[1], fsync=False)
    await backend.put_bytes("a/warm", b"1")
    before = len(os.listdir("/proc/self/fd"))
    results = await asyncio.gather(
        *(backend.put_stream(f"a/{n % 5}/{n}", slow(b"1" * 1048576)) for n in range(200)), return_exceptions=True
    )
    assert {type(r) for r in results} <= {type(None), BackendUnavailableError}, results
    stored = sum(r is None for r in results)
    found = len([1 async for _ in backend.iter_objects("a/")])
    assert found == stored + 1 >= 2, (found, stored)
    assert len(os.listdir("/proc/self/fd")) == before
    names = [name for _, _, files in os.walk(sys.argv[1]) for name in files if name.endswith(".tmp")]
    assert names == []

asyncio.run(main())
"""


@pytest.mark.case("DSK-07")
def test_too_many_open_files_is_a_clear_error_and_leaks_none(tmp_path: Path) -> None:
    in_new_process(CROWDED, tmp_path / "root")


@pytest.mark.case("DSK-12")
async def test_a_slow_disk_blocks_neither_the_loop_nor_other_users_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's own write is held: it stands in for a disk that takes its time, as long as the test likes.

    While all threads of the backend are stuck in it, the loop turns and others' work in threads is done; else nothing would
    ever release the writes, and they would fail.
    """
    backend = LocalStorageBackend(tmp_path / "root", fsync=False, max_threads=8)
    write, stuck, released = os.write, threading.Semaphore(0), threading.Event()

    def slow_write(descriptor: int, data: bytes) -> int:
        stuck.release()
        if not released.wait(60):
            raise OSError(errno.EIO, "what would have released it was kept from running")
        return write(descriptor, data)

    await backend.put_bytes("a/warm", b"1")
    monkeypatch.setattr(f"{_local_tree.__name__}.os.write", slow_write)
    uploads = asyncio.gather(*(backend.put_bytes(f"a/{number}", b"1") for number in range(20)))
    for _ in range(8):
        await eventually(lambda: stuck.acquire(blocking=False))
    async with Lag() as lag:
        assert await asyncio.gather(*(asyncio.to_thread(int, "7") for _ in range(20))) == [7] * 20
        await eventually(lambda: lag.turns > 3)
    assert not uploads.done()
    released.set()
    await uploads


UNPRIVILEGED = """
import asyncio, os, sys, traceback
from granite_storage.exceptions import AccessDeniedError
from granite_storage.backends.local import LocalStorageBackend

async def main():
    warm = LocalStorageBackend(sys.argv[1] + "/warm")
    await warm.put_bytes("a/b", b"1")
    [_ async for _ in warm.iter_objects()]
    if os.getuid() == 0:  # only now: the interpreter may lie where nobody else can read it
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
    backend = LocalStorageBackend(sys.argv[1])
    for call in (
        lambda: backend.put_bytes("closed/x", b"1"), lambda: backend.open("closed/y"), lambda: backend.exists("closed/y"),
        lambda: backend.stat("closed/y"), lambda: backend.delete("closed/y"),
    ):
        try:
            await call()
        except AccessDeniedError as error:
            assert isinstance(error.__cause__, PermissionError)
        else:
            raise AssertionError("no error")
    try:
        [_ async for _ in backend.iter_objects()]
    except AccessDeniedError:
        print("refused")

asyncio.run(main())
"""


@pytest.mark.case("DSK-13")
def test_a_refused_permission_is_never_not_found(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "closed").mkdir(parents=True)
    (root / "closed/y").write_bytes(b"1")
    (root / "closed").chmod(0)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    root.chmod(0o777)
    try:
        assert in_new_process(UNPRIVILEGED, root) == "refused\n"
    finally:
        (root / "closed").chmod(0o700)


@pytest.mark.case("DSK-13")
async def test_a_root_that_is_missing_or_not_mounted_is_a_clear_error(tmp_path: Path) -> None:
    mounted = LocalStorageBackend(tmp_path / "missing", create_root=False)
    (tmp_path / "empty").mkdir()
    for backend in (mounted, LocalStorageBackend(tmp_path / "empty", create_root=False)):
        with pytest.raises(BackendUnavailableError, match="root directory"):
            await backend.put_bytes("a/b", b"1")
    assert not (tmp_path / "missing").exists()
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.case("DSK-13")
async def test_a_root_that_is_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"")
    with pytest.raises(BackendUnavailableError, match="not a directory"):
        await LocalStorageBackend(tmp_path / "root").put_bytes("a/b", b"1")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EROFS, AccessDeniedError),
        (errno.EDQUOT, StorageFullError),
        (errno.EIO, BackendError),
        (errno.ESTALE, BackendUnavailableError),
    ],
)
@pytest.mark.parametrize("step", ["open", "write", "fchmod", "fsync", "link", "unlink"])
@pytest.mark.case("DSK-13")
async def test_an_error_of_any_step_is_the_librarys_and_leaves_nothing(
    code: int, kind: type[BackendError], step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each system call of a write fails in turn, once, as a failing disk would have it."""
    manager = local_manager(tmp_path / "root")
    backend = LocalStorageBackend(tmp_path / "root")
    await backend.put_bytes("a/b/kept", b"1")
    original, failed = getattr(os, step), False

    def failing(*arguments: object, **options: object) -> object:
        nonlocal failed
        target = str(arguments[0])
        if not failed and (step != "open" or target.endswith(".tmp")):
            failed = True
            raise OSError(code, os.strerror(code))
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(f"granite_storage.backends._local_tree.os.{step}", failing)
        with pytest.raises(kind) as raised:
            await backend.put_bytes("a/b/new", b"2")
    assert failed
    assert isinstance(raised.value.__cause__, OSError)
    assert not isinstance(raised.value, OSError)
    assert files_below(tmp_path / "root") == ["a/b/kept"]
    async with manager:
        ref = await manager.put_bytes(**SLOT, content=b"works again")
        assert await manager.get(ref) == b"works again"


async def test_a_source_that_fails_on_its_own_account_is_not_taken_for_the_disk(tmp_path: Path) -> None:
    backend = LocalStorageBackend(tmp_path / "root", fsync=False)
    trouble = OSError(errno.ENOSPC, "of the source")
    with pytest.raises(OSError, match="of the source") as raised:
        await backend.put_stream("a/b", chunks_of(b"1" * MIB, b"2" * MIB, then=trouble))
    assert raised.value is trouble
    assert left_below(tmp_path / "root") == []
