"""The interfaces between the modules of this package: a binding, its journal, a column, and the records that they exchange.

An attachment finds its manager through its column and the column's binding, and the binding knows columns, sessions and the
journal. These protocols are the side of each that the others use, so that no module imports one that imports it. The bindings in
force are listed here too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from granite_storage.derived.base import is_accepted
from granite_storage.exceptions import StorageError, UnboundAttachmentError

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
    from datetime import timedelta
    from uuid import UUID

    from sqlalchemy import Column, Connection, MetaData, Table
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_sessionmaker

    from granite_storage._engine import PreparedUpload
    from granite_storage.derived import Recipe
    from granite_storage.inspection.base import Validator
    from granite_storage.manager import StorageManager
    from granite_storage.refs import StoredObjectRef


ObjectKey: TypeAlias = tuple[int, str, str]

JOURNAL_KEY = "granite_storage.journal"
"""The key by which a metadata's `info` has the journal's tables."""

TRIGGERS_KEY = "granite_storage.triggers"
"""The key by which a metadata's `info` says that triggers are declared for its tables."""

CLAIMING_KEY = "granite_storage.claiming"
"""The key by which the `info` of a connection to MariaDB says that its variable may name locations for the triggers."""

FORGET_CLAIMS = "SET @granite_storage_claimed = NULL"
"""Clears that variable."""

REFUSAL = ("granite_storage: the object ", " is gone or going, or only rows of other models or schemas hold it")
"""The error of a trigger that refuses a ref, before and after what names its object, by which a session knows it."""


def are_triggers_declared(metadata: MetaData) -> bool:
    """Return whether `storage_triggers` was called for a metadata."""
    return metadata.info.get(TRIGGERS_KEY) is True


def tables_of(metadata: MetaData) -> JournalTables | None:
    """Return the journal's tables of a metadata, where they are declared."""
    return metadata.info.get(JOURNAL_KEY)


@dataclass(frozen=True, slots=True)
class JournalTables:
    """The tables of a journal.

    Attributes:
        intent: Objects that are being stored, until the transaction of their row, and displaced objects, until they are deleted.
        reclaim: Intents that a worker is processing; no transaction can consume them any more.
        decision: Whether a transaction or a worker decided on an upload first, for transactions whose snapshot is older than its
            intent. On SQLite the locations of the uploads of a flush while it writes their rows, for the triggers.
        meta: The version of the tables, and when a worker last ran.
        job: What is still to be done for the object of a row, such as a scan.
    """

    intent: Table
    reclaim: Table
    decision: Table
    meta: Table
    job: Table

    @property
    def all(self) -> tuple[Table, ...]:
        """All of them."""
        return self.intent, self.reclaim, self.decision, self.meta, self.job


@dataclass(frozen=True, slots=True)
class DeclaredVariant:
    """A variant that a column declares.

    Attributes:
        name: Its name.
        recipe: What makes it.
        digest: The digest of the recipe under this name.
        accept: The media types of the originals that have it; None for all.
        filename: Its name in a location, whose extension a web server on a folder goes by.
    """

    name: str
    recipe: Recipe
    digest: str
    accept: tuple[str, ...] | None = None
    filename: str = ""

    def is_for(self, ref: StoredObjectRef) -> bool:
        """Whether an original has the variant at all, by its media type."""
        return is_accepted(ref, self.accept)

    def is_in(self, ref: StoredObjectRef) -> bool:
        """Whether a ref has the variant, made by this recipe."""
        found = None if ref.variants is None else ref.variants.get(self.name)
        return found is not None and found.recipe == self.digest

    def is_due(self, ref: StoredObjectRef) -> bool:
        """Whether a ref is to get the variant without being asked, and does not have it by this recipe."""
        return self.recipe.when != "request" and self.is_for(ref) and not self.is_in(ref)


class ColumnType(Protocol):
    """The type of an attachment column, which knows its column and its policy."""

    storage_key: str
    validate: Validator | None

    @property
    def variants(self) -> Mapping[str, DeclaredVariant]:
        """The variants that the column declares, by their names."""
        ...

    @property
    def column(self) -> Column[Any]:
        """The column that has this type."""
        ...

    @property
    def table(self) -> Table:
        """The table of that column."""
        ...

    @property
    def model_name(self) -> str:
        """The segment of locations that names the model."""
        ...

    @property
    def field_name(self) -> str:
        """The segment of locations that names the attribute."""
        ...

    @property
    def label(self) -> str:
        """The name of the column in messages."""
        ...

    def binding(self) -> Binding:
        """Return the binding of the column's metadata, or raise `UnboundAttachmentError`."""
        ...

    def manager_in(self, binding: Binding) -> StorageManager:
        """Return the manager of a binding, after checking that it has the column's policy."""
        ...

    def require_fit(self, ref: StoredObjectRef) -> None:
        """Raise if an object of another policy is larger than the column's policy allows, or has not passed its checks."""
        ...


class Binding(Protocol):
    """The part of `StorageBinding` that the modules below it use."""

    @property
    def metadata(self) -> MetaData:
        """The metadata of the base."""
        ...

    @property
    def manager(self) -> StorageManager:
        """The manager that stores the attachments of the base."""
        ...

    @property
    def session_factory(self) -> async_sessionmaker[AsyncSession] | None:
        """The application's session maker, or None."""
        ...

    @property
    def own_sessions(self) -> async_sessionmaker[AsyncSession] | None:
        """The same for the library's own sessions, on whatever event loop; None if it has none."""
        ...

    @property
    def journal(self) -> Journal | None:
        """The journal, or None."""
        ...

    @property
    def base_name(self) -> str:
        """The full name of the base, by which an unpickled attachment finds it."""
        ...

    def ref_columns(self) -> list[Column[Any]]:
        """Return every column of the metadata that holds refs."""
        ...

    def column_type(self, table: str, column: str) -> ColumnType | None:
        """Return the type of an attachment column by its names, or None if there is no such column."""
        ...

    async def is_referred_to(self, column: Column[Any], ref: StoredObjectRef) -> bool | None:
        """Return whether a row of a column refers to an object; None if that is unknown."""
        ...

    async def make_variant(self, column_type: ColumnType, source: StoredObjectRef, name: str) -> StoredObjectRef:
        """Make a variant of the object of a committed row, and return what the row holds then."""
        ...

    async def upload(
        self,
        attachment: Any,
        column_type: ColumnType,
        *,
        verify: Callable[[StoredObjectRef], Awaitable[StoredObjectRef]] | None = None,
    ) -> None:
        """Store one pending attachment before any transaction."""
        ...


class UploadLease(Protocol):
    """The intents of uploads in progress, and the lease during which workers ignore them."""

    @property
    def ids(self) -> Sequence[UUID]:
        """The intents, in the order of the uploads."""
        ...

    @property
    def interval(self) -> float:
        """The seconds until it is to be renewed."""
        ...

    def begin(self, intent_id: UUID) -> AbstractContextManager[None]:
        """Upload one of the objects in a block; raise `StaleAttachmentError` if it is too late to begin."""
        ...

    def require(self) -> None:
        """Raise `StaleAttachmentError` if the lease has expired."""
        ...

    async def hold(self) -> None:
        """Renew it until cancelled."""
        ...


class JournalIntents(Protocol):
    """The operations of a transaction on the intents of a journal."""

    def claim(self, connection: Connection, ids: Sequence[UUID], locations: Sequence[str]) -> None:
        """Claim uploads before their rows are written, where triggers would refuse them otherwise.

        Args:
            connection: The connection of the transaction.
            ids: The intents of the uploads.
            locations: The locations of the objects, and of their variants.
        """
        ...

    def end_claim(self, connection: Connection, locations: Sequence[str]) -> None:
        """Delete what `claim` has recorded for the triggers, after the rows are written."""
        ...

    def cancel(self, connection: Connection, moved: Sequence[StoredObjectRef]) -> None:
        """Delete what triggers have recorded in the transaction about objects that it moves from row to row."""
        ...

    def consume(self, connection: Connection, ids: Sequence[UUID]) -> None:
        """Delete the intents of objects that rows now refer to, in the transaction of the rows."""
        ...

    def displace(self, connection: Connection, displaced: Iterable[tuple[StoredObjectRef, timedelta]]) -> None:
        """Record in a transaction the objects to delete once it is committed."""
        ...

    def enqueue(
        self,
        connection: Connection,
        written: Iterable[tuple[Column[Any], StoredObjectRef]],
        left: Iterable[tuple[Column[Any], StoredObjectRef]] = (),
    ) -> bool:
        """Record in a transaction what is to be done for the objects of refs that it writes, or that columns may have lost."""
        ...

    def require_unfenced(self, intents: Iterable[Intent]) -> None:
        """Raise `StaleAttachmentError` if a worker is about to delete an object that a transaction restores."""
        ...

    def find_deletes(
        self, connection: Connection, refs: Sequence[StoredObjectRef], *, without_fenced: bool = False
    ) -> dict[str, UUID]:
        """Return the intents of the pending deletes of objects that a transaction sees or others have committed, by location."""
        ...


class Sidecar(Protocol):
    """The part of `SidecarPool` that the garbage collector uses."""

    tables: JournalTables

    def looking(self) -> AbstractAsyncContextManager[tuple[str, AsyncConnection]]:
        """Yield the name of the file, and a connection that sees one moment of it."""
        ...

    async def require_beat(self, main: AsyncConnection, tables: JournalTables, error: type[StorageError]) -> None:
        """Raise an error if no worker ever ran in the rows' database, but one ran with this file."""
        ...


class Journal(Protocol):
    """The part of `StorageJournal` that sessions and the garbage collector use."""

    @property
    def tables(self) -> JournalTables:
        """Its tables."""
        ...

    @property
    def intents(self) -> JournalIntents:
        """The operations of transactions on it."""
        ...

    @property
    def sidecar(self) -> Sidecar | None:
        """The file with the intents of uploads, on SQLite."""
        ...

    def retention_of(self, ref: StoredObjectRef) -> timedelta:
        """Return how long an object is kept after it was displaced."""
        ...

    async def begin_uploads(self, uploads: Sequence[PreparedUpload]) -> UploadLease:
        """Commit durably the intents of objects that are about to be stored."""
        ...

    def delete_intent(self, backend: str, location: str) -> Intent:
        """Return the intent of the pending delete that displacing an object creates."""
        ...

    def wake_workers(self) -> None:
        """Wake the workers of this process."""
        ...

    async def settle(self, ids: Sequence[UUID]) -> None:
        """Delete the objects of these intents now, unless a row refers to them."""
        ...

    def settle_soon(self, ids: Sequence[UUID]) -> None:
        """Delete the objects of these intents once a transaction that is ending has released them, without waiting for that."""
        ...

    async def discard(self, ref: StoredObjectRef) -> None:
        """Delete an object that was stored after its lease had expired."""
        ...


@dataclass(frozen=True, slots=True)
class Intent:
    """An entry of a journal: an object is being stored, or is to be deleted."""

    journal: Journal
    id: UUID
    deletes: bool = False
    location: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StoredObject:
    """An object with its variants, its manager, and its intent if there is a journal.

    A variant goes where its original goes: it has no entry of its own where a transaction records what it does to objects.

    Attributes:
        manager: The manager.
        ref: The ref of the object, with those of its variants.
        intent: Its intent.
        variant_intents: The intents of the variants that the transaction stores with it.
        source: The location of its original, for a variant by itself.
        key: Identifies the object.
    """

    manager: StorageManager
    ref: StoredObjectRef
    intent: Intent | None = None
    variant_intents: tuple[Intent, ...] = ()
    source: str | None = None
    key: ObjectKey = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", (id(self.manager), self.ref.backend, self.ref.location))

    @property
    def intents(self) -> tuple[Intent, ...]:
        """Its intent and those of its variants."""
        return self.variant_intents if self.intent is None else (self.intent, *self.variant_intents)

    @property
    def parts(self) -> list[StoredObject]:
        """The object and each of its variants by itself, without intents: rows may refer to one of them and not to another."""
        if not self.ref.variants:
            return [StoredObject(self.manager, self.ref, source=self.source)]
        variants = (StoredObject(self.manager, ref, source=self.ref.location) for ref in self.ref.variants.values())
        return [StoredObject(self.manager, self.ref.with_variants(None), source=self.source), *variants]


def leave_out(stored: Iterable[StoredObject], locations: Collection[str]) -> list[StoredObject]:
    """Return what is left of objects and their variants without those at some locations.

    Those with an intent are returned as they are: their journal looks for references by itself.
    """
    parts = (part for item in stored for part in ([item] if item.intent else item.parts))
    return [part for part in parts if part.intent or part.ref.location not in locations]


# The bindings in force.


_bindings: list[Binding] = []


def add_binding(binding: Binding) -> bool:
    """Add a binding, which takes precedence over older ones of the same metadata; return whether it is the only one."""
    _bindings.append(binding)
    return len(_bindings) == 1


def remove_binding(binding: Binding) -> bool:
    """Remove a binding, so that an older one of the same metadata is in force again; return whether it was the last one."""
    if binding not in _bindings:
        return False
    _bindings.remove(binding)
    return not _bindings


def active_bindings() -> list[Binding]:
    """Return the bindings in force: for each metadata the newest."""
    newest = {id(binding.metadata): binding for binding in _bindings}
    return list(newest.values())


def find_binding(metadata: MetaData) -> Binding | None:
    """Return the newest binding of a metadata, or None."""
    for binding in reversed(_bindings):
        if binding.metadata is metadata:
            return binding
    return None


def binding_for(metadata: MetaData, what: str) -> Binding:
    """Return the newest binding of a metadata.

    Raises:
        UnboundAttachmentError: `bind_storage` was not called for it.
    """
    binding = find_binding(metadata)
    if binding is None:
        raise UnboundAttachmentError(unbound_message(metadata, what))
    return binding


def unbound_message(metadata: MetaData, what: str) -> str:
    """Return the message for a metadata without a binding; a base may have subclasses with a metadata of their own."""
    bound = sorted({binding.base_name for binding in active_bindings()})
    if not bound:
        return f"{what} has no storage manager: call bind_storage(Base, manager) for its declarative base at start-up"
    return (
        f"{what} has no storage manager: its MetaData is none of those that bind_storage was called for ({', '.join(bound)});"
        " call bind_storage once more, with the class that has this MetaData"
    )
