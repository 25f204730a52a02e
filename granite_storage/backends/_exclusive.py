"""Giving a finished file its name, exclusively, on whatever file system: blocking calls, for threads.

`link` fails where the name exists, and so does `renameat2` with `RENAME_NOREPLACE`. Volumes that know neither (exFAT, many FUSE
and network mounts) have exclusive creation at least: there a writer claims the name by a file beside it, and renames meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import logging
import os
import time
import unicodedata
from collections.abc import Callable

from granite_storage.backends._descriptors import CREATE, TEMPORARY_SUFFIX
from granite_storage.backends._tree_errors import UNSUPPORTED
from granite_storage.exceptions import BackendUnavailableError
from granite_storage.locations import RESERVED_PREFIX

__all__ = ["REFUSED_LINKS", "ExclusiveNames"]

logger = logging.getLogger("granite_storage")

REFUSED_LINKS = UNSUPPORTED | {errno.EPERM, errno.EACCES, errno.EMLINK, errno.EXDEV}
"""What `link` fails with where a volume has no hard links, or the system allows none of this file."""

_RENAME_NOREPLACE = 1
_CLAIM_ATTEMPTS = 200
_CLAIM_PAUSE = 0.01

Way = Callable[[str, str, int], None]


class ExclusiveNames:
    """Names files in the first of three ways that a file system knows, and remembers which."""

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
        raise AssertionError("the last way returns or raises")


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
    folded = unicodedata.normalize("NFC", name).casefold()  # such volumes often do not tell case or composition apart
    claim = f"{RESERVED_PREFIX}{hashlib.sha256(folded.encode()).hexdigest()[:32]}{TEMPORARY_SUFFIX}"
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
            logger.warning("the claim %r of a write could not be removed; abort_unfinished removes it later", claim)


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
        "abort_unfinished removes what it left"
    )
