"""Errors as responses: problem details (RFC 9457) that say what the client can do, and nothing about the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from granite_storage._problems import MEDIA_TYPE, RETRY_AFTER, Problem, as_sentence, problem_of
from granite_storage.exceptions import StorageError
from granite_storage.web._openapi import describe_bodies

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
        self.detail: str = as_sentence(message)
        self.headers: Mapping[str, str] | None = None

    def __str__(self) -> str:
        return Exception.__str__(self)

    def __repr__(self) -> str:
        return Exception.__repr__(self)


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


def install_error_handlers(app: Starlette, *, retry_after: int = RETRY_AFTER) -> None:
    """Make a Starlette or FastAPI application answer the library's errors with problem details.

    Errors of the server (5xx) are logged with the details that the client does not get. A client that disconnects while it sends
    is not an error: nothing is answered or logged. A FastAPI application's OpenAPI document shows the bodies that `upload_form`
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
    return Response(problem.body, problem.status, problem.headers(retry_after), MEDIA_TYPE)


def client_message(error: StorageError) -> str:
    """Return the message of an error for clients, such as for a form that is shown again: the `detail` of `problem_response`.

    Errors of the server (5xx) are logged with the details that the client does not get.
    """
    return _logged_problem_of(error).detail


def _logged_problem_of(error: StorageError) -> Problem:
    match error:
        case RequestTooLargeError():
            problem = Problem(error.status, error.detail, {"limit": error.limit, "maximum": error.maximum})
        case RequestError():
            problem = Problem(error.status, error.detail)
        case _:
            problem = problem_of(error)
    problem.log(error)
    return problem
