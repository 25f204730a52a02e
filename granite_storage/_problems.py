"""Errors as HTTP clients see them, with any framework: a status, and a message that reveals nothing about the server."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

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

__all__ = ["MEDIA_TYPE", "RETRY_AFTER", "Problem", "as_sentence", "problem_of"]

logger: logging.Logger = logging.getLogger("granite_storage")

RETRY_AFTER = 5
"""When a client may try again where the storage is unavailable, in seconds."""

MEDIA_TYPE = "application/problem+json"

_TITLES = {413: "Content Too Large"}


@dataclass(frozen=True, slots=True)
class Problem:
    """The details of a problem. Source: RFC 9457.

    Attributes:
        status: The status of the response.
        detail: A sentence for the client.
        more: Other members of the body.
        retry: Whether the request may be sent again.
    """

    status: int
    detail: str
    more: dict[str, Any] = field(default_factory=dict)
    retry: bool = False

    @property
    def body(self) -> str:
        """The body, of the media type `MEDIA_TYPE`."""
        title = _TITLES.get(self.status, HTTPStatus(self.status).phrase)
        return json.dumps({"type": "about:blank", "title": title, "status": self.status, "detail": self.detail, **self.more})

    def headers(self, retry_after: int) -> dict[str, str]:
        """Return the other headers of the response; `retry_after` is in seconds."""
        return {"Cache-Control": "no-store"} | ({"Retry-After": str(retry_after)} if self.retry else {})

    def log(self, error: StorageError) -> None:
        """Log an error of the server, with the details that the client does not get."""
        if self.status >= 500:
            logger.error("a request failed with status %d", self.status, exc_info=error)


def as_sentence(message: str) -> str:
    """Return the message of an error as a sentence."""
    end = "" if message.endswith((".", "!", "?")) else "."
    return f"{message[:1].upper()}{message[1:]}{end}"


def problem_of(error: StorageError) -> Problem:
    """Return an error of the library as a client sees it."""
    match error:
        case ContentTooLargeError():
            return Problem(413, f"The file is larger than {error.max_size} bytes.", {"max_size": error.max_size})
        case CollectionFullError(max_files=None):
            limit = {"max_total_size": error.max_total_size}
            return Problem(413, f"The files are larger than {error.max_total_size} bytes in total.", limit)
        case CollectionFullError():
            most = count_of(error.max_files or 0, "file")
            return Problem(413, f"There can be at most {most}.", {"max_files": error.max_files})
        case EmptyUploadError():
            return Problem(422, "No file was chosen.")
        case UnsupportedContentError():
            return Problem(415, as_sentence(str(error)), {"accept": list(error.accept)} if error.accept else {})
        case ContentRejectedError() | DerivationRefusedError():
            return Problem(422, as_sentence(str(error)))
        case InfectedContentError():
            return Problem(422, "The file was refused, because a virus scanner has found it infected.")
        case ScannerUnavailableError():
            return Problem(503, "The file could not be scanned for viruses at the moment.", retry=True)
        case DerivationFailedError():
            return Problem(503, "The file could not be processed at the moment.", retry=True)
        case ScanPendingError():
            return Problem(409, "The file has not been scanned for viruses yet.", retry=True)
        case InfectedObjectError():  # 451 is for what the law forbids (RFC 7725); to a client, this file is not there
            return Problem(404, "The file does not exist.")
        case StreamTimeoutError():
            return Problem(408, "The file did not arrive in time.")
        case ObjectNotFoundError() | UnknownVariantError():
            return Problem(404, "The file does not exist.")
        case ObjectExistsError() | StaleAttachmentError():
            return Problem(409, "The file or its row has changed meanwhile; the request may be tried again.")
        case BackendUnavailableError():
            return Problem(503, "The storage is not available at the moment.", retry=True)
        case StorageFullError():
            return Problem(507, "The storage is full.")
        case _:
            return Problem(500, "The file could not be processed.")
