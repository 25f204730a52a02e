"""Flask: stored files as responses, and errors as problem details; the extra `flask` brings what it needs.

A browser runs nothing of what a user has uploaded: the headers are those of `granite_storage.web.StoredObjectResponse`, which is
for asynchronous frameworks.
"""

from __future__ import annotations

from granite_storage._headers import Disposition, require_disposition, safe_headers, served_type
from granite_storage._problems import MEDIA_TYPE, RETRY_AFTER, problem_of
from granite_storage.exceptions import MissingDependencyError, StorageError
from granite_storage.orm.attachment import Attachment, AttachmentVariant
from granite_storage.refs import require_scanned

try:
    from flask import Flask, Response, request
    from werkzeug.datastructures import Range
    from werkzeug.wsgi import FileWrapper
except ImportError as _error:
    raise MissingDependencyError("granite_storage.contrib.flask needs Flask: pip install 'granite-storage[flask]'") from _error

__all__ = ["install_error_handlers", "send_attachment"]

_CHUNK = 256 * 1024


def send_attachment(
    stored: Attachment | AttachmentVariant,
    *,
    disposition: Disposition = "attachment",
    filename: str | None = None,
) -> Response:
    """Return a stored file as a response, whole or in one range, which a browser never runs.

    Scripts, HTML, SVG and XML are served as `application/octet-stream`, with `nosniff` and a Content-Security-Policy. The ETag is
    a strong one made of the checksum. The file is read as it is sent, and closed with the response. A request for several ranges
    is answered with the whole file.

    Args:
        stored: A stored attachment, or a variant of one.
        disposition: `inline` lets a browser show it if its media type is safe.
        filename: The name for saving it; None for its original name.

    Raises:
        UnboundAttachmentError: The attachment is not stored yet.
        ObjectNotFoundError: The object does not exist.
        ScanPendingError: A virus scanner has not scanned it yet.
        InfectedObjectError: A virus scanner has found it infected.
        ConfigurationError: It is called in an `async def` view, whose event loop it would block.
        ValueError: The disposition is not known.
    """
    require_disposition(disposition)
    ref = stored.ref
    require_scanned(ref)
    reader = stored.sync.open()
    try:
        name = ref.original_filename if filename is None else filename
        response = Response(FileWrapper(reader, _CHUNK), direct_passthrough=True)
        response.headers.update(safe_headers(served_type(ref.content_type), name, disposition))
        response.content_length = ref.size
        if ref.checksum:
            response.set_etag(ref.checksum.removeprefix("sha256:"))
        asked = request.environ
        if not _is_one_range(request.range):  # werkzeug answers 416 where RFC 9110 has the field ignored
            asked = {key: value for key, value in asked.items() if key != "HTTP_RANGE"}
        response.make_conditional(asked, accept_ranges=True, complete_length=ref.size)
        if response.status_code == 412:  # whose body werkzeug would make of the whole file
            reader.close()
            return Response(status=412, headers={"Cache-Control": "no-store"})
    except BaseException:
        reader.close()
        raise
    return response


def _is_one_range(asked: Range | None) -> bool:
    return asked is not None and asked.units == "bytes" and len(asked.ranges) == 1


def install_error_handlers(app: Flask, *, retry_after: int = RETRY_AFTER) -> None:
    """Make an application answer the library's errors with problem details (RFC 9457), and the status that fits.

    It is 413 for a file that is too large, 415 and 422 for one that is refused, 404 for one that does not exist, and so on as
    `granite_storage.web.problem_response` has it. Errors of the server (5xx) are logged with the details that the client does not
    get.

    Args:
        app: The application.
        retry_after: The Retry-After of an unavailable storage, in seconds.
    """

    def on_storage_error(error: StorageError) -> Response:
        problem = problem_of(error)
        problem.log(error)
        return Response(problem.body, problem.status, problem.headers(retry_after), content_type=MEDIA_TYPE)

    app.register_error_handler(StorageError, on_storage_error)
