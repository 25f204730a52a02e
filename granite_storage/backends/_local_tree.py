"""Files below one directory, by descriptors: blocking calls, for threads.

Every path is walked from the root one segment at a time, relative to an open directory and without following links, so no name
and no link planted below the root leads out of it.

`_draft` tells how a file comes to be.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from granite_storage.backends._descriptors import (
    CREATE,
    DIRECTORY,
    NO_LINK,
    READ,
    TEMPORARY_SUFFIX,
    info_of,
    opened,
    temporary_stem,
)
from granite_storage.backends._identity import MARKER, MARKER_SIZE, identities_in, new_marker
from granite_storage.backends._tree_errors import UNSUPPORTED, translated
from granite_storage.backends._tree_walk import swept, walked
from granite_storage.backends.base import ObjectInfo
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    BackendUnavailableError,
    InvalidLocationError,
    ObjectNotFoundError,
)
from granite_storage.locations import RESERVED_PREFIX, check_location, uuid7_hex

__all__ = ["MOST_ATTEMPTS", "Tree"]

logger = logging.getLogger("granite_storage")

MOST_ATTEMPTS = 100
"""How often something is tried again that another process may have undone meanwhile."""

_MOST_REMEMBERED = 10_000


class Tree:
    """The directory below which a local backend keeps its objects.

    Args:
        root: The directory.
        fsync: Whether a write waits for the disk.
        file_mode: The permissions of a file, set whatever the umask; None leaves them as the system makes them.
        dir_mode: The permissions of a directory made here, set whatever the umask; None leaves them, too.
        create_root: Whether a root that is missing or was never used is made, or taken into use, by the first write.
    """

    def __init__(self, root: Path, *, fsync: bool, file_mode: int | None, dir_mode: int | None, create_root: bool) -> None:
        self.root = root
        self.fsync = fsync
        self.file_mode = file_mode
        self.dir_mode = dir_mode
        self.create_root = create_root
        self._known_root: tuple[int, int] | None = None
        self._identified: tuple[tuple[int, int] | None, tuple[str, ...]] = None, ()
        self._durable: dict[str, int] = {}
        self._syncs_directories = True

    def translated(self, location: str | None, *, reading: bool = False, step: str | None = None) -> AbstractContextManager[None]:
        """Turn the system's errors into the library's, which name the root; see `_tree_errors.translated`."""
        return translated(location, reading=reading, root=self.root, step=step)

    def no_directory(self, location: str) -> BackendUnavailableError:
        """Return the error for a directory that is missing however often it is made; raise it from the last failure."""
        return BackendUnavailableError(
            f"no file can be made for {location!r} below {str(self.root)!r}: its directory was missing {MOST_ATTEMPTS} times in "
            "a row; either something removes it each time, or the file system lets no directories or files be made there",
            location=location,
        )

    def is_mounted(self) -> bool:
        """Tell whether the root is there and was used before; an unmounted disk shows an empty directory instead."""
        try:
            with self.translated(None, reading=True), opened(self.root) as root:
                return stat.S_ISREG(os.stat(MARKER, dir_fd=root, follow_symlinks=False).st_mode)
        except ObjectNotFoundError:
            return False

    @property
    def known_identities(self) -> tuple[str, ...]:
        """The identities of the root that is in use, where they were read or written before."""
        root, identities = self._identified
        return identities if root == self._known_root else ()

    def identities(self) -> tuple[str, ...]:
        """Return the identities that the marker holds."""
        try:
            with translated(None, reading=True), opened(self.root) as root:
                return _identities_of(root)
        except ObjectNotFoundError:
            return ()

    def identify(self) -> tuple[str, ...]:
        """Return the identities that the marker holds; write the marker, and one into it, where there is none."""
        with translated(None):
            root = self._open_root(writing=True)
            try:
                self._mark(root)  # again, where somebody has removed it since
                found = _identities_of(root) or self._add_identity(root)
                self._identified = self._known_root, found
            finally:
                os.close(root)
        return found

    def _add_identity(self, root: int) -> tuple[str, ...]:
        """Give a root an identity whose marker was made by hand, or by a version that knew none.

        Several processes may do so at the same time: each appends, and for all of them the first line counts.
        """
        marker = os.open(MARKER, os.O_WRONLY | os.O_APPEND | NO_LINK, dir_fd=root)
        try:
            os.write(marker, b"\n" + new_marker())
            self.synchronise(marker)
        finally:
            os.close(marker)
        return _identities_of(root)

    def now(self) -> datetime:
        """Return the time by which the file system dates what is written now, or the machine's where nothing can be written."""
        try:
            with opened(self.root) as root:
                return _dated_now(root)
        except OSError:
            return datetime.now(UTC)

    def open(self, location: str) -> tuple[int, ObjectInfo]:
        """Open a regular file for reading; a link, a directory or a device is no object."""
        *folder, name = location.split("/")
        with self.translated(location, reading=True), self._directory(folder) as directory:
            descriptor = os.open(name, READ, dir_fd=directory)
            try:
                return descriptor, _info_of_regular(location, os.fstat(descriptor))
            except BaseException:
                os.close(descriptor)
                raise

    def stat(self, location: str) -> ObjectInfo:
        """Tell what is known of a regular file."""
        *folder, name = location.split("/")
        with self.translated(location, reading=True), self._directory(folder) as directory:
            return _info_of_regular(location, os.stat(name, dir_fd=directory, follow_symlinks=False))

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
            with self.translated(location, reading=True), self._directory(folder) as directory:
                _info_of_regular(location, os.stat(name, dir_fd=directory, follow_symlinks=False))
                os.unlink(name, dir_fd=directory)
                self.synchronise_directory(directory, location)
        except ObjectNotFoundError:
            return
        self.prune(folder)

    def abort(self, location: str) -> None:
        """Remove the temporary files of all writes of one location, and the directories that they have made for nothing."""
        *folder, name = location.split("/")
        stem = temporary_stem(name)
        with suppress(ObjectNotFoundError), translated(location, reading=True), self._directory(folder) as directory:
            with os.scandir(directory) as entries:
                found = [entry.name for entry in entries if entry.name.startswith(stem) and entry.name.endswith(TEMPORARY_SUFFIX)]
            for temporary in found:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=directory)
            if found:
                self.synchronise_directory(directory, location)
        self.prune([*folder, name])

    def walk(self, prefix: str, start_after: str | None) -> Iterator[ObjectInfo]:
        """Yield the regular files whose location begins with `prefix`, in the byte order of UTF-8."""
        folder, slash, _ = prefix.rpartition("/")
        with self._directory_if_any(folder + slash) as directory:
            if directory is not None:
                yield from walked(directory, folder + slash, prefix, start_after or "")

    def sweep(self, older_than: float) -> int:
        """Remove the temporary files that were last written to more than `older_than` seconds ago; return how many.

        The directories that this leaves empty go too.
        """
        with self._directory_if_any("") as root:
            return 0 if root is None else swept(root, time.time() - older_than)

    def synchronise(self, file: int, location: str | None = None) -> None:
        """Wait until a file is on the disk, where that is wanted."""
        if self.fsync:
            with self.translated(location, step="fsync"):
                os.fsync(file)

    def synchronise_directory(self, directory: int, location: str | None = None) -> None:
        """Wait until a directory's entries are on the disk, where that is wanted and the file system has a way to.

        Some volumes cannot do it for directories, only for files: what they promise of names is then their own, as for every
        other program. PostgreSQL goes on there, too.
        """
        if not self.fsync or not self._syncs_directories:
            return
        with self.translated(location, step="fsync"):
            try:
                os.fsync(directory)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                self._syncs_directories = False
                logger.warning(
                    "the file system of %r cannot write directories through to the disk (fsync: %s): files are written through, "
                    "but a power loss may lose the names of the newest; fsync=False accepts that without this warning",
                    str(self.root),
                    error.strerror,
                )

    @contextmanager
    def _directory_if_any(self, folder: str) -> Iterator[int | None]:
        """Open a folder, which is empty for the root and else ends in a slash; None where there is none."""
        with ExitStack() as stack:
            directory: int | None = None
            with suppress(ObjectNotFoundError, InvalidLocationError), self.translated(None, reading=True):
                if folder:
                    check_location(folder[:-1])
                directory = stack.enter_context(self._directory(folder.split("/")[:-1]))
            with self.translated(None):
                yield directory

    @contextmanager
    def _directory(self, segments: Sequence[str]) -> Iterator[int]:
        descriptor = self._open_root(writing=False)
        try:
            for segment in segments:
                child = os.open(segment, DIRECTORY | NO_LINK, dir_fd=descriptor)
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
        for _ in range(MOST_ATTEMPTS):
            with suppress(FileNotFoundError):
                return os.open(segment, DIRECTORY | NO_LINK, dir_fd=parent), made
            with suppress(FileExistsError):
                os.mkdir(segment, self._first_mode, dir_fd=parent)
                made = True
        raise FileNotFoundError(errno.ENOENT, "the directory was removed each time", segment)

    @property
    def _first_mode(self) -> int:
        """The permissions with which a directory is made."""
        if self.dir_mode is None:
            return 0o777
        return self.dir_mode | (stat.S_ISVTX if self.fsync else 0)

    def _settle(self, path: str, child: int, parent: int, made: bool) -> None:
        """Put the entry of a directory on the disk, unless this process has seen it there, and give a new one its mode.

        A directory carries the sticky bit from when it is made until its entry is on the disk, so every process that finds it
        meanwhile knows that it must not rely on it. The number of its inode does not tell: that of a pruned one is used again.
        Where permissions are left alone there is no such bit, and nothing is remembered.
        """
        if not self.fsync:
            if made:
                self._set_mode(child)
            return
        if self.dir_mode is None:
            self.synchronise_directory(parent)
            return
        found = os.fstat(child)
        unsettled = made or (found.st_mode & stat.S_ISVTX and not found.st_mode & 0o777 & ~self.dir_mode)
        if unsettled or self._durable.get(path) != found.st_ino:
            self.synchronise_directory(parent)
            if len(self._durable) >= _MOST_REMEMBERED:
                self._durable.clear()
            self._durable[path] = found.st_ino
        if made:
            self._set_mode(child)
        elif unsettled:
            with suppress(AccessDeniedError):  # it is another user's, who gives it its mode
                self._set_mode(child)

    def _set_mode(self, directory: int) -> None:
        """Undo the umask; a set-group-ID bit that the directory inherited stays."""
        if self.dir_mode is None:
            return
        mode = stat.S_IMODE(os.fstat(directory).st_mode)
        wanted = mode & stat.S_ISGID | self.dir_mode
        if mode != wanted:
            with self.translated(None, step="chmod"):
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
            return os.open(self.root, DIRECTORY)
        except NotADirectoryError as error:
            raise self._unavailable("is not a directory") from error

    def _unavailable(self, problem: str) -> BackendUnavailableError:
        return BackendUnavailableError(f"the root directory {str(self.root)!r} {problem}; is its disk mounted?")

    def _create_root(self) -> None:
        missing = [path for path in (self.root, *self.root.parents) if not path.exists()]
        for path in reversed(missing):
            with self.translated(None, step="mkdir"):
                try:
                    path.mkdir(0o777 if self.dir_mode is None else self.dir_mode, exist_ok=True)
                except FileNotFoundError as error:
                    raise BackendError(
                        f"the root directory {str(self.root)!r} cannot be made (mkdir of {str(path)!r}: {error.strerror}): "
                        "make it by hand, or choose a root_dir on a file system that lets directories be made"
                    ) from error
            if self.dir_mode is not None:
                with self.translated(None, step="chmod"):
                    path.chmod(self.dir_mode)
            with opened(path.parent) as parent:
                self.synchronise_directory(parent)

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
            # Another process that finds it empty appends an identity of its own, which must not be overwritten.
            marker = os.open(MARKER, CREATE | os.O_APPEND, 0o600, dir_fd=root)
            try:
                if self.file_mode is not None:
                    with self.translated(None, step="chmod"):
                        os.fchmod(marker, self.file_mode)
                os.write(marker, new_marker())
                self.synchronise(marker)
            finally:
                os.close(marker)
        self.synchronise_directory(root)


def _identities_of(root: int) -> tuple[str, ...]:
    marker = os.open(MARKER, READ, dir_fd=root)
    try:
        return identities_in(os.read(marker, MARKER_SIZE))
    finally:
        os.close(marker)


def _dated_now(directory: int) -> datetime:
    name = f"{RESERVED_PREFIX}{uuid7_hex()}{TEMPORARY_SUFFIX}"
    descriptor = os.open(name, CREATE, 0o600, dir_fd=directory)
    try:
        return datetime.fromtimestamp(os.fstat(descriptor).st_mtime, UTC)
    finally:
        os.close(descriptor)
        os.unlink(name, dir_fd=directory)


def _info_of_regular(location: str, found: os.stat_result) -> ObjectInfo:
    if not stat.S_ISREG(found.st_mode):
        raise ObjectNotFoundError(f"what is at {location!r} is not a regular file", location=location)
    return info_of(location, found)
