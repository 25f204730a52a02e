"""Volumes that lack what a disk of Linux has: hard links, exclusive renames, permissions, directories that can be synchronised.

The system calls answer here as they do on such volumes; exFAT through FUSE and a mount of bindfs were tried by hand.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from granite_storage import BackendUnavailableError, ConfigurationError
from granite_storage.backends import _local_tree
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.exceptions import AccessDeniedError, BackendError, ObjectExistsError, StorageFullError
from granite_storage.locations import RESERVED_PREFIX
from tests.core.support import PROJECT, files_below, many

pytestmark = pytest.mark.case("RB-09")

Refuse = Callable[..., None]


def failing(code: int) -> Callable[..., Any]:
    def call(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


def unknown_flag(*_: object) -> int:
    ctypes.set_errno(errno.EINVAL)
    return -1


@pytest.fixture(params=["EPERM", "EOPNOTSUPP", "ENOSYS", "EINVAL"])
def without_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume without hard links: exFAT and s3fs say EPERM, other FUSE mounts the other three."""
    monkeypatch.setattr(os, "link", failing(getattr(errno, request.param)))


@pytest.fixture
def without_exclusive_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that renames only over what is there, too, as every FUSE mount with libfuse 2 does."""
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    monkeypatch.setattr(_local_tree, "_renameat2", lambda: unknown_flag)


@pytest.fixture
def without_permissions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fchmod", failing(errno.EPERM))
    monkeypatch.setattr(os, "chmod", failing(errno.EPERM))


async def require_exclusive_writes(backend: LocalStorageBackend) -> None:
    """Write whole and in pieces, race for one location, and see that the loser's bytes are nowhere."""
    root = backend.root_dir
    await backend.put_bytes("a/b/small", b"small")
    await backend.put_stream("a/b/large", many(os.urandom(256 * 1024), 8))
    await backend.copy("a/b/large", "c/copy")
    for location in ("a/b/small", "a/b/large", "c/copy"):
        before = (root / location).read_bytes()
        with pytest.raises(ObjectExistsError):
            await backend.put_bytes(location, b"other")
        with pytest.raises(ObjectExistsError):
            await backend.put_stream(location, many(b"other" * 1000, 3))
        assert (root / location).read_bytes() == before

    async def write(number: int) -> bool:
        try:
            await backend.put_bytes("race/one", bytes([number]) * 1000)
        except ObjectExistsError:
            return False
        return True

    won = await asyncio.gather(*(write(number) for number in range(12)))
    assert won.count(True) == 1
    assert (root / "race/one").read_bytes() == bytes([won.index(True)]) * 1000
    assert files_below(root) == ["a/b/large", "a/b/small", "c/copy", "race/one"]
    await backend.aclose()


@pytest.mark.parametrize("fsync", [True, False])
async def test_a_volume_without_links_is_written_to_exclusively(without_links: None, fsync: bool, tmp_path: Path) -> None:
    await require_exclusive_writes(LocalStorageBackend(tmp_path, fsync=fsync))


@pytest.mark.parametrize("fsync", [True, False])
async def test_a_volume_without_any_exclusive_name_is_written_to_exclusively(
    without_exclusive_names: None, fsync: bool, tmp_path: Path
) -> None:
    await require_exclusive_writes(LocalStorageBackend(tmp_path, fsync=fsync))


async def test_a_file_that_cannot_be_linked_keeps_its_bytes_and_mode(without_links: None, tmp_path: Path) -> None:
    backend = LocalStorageBackend(tmp_path, fsync=False, file_mode=0o604)
    content = os.urandom(3_000_000)
    await backend.put_bytes("a/first", content)
    assert (tmp_path / "a/first").read_bytes() == content
    assert stat.S_IMODE((tmp_path / "a/first").stat().st_mode) == 0o604
    await backend.aclose()


class Opened:
    """What was opened below a root to be written, by name; the calls for a file without a name may be made to fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int | None = None) -> None:
        self.unnamed = self.named = 0
        os_open = os.open

        def opening(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                self.unnamed += 1
                if code is not None:
                    raise OSError(code, os.strerror(code))
            self.named += str(path).endswith(_local_tree.TEMPORARY_SUFFIX)
            return os_open(path, flags, mode, dir_fd=dir_fd)

        monkeypatch.setattr(os, "open", opening)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has files without a name")
class TestFilesWithoutAName:
    """Where a write does not wait for the disk, a small object is made without a temporary name."""

    async def test_a_volume_that_has_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = LocalStorageBackend(tmp_path, fsync=False, file_mode=0o604)
        await backend.put_bytes("a/first", b"1")
        opened = Opened(monkeypatch)
        await backend.put_bytes("a/second", b"22")
        assert (opened.unnamed, opened.named) == (1, 0)
        assert (tmp_path / "a/second").read_bytes() == b"22"
        assert stat.S_IMODE((tmp_path / "a/second").stat().st_mode) == 0o604
        with pytest.raises(ObjectExistsError):
            await backend.put_bytes("a/second", b"3")
        assert (tmp_path / "a/second").read_bytes() == b"22"
        await backend.aclose()

    @pytest.mark.parametrize("code", ["EOPNOTSUPP", "EISDIR", "EINVAL"])
    async def test_a_volume_that_has_none_is_asked_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
        opened = Opened(monkeypatch, getattr(errno, code))
        await require_exclusive_writes(LocalStorageBackend(tmp_path, fsync=False))
        assert opened.unnamed == 1

    async def test_a_refusal_of_one_file_is_the_named_file_s(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        opened = Opened(monkeypatch, errno.EACCES)  # ext4 says so of a directory that was removed
        backend = LocalStorageBackend(tmp_path, fsync=False)
        for name in ("a", "b"):
            await backend.put_bytes(name, b"1")
        assert opened.unnamed == 2
        assert files_below(tmp_path) == ["a", "b"]
        await backend.aclose()

    async def test_a_directory_that_is_pruned_before_the_file_has_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = LocalStorageBackend(tmp_path, fsync=False)
        os_link = os.link

        def linking(*args: Any, **options: Any) -> None:
            monkeypatch.setattr(os, "link", os_link)
            backend._tree.prune(["a", "b"])
            assert not (tmp_path / "a").exists()
            os_link(*args, **options)

        monkeypatch.setattr(os, "link", linking)
        await backend.put_bytes("a/b/one", b"1")
        assert (tmp_path / "a/b/one").read_bytes() == b"1"
        assert backend._tree.unnamed, "a directory that was pruned says nothing of the volume"
        assert files_below(tmp_path) == ["a/b/one"]
        await backend.aclose()

    async def test_a_full_disk_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = LocalStorageBackend(tmp_path, fsync=False)
        await backend.put_bytes("first", b"1")
        monkeypatch.setattr(os, "write", failing(errno.ENOSPC))
        with pytest.raises(StorageFullError):
            await backend.put_bytes("a/b", b"2")
        monkeypatch.undo()
        assert files_below(tmp_path) == ["first"]
        assert not (tmp_path / "a").exists()
        await backend.aclose()


RACE = """
import asyncio, errno, os, sys
from granite_storage.exceptions import ObjectExistsError
from granite_storage.backends import _local_tree
from granite_storage.backends.local import LocalStorageBackend

def refuse(*_, **__):
    raise PermissionError(errno.EPERM, "no links")

os.link = refuse
_local_tree._renameat2 = lambda: None

async def main():
    backend = LocalStorageBackend(sys.argv[1], fsync=False)
    print("ready", flush=True)
    sys.stdin.readline()
    won = []
    for number in range(200):
        try:
            await backend.put_bytes(f"race/{number}", sys.argv[2].encode() * 500)
        except ObjectExistsError:
            continue
        won.append(number)
    print(*won, flush=True)
    await backend.aclose()

asyncio.run(main())
"""


def test_processes_that_claim_one_name_never_both_have_it(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path), letter],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for letter in "xy"
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    first, second = ([int(number) for number in writer.communicate()[0].split()] for writer in writers)
    assert sorted(first + second) == list(range(200))
    for letter, won in (("x", first), ("y", second)):
        for number in won:
            assert (tmp_path / f"race/{number}").read_text() == letter * 500


async def test_a_claim_that_a_crash_left_refuses_its_name_until_it_is_swept(
    without_exclusive_names: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_local_tree, "_CLAIM_ATTEMPTS", 3)
    monkeypatch.setattr(os, "unlink", lambda path, **options: None)  # as for a process that is killed before it removes the claim
    backend = LocalStorageBackend(tmp_path)
    await backend.put_bytes("a/one", b"1")
    monkeypatch.undo()
    (claim,) = (tmp_path / "a").glob(f"{RESERVED_PREFIX}*.tmp")
    os.unlink(tmp_path / "a/one")
    os.utime(claim, (0, 0))

    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    monkeypatch.setattr(_local_tree, "_renameat2", lambda: None)
    monkeypatch.setattr(_local_tree, "_CLAIM_ATTEMPTS", 3)
    with pytest.raises(BackendUnavailableError, match="cleanup_incomplete") as raised:
        await backend.put_bytes("a/one", b"2")
    assert raised.value.location == "a/one"
    assert await backend.cleanup_incomplete(older_than=timedelta(days=1)) == 1
    await backend.put_bytes("a/one", b"2")
    assert files_below(tmp_path) == ["a/one"]
    await backend.aclose()


@pytest.mark.parametrize("fsync", [True, False])
async def test_a_volume_without_permissions_says_so_and_names_the_option(
    without_permissions: None, fsync: bool, tmp_path: Path
) -> None:
    backend = LocalStorageBackend(tmp_path, fsync=fsync, file_mode=0o640)
    with pytest.raises(AccessDeniedError, match=r"chmod.*file_mode=None") as raised:
        await backend.put_bytes("a/one", b"1")
    assert str(tmp_path) in str(raised.value)
    assert files_below(tmp_path) == []
    await backend.aclose()


@pytest.mark.parametrize("code", [errno.EPERM, errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("write", ["put_bytes", "put_stream"])
async def test_an_object_whose_permissions_cannot_be_set_is_refused_in_the_same_words(
    code: int, write: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its root is in use already, so the object is what the volume refuses first."""
    await LocalStorageBackend(tmp_path).put_bytes("a/marked", b"1")
    monkeypatch.setattr(os, "fchmod", failing(code))
    backend = LocalStorageBackend(tmp_path, file_mode=0o640)
    with pytest.raises(BackendError, match=r"chmod.*file_mode=None") as raised:
        await (backend.put_bytes("a/one", b"1") if write == "put_bytes" else backend.put_stream("a/one", many(b"1", 3)))
    assert str(tmp_path) in str(raised.value)
    assert "'a/one'" in str(raised.value)
    assert files_below(tmp_path) == ["a/marked"]
    await backend.aclose()


@pytest.mark.parametrize("fsync", [True, False])
async def test_permissions_that_are_left_alone_are_never_set(without_permissions: None, fsync: bool, tmp_path: Path) -> None:
    root = tmp_path / "new/root"
    before = os.umask(0o027)
    try:
        await require_exclusive_writes(LocalStorageBackend(root, fsync=fsync, file_mode=None, dir_mode=None))
    finally:
        os.umask(before)
    assert stat.S_IMODE((root / "a/b/small").stat().st_mode) == 0o640
    assert stat.S_IMODE((root / "a/b").stat().st_mode) == 0o750


async def test_a_volume_that_refuses_permissions_it_has_already_is_written_to(without_permissions: None, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        backend = LocalStorageBackend(tmp_path / "root", fsync=False, file_mode=0o600, dir_mode=None)
        with pytest.raises(AccessDeniedError):
            await LocalStorageBackend(tmp_path / "other", file_mode=0o604, dir_mode=None).put_bytes("a/one", b"1")
        (tmp_path / "root").mkdir()
        (tmp_path / "root/.granite-storage").touch(0o600)
        await backend.put_bytes("a/one", b"1")
    finally:
        os.umask(before)
    await backend.aclose()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
async def test_a_volume_that_cannot_synchronise_directories_is_written_to_with_one_warning(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    synchronised: list[int] = []
    fsync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        synchronised.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    backend = LocalStorageBackend(tmp_path)
    with caplog.at_level(logging.WARNING, "granite_storage"):
        await backend.put_bytes("a/one", b"1")
        await backend.put_bytes("b/two", b"2")
        await backend.delete("a/one")
    (record,) = caplog.records
    assert "fsync" in record.getMessage()
    assert str(tmp_path) in record.getMessage()
    assert len(synchronised) == 3, "both files, and the marker of the root"
    await backend.aclose()


def without_synchronising_directories(code: int) -> Callable[[int], None]:
    """Return a `fsync` that fails for directories."""
    fsync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    return files_only


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
async def test_what_a_killed_write_left_is_removed_where_directories_cannot_be_synchronised(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await LocalStorageBackend(tmp_path).put_bytes("a/kept", b"1")
    with monkeypatch.context() as killed:
        killed.setattr(os, "unlink", lambda path, **options: None)
        killed.setattr(_local_tree.AtomicFile, "publish", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            await LocalStorageBackend(tmp_path).put_bytes("a/one", b"1")
    assert len(list((tmp_path / "a").iterdir())) == 2
    monkeypatch.setattr(os, "fsync", without_synchronising_directories(code))
    backend = LocalStorageBackend(tmp_path)
    await backend.abort_upload("a/one", None)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
    await backend.aclose()


@pytest.mark.parametrize("only", ["directories", "everything"])
async def test_a_directory_that_fails_to_reach_the_disk_fails_the_write(
    only: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = failing(errno.EIO) if only == "everything" else without_synchronising_directories(errno.EIO)
    monkeypatch.setattr(os, "fsync", fsync)
    backend = LocalStorageBackend(tmp_path)
    with pytest.raises(BackendError, match=r"\(fsync\)") as raised:
        await backend.put_bytes("a/one", b"1")
    assert "fsync=False" not in str(raised.value)  # a failing disk is no reason to wait for it less
    assert files_below(tmp_path) == []
    await backend.aclose()


async def test_a_file_that_cannot_be_synchronised_names_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    await LocalStorageBackend(tmp_path, fsync=False).put_bytes("a/marked", b"1")
    backend = LocalStorageBackend(tmp_path)
    with pytest.raises(BackendError, match=r"\(fsync\).*fsync=False") as raised:
        await backend.put_bytes("a/one", b"1")
    assert str(tmp_path) in str(raised.value)
    await backend.aclose()


@pytest.mark.case("RB-20")
async def test_a_refusal_names_the_root_who_asks_and_whose_the_root_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "volume"
    root.mkdir(0o755)
    os.chown(root, 4321, 4321)
    monkeypatch.setattr(os, "mkdir", failing(errno.EACCES))
    monkeypatch.setattr(_local_tree.os, "geteuid", lambda: 1234)
    backend = LocalStorageBackend(root)
    with pytest.raises(AccessDeniedError) as raised:
        await backend.put_bytes("a/one", b"1")
    for part in (str(root), "uid 1234", "uid 4321", "0o755", "'a/one'"):
        assert part in str(raised.value)
    await backend.aclose()


@pytest.mark.case("RB-20")
async def test_a_root_that_cannot_be_made_is_named_at_once() -> None:
    backend = LocalStorageBackend("/proc/nope")
    with pytest.raises(BackendError, match=r"'/proc/nope' cannot be created .*No such file") as raised:
        await backend.put_bytes("a/one", b"1")
    assert "again" not in str(raised.value)
    await backend.aclose()


@pytest.mark.case("RB-20")
async def test_a_directory_that_is_never_there_is_not_said_to_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await LocalStorageBackend(tmp_path).put_bytes("marked", b"1")
    monkeypatch.setattr(os, "mkdir", failing(errno.ENOENT))
    backend = LocalStorageBackend(tmp_path)
    with pytest.raises(BackendUnavailableError, match="does not allow directories or files to be created") as raised:
        await backend.put_bytes("a/one", b"1")
    assert str(tmp_path) in str(raised.value)
    await backend.aclose()


@pytest.mark.case("RB-10")
def test_a_system_without_directory_descriptors_says_what_to_use(tmp_path: Path) -> None:
    """Windows, as far as Python shows it: `os.supports_dir_fd` is empty when the module is imported."""
    program = (
        "import os\n"
        "os.supports_dir_fd = set()\n"
        "from granite_storage import ConfigurationError\n"
        "from granite_storage.backends.local import LocalStorageBackend\n"
        "try:\n"
        "    LocalStorageBackend('uploads')\n"
        "except ConfigurationError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    for part in ("Windows", "WSL", "MemoryStorageBackend", "S3"):
        assert part in done.stdout


@pytest.mark.case("RB-10")
def test_the_package_claims_only_the_systems_that_it_runs_on() -> None:
    classifiers = (PROJECT / "pyproject.toml").read_text()
    assert "OS Independent" not in classifiers
    assert "Operating System :: POSIX" in classifiers


def test_modes_are_permissions_or_none(tmp_path: Path) -> None:
    LocalStorageBackend(tmp_path, file_mode=None, dir_mode=None)
    with pytest.raises(ConfigurationError, match="file_mode must be None or"):
        LocalStorageBackend(tmp_path, file_mode=0o400)
