"""A declarative base on a real database and a real manager, for one test."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, create_engine, event, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, sessionmaker

from granite_storage._portal import require_no_loop, run_blocking
from granite_storage._tasks import shielded
from granite_storage.backends.base import ObjectInfo
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.exceptions import ConfigurationError
from granite_storage.manager import StorageManager
from granite_storage.orm._threaded import SessionFactory
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.binding import StorageBinding, bind_storage
from granite_storage.orm.columns import AttachmentType, attachment_tables
from granite_storage.policies import StoragePolicy
from granite_storage.refs import StoredObjectRef, iter_refs
from granite_storage.testing.faults import FaultInjectingBackend

__all__ = ["BoundStorage", "SyncBoundStorage", "bound_storage"]

_BACKEND = "memory"


class _Kit:
    def __init__(self, base: Any, policies: Mapping[str, StoragePolicy] | None, session_factory: SessionFactory) -> None:
        policies = _declared_by(base) if policies is None else policies
        self.faults: FaultInjectingBackend = FaultInjectingBackend(MemoryStorageBackend())
        backends = dict.fromkeys((policy.backend_key for policy in policies.values()), self.faults)
        self.storage: StorageManager = StorageManager(backends=backends, policies=policies)
        self.binding: StorageBinding = bind_storage(base, self.storage, session_factory=session_factory)

    async def _find_objects(self) -> list[ObjectInfo]:
        return [info async for info in self.faults.inner.iter_objects()]

    def _find_references(self, connection: Connection) -> list[StoredObjectRef]:
        columns = self.binding.ref_columns()
        found = [value for column in columns for value in connection.scalars(select(column).where(column.is_not(None)))]
        refs = [value.ref if isinstance(value, Attachment) else value for value in found]
        return [one for ref in refs for one in iter_refs(ref)]


class BoundStorage(_Kit):
    """The result of `async with bound_storage(Base)`.

    Attributes:
        engine: The engine.
        sessions: Makes sessions on it, which keep what they have loaded after a commit.
        storage: The manager. Every policy stores in `faults`.
        faults: The backend, which keeps objects in memory and fails when told to.
        binding: The binding of the base, in effect until the block ends.
    """

    def __init__(self, base: Any, policies: Mapping[str, StoragePolicy] | None, engine: AsyncEngine) -> None:
        self.engine = engine
        self.sessions: async_sessionmaker[AsyncSession] = async_sessionmaker(engine, expire_on_commit=False)
        super().__init__(base, policies, self.sessions)

    async def objects(self) -> list[ObjectInfo]:
        """Return all objects that are stored, in the order of their locations."""
        return await self._find_objects()

    async def assert_no_orphans(self) -> None:
        """Check that the objects are those that committed rows refer to, their variants among them.

        Raises:
            AssertionError: There is an object that no row refers to, or a reference to an object that is not there.
        """
        async with self.engine.connect() as connection:
            references = await connection.run_sync(self._find_references)
        _require_equal(await self.objects(), references)


class SyncBoundStorage(_Kit):
    """The result of `with bound_storage(Base)`: the attributes of `BoundStorage`, with a synchronous engine and its sessions."""

    def __init__(self, base: Any, policies: Mapping[str, StoragePolicy] | None, engine: Engine) -> None:
        self.engine = engine
        self.sessions: sessionmaker[Session] = sessionmaker(engine, expire_on_commit=False)
        super().__init__(base, policies, self.sessions)

    def objects(self) -> list[ObjectInfo]:
        """Return all objects that are stored, in the order of their locations."""
        return run_blocking(self._find_objects(), "kit.objects", "'async with bound_storage(...)'")

    def assert_no_orphans(self) -> None:
        """Check that the objects are those that committed rows refer to; see `BoundStorage.assert_no_orphans`."""
        with self.engine.connect() as connection:
            references = self._find_references(connection)
        _require_equal(self.objects(), references)


class bound_storage:  # noqa: N801  # it is called as a function
    """Bind a declarative base to a temporary database and storage, for one test.

    `async with bound_storage(Base) as kit:` is for asynchronous sessions and gives a `BoundStorage`, `with bound_storage(Base) as
    kit:` is for synchronous ones and gives a `SyncBoundStorage`. Objects are in memory. The database is a new SQLite file, with
    the tables of the base, in the folder for temporary files: sessions have transactions of their own there, which they would not
    have in memory. At the end of the block the base is unbound, and all of it is gone.

    A base that the application has bound is bound to the kit until then.

    Args:
        base: The declarative base, `SQLModel`, or anything else that has a `metadata`.
        policies: The policies by their storage keys, such as those of the application, whatever backends they name; None for one
            without limits for each storage key that the attachments of the base name.
        engine: An engine, in place of SQLite. Its tables are the caller's to create and to drop, and so is the engine to dispose
            of.

    A table in a schema is created in a database of that name, another SQLite file that each connection attaches.

    Raises:
        ConfigurationError: The policies are not a mapping, `bind_storage` refuses them, the engine is not of the kind
            of the block, or `with` is used where an event loop runs.

    Example:
        ```python
        async def test_avatar():
            async with bound_storage(Base) as kit:
                async with kit.sessions.begin() as session:
                    session.add(User(id=1, avatar=Attachment(b"...")))
                await kit.assert_no_orphans()
        ```
    """

    def __init__(
        self,
        base: Any,
        *,
        policies: Mapping[str, StoragePolicy] | None = None,
        engine: AsyncEngine | Engine | None = None,
    ) -> None:
        if policies is not None and not isinstance(policies, Mapping):
            raise ConfigurationError(
                f"bound_storage takes the policies by their storage keys, as {{'avatars': StoragePolicy('avatars', ...)}}, not"
                f" {policies!r:.80}"
            )
        self._base = base
        self._policies = policies
        self._engine = engine

    @asynccontextmanager
    async def _open(self) -> AsyncGenerator[BoundStorage, None]:
        engine = self._engine
        if isinstance(engine, Engine):
            raise ConfigurationError("'async with bound_storage' needs an AsyncEngine; a synchronous one goes with 'with'")
        async with AsyncExitStack() as stack:
            if engine is None:
                folder = await shielded(asyncio.to_thread(tempfile.mkdtemp), undo=_remove)
                stack.push_async_callback(_remove, folder)
                engine = create_async_engine(f"sqlite+aiosqlite:///{Path(folder, 'kit.db')}")
                stack.push_async_callback(engine.dispose)
                _prepare(engine.sync_engine, self._base.metadata, folder)
                async with engine.begin() as connection:
                    await connection.run_sync(self._base.metadata.create_all)
            kit = BoundStorage(self._base, self._policies, engine)
            stack.push_async_callback(kit.storage.aclose)
            stack.callback(kit.binding.unbind)
            yield kit

    @contextmanager
    def _open_synchronously(self) -> Generator[SyncBoundStorage, None, None]:
        engine = self._engine
        if isinstance(engine, AsyncEngine):
            raise ConfigurationError("'with bound_storage' needs a synchronous engine; an AsyncEngine goes with 'async with'")
        with ExitStack() as stack:
            if engine is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                engine = create_engine(f"sqlite:///{Path(folder, 'kit.db')}")
                stack.callback(engine.dispose)
                _prepare(engine, self._base.metadata, folder)
                self._base.metadata.create_all(engine)
            kit = SyncBoundStorage(self._base, self._policies, engine)
            stack.callback(kit.storage.sync.close)
            stack.callback(kit.binding.unbind)
            yield kit

    async def __aenter__(self) -> BoundStorage:
        self._opened = self._open()
        return await self._opened.__aenter__()

    async def __aexit__(self, *raised: Any) -> bool | None:
        return await self._opened.__aexit__(*raised)

    def __enter__(self) -> SyncBoundStorage:
        require_no_loop("bound_storage", "'async with bound_storage(...)'")
        self._opened_synchronously = self._open_synchronously()
        return self._opened_synchronously.__enter__()

    def __exit__(self, *raised: Any) -> bool | None:
        return self._opened_synchronously.__exit__(*raised)


def _declared_by(base: Any) -> dict[str, StoragePolicy]:
    """Return a policy for each storage key that the attachments of a base name."""
    columns = attachment_tables(base.metadata).all_attachments()
    keys = [column.type.storage_key for column in columns if isinstance(column.type, AttachmentType)]
    return {key: StoragePolicy(key, _BACKEND, key_prefix=key) for key in keys}


def _prepare(engine: Engine, metadata: MetaData, folder: str) -> None:
    """Let SQLite have the schemas of the tables, and not wait for the disk: nothing is to survive the test."""
    schemas = sorted({table.schema for table in metadata.tables.values() if table.schema} - {"main", "temp"})
    quote = engine.dialect.identifier_preparer.quote_identifier

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: object) -> None:
        for number, schema in enumerate(schemas):
            connection.execute(f"ATTACH DATABASE ? AS {quote(schema)}", (str(Path(folder, f"kit-{number}.db")),))
        for schema in ("main", *schemas):
            connection.execute(f"PRAGMA {quote(schema)}.synchronous = OFF")
        connection.execute("PRAGMA foreign_keys = ON")


async def _remove(folder: str) -> None:
    await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _require_equal(objects: Iterable[ObjectInfo], references: Iterable[StoredObjectRef]) -> None:
    stored, referenced = {info.location for info in objects}, {ref.location for ref in references}
    problems = [f"no row refers to the object {location!r}" for location in sorted(stored - referenced)]
    problems += [f"a row refers to {location!r}, where no object is" for location in sorted(referenced - stored)]
    if problems:
        raise AssertionError("; ".join(problems))
