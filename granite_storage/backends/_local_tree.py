"""Files below one directory, by descriptors: blocking calls, for threads.

Every path is walked from the root one segment at a time, relative to an open directory and without following links, so no name
and no link planted below the root leads out of it.

A file is written atomically, exclusively and durably, in this order: make the missing directories, and fsync each directory that
got an entry; write the bytes to a temporary file beside the target, and fsync it; give it its name by `link`, which fails where
the name exists, or in another exclusive way where a volume has no links; fsync the directory that holds the name. Without any of
these steps a power loss can keep the row and lose the file.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import logging
import os
import secrets
import stat
import time
import unicodedata
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Self

from granite_storage._telemetry import fields_of
from granite_storage.backends._identity import MARKER, MARKER_SIZE, identities_in, new_marker
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

logger = logging.getLogger("granite_storage")

DIRECTORY = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
"""How a directory is opened."""

NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""Lets nothing be opened through a link."""

CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_LINK | getattr(os, "O_CLOEXEC", 0)
"""How a file is made that is not there yet."""

READ = os.O_RDONLY | NO_LINK | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
"""How a file is opened that may be a device instead."""

TEMPORARY_SUFFIX = ".tmp"
"""How the name of an unfinished file ends."""

MAX_ATTEMPTS = 100
"""How often something is retried that another process may have undone meanwhile."""

UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF})
"""How file systems say that they do not know a call."""

REFUSED_LINKS = UNSUPPORTED | {errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV}
"""What `link` fails with where a volume has no hard links, or the system allows none of this file."""

_DESCRIPTORS = "/proc/self/fd"
_HAS_UNNAMED_FILES = hasattr(os, "O_TMPFILE") and os.path.isdir(_DESCRIPTORS)

_STEM_DIGITS = 32
_MAX_REMEMBERED = 10_000
_VANISHED = (FileNotFoundError, NotADirectoryError)
_SURELY_FITS = MAX_LOCATION_BYTES // 4  # characters, of four bytes each at the most
_Entry = tuple[str, str, os.DirEntry[str]]
"""What a directory has: its path, which ends in a slash where it is a directory itself, its name, and what the system lists."""

_path_of = itemgetter(0)
_WRITE_SIZE = 512 * 1024
"""In bytes. For a write of 1 MiB Linux may need that much memory in one piece, which took three times as long when measured."""
_RENAME_NOREPLACE = 1
_CLOSED = -1  # no descriptor, because the system reuses the number of a closed one
_CLAIM_ATTEMPTS = 200
_CLAIM_PAUSE = 0.01


def temporary_stem(name: str) -> str:
    """Return the beginning of the names of all temporary files for the file of a name.

    Some volumes tell neither case nor the composition of letters apart, so the names of one file there have one stem.
    """
    folded = unicodedata.normalize("NFC", name).casefold()
    return f"{RESERVED_PREFIX}{hashlib.sha256(folded.encode('utf-8', 'surrogatepass')).hexdigest()[:_STEM_DIGITS]}"


@contextmanager
def _opened(path: str | Path, flags: int, mode: int = 0o777, *, parent: int | None = None) -> Iterator[int]:
    descriptor = os.open(path, flags, mode, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_directory(path: str | Path, parent: int | None = None) -> AbstractContextManager[int]:
    """Open a directory, by its name in an open one if given, without following links."""
    return _opened(path, DIRECTORY | (NO_LINK if parent is not None else 0), parent=parent)


def _info_of(location: str, found: os.stat_result) -> ObjectInfo:
    """Return the properties of an object by what the file system says of its file."""
    etag = "%x-%x-%x" % (found.st_ino, found.st_mtime_ns, found.st_size)  # noqa: UP031  # half of the time of an f-string
    return ObjectInfo(location, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC), etag)


# Listing the objects below a directory, and removing the temporary files that unfinished writes have left.


def _walk(top: int, folder: str, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
    """Yield the regular files below an open directory whose location begins with `prefix`, in the byte order of UTF-8.

    It goes depth first: one generator for all levels, or each object would have to pass through one for each of them.

    Args:
        top: The directory.
        folder: Its own location, which is empty for the root and else ends in a slash.
        prefix: What locations begin with.
        start_after: The location after which it begins.
    """
    levels = [(top, iter(_entries(top, folder)))]
    try:
        while levels:
            directory, entries = levels[-1]
            for path, name, entry in entries:
                if path[-1] != "/":
                    if path > start_after and path.startswith(prefix):
                        try:
                            found = entry.stat(follow_symlinks=False)  # relative to the open directory
                        except FileNotFoundError:
                            continue
                        if stat.S_ISREG(found.st_mode):
                            yield _info_of(path, found)
                # A directory sorts as its contents do, so `t-/x` comes before `t/x`.
                elif path.startswith(prefix) and (path > start_after or start_after.startswith(path)):
                    try:
                        levels.append(_open_walk_level(path, name, directory))
                    except _VANISHED:
                        continue
                    break
            else:
                levels.pop()
                if levels:
                    os.close(directory)
    finally:
        for directory, _ in levels[1:]:
            os.close(directory)


def _sweep(directory: int, room: int, before: float) -> int:
    """Remove the temporary files below an open directory that were last written to before a time; return how many.

    The directories that this leaves empty go too.

    Args:
        directory: The directory.
        room: How long a path in it may be, in bytes; so at most 512 directories are open, each in a call of its own.
        before: The time, in seconds since the epoch.
    """
    removed, folders = _sweep_files(directory, before)
    for name in folders:
        left = room - len(os.fsencode(name)) - 1  # deeper directories are none of ours
        if left > 0 and _is_segment(name):
            found = 0
            with suppress(*_VANISHED), _open_directory(name, directory) as folder:
                found = _sweep(folder, left, before)
            if found:
                removed += found
                with suppress(OSError):
                    os.rmdir(name, dir_fd=directory)
    return removed


def _sweep_files(directory: int, before: float) -> tuple[int, list[str]]:
    """Remove what is old in a directory itself; return how many files that were, and which directories are in it."""
    removed, folders = 0, list[str]()
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            elif _is_temporary(entry.name):
                with suppress(FileNotFoundError):
                    if os.stat(entry.name, dir_fd=directory, follow_symlinks=False).st_mtime < before:
                        os.unlink(entry.name, dir_fd=directory)
                        removed += 1
    return removed, folders


def _open_walk_level(path: str, name: str, parent: int) -> tuple[int, Iterator[_Entry]]:
    """Open a directory, and read it."""
    directory = os.open(name, DIRECTORY | NO_LINK, dir_fd=parent)
    try:
        return directory, iter(_entries(directory, path))
    except BaseException:
        os.close(directory)
        raise


def _entries(directory: int, folder: str) -> list[_Entry]:
    """Return what may be an object, or have some below, in order."""
    found: list[_Entry] = []
    with os.scandir(directory) as scanned:
        entries = list(scanned)
    names: set[str] | None = None
    for entry in entries:
        name = entry.name
        if not name.isascii():
            if names is None:
                names = {other.name for other in entries if not other.name.isascii()}
            name = _compose_name(entry, directory, names)
        path = folder + name
        if not _is_segment(name) or (len(path) > _SURELY_FITS and len(os.fsencode(path)) > MAX_LOCATION_BYTES):
            continue
        if entry.is_file(follow_symlinks=False):
            found.append((path, name, entry))
        elif entry.is_dir(follow_symlinks=False):
            found.append((f"{path}/", name, entry))
    found.sort(key=_path_of)  # entries cannot be compared, and a name may be listed twice while its directory changes
    return found


def _compose_name(entry: os.DirEntry[str], directory: int, names: set[str]) -> str:
    """Return the name by which a file was stored, if the file system lists it in another Unicode form.

    HFS+, and what a Mac shares, decompose letters: `é` is listed as `e` and U+0301, and found under either spelling.
    """
    composed = unicodedata.normalize("NFC", entry.name)
    if composed in names:  # nothing to compose, or both spellings are files of their own
        return entry.name
    try:
        found = os.stat(composed, dir_fd=directory, follow_symlinks=False)
    except OSError:
        return entry.name
    return composed if found.st_ino == entry.inode() else entry.name


def _is_segment(name: str) -> bool:
    """Return whether a name in a directory can be part of a location; others' files and our temporary ones may lie there too."""
    if name.isascii() and name[0] != ".":
        return name.isprintable() and "\\" not in name
    try:
        check_location(name)
    except InvalidLocationError:
        return False
    return True


def _is_temporary(name: str) -> bool:
    return name.startswith(RESERVED_PREFIX) and name.endswith(TEMPORARY_SUFFIX)


# The errors of the file system, translated.

_ERRORS: dict[int, tuple[type[BackendError], str]] = {
    errno.ENOENT: (ObjectNotFoundError, "no object exists"),
    errno.EEXIST: (ObjectExistsError, "something already exists"),
    errno.EACCES: (AccessDeniedError, "the file system refused permission"),
    errno.EPERM: (AccessDeniedError, "the file system refused permission"),
    errno.EROFS: (AccessDeniedError, "the file system is read-only"),
    errno.ENOSPC: (StorageFullError, "the disk is full"),
    errno.EDQUOT: (StorageFullError, "the disk quota is used up"),
    errno.EFBIG: (StorageFullError, "the file is larger than the system allows"),
    errno.EMFILE: (BackendUnavailableError, "the process has too many open files"),
    errno.ENFILE: (BackendUnavailableError, "the system has too many open files"),
    errno.ESTALE: (BackendUnavailableError, "the network file system lost the file"),
    errno.ETIMEDOUT: (BackendUnavailableError, "the network file system did not answer"),
}
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG})

_STEPS: dict[str, tuple[str, frozenset[int], str]] = {
    "chmod": (
        "its permissions could not be set (chmod)",
        UNSUPPORTED | {errno.EPERM, errno.EACCES},
        "give file_mode=None and dir_mode=None where a volume keeps no permissions of its own",
    ),
    "fsync": (
        "it could not be written through to the disk (fsync)",
        UNSUPPORTED,
        "give fsync=False where a volume cannot do that; a power loss may then lose or empty an object",
    ),
    "link": ("the finished file could not be given its name (link, renameat2 and rename)", frozenset(), ""),
    "mkdir": ("the directory could not be made (mkdir)", frozenset(), ""),
}
"""For each step that is named in messages: its words, and what to advise at which errors."""


@contextmanager
def translated(
    location: str | None, *, reading: bool = False, root: Path | None = None, step: str | None = None
) -> Iterator[None]:
    """Convert errors of the system to the library's, which are not `OSError`s.

    Args:
        location: What the call is about; None for the store as a whole.
        reading: Whether a part of the path that is not a directory, or a link, means that there is no object.
        root: The root directory, for the message; its owner is looked up, so not on an event loop.
        step: One of the steps that messages tell apart: `chmod`, `fsync`, `link` or `mkdir`.
    """
    try:
        yield
    except OSError as error:
        code = errno.ENOENT if reading and error.errno in _NOT_THERE else error.errno
        kind, words = _ERRORS.get(code or 0, (BackendError, "the file system failed"))
        where = "" if location is None else f" at {location!r}"
        below = "" if root is None else f" below {str(root)!r}"
        doing, advised, advice = _STEPS[step] if step else ("", frozenset[int](), "")
        message = f"{words}{where}{below}: {doing}{': ' if doing else ''}{error.strerror}"
        if kind is AccessDeniedError and root is not None:
            message += f"; {_parties(root)}"
        if code in advised:
            message += f"; {advice}"
        raise kind(message, location=location) from error


def _parties(root: Path) -> str:
    """Return the user of the process and the owner of the root, for a message."""
    running = f"the process runs as uid {os.geteuid()}"
    try:
        found = os.stat(root)
    except OSError:
        return running
    return f"{running}, and the root belongs to uid {found.st_uid} with mode {stat.S_IMODE(found.st_mode):#o}"


class Tree:
    """The directory below which a local backend keeps its objects.

    Args:
        root: The directory.
        fsync: Whether a write waits for the disk.
        file_mode: The permissions of a file, set whatever the umask; None leaves them as the system makes them.
        dir_mode: The permissions of a directory made here, set whatever the umask; None leaves them, too.
        create_root: Whether a root that is missing or was never used is made, or taken into use, by the first write.

    Attributes:
        names: Gives finished files their names.
        unnamed: Whether a file that is written at once may have no temporary name; off once the file system has refused it.
    """

    def __init__(self, root: Path, *, fsync: bool, file_mode: int | None, dir_mode: int | None, create_root: bool) -> None:
        self.root = root
        self.fsync = fsync
        self.file_mode = file_mode
        self.dir_mode = dir_mode
        self.create_root = create_root
        self.names = ExclusiveNames()
        self.unnamed: bool = not fsync and _HAS_UNNAMED_FILES
        self._known_root: tuple[int, int] | None = None
        self._identified: tuple[tuple[int, int] | None, tuple[str, ...]] = None, ()
        self._durable: dict[str, int] = {}
        self._syncs_directories = True

    def translated(self, location: str | None, *, reading: bool = False, step: str | None = None) -> AbstractContextManager[None]:
        """Convert errors of the system to the library's, which name the root; see `translated`."""
        return translated(location, reading=reading, root=self.root, step=step)

    def is_mounted(self) -> bool:
        """Return whether the root is there and was used before; an unmounted disk shows an empty directory instead."""
        try:
            with self.translated(None, reading=True), _open_directory(self.root) as root:
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
            with translated(None, reading=True), _open_directory(self.root) as root:
                return _identities_of(root)
        except ObjectNotFoundError:
            return ()

    def identify(self) -> tuple[str, ...]:
        """Return the identities that the marker holds; write the marker, and one into it, where there is none."""
        with translated(None), self._directory([], writing=True) as root:
            self._mark(root)  # again, because it was removed since
            found = _identities_of(root) or self._add_identity(root)
            self._identified = self._known_root, found
        return found

    def _add_identity(self, root: int) -> tuple[str, ...]:
        """Give a root an identity whose marker was made by hand, or by a version that knew none.

        Several processes may do so at the same time: each appends, and for all of them the first line counts.
        """
        with _opened(MARKER, os.O_WRONLY | os.O_APPEND | NO_LINK, parent=root) as marker:
            os.write(marker, b"\n" + new_marker())
            self.synchronise(marker)
        return _identities_of(root)

    def now(self) -> datetime:
        """Return the time by which the file system dates what is written now, or the machine's where nothing can be written."""
        try:
            with NamedTemporaryFile(prefix=RESERVED_PREFIX, suffix=TEMPORARY_SUFFIX, dir=self.root) as file:
                return datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, UTC)
        except OSError:
            return datetime.now(UTC)

    def open(self, location: str) -> tuple[int, ObjectInfo]:
        """Open a regular file for reading; a link, a directory or a device is not an object."""
        *folder, name = location.split("/")
        with self.translated(location, reading=True), self._directory(folder) as directory:
            descriptor = os.open(name, READ, dir_fd=directory)
            try:
                return descriptor, _info_of_regular(location, os.fstat(descriptor))
            except BaseException:
                os.close(descriptor)
                raise

    def stat(self, location: str) -> ObjectInfo:
        """Return what is known of a regular file."""
        *folder, name = location.split("/")
        with self.translated(location, reading=True), self._directory(folder) as directory:
            return _info_of_regular(location, os.stat(name, dir_fd=directory, follow_symlinks=False))

    def exists(self, location: str) -> bool:
        """Return whether there is a regular file."""
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

    def walk(self, prefix: str, start_after: str | None) -> Generator[ObjectInfo, None, None]:
        """Yield the regular files whose location begins with `prefix`, in the byte order of UTF-8."""
        folder, slash, _ = prefix.rpartition("/")
        with self._directory_if_any(folder + slash) as directory:
            if directory is not None:
                yield from _walk(directory, folder + slash, prefix, start_after or "")

    def sweep(self, older_than: float) -> int:
        """Remove the temporary files that were last written to more than `older_than` seconds ago; return how many.

        The directories that this leaves empty go too.
        """
        with self._directory_if_any("") as root:
            return 0 if root is None else _sweep(root, MAX_LOCATION_BYTES, time.time() - older_than)

    def synchronise(self, file: int, location: str | None = None) -> None:
        """Wait until a file is on the disk, where that is wanted."""
        if self.fsync:
            with self.translated(location, step="fsync"):
                os.fsync(file)

    def synchronise_directory(self, directory: int, location: str | None = None) -> None:
        """Wait until a directory's entries are on the disk, where that is wanted and the file system has a way to.

        Some volumes cannot do it for directories, only for files: what they promise of names is then up to them, as for every
        other program. PostgreSQL continues there as well.
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
                    "the file system of %r does not support fsync of directories (%s): files are synchronized, but a power "
                    "loss may lose the names of the newest; pass fsync=False to accept that without this warning",
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
    def _directory(self, segments: Sequence[str], *, writing: bool = False) -> Iterator[int]:
        descriptor = self._open_root(writing=writing)
        try:
            for segment in segments:
                child = os.open(segment, DIRECTORY | NO_LINK, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = child
            yield descriptor
        finally:
            os.close(descriptor)

    def make_directory(self, segments: Sequence[str]) -> int:
        """Open a directory, and make it and its parents where they are missing; their entries are on the disk afterwards."""
        descriptor = self._open_root(writing=True)
        path = ""
        for segment in segments:
            path = f"{path}/{segment}"
            try:
                child, made = self._open_or_make(segment, descriptor)
                try:
                    self._settle(path, child, descriptor, made)
                except BaseException:
                    os.close(child)
                    raise
            finally:
                os.close(descriptor)
            descriptor = child
        return descriptor

    def _open_or_make(self, segment: str, parent: int) -> tuple[int, bool]:
        made = False
        for _ in range(MAX_ATTEMPTS):
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
        """Sync the entry of a directory, unless this process has seen it there, and give a new one its mode.

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
            if len(self._durable) >= _MAX_REMEMBERED:
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
        return BackendUnavailableError(f"the root directory {str(self.root)!r} {problem}: check whether its disk is mounted")

    def _create_root(self) -> None:
        missing = [path for path in (self.root, *self.root.parents) if not path.exists()]
        for path in reversed(missing):
            with self.translated(None, step="mkdir"):
                try:
                    path.mkdir(0o777 if self.dir_mode is None else self.dir_mode, exist_ok=True)
                except FileNotFoundError as error:
                    raise BackendError(
                        f"the root directory {str(self.root)!r} cannot be created (mkdir of {str(path)!r}: {error.strerror}): "
                        "create it by hand, or choose a root_dir on a file system that allows directories to be created"
                    ) from error
            if self.dir_mode is not None:
                with self.translated(None, step="chmod"):
                    path.chmod(self.dir_mode)
            with _open_directory(path.parent) as parent:
                self.synchronise_directory(parent)

    def _recognise(self, descriptor: int, writing: bool) -> None:
        """Refuse a root that was replaced, or that may be the mount point of a disk that is not mounted."""
        found = os.fstat(descriptor)
        identity = (found.st_dev, found.st_ino)
        if identity == self._known_root:
            return
        try:
            os.stat(MARKER, dir_fd=descriptor, follow_symlinks=False)
        except FileNotFoundError as error:
            if self._known_root not in {None, identity}:
                raise self._unavailable("was replaced by another directory") from error
            if not self.create_root and os.stat("..", dir_fd=descriptor).st_dev == found.st_dev:
                raise self._unavailable(f"is not a mount point and has no marker file {MARKER!r}") from error
            if not writing:
                return
            self._mark(descriptor)
        self._known_root = identity

    def _mark(self, root: int) -> None:
        # Another process that finds it empty appends an identity of its own, which must not be overwritten.
        with suppress(FileExistsError), _opened(MARKER, CREATE | os.O_APPEND, 0o600, parent=root) as marker:
            if self.file_mode is not None:
                with self.translated(None, step="chmod"):
                    os.fchmod(marker, self.file_mode)
            os.write(marker, new_marker())
            self.synchronise(marker)
        self.synchronise_directory(root)


def _identities_of(root: int) -> tuple[str, ...]:
    with _opened(MARKER, READ, parent=root) as marker:
        return identities_in(os.read(marker, MARKER_SIZE))


def _info_of_regular(location: str, found: os.stat_result) -> ObjectInfo:
    if not stat.S_ISREG(found.st_mode):
        raise ObjectNotFoundError(f"{location!r} is not a regular file", location=location)
    return _info_of(location, found)


# Writing a file.


class _TemporaryNameNeededError(Exception):
    """A file without a temporary name cannot be given its name."""


class AtomicFile:
    """A file that is written but does not have its name yet.

    Until then it has a temporary name, by which `Tree.abort` and a sweep find it after a crash, or none at all.

    Args:
        tree: The tree that it is in.
        segments: The segments of its location; missing directories are made.
        unnamed: Whether it has no temporary name. The directory may then be pruned meanwhile, since it looks empty.

    Attributes:
        descriptor: The descriptor to write to.

    Raises:
        FileNotFoundError: A deletion found a directory empty and pruned it before the next one or the file was in it.
    """

    def __init__(self, tree: Tree, segments: list[str], *, unnamed: bool = False) -> None:
        self._tree = tree
        self._segments = segments
        self._location = "/".join(segments)
        self._unnamed = unnamed
        self._published = False
        self._temporary: str | None = None
        path, flags = ".", os.O_WRONLY | getattr(os, "O_TMPFILE", 0) | getattr(os, "O_CLOEXEC", 0)
        if not unnamed:
            path = self._temporary = f"{temporary_stem(segments[-1])}-{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
            flags = CREATE
        # Where permissions are the volume's to choose, they stay as they are.
        first_mode = 0o666 if tree.file_mode is None else 0o600
        with ExitStack() as opened:
            self._directory = tree.make_directory(segments[:-1])
            opened.callback(os.close, self._directory)
            self.descriptor = os.open(path, flags, first_mode, dir_fd=self._directory)
            opened.callback(os.close, self.descriptor)
            self._opened = opened.pop_all()

    @classmethod
    def begin(cls, tree: Tree, location: str) -> Self:
        """Make a temporary file beside the target, in directories made as needed."""
        segments = location.split("/")
        missing: OSError | None = None
        with tree.translated(location):
            for _ in range(MAX_ATTEMPTS):
                try:
                    return cls(tree, segments)
                except FileNotFoundError as error:
                    missing = error
                except BaseException:
                    tree.prune(segments[:-1])
                    raise
        raise BackendUnavailableError(
            f"no file can be created for {location!r} below {str(tree.root)!r}: its directory was missing {MAX_ATTEMPTS} times "
            "in a row; either another program removes it each time, or the file system does not allow directories or files to "
            "be created there",
            location=location,
        ) from missing

    @classmethod
    def create(cls, tree: Tree, location: str, content: bytes) -> None:
        """Create an object in one visit to a thread.

        Without fsync the file has no temporary name where the system can do that: the directory is changed once instead of three
        times, which took a third off the processor's time for an object of 4 KiB.
        """
        if tree.unnamed:
            try:
                file = cls(tree, location.split("/"), unnamed=True)
            except (OSError, BackendError) as error:  # A file with a name tells what is wrong, if anything is.
                tree.unnamed = getattr(error, "errno", None) not in UNSUPPORTED | {errno.EISDIR}
            else:
                with suppress(_TemporaryNameNeededError):
                    file._finish(content)
                    return
        cls.begin(tree, location)._finish(content)

    def _finish(self, content: bytes) -> None:
        try:
            self.write(content)
            self.publish()
        except BaseException:
            try:
                self.discard()
            except BackendError:
                fields = fields_of(location=self._location)
                logger.exception("removing the unfinished file of %r failed", self._location, extra=fields)
            raise

    def write(self, content: bytes) -> None:
        """Add bytes."""
        with self._tree.translated(self._location):
            view = memoryview(content)
            while view:
                view = view[os.write(self.descriptor, view[:_WRITE_SIZE]) :]

    def write_several(self, chunks: list[bytes]) -> None:
        """Add bytes that are in several pieces, by one call of the system."""
        with self._tree.translated(self._location):
            written = os.writev(self.descriptor, chunks)
        if written < sum(map(len, chunks)):
            self.write(b"".join(chunks)[written:])

    def publish(self) -> None:
        """Give the file its name; fail where the name exists."""
        with self._tree.translated(self._location):
            self._set_mode()
            self._tree.synchronise(self.descriptor, self._location)
            self._give_name(self._segments[-1])
            self._published = True
            self._remove_temporary()
            self._tree.synchronise_directory(self._directory, self._location)
            self._close()

    def _set_mode(self) -> None:
        """Set the permissions, whatever the umask; a volume that refuses that may have the right ones all the same."""
        mode = self._tree.file_mode
        if mode is None:
            return
        with self._tree.translated(self._location, step="chmod"):
            try:
                os.fchmod(self.descriptor, mode)
            except OSError:
                if stat.S_IMODE(os.fstat(self.descriptor).st_mode) != mode:
                    raise

    def _give_name(self, name: str) -> None:
        if self._temporary is None:
            if not self._unnamed:
                raise ValueError("the file already has a name")
            self._link_unnamed(name)
            return
        try:
            with self._tree.translated(self._location, step="link"):
                if self._tree.names.give(self._temporary, name, self._directory):
                    self._temporary = None
        except ObjectNotFoundError as error:
            message = f"the temporary file of {self._location!r} was removed while it was written, by another program"
            raise BackendUnavailableError(message, location=self._location) from error.__cause__
        except BackendUnavailableError as error:
            error.location = self._location
            raise

    def _link_unnamed(self, name: str) -> None:
        try:
            os.link(f"{_DESCRIPTORS}/{self.descriptor}", name, dst_dir_fd=self._directory)
        except OSError as error:
            if error.errno in REFUSED_LINKS:
                self._tree.unnamed = False
            elif error.errno != errno.ENOENT:  # as it is where the directory was pruned meanwhile
                raise
            raise _TemporaryNameNeededError from error

    def discard(self) -> None:
        """Remove the file, also where it is published: no caller has a receipt of it yet."""
        with self._tree.translated(self._location), ExitStack() as steps:
            steps.callback(self._tree.prune, self._segments[:-1])
            steps.callback(self._close)
            steps.callback(self._remove_temporary)
            if self._published:
                steps.callback(self._tree.delete, self._location)
            self._published = False

    def _remove_temporary(self) -> None:
        if self._temporary is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._temporary, dir_fd=self._directory)
            self._temporary = None

    def _close(self) -> None:
        self._directory = self.descriptor = _CLOSED
        self._opened.close()


# Giving a finished file its name, exclusively, on whatever file system.
#
# `link` fails where the name exists, and so does `renameat2` with `RENAME_NOREPLACE`. Volumes that know neither (exFAT,
# many FUSE and network mounts) have exclusive creation at least: there a writer claims the name by a file beside it, and
# renames meanwhile.

Way = Callable[[str, str, int], None]


class ExclusiveNames:
    """Names files in the first of three ways that the file system supports, and remembers which one."""

    def __init__(self) -> None:
        self._ways: list[Way] = [_link, _rename, _claim]

    def give(self, temporary: str, name: str, directory: int) -> bool:
        """Give a file its name beside its temporary one; return whether the temporary name is gone.

        Raises:
            FileExistsError: Something has the name.
            FileNotFoundError: The temporary file is not there.
            BackendUnavailableError: Another writer has claimed the name and neither used nor released it.
        """
        ways = self._ways
        for position, way in enumerate(ways, 1):
            try:
                way(temporary, name, directory)
            except OSError as error:
                if error.errno not in REFUSED_LINKS or position == len(ways):
                    raise
            else:
                self._ways = ways[position - 1 :]
                return way is not _link
        raise AssertionError("unreachable: the last way to name a file returns or raises")


def _link(temporary: str, name: str, directory: int) -> None:
    os.link(temporary, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)


def _rename(temporary: str, name: str, directory: int) -> None:
    function = _renameat2()
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), name)
    if function(directory, os.fsencode(temporary), directory, os.fsencode(name), _RENAME_NOREPLACE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)


@functools.cache
def _renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    """Return the C library's function, None where it has none; Python has no name for it."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    function.restype = ctypes.c_int
    found: Callable[[int, bytes, int, bytes, int], int] = function
    return found


def _claim(temporary: str, name: str, directory: int) -> None:
    """Rename while a file beside it, which only one writer can create, holds the name; a sweep finds one that a crash left."""
    claim = f"{temporary_stem(name)}{TEMPORARY_SUFFIX}"
    _take(claim, name, directory)
    try:
        # unlike a look-up, which a network volume may answer from its memory, mkdir fails where anything has the name
        os.mkdir(name, 0o700, dir_fd=directory)
        os.rmdir(name, dir_fd=directory)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    finally:
        try:
            os.unlink(claim, dir_fd=directory)
        except OSError:
            logger.warning("the claim %r of a write could not be removed; cleanup_incomplete removes it later", claim)


def _take(claim: str, name: str, directory: int) -> None:
    for _ in range(_CLAIM_ATTEMPTS):
        try:
            os.close(os.open(claim, CREATE, 0o600, dir_fd=directory))
        except FileExistsError:
            time.sleep(_CLAIM_PAUSE)
        else:
            return
    raise BackendUnavailableError(
        f"another write of the name {name!r} has been in progress for {_CLAIM_ATTEMPTS * _CLAIM_PAUSE:g} s, or was killed: "
        "cleanup_incomplete removes what a killed write left"
    )
