"""The objects of a conversion: where they come from, and how they are stored and read back before a row refers to them."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import mimetypes
import os
import stat
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeAlias

from granite_storage._engine import require_content_type
from granite_storage._tasks import run_bounded, shielded, shielded_cleanup
from granite_storage.exceptions import ChecksumMismatchError, InvalidLocationError, ObjectNotFoundError, ScannerUnavailableError
from granite_storage.locations import check_location, check_segment, clean_filename, uuid7_hex
from granite_storage.manager import StorageManager
from granite_storage.refs import StoredObjectRef, canonical_timestamp, is_held

__all__ = [
    "CopyOf",
    "InPlace",
    "Place",
    "PlainPath",
    "Stored",
    "Work",
    "adopt",
    "all_or_none",
    "copy_content",
    "copy_object",
    "keep_if_readable",
    "read_whole",
    "remove",
    "store_bytes",
]

_HOW = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

# Storing the objects of some rows, each read back before its row may refer to it.


Work: TypeAlias = "Coroutine[Any, Any, Stored | None]"
"""Stores an object for a row; None where the row has none."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row's object goes.

    Attributes:
        storage_key: The policy.
        table: The table.
        primary_key: The row's primary key.
        column: The column of refs.
    """

    storage_key: str
    table: str
    primary_key: tuple[Any, ...]
    column: str

    def arguments(self) -> dict[str, Any]:
        """Return the arguments for the manager."""
        entity = "-".join(map(str, self.primary_key))
        try:
            check_segment(entity)
        except InvalidLocationError:
            entity = uuid7_hex()
        return {
            "storage_key": self.storage_key,
            "model_name": self.table,
            "entity_id": entity,
            "field_name": self.column,
        }


@dataclass(frozen=True, slots=True)
class Stored:
    """An object for a row; `is_own` where it was stored for the row, and not there before."""

    ref: StoredObjectRef
    is_own: bool = True


async def store_bytes(
    manager: StorageManager, place: Place, content: bytes, content_type: str | None, filename: str | None
) -> Stored:
    """Store content and read it back; nothing is left where it differs."""
    ref = await manager.put_bytes(**place.arguments(), content=content, content_type=content_type, original_filename=filename)
    return await _keep_if(manager, ref, _require_content(manager, ref, content))


async def read_whole(manager: StorageManager, ref: StoredObjectRef) -> None:
    """Read an object to its end, and raise unless its size and its checksum are those of its ref."""
    async with manager.open(ref, verify=True) as reader:
        async for _ in reader:
            pass


async def keep_if_readable(manager: StorageManager, ref: StoredObjectRef) -> Stored:
    """Read a new object to its end, and remove it where that fails."""
    return await _keep_if(manager, ref, read_whole(manager, ref))


async def remove(manager: StorageManager, ref: StoredObjectRef) -> None:
    """Remove an object that no row refers to; a failure is logged."""
    await shielded_cleanup(manager.delete(ref), f"deleting the object {ref.location!r}, which no row refers to")


@contextmanager
def naming(row: str) -> Iterator[None]:
    """Add a note with the row to an error of its conversion."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while converting {row}")
        raise


async def all_or_none(
    manager: StorageManager, works: Sequence[tuple[str, Callable[[], Work]]], concurrency: int
) -> list[Stored | None]:
    """Store all objects; where one fails, remove what the others have stored, and raise its error with the row in a note."""
    own: list[StoredObjectRef] = []

    async def store(labelled: tuple[str, Callable[[], Work]]) -> Stored | None:
        label, work = labelled
        with naming(label):
            stored = await work()
        if stored is not None and stored.is_own:
            own.append(stored.ref)
        return stored

    try:
        return await run_bounded(works, store, concurrency)
    except BaseException:
        await shielded_cleanup(_remove_all(manager, own), "removing the objects of a step that failed")
        raise


async def _remove_all(manager: StorageManager, refs: Sequence[StoredObjectRef]) -> None:
    for ref in refs:
        await remove(manager, ref)


async def _keep_if(manager: StorageManager, ref: StoredObjectRef, check: Coroutine[Any, Any, None]) -> Stored:
    try:
        await check
        if is_held(ref):
            raise ScannerUnavailableError(
                "the scanner of the policy could not scan a file, and a migration cannot hold files: run it again once the "
                "scanner is available"
            )
    except BaseException:
        await remove(manager, ref)
        raise
    return Stored(ref)


async def _require_content(manager: StorageManager, ref: StoredObjectRef, content: bytes) -> None:
    if await manager.get(ref) != content:
        raise ChecksumMismatchError(
            f"the object at {ref.location!r} does not contain the bytes that were stored there", expected=ref.checksum
        )


# What another library's path or URL leads to.


@dataclass(frozen=True, slots=True)
class InPlace:
    """An object in one of the manager's backends, which stays there.

    Attributes:
        backend: The backend's key in the manager.
        location: Its address there.
        content_type: Its media type; None for the backend's, or a guess by the name.
        filename: The name to keep, without path and control characters; None for the last part of the location.
    """

    backend: str
    location: str
    content_type: str | None = None
    filename: str | None = None

    @property
    def address(self) -> tuple[str, str]:
        """Backend and location."""
        return self.backend, self.location


@dataclass(frozen=True, slots=True)
class CopyOf:
    """Content from elsewhere, to be stored.

    Attributes:
        content: The bytes, the path of a file, or any stream that `put_stream` takes.
        content_type: Its media type; None for a guess by the name.
        filename: The name to keep; None for that of the file.
    """

    content: Any
    content_type: str | None = None
    filename: str | None = None


@dataclass(frozen=True, slots=True)
class PlainPath:
    """The mapping for columns of plain paths or keys, such as those of Django's `FileField`.

    A path without a valid location, such as one with `..`, is copied from `folder` if it is inside of it, and refused otherwise.
    An empty path means no file.

    Args:
        backend: The key of the backend that has the files.
        strip: The beginning of the paths that is not part of the location, such as `/media/` or `https://cdn.example.com/`.
        prefix: The beginning of the locations that is not part of the path.
        folder: The folder of the files on this machine, for those that cannot be adopted.

    Example:
        >>> source = PlainPath("local", strip="/media/", prefix="uploads/")
        >>> source("/media/2020/cat.png").location
        'uploads/2020/cat.png'
    """

    backend: str
    strip: str = ""
    prefix: str = ""
    folder: Path | str | None = None

    def __call__(self, path: Any) -> InPlace | CopyOf | None:
        """Return where a path leads."""
        if not path:
            return None
        rest = str(path).removeprefix(self.strip)
        location = f"{self.prefix}{rest}"
        try:
            check_location(location)
        except InvalidLocationError:
            return CopyOf(self._inside(rest))
        return InPlace(self.backend, location)

    def back(self, ref: StoredObjectRef) -> str:
        """Return the path of an adopted object, for `storage_to_paths`; that of any other is its location after `strip`."""
        return f"{self.strip}{ref.location.removeprefix(self.prefix)}"

    def _inside(self, rest: str) -> Path:
        if self.folder is None:
            raise InvalidLocationError(
                f"{rest[:120]!r} is not a valid location, and there is no folder to copy the file from: pass folder= to PlainPath"
            )
        if "\0" in rest:
            raise InvalidLocationError(f"{rest[:120]!r} has a NUL character, which is in no path")
        folder = Path(self.folder).resolve()
        found = (folder / rest).resolve()
        if not found.is_relative_to(folder):
            raise InvalidLocationError(
                f"{rest[:120]!r} leads out of the folder {str(folder)[:120]!r}: only files inside it are copied"
            )
        return found


async def adopt(manager: StorageManager, place: Place, item: InPlace) -> Stored:
    """Return a ref of an existing object, once it was read for its checksum."""
    return Stored(await _ref_of(manager, place, item), is_own=False)


async def copy_object(manager: StorageManager, place: Place, item: InPlace) -> Stored:
    """Copy an object that another row has."""
    ref = await manager.copy(await _ref_of(manager, place, item), **place.arguments())
    return await keep_if_readable(manager, ref)


async def copy_content(manager: StorageManager, place: Place, item: CopyOf) -> Stored:
    """Store content from elsewhere, and read it back."""
    filename = item.filename or (item.content.name if isinstance(item.content, Path) else None)
    content_type = item.content_type or await _guess_type(filename)
    ref = await _put(manager, place, item.content, content_type, filename)
    return await keep_if_readable(manager, ref)


async def _put(
    manager: StorageManager, place: Place, content: Any, content_type: str | None, filename: str | None
) -> StoredObjectRef:
    if isinstance(content, Path):
        opened = await shielded(asyncio.to_thread(_open_regular, content), undo=_close)
        try:
            return await _put(manager, place, opened, content_type, filename)
        finally:
            await shielded(_close(opened))
    prepared = manager._engine.prepare(**place.arguments(), content_type=content_type, original_filename=filename)
    return await manager._engine.put(prepared, content)


def _open_regular(path: Path) -> IO[bytes]:
    """Open a regular file; opening a named pipe would wait for a writer, and reading a device may never end."""
    irregular = ObjectNotFoundError(f"{str(path)[:200]!r} is not a regular file, so it cannot be stored")
    try:
        descriptor = os.open(path, _HOW)
    except OSError as error:
        if error.errno == errno.ENXIO:  # what a socket returns
            raise irregular from error
        if error.errno == errno.ENAMETOOLONG:
            raise ObjectNotFoundError(f"{str(path)[:200]!r} is longer than the name of any file") from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise irregular
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


async def _close(file: IO[bytes]) -> None:
    await asyncio.to_thread(file.close)


async def _ref_of(manager: StorageManager, place: Place, item: InPlace) -> StoredObjectRef:
    require_content_type(item.content_type)
    name = clean_filename(item.filename or item.location.rpartition("/")[2])
    found = StoredObjectRef(place.storage_key, item.backend, item.location, 0, "", original_filename=name)
    info = await manager.stat(found)
    content_type = item.content_type or info.content_type or await _guess_type(name)
    modified = canonical_timestamp(info.modified)
    found = replace(found, size=info.size, content_type=content_type, created_at=modified)
    found = replace(found, checksum=await _checksum(manager, found))
    return found.with_identity(await manager.identity(item.backend))


async def _checksum(manager: StorageManager, ref: StoredObjectRef) -> str:
    sha256 = hashlib.sha256()
    async with manager.open(ref) as reader:
        async for chunk in reader:
            await asyncio.to_thread(sha256.update, chunk)
    return f"sha256:{sha256.hexdigest()}"


async def _guess_type(filename: str | None) -> str | None:
    # The first guess reads the system's tables from disk.
    return None if filename is None else (await asyncio.to_thread(mimetypes.guess_type, filename))[0]
