"""What FastAPI's `Depends` takes to receive files."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.requests import Request

from granite_storage.web.limits import DEFAULT_LIMITS, UploadLimits
from granite_storage.web.targets import Received, Target
from granite_storage.web.uploads import UploadForm, stream_body, stream_upload

__all__ = ["received_body", "received_form"]


def received_form(
    files: Mapping[str, Target], *, limits: UploadLimits = DEFAULT_LIMITS
) -> Callable[[Request], AsyncIterator[UploadForm]]:
    """Return a dependency that receives a form: `Annotated[UploadForm, Depends(received_form({"file": Document.file}))]`.

    Where the endpoint raises, the attachments go that no row has taken. Arguments and errors are those of `stream_upload`. The
    endpoint must have no `Form` or `File` parameters: FastAPI would read the body first.
    """

    async def form(request: Request) -> AsyncIterator[UploadForm]:
        async with await stream_upload(request, files, limits=limits) as received:
            yield received

    return form


def received_body(
    target: Target, *, filename: Callable[[Request], str | None] | None = None, limits: UploadLimits = DEFAULT_LIMITS
) -> Callable[[Request], AsyncIterator[Any]]:
    """Return a dependency that receives the body as one file: `Annotated[Attachment, Depends(received_body(Document.file))]`.

    Where the endpoint raises, an attachment goes that no row has taken. Arguments and errors are those of `stream_body`.

    Args:
        target: Where the file goes.
        filename: Finds the file's name in the request, such as in its path.
        limits: What it may bring.
    """

    async def body(request: Request) -> AsyncIterator[Any]:
        name = None if filename is None else filename(request)
        stored: Any = await stream_body(request, target, filename=name, limits=limits)
        async with UploadForm([], [("", stored)], Received.of(stored)):
            yield stored

    return body
