"""URLs in response models: public ones as they are, signed ones for a whole list in one batch before it is serialized."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from operator import attrgetter
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, TypeAlias, Union, get_args, get_origin

from granite_storage._documentation import Page
from granite_storage._headers import Disposition
from granite_storage._portal import run_blocking
from granite_storage._words import require_timedelta
from granite_storage.exceptions import ConfigurationError, InfectedObjectError, ScanPendingError
from granite_storage.orm._util import group, in_greenlet, wait
from granite_storage.orm.attachment import Attachment, AttachmentVariant, fields_schema, shown_fields
from granite_storage.orm.collections import AttachedFile, AttachmentList, shown_file
from granite_storage.refs import StoredObjectRef, require_scanned

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
    from pydantic_core import CoreSchema


Signable: TypeAlias = Attachment | AttachmentVariant | AttachedFile | None
"""What a URL can be signed for: an attachment, a variant, or the file of a collection; None is passed over."""


async def sign_urls(
    files: Signable | Iterable[Signable | Iterable[Signable]],
    *,
    expires_in: timedelta,
    disposition: Disposition = "attachment",
    stable_for: timedelta | None = None,
) -> None:
    """Sign the URLs of files in one batch, for the response models that show them with `WithURL(signed=True)`.

    The URLs are kept with the attachments and in no row and no pickle. Nothing but such a model shows them.

    Args:
        files: Attachments, variants of them, and files of collections; collections such as `album.photos`, and lists of all of
            these. None is passed over, and so is what no scanner has let pass and an attachment whose row contains no readable
            ref, which have no URL.
        expires_in: How long the URLs work at least. A response model shows them as long.
        disposition: `inline` lets a browser show in its window what is safe to show.
        stable_for: How long the same URLs are returned; see `StorageManager.url`.

    Raises:
        UnboundAttachmentError: One is not stored yet.
        StorageError: One could not be signed, as `StorageManager.url` says.
        ValueError: As `StorageManager.url`.
        TypeError: There is something else among the files, or a duration is not a timedelta.

    Example:
        ```python
        files = [document.file for document in documents]
        await sign_urls(files, expires_in=timedelta(hours=1))
        ```
    """
    require_timedelta("expires_in", expires_in)
    if stable_for is not None:
        require_timedelta("stable_for", stable_for)
    wanted = [file for file in _files_in(files) if file._state.error is None and _is_passed(file.ref)]
    until = time.time() + expires_in.total_seconds()
    for manager, chosen in group(wanted, attrgetter("manager")).items():
        refs = [file.ref for file in chosen]
        urls = await manager.urls(refs, expires_in=expires_in, disposition=disposition, stable_for=stable_for)
        for file, ref, url in zip(chosen, refs, urls, strict=True):
            file._state.keep_url(ref, url, until)


def _files_in(given: object) -> Iterator[Attachment | AttachmentVariant]:
    """Yield the attachments and variants in what an application gives, lists in lists included."""
    if isinstance(given, Attachment | AttachmentVariant):
        yield given
    elif isinstance(given, AttachedFile):
        yield given.file
    elif isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping):
        for item in given:
            yield from _files_in(item)
    elif given is not None:
        raise TypeError(
            "URLs are signed for attachments, variants, files of collections and lists of them, not for"
            f" {type(given).__name__}: {given!r:.100}"
        )


def sign_urls_sync(
    files: Signable | Iterable[Signable | Iterable[Signable]],
    *,
    expires_in: timedelta,
    disposition: Disposition = "attachment",
    stable_for: timedelta | None = None,
) -> None:
    """Sign the URLs of files in one batch, in synchronous code; see `sign_urls`.

    It serves the rows of both kinds of sessions: in a thread without an event loop, and in a function that
    `AsyncSession.run_sync` calls.

    Raises:
        ConfigurationError: An event loop runs in this thread, and would stand still meanwhile.

    Example:
        ```python
        files = [document.file for document in documents]
        sign_urls_sync(files, expires_in=timedelta(hours=1))
        ```
    """
    work = sign_urls(files, expires_in=expires_in, disposition=disposition, stable_for=stable_for)
    if in_greenlet():
        wait(work)
    else:
        run_blocking(work, "sign_urls_sync", "'await sign_urls(...)'")


@dataclass(frozen=True, slots=True)
class WithURL:
    """Lets a pydantic response model show the `url` of an attachment or a variant beside its other fields.

    On an `AttachedFile` it shows the URL of its `file`, and on an `AttachmentList` those of all files.

    `Annotated[Attachment, WithURL()]` shows the public URL of a file of a public policy, and `WithURL(signed=True)` the URL that
    `sign_urls` has signed; without that call it raises. No other field shows a URL. It is null where a virus scanner has not let
    the file pass.

    Args:
        signed: Whether the URL is one that `sign_urls` has signed; a public one otherwise.

    Raises:
        ConfigurationError: When a response is serialized: the policy is not public, or no URL was signed, or it has expired. When
            a model is declared: the annotation names something else, such as a `list`, whose elements are to be annotated.

    Example:
        ```python
        class DocumentOut(BaseModel):
            model_config = ConfigDict(from_attributes=True)
            file: Annotated[Attachment, WithURL(signed=True)] | None
        ```
    """

    signed: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        schema: Any = handler(source)
        shown: Any = fields_schema(with_url=True)
        kind = _kind_of(source)
        if kind is not Attachment:
            shown = shown_file(shown)
        if kind is AttachmentList:
            shown = core_schema.list_schema(shown)
        schema["serialization"] = core_schema.plain_serializer_function_ser_schema(
            self._show, return_schema=core_schema.nullable_schema(shown), when_used="json"
        )
        found: CoreSchema = schema
        return found

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        shown = handler(schema)
        return {**shown, "anyOf": list(map(_with_url, shown["anyOf"]))} if "anyOf" in shown else _with_url(shown)

    def _show(self, value: Attachment | AttachmentVariant | AttachedFile | AttachmentList | None) -> Any:
        if isinstance(value, AttachmentList):
            return list(map(self._show, value))
        if isinstance(value, AttachedFile):
            return {"id": value.id, "caption": value.caption, "file": self._show(value.file)}
        fields = None if value is None else shown_fields(value)
        if value is None or fields is None:
            return None
        return {**fields, "url": self._url_of(value) if _is_passed(value.ref) else None}

    def _url_of(self, file: Attachment | AttachmentVariant) -> str:
        if not self.signed:
            return file.public_url
        url, until = file._state.signed_urls.get((file.ref.backend, file.ref.location), (None, 0.0))
        if url is None or until <= time.time():
            raise ConfigurationError(
                f"a response shows the signed URL of {file!r}, {'and none was signed' if url is None else 'which has expired'}:"
                " 'await sign_urls([...], expires_in=...)' before it is returned",
                see=Page.SIGNED_URLS,
            )
        return url


def _kind_of(source: Any) -> type[Attachment | AttachedFile | AttachmentList]:
    """Return what a field shows with a URL: an attachment or a variant, a file of a collection, or a collection.

    Raises:
        ConfigurationError: The annotation names a class that has no URL.
    """
    kinds = [kind for kind in (get_args(source) if _is_union(source) else [source]) if kind is not NoneType]
    for kind in (AttachmentList, AttachedFile):
        if kinds and all(isinstance(one, type) and issubclass(one, kind) for one in kinds):
            return kind
    for one in kinds:
        origin = get_origin(one) or one
        if isinstance(origin, type) and not issubclass(origin, Attachment | AttachmentVariant):
            raise ConfigurationError(
                f"WithURL shows an Attachment, an AttachmentVariant, an AttachedFile or an AttachmentList, or None, not {source}:"
                " in a list or a dict, annotate the element, such as list[Annotated[Attachment, WithURL()]]",
                see=Page.SIGNED_URLS,
            )
    return Attachment


def _is_union(source: Any) -> bool:
    return get_origin(source) in (Union, UnionType)


def _with_url(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON schema of an attachment, a file of a collection or a collection with URLs; that of null is left."""
    if "items" in schema:
        return {**schema, "items": _with_url(schema["items"])}
    if "properties" not in schema:
        return schema
    if "file" in schema["properties"]:
        properties = {**schema["properties"], "file": _with_url(schema["properties"]["file"])}
        return {**schema, "title": f"{schema.get('title', 'AttachedFile')}WithURL", "properties": properties}
    url = {"anyOf": [{"type": "string", "format": "uri"}, {"type": "null"}], "title": "Url"}
    return {
        **schema,
        "title": f"{schema.get('title', 'Attachment')}WithURL",
        "properties": {**schema["properties"], "url": url},
        "required": sorted({*schema["required"], "url"}),
    }


def _is_passed(ref: StoredObjectRef) -> bool:
    try:
        require_scanned(ref)
    except (ScanPendingError, InfectedObjectError):
        return False
    return True
