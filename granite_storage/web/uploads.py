"""Receiving files: straight from the connection into storage, without a temporary file."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from inspect import isawaitable, isgeneratorfunction, signature
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias, TypeVar, cast, overload

from sqlalchemy.orm import InstrumentedAttribute
from starlette.datastructures import ImmutableMultiDict
from starlette.requests import Request

from granite_storage._engine import require_positive
from granite_storage._tasks import shielded_cleanup
from granite_storage.manager import StorageManager
from granite_storage.orm._interfaces import StoredObject
from granite_storage.orm.attachment import Attachment
from granite_storage.orm.collections import declared_collection
from granite_storage.orm.columns import AttachmentType
from granite_storage.orm.uploads import discard, remove
from granite_storage.refs import StoredObjectRef
from granite_storage.streams import BytesLike, require_size
from granite_storage.web._openapi import missing_error
from granite_storage.web._requests import (
    DEFAULT_LIMITS,
    MultipartReader,
    PartHead,
    RequestBody,
    UploadLimits,
    content_type_to_keep,
    decode_text,
    read_fields,
)
from granite_storage.web.errors import MalformedRequestError, MissingFieldError, RequestTooLargeError, UnsupportedRequestError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
NextChunk: TypeAlias = Callable[[], Awaitable[BytesLike | None]]
_FILE: Mapping[str, Any] = {"type": "string", "format": "binary"}

# Where an arriving file is stored, and what happens to it when its request ends.


@dataclass(frozen=True, kw_only=True)
class PolicyTarget:
    """Stores a file under a policy of a manager, and returns its ref: for applications that store refs themselves.

    Args:
        manager: The manager.
        storage_key: The policy to store it under.
        model_name: What kind of thing owns it; a segment of its location, like the next two.
        entity_id: Which of them.
        field_name: Which of its files.
        extra: Keys of your own to keep in the ref.
    """

    manager: StorageManager
    storage_key: str
    model_name: str
    entity_id: str
    field_name: str
    extra: Mapping[str, Any] | None = None

    async def put(self, file: FilePart) -> StoredObjectRef:
        """Store a file as it arrives; see `StorageManager.put_stream`."""
        return await self.manager.put_stream(
            storage_key=self.storage_key,
            model_name=self.model_name,
            entity_id=self.entity_id,
            field_name=self.field_name,
            stream=file,
            content_type=file.content_type,
            original_filename=file.filename,
            extra=self.extra,
        )


Target: TypeAlias = InstrumentedAttribute[Any] | PolicyTarget | Callable[[Any], Awaitable[Any]]
"""An attachment attribute, such as `Document.file`; a `PolicyTarget`; or a coroutine function that takes a `FilePart`."""


@dataclass(frozen=True)
class FileList:
    """Takes several files of one field, such as `<input type="file" multiple>` sends; without it a field takes one file.

    Args:
        target: Where each of them is stored.
        max_files: The most files of the field.

    Raises:
        ConfigurationError: `max_files` is not a positive number.
    """

    target: Target
    max_files: int

    def __post_init__(self) -> None:
        require_target(self.target)
        require_positive("max_files", self.max_files)


FileTarget: TypeAlias = Target | FileList
"""Where the files of a field are stored: a target for one file, a `FileList`, or an attribute that `attachments` declares."""


def _resolve_targets(files: Mapping[str, FileTarget], limits: UploadLimits) -> dict[str, FileTarget]:
    """Return the targets, with the list that a collection of attachments takes as many files into as it may have."""
    resolved: dict[str, FileTarget] = {}
    for name, target in files.items():
        if (declared := declared_collection(target)) is not None:
            target = FileList(cast(Target, target), declared.max_files or max(limits.max_files, 1))
        require_target(target.target if isinstance(target, FileList) else target, name)
        resolved[name] = target
    return resolved


def require_target(target: object, field: str | None = None) -> None:
    """Raise `TypeError` unless a file can be stored in a target, before a body is read; a function may return an awaitable."""
    if (
        isinstance(target, PolicyTarget)
        or _column_type_of(target) is not None
        or (callable(target) and not isinstance(target, type) and not isgeneratorfunction(target) and _takes_one(target))
    ):
        return
    where = "a file" if field is None else f"the file of the field {field!r}"
    named = target if isinstance(target, InstrumentedAttribute) else repr(target)
    raise TypeError(
        f"{where} can be stored in an attachment attribute, a PolicyTarget or a coroutine function that takes a FilePart, not in"
        f" {named}"
    )


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # it is written in C and has no signature
        return True
    return True


def max_size_of(target: Target) -> int | None:
    """Return the most bytes that the policy of a target allows, None for no limit, or none that is known."""
    if isinstance(target, PolicyTarget):
        return target.manager.policy(target.storage_key).max_size
    column_type = _column_type_of(target)
    return None if column_type is None else column_type.manager_in(column_type.binding()).policy(column_type.storage_key).max_size


def _column_type_of(target: object) -> AttachmentType | None:
    column_type = getattr(target, "type", None)
    return column_type if isinstance(column_type, AttachmentType) else None


@dataclass(slots=True)
class Received:
    """What a request has stored so far, so that it can be removed."""

    attachments: list[Attachment] = field(default_factory=list)
    refs: list[StoredObject] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.attachments or self.refs)

    async def store(self, file: FilePart, target: Target) -> Any:
        """Store a file in its target, as it arrives."""
        if isinstance(target, PolicyTarget):
            ref = await target.put(file)
            self.refs.append(StoredObject(target.manager, ref))
            return ref
        if isinstance(target, InstrumentedAttribute):
            pending = Attachment(file, filename=file.filename, content_type=file.content_type)
            stored: Any = await pending.store(target)
        else:
            receiving = target(file)
            if not isawaitable(receiving):
                raise TypeError(f"{target!r} takes files, so it must be a coroutine function: it has returned {receiving!r:.80}")
            stored = await receiving
        if isinstance(stored, Attachment):
            self.attachments.append(stored)
        return stored

    async def remove_all(self) -> None:
        """Remove everything, which nothing refers to yet; what could not be removed is logged."""
        refs, self.refs = self.refs, []
        await self.discard_attachments()
        await remove(refs, [])

    async def discard_attachments(self, *, but_assigned: bool = False) -> None:
        """Remove the attachments that no row has taken.

        Args:
            but_assigned: Whether those stay that are assigned to an instance: a later flush may store its row.
        """
        attachments, self.attachments = self.attachments, []
        if but_assigned:
            attachments = [item for item in attachments if not item._state.is_assigned(item)]
        await discard(attachments)


# Forms and bodies.


class FilePart:
    """A file as it arrives: iterate over it once with `async for`, or pass it to a function that takes a stream.

    Attributes:
        name: The name of its field; empty if the file is the whole body.
        filename: The client's file name, unchanged: never use it as a path.
        content_type: The client's media type; not verified.
        size: Its size in bytes, if it is the whole body and has a Content-Length; None otherwise.
    """

    def __init__(
        self,
        name: str,
        filename: str | None,
        content_type: str | None,
        *,
        next_chunk: NextChunk,
        max_size: int | None,
        fields: Sequence[tuple[str, str]] = (),
        size: int | None = None,
    ) -> None:
        self.name = name
        self.size = size
        self.filename = filename
        self.content_type = content_type
        self._next_chunk = next_chunk
        self._max_size = max_size
        self._size = 0
        self._fields = fields
        self._first: BytesLike | None = None

    @property
    def fields(self) -> ImmutableMultiDict[str, str]:
        """The fields that precede it in the form."""
        return ImmutableMultiDict(list(self._fields))

    async def is_absent(self) -> bool:
        """Return whether it is an empty file input of a browser: no name and no bytes."""
        if self.filename:
            return False
        self._first = await self._next_chunk()
        return self._first is None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> BytesLike:
        chunk, self._first = self._first, None
        if chunk is None:
            chunk = await self._next_chunk()
        if chunk is None:
            raise StopAsyncIteration
        self._size += len(chunk)
        require_size(self._size, self._max_size)
        return chunk


class FormFields(ImmutableMultiDict[str, str]):
    """The fields of a form that are not files, several values of one name in their order; `fields[name]` is the last of them."""

    def __getitem__(self, name: str) -> str:
        """Return a field.

        Raises:
            MissingFieldError: The form does not have it; the response is a 422.
        """
        if name not in self:
            raise MissingFieldError(f"the form has no field {name!r}")
        return super().__getitem__(name)


class FormFiles(ImmutableMultiDict[str, Any]):
    """The files of a form by the names of their fields; those of a `FileList` are a list, which may be empty.

    Args:
        files: The stored files, in their order.
        lists: The names of the fields that take several.
    """

    def __init__(self, files: Sequence[tuple[str, Any]], lists: Iterable[str] = ()) -> None:
        super().__init__(list(files))
        self._dict |= {name: self.getlist(name) for name in lists}

    def __getitem__(self, name: str) -> Any:
        """Return the file of a field, or its list of files.

        Raises:
            MissingFieldError: The form has no file in it; the response is a 422.
        """
        if name not in self:
            raise MissingFieldError(f"the form has no file in the field {name!r}")
        return super().__getitem__(name)


class UploadForm:
    """The fields and the stored files of a form.

    It is an async context manager: `async with await stream_upload(...) as form:`. At the end of the block it removes the
    attachments that no row has taken. If the block ends without an error, attachments assigned to an instance stay, because its
    row may be flushed later; if it raises, they are removed too.

    Attributes:
        fields: The fields that are not files.
        files: The stored files: an `Attachment`, a `StoredObjectRef`, or what a function of yours returned.
    """

    def __init__(self, fields: Sequence[tuple[str, str]], files: FormFiles, received: Received) -> None:
        self.fields: FormFields = FormFields(list(fields))
        self.files: FormFiles = files
        self._received = received

    async def discard(self) -> None:
        """Remove the attachments that no row has taken; a row that is flushed later can no longer take them.

        Refs of a `PolicyTarget` stay: only the application knows where it keeps them.
        """
        await self._received.discard_attachments()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        await self._received.discard_attachments(but_assigned=error is None)


async def stream_upload(
    request: Request,
    files: Mapping[str, FileTarget],
    *,
    required: Collection[str] = (),
    limits: UploadLimits = DEFAULT_LIMITS,
) -> UploadForm:
    """Receive a form, and store its files as they arrive, in their order.

    Nothing is spooled: the connection is read as fast as the storage takes the bytes, and memory is bounded, whatever the
    client sends. When it returns, the whole form has arrived and its files are stored. When it raises, because the form is
    malformed, too large or cut off, the storage fails, or the task is cancelled, the files stored so far are removed.

    Args:
        request: The request; its body must not have been read.
        files: Where the file of each field goes: an attachment attribute such as `Document.file`, a `PolicyTarget`, or a
            coroutine function that takes a `FilePart` and returns the value to keep in the form. A field takes one file, or as
            many as its `FileList` or its collection takes, such as `Album.photos`. Surplus files, and files of other fields, are
            refused before they are stored.
        required: The names of the files and of the other fields that the form must have. An empty file input, and an empty text,
            count as missing.
        limits: The limits of the form.

    Returns:
        The fields and the stored files. An empty file input is not among them. An attachment is assigned to a row like any
        other. `async with` removes those that no row takes; without it, they are removed like those of `Attachment.store`.

    Raises:
        UnsupportedRequestError: It is neither multipart/form-data nor URL-encoded, or has a Content-Encoding.
        MalformedRequestError: It is malformed, cut off, or has a file in a field where none is expected.
        RequestTooLargeError: It has more than `limits` allow, or more files in one field than it takes.
        MissingFieldError: A required field or file is missing; `names` lists all of them.
        ContentTooLargeError: A file has more bytes than its policy or `limits` allow.
        ConsumedSourceError: The application has read the body already; the response is a 500.
        ClientDisconnect: The client went away.
        StorageError: As `StorageManager.put_stream`.
    """
    files = _resolve_targets(files, limits)
    require_names("required", required)
    body = RequestBody(request, limits)
    media_type, options = body.media_type()
    form = _Form(files, required, limits)
    try:
        async with aclosing(body.chunks()) as chunks:
            if media_type == b"multipart/form-data":
                await form.receive(MultipartReader(options.get(b"boundary", b""), chunks, limits))
            elif media_type == b"application/x-www-form-urlencoded":
                form.fields = await read_fields(chunks, limits)
            else:
                raise UnsupportedRequestError("the body must be multipart/form-data or application/x-www-form-urlencoded")
        return form.result()
    except BaseException:
        if form.stored:
            await shielded_cleanup(form.stored.remove_all(), "removing what a failed request has stored")
        raise


@overload
async def stream_body(
    request: Request, target: InstrumentedAttribute[Any], *, filename: str | None = None, limits: UploadLimits = ...
) -> Attachment: ...
@overload
async def stream_body(
    request: Request, target: PolicyTarget, *, filename: str | None = None, limits: UploadLimits = ...
) -> StoredObjectRef: ...
@overload
async def stream_body(
    request: Request,
    target: Callable[[FilePart], Awaitable[T]],
    *,
    filename: str | None = None,
    limits: UploadLimits = ...,
) -> T: ...
async def stream_body(
    request: Request, target: Target, *, filename: str | None = None, limits: UploadLimits = DEFAULT_LIMITS
) -> Any:
    """Receive the body of a request, such as a PUT, as one file, and store it as it arrives.

    The guarantees are those of `stream_upload`. A Content-Length over the limit is refused before a byte is read.

    Args:
        request: The request; its body must not have been read.
        target: Where the file goes; see `stream_upload`.
        filename: Its name, which a bare body does not have.
        limits: The limits of the body.

    Returns:
        The `Attachment`, the `StoredObjectRef`, or the result of your function.

    Raises:
        UnsupportedRequestError: It has a Content-Encoding.
        MalformedRequestError: It has a Content-Range, a Content-Type that cannot be kept, or fewer bytes than its Content-Length.
        RequestTooLargeError: It has more than `limits.max_size` allows.
        ContentTooLargeError: It has more bytes than its policy or `limits.max_file_size` allow.
        ConsumedSourceError: The application has read the body already; the response is a 500.
        ClientDisconnect: The client went away.
        StorageError: As `StorageManager.put_stream`.
    """
    require_target(target)
    body = RequestBody(request, limits)
    for maximum in (limits.max_file_size, max_size_of(target)):
        require_size(body.size or 0, maximum)
    content_type = content_type_to_keep(body.content_type)
    async with aclosing(body.chunks()) as chunks:
        part = FilePart(
            "", filename, content_type, next_chunk=lambda: anext(chunks, None), max_size=limits.max_file_size, size=body.size
        )
        return await Received().store(part, target)


class _Form:
    """A form while it arrives."""

    def __init__(self, files: Mapping[str, FileTarget], required: Collection[str], limits: UploadLimits) -> None:
        self._targets = files
        self._required = required
        self._limits = limits
        self._fields_size = 0
        self._counts: dict[str, int] = {}
        self.fields: list[tuple[str, str]] = []
        self.files: list[tuple[str, Any]] = []
        self.stored = Received()

    def result(self) -> UploadForm:
        """Return the form once it has arrived; raise `MissingFieldError` where it lacks something."""
        if self._required:
            filled = {name for name, value in self.fields if value}
            # A text under the name of a file is not a file.
            present = filled.difference(self._targets).union(name for name, _ in self.files)
            if missing := tuple(name for name in self._required if name not in present):
                raise MissingFieldError(f"the form lacks {', '.join(map(repr, missing))}", names=missing)
        lists = [name for name, target in self._targets.items() if isinstance(target, FileList)]
        return UploadForm(self.fields, FormFiles(self.files, lists), self.stored)

    async def receive(self, reader: MultipartReader) -> None:
        """Receive the parts in their order, to the end of the body."""
        while (head := await reader.next_part()) is not None:
            next_chunk = partial(reader.next_chunk, head)
            if head.filename is None:
                self.fields.append((head.name, await self._field(next_chunk)))
            else:
                await self._file(head, next_chunk)

    async def _field(self, next_chunk: NextChunk) -> str:
        chunks: list[BytesLike] = []
        size = 0
        while (chunk := await next_chunk()) is not None:
            chunks.append(chunk)
            size += len(chunk)
            self._limits.require("max_field_size", size, "a field is too large")
            self._limits.require("max_fields_size", self._fields_size + size, "the fields are too large together")
        self._fields_size += size
        return decode_text(b"".join(chunks))

    async def _file(self, head: PartHead, next_chunk: NextChunk) -> None:
        part = FilePart(*head, next_chunk=next_chunk, max_size=self._limits.max_file_size, fields=self.fields)
        if not await part.is_absent():
            self.files.append((head.name, await self.stored.store(part, self._target(head.name))))

    def _target(self, name: str) -> Target:
        """Return the target of the next file of a field."""
        target = self._targets.get(name)
        if target is None:
            raise MalformedRequestError(f"the form has a file in the field {name!r:.80}, where none is expected")
        count = self._counts[name] = self._counts.get(name, 0) + 1
        most, target = (target.max_files, target.target) if isinstance(target, FileList) else (1, target)
        if count > most:
            raise RequestTooLargeError(
                f"there are too many files in the field {name!r:.80} (at most {most})", limit="max_files", maximum=most
            )
        return target


# Dependencies for FastAPI's `Depends`.


class UploadDependency(Protocol[T_co]):
    """A dependency that receives files.

    Attributes:
        openapi_extra: The description of the body, which `install_error_handlers` puts into FastAPI's documentation. A route of
            an application without it takes it as `openapi_extra`, because FastAPI cannot see it in the signature.
    """

    openapi_extra: dict[str, Any]

    def __call__(self, request: Request) -> AsyncIterator[T_co]:
        """Receive the files of a request."""
        ...


def upload_form(
    files: Mapping[str, FileTarget],
    *,
    fields: Collection[str] = (),
    required: Collection[str] = (),
    limits: UploadLimits = DEFAULT_LIMITS,
) -> UploadDependency[UploadForm]:
    """Return a dependency that receives a form: `Annotated[UploadForm, Depends(upload_form({"file": Document.file}))]`.

    At the end of the request the attachments that no row has taken are removed. If it ends without an error, those assigned to
    an instance stay, because its row may be flushed later. The endpoint must not have `Form` or `File` parameters: FastAPI
    would read the body first. It receives all its files by one such dependency.

    Args:
        files: Where the file of each field goes; see `stream_upload`.
        fields: The names of other fields, which the API documentation shows as texts; further ones are received as well.
        required: The names of the files and of the other fields that the form must have.
        limits: The limits of the form.

    Raises:
        TypeError: A file cannot be stored where it should go.
        RequestValidationError: In a request, FastAPI's own, whose response is its 422, for what is missing. Other errors are
            those of `stream_upload`.
    """
    files = _resolve_targets(files, limits)

    async def form(request: Request) -> AsyncIterator[UploadForm]:
        try:
            received = await stream_upload(request, files, required=required, limits=limits)
        except MissingFieldError as error:
            raise missing_error(error.names) or error from None
        async with received:
            yield received

    require_names("fields", fields)
    require_names("required", required)
    properties: dict[str, Any] = {name: {"type": "string"} for name in (*fields, *required)}
    properties |= {name: _describe_field(target, is_required=name in required) for name, target in files.items()}
    schema: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": {"type": "string"}}
    if required:
        schema["required"] = list(required)
    return cast(UploadDependency[UploadForm], _with_openapi(form, "multipart/form-data", schema))


def require_names(argument: str, names: object) -> None:
    """Raise `TypeError` for one string where several names are meant: its characters would be the names."""
    if isinstance(names, str) or not isinstance(names, Collection):
        raise TypeError(f"{argument} takes names of fields, such as ['avatar'], not {names!r}")


def _describe_field(target: FileTarget, *, is_required: bool) -> Mapping[str, Any]:
    if not isinstance(target, FileList):
        return _FILE
    return {"type": "array", "items": _FILE, "maxItems": target.max_files} | ({"minItems": 1} if is_required else {})


def upload_body(
    target: Target, *, filename: Callable[[Request], str | None] | None = None, limits: UploadLimits = DEFAULT_LIMITS
) -> UploadDependency[Any]:
    """Return a dependency that receives the body as one file: `Annotated[Attachment, Depends(upload_body(Document.file))]`.

    An attachment that no row has taken is removed as by `upload_form`. Arguments and errors are those of `stream_body`.

    Args:
        target: Where the file goes.
        filename: Returns the file's name from the request, such as from its path.
        limits: The limits of the body.

    Raises:
        TypeError: A file cannot be stored there.
    """
    require_target(target)

    async def body(request: Request) -> AsyncIterator[Any]:
        name = None if filename is None else filename(request)
        stored: Any = await stream_body(request, target, filename=name, limits=limits)
        received = Received([stored] if isinstance(stored, Attachment) else [])
        async with UploadForm([], FormFiles([("", stored)]), received):
            yield stored

    return cast(UploadDependency[Any], _with_openapi(body, "application/octet-stream", _FILE))


def _with_openapi(dependency: Any, media_type: str, schema: Mapping[str, Any]) -> Any:
    content = {media_type: {"schema": dict(schema)}}
    dependency.openapi_extra = {"requestBody": {"required": True, "content": content}}
    return dependency
