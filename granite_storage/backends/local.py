"""Objects as files below a directory of the local disk."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path

from aiofiles.threadpool import wrap
from aiofiles.threadpool.binary import AsyncFileIO

from granite_storage._tasks import shielded, shielded_cleanup
from granite_storage._threads import ThreadConsumer, ThreadPool
from granite_storage.backends._identity import folder_places
from granite_storage.backends._local_tree import AtomicFile, Tree, translated
from granite_storage.backends.base import ObjectInfo, ObjectReader, Place, byte_range, check_range
from granite_storage.exceptions import BackendError, ConfigurationError
from granite_storage.locations import check_location

__all__ = ["LocalStorageBackend"]

# Decided at import: tools that watch for blocking calls replace these functions later.
_HAS_DIRECTORY_DESCRIPTORS = {os.open, os.link} <= os.supports_dir_fd

_MAX_PENDING = 8 << 20
_COPY_STEP = 8 << 20
_LISTING_BATCH = 1000


class LocalStorageBackend:
    """Stores each object as one file below a directory, and returns only once the disk has it.

    A write goes to a temporary file beside its target, is synchronised, and gets its name by a link that fails where the name
    exists; then the directories are synchronised up to the root. A failure or cancellation leaves no file and no temporary file.
    A volume without hard links gets `renameat2` with `RENAME_NOREPLACE`, and one without that an exclusive file beside the target
    as a claim on its name. Links below the root are never followed and only regular files are read. Directories that a deletion
    leaves empty are removed. The root carries the marker file `.granite-storage` with its identity from its first write.

    POSIX systems only: Windows has no way to walk a path by open directories.

    Args:
        root_dir: The directory; made by the first write where it is missing.
        fsync: Whether a write waits for the disk. Without it a power loss can lose or empty a file whose ref was committed. Where
            a volume can write files through to the disk but no directories, a warning in the log says so once.
        file_mode: The permissions of the files, whatever the umask; None leaves them as the system makes them, for volumes that
            keep no permissions, such as those of SMB.
        dir_mode: The permissions of the directories, whatever the umask; None leaves them, too.
        create_root: Whether the first write may make the root, or take a directory into use that has no marker. False suits a
            root on a mounted disk: where the disk is not mounted, every call then raises `BackendUnavailableError`, and nothing
            is written to the disk below. A new root must be a mount point, or be given an empty marker file by hand.
        max_threads: The most threads that work on this root at a time; they are the backend's own.

    Raises:
        ConfigurationError: An argument cannot work, or the system is not a POSIX one.

    Example:
        >>> LocalStorageBackend("uploads", file_mode=0o600).root_dir.name
        'uploads'
    """

    def __init__(
        self,
        root_dir: str | os.PathLike[str],
        *,
        fsync: bool = True,
        file_mode: int | None = 0o640,
        dir_mode: int | None = 0o750,
        create_root: bool = True,
        max_threads: int = 16,
    ) -> None:
        if not _HAS_DIRECTORY_DESCRIPTORS:
            raise ConfigurationError(
                "LocalStorageBackend needs Linux, macOS or another POSIX system: this one cannot open files relative to a "
                "directory. On Windows run the application in WSL or a container; MemoryStorageBackend and S3 work there, too"
            )
        if not os.fspath(root_dir):
            raise ConfigurationError("root_dir must not be empty")
        for argument, mode, needed in (("file_mode", file_mode, 0o600), ("dir_mode", dir_mode, 0o700)):
            if mode is not None and (not 0 <= mode <= 0o777 or mode & needed != needed):
                raise ConfigurationError(f"{argument} must be None or permissions that include {needed:#o}, not {mode:#o}")
        if max_threads < 1:
            raise ConfigurationError(f"max_threads must be at least 1, not {max_threads}")
        self.root_dir: Path = Path(os.path.normpath(Path(root_dir).absolute()))
        self._tree = Tree(self.root_dir, fsync=fsync, file_mode=file_mode, dir_mode=dir_mode, create_root=create_root)
        self._threads = ThreadPool("granite-local", max_threads)

    def __repr__(self) -> str:
        return f"LocalStorageBackend({str(self.root_dir)!r})"

    async def put_bytes(self, location: str, content: bytes, *, content_type: str | None = None) -> None:
        """Create an object, in one visit to a thread; see `StorageBackend.put_bytes`. The content type is the ref's to keep."""
        check_location(location)
        await self._threads.run(AtomicFile.create, self._tree, location, content, undo=lambda _: self._tree.delete(location))

    async def put_stream(self, location: str, stream: AsyncIterator[bytes], *, content_type: str | None = None) -> None:
        """Create an object from a stream; see `StorageBackend.put_stream`."""
        check_location(location)
        begun = deque[bytes]()
        async for chunk in stream:
            begun.append(chunk)
            del chunk
            if len(begun) == 2:
                break
        else:
            await self.put_bytes(location, begun[0] if begun else b"")
            return
        async with self._atomic_file(location) as file:
            await self._write(file, begun, stream)

    async def open(self, location: str, *, offset: int = 0, length: int | None = None) -> ObjectReader:
        """Open a range; see `StorageBackend.open`."""
        check_location(location)
        check_range(offset, length)
        return await self._threads.run(self._open, location, offset, length, undo=_LocalReader.close)

    async def stat(self, location: str) -> ObjectInfo:
        """Return the properties of an object; see `StorageBackend.stat`."""
        check_location(location)
        return await self._threads.run(self._tree.stat, location)

    async def exists(self, location: str) -> bool:
        """Return whether an object exists; see `StorageBackend.exists`."""
        check_location(location)
        return await self._threads.run(self._tree.exists, location)

    async def delete(self, location: str) -> None:
        """Delete an object; see `StorageBackend.delete`."""
        check_location(location)
        await self._threads.run(self._tree.delete, location)

    async def copy(self, source: str, target: str) -> None:
        """Copy an object inside the file system; see `SupportsCopy.copy`. A file system that shares blocks moves no byte."""
        check_location(source)
        check_location(target)
        async with self._atomic_file(target) as file:
            reader = await self._threads.run(self._open, source, 0, None, undo=_LocalReader.close)
            try:
                while await self._threads.run(_copy_some, reader.descriptor, file, target):
                    pass
            finally:
                await shielded_cleanup(reader.aclose(), f"closing {source!r}")
            await self._threads.run(_require_whole_copy, reader.info, file, target)

    async def iter_objects(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        """Yield the objects in order; see `StorageBackend.iter_objects`. Files that cannot be objects are passed over."""
        objects = self._tree.walk(prefix, start_after)
        try:
            while batch := await self._threads.run(_take, objects):
                for info in batch:
                    yield info
        except BaseException:
            await shielded_cleanup(self._threads.run(objects.close), "closing a listing")
            raise

    async def cleanup_incomplete(self, *, older_than: timedelta) -> int:
        """Remove temporary files that were last written to longer ago than `older_than`; return how many there were."""
        return await self._threads.run(self._tree.sweep, older_than.total_seconds())

    async def abort_upload(self, location: str, upload_id: str | None) -> None:
        """Remove the temporary files of unfinished writes of a location; see `SupportsAbort.abort_upload`. They have no ids."""
        check_location(location)
        await self._threads.run(self._tree.abort, location)

    async def now(self) -> datetime:
        """Return the time by the file system's clock, which on a network drive is its server's; see `SupportsClock.now`."""
        return await self._threads.run(self._tree.now)

    async def is_mounted(self) -> bool:
        """Return whether the root is there and was written to before: False means a new root, or a disk that is not mounted."""
        return await self._threads.run(self._tree.is_mounted)

    async def identities(self, *, create: bool = False) -> Sequence[str]:
        """Return the lines of the marker file; see `SupportsIdentity.identities`."""
        if not create:
            return await self._threads.run(self._tree.identities)
        return self._tree.known_identities or await self._threads.run(self._tree.identify)

    async def places(self) -> frozenset[Place]:
        """Return the root's path without links, and the inodes of it and the folders above; see `SupportsPlaces.places`."""
        return await self._threads.run(folder_places, self.root_dir)

    async def aclose(self) -> None:
        """Let idle threads end; see `StorageBackend.aclose`."""
        self._threads.close()

    @asynccontextmanager
    async def _atomic_file(self, location: str) -> AsyncIterator[AtomicFile]:
        """Yield an unfinished file, and publish it at the end of the block; if anything fails, nothing of it is left."""
        file = await self._threads.run(AtomicFile.begin, self._tree, location, undo=AtomicFile.discard)
        try:
            yield file
            await self._threads.run(file.publish)
        except BaseException:
            await shielded_cleanup(self._threads.run(file.discard), f"removing the unfinished file of {location!r}")
            raise

    async def _write(self, file: AtomicFile, begun: deque[bytes], rest: AsyncIterator[bytes]) -> None:
        """Write in a thread, a few MiB behind the stream; return only when the thread is done with the file."""
        writer = ThreadConsumer(self._threads, file.write, max_pending=_MAX_PENDING, consume_several=file.write_several)
        try:
            while begun:
                await writer.feed(begun.popleft())
            async for chunk in rest:
                await writer.feed(chunk)
                del chunk  # where thousands of uploads wait for their next one, the last one's memory would be felt
            await writer.drain()
        except BaseException:
            await writer.stop()
            raise

    def _open(self, location: str, offset: int, length: int | None) -> _LocalReader:
        descriptor, info = self._tree.open(location)
        try:
            wanted = byte_range(offset, length, info.size)
            with self._tree.translated(location):
                os.lseek(descriptor, wanted.start, os.SEEK_SET)
        except BaseException:
            os.close(descriptor)
            raise
        return _LocalReader(descriptor, info, wanted.stop - wanted.start, self._threads)


class _LocalReader:
    """A range of a file."""

    def __init__(self, descriptor: int, info: ObjectInfo, left: int, threads: ThreadPool) -> None:
        self.info = info
        self.descriptor = descriptor
        self._left = left
        self._threads = threads
        self._file = io.FileIO(descriptor)
        self._handle: AsyncFileIO | None = None

    async def read(self, size: int = -1, /) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        handle = self._handle = self._handle or wrap(self._file, executor=self._threads.executor)
        with translated(self.info.location):
            chunk = await shielded(handle.read(wanted))
        if wanted and not chunk:
            message = f"the file at {self.info.location!r} ended {self._left} bytes early"
            raise BackendError(message, location=self.info.location)
        self._left -= len(chunk)
        return bytes(chunk)

    async def aclose(self) -> None:
        if not self._file.closed:
            await shielded(self._threads.run(self.close))

    def close(self) -> None:
        self._file.close()


def _copy_some(source: int, file: AtomicFile, location: str) -> int:
    """Copy some bytes from the descriptor's position, in the kernel where it can; return how many."""
    with translated(location):
        try:
            return os.copy_file_range(source, file.descriptor, _COPY_STEP)
        except (AttributeError, OSError):
            content = os.read(source, _COPY_STEP)
    file.write(content)
    return len(content)


def _require_whole_copy(source: ObjectInfo, file: AtomicFile, location: str) -> None:
    """Refuse a copy that ended early, as some file systems let `copy_file_range` do."""
    with translated(location):
        copied = os.fstat(file.descriptor).st_size
    if copied != source.size:
        raise BackendError(f"only {copied} of {source.size} bytes of {source.location!r} could be copied", location=location)


def _take(objects: Iterator[ObjectInfo]) -> list[ObjectInfo]:
    return list(islice(objects, _LISTING_BATCH))
