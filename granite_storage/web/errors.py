"""Errors as responses: problem details (RFC 9457) that say what the client can do, and nothing about the server."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, ClassVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from granite_storage._words import count_of
from granite_storage.exceptions import (
    BackendUnavailableError,
    CollectionFullError,
    ContentRejectedError,
    ContentTooLargeError,
    DerivationFailedError,
    DerivationRefusedError,
    EmptyUploadError,
    InfectedContentError,
    InfectedObjectError,
    ObjectExistsError,
    ObjectNotFoundError,
    ScannerUnavailableError,
    ScanPendingError,
    StaleAttachmentError,
    StorageError,
    StorageFullError,
    StreamTimeoutError,
    UnknownVariantError,
    UnsupportedContentError,
)
from granite_storage.web._openapi import describe_bodies

__all__ = [
    "RETRY_AFTER",
    "MalformedRequestError",
    "MissingFieldError",
    "RequestError",
    "RequestTooLargeError",
    "UnsupportedRequestError",
    "UploadMismatchError",
    "UploadMissingError",
    "UploadTokenError",
    "client_message",
    "install_error_handlers",
    "problem_response",
]

logger: logging.Logger = logging.getLogger("granite_storage")

RETRY_AFTER = 5
"""When a client may try again where the storage is unavailable, in seconds."""

_TITLES = {413: "Content Too Large"}

# Errors of a request. Their messages are for the client: they name nothing of the server.


class RequestError(StorageError, HTTPException):
    """A request cannot be processed; nothing of it was stored.

    It is also an `HTTPException` of Starlette, so an application without handlers of its own answers with its status.

    Attributes:
        status: The status of the response.
    """

    status: ClassVar[int] = 400

    def __init__(self, message: str = "") -> None:
        Exception.__init__(self, message)
        self.status_code: int = self.status
        self.detail: str = _as_sentence(message)
        self.headers: Mapping[str, str] | None = None

    def __str__(self) -> str:
        return Exception.__str__(self)

    def __repr__(self) -> str:
        return Exception.__repr__(self)


def _as_sentence(message: str) -> str:
    end = "" if message.endswith((".", "!", "?")) else "."
    return f"{message[:1].upper()}{message[1:]}{end}"


class MalformedRequestError(RequestError):
    """The body does not match its media type, or is cut off."""


class RequestTooLargeError(RequestError):
    """The request exceeds a limit: of bytes, parts, files or fields.

    Attributes:
        limit: The name of the limit in `UploadLimits`.
        maximum: Its value.
    """

    status = 413

    def __init__(self, message: str = "", *, limit: str | None = None, maximum: int | None = None) -> None:
        super().__init__(message)
        self.limit = limit
        self.maximum = maximum


class MissingFieldError(RequestError, KeyError):
    """A form does not have a field or a file that the application needs.

    Attributes:
        names: The names of all that is missing, where they were required of the form; empty for one that was asked for later.
    """

    status = 422

    def __init__(self, message: str = "", *, names: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.names = names


class UnsupportedRequestError(RequestError):
    """The media type or the encoding of the body is not supported."""

    status = 415


class UploadTokenError(RequestError):
    """The token of a direct upload was changed, has expired, or belongs to another key or owner; the error does not say which."""

    status = 403


class UploadMissingError(RequestError):
    """No file has been uploaded yet, or it was deleted."""

    status = 409


class UploadMismatchError(RequestError):
    """The uploaded file differs from the announced one in size, checksum or media type."""

    status = 422


# The responses.


@dataclass(frozen=True, slots=True)
class _Problem:
    status: int
    detail: str
    more: dict[str, Any] = field(default_factory=dict)
    retry: bool = False


def install_error_handlers(app: Starlette, *, retry_after: int = RETRY_AFTER) -> None:
    """Make a Starlette or FastAPI application answer the library's errors with problem details.

    Errors of the server (5xx) are logged with the details that the client does not get. A client that disconnects while it sends
    is no error: nothing is answered or logged. The OpenAPI document of a FastAPI application shows the bodies that `upload_form`
    and `upload_body` receive.

    Args:
        app: The application.
        retry_after: The Retry-After of an unavailable storage, in seconds.
    """

    async def on_storage_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, StorageError)  # noqa: S101  # Starlette chooses the handler by the class
        return problem_response(error, retry_after=retry_after)

    async def on_disconnect(_: Request, __: Exception) -> Response:
        return Response(status_code=400)

    app.add_exception_handler(StorageError, on_storage_error)
    app.add_exception_handler(ClientDisconnect, on_disconnect)
    describe_bodies(app)


def problem_response(error: StorageError, *, retry_after: int = RETRY_AFTER) -> Response:
    """Return the response to an error of the library, as `application/problem+json`.

    400, 408, 413, 415 and 422 for an error in the request, 403 for an invalid token of a direct upload, 404 for an object that is
    missing or infected, 409 for a state that has changed meanwhile and for an object that is still to be scanned, 503 with
    Retry-After for an unavailable storage or scanner and for a failed derivation, 507 for a full storage, and 500 for anything
    else. The body names no location, backend or path.

    Args:
        error: The error.
        retry_after: The value of Retry-After, in seconds.
    """
    problem = _logged_problem_of(error)
    status = HTTPStatus(problem.status)
    title = _TITLES.get(problem.status, status.phrase)
    content = {"type": "about:blank", "title": title, "status": problem.status, "detail": problem.detail, **problem.more}
    headers = {"Cache-Control": "no-store"} | ({"Retry-After": str(retry_after)} if problem.retry else {})
    return Response(json.dumps(content), problem.status, headers, "application/problem+json")


def client_message(error: StorageError) -> str:
    """Return the message of an error for clients, such as for a form that is shown again: the `detail` of `problem_response`.

    Errors of the server (5xx) are logged with the details that the client does not get.
    """
    return _logged_problem_of(error).detail


def _logged_problem_of(error: StorageError) -> _Problem:
    problem = _problem_of(error)
    if problem.status >= 500:
        logger.error("a request failed with status %d", problem.status, exc_info=error)
    return problem


def _problem_of(error: StorageError) -> _Problem:
    match error:
        case RequestTooLargeError():
            return _Problem(error.status, error.detail, {"limit": error.limit, "maximum": error.maximum})
        case RequestError():
            return _Problem(error.status, error.detail)
        case ContentTooLargeError():
            return _Problem(413, f"The file is larger than {error.max_size} bytes.", {"max_size": error.max_size})
        case CollectionFullError(max_files=None):
            limit = {"max_total_size": error.max_total_size}
            return _Problem(413, f"The files are larger than {error.max_total_size} bytes in total.", limit)
        case CollectionFullError():
            most = count_of(error.max_files or 0, "file")
            return _Problem(413, f"There can be at most {most}.", {"max_files": error.max_files})
        case EmptyUploadError():
            return _Problem(422, "No file was chosen.")
        case UnsupportedContentError():
            return _Problem(415, _as_sentence(str(error)), {"accept": list(error.accept)} if error.accept else {})
        case ContentRejectedError() | DerivationRefusedError():
            return _Problem(422, _as_sentence(str(error)))
        case InfectedContentError():
            return _Problem(422, "The file was refused, because a virus scanner has found it infected.")
        case ScannerUnavailableError():
            return _Problem(503, "The file could not be scanned for viruses at the moment.", retry=True)
        case DerivationFailedError():
            return _Problem(503, "The file could not be processed at the moment.", retry=True)
        case ScanPendingError():
            return _Problem(409, "The file has not been scanned for viruses yet.", retry=True)
        case InfectedObjectError():  # 451 is for what the law forbids (RFC 7725); to a client, this file is not there
            return _Problem(404, "The file does not exist.")
        case StreamTimeoutError():
            return _Problem(408, "The file did not arrive in time.")
        case ObjectNotFoundError() | UnknownVariantError():
            return _Problem(404, "The file does not exist.")
        case ObjectExistsError() | StaleAttachmentError():
            return _Problem(409, "The file or its row has changed meanwhile; the request may be tried again.")
        case BackendUnavailableError():
            return _Problem(503, "The storage is not available at the moment.", retry=True)
        case StorageFullError():
            return _Problem(507, "The storage is full.")
        case _:
            return _Problem(500, "The file could not be processed.")
