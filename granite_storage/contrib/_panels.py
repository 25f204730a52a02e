"""What the adapters of admin panels have in common: what a form asks for, and how a stored file is shown and served."""

from __future__ import annotations

import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from markupsafe import Markup
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from granite_storage._headers import INLINE_TYPES
from granite_storage.exceptions import ConfigurationError, InvalidReferenceError, StorageError, UnknownVariantError
from granite_storage.orm.attachment import Attachment, AttachmentVariant
from granite_storage.orm.columns import AttachmentType
from granite_storage.orm.uploads import discard
from granite_storage.web.errors import client_message
from granite_storage.web.responses import StoredObjectResponse

__all__ = [
    "FileAction",
    "FileChange",
    "FileView",
    "discarded_unless_assigned",
    "render_file",
    "render_input",
    "serve",
    "store",
]

_PREVIEWS = ("preview", "thumb", "thumbnail")


class FileAction(Enum):
    """What becomes of the file that a row has."""

    KEEP = "keep"
    REPLACE = "replace"
    CLEAR = "clear"


@dataclass(slots=True)
class FileChange:
    """What a form asks for.

    Attributes:
        action: What becomes of the present file.
        upload: The new file, where there is one.
    """

    action: FileAction = FileAction.KEEP
    upload: UploadFile | None = None

    @classmethod
    def of(cls, request: Request, form: FormData, name: str) -> Self:
        """Return what a form asks for in a field; one without its choice asks to replace where it has a file, else to keep."""
        uploads = [item for item in form.getlist(name) if isinstance(item, UploadFile)]
        for item in uploads:  # panels do not close the files of their forms
            weakref.finalize(request, item.file.close)
        upload = next((item for item in reversed(uploads) if item.filename or item.size), None)
        asked = form.get(f"{name}-action")
        known = {action.value: action for action in FileAction}
        return cls(known.get(str(asked), FileAction.KEEP if upload is None else FileAction.REPLACE), upload)

    def problem(self, *, required: bool, has_file: bool) -> str | None:
        """Return what is wrong with it, for the reader of the form; None where nothing is."""
        if self.action is FileAction.REPLACE and self.upload is None:
            return "Choose the new file."
        if self.action is not FileAction.REPLACE and self.upload is not None:
            return "A file is chosen, but it is not to replace the present one: choose Replace, or no file."
        if required and (self.action is FileAction.CLEAR or (self.action is FileAction.KEEP and not has_file)):
            return "A file is required."
        return None


async def store(upload: UploadFile, column: Any) -> Attachment:
    """Store an uploaded file before its transaction, so that what its policy refuses is known while the form can be shown again.

    Raises:
        ValueError: The file cannot be stored; the message is for the reader of the form.
        ConfigurationError: It can never be.
    """
    try:
        return await Attachment.from_upload(upload).store(column)
    except ConfigurationError:
        raise
    except StorageError as error:
        raise ValueError(client_message(error)) from error


@asynccontextmanager
async def discarded_unless_assigned(stored: list[Attachment]) -> AsyncIterator[None]:
    """Delete those of the stored attachments that no row refers to at the end of the block."""
    cancelled = True
    try:
        yield
        cancelled = False
    except Exception:
        cancelled = False
        raise
    finally:
        await discard(stored, cancelled=cancelled)


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
    """

    name: str
    description: str
    content_type: str
    url: str
    preview: str | None

    @classmethod
    def of(cls, attachment: Attachment, url: str, preview: str | None = None) -> Self:
        """Return what is shown of an attachment.

        Args:
            attachment: The attachment of a row.
            url: Where the panel serves it.
            preview: The name of a variant; None for `preview`, `thumb` or `thumbnail`, where the column declares one.

        Raises:
            UnknownVariantError: The column declares no such variant.
        """
        try:
            size, variants = attachment.size, attachment.variants
        except InvalidReferenceError:
            return cls("unreadable", "", "", "", None)
        name = next((one for one in _PREVIEWS if one in variants), None) if preview is None else preview
        made = variants[name] if name is not None else None
        shown = name if made is not None and not made.is_original else None
        return cls(str(attachment), _format_size(size), attachment.content_type or "", url, shown)


def render_file(view: FileView) -> Markup:
    """Return a picture, a player or neither, and a link with the name of the file."""
    label = Markup("{} <small>{}</small>").format(view.name, view.description)
    if not view.url:
        return label
    family = view.content_type.partition("/")[0] if view.content_type in INLINE_TYPES else ""
    link = Markup('<a href="{}" target="_blank" rel="noopener">{}</a>')
    if view.preview is not None or family == "image":
        source = view.url if view.preview is None else f"{view.url}{'&' if '?' in view.url else '?'}variant={view.preview}"
        picture = Markup('<img src="{}" alt="" loading="lazy" style="max-width: 10rem; max-height: 6rem">').format(source)
        return link.format(view.url, picture + Markup("<br>") + label)
    player = Markup('<{0} src="{1}" controls preload="none" style="max-width: 20rem"></{0}><br>').format(family, view.url)
    return (player if family in ("audio", "video") else Markup("")) + link.format(view.url, label)


def render_input(
    name: str, column_type: AttachmentType, view: FileView | None, *, required: bool, invalid: bool, action: FileAction
) -> Markup:
    """Return the form's part of one file: the present one with the choice of what becomes of it, and the input for a new one."""
    chosen = Markup("""<input type="file" class="form-control" id="{0}" name="{0}" accept="{1}"{2}{3}>""").format(
        name,
        ",".join(_accepted(column_type)),
        Markup(" required") if required and view is None else "",
        Markup(
            """ onchange="let one = document.getElementById('{}-replace'); if (one) one.checked = this.files.length > 0" """
        ).format(name),
    )
    present = Markup("")
    if view is not None:
        choices = [one for one in FileAction if not (required and one is FileAction.CLEAR)]
        radios = Markup(" ").join(
            Markup(
                '<label class="form-check form-check-inline"><input class="form-check-input" type="radio" name="{0}-action"'
                ' id="{0}-{1}" value="{1}"{2}> {3}</label>'
            ).format(name, one.value, Markup(" checked") if one is action else "", one.value.capitalize())
            for one in choices
        )
        present = render_file(view) + Markup("<div>{}</div>").format(radios)
    return Markup('<div class="{}">{}{}</div>').format("is-invalid" if invalid else "", present, chosen)


def _accepted(column_type: AttachmentType) -> tuple[str, ...]:
    return column_type.binding().manager.policy(column_type.storage_key).accept or ()


def _format_size(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def serve(attachment: object, request: Request) -> StoredObjectResponse:
    """Answer a request for the file of a row, or for the variant that its query names; inline where that is safe.

    Raises:
        HTTPException: There is no such file.
    """
    stored: Attachment | AttachmentVariant | None = attachment if isinstance(attachment, Attachment) else None
    name = request.query_params.get("variant")
    try:
        if stored is not None and name is not None:
            stored = stored.variants[name]
        if stored is not None:
            return StoredObjectResponse(stored, request, disposition="inline")
    except (InvalidReferenceError, UnknownVariantError):
        pass
    raise HTTPException(404)
