"""Going through all that lies below a directory: listing the objects, and removing what unfinished writes have left."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress

from granite_storage.backends._descriptors import DIRECTORY, NO_LINK, TEMPORARY_SUFFIX, info_of, opened
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


def swept(directory: int, before: float, room: int = MAX_LOCATION_BYTES) -> int:
    """Remove the temporary files below an open directory that were last written to before a time; return how many.

    The directories that this leaves empty go too.

    Args:
        directory: The directory.
        before: The time, in seconds since the epoch.
        room: How many bytes a location below it may have: deeper directories are none of ours.
    """
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
            removed += _swept_folder(name, directory, before, left)
    return removed


def _swept_folder(name: str, parent: int, before: float, room: int) -> int:
    try:
        with opened(name, parent) as child:
            removed = swept(child, before, room)
    except _VANISHED:
        return 0
    if removed:
        with suppress(OSError):
            os.rmdir(name, dir_fd=parent)
    return removed


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
    with os.scandir(directory) as entries:
        for entry in entries:
            name = entry.name
            path = folder + name
            if not _is_segment(name) or (len(path) > _SURELY_FITS and len(os.fsencode(path)) > MAX_LOCATION_BYTES):
                continue
            if entry.is_dir(follow_symlinks=False):
                found.append((f"{path}/", name))
            elif entry.is_file(follow_symlinks=False):
                found.append((path, name))
    found.sort()
    return found


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
