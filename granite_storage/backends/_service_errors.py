"""What backends on a network service say to themselves of its answers, before callers see an error."""

from __future__ import annotations

from granite_storage.exceptions import BackendError

__all__ = ["ConnectionTakenError", "PreconditionFailedError", "RangeNotSatisfiableError", "error_at"]


class ConnectionTakenError(BackendError):
    """The connection of a reader that was not being read was given to another call; what is left may be asked for again."""


class PreconditionFailedError(BackendError):
    """A condition of the request did not hold; nothing was changed."""


class RangeNotSatisfiableError(BackendError):
    """The range begins at the end of the object or after it."""


def error_at(location: str, error: BackendError) -> BackendError:
    """Return the same error for one of several locations."""
    one = type(error)(str(error), location=location)
    one.__cause__ = error.__cause__
    return one
