"""The value of an attachment attribute: a file on its way into a row, or one that is there."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias

from granite_storage._engine import upload_names
from granite_storage.exceptions import (
    ConsumedSourceError,
    EmptyUploadError,
    InvalidReferenceError,
    ObjectNotFoundError,
    StaleAttachmentError,
    UnboundAttachmentError,
)
from granite_storage.locations import clean_filename
from granite_storage.orm._registry import active_bindings, find_binding
from granite_storage.readers import OpeningReader, StoredObjectReader
from granite_storage.refs import StoredObjectRef, read_only
from granite_storage.streams import (
    BytesLike,
    ByteSource,
    ReadOnce,
    SupportsAsyncRead,
    SupportsRead,
    WholeFile,
    is_file,
    is_form_upload,
    is_weakly_referable,
    iter_chunks,
    require_synchronous,
    upload_size,
    whole,
)

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic_core import CoreSchema, SchemaSerializer
    from sqlalchemy.orm import InstanceState, InstrumentedAttribute

    from granite_storage._engine import PreparedUpload
    from granite_storage.manager import StorageManager
    from granite_storage.orm._interfaces import ColumnType, Intent

__all__ = ["Address", "Attachment", "LazySerializer", "core_schema_of", "fields_schema"]


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
        """Return what finds a column again in another process."""
        binding = find_binding(column_type.table.metadata)
        base = "" if binding is None else binding.base_name
        return cls(base, column_type.table.fullname, column_type.field_name, column_type.storage_key)

    def find(self) -> ColumnType:
        """Return the type of the column, in the base that has it.

        Raises:
            UnboundAttachmentError: No base with that column is bound here, or more than one.
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


# What a response model shows of an attachment: size, media type, name and checksum, never where the bytes lie.


logger: logging.Logger = logging.getLogger("granite_storage")


def core_schema_of(attachment: type[Attachment]) -> CoreSchema:
    """Return how pydantic checks and shows attachments.

    In Python they stay what they are, so that `Model(**schema.model_dump())` assigns them; in JSON they are shown. One whose row
    holds no ref that can be read is shown as null and logged: one bad row must not take down a list. The JSON schema offers no
    null for it, for a client need not reckon with a damaged database.
    """
    from pydantic_core import core_schema

    shown = core_schema.nullable_schema(fields_schema())
    serialization = core_schema.plain_serializer_function_ser_schema(_fields, return_schema=shown, when_used="json")
    return core_schema.is_instance_schema(attachment, serialization=serialization)


class LazySerializer:
    """Lets pydantic show an attachment where no field says that there is one, as in an endpoint that returns a plain dict."""

    def __get__(self, instance: object, owner: type[Attachment]) -> SchemaSerializer:
        try:
            from pydantic_core import SchemaSerializer
        except ImportError:
            raise AttributeError("__pydantic_serializer__") from None
        serializer = SchemaSerializer(core_schema_of(owner))
        owner.__pydantic_serializer__ = serializer
        return serializer


def fields_schema() -> CoreSchema:
    """Return the schema of what is shown."""
    from pydantic_core import core_schema

    text, field = core_schema.str_schema(), core_schema.typed_dict_field
    optional = core_schema.nullable_schema(text)
    return core_schema.typed_dict_schema(
        {
            "size": field(core_schema.int_schema(ge=0)),
            "content_type": field(optional),
            "original_filename": field(optional),
            "checksum": field(text),
        }
    )


def _fields(value: Attachment) -> dict[str, Any] | None:
    if value._error is not None:
        logger.warning("an attachment is shown as null, because its row holds no ref that can be read: %s", value._error)
        return None
    if value.is_pending:
        raise UnboundAttachmentError("the attachment is not stored yet; flush the session before it is shown")
    return value.describe()


# What a pickle keeps; the rest belongs to a transaction.
_KEPT = ("_content_type", "_error", "_extra", "_filename", "_home", "_ref", "_restored", "_reusable", "_source")
_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")


UploadFile: TypeAlias = SupportsAsyncRead | SupportsRead | AsyncIterable[BytesLike]
"""What a web framework passes for a file of a form, such as Starlette's `UploadFile` or werkzeug's `FileStorage`."""


class Attachment:
    """A file that belongs to one row: pending until the flush that stores it, then stored.

    Assigning one to a row is all there is to do: the flush uploads it, the commit keeps it and a rollback removes it. An
    attachment behaves as a value: assigned to a second row it becomes a copy with an object of its own, unless the first row
    gives it up in the same transaction.

    Args:
        content: Bytes, or anything that `StorageManager.put_stream` takes, which is read at the flush and never closed. A file
            that can seek is stored from its beginning, however much of it was read before. Bytes and such files can be stored
            again after a rollback; other streams are read once.
        filename: The client's file name; made safe, never trusted. None for that of `content`, where it is an upload.
        content_type: The media type, kept as given. None for that of `content`, where it is an upload.
        extra: Keys of your own to keep in the ref, JSON values without NUL characters and lone surrogates: PostgreSQL keeps
            neither, so they are refused on every database.

    Raises:
        TypeError: The content is neither bytes nor a binary stream.
        EmptyUploadError: The content is an upload without a name and without bytes.
        InvalidReferenceError: `extra` cannot be kept.

    Example:
        >>> Attachment(b"Hello", filename="hello.txt", content_type="text/plain").is_pending
        True
    """

    # Slots, so that what walks through `vars(...)` finds no private state, no bytes and no column.
    __slots__ = (
        "__weakref__",
        "_assignments",
        "_claimed",
        "_content_type",
        "_discarded",
        "_error",
        "_extra",
        "_filename",
        "_home",
        "_intent",
        "_is_written",
        "_ref",
        "_restored",
        "_reusable",
        "_source",
        "_spent",
        "_unowned",
    )

    _source: ByteSource | WholeFile | ReadOnce | Attachment | None
    # The source that was read, where nothing but this can remember that: until the commit.
    _spent: WholeFile | ReadOnce | None
    # True while the source can be stored once more after a rollback.
    _reusable: bool
    _filename: str | None
    _content_type: str | None
    _extra: Mapping[str, Any] | None
    _ref: StoredObjectRef | None
    _error: InvalidReferenceError | None
    _home: ColumnType | Address | None
    # True while a flush writes the ref into the row that owns it: the column type binds no other.
    _claimed: bool
    # True once a statement of that flush has written it.
    _is_written: bool
    # What a journal has written down about its object, until the row that takes it is committed.
    _intent: Intent | None
    # True once it was made by `restore`: a row takes it by undoing the delete that its object waits for.
    _restored: bool
    # True from `store` until a row takes it: an object that no row holds yet may be taken without a copy.
    _unowned: bool
    # The instances that it was assigned to while no row held it, and the attributes.
    _assignments: Sequence[tuple[weakref.ref[InstanceState[Any]], str]]
    # True once it was removed because no row had taken it.
    _discarded: bool

    __pydantic_serializer__: ClassVar[Any] = LazySerializer()

    def __new__(cls, *_: Any, **__: Any) -> Self:  # noqa: D102
        self = super().__new__(cls)
        self._source = self._filename = self._content_type = self._extra = None
        self._ref = self._error = self._home = self._intent = self._spent = None
        self._reusable = self._claimed = self._is_written = self._restored = self._unowned = self._discarded = False
        self._assignments = ()
        return self

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
        self._reusable = isinstance(content, bytes | bytearray | memoryview)
        if not self._reusable:
            iter_chunks(content)  # raises where it is no stream; nothing is read
            if _is_left_empty(content):
                raise EmptyUploadError("no file was chosen: the upload has neither a name nor content")
            own_filename, own_content_type = upload_names(content)
            filename = own_filename if filename is None else filename
            content_type = own_content_type if content_type is None else content_type
        self._source = content if self._reusable else whole(content)
        if isinstance(self._source, WholeFile):
            self._reusable = self._source.can_rewind
        self._filename = filename
        self._content_type = content_type
        self._extra = None if extra is None else _storable(extra)

    @classmethod
    def from_upload(cls, upload: UploadFile, *, extra: Mapping[str, Any] | None = None) -> Self:
        """Make a pending attachment of an uploaded file, with the file name and media type that the client gave.

        It is stored from its beginning, however much of it was read before. Where it cannot seek, it must yield as many bytes as
        its `size` says, if it has one.

        Args:
            upload: The uploaded file; read at the flush, and never closed.
            extra: Keys of your own to keep in the ref.

        Raises:
            EmptyUploadError: It is a file input that was left empty: it has neither a name nor bytes. Where that is known only
                when it is read, the flush raises it.
        """
        file: Any = upload if is_file(upload) else getattr(upload, "file", upload)
        filename, content_type = upload_names(upload)
        if _is_left_empty(upload):
            raise EmptyUploadError("no file was chosen: the upload has neither a name nor content")
        return cls(file, filename=filename, content_type=content_type, extra=extra)

    @classmethod
    def from_optional_upload(cls, upload: UploadFile | str | None, *, extra: Mapping[str, Any] | None = None) -> Self | None:
        """Make a pending attachment as `from_upload` does, or return None where no file was chosen.

        Browsers send a file input that was left empty as a file without a name and without bytes; `form.get("file")` of a form
        without that field is None.

        Args:
            upload: The uploaded file, or what a form holds in its place: None or the empty string.
            extra: Keys of your own to keep in the ref.

        Raises:
            TypeError: It is a text.
        """
        if upload is None or upload == "" or _is_left_empty(upload):
            return None
        if isinstance(upload, str):
            raise TypeError("the field holds a text, not a file; the form needs enctype='multipart/form-data'")
        return cls.from_upload(upload, extra=extra)

    @classmethod
    def restore(cls, ref: StoredObjectRef) -> Self:
        """Make an attachment that undoes a replacement or delete, while the object's retention lasts.

        Assign it to a row like any other: the flush takes the pending delete back, in the row's own transaction. Only an object
        that waits to be deleted can be restored, which a journal knows; `StoragePolicy(retention=...)` says how long it waits.

        Args:
            ref: What the row held, as the application kept it.

        Raises:
            StaleAttachmentError: At the flush: the object does not wait, or waits no more.
            ConfigurationError: At the flush: the column's base is bound without a journal.
        """
        if not isinstance(ref, StoredObjectRef):
            raise InvalidReferenceError(f"restore takes a StoredObjectRef, not {type(ref).__name__}")
        self = cls.__new__(cls)
        self._ref = ref
        self._restored = True
        return self

    @classmethod
    def _of(cls, ref: StoredObjectRef, column_type: ColumnType) -> Self:
        """Make the stored attachment that a row holds; once per row that is read, so nothing is done twice."""
        self = cls.__new__(cls)
        self._ref = ref
        self._home = column_type
        return self

    @classmethod
    def _broken(cls, error: InvalidReferenceError, column_type: ColumnType) -> Self:
        """Make the attachment of a row whose value is not a ref."""
        self = cls.__new__(cls)
        self._error = error
        self._home = column_type
        return self

    @property
    def is_pending(self) -> bool:
        """Whether it is still to be stored."""
        return self._ref is None and self._error is None

    @property
    def ref(self) -> StoredObjectRef:
        """The receipt of the stored object.

        Raises:
            UnboundAttachmentError: It is not stored yet.
            InvalidReferenceError: The row holds something that is not a ref.
        """
        if self._error is not None:
            raise InvalidReferenceError(str(self._error)) from self._error
        if self._ref is None:
            raise UnboundAttachmentError(
                "the attachment is not stored yet: flush the session that its row was added to, or await store(Document.file)"
            )
        return self._ref

    @property
    def size(self) -> int:
        """Its size in bytes; raises as `ref` does."""
        return self.ref.size

    @property
    def checksum(self) -> str:
        """`sha256:<hex>`, empty where unknown; raises as `ref` does."""
        return self.ref.checksum

    @property
    def location(self) -> str:
        """Its address inside its backend; raises as `ref` does."""
        return self.ref.location

    @property
    def content_type(self) -> str | None:
        """The media type that was given."""
        return self._content_type if self.is_pending else self.ref.content_type

    @property
    def original_filename(self) -> str | None:
        """The name that was given: raw while pending, cleaned once stored."""
        return self._filename if self.is_pending else self.ref.original_filename

    @property
    def manager(self) -> StorageManager:
        """The manager that stores it, found from its column.

        Raises:
            UnboundAttachmentError: It belongs to no column yet, or `bind_storage` was not called for the column's base.
        """
        return self._column_type.binding().manager

    @property
    def _column_type(self) -> ColumnType:
        match self._home:
            case None:
                raise UnboundAttachmentError(
                    "the attachment belongs to no column yet: assign it to a row and flush the session, or await"
                    " store(Document.file)"
                )
            case Address():
                return self._home.find()
            case column_type:
                return column_type

    async def read(self) -> bytes:
        """Return all bytes, verified; see `StorageManager.get`.

        Raises:
            StaleAttachmentError: The object is gone because its row has been given another file since this attachment was read,
                or has been deleted; known where `bind_storage` was given `sessions`. Load the row again.
            StorageError: As `StorageManager.get`.
        """
        try:
            return await self.manager.get(self.ref)
        except ObjectNotFoundError as error:
            await self._require_current(error)
            raise

    def open(self, *, offset: int = 0, length: int | None = None, verify: bool = False) -> OpeningReader:
        """Open it for streaming; see `StorageManager.open`. Raises as `read` does where the object is gone."""
        opening = self.manager.open(self.ref, offset=offset, length=length, verify=verify)

        async def start() -> StoredObjectReader:
            try:
                return await opening
            except ObjectNotFoundError as error:
                await self._require_current(error)
                raise

        return OpeningReader(start)

    async def _require_current(self, missing: ObjectNotFoundError) -> None:
        """Tell a row that has moved on from an object that is lost: ask whether any row of the column still refers to it."""
        column_type = self._column_type
        if await column_type.binding().is_referred_to(column_type.column, self.ref) is False:
            raise StaleAttachmentError(
                f"the object at {self.location!r} is gone, because its row has been given another file since this attachment was"
                " read, or has been deleted: load the row again"
            ) from missing

    async def exists(self) -> bool:
        """Tell whether its object is there; see `StorageManager.exists`."""
        return await self.manager.exists(self.ref)

    async def store(self, column: InstrumentedAttribute[Any]) -> Self:
        """Upload now, before any transaction; the row that it is assigned to later takes the object as it is.

        One that is never assigned, or whose process dies, leaves an object that the garbage collector reclaims.

        Args:
            column: The attribute it is meant for, such as `Document.file`; its policy decides where the object goes.

        Raises:
            ConsumedSourceError: Its stream was read already.
            ContentTooLargeError: It is larger than the column's policy allows, also where it was stored for another one.
            StorageError: As `StorageManager.put_stream`.
        """
        column_type = _home_of(column)
        if self.is_pending:
            await column_type.binding().upload(self, column_type)
            self._unowned = True
        else:
            column_type.require_fit(self.ref)
        return self

    @classmethod
    async def _adopt(
        cls, staged: StoredObjectRef, column_type: ColumnType, verify: Callable[[StoredObjectRef], Awaitable[StoredObjectRef]]
    ) -> Attachment:
        """Copy what a client has stored by itself to where no client can, verify the copy, and let a row take it.

        It cannot be stored a second time: what the client has stored may have changed by then.
        """
        adopted = cls._of(staged, column_type)._copy()
        await column_type.binding().upload(adopted, column_type, verify=verify)
        adopted._source, adopted._reusable = None, False
        adopted._unowned = True
        return adopted

    def _prepare(self, manager: StorageManager, column_type: ColumnType, entity_id: str) -> PreparedUpload:
        """Decide where it will be stored, for a column."""
        names = _names_of(column_type, entity_id)
        original = self._origin()
        if not isinstance(original, Attachment):
            given: dict[str, Any] = {
                "content_type": self._content_type,
                "original_filename": self._filename,
                "extra": self._extra,
            }
        elif original.manager is manager:
            return manager._engine.prepare_copy(original.ref, **names)
        else:
            ref = original.ref
            given = {"content_type": ref.content_type, "original_filename": ref.original_filename, "extra": ref.extra}
        return manager._engine.prepare(**names, **given)

    async def _put(self, manager: StorageManager, column_type: ColumnType, prepared: PreparedUpload) -> None:
        """Upload to the prepared location, and become stored."""
        engine = manager._engine
        source = self._take_origin()
        if not isinstance(source, Attachment):
            try:
                ref = await engine.put(prepared, source)
            finally:
                self._forget_consumed()
        elif source.manager is manager:
            ref = await engine.copy(source.ref, prepared)
        else:
            async with source.open(verify=True) as stream:
                # Before the stream is closed: a cancellation that comes then has to find what is stored.
                self._ref, self._home = await engine.put(prepared, stream), column_type
            return
        self._ref, self._home = ref, column_type

    def _copy(self) -> Attachment:
        """Return a pending attachment that becomes a copy, for another column or row; again so after a rollback."""
        copy = Attachment.__new__(Attachment)
        copy._source, copy._reusable = self, True
        copy._filename, copy._content_type, copy._extra = self.original_filename, self.content_type, self._extra
        return copy

    def _origin(self) -> ByteSource | WholeFile | ReadOnce | Attachment:
        """Return what is to be stored: a stream once; bytes, files that can seek and a copy's original after each rollback."""
        source = self._source
        if isinstance(source, Attachment) and source.is_pending:
            # The original was rolled back as well, so its own content is all that is left.
            return source._origin()
        if source is None and self._discarded:
            raise ConsumedSourceError(
                "the attachment was removed when its form or its request ended, because no row held it; assign it to an instance"
                " before that"
            )
        if source is None:
            raise ConsumedSourceError(
                "the attachment's stream was read already, and a stream is read once: make a new attachment, of bytes where it"
                " shall survive a rollback"
            )
        return source

    def _require_synchronous(self) -> None:
        """Refuse a stream that only an event loop can read."""
        origin = self._origin()
        if not isinstance(origin, Attachment):
            require_synchronous(origin)

    def _take_origin(self) -> ByteSource | WholeFile | ReadOnce | Attachment:
        source = self._source
        if isinstance(source, Attachment) and source.is_pending:
            return source._take_origin()
        origin = self._origin()
        if not self._reusable:
            self._spend()
        return origin

    def _forget_consumed(self) -> None:
        """Let go of a file that turned out to be readable only once."""
        source = self._source
        if isinstance(source, Attachment) and source.is_pending:
            source._forget_consumed()
        elif isinstance(source, WholeFile) and not source.can_rewind:
            self._spend()

    def _spend(self) -> None:
        """Let go of a source that is read once."""
        source = self._source
        if isinstance(source, WholeFile | ReadOnce) and not is_weakly_referable(source.held):
            self._spent = source
        self._source, self._reusable = None, False

    def _undo(self) -> None:
        """Become pending again, after its object was rolled back; bytes and files that can seek can be stored once more."""
        self._ref = self._intent = None
        self._claimed = self._is_written = self._unowned = False

    def _settle(self) -> None:
        """Let go of the bytes, once its row is committed."""
        self._source = self._spent = self._intent = None
        self._reusable = False

    def _note_assignment(self, state: InstanceState[Any], key: str) -> None:
        if self._unowned:
            self._assignments = [*self._assignments, (weakref.ref(state), key)]

    @property
    def _is_assigned(self) -> bool:
        """Whether an instance holds it whose row may be flushed later."""
        states = [(reference(), key) for reference, key in self._assignments]
        return any(state is not None and state.obj() is not None and state.dict.get(key) is self for state, key in states)

    def _forget_claim(self) -> None:
        self._claimed = self._is_written = False

    def __repr__(self) -> str:
        if self._error is not None:
            return f"<Attachment broken: {self._error}>"
        if self._ref is None:
            return f"<Attachment pending filename={self._filename!r}>"
        return f"<Attachment size={self._ref.size} filename={self._ref.original_filename!r}>"

    def describe(self) -> dict[str, Any]:
        """Return what a client may see: size, media type, name and checksum, never where the bytes lie.

        It is what response models show, for encoders that know nothing of attachments: `json.dumps(..., default=...)`, or
        Litestar's `type_encoders={Attachment: Attachment.describe}`. One that is pending has no size and no checksum yet, and
        one whose row holds no ref that can be read has nothing to show; what is missing is None.
        """
        ref = self._ref
        if ref is None:
            name = None if self._filename is None else clean_filename(self._filename)
            return {"size": None, "content_type": self._content_type, "original_filename": name, "checksum": None}
        return {
            "size": ref.size,
            "content_type": ref.content_type,
            "original_filename": ref.original_filename,
            "checksum": ref.checksum,
        }

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]  # what `vars` gives, to encoders and debuggers
        return self.describe()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yield what `describe` returns as pairs, so that `dict(attachment)` is that, too."""
        yield from self.describe().items()

    def __eq__(self, other: object) -> bool:
        """Tell whether both lead to the same object; a pending one is equal to itself only."""
        if self is other:
            return True
        if not isinstance(other, Attachment):
            return NotImplemented
        mine, theirs = self._ref, other._ref
        if mine is None or theirs is None:
            return False
        return (mine.backend, mine.location) == (theirs.backend, theirs.location)

    def __hash__(self) -> int:
        # By what two that are equal have in common, and what a pending one has already: its hash is the same once it is stored.
        if self._ref is not None:
            return hash((self._ref.original_filename, self._ref.content_type))
        return hash((clean_filename(self._filename), self._content_type))

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key in _KEPT if (value := getattr(self, key)) not in (None, False)}
        if self._ref is not None:
            state.pop("_source", None)
            state.pop("_reusable", None)
        elif self.is_pending:
            if not isinstance(self._source, bytes | bytearray | memoryview):
                raise TypeError("an attachment made of a stream cannot be pickled before it is stored")
            state["_source"] = bytes(self._source)
        if self._home is not None and not isinstance(self._home, Address):
            state["_home"] = Address.of(self._home)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, key, value)

    def __copy__(self) -> Attachment:
        return self

    def __deepcopy__(self, _: dict[int, Any]) -> Attachment:
        return self

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[Any], handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema_of(cls)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(fields_schema()), "title": "Attachment"}


def _is_left_empty(upload: object) -> bool:
    """Tell whether something is known to be a file input that was left empty: an upload without a name and without bytes."""
    if not (is_file(upload) and is_form_upload(upload)):
        return False
    return not getattr(upload, "filename", None) and upload_size(upload) == 0


def _names_of(column_type: ColumnType, entity_id: str) -> dict[str, Any]:
    return {
        "storage_key": column_type.storage_key,
        "model_name": column_type.model_name,
        "entity_id": entity_id,
        "field_name": column_type.field_name,
    }


def _storable(extra: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the extra keys, frozen, before anything is uploaded that the database would then refuse to refer to."""
    kept = read_only(extra, "extra")
    if any(_UNSTORABLE.search(text) for text in _texts(kept)):
        raise InvalidReferenceError("extra holds a NUL character or a lone surrogate, which PostgreSQL cannot keep in JSON")
    return kept


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Mapping():
            for key, item in value.items():
                yield key
                yield from _texts(item)
        case list():
            for item in value:
                yield from _texts(item)


def _home_of(column: InstrumentedAttribute[Any]) -> ColumnType:
    column_type: ColumnType | None = getattr(column, "type", None)
    if column_type is None or not hasattr(column_type, "storage_key"):
        raise TypeError(f"store() takes an attachment attribute of a model, such as Document.file, not {column!r}")
    return column_type
