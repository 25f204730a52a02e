"""Receiving files: straight from the connection into storage, without a temporary file."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from sqlalchemy.orm import InstrumentedAttribute
from starlette.datastructures import ImmutableMultiDict
from starlette.requests import Request

from granite_storage._tasks import finish
from granite_storage.orm.attachment import Attachment
from granite_storage.refs import StoredObjectRef
from granite_storage.streams import BytesLike, require_size
from granite_storage.web._body import (
    body_of,
    content_type_of,
    content_type_to_keep,
    declared_size,
    media_type_of,
    require_whole_body,
)
from granite_storage.web._requests import MultipartReader, PartHead
from granite_storage.web._urlencoded import read_fields
from granite_storage.web.exceptions import (
    MalformedRequestError,
    MissingFieldError,
    RequestTooLargeError,
    UnsupportedRequestError,
)
from granite_storage.web.limits import DEFAULT_LIMITS, UploadLimits
from granite_storage.web.targets import FileList, FileTarget, PolicyTarget, Received, Target, max_size_of, require_target

__all__ = ["FilePart", "FormFields", "FormFiles", "UploadForm", "stream_body", "stream_upload"]

T = TypeVar("T")


class FilePart:
    """A file as it arrives: `async for chunk in part`, once, or hand it to whatever takes a stream.

    Attributes:
        name: The name of its field; empty where it is the whole body.
        filename: The name that the client gave, raw: never a path to write to.
        content_type: The media type that the client gave; not verified.
    """

    def __init__(
        self,
        name: str,
        filename: str | None,
        content_type: str | None,
        *,
        next_chunk: Callable[[], Awaitable[BytesLike | None]],
        max_size: int | None,
        fields: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.name = name
        self.filename = filename
        self.content_type = content_type
        self._next_chunk = next_chunk
        self._max_size = max_size
        self._size = 0
        self._fields = fields
        self._first: BytesLike | None = None

    @property
    def fields(self) -> ImmutableMultiDict[str, str]:
        """The fields that came before it in the form."""
        return ImmutableMultiDict(list(self._fields))

    async def is_absent(self) -> bool:
        """Tell whether it is what a browser sends for a file input that was left empty: no name and no bytes."""
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
        files: What has become of the files, in their order.
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
    """What a form has brought.

    It is an async context manager: `async with await stream_upload(...) as form:`. When the block ends, it removes the
    attachments that no row has taken. Where the block ends well, those stay that an instance holds, whose row may be flushed
    later; where it raises, they go too.

    Attributes:
        fields: The fields that are not files.
        files: What has become of the files: an `Attachment`, a `StoredObjectRef`, or what a function of yours returned.
    """

    def __init__(self, fields: Sequence[tuple[str, str]], files: FormFiles, received: Received) -> None:
        self.fields: FormFields = FormFields(list(fields))
        self.files: FormFiles = files
        self._received = received

    async def discard(self) -> None:
        """Remove the attachments that no row has taken; a row that is flushed later cannot take them any more.

        Refs of a `PolicyTarget` stay: only the application knows where it has written them down.
        """
        await self._received.discard_attachments()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        await self._received.discard_attachments(cancelled=isinstance(error, asyncio.CancelledError), but_assigned=error is None)


async def stream_upload(
    request: Request, files: Mapping[str, FileTarget], *, limits: UploadLimits = DEFAULT_LIMITS
) -> UploadForm:
    """Receive a form, and store its files as they arrive, in their order.

    Nothing is spooled: the connection is read as fast as the storage takes the bytes, and memory stays bounded, whatever the
    client sends. When it returns, the form has arrived whole and its files are stored. When it raises, because the form is
    wrong, too large or cut off, storage fails, or the task is cancelled, what was stored of it is removed; an attachment's
    journal removes what a cancelled task had to leave.

    Args:
        request: The request; its body must not have been read.
        files: Where the file of each field goes: an attachment attribute such as `Document.file`, a `PolicyTarget`, or a
            coroutine function that takes a `FilePart` and returns what the form shall hold. A field takes one file, or as many
            as its `FileList` says. Surplus files, and files of other fields, are refused before they are stored.
        limits: What the form may bring.

    Returns:
        The fields and what has become of the files. A file input that was left empty is not among them. An attachment is
        assigned to a row like any other. `async with` removes those that no row takes; without it, they go the way of
        `Attachment.store`.

    Raises:
        UnsupportedRequestError: It is neither multipart/form-data nor URL-encoded, or has a Content-Encoding.
        MalformedRequestError: It is not what it says, is cut off, or has a file that is not expected.
        RequestTooLargeError: It has more than `limits` allow, or more files in one field than it takes.
        ContentTooLargeError: A file has more bytes than its policy or `limits` allow.
        ClientDisconnect: The client went away.
        StorageError: As `StorageManager.put_stream`.
    """
    for target in files.values():
        require_target(target.target if isinstance(target, FileList) else target)
    require_whole_body(request, limits)
    media_type, options = media_type_of(request)
    async with aclosing(body_of(request, limits)) as body:
        if media_type == b"multipart/form-data":
            reader = MultipartReader(options.get(b"boundary", b""), body, limits)
            return await _receive(_MultipartForm(reader, files, limits))
        if media_type == b"application/x-www-form-urlencoded":
            form = _Form(files)
            form.fields = await read_fields(body, limits)
            return form.received()
    raise UnsupportedRequestError("the body must be multipart/form-data")


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
    """Receive the body of a request as one file, such as that of a PUT, and store it as it arrives.

    The guarantees are those of `stream_upload`. What has a Content-Length over the limit is refused before a byte is read.

    Args:
        request: The request; its body must not have been read.
        target: Where the file goes; see `stream_upload`.
        filename: Its name, which a bare body does not have.
        limits: What it may bring.

    Returns:
        The `Attachment`, the `StoredObjectRef`, or what your function returned.

    Raises:
        UnsupportedRequestError: It has a Content-Encoding.
        MalformedRequestError: It has a Content-Range, or a Content-Type that cannot be kept.
        RequestTooLargeError: It has more than `limits.max_size` allows.
        ContentTooLargeError: It has more bytes than its policy or `limits.max_file_size` allow.
        ClientDisconnect: The client went away.
        StorageError: As `StorageManager.put_stream`.
    """
    require_target(target)
    require_whole_body(request, limits)
    for maximum in (limits.max_file_size, max_size_of(target)):
        require_size(declared_size(request) or 0, maximum)
    content_type = content_type_to_keep(content_type_of(request))
    async with aclosing(body_of(request, limits)) as body:
        part = FilePart("", filename, content_type, next_chunk=lambda: anext(body, None), max_size=limits.max_file_size)
        return await Received().store(part, target)


class _Form:
    """A form while it is received."""

    def __init__(self, files: Mapping[str, FileTarget]) -> None:
        self._targets = files
        self.fields: list[tuple[str, str]] = []
        self.files: list[tuple[str, Any]] = []
        self.stored = Received()

    def received(self) -> UploadForm:
        """Return what it has brought."""
        lists = [name for name, target in self._targets.items() if isinstance(target, FileList)]
        return UploadForm(self.fields, FormFiles(self.files, lists), self.stored)


class _MultipartForm(_Form):
    def __init__(self, reader: MultipartReader, files: Mapping[str, FileTarget], limits: UploadLimits) -> None:
        super().__init__(files)
        self._reader = reader
        self._limits = limits
        self._fields_size = 0
        self._counts: Counter[str] = Counter()

    async def receive(self) -> None:
        """Take the parts in their order, to the end of the body."""
        while (head := await self._reader.next_part()) is not None:
            if head.filename is None:
                self.fields.append((head.name, await self._field(head)))
            else:
                await self._file(head)

    async def _field(self, head: PartHead) -> str:
        chunks: list[BytesLike] = []
        size = 0
        while (chunk := await self._reader.next_chunk(head)) is not None:
            chunks.append(chunk)
            size += len(chunk)
            self._limits.require("max_field_size", size, "a field is too large")
            self._limits.require("max_fields_size", self._fields_size + size, "the fields are too large together")
        self._fields_size += size
        try:
            return b"".join(chunks).decode()
        except UnicodeDecodeError as error:
            raise MalformedRequestError("a field is not UTF-8") from error

    async def _file(self, head: PartHead) -> None:
        part = FilePart(
            head.name,
            head.filename,
            head.content_type,
            next_chunk=lambda: self._reader.next_chunk(head),
            max_size=self._limits.max_file_size,
            fields=self.fields,
        )
        if not await part.is_absent():
            self.files.append((head.name, await self.stored.store(part, self._target(head.name))))

    def _target(self, name: str) -> Target:
        """Return where the next file of a field goes."""
        target = self._targets.get(name)
        if target is None:
            raise MalformedRequestError("the form has a file in a field where none is expected")
        self._counts[name] += 1
        most, target = (target.max_files, target.target) if isinstance(target, FileList) else (1, target)
        if self._counts[name] > most:
            raise RequestTooLargeError(f"there are too many files in one field (at most {most})", limit="max_files", maximum=most)
        return target


async def _receive(form: _MultipartForm) -> UploadForm:
    try:
        await form.receive()
    except BaseException as error:
        if form.stored:
            cancelled = isinstance(error, asyncio.CancelledError)
            await finish(form.stored.take_back(cancelled=cancelled), "removing what a failed request has stored")
        raise
    return form.received()
