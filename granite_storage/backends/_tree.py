"""Files below one directory, by descriptors: blocking calls, for threads.

Every path is walked from the root one segment at a time, relative to an open directory and without following links, so no name
and no link planted below the root leads out of it.

How a file becomes durable, in this order: the directories it needs are made, and each directory that got an entry is
synchronised; its bytes are written to a temporary file beside the target and synchronised; the name is made by `link`, which
fails where the name exists; the directory that holds the name is synchronised. Leave out any step, and a power loss can keep the
row and lose the file.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from granite_storage.backends.base import ObjectInfo
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    BackendUnavailableError,
    InvalidLocationError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageFullError,
)
from granite_storage.locations import MAX_LOCATION_BYTES, RESERVED_PREFIX, check_location

__all__ = ["Draft", "Tree", "translated"]

logger = logging.getLogger("granite_storage")

MARKER = f"{RESERVED_PREFIX}storage"
"""The file that tells a root that is in use from an empty mount point."""

_TEMPORARY_SUFFIX = ".tmp"
_DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_READ = os.O_RDONLY | _NO_LINK | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK | getattr(os, "O_CLOEXEC", 0)
_DESCRIPTORS = "/proc/self/fd"
_HAS_UNNAMED_FILES = hasattr(os, "O_TMPFILE") and os.path.isdir(_DESCRIPTORS)
_NO_UNNAMED_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})
_VANISHED = (FileNotFoundError, NotADirectoryError)
_MOST_ATTEMPTS = 100
_MOST_REMEMBERED = 10_000

_ERRORS: dict[int, tuple[type[BackendError], str]] = {
    errno.ENOENT: (ObjectNotFoundError, "there is no object"),
    errno.EEXIST: (ObjectExistsError, "there is something already"),
    errno.EACCES: (AccessDeniedError, "the file system refused permission"),
    errno.EPERM: (AccessDeniedError, "the file system refused permission"),
    errno.EROFS: (AccessDeniedError, "the file system is read-only"),
    errno.ENOSPC: (StorageFullError, "the disk is full"),
    errno.EDQUOT: (StorageFullError, "the disk quota is used up"),
    errno.EFBIG: (StorageFullError, "the file is larger than the system allows"),
    errno.EOPNOTSUPP: (BackendError, "the file system has no hard links, which exclusive creation needs,"),
    errno.EMFILE: (BackendUnavailableError, "the process has too many open files"),
    errno.ENFILE: (BackendUnavailableError, "the system has too many open files"),
    errno.ESTALE: (BackendUnavailableError, "the network file system lost the file"),
    errno.ETIMEDOUT: (BackendUnavailableError, "the network file system did not answer"),
}
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG})


@contextmanager
def translated(location: str | None, *, reading: bool = False) -> Iterator[None]:
    """Turn the system's errors into the library's, which are no `OSError`.

    Args:
        location: What the call is about; None for the store as a whole.
        reading: Whether a part of the path that is no directory, or a link, means that there is no object.
    """
    try:
        yield
    except OSError as error:
        code = errno.ENOENT if reading and error.errno in _NOT_THERE else error.errno
        kind, words = _ERRORS.get(code or 0, (BackendError, "the file system failed"))
        where = "" if location is None else f" at {location!r}"
        raise kind(f"{words}{where}: {error.strerror}", location=location) from error


class Tree:
    """The directory below which a local backend keeps its objects.

    Args:
        root: The directory.
        fsync: Whether a write waits for the disk.
        file_mode: The permissions of a file, set whatever the umask.
        dir_mode: The permissions of a directory made here, set whatever the umask.
        create_root: Whether a root that is missing or was never used is made, or taken into use, by the first write.
    """

    def __init__(self, root: Path, *, fsync: bool, file_mode: int, dir_mode: int, create_root: bool) -> None:
        self.root = root
        self.fsync = fsync
        self.file_mode = file_mode
        self.dir_mode = dir_mode
        self.create_root = create_root
        self.unnamed_drafts = not fsync and _HAS_UNNAMED_FILES
        self._known_root: tuple[int, int] | None = None
        self._durable: dict[str, int] = {}

    def carries_marker(self) -> bool:
        """Tell whether the root is there and was used before; an unmounted disk shows an empty directory instead."""
        try:
            with translated(None, reading=True), _opened(self.root) as root:
                return stat.S_ISREG(os.stat(MARKER, dir_fd=root, follow_symlinks=False).st_mode)
        except ObjectNotFoundError:
            return False

    def begin(self, location: str) -> Draft:
        """Make a temporary file beside the target, in directories made as needed."""
        segments = location.split("/")
        with translated(location):
            for _ in range(_MOST_ATTEMPTS):
                try:
                    return self._begin(segments)
                except FileNotFoundError:
                    # A deletion found a directory empty and pruned it before the next one or the file was in it.
                    continue
                except BaseException:
                    self.prune(segments[:-1])
                    raise
        raise BackendUnavailableError(f"the directory of {location!r} was removed again and again", location=location)

    def _begin(self, segments: list[str]) -> Draft:
        directory = self.make_directory(segments[:-1])
        try:
            return Draft(self, segments, directory)
        except BaseException:
            os.close(directory)
            raise

    def write(self, location: str, content: bytes) -> None:
        """Create an object in one visit."""
        draft = self.begin(location)
        try:
            draft.write(content)
            draft.publish()
        except BaseException:
            try:
                draft.discard()
            except BackendError:
                logger.exception("removing the unfinished file of %r failed", location)
            raise

    def open(self, location: str) -> tuple[int, ObjectInfo]:
        """Open a regular file for reading; a link, a directory or a device is no object."""
        *folder, name = location.split("/")
        with translated(location, reading=True), self._directory(folder) as directory:
            descriptor = os.open(name, _READ, dir_fd=directory)
            try:
                return descriptor, _info(location, os.fstat(descriptor))
            except BaseException:
                os.close(descriptor)
                raise

    def stat(self, location: str) -> ObjectInfo:
        """Tell what is known of a regular file."""
        *folder, name = location.split("/")
        with translated(location, reading=True), self._directory(folder) as directory:
            return _info(location, os.stat(name, dir_fd=directory, follow_symlinks=False))

    def exists(self, location: str) -> bool:
        """Tell whether there is a regular file."""
        try:
            self.stat(location)
        except ObjectNotFoundError:
            return False
        return True

    def delete(self, location: str) -> None:
        """Remove a regular file, and the directories that this leaves empty."""
        *folder, name = location.split("/")
        try:
            with translated(location, reading=True), self._directory(folder) as directory:
                _info(location, os.stat(name, dir_fd=directory, follow_symlinks=False))
                os.unlink(name, dir_fd=directory)
                self.synchronise(directory)
        except ObjectNotFoundError:
            return
        self.prune(folder)

    def walk(self, prefix: str, start_after: str | None) -> Iterator[ObjectInfo]:
        """Yield the regular files whose location begins with `prefix`, in the byte order of UTF-8."""
        folder, slash, _ = prefix.rpartition("/")
        with self._directory_if_any(folder + slash) as directory:
            if directory is not None:
                yield from self._walk(directory, folder + slash, prefix, start_after or "")

    def sweep(self, older_than: float) -> int:
        """Remove the temporary files that were last written to more than `older_than` seconds ago; return how many.

        The directories that this leaves empty go too.
        """
        with self._directory_if_any("") as root:
            return 0 if root is None else self._sweep(root, time.time() - older_than, MAX_LOCATION_BYTES)

    def synchronise(self, descriptor: int) -> None:
        """Wait until a file or directory is on the disk, where that is wanted."""
        if self.fsync:
            os.fsync(descriptor)

    @contextmanager
    def _directory_if_any(self, folder: str) -> Iterator[int | None]:
        """Open a folder, which is empty for the root and else ends in a slash; None where there is none."""
        with ExitStack() as stack:
            directory: int | None = None
            with suppress(ObjectNotFoundError, InvalidLocationError), translated(None, reading=True):
                if folder:
                    check_location(folder[:-1])
                directory = stack.enter_context(self._directory(folder.split("/")[:-1]))
            with translated(None):
                yield directory

    @contextmanager
    def _directory(self, segments: Sequence[str]) -> Iterator[int]:
        descriptor = self._open_root(writing=False)
        try:
            for segment in segments:
                child = os.open(segment, _DIRECTORY | _NO_LINK, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = child
            yield descriptor
        finally:
            os.close(descriptor)

    def make_directory(self, segments: Sequence[str]) -> int:
        """Open a directory, made with all above it as needed; whoever made them, their entries are on the disk afterwards."""
        descriptor = self._open_root(writing=True)
        path = ""
        try:
            for segment in segments:
                path = f"{path}/{segment}"
                child, made = self._open_or_make(segment, descriptor)
                try:
                    self._settle(path, child, descriptor, made)
                except BaseException:
                    os.close(child)
                    raise
                os.close(descriptor)
                descriptor = child
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _open_or_make(self, segment: str, parent: int) -> tuple[int, bool]:
        made = False
        for _ in range(_MOST_ATTEMPTS):
            with suppress(FileNotFoundError):
                return os.open(segment, _DIRECTORY | _NO_LINK, dir_fd=parent), made
            with suppress(FileExistsError):
                os.mkdir(segment, self.dir_mode | (stat.S_ISVTX if self.fsync else 0), dir_fd=parent)
                made = True
        raise FileNotFoundError(errno.ENOENT, "the directory was removed again and again", segment)

    def _settle(self, path: str, child: int, parent: int, made: bool) -> None:
        """Put the entry of a directory on the disk, unless this process has seen it there, and give a new one its mode.

        A directory carries the sticky bit from when it is made until its entry is on the disk, so every process that finds it
        meanwhile knows that it must not rely on it. The number of its inode does not tell: that of a pruned one is used again.
        """
        if not self.fsync:
            if made:
                self._set_mode(child)
            return
        found = os.fstat(child)
        unsettled = made or (found.st_mode & stat.S_ISVTX and not found.st_mode & 0o777 & ~self.dir_mode)
        if unsettled or self._durable.get(path) != found.st_ino:
            os.fsync(parent)
            if len(self._durable) >= _MOST_REMEMBERED:
                self._durable.clear()
            self._durable[path] = found.st_ino
        if unsettled:
            with suppress(PermissionError):  # it is another user's, who gives it its mode
                self._set_mode(child)

    def _set_mode(self, directory: int) -> None:
        """Undo the umask; a set-group-ID bit that the directory inherited stays."""
        mode = stat.S_IMODE(os.fstat(directory).st_mode)
        wanted = mode & stat.S_ISGID | self.dir_mode
        if mode != wanted:
            os.fchmod(directory, wanted)

    def prune(self, segments: Sequence[str]) -> None:
        """Remove directories from the deepest up, as far as they are empty; `rmdir` refuses one that is in use."""
        for depth in range(len(segments), 0, -1):
            *folder, name = segments[:depth]
            try:
                with suppress(FileNotFoundError), self._directory(folder) as parent:
                    os.rmdir(name, dir_fd=parent)
            except (OSError, BackendError):
                return

    def _open_root(self, *, writing: bool) -> int:
        known = self._known_root  # as it was before: another thread may make the root in this moment
        try:
            descriptor = self._open_existing_root()
        except FileNotFoundError as error:
            if known is not None or not self.create_root:
                raise self._unavailable("does not exist") from error
            if not writing:
                raise
            self._create_root()
            descriptor = self._open_existing_root()
        try:
            self._recognise(descriptor, writing)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _open_existing_root(self) -> int:
        try:
            return os.open(self.root, _DIRECTORY)
        except NotADirectoryError as error:
            raise self._unavailable("is not a directory") from error

    def _unavailable(self, problem: str) -> BackendUnavailableError:
        return BackendUnavailableError(f"the root directory {str(self.root)!r} {problem}; is its disk mounted?")

    def _create_root(self) -> None:
        missing = [path for path in (self.root, *self.root.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(self.dir_mode, exist_ok=True)
            path.chmod(self.dir_mode)
            with _opened(path.parent) as parent:
                self.synchronise(parent)

    def _recognise(self, descriptor: int, writing: bool) -> None:
        """Refuse a root that is not the one it was, and one that may be what lies below a disk that is not mounted."""
        found = os.fstat(descriptor)
        identity = (found.st_dev, found.st_ino)
        if identity == self._known_root:
            return
        try:
            os.stat(MARKER, dir_fd=descriptor, follow_symlinks=False)
        except FileNotFoundError as error:
            if self._known_root not in {None, identity}:
                raise self._unavailable("is not the one it was") from error
            if not self.create_root and os.stat("..", dir_fd=descriptor).st_dev == found.st_dev:
                raise self._unavailable(f"is no mount point and has no file {MARKER!r} that says it is in use") from error
            if not writing:
                return
            self._mark(descriptor)
        self._known_root = identity

    def _mark(self, root: int) -> None:
        with suppress(FileExistsError):
            marker = os.open(MARKER, _CREATE, 0o600, dir_fd=root)
            try:
                os.fchmod(marker, self.file_mode)
            finally:
                os.close(marker)
        self.synchronise(root)

    def _walk(self, directory: int, folder: str, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        for path, entry in sorted(self._entries(directory, folder), key=lambda item: item[0]):
            if path.endswith("/"):
                # A directory sorts as its contents do, so `t-/x` comes before `t/x`.
                if path.startswith(prefix) and (path > start_after or start_after.startswith(path)):
                    with suppress(*_VANISHED), _opened(entry.name, directory) as child:
                        yield from self._walk(child, path, prefix, start_after)
            elif path > start_after and path.startswith(prefix):
                with suppress(FileNotFoundError, ObjectNotFoundError):
                    yield _info(path, os.stat(entry.name, dir_fd=directory, follow_symlinks=False))

    def _entries(self, directory: int, folder: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        with os.scandir(directory) as entries:
            for entry in entries:
                path = folder + entry.name
                if not _is_segment(entry.name) or len(os.fsencode(path)) > MAX_LOCATION_BYTES:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    yield f"{path}/", entry
                elif entry.is_file(follow_symlinks=False):
                    yield path, entry

    def _sweep(self, directory: int, before: float, room: int) -> int:
        removed = 0
        folders: list[str] = []
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif _is_temporary(entry.name):
                    with suppress(FileNotFoundError):
                        if os.stat(entry.name, dir_fd=directory, follow_symlinks=False).st_mtime < before:
                            os.unlink(entry.name, dir_fd=directory)
                            removed += 1
        for name in folders:
            left = room - len(os.fsencode(name)) - 1
            if left > 0 and _is_segment(name):
                removed += self._sweep_folder(name, directory, before, left)
        return removed

    def _sweep_folder(self, name: str, parent: int, before: float, room: int) -> int:
        try:
            with _opened(name, parent) as child:
                removed = self._sweep(child, before, room)
        except _VANISHED:
            return 0
        if removed:
            with suppress(OSError):
                os.rmdir(name, dir_fd=parent)
        return removed


class Draft:
    """A file that is written but does not have its name yet.

    Until then it has a temporary name, which a sweep finds after a crash; or none at all where the system can do that and a
    write does not wait for the disk: one change of the directory instead of three. A directory that holds only a file without
    a name looks empty, so it may be pruned, and is made again.

    Args:
        tree: Where it belongs.
        segments: The segments of its location.
        directory: The open directory that will hold it; closed by `publish` or `discard`.

    Raises:
        FileNotFoundError: The directory was removed meanwhile.
    """

    def __init__(self, tree: Tree, segments: list[str], directory: int) -> None:
        self._tree = tree
        self._segments = segments
        self._location = "/".join(segments)
        self._temporary: str | None = None
        self._published = False
        self._file: int | None = self._open_unnamed(directory) if tree.unnamed_drafts else None
        if self._file is None:
            self._temporary = f"{RESERVED_PREFIX}{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}"
            self._file = os.open(self._temporary, _CREATE, 0o600, dir_fd=directory)
        self._directory: int | None = directory

    def _open_unnamed(self, directory: int) -> int | None:
        try:
            return os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=directory)
        except PermissionError:
            # So says ext4 of a directory that was removed; the attempt to make a named file tells the two apart.
            return None
        except OSError as error:
            if error.errno not in _NO_UNNAMED_FILES:
                raise
            self._tree.unnamed_drafts = False
            return None

    @property
    def file(self) -> int:
        """The descriptor to write to."""
        if self._file is None:
            raise ValueError("the draft is closed")
        return self._file

    def write(self, content: bytes) -> None:
        """Add bytes."""
        with translated(self._location):
            view = memoryview(content)
            while view:
                view = view[os.write(self.file, view) :]

    def publish(self) -> None:
        """Give the file its name, unless something has it already."""
        with translated(self._location):
            os.fchmod(self.file, self._tree.file_mode)
            self._tree.synchronise(self.file)
            self._link(self._segments[-1])
            self._published = True
            self._remove_temporary()
            if self._directory is not None:
                self._tree.synchronise(self._directory)
            self._close()

    def _link(self, name: str) -> None:
        if self._temporary is not None:
            self._link_temporary(self._temporary, name)
            return
        for _ in range(_MOST_ATTEMPTS):
            try:
                os.link(f"{_DESCRIPTORS}/{self._file}", name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            except FileNotFoundError:
                with suppress(FileNotFoundError):
                    self._renew_directory()
            else:
                return
        message = f"the directory of {self._location!r} was removed again and again"
        raise BackendUnavailableError(message, location=self._location)

    def _link_temporary(self, temporary: str, name: str) -> None:
        try:
            os.link(temporary, name, src_dir_fd=self._directory, dst_dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError as error:
            message = f"the temporary file of {self._location!r} was removed while it was written"
            raise BackendUnavailableError(message, location=self._location) from error

    def _renew_directory(self) -> None:
        directory = self._tree.make_directory(self._segments[:-1])
        if self._directory is not None:
            os.close(self._directory)
        self._directory = directory

    def discard(self) -> None:
        """Remove what was made, the published name too: whoever discards has not told anybody of it."""
        with translated(self._location), ExitStack() as steps:
            steps.callback(self._tree.prune, self._segments[:-1])
            steps.callback(self._close)
            steps.callback(self._remove_temporary)
            if self._published:
                steps.callback(self._tree.delete, self._location)
            self._published = False

    def _remove_temporary(self) -> None:
        if self._temporary is not None and self._directory is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._temporary, dir_fd=self._directory)
            self._temporary = None

    def _close(self) -> None:
        with ExitStack() as steps:
            for descriptor in (self._directory, self._file):
                if descriptor is not None:
                    steps.callback(os.close, descriptor)
            self._file = self._directory = None


@contextmanager
def _opened(path: str | Path, parent: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, _DIRECTORY | (_NO_LINK if parent is not None else 0), dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _info(location: str, found: os.stat_result) -> ObjectInfo:
    if not stat.S_ISREG(found.st_mode):
        raise ObjectNotFoundError(f"what is at {location!r} is not a regular file", location=location)
    return ObjectInfo(
        location=location,
        size=found.st_size,
        modified=datetime.fromtimestamp(found.st_mtime, UTC),
        etag=f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}",
    )


def _is_segment(name: str) -> bool:
    """Tell whether a name in a directory can be part of a location; others' files and our temporary ones may lie there too."""
    if name.isascii() and name[0] != ".":
        return name.isprintable() and "\\" not in name
    try:
        check_location(name)
    except InvalidLocationError:
        return False
    return True


def _is_temporary(name: str) -> bool:
    return name.startswith(RESERVED_PREFIX) and name.endswith(_TEMPORARY_SUFFIX)
