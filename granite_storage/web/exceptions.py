"""What is wrong with a request. The messages are meant for the client: they name nothing of the server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from starlette.exceptions import HTTPException

from granite_storage.exceptions import StorageError

__all__ = [
    "MalformedRequestError",
    "MissingFieldError",
    "RequestError",
    "RequestTooLargeError",
    "UnsupportedRequestError",
    "UploadMismatchError",
    "UploadMissingError",
    "UploadTokenError",
]


class RequestError(StorageError, HTTPException):
    """A request cannot be carried out as it is; nothing that it brought was kept.

    It is an `HTTPException` of Starlette too, so an application without handlers of its own answers it with its status.

    Attributes:
        status: The status of the response that says so.
    """

    status: ClassVar[int] = 400

    def __init__(self, message: str = "") -> None:
        Exception.__init__(self, message)
        self.status_code: int = self.status
        self.detail: str = f"{message[:1].upper()}{message[1:]}."
        self.headers: Mapping[str, str] | None = None

    def __str__(self) -> str:
        return Exception.__str__(self)

    def __repr__(self) -> str:
        return Exception.__repr__(self)


class MalformedRequestError(RequestError):
    """The body is not what its media type says, or is cut off."""


class RequestTooLargeError(RequestError):
    """The request has more of something than is allowed: bytes, parts, files or fields.

    Attributes:
        limit: Which one of `UploadLimits` it is.
        maximum: What it allows.
    """

    status = 413

    def __init__(self, message: str = "", *, limit: str | None = None, maximum: int | None = None) -> None:
        super().__init__(message)
        self.limit = limit
        self.maximum = maximum


class MissingFieldError(RequestError, KeyError):
    """A form does not have a field or a file that the application has asked for by its name."""

    status = 422


class UnsupportedRequestError(RequestError):
    """The body is of a media type, or in an encoding, that is not taken here."""

    status = 415


class UploadTokenError(RequestError):
    """The token of a direct upload is changed, over, signed with a key that is gone, or another's; which is not said."""

    status = 403


class UploadMissingError(RequestError):
    """Nothing was uploaded yet, or nothing is there any more."""

    status = 409


class UploadMismatchError(RequestError):
    """What was uploaded is not what was announced: its size, checksum or media type."""

    status = 422
