"""How a file comes to be below a tree: all at once, exclusively, and on the disk: blocking calls, for threads.

In this order: the directories it needs are made, and each directory that got an entry is synchronised; its bytes are written to a
temporary file beside the target and synchronised; the name is made by `link`, which fails where the name exists; the directory
that holds the name is synchronised. Leave out any step, and a power loss can keep the row and lose the file.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
from contextlib import ExitStack, suppress

from granite_storage.backends._descriptors import CREATE, TEMPORARY_SUFFIX, temporary_stem
from granite_storage.backends._tree import MOST_ATTEMPTS, Tree
from granite_storage.backends._tree_errors import translated
from granite_storage.exceptions import BackendError, BackendUnavailableError

__all__ = ["Draft", "FileWriter"]

logger = logging.getLogger("granite_storage")

_WRITTEN_AT_A_TIME = 512 * 1024
"""In bytes. For a write of 1 MiB Linux may look for that much memory in one piece, which was measured to take thrice as long."""

_DESCRIPTORS = "/proc/self/fd"
_HAS_UNNAMED_FILES = hasattr(os, "O_TMPFILE") and os.path.isdir(_DESCRIPTORS)
_NO_UNNAMED_FILES = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL})


class FileWriter:
    """Makes files below a tree.

    Args:
        tree: Where.

    Attributes:
        tree: The same.
        unnamed: Whether an unfinished file may have no name at all; off as soon as the file system says that it cannot.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.unnamed: bool = not tree.fsync and _HAS_UNNAMED_FILES

    def begin(self, location: str) -> Draft:
        """Make a temporary file beside the target, in directories made as needed."""
        segments = location.split("/")
        with translated(location):
            for _ in range(MOST_ATTEMPTS):
                try:
                    return self._begin(segments)
                except FileNotFoundError:
                    # A deletion found a directory empty and pruned it before the next one or the file was in it.
                    continue
                except BaseException:
                    self.tree.prune(segments[:-1])
                    raise
        raise BackendUnavailableError(f"the directory of {location!r} was removed again and again", location=location)

    def _begin(self, segments: list[str]) -> Draft:
        directory = self.tree.make_directory(segments[:-1])
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


class Draft:
    """A file that is written but does not have its name yet.

    Until then it has a temporary name, by which `Tree.abort` and a sweep find it after a crash; or none at all where the system
    can do that and a write does not wait for the disk: one change of the directory instead of three. A directory that holds only
    a file without a name looks empty, so it may be pruned, and is made again.

    Args:
        writer: Who makes it.
        segments: The segments of its location.
        directory: The open directory that will hold it; closed by `publish` or `discard`.

    Raises:
        FileNotFoundError: The directory was removed meanwhile.
    """

    def __init__(self, writer: FileWriter, segments: list[str], directory: int) -> None:
        self._writer = writer
        self._tree = writer.tree
        self._segments = segments
        self._location = "/".join(segments)
        self._temporary: str | None = None
        self._published = False
        self._file: int | None = self._open_unnamed(directory) if writer.unnamed else None
        if self._file is None:
            self._temporary = f"{temporary_stem(segments[-1])}-{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
            self._file = os.open(self._temporary, CREATE, 0o600, dir_fd=directory)
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
            self._writer.unnamed = False
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
                view = view[os.write(self.file, view[:_WRITTEN_AT_A_TIME]) :]

    def write_several(self, chunks: list[bytes]) -> None:
        """Add bytes that are in several pieces, by one call of the system."""
        with translated(self._location):
            written = os.writev(self.file, chunks)
        if written < sum(map(len, chunks)):
            self.write(b"".join(chunks)[written:])

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
        for _ in range(MOST_ATTEMPTS):
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
