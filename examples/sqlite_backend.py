"""A complete custom backend: objects in one SQLite file.

`docs/backends.md` explains it, and `tests/docs/test_sqlite_backend.py` runs the public
conformance suite on it.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeAlias, TypeVar

from granite_storage import BackendUnavailableError, ObjectInfo, ObjectNotFoundError
from granite_storage.backends.base import byte_range
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    ObjectExistsError,
    StorageFullError,
)
from granite_storage.locations import check_location

T = TypeVar("T")
Runner: TypeAlias = Callable[[str, Callable[[sqlite3.Connection], Any]], Awaitable[Any]]

SCHEMA = """
CREATE TABLE IF NOT EXISTS chunk (
    upload TEXT NOT NULL, start INTEGER NOT NULL, created REAL NOT NULL,
    data BLOB NOT NULL, PRIMARY KEY (upload, start)
);
CREATE TABLE IF NOT EXISTS object (
    location TEXT PRIMARY KEY, upload TEXT NOT NULL UNIQUE, size INTEGER NOT NULL,
    modified REAL NOT NULL, content_type TEXT
);
"""
ERRORS: dict[int, type[BackendError]] = {
    sqlite3.SQLITE_FULL: StorageFullError,
    sqlite3.SQLITE_PERM: AccessDeniedError,
    sqlite3.SQLITE_READONLY: AccessDeniedError,
    sqlite3.SQLITE_BUSY: BackendUnavailableError,
    sqlite3.SQLITE_CANTOPEN: BackendUnavailableError,
}


# begin: thread
class Database:
    """A connection, and the one thread that uses it.

    Work runs in the order in which it is submitted, each piece in its own transaction.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite-storage")

    def submit(
        self, location: str, work: Callable[[sqlite3.Connection], T]
    ) -> Future[T]:
        return self._thread.submit(self._transact, location, work)

    def close(self) -> Future[None]:
        closing = self._thread.submit(self._disconnect)
        self._thread.shutdown(wait=False)
        return closing

    def _transact(self, location: str, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            if self._connection is None:
                self._connection = connect(self._path)
            with self._connection:
                return work(self._connection)
        except sqlite3.IntegrityError as error:
            raise ObjectExistsError(
                f"an object is at {location!r} already", location=location
            ) from error
        except sqlite3.Error as error:
            kind = ERRORS.get(getattr(error, "sqlite_errorcode", -1), BackendError)
            raise kind(
                f"SQLite failed at {location!r}: {error}", location=location
            ) from error

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()


# begin: backend
class SQLiteStorageBackend:
    """Stores objects in one SQLite file, each as the chunks in which it arrived.

    An upload writes its chunks under an id that no object has yet, and one INSERT
    publishes them. Chunks that a crash left unpublished are invisible;
    `cleanup_incomplete` removes them.

    Args:
        path: The database file; it is created on first use, in an existing folder.
        page_size: The number of objects that a listing fetches at a time.
    """

    def __init__(self, path: str | os.PathLike[str], *, page_size: int = 500) -> None:
        self.path = os.fspath(path)
        self._page_size = page_size
        self._database = Database(self.path)
        self._lock = threading.Lock()

    async def aclose(self) -> None:
        """Close the connection and end the thread; a later call creates new ones."""
        with self._lock:
            database, self._database = self._database, Database(self.path)
        await asyncio.wrap_future(database.close())

    async def _run(self, location: str, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run work in one transaction, after all work submitted before it."""
        with self._lock:
            future = self._database.submit(location, work)
        return await asyncio.wrap_future(future)

    # begin: put
    async def put_bytes(
        self, location: str, content: bytes, *, content_type: str | None = None
    ) -> None:
        """Store `content` in one transaction."""
        async with self._upload(location) as upload:
            await self._run(
                location,
                partial(
                    add_object,
                    location=location,
                    upload=upload,
                    content=content,
                    content_type=content_type,
                ),
            )

    async def put_stream(
        self,
        location: str,
        stream: AsyncIterator[bytes],
        *,
        content_type: str | None = None,
    ) -> None:
        """Store chunk after chunk, and publish them once the stream has ended."""
        async with self._upload(location) as upload:
            size = 0
            async for chunk in stream:
                await self._run(
                    location, partial(add_chunk, upload=upload, start=size, data=chunk)
                )
                size += len(chunk)
            await self._run(
                location,
                partial(
                    publish,
                    location=location,
                    upload=upload,
                    size=size,
                    content_type=content_type,
                ),
            )

    @asynccontextmanager
    async def _upload(self, location: str) -> AsyncIterator[str]:
        """Yield an id for the chunks of a write; remove them if it fails."""
        check_location(location)
        upload = uuid.uuid4().hex
        try:
            yield upload
        except BaseException:
            with suppress(BackendError):
                await asyncio.shield(
                    self._run(location, partial(discard, upload=upload))
                )
            raise

    # begin: open
    async def open(
        self, location: str, *, offset: int = 0, length: int | None = None
    ) -> SQLiteReader:
        """Open a range for reading."""
        upload, info = await self._find(location)
        wanted = byte_range(offset, length, info.size)
        return SQLiteReader(self._run, upload, info, wanted.start, wanted.stop)

    async def stat(self, location: str) -> ObjectInfo:
        """Return the size, times and type of an object."""
        return (await self._find(location))[1]

    async def exists(self, location: str) -> bool:
        """Return whether an object is at the location."""
        try:
            await self._find(location)
        except ObjectNotFoundError:
            return False
        return True

    async def _find(self, location: str) -> tuple[str, ObjectInfo]:
        check_location(location)
        query = (
            "SELECT location, size, modified, upload, content_type FROM object"
            " WHERE location = ?"
        )
        rows = await self._run(
            location, partial(select, query=query, values=[location])
        )
        if not rows:
            raise ObjectNotFoundError(
                f"no object is at {location!r}", location=location
            )
        return rows[0][3], object_info(rows[0])

    # begin: delete
    async def delete(self, location: str) -> None:
        """Delete an object; deleting a missing one is not an error."""
        check_location(location)
        await self._run(location, partial(remove, location=location))

    # begin: list
    async def iter_objects(
        self, prefix: str = "", *, start_after: str | None = None
    ) -> AsyncIterator[ObjectInfo]:
        """Yield objects in the byte order of UTF-8, SQLite's own, a page at a time."""
        query = (
            "SELECT location, size, modified, upload, content_type FROM object"
            " WHERE location > :after AND location >= :prefix"
            " AND substr(location, 1, length(:prefix)) = :prefix"
            " ORDER BY location LIMIT :size"
        )
        after = start_after or ""
        while True:
            values = {"after": after, "prefix": prefix, "size": self._page_size}
            rows = await self._run(prefix, partial(select, query=query, values=values))
            for row in rows:
                yield object_info(row)
            if len(rows) < self._page_size:
                return
            after = rows[-1][0]

    # begin: abilities
    async def copy(self, source: str, target: str) -> None:
        """Copy inside the database, in one transaction."""
        old, info = await self._find(source)
        async with self._upload(target) as new:
            await self._run(
                target,
                partial(copy_object, info=info, old=old, location=target, new=new),
            )

    async def cleanup_incomplete(self, *, older_than: timedelta) -> int:
        """Remove the chunks of uploads that never completed."""
        query = (
            "DELETE FROM chunk WHERE upload IN (SELECT upload FROM chunk"
            " WHERE upload NOT IN (SELECT upload FROM object)"
            " GROUP BY upload HAVING max(created) < ?) RETURNING upload"
        )
        latest = time.time() - older_than.total_seconds()
        return len(
            set(await self._run("", partial(select, query=query, values=[latest])))
        )


# begin: reader
class SQLiteReader:
    """One range of one object, read a chunk at a time."""

    def __init__(
        self, run: Runner, upload: str, info: ObjectInfo, start: int, stop: int
    ) -> None:
        self.info = info
        self._run = run
        self._upload = upload
        self._position = start
        self._stop = stop
        self._closed = False

    async def read(self, size: int = -1, /) -> bytes:
        """Return up to `size` bytes, and `b""` only at the end of the range."""
        left = self._stop - self._position
        if size >= 0:
            return await self._piece(min(size, left))
        pieces = []
        while left := self._stop - self._position:
            pieces.append(await self._piece(left))
        return b"".join(pieces)

    async def _piece(self, wanted: int) -> bytes:
        if self._closed:
            raise ValueError("the reader is closed")
        if wanted == 0:
            return b""
        query = (
            "SELECT substr(data, :position - start + 1, :wanted) FROM chunk"
            " WHERE upload = :upload AND start <= :position ORDER BY start DESC LIMIT 1"
        )
        values = {"position": self._position, "wanted": wanted, "upload": self._upload}
        rows = await self._run(
            self.info.location, partial(select, query=query, values=values)
        )
        piece: bytes = rows[0][0] if rows else b""
        if not piece:
            raise BackendError(
                f"the object at {self.info.location!r} ended early",
                location=self.info.location,
            )
        self._position += len(piece)
        return piece

    async def aclose(self) -> None:
        """Refuse further reads; there are no resources to release."""
        self._closed = True


# begin: statements
def connect(path: str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False)
    try:
        connection.executescript(SCHEMA)
    except BaseException:
        connection.close()
        raise
    return connection


def add_object(
    connection: sqlite3.Connection,
    location: str,
    upload: str,
    content: bytes,
    content_type: str | None,
) -> None:
    add_chunk(connection, upload, 0, content)
    publish(connection, location, upload, len(content), content_type)


def add_chunk(
    connection: sqlite3.Connection, upload: str, start: int, data: bytes
) -> None:
    connection.execute(
        "INSERT INTO chunk VALUES (?, ?, ?, ?)", [upload, start, time.time(), data]
    )


def publish(
    connection: sqlite3.Connection,
    location: str,
    upload: str,
    size: int,
    content_type: str | None,
) -> None:
    """Make the object visible; the primary key refuses a second one."""
    connection.execute(
        "INSERT INTO object VALUES (?, ?, ?, ?, ?)",
        [location, upload, size, time.time(), content_type],
    )


def copy_object(
    connection: sqlite3.Connection, info: ObjectInfo, old: str, location: str, new: str
) -> None:
    connection.execute(
        "INSERT INTO chunk SELECT ?, start, ?, data FROM chunk WHERE upload = ?",
        [new, time.time(), old],
    )
    publish(connection, location, new, info.size, info.content_type)


def discard(connection: sqlite3.Connection, upload: str) -> None:
    connection.execute("DELETE FROM object WHERE upload = ?", [upload])
    connection.execute("DELETE FROM chunk WHERE upload = ?", [upload])


def remove(connection: sqlite3.Connection, location: str) -> None:
    connection.execute(
        "DELETE FROM chunk WHERE upload IN"
        " (SELECT upload FROM object WHERE location = ?)",
        [location],
    )
    connection.execute("DELETE FROM object WHERE location = ?", [location])


def select(
    connection: sqlite3.Connection,
    query: str,
    values: Sequence[Any] | Mapping[str, Any],
) -> list[Any]:
    return connection.execute(query, values).fetchall()


def object_info(row: tuple[str, int, float, str, str | None]) -> ObjectInfo:
    location, size, modified, upload, content_type = row
    return ObjectInfo(
        location,
        size,
        datetime.fromtimestamp(modified, UTC),
        etag=upload,
        content_type=content_type,
    )
