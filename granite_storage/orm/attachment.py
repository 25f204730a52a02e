"""The value of an attachment attribute: a file that is to be stored, or one that a row refers to."""

from __future__ import annotations

import logging
import weakref
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeAlias, TypeVar

from granite_storage._documentation import Page
from granite_storage._engine import PreparedUpload, upload_names
from granite_storage._portal import run_blocking
from granite_storage.exceptions import (
    ConsumedSourceError,
    EmptyUploadError,
    InvalidReferenceError,
    ObjectNotFoundError,
    StaleAttachmentError,
    UnboundAttachmentError,
    UnknownVariantError,
)
from granite_storage.locations import clean_filename
from granite_storage.orm._interfaces import ColumnType, Intent, active_bindings, find_binding
from granite_storage.readers import OpeningReader, StoredObjectReader, SyncObjectReader
from granite_storage.refs import StoredObjectRef, storable
from granite_storage.streams import (
    BytesLike,
    ByteSource,
    ReadOnce,
    SupportsAsyncRead,
    SupportsRead,
    WholeFile,
    is_file,
    is_form_upload,
    iter_chunks,
    require_synchronous,
    upload_size,
    whole,
)

if TYPE_CHECKING:
    from datetime import timedelta

    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic_core import CoreSchema, SchemaSerializer
    from pydantic_core.core_schema import SerSchema
    from sqlalchemy.orm import InstanceState, InstrumentedAttribute

    from granite_storage._headers import Disposition
    from granite_storage.manager import StorageManager


T = TypeVar("T")
F = TypeVar("F", bound="_StoredFile")


# The address by which a pickled attachment finds its column, and so its manager, in another process.


@dataclass(frozen=True, slots=True)
class Address:
    """Says in a pickle which column an attachment belongs to."""

    base: str
    table: str
    column: str
    storage_key: str

    @classmethod
    def of(cls, column_type: ColumnType) -> Self:
        """Return the address of a column, for another process."""
        binding = find_binding(column_type.table.metadata)
        base = "" if binding is None else binding.base_name
        return cls(base, column_type.table.fullname, column_type.field_name, column_type.storage_key)

    def find(self) -> ColumnType:
        """Return the type of the column, in the base that has it.

        Raises:
            UnboundAttachmentError: No base with that column is bound in this process, or more than one.
        """
        found = [
            (binding.base_name, column_type)
            for binding in active_bindings()
            if (column_type := binding.column_type(self.table, self.column)) and column_type.storage_key == self.storage_key
        ]
        named = [(base, column_type) for base, column_type in found if base == self.base]
        for candidates in (named, found):
            if len(candidates) == 1:
                return candidates[0][1]
        raise UnboundAttachmentError(
            f"an attachment of {self.table}.{self.column} was unpickled, and {'no' if not found else 'more than one'}"
            f" base with that column is bound here"
        )


# The fields of an attachment in a response model: size, media type, name and checksum, never the location.


logger: logging.Logger = logging.getLogger("granite_storage")


def core_schema_of(file: type[_StoredFile]) -> CoreSchema:
    """Return the pydantic schema that validates and serializes attachments or variants.

    In Python mode they are unchanged, so that `Model(**schema.model_dump())` assigns them; in JSON mode their fields are shown.
    An attachment whose row contains no readable ref is shown as null and logged, so that one bad row does not break a list. The
    JSON schema does not mention that null, because clients need not expect a damaged database.
    """
    from pydantic_core import core_schema

    shown = core_schema.nullable_schema(fields_schema())
    serialization = core_schema.plain_serializer_function_ser_schema(shown_fields, return_schema=shown, when_used="json")
    return instance_schema(file, serialization)


def instance_schema(kind: type[Any], serialization: SerSchema) -> CoreSchema:
    """Return the pydantic schema of objects that JSON cannot represent; the error of a request body is for its client."""
    from pydantic_core import core_schema

    is_instance = core_schema.is_instance_schema(kind)
    in_json = core_schema.custom_error_schema(
        is_instance, "file_in_json", custom_error_message="A file cannot be given as JSON: upload it, and leave this field out"
    )
    return core_schema.json_or_python_schema(in_json, is_instance, serialization=serialization)


class LazySerializer:
    """Lets pydantic serialize an attachment without a declared field, as in an endpoint that returns a plain dict."""

    def __get__(self, instance: object, owner: type[Any]) -> SchemaSerializer:
        try:
            from pydantic_core import SchemaSerializer
        except ImportError:
            raise AttributeError("__pydantic_serializer__") from None
        serializer = SchemaSerializer(owner.__get_pydantic_core_schema__(owner, None))
        owner.__pydantic_serializer__ = serializer
        return serializer


def fields_schema(*, with_url: bool = False) -> CoreSchema:
    """Return the schema of the fields."""
    from pydantic_core import core_schema

    text, field = core_schema.str_schema(), core_schema.typed_dict_field
    optional = core_schema.nullable_schema(text)
    return core_schema.typed_dict_schema(
        {
            "size": field(core_schema.int_schema(ge=0)),
            "content_type": field(optional),
            "original_filename": field(optional),
            "checksum": field(text),
            **({"url": field(optional)} if with_url else {}),
        }
    )


def shown_fields(value: _StoredFile) -> dict[str, Any] | None:
    """Return the fields, or None where the row contains no readable ref, which is logged.

    Raises:
        UnboundAttachmentError: It is not stored yet.
    """
    if value._state.error is not None:
        logger.warning("an attachment is shown as null, because its row contains no readable ref: %s", value._state.error)
        return None
    if value._state.status is Status.PENDING:
        raise UnboundAttachmentError(
            "the attachment is not stored yet; flush the session before it is shown", see=Page.ATTACHMENTS
        )
    return value.describe()


# The states of an attachment, and every change from one to another.


class Status(Enum):
    """Whether an attachment has an object."""

    PENDING = auto()
    """It is to be stored, for the first time or again after a rollback."""
    STORED = auto()
    """It has an object."""
    BROKEN = auto()
    """Its row holds something that is not a ref."""


class Owner(Enum):
    """What refers to the object of a stored attachment."""

    ROW = auto()
    """A row, or one that the current flush writes: another row gets a copy."""
    NONE = auto()
    """Nothing: it was stored before its transaction, or its flush failed. A row may take the object without a copy."""
    DELETE = auto()
    """A pending delete: it was made by `restore`, and a row takes the object by cancelling the delete."""


# What a pickle keeps; the rest belongs to a transaction.
_PICKLED = ("address", "content_type", "error", "extra", "filename", "is_repeatable", "ref", "source")


class AttachmentState:
    """The state of one attachment. Other modules read its attributes, and change it by its methods only.

    | From | Method | To |
    |---|---|---|
    | pending | `prepare`, then `put` | stored, owned by a row |
    | stored | `release` | owned by nothing |
    | owned by nothing or a pending delete | `take` | owned by a row |
    | stored | `claim`, `mark_written`, `end_claim` | the same, and its ref may be written between the first and the last |
    | stored | `settle`, when its row is committed | the same, without the source |
    | stored | `undo`, when its object is rolled back | pending, with the source if that can be read again |
    | owned by nothing | `discard`, then `undo` | pending, without a source |

    Attributes:
        status: Pending, stored or broken.
        ref: The receipt; None unless it is stored.
        error: What is wrong with the value of its row; None unless it is broken.
        owner: What refers to the object.
        is_claimed: Whether a statement of the current flush may write the ref; the column type binds no other.
        is_written: Whether one has written it.
        intent: What a journal has recorded about the object, until the row that takes it is committed.
        variant_intents: What it has recorded about the variants that were stored with the object, as long.
        address: Its column, or where a pickled one finds it; None until it is stored.
        is_repeatable: Whether the source can be stored once more after a rollback.
        filename: The file name that it was made with.
        content_type: The media type that it was made with.
        extra: The extra keys that it was made with.
        signed_urls: What `sign_urls` has signed, by backend and location: the URLs, and when they end in seconds since 1970.
    """

    # Class attributes and no constructor, because an attachment that a row is read into sets two of them only.
    ref: StoredObjectRef | None = None
    address: ColumnType | Address | None = None
    error: InvalidReferenceError | None = None
    owner: Owner = Owner.ROW
    is_claimed: bool = False
    is_written: bool = False
    intent: Intent | None = None
    variant_intents: tuple[Intent, ...] = ()
    source: ByteSource | WholeFile | ReadOnce | AttachmentState | None = None
    is_repeatable: bool = False
    filename: str | None = None
    content_type: str | None = None
    extra: Mapping[str, Any] | None = None
    signed_urls: Mapping[tuple[str, str], tuple[str, float]] = MappingProxyType({})
    _is_discarded: bool = False
    # The instances that it was assigned to while no row held it, and the attributes.
    _assignments: Sequence[tuple[weakref.ref[InstanceState[Any]], str]] = ()

    @property
    def status(self) -> Status:
        """Pending, stored or broken."""
        if self.ref is not None:
            return Status.STORED
        return Status.PENDING if self.error is None else Status.BROKEN

    def require_ref(self) -> StoredObjectRef:
        """Return the receipt.

        Raises:
            UnboundAttachmentError: It is not stored yet.
            InvalidReferenceError: The row contains a value that is not a ref.
        """
        if self.error is not None:
            raise InvalidReferenceError(str(self.error)) from self.error
        if self.ref is None:
            raise UnboundAttachmentError(
                "the attachment is not stored yet: flush the session that its row was added to, or await store(Document.file)",
                see=Page.ATTACHMENTS,
            )
        return self.ref

    @property
    def column_type(self) -> ColumnType:
        """The type of its column; raises `UnboundAttachmentError` where it belongs to none."""
        match self.address:
            case None:
                raise UnboundAttachmentError(
                    "the attachment belongs to no column yet: assign it to a row and flush the session, or await"
                    " store(Document.file)",
                    see=Page.ATTACHMENTS,
                )
            case Address():
                return self.address.find()
            case column_type:
                return column_type

    @property
    def manager(self) -> StorageManager:
        """The manager of its column; raises as `column_type` does."""
        return self.column_type.binding().manager

    def fill(self, content: ByteSource, filename: str | None, content_type: str | None, extra: Mapping[str, Any] | None) -> None:
        """Take what a new attachment is made of."""
        is_bytes = isinstance(content, bytes | bytearray | memoryview)
        self.source = content if is_bytes else whole(content)
        self.is_repeatable = self.source.can_rewind if isinstance(self.source, WholeFile) else is_bytes
        self.filename, self.content_type, self.extra = filename, content_type, extra

    def copy(self) -> AttachmentState:
        """Return the state of a pending copy, whose source is this one."""
        copy = AttachmentState()
        copy.source, copy.is_repeatable, copy.extra = self, True, self.extra
        if self.status is Status.PENDING:
            copy.filename, copy.content_type = self.filename, self.content_type
        else:
            ref = self.require_ref()
            copy.filename, copy.content_type = ref.original_filename, ref.content_type
        return copy

    def prepare(self, manager: StorageManager, column_type: ColumnType, entity_id: str) -> PreparedUpload:
        """Decide where it will be stored, for a column."""
        engine, original = manager._engine, self._origin()
        names: dict[str, Any] = {
            "storage_key": column_type.storage_key,
            "model_name": column_type.model_name,
            "entity_id": entity_id,
            "field_name": column_type.field_name,
        }
        if not isinstance(original, AttachmentState):
            prepared = engine.prepare(**names, content_type=self.content_type, original_filename=self.filename, extra=self.extra)
        elif original.manager is manager:
            prepared = engine.prepare_copy(original.require_ref(), **names)
        else:
            ref = original.require_ref()
            prepared = engine.prepare(
                **names, content_type=ref.content_type, original_filename=ref.original_filename, extra=ref.extra
            )
            prepared = replace(prepared, media=ref.media, scan=ref.scan)
        return prepared if column_type.validate is None else prepared.validated_by(column_type.validate)

    def record(self, intent: Intent) -> None:
        """Remember what a journal has recorded about the object that will be stored."""
        self.intent = intent

    async def put(self, manager: StorageManager, column_type: ColumnType, prepared: PreparedUpload) -> None:
        """Upload the source to the prepared location, and become stored; a migration, which has no source, replaces this."""
        engine, source = manager._engine, self._take_source()
        if not isinstance(source, AttachmentState):
            try:
                self._store(await engine.put(prepared, source), column_type)
            finally:
                self._drop_consumed()
        elif source.manager is manager:
            self._store(await engine.copy(source.require_ref(), prepared), column_type)
        else:
            async with Attachment._in(source).open(verify=True) as stream:
                # Before the stream is closed: a cancellation that comes then has to find what is stored.
                self._store(await engine.put(prepared, stream), column_type)

    def _store(self, ref: StoredObjectRef, column_type: ColumnType) -> None:
        self.ref, self.address = ref, column_type

    def correct(self, ref: StoredObjectRef) -> None:
        """Replace the receipt by that of the same object as it was verified."""
        self.ref = ref

    @property
    def intents(self) -> tuple[Intent, ...]:
        """What a journal has recorded about the object and the variants that were stored with it."""
        return self.variant_intents if self.intent is None else (self.intent, *self.variant_intents)

    def add_variants(self, variants: Mapping[str, StoredObjectRef], intents: Iterable[Intent] = ()) -> None:
        """Have variants as well, and remember what a journal has recorded about those that were stored just now."""
        ref = self.require_ref()
        self.ref = ref.with_variants({**(ref.variants or {}), **variants})
        self.variant_intents = (*self.variant_intents, *intents)

    def release(self) -> None:
        """Be owned by nothing, so that any row may take the object."""
        self.owner = Owner.NONE

    def take(self, column_type: ColumnType) -> None:
        """Be owned by a row of a column; one that was made by `restore` belonged to none before."""
        if self.address is None or self.owner is Owner.DELETE:
            self.address = column_type
        self.owner = Owner.ROW

    def claim(self) -> None:
        """Let the statements of the current flush write the ref."""
        self.is_claimed = True

    def mark_written(self) -> None:
        """Note that a statement has written the ref."""
        self.is_written = True

    def end_claim(self) -> None:
        """Let no statement write the ref any more."""
        self.is_claimed = self.is_written = False

    def settle(self) -> None:
        """Release the source and the intent, because the row is committed."""
        self.drop_source()
        self.intent, self.variant_intents = None, ()

    def undo(self) -> None:
        """Become pending again, because the object was rolled back."""
        self.ref = self.intent = None
        self.variant_intents = ()
        if self.owner is Owner.NONE:
            self.owner = Owner.ROW
        self.end_claim()

    def discard(self) -> None:
        """Note that the object is removed because no row has taken it; `undo` follows."""
        self._is_discarded = True

    def keep_url(self, ref: StoredObjectRef, url: str, until: float) -> None:
        """Keep the signed URL of its object, or of a variant's, to be shown until it ends."""
        self.signed_urls = {**self.signed_urls, (ref.backend, ref.location): (url, until)}

    def drop_source(self) -> None:
        """Release the source: what is stored cannot be stored once more."""
        self.source, self.is_repeatable = None, False

    def note_assignment(self, state: InstanceState[Any], key: str) -> None:
        """Remember an instance that it is assigned to while no row holds it."""
        if self.owner is Owner.NONE:
            self._assignments = [*self._assignments, (weakref.ref(state), key)]

    def is_assigned(self, attachment: Attachment) -> bool:
        """Return whether an instance holds the attachment of this state, so that its row may be flushed later."""
        states = [(reference(), key) for reference, key in self._assignments]
        return any(state is not None and state.obj() is not None and state.dict.get(key) is attachment for state, key in states)

    def require_synchronous(self) -> None:
        """Refuse a stream that only an event loop can read."""
        origin = self._origin()
        if not isinstance(origin, AttachmentState):
            require_synchronous(origin)

    async def require_current(self, missing: ObjectNotFoundError) -> None:
        """Raise `StaleAttachmentError` if no row of the column refers to a missing object any more."""
        column_type, ref = self.column_type, self.require_ref()
        if await column_type.binding().is_referred_to(column_type.column, ref) is False:
            raise StaleAttachmentError(
                f"the object at {ref.location!r} is gone, because its row has been given another file since this attachment was"
                " read, or has been deleted: load the row again"
            ) from missing

    def __getstate__(self) -> dict[str, Any]:
        pickled = {name: value for name in _PICKLED if (value := getattr(self, name)) not in (None, False)}
        if self.status is Status.STORED:
            pickled.pop("source", None)
            pickled.pop("is_repeatable", None)
        elif self.status is Status.PENDING:
            if not isinstance(self.source, bytes | bytearray | memoryview):
                raise TypeError("an attachment made of a stream cannot be pickled before it is stored")
            pickled["source"] = bytes(self.source)
        if self.owner is Owner.DELETE:
            pickled["owner"] = self.owner
        if self.address is not None and not isinstance(self.address, Address):
            pickled["address"] = Address.of(self.address)
        return pickled

    def _origin(self) -> ByteSource | WholeFile | ReadOnce | AttachmentState:
        """Return the source to store: a stream once; bytes, files that can seek and the original of a copy several times."""
        holder = self._holder()
        source = holder.source
        if source is None and holder._is_discarded:
            raise ConsumedSourceError(
                "the attachment was deleted when its form or its request ended, because no row referred to it; assign it to an"
                " instance before that"
            )
        if source is None:
            raise ConsumedSourceError(
                "the attachment's stream was already read, and can be read only once: make a new attachment, of bytes if it must"
                " survive a rollback"
            )
        return source

    def _take_source(self) -> ByteSource | WholeFile | ReadOnce | AttachmentState:
        origin, holder = self._origin(), self._holder()
        if not holder.is_repeatable:
            holder.drop_source()
        return origin

    def _drop_consumed(self) -> None:
        """Release a file that turned out to be readable only once."""
        holder = self._holder()
        if isinstance(holder.source, WholeFile) and not holder.source.can_rewind:
            holder.drop_source()

    def _holder(self) -> AttachmentState:
        """Return the state that has the source: where the original of a copy was rolled back as well, only its own is left."""
        source = self.source
        if isinstance(source, AttachmentState) and source.status is Status.PENDING:
            return source._holder()
        return self


UploadFile: TypeAlias = SupportsAsyncRead | SupportsRead | AsyncIterable[BytesLike]
"""What a web framework passes for a file of a form, such as Starlette's `UploadFile` or werkzeug's `FileStorage`."""


class _StoredFile:
    """What attachments and their variants have in common: a ref, the state of the attachment, and so a manager."""

    # Slots, so that encoders that use `vars(...)` find no private state, no bytes and no column.
    __slots__ = ()
    _state: AttachmentState

    __pydantic_serializer__: ClassVar[Any] = LazySerializer()

    @property
    def ref(self) -> StoredObjectRef:
        """The receipt of the stored object."""
        raise NotImplementedError

    @property
    def manager(self) -> StorageManager:
        """The manager that stores it, found from its column.

        Raises:
            UnboundAttachmentError: It belongs to no column yet, or `bind_storage` was not called for the column's base.
        """
        return self._state.manager

    @property
    def size(self) -> int:
        """The size in bytes; raises as `ref` does."""
        return self.ref.size

    @property
    def checksum(self) -> str:
        """`sha256:<hex>`, empty if unknown; raises as `ref` does."""
        return self.ref.checksum

    @property
    def location(self) -> str:
        """The address inside the backend; raises as `ref` does."""
        return self.ref.location

    async def read(self) -> bytes:
        """Return all bytes, verified; see `StorageManager.get`.

        Raises:
            StaleAttachmentError: The object is gone because its row has been given another file since this attachment was read,
                or has been deleted; known only if `bind_storage` was given a `session_factory`. Load
                the row again.
            StorageError: As `StorageManager.get`.
        """
        try:
            return await self.manager.get(self.ref)
        except ObjectNotFoundError as error:
            await self._state.require_current(error)
            raise

    def open(self, *, offset: int = 0, length: int | None = None, verify: bool = False) -> OpeningReader:
        """Open it for streaming; see `StorageManager.open`. Raises as `read` does if the object is missing."""
        opening = self.manager.open(self.ref, offset=offset, length=length, verify=verify)

        async def start() -> StoredObjectReader:
            try:
                return await opening
            except ObjectNotFoundError as error:
                await self._state.require_current(error)
                raise

        return OpeningReader(start)

    async def exists(self) -> bool:
        """Return whether its object exists; see `StorageManager.exists`."""
        return await self.manager.exists(self.ref)

    @property
    def public_url(self) -> str:
        """The URL at which anyone can read it, for files of a public policy; see `StorageManager.public_url`.

        Raises:
            ConfigurationError: The policy has no `public`.
            UnboundAttachmentError: It is not stored yet.
            ScanPendingError: A virus scanner has not judged it yet.
            InfectedObjectError: A virus scanner has found the file infected.
        """
        ref = self.ref
        return self.manager.public_url(ref)

    async def url(
        self,
        *,
        expires_in: timedelta,
        disposition: Disposition = "attachment",
        filename: str | None = None,
        stable_for: timedelta | None = None,
    ) -> str:
        """Return a URL with which anyone can read it until it expires; see `StorageManager.url`."""
        ref = self.ref
        return await self.manager.url(
            ref, expires_in=expires_in, disposition=disposition, filename=filename, stable_for=stable_for
        )

    def describe(self) -> dict[str, Any]:
        """Return the fields that a client may see: size, media type, name and checksum, never the location."""
        ref = self.ref
        return {
            "size": ref.size,
            "content_type": ref.content_type,
            "original_filename": ref.original_filename,
            "checksum": ref.checksum,
        }

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]  # the result of `vars`, for encoders and debuggers
        return self.describe()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield the result of `describe` as pairs, for `dict(attachment)`."""
        yield from self.describe().items()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: dict[int, Any]) -> Self:
        return self

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema_of(cls)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(fields_schema()), "title": cls.__name__}


class Attachment(_StoredFile):
    """A file that belongs to one row: pending until the flush that stores it, then stored.

    Assign one to a row: the flush uploads it, the commit keeps it and a rollback deletes it. An attachment behaves as a value:
    assigned to a second row it becomes a copy with an object of its own, unless the first row loses it in the same transaction.

    Args:
        content: Bytes, or anything that `StorageManager.put_stream` takes, which is read at the flush and never closed. A file
            that can seek is stored from its beginning, however much of it was read before. Bytes and such files can be stored
            again after a rollback; other streams are read once.
        filename: The client's file name; sanitized, never trusted. None for that of `content`, if it is an upload.
        content_type: The media type, stored as given. None for that of `content`, if it is an upload.
        extra: Your own keys in the ref, JSON values without NUL characters and lone surrogates: PostgreSQL cannot store
            them, so they are refused on every database.

    Raises:
        TypeError: The content is neither bytes nor a binary stream.
        EmptyUploadError: The content is an upload without a name and without bytes.
        InvalidReferenceError: `extra` cannot be stored.

    Example:
        >>> Attachment(b"Hello", filename="hello.txt").is_pending
        True
    """

    __slots__ = ("__weakref__", "_state")

    def __init__(
        self,
        content: ByteSource,
        *,
        filename: str | None = None,
        content_type: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(content, str | StoredObjectRef | Mapping | Attachment):
            raise TypeError(
                f"an attachment is made of bytes or a binary stream, not of {type(content).__name__}: encode text first, assign"
                " an Attachment as it is, and read an object by its ref with StorageManager.open"
            )
        if not isinstance(content, bytes | bytearray | memoryview):
            iter_chunks(content)  # raises where it is not a stream; nothing is read
            if _is_left_empty(content):
                raise EmptyUploadError("no file was chosen: the upload has neither a name nor content")
            own_filename, own_content_type = upload_names(content)
            filename = own_filename if filename is None else filename
            content_type = own_content_type if content_type is None else content_type
        self._state = AttachmentState()
        self._state.fill(content, filename, content_type, None if extra is None else storable(extra, "extra"))

    @classmethod
    def from_upload(cls, upload: UploadFile, *, extra: Mapping[str, Any] | None = None) -> Self:
        """Create a pending attachment from an uploaded file, with the client's file name and media type.

        It is stored from its beginning, however much of it was read before. Where it cannot seek, it must yield as many bytes as
        its `size` says, if it has one.

        Args:
            upload: The uploaded file; read at the flush, and never closed.
            extra: Your own keys in the ref.

        Raises:
            EmptyUploadError: It is a file input that was left empty: it has neither a name nor bytes. If that is known only
                once it is read, the flush raises the error.
        """
        file: Any = upload if is_file(upload) else getattr(upload, "file", upload)
        filename, content_type = upload_names(upload)
        return cls(file, filename=filename, content_type=content_type, extra=extra)

    @classmethod
    def from_optional_upload(cls, upload: UploadFile | str | None, *, extra: Mapping[str, Any] | None = None) -> Self | None:
        """Create a pending attachment as `from_upload` does, or return None if no file was chosen.

        Browsers send a file input that was left empty as a file without a name and without bytes; `form.get("file")` of a form
        without that field is None.

        Args:
            upload: The uploaded file, or the value of a form without one: None or the empty string.
            extra: Your own keys in the ref.

        Raises:
            TypeError: It is a string.
        """
        if upload is None or upload == "" or _is_left_empty(upload):
            return None
        if isinstance(upload, str):
            raise TypeError("the field contains text, not a file; the form needs enctype='multipart/form-data'")
        return cls.from_upload(upload, extra=extra)

    @classmethod
    def restore(cls, ref: StoredObjectRef) -> Self:
        """Create an attachment that undoes a replacement or delete, during the object's retention.

        Assign it to a row like any other: the flush cancels the pending delete, in the transaction of the row. Only an object
        with a pending delete can be restored, which needs a journal; `StoragePolicy(retention=...)` sets how long it is kept.

        Args:
            ref: The ref that the row had, as the application saved it.

        Raises:
            StaleAttachmentError: At the flush: the object has no pending delete.
            ConfigurationError: At the flush: the base is bound without a journal.
        """
        if not isinstance(ref, StoredObjectRef):
            raise InvalidReferenceError(f"restore takes a StoredObjectRef, not {type(ref).__name__}")
        state = AttachmentState()
        state.ref, state.owner = ref, Owner.DELETE
        return cls._in(state)

    @classmethod
    def _of(cls, ref: StoredObjectRef, column_type: ColumnType) -> Self:
        """Make the stored attachment of a row; it is called once per row that is read, and must be fast."""
        self = object.__new__(cls)
        self._state = state = AttachmentState()
        state.ref, state.address = ref, column_type
        return self

    @classmethod
    def _broken(cls, error: InvalidReferenceError, column_type: ColumnType) -> Self:
        """Make the attachment of a row whose value is not a ref."""
        state = AttachmentState()
        state.error, state.address = error, column_type
        return cls._in(state)

    @classmethod
    def _in(cls, state: AttachmentState) -> Self:
        """Make an attachment that is in a state."""
        self = object.__new__(cls)
        self._state = state
        return self

    @property
    def is_pending(self) -> bool:
        """Whether it is not stored yet."""
        return self._state.status is Status.PENDING

    @property
    def ref(self) -> StoredObjectRef:
        """The receipt of the stored object.

        Raises:
            UnboundAttachmentError: It is not stored yet.
            InvalidReferenceError: The row contains a value that is not a ref.
        """
        return self._state.ref or self._state.require_ref()

    @property
    def content_type(self) -> str | None:
        """The media type, as given."""
        return self._state.content_type if self.is_pending else self.ref.content_type

    @property
    def original_filename(self) -> str | None:
        """The file name: as given while pending, sanitized once stored."""
        return self._state.filename if self.is_pending else self.ref.original_filename

    @property
    def variants(self) -> AttachmentVariants:
        """The derived files by the names that the column declares; nothing is loaded or made.

        Raises:
            UnboundAttachmentError: It is not stored yet.
            InvalidReferenceError: The row contains a value that is not a ref.
        """
        self._state.require_ref()
        return AttachmentVariants(self._state)

    async def variant(self, name: str) -> AttachmentVariant:
        """Return the variant of a name; a missing one is made now, and recorded in the row.

        A variant that an older recipe made is not missing. The variant is recorded in a separate transaction, which waits for
        others that have changed or locked the row, on SQLite for any that has written: end yours first. Concurrent calls for the
        same variant in one process share the work.

        Args:
            name: One of the names that the column declares.

        Raises:
            UnknownVariantError: The column declares no such name.
            ConfigurationError: The base is bound with neither a journal nor sessions.
            StaleAttachmentError: No committed row refers to the file: it is not committed yet, or the row has another one now; or
                a transaction, perhaps the caller's own, has locked the row for long.
            DerivationRefusedError: The variant can never be made from this file, or the recipe is not for files of its type.
            DerivationFailedError: The variant could not be made; it may be tried again.
            ScanPendingError: A virus scanner has not scanned the file yet.
            InfectedObjectError: A virus scanner has found the file infected.
            StorageError: The file could not be read, or the result not be stored.
        """
        state = self._state
        ref, column_type = state.require_ref(), state.column_type
        if name not in column_type.variants:
            raise _unknown_variant(column_type, name)
        if name not in (ref.variants or {}):
            try:
                held = await column_type.binding().make_variant(column_type, ref, name)
            except ObjectNotFoundError as error:
                await state.require_current(error)
                raise
            state.add_variants(held.variants or {})
        return AttachmentVariant(state, name, (state.require_ref().variants or {})[name])

    @property
    def sync(self) -> SyncAttachment:
        """The same methods for synchronous code, in threads without a running event loop."""
        return SyncAttachment(self)

    async def store(self, column: InstrumentedAttribute[Any]) -> Self:
        """Upload now, before any transaction; the row to which it is assigned later refers to this object.

        If it is never assigned, or the process dies, the journal or the garbage collector deletes the object.

        Args:
            column: The attribute that it is for, such as `Document.file`; its policy decides where the object is stored.

        Raises:
            ConsumedSourceError: Its stream was already read.
            ContentTooLargeError: It is larger than the column's policy allows, even if it was stored for another one.
            StorageError: As `StorageManager.put_stream`.
        """
        column_type = _column_type_of(column)
        if self.is_pending:
            await column_type.binding().upload(self, column_type)
            self._state.release()
        else:
            column_type.require_fit(self.ref)
        return self

    @classmethod
    async def _adopt(
        cls, staged: StoredObjectRef, column_type: ColumnType, verify: Callable[[StoredObjectRef], Awaitable[StoredObjectRef]]
    ) -> Attachment:
        """Copy an object that a client has stored directly to a location that no client can write, and verify the copy.

        It cannot be stored a second time, because the client may have changed its object by then.
        """
        adopted = cls._of(staged, column_type)._copy()
        await column_type.binding().upload(adopted, column_type, verify=verify)
        adopted._state.drop_source()
        adopted._state.release()
        return adopted

    def _copy(self) -> Attachment:
        """Return a pending attachment that becomes a copy, for another column or row; again so after a rollback."""
        return Attachment._in(self._state.copy())

    def __repr__(self) -> str:
        state = self._state
        if state.error is not None:
            return f"<Attachment broken: {state.error}>"
        if state.ref is None:
            return f"<Attachment pending filename={state.filename!r}>"
        return f"<Attachment size={state.ref.size} filename={state.ref.original_filename!r}>"

    def __str__(self) -> str:
        """Return its file name, for templates, lists and exports; what `repr` says where it has none."""
        return self.describe()["original_filename"] or repr(self)

    def describe(self) -> dict[str, Any]:
        """Return the fields that a client may see: size, media type, name and checksum, never the location.

        Response models show the same. It is for encoders that do not know attachments: `json.dumps(..., default=...)`, or
        Litestar's `type_encoders={Attachment: Attachment.describe}`. Unknown fields are None: a pending attachment has no size
        and no checksum, and one whose row contains no readable ref has none of the fields.
        """
        ref, given = self._state.ref, self._state
        if ref is None:
            name = None if given.filename is None else clean_filename(given.filename)
            return {"size": None, "content_type": given.content_type, "original_filename": name, "checksum": None}
        return super().describe()

    def __eq__(self, other: object) -> bool:
        """Return whether both refer to the same object; a pending one is equal to itself only."""
        if self is other:
            return True
        if not isinstance(other, Attachment):
            return NotImplemented
        mine, theirs = self._state.ref, other._state.ref
        if mine is None or theirs is None:
            return False
        return (mine.backend, mine.location) == (theirs.backend, theirs.location)

    def __hash__(self) -> int:
        # Equal attachments have these fields in common, and a pending one has them already, so its hash does not change.
        ref, given = self._state.ref, self._state
        if ref is not None:
            return hash((ref.original_filename, ref.content_type))
        return hash((clean_filename(given.filename), given.content_type))


class AttachmentVariant(_StoredFile):
    """A file that is derived from an attachment, or the original in its place if the recipe says so.

    Attributes:
        name: The name that the column declares.
    """

    __slots__ = ("_ref", "_state", "name")

    def __init__(self, state: AttachmentState, name: str, ref: StoredObjectRef) -> None:
        self._state = state
        self.name: str = name
        self._ref = ref

    @property
    def ref(self) -> StoredObjectRef:
        """The receipt of its object."""
        return self._ref

    @property
    def is_original(self) -> bool:
        """Whether it is the original, because the variant is missing."""
        return self.ref.recipe is None

    @property
    def content_type(self) -> str | None:
        """The media type of its recipe."""
        return self.ref.content_type

    @property
    def original_filename(self) -> str | None:
        """The file name of its recipe, or None."""
        return self.ref.original_filename

    @property
    def media(self) -> Mapping[str, Any] | None:
        """The properties of the content that its recipe has recorded, such as `width` and `height`."""
        return self.ref.media

    @property
    def sync(self) -> SyncAttachmentVariant:
        """The same methods for synchronous code, in threads without a running event loop."""
        return SyncAttachmentVariant(self)

    def __eq__(self, other: object) -> bool:
        """Return whether both have the same object."""
        if not isinstance(other, AttachmentVariant):
            return NotImplemented
        return (self.ref.backend, self.ref.location) == (other.ref.backend, other.ref.location)

    def __hash__(self) -> int:
        return hash(self.ref)

    def __repr__(self) -> str:
        return f"<AttachmentVariant {self.name!r} size={self.ref.size}{' original' if self.is_original else ''}>"


class AttachmentVariants(Mapping[str, "AttachmentVariant | None"]):
    """The variants of an attachment by name: those that its column declares, and others that its row has.

    The value under a declared name that is missing, because it is not made yet or cannot be made, is the original where the
    recipe has `missing="original"`, and None where it has `missing="nothing"`. It is None, too, where the recipe is not for
    originals of this media type. A name that is neither declared nor there raises `UnknownVariantError`, a `KeyError`. What an
    older recipe made is shown until it is made again.
    """

    __slots__ = ("_state",)

    def __init__(self, state: AttachmentState) -> None:
        self._state = state

    def __getitem__(self, name: str) -> AttachmentVariant | None:
        ref = self._state.require_ref()
        found = (ref.variants or {}).get(name)
        if found is None:
            column_type = self._state.column_type
            declared = column_type.variants.get(name)
            if declared is None:
                raise _unknown_variant(column_type, name)
            if declared.recipe.missing == "nothing" or not declared.is_for(ref):
                return None
            found = ref
        return AttachmentVariant(self._state, name, found)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._state.column_type.variants, *(self._state.require_ref().variants or ()))))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"<AttachmentVariants {', '.join(self)}>"


def _unknown_variant(column_type: ColumnType, name: str) -> UnknownVariantError:
    known = ", ".join(column_type.variants) or "none"
    return UnknownVariantError(f"{column_type.label} declares no variant {name!r:.60} (there are: {known})")


class _SyncStoredFile(Generic[F]):
    """The verbs that attachments and their variants have in common, for synchronous code."""

    __slots__ = ("_file",)
    _name: ClassVar[str]

    def __init__(self, file: F) -> None:
        self._file = file

    def read(self) -> bytes:
        """Return all bytes, verified; see `Attachment.read`."""
        return self._run(self._file.read(), "read")

    def open(self, *, offset: int = 0, length: int | None = None, verify: bool = False) -> SyncObjectReader:
        """Open it as a binary file; see `Attachment.open`."""
        opening = self._file.open(offset=offset, length=length, verify=verify)
        return SyncObjectReader(self._run(opening.start(), "open"))

    def exists(self) -> bool:
        """Return whether its object is there; see `Attachment.exists`."""
        return self._run(self._file.exists(), "exists")

    def url(
        self,
        *,
        expires_in: timedelta,
        disposition: Disposition = "attachment",
        filename: str | None = None,
        stable_for: timedelta | None = None,
    ) -> str:
        """Return a URL with which anyone can read it until it expires; see `Attachment.url`."""
        work = self._file.url(expires_in=expires_in, disposition=disposition, filename=filename, stable_for=stable_for)
        return self._run(work, "url")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._file!r}>"

    def _run(self, work: Coroutine[Any, Any, T], name: str) -> T:
        return run_blocking(work, f"{self._name}.sync.{name}", f"'await {self._name}.{name}(...)'")


class SyncAttachmentVariant(_SyncStoredFile["AttachmentVariant"]):
    """The methods of an `AttachmentVariant` for synchronous code."""

    __slots__ = ()
    _name = "variant"


class SyncAttachment(_SyncStoredFile["Attachment"]):
    """The methods of an `Attachment` for synchronous code: `user.avatar.sync.read()`.

    Each does what the verb of the same name does; see `granite_storage.manager.SyncStorage`.
    """

    __slots__ = ()
    _name = "attachment"

    def variant(self, name: str) -> AttachmentVariant:
        """Return the variant of a name, made now if it is missing; see `Attachment.variant`."""
        return self._run(self._file.variant(name), "variant")

    def store(self, column: InstrumentedAttribute[Any]) -> Attachment:
        """Upload now, before any transaction; see `Attachment.store`."""
        if self._file.is_pending:
            self._file._state.require_synchronous()
        return self._run(self._file.store(column), "store")


def _is_left_empty(upload: object) -> bool:
    """Return whether an upload is known to be an empty file input: it has neither a name nor bytes."""
    if not (is_file(upload) and is_form_upload(upload)):
        return False
    return not getattr(upload, "filename", None) and upload_size(upload) == 0


def _column_type_of(column: InstrumentedAttribute[Any]) -> ColumnType:
    column_type: ColumnType | None = getattr(column, "type", None)
    if column_type is None or not hasattr(column_type, "storage_key"):
        raise TypeError(f"store() takes an attachment attribute of a model, such as Document.file, not {column!r}")
    return column_type
