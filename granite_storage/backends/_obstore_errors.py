"""What went wrong in an object store, in the library's own words: the one place that reads obstore's errors.

obstore has a class for some of them. For the rest, and for whatever its writer raises when it is closed, only a text tells what
the service answered. No message repeats that text: it quotes keys, and what the service said. obstore's error is the `__cause__`.
"""

from __future__ import annotations

import re

from granite_storage.backends._service_errors import PreconditionFailedError, RangeNotSatisfiableError
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageFullError,
)

__all__ = ["ObjectStoreConfigurationError", "translate"]


class ObjectStoreConfigurationError(ConfigurationError, BackendError):
    """The store cannot be used as it is configured: its bucket or container, or an ability that it lacks."""


_BY_CLASS: dict[str, type[BackendError]] = {
    "AlreadyExistsError": ObjectExistsError,
    "FileNotFoundError": ObjectNotFoundError,
    "NotFoundError": ObjectNotFoundError,
    "NotImplementedError": ObjectStoreConfigurationError,
    "NotSupportedError": ObjectStoreConfigurationError,
    "PermissionDeniedError": AccessDeniedError,
    "PermissionError": AccessDeniedError,
    "PreconditionError": PreconditionFailedError,
    "UnauthenticatedError": AccessDeniedError,
}
_BY_CODE: dict[str, type[BackendError]] = {
    **dict.fromkeys(("NoSuchBucket", "ContainerNotFound"), ObjectStoreConfigurationError),
    **dict.fromkeys(("InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"), StorageFullError),
}
_BY_STATUS: dict[int, type[BackendError]] = {
    401: AccessDeniedError,
    403: AccessDeniedError,
    404: ObjectNotFoundError,
    408: BackendUnavailableError,
    412: PreconditionFailedError,
    416: RangeNotSatisfiableError,
    429: BackendUnavailableError,
    507: StorageFullError,
}
_BY_SYSTEM_ERROR: dict[int, type[BackendError]] = {
    1: AccessDeniedError,
    13: AccessDeniedError,
    20: ObjectNotFoundError,
    28: StorageFullError,
    30: AccessDeniedError,
    122: StorageFullError,
}
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)<")
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
_NETWORK = re.compile(r"HTTP error:|error sending request|connection (?:closed|reset)|timed? ?out", re.IGNORECASE)
_RANGE = re.compile(r"Invalid range|range was invalid|StartTooLarge", re.IGNORECASE)


def translate(error: Exception, operation: str, *, store: str, location: str | None = None) -> BackendError:
    """Return the error that callers see for one that obstore raised; it is to be raised from it.

    Args:
        error: obstore's error.
        operation: What was asked of it, such as `put`.
        store: What the store is called in messages.
        location: The object's location, where the request had one.
    """
    kind = _kind_of(error, location or "")
    if kind is ObjectNotFoundError and operation == "put":  # an upload that is gone, or a file where a folder should be
        kind = BackendError
    target = store if location is None else f"{location!r} in {store}"
    reason = _REASONS.get(kind, f"failed: {type(error).__name__}")
    return kind(f"{operation} of {target} {reason}", location=location)


_REASONS: dict[type[BackendError], str] = {
    AccessDeniedError: "was refused: the credentials do not allow it",
    BackendUnavailableError: "failed: the service did not answer, or not now",
    ObjectExistsError: "was refused: an object is there already",
    ObjectNotFoundError: "found no object",
    ObjectStoreConfigurationError: "cannot work: check the bucket or container, or the store lacks the ability",
    StorageFullError: "failed: the store has no room left",
}


def _kind_of(error: Exception, location: str) -> type[BackendError]:
    text = str(error)
    if location:
        text = text.replace(location, "")  # an object may be called like an answer
    code = _CODE.search(text)
    if code and code[1] in _BY_CODE:
        return _BY_CODE[code[1]]
    named = next((_BY_CLASS[one.__name__] for one in type(error).__mro__ if one.__name__ in _BY_CLASS), None)
    return named or _kind_by_text(text)


def _kind_by_text(text: str) -> type[BackendError]:
    status = _STATUS.search(text)
    if status:
        number = int(status[1])
        return _BY_STATUS.get(number, BackendUnavailableError if number >= 500 else BackendError)
    system = _SYSTEM_ERROR.search(text)
    if system and int(system[1]) in _BY_SYSTEM_ERROR:
        return _BY_SYSTEM_ERROR[int(system[1])]
    if _RANGE.search(text):
        return RangeNotSatisfiableError
    return BackendUnavailableError if _NETWORK.search(text) else BackendError
