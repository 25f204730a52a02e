"""Writing a file below a tree, atomically, exclusively and durably: blocking calls, for threads.

The order is: make the missing directories, and fsync each directory that got an entry; write the bytes to a temporary file
beside the target, and fsync it; give it its name by `link`, which fails where the name exists, or in another exclusive way where
a volume has no links; fsync the directory that holds the name. Without any of these steps a power loss can keep the row and lose
the file.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
from contextlib import ExitStack, suppress
from typing import Self

from granite_storage._telemetry import fields_of
from granite_storage.backends._local_tree import CREATE, MAX_ATTEMPTS, TEMPORARY_SUFFIX, Tree, temporary_stem
from granite_storage.exceptions import BackendError, BackendUnavailableError, ObjectNotFoundError

logger = logging.getLogger("granite_storage")

_WRITE_SIZE = 512 * 1024
"""In bytes. For a write of 1 MiB Linux may need that much memory in one piece, which took three times as long when measured."""


class AtomicFile:
    """A file that is written but does not have its name yet.

    Until then it has a temporary name, by which `Tree.abort` and a sweep find it after a crash.

    Args:
        tree: The tree that it is in.
        segments: The segments of its location; missing directories are made.

    Raises:
        FileNotFoundError: A deletion found a directory empty and pruned it before the next one or the file was in it.
    """

    def __init__(self, tree: Tree, segments: list[str]) -> None:
        self._tree = tree
        self._segments = segments
        self._location = "/".join(segments)
        self._published = False
        self._temporary: str | None = f"{temporary_stem(segments[-1])}-{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
        self._directory: int | None = tree.make_directory(segments[:-1])
        # Where permissions are the volume's to choose, they stay as they are.
        first_mode = 0o666 if tree.file_mode is None else 0o600
        try:
            self._descriptor: int | None = os.open(self._temporary, CREATE, first_mode, dir_fd=self._directory)
        except BaseException:
            os.close(self._directory)
            raise

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
        """Create an object in one visit."""
        file = cls.begin(tree, location)
        try:
            file.write(content)
            file.publish()
        except BaseException:
            try:
                file.discard()
            except BackendError:
                logger.exception("removing the unfinished file of %r failed", location, extra=fields_of(location=location))
            raise

    @property
    def descriptor(self) -> int:
        """The descriptor to write to."""
        if self._descriptor is None:
            raise ValueError("the file is closed")
        return self._descriptor

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
            if self._directory is not None:
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
        if self._temporary is None or self._directory is None:
            raise ValueError("the file is closed")
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
        if self._temporary is not None and self._directory is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._temporary, dir_fd=self._directory)
            self._temporary = None

    def _close(self) -> None:
        with ExitStack() as steps:
            for descriptor in (self._directory, self._descriptor):
                if descriptor is not None:
                    steps.callback(os.close, descriptor)
            self._descriptor = self._directory = None
