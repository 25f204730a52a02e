"""Going through all that lies below a directory: listing the objects, and removing what unfinished writes have left."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from granite_storage.backends._descriptors import DIRECTORY, NO_LINK, TEMPORARY_SUFFIX, info_of
from granite_storage.backends.base import ObjectInfo
from granite_storage.exceptions import InvalidLocationError
from granite_storage.locations import MAX_LOCATION_BYTES, RESERVED_PREFIX, check_location

__all__ = ["swept", "walked"]

_VANISHED = (FileNotFoundError, NotADirectoryError)
_SURELY_FITS = MAX_LOCATION_BYTES // 4  # characters, of four bytes each at the most


def walked(top: int, folder: str, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
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
            for path, name in entries:
                if path[-1] != "/":
                    if path > start_after and path.startswith(prefix):
                        try:
                            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
                        except FileNotFoundError:
                            continue
                        if stat.S_ISREG(found.st_mode):
                            yield info_of(path, found)
                # A directory sorts as its contents do, so `t-/x` comes before `t/x`.
                elif path.startswith(prefix) and (path > start_after or start_after.startswith(path)):
                    with suppress(*_VANISHED):
                        levels.append(_level(path, name, directory))
                        break
            else:
                levels.pop()
                if levels:
                    os.close(directory)
    finally:
        for directory, _ in levels[1:]:
            os.close(directory)


def swept(top: int, before: float) -> int:
    """Remove the temporary files below an open directory that were last written to before a time; return how many.

    The directories that this leaves empty go too. It goes depth first, with no call in another for each level: folders may be
    nested as deeply as a location is long.

    Args:
        top: The directory.
        before: The time, in seconds since the epoch.
    """
    removed, folders = _swept_files(top, before)
    levels = [_Level(top, "", MAX_LOCATION_BYTES, iter(folders), removed)]
    try:
        while True:
            level = levels[-1]
            name = next(level.folders, None)
            if name is not None:
                room = level.room - len(os.fsencode(name)) - 1  # deeper directories are none of ours
                if room > 0 and _is_segment(name):
                    with suppress(*_VANISHED):
                        levels.append(_opened_level(name, level.directory, room, before))
                continue
            levels.pop()
            if not levels:
                return level.removed
            os.close(level.directory)
            levels[-1].removed += level.removed
            if level.removed:
                with suppress(OSError):
                    os.rmdir(level.name, dir_fd=levels[-1].directory)
    finally:
        for level in levels[1:]:
            os.close(level.directory)


@dataclass(slots=True)
class _Level:
    """A directory that a sweep is in."""

    directory: int
    name: str
    room: int
    folders: Iterator[str]
    removed: int


def _opened_level(name: str, parent: int, room: int, before: float) -> _Level:
    directory = os.open(name, DIRECTORY | NO_LINK, dir_fd=parent)
    try:
        removed, folders = _swept_files(directory, before)
    except BaseException:
        os.close(directory)
        raise
    return _Level(directory, name, room, iter(folders), removed)


def _swept_files(directory: int, before: float) -> tuple[int, list[str]]:
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


def _level(path: str, name: str, parent: int) -> tuple[int, Iterator[tuple[str, str]]]:
    """Open a directory, and read it."""
    directory = os.open(name, DIRECTORY | NO_LINK, dir_fd=parent)
    try:
        return directory, iter(_entries(directory, path))
    except BaseException:
        os.close(directory)
        raise


def _entries(directory: int, folder: str) -> list[tuple[str, str]]:
    """Return the paths and names of what may be an object, or have some below, in order; a directory's path ends in a slash."""
    found = []
    with os.scandir(directory) as scanned:
        entries = list(scanned)
        names = {entry.name for entry in entries if not entry.name.isascii()}
        for entry in entries:
            name = entry.name if entry.name not in names else _composed(entry, directory, names)
            path = folder + name
            if not _is_segment(name) or (len(path) > _SURELY_FITS and len(os.fsencode(path)) > MAX_LOCATION_BYTES):
                continue
            if entry.is_dir(follow_symlinks=False):
                found.append((f"{path}/", name))
            elif entry.is_file(follow_symlinks=False):
                found.append((path, name))
    found.sort()
    return found


def _composed(entry: os.DirEntry[str], directory: int, names: set[str]) -> str:
    """Return the name by which a file was stored, where the file system lists another one for it.

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
    """Tell whether a name in a directory can be part of a location; others' files and our temporary ones may lie there too."""
    if name.isascii() and name[0] != ".":
        return name.isprintable() and "\\" not in name
    try:
        check_location(name)
    except InvalidLocationError:
        return False
    return True


def _is_temporary(name: str) -> bool:
    return name.startswith(RESERVED_PREFIX) and name.endswith(TEMPORARY_SUFFIX)
