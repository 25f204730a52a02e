"""The binding, which connects a base with its manager and its sessions."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import Column, MetaData
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session

from granite_storage._documentation import Page
from granite_storage._telemetry import fields_of
from granite_storage.exceptions import ConfigurationError, DerivationRefusedError
from granite_storage.locations import uuid7_hex
from granite_storage.manager import StorageManager
from granite_storage.orm import events
from granite_storage.orm._interfaces import ColumnType, add_binding, are_triggers_declared, remove_binding
from granite_storage.orm._loops import OwnSessions, note_loops
from granite_storage.orm._threaded import SessionFactory, as_async_sessions
from granite_storage.orm._util import TRANSLATE_MAP
from granite_storage.orm.columns import AttachmentType, attachment_tables, require_usable
from granite_storage.orm.journal.journal import StorageJournal
from granite_storage.orm.locking import refers
from granite_storage.orm.uploads import Upload, store
from granite_storage.orm.variants import Which, drop_without_journal, make_without_journal, share
from granite_storage.refs import StoredObjectRef

if TYPE_CHECKING:
    from granite_storage.orm.attachment import Attachment


logger: logging.Logger = logging.getLogger("granite_storage")


def bind_storage(
    base: Any,
    manager: StorageManager,
    *,
    session_factory: SessionFactory | None = None,
    journal: StorageJournal | None = None,
    sessions: SessionFactory | None = None,
) -> StorageBinding:
    """Bind the attachments of a declarative base to a manager; once, at start-up, before the first flush.

    From then on every `AsyncSession` and every synchronous `Session` stores, keeps and removes the objects of the base's
    attachment columns with its transactions. It does not matter whether a model was declared before or after. A base may be
    bound again, as tests do: the newest binding counts until it is unbound.

    Args:
        base: The declarative base, `SQLModel`, or anything else that has a `metadata`.
        manager: The manager; the caller closes it.
        session_factory: The application's session factory, for parts that open their own sessions, such as the garbage
            collector: an `async_sessionmaker`, a `sessionmaker`, a `scoped_session` or any function that returns a new session.
        journal: The journal, which keeps objects and rows consistent through crashes; None for rollbacks only.
        sessions: An alias of `session_factory`.

    Returns:
        The binding; `unbind` reverses it.

    Raises:
        ConfigurationError: The base has no metadata; an attachment column names a policy that the manager does not have, or one
            that needs a journal (with a retention, or a scanner that may hold files) without a journal; triggers are declared
            without a journal; a column has a default that no session can store, or is annotated as several attachments;
            `session_factory` creates no sessions, or is given under both names; or the journal's tables are not declared beside
            the models.
    """
    metadata = getattr(base, "metadata", None)
    if not isinstance(metadata, MetaData):
        raise ConfigurationError(f"bind_storage needs a declarative base, which has a metadata, not {base!r}", see=Page.BINDING)
    if not isinstance(manager, StorageManager):
        raise ConfigurationError(f"bind_storage needs a StorageManager, not {type(manager).__name__}", see=Page.BINDING)
    if journal is not None and not isinstance(journal, StorageJournal):
        raise ConfigurationError(f"bind_storage needs a StorageJournal, not {type(journal).__name__}", see=Page.BINDING)
    if session_factory is not None and sessions is not None:
        raise ConfigurationError("bind_storage takes session_factory=... or its alias sessions=..., not both", see=Page.BINDING)
    if journal is None and are_triggers_declared(metadata):
        raise ConfigurationError(
            "storage_triggers are declared for this base, and refuse files that no journal knows of: pass bind_storage(...,"
            " journal=...)",
            see=Page.JOURNAL,
        )
    session_factory = sessions if session_factory is None else session_factory
    if session_factory is not None and (not callable(session_factory) or isinstance(session_factory, Session | AsyncSession)):
        raise ConfigurationError(
            "bind_storage(session_factory=...) takes a factory of sessions, such as async_sessionmaker(engine) or "
            f"sessionmaker(engine), not {session_factory!r}",
            see=Page.BINDING,
        )
    binding = StorageBinding(
        base, metadata, manager, None if session_factory is None else as_async_sessions(session_factory), journal
    )
    for column in attachment_tables(metadata).all_attachments():
        require_usable(column)
        if isinstance(column.type, AttachmentType):
            column.type.manager_in(binding)
    events.require_single(base)
    if binding.session_factory is not None:
        note_loops(binding.session_factory)
    if journal is not None:
        journal.bind(binding)
    if add_binding(binding):
        events.listen()
    try:
        events.guard_base(base)
    except BaseException:
        binding.unbind()
        raise
    return binding


@dataclass(eq=False, repr=False)
class StorageBinding:
    """The binding of a base to a manager, as `bind_storage` returns it.

    Attributes:
        base: The declarative base.
        metadata: Its metadata.
        manager: The manager that stores its attachments.
        session_factory: The application's session factory, as a factory of asynchronous sessions; None if it was not given.
        journal: The journal, or None.
    """

    base: Any
    metadata: MetaData
    manager: StorageManager
    session_factory: async_sessionmaker[AsyncSession] | None
    journal: StorageJournal | None = None

    @property
    def own_sessions(self) -> async_sessionmaker[AsyncSession] | None:
        """What makes the library's own sessions, which may run on another event loop than the application's; see `_loops`."""
        factory = self.session_factory
        return None if factory is None else cast("async_sessionmaker[AsyncSession]", OwnSessions(factory))

    @property
    def base_name(self) -> str:
        """The base's full name, by which a pickled attachment finds it again."""
        return f"{getattr(self.base, '__module__', '')}.{getattr(self.base, '__qualname__', type(self.base).__qualname__)}"

    def ref_columns(self) -> list[Column[Any]]:
        """Return every column of the metadata that contains refs, managed and plain."""
        return list(attachment_tables(self.metadata).refs())

    def column_type(self, table: str, column: str) -> AttachmentType | None:
        """Return the type of an attachment column by its names, or None if there is no such column."""
        found = self.metadata.tables.get(table)
        column_type = None if found is None else next((item.type for item in found.columns if item.name == column), None)
        return column_type if isinstance(column_type, AttachmentType) else None

    async def upload(
        self,
        attachment: Attachment,
        column_type: ColumnType,
        *,
        verify: Callable[[StoredObjectRef], Awaitable[StoredObjectRef]] | None = None,
    ) -> None:
        """Store one pending attachment before any transaction; `verify` reads what was stored and returns its ref."""
        await store([Upload(attachment, column_type, uuid7_hex(), verify)])

    async def is_referred_to(self, column: Column[Any], ref: StoredObjectRef) -> bool | None:
        """Return whether a row of a column refers to an object; None where that is unknown, as it is without sessions."""
        if (sessions := self.own_sessions) is None:
            return None
        try:
            async with sessions() as session:
                connection = await session.connection(bind_arguments={"clause": column.table})
                return await connection.run_sync(refers, column, ref)
        except Exception:  # a driver that cannot connect raises errors of its own
            logger.warning(
                "it is unknown whether a row refers to the object %r", ref.location, exc_info=True, extra=fields_of(ref)
            )
            return None

    async def make_variant(
        self,
        column_type: ColumnType,
        source: StoredObjectRef,
        name: str,
        *,
        which: Which = "missing",
        options: Mapping[str, Any] | None = None,
    ) -> StoredObjectRef:
        """Make a variant of the object of a committed row, and return what the row holds then; see `Attachment.variant`.

        The options lead to the schema of the row, without a journal; with one the row is found in every schema.
        """
        declared, journal = column_type.variants[name], self.journal
        if not declared.is_for(source):
            found = (source.media or {}).get("type") or source.content_type
            raise DerivationRefusedError(f"the variant {name!r} is not made for files of the type {found}")
        if journal is None:
            make: Callable[..., Coroutine[Any, Any, StoredObjectRef]] = partial(make_without_journal, self, options=options or {})
        else:
            make = (await journal.variant_jobs()).make
        schema = str((options or {}).get(TRANSLATE_MAP))
        key = (self, source.backend, source.location, name, declared.digest, which, schema)
        return await share(key, lambda: make(column_type, source, declared, which=which))

    async def drop_variant(
        self, column_type: ColumnType, source: StoredObjectRef, name: str, *, options: Mapping[str, Any] | None = None
    ) -> bool:
        """Take a variant that no column declares any more out of the rows of its original; return whether one had it."""
        if self.journal is None:
            return await drop_without_journal(self, column_type, source, name, options=options or {})
        return await (await self.journal.variant_jobs()).drop(source, name)

    def unbind(self) -> None:
        """Reverse `bind_storage`; unbinding the last base removes all listeners. Idempotent.

        End the sessions of the base first: what a transaction in progress has stored is not cleaned up without its listeners, and
        its end may raise an error although it has committed.
        """
        if self.journal is not None:
            self.journal.release(self)
        if remove_binding(self):
            events.unlisten()
        events.release()

    def __repr__(self) -> str:
        return f"<StorageBinding of {self.base_name} to {self.manager!r}>"
