"""What the adapters of admin panels have in common: what a form asks for, and how a stored file is shown and served."""

from __future__ import annotations

import re
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, Self, TypeVar, cast

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, StatementError
from sqlalchemy.orm import object_session
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.exc import StaleDataError
from starlette.datastructures import URL, FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from granite_storage._headers import INLINE_TYPES
from granite_storage._words import count_of
from granite_storage.exceptions import ConfigurationError, InvalidReferenceError, StorageError, UnknownVariantError
from granite_storage.orm.attachment import Attachment, AttachmentVariant
from granite_storage.orm.collections import AttachedFile, AttachmentList, declared_collection
from granite_storage.orm.columns import AttachmentType
from granite_storage.orm.uploads import discard
from granite_storage.web.errors import client_message
from granite_storage.web.responses import StoredObjectResponse

T = TypeVar("T")
_PREVIEWS = ("preview", "thumb", "thumbnail")
_LOADER = PackageLoader("granite_storage.contrib", "templates/plugins/granite-storage")
_macros: Any = Environment(loader=_LOADER, autoescape=True).get_template("fields.html").module


def is_attached(attribute: object) -> bool:
    """Tell whether an attribute of a model has attachments: one, or a collection of them."""
    return isinstance(getattr(attribute, "type", None), AttachmentType)


def require_preview(attribute: Any, preview: str | None) -> None:
    """Raise if an attribute cannot be shown by a variant; None is the one that the adapter chooses.

    Raises:
        ConfigurationError: The attribute has no attachments.
        UnknownVariantError: It declares no such variant.
    """
    if not is_attached(attribute):
        raise ConfigurationError(f"{attribute} is not an attribute of attachments, so it has no preview {preview!r}")
    if preview is not None and preview not in attribute.type.variants:
        known = ", ".join(attribute.type.variants) or "none"
        raise UnknownVariantError(f"{attribute} declares no variant {preview!r} to show as its preview (there are: {known})")


# How a file is shown.


@dataclass(frozen=True, slots=True)
class FileView:
    """What a page shows of a file.

    Attributes:
        name: The client's file name.
        description: Its size, for a reader.
        content_type: Its media type.
        url: Where the panel serves it; empty where it may not be read, or cannot.
        preview: The name of the variant to show in its place; None for the file itself, where a browser can show it.
        key: The primary key of its row in a collection; None elsewhere.
    """

    name: str
    description: str
    content_type: str
    url: str
    preview: str | None
    key: int | None = None

    @property
    def family(self) -> str:
        """The first part of its media type, where a browser can show it; otherwise empty."""
        return self.content_type.partition("/")[0] if self.content_type in INLINE_TYPES else ""

    @property
    def picture(self) -> str | None:
        """The URL of the picture that stands for it; None where there is none."""
        if self.preview is not None:
            return str(URL(self.url).include_query_params(variant=self.preview))
        return self.url if self.family == "image" else None

    @classmethod
    def of(cls, file: Attachment | AttachedFile, url: str, preview: str | None = None) -> Self:
        """Return what is shown of an attachment.

        Args:
            file: The attachment of a row, or a file of a collection.
            url: Where the panel serves the attachment, or the files of the collection.
            preview: The name of a variant; None for `preview`, `thumb` or `thumbnail`, where the column declares one.

        Raises:
            UnknownVariantError: The column declares no such variant.
        """
        attachment, key = (file.file, file.id) if isinstance(file, AttachedFile) else (file, None)
        if url and key is not None:
            url = str(URL(url).include_query_params(file=key))
        try:
            size, variants = attachment.size, attachment.variants
        except InvalidReferenceError:
            return cls("unreadable", "", "", "", None, key)
        name = next((one for one in _PREVIEWS if one in variants), None) if preview is None else preview
        made = variants[name] if name is not None else None
        shown = name if made is not None and not made.is_original else None
        return cls(str(attachment), _format_size(size), attachment.content_type or "", url, shown, key)


def views_of(value: object, url: str, preview: str | None) -> list[FileView]:
    """Return what is shown of the value of an attribute: of an attachment, of a collection, or of None."""
    files = value if isinstance(value, AttachmentList) else [value] if isinstance(value, Attachment) else []
    return [FileView.of(file, url, preview) for file in files]


def render_files(views: Iterable[FileView]) -> Markup:
    """Return the HTML of the files of an attribute."""
    html: Markup = _macros.files(views)
    return html


def _format_size(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return count_of(size, "byte")


# Forms.


class FileAction(Enum):
    """What becomes of the file that a row has."""

    KEEP = "keep"
    REPLACE = "replace"
    CLEAR = "clear"


def _uploads_of(request: Request, form: FormData, name: str) -> list[UploadFile]:
    uploads = [item for item in form.getlist(name) if isinstance(item, UploadFile)]
    for item in uploads:  # panels do not close the files of their forms
        weakref.finalize(request, item.file.close)
    return [item for item in uploads if item.filename or item.size]


@dataclass(slots=True)
class _Form:
    """What a form asks for: what the classes of one and of several files have in common.

    Attributes:
        attribute: The attribute of the model.
        value: What the row has, or something else than None where there is a row that has a file if it must.
        views: What is shown of it.
        uploads: The new files.
        errors: What is wrong.
    """

    attribute: Any
    value: Any = None
    views: Sequence[FileView] = ()
    uploads: Sequence[UploadFile] = ()
    errors: list[str] = field(default_factory=list)
    _macro: ClassVar[Any]

    @property
    def is_required(self) -> bool:
        """Whether the row must have a file."""
        return declared_collection(self.attribute) is None and not self.attribute.type.column.nullable

    @property
    def accept(self) -> str:
        """The media types that its policy accepts, as an input of HTML has them."""
        column_type = self.attribute.type
        return ",".join(column_type.binding().manager.policy(column_type.storage_key).accept or ())

    def render(self, name: str, *, required: bool, invalid: bool) -> Markup:
        """Return the present files with the choice of what becomes of them, and the input for new ones."""
        html: Markup = self._macro(self, name, required, invalid)
        return html

    def problem(self, *, required: bool) -> str | None:
        """Return what is wrong with it, for the reader of the form; None where nothing is."""
        return None

    def arrange(self, files: Any, new: Sequence[Attachment]) -> list[Any]:
        """Return the new files, and of a collection those that stay before them.

        Raises:
            RefusedError: There would be more than the collection takes.
        """
        return list(new)

    async def store(self, stored: list[Attachment]) -> list[Attachment]:
        """Store the new files before their transaction, so that the form can be shown again with what a policy refuses.

        Args:
            stored: Where they are noted; see `discarded_unless_assigned`.

        Raises:
            RefusedError: A file cannot be stored.
            ConfigurationError: None can ever be.
        """
        first = len(stored)
        with readable():
            for upload in self.uploads:
                stored.append(await Attachment.from_upload(upload).store(self.attribute))
        return stored[first:]


GONE = "Another user has deleted this row, or a file of it, meanwhile: open it again."


class RefusedError(ValueError):
    """What a form asks for is refused; the message is for the reader of the form."""


@contextmanager
def readable() -> Iterator[None]:
    """Let an error of the storage, and the database's refusal of a value, be a RefusedError."""
    try:
        yield
    except ConfigurationError:
        raise
    except StorageError as error:
        raise RefusedError(client_message(error)) from error
    except StaleDataError as error:
        raise RefusedError(GONE) from error
    except (StatementError, OverflowError, UnicodeEncodeError) as error:
        if (reason := _reason_of(error)) is None:
            raise
        raise RefusedError(f"The database refuses this row: {reason}") from error


def find_field(model: Any, fields: Sequence[Any], refusal: Exception) -> str:
    """Return the name of the field whose attribute, or its column, a refusal names; of the first one otherwise."""

    def is_named(name: str) -> bool:
        columns = getattr(getattr(getattr(model, name, None), "property", None), "columns", ())
        return any(re.search(rf"\b{re.escape(one)}\b", str(refusal)) for one in (name, *(str(c.name) for c in columns)))

    names: list[str] = [field.name for field in fields]
    return next(filter(is_named, names), names[0])


def load(row: Any, name: str) -> Any:
    """Return the value of an attribute of a row, which is loaded where it is not yet, whatever its `lazy=` says."""
    state, session = instance_state(row), object_session(row)
    if session is not None and state.persistent and name in state.unloaded:
        session.refresh(row, [name])
    return getattr(row, name)


async def existing(finding: Awaitable[T]) -> T:
    """Return what is found by a key; one that no row can have is answered with 404, as one that no row has.

    Raises:
        HTTPException: The key cannot be parsed, or the database or its driver cannot take it.
    """
    try:
        return await finding
    except (TypeError, ValueError, OverflowError, StatementError) as error:
        if isinstance(error, StatementError) and _reason_of(error) is None:
            raise
        raise HTTPException(404) from error


def _reason_of(error: Exception) -> str | None:
    """Return why a database, or its driver, refuses a value; None where something else has failed.

    An error of the bound values is not a DBAPIError, and asyncpg's have no class of their own, but an SQLSTATE: 22 is a value
    that the type cannot take, 23 a constraint that a row violates.
    """
    if not isinstance(error, DBAPIError):
        return str(error.orig if isinstance(error, StatementError) else error)
    is_value = isinstance(error, DataError | IntegrityError) or str(getattr(error.orig, "sqlstate", ""))[:2] in ("22", "23")
    return str((error.orig and error.orig.__cause__) or error.orig) if is_value else None


@dataclass(slots=True)
class FormFile(_Form):
    """One file of a form.

    Attributes:
        action: What becomes of it; None where the form asks for something unknown, or for two things.
    """

    action: FileAction | None = FileAction.KEEP
    _macro = _macros.one

    def read(self, request: Request, form: FormData, name: str) -> Self:
        """Return what a form asks for; one without its choice asks to replace where it has a file, else to keep."""
        uploads = _uploads_of(request, form, name)
        asked = form.getlist(f"{name}-action") or [(FileAction.REPLACE if uploads else FileAction.KEEP).value]
        action = next((one for one in FileAction if asked == [one.value]), None)
        return replace(self, action=action, uploads=uploads)

    def problem(self, *, required: bool) -> str | None:
        """Return what is wrong with it, for the reader of the form; None where nothing is."""
        if self.action is None:
            return "Choose Keep, Replace or Clear."
        if self.action is FileAction.REPLACE and not self.uploads:
            return "Choose the new file."
        if len(self.uploads) > 1:
            return "Choose only one file."
        if self.action is not FileAction.REPLACE and self.uploads:
            return "A file is chosen, but it is not to replace the present one: choose Replace, or no file."
        if required and (self.action is FileAction.CLEAR or (self.action is FileAction.KEEP and self.value is None)):
            return "A file is required."
        return None


@dataclass(slots=True)
class FormFiles(_Form):
    """Several files of a form, in an order.

    Attributes:
        order: The primary keys of the present files in their new order, as the form sends them; unknown ones mean nothing.
        removed: Those of the files to remove.
    """

    order: Sequence[str] = ()
    removed: Collection[str] = ()
    _macro = _macros.several

    def read(self, request: Request, form: FormData, name: str) -> Self:
        """Return what a form asks for; files that it does not name stay, such as those that were added meanwhile."""
        order, removed = (list(map(str, form.getlist(f"{name}-{of}"))) for of in ("order", "removed"))
        return replace(self, uploads=_uploads_of(request, form, name), order=order, removed=removed)

    def arrange(self, files: Iterable[AttachedFile] | None, new: Sequence[Attachment]) -> list[Any]:
        """Return the files that stay, in their order, and the new ones."""
        kept = self._sorted([file for file in files or () if str(file.id) not in self.removed], lambda file: file.id)
        refs = [one._state.ref for one in (*(file.file for file in kept), *new)]
        with readable():
            cast(Any, declared_collection(self.attribute)).require(len(refs), sum(0 if ref is None else ref.size for ref in refs))
        return [*kept, *new]

    @property
    def sorted_views(self) -> list[FileView]:
        """What is shown of the files, in the order that the form asks for."""
        return self._sorted(self.views, lambda view: view.key)

    def _sorted(self, items: Iterable[T], key_of: Callable[[T], int | None]) -> list[T]:
        ranks = {key: rank for rank, key in enumerate(self.order)}
        return sorted(items, key=lambda item: ranks.get(str(key_of(item)), len(ranks)))


def form_of(attribute: Any, value: Any = None, views: Sequence[FileView] = ()) -> FormFile | FormFiles:
    """Return the form of an attribute of a row that has a value, of which `views` are shown."""
    return (FormFile if declared_collection(attribute) is None else FormFiles)(attribute, value, views)


@asynccontextmanager
async def discarded_unless_assigned(stored: list[Attachment]) -> AsyncIterator[None]:
    """Delete those of the stored attachments that no row refers to at the end of the block."""
    try:
        yield
    finally:
        await discard(stored)


@dataclass
class Known:
    """What is known of a request: the rows that it has found, first that of its page, what it has stored, and its forms."""

    plugin: Any
    rows: list[Any] = field(default_factory=list)
    stored: list[Attachment] = field(default_factory=list)
    forms: dict[str, FormFile | FormFiles] = field(default_factory=dict)


def remember(app: ASGIApp, plugin: Any) -> ASGIApp:
    """Return an application that has a `Known` in the state of each request, and deletes what a request stores for no row."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        known = scope.setdefault("state", {})["granite_storage"] = Known(plugin)
        async with discarded_unless_assigned(known.stored):
            await app(scope, receive, send)

    return call


# Files as responses.


def serve(value: object, request: Request) -> StoredObjectResponse:
    """Answer a request for the file of a row, or for the variant that its query names; inline where that is safe.

    Args:
        value: The value of the row's attribute: an attachment, or a collection of which the query names a file.
        request: The request.

    Raises:
        HTTPException: There is no such file.
    """
    if isinstance(value, AttachmentList):
        value = next((one.file for one in value if str(one.id) == request.query_params.get("file")), None)
    name = request.query_params.get("variant")
    try:
        if isinstance(value, Attachment) and name is not None:
            value = value.variants[name]
        if isinstance(value, Attachment | AttachmentVariant):
            return StoredObjectResponse(value, request, disposition="inline")
    except (InvalidReferenceError, UnknownVariantError):
        pass
    raise HTTPException(404)
