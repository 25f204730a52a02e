"""What FastAPI's `Depends` takes to receive files."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol, TypeVar, cast

from starlette.requests import Request

from granite_storage.web.limits import DEFAULT_LIMITS, UploadLimits
from granite_storage.web.targets import FileList, FileTarget, Received, Target
from granite_storage.web.uploads import FormFiles, UploadForm, stream_body, stream_upload

__all__ = ["UploadDependency", "received_body", "received_form"]

T_co = TypeVar("T_co", covariant=True)

_FILE: Mapping[str, Any] = {"type": "string", "format": "binary"}


class UploadDependency(Protocol[T_co]):
    """A dependency that receives files.

    Attributes:
        openapi_extra: What a route's `openapi_extra` takes to describe the body: FastAPI cannot see it in the signature.
    """

    openapi_extra: dict[str, Any]

    def __call__(self, request: Request) -> AsyncIterator[T_co]:
        """Receive the files of a request."""
        ...


def received_form(files: Mapping[str, FileTarget], *, limits: UploadLimits = DEFAULT_LIMITS) -> UploadDependency[UploadForm]:
    """Return a dependency that receives a form: `Annotated[UploadForm, Depends(received_form({"file": Document.file}))]`.

    When the request ends, well or not, the attachments are removed that no row has taken; where it ends well, those stay that an
    instance holds whose row is yet to be flushed. Arguments and errors are those of `stream_upload`. The endpoint must have no
    `Form` or `File` parameters: FastAPI would read the body first.
    """

    async def form(request: Request) -> AsyncIterator[UploadForm]:
        async with await stream_upload(request, files, limits=limits) as received:
            yield received

    properties = {
        name: {"type": "array", "items": _FILE, "maxItems": target.max_files} if isinstance(target, FileList) else _FILE
        for name, target in files.items()
    }
    schema = {"type": "object", "properties": properties, "additionalProperties": {"type": "string"}}
    return cast(UploadDependency[UploadForm], _described(form, "multipart/form-data", schema))


def received_body(
    target: Target, *, filename: Callable[[Request], str | None] | None = None, limits: UploadLimits = DEFAULT_LIMITS
) -> UploadDependency[Any]:
    """Return a dependency that receives the body as one file: `Annotated[Attachment, Depends(received_body(Document.file))]`.

    What becomes of an attachment that no row has taken is that of `received_form`. Arguments and errors are those of
    `stream_body`.

    Args:
        target: Where the file goes.
        filename: Finds the file's name in the request, such as in its path.
        limits: What it may bring.
    """

    async def body(request: Request) -> AsyncIterator[Any]:
        name = None if filename is None else filename(request)
        stored: Any = await stream_body(request, target, filename=name, limits=limits)
        async with UploadForm([], FormFiles([("", stored)]), Received.of(stored)):
            yield stored

    return cast(UploadDependency[Any], _described(body, "application/octet-stream", _FILE))


def _described(dependency: Any, media_type: str, schema: Mapping[str, Any]) -> Any:
    content = {media_type: {"schema": dict(schema)}}
    dependency.openapi_extra = {"requestBody": {"required": True, "content": content}}
    return dependency
