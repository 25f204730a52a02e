"""The file system's errors in the library's words."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    BackendUnavailableError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageFullError,
)

__all__ = ["translated"]

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
