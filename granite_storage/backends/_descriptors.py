"""Opening what lies in a directory that is open already, and what is known of a file."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from granite_storage.backends.base import ObjectInfo
from granite_storage.locations import RESERVED_PREFIX

__all__ = ["CREATE", "DIRECTORY", "NO_LINK", "READ", "TEMPORARY_SUFFIX", "info_of", "opened", "temporary_stem"]

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


_STEM_DIGITS = 32


def temporary_stem(name: str) -> str:
    """Return how the names of all temporary files begin that are made for a file beside them.

    Some volumes tell neither case nor the composition of letters apart, so the names of one file there have one stem.
    """
    folded = unicodedata.normalize("NFC", name).casefold()
    return f"{RESERVED_PREFIX}{hashlib.sha256(folded.encode('utf-8', 'surrogatepass')).hexdigest()[:_STEM_DIGITS]}"


@contextmanager
def opened(path: str | Path, parent: int | None = None) -> Iterator[int]:
    """Open a directory: one in an open directory by its name there, and not through a link."""
    descriptor = os.open(path, DIRECTORY | (NO_LINK if parent is not None else 0), dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def info_of(location: str, found: os.stat_result) -> ObjectInfo:
    """Return what is known of an object by what the file system says of its file."""
    etag = f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"
    return ObjectInfo(location, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC), etag)
