"""The file system's errors in the library's words."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    BackendUnavailableError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageFullError,
)

__all__ = ["UNSUPPORTED", "translated"]

_ERRORS: dict[int, tuple[type[BackendError], str]] = {
    errno.ENOENT: (ObjectNotFoundError, "there is no object"),
    errno.EEXIST: (ObjectExistsError, "there is something already"),
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

UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF})
"""How file systems say that they do not know a call."""

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
    """Turn the system's errors into the library's, which are no `OSError`.

    Args:
        location: What the call is about; None for the store as a whole.
        reading: Whether a part of the path that is no directory, or a link, means that there is no object.
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
    """Say who asked, and whose the root is."""
    running = f"the process runs as uid {os.geteuid()}"
    try:
        found = os.stat(root)
    except OSError:
        return running
    return f"{running}, and the root belongs to uid {found.st_uid} with mode {stat.S_IMODE(found.st_mode):#o}"
