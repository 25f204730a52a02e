"""Policies: which backend a logical slot writes to, and under which limits."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from granite_storage.exceptions import ConfigurationError, InvalidLocationError
from granite_storage.locations import check_segment, make_location

__all__ = ["StoragePolicy"]


@dataclass(frozen=True, slots=True)
class StoragePolicy:
    """Binds a storage key to a backend.

    A policy is checked when it is made: one that cannot work never exists.

    Args:
        storage_key: The logical name that the application uses, such as `avatars`.
        backend_key: The key of the backend in the manager that new objects are written to.
        max_size: The most bytes an object may have; 0 allows only empty objects, None any size.
        key_prefix: Path segments put before every generated location, such as `avatars` or `tenant/avatars`; an empty one
            is the same as None.
        retention: How long an object is kept after its row has given it up, so that a database restored from a backup of that
            age still finds it, and an undo can bring it back. It needs a journal, which remembers what waits.

    Raises:
        ConfigurationError: An argument cannot work; the message names it.

    Example:
        >>> StoragePolicy("avatars", "local", max_size=2 * 1024 * 1024, key_prefix="avatars").max_size
        2097152
    """

    storage_key: str
    backend_key: str
    max_size: int | None = None
    key_prefix: str | None = None
    retention: timedelta = timedelta(0)

    def __post_init__(self) -> None:
        _require_name("storage_key", self.storage_key)
        _require_name("backend_key", self.backend_key)
        _require_max_size(self.storage_key, self.max_size)
        if self.key_prefix == "":
            object.__setattr__(self, "key_prefix", None)
        if self.key_prefix is not None:
            _require_prefix(self.storage_key, self.key_prefix)
        _require_retention(self.storage_key, self.retention)


def _require_name(argument: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"a policy's {argument} must be a string that is not empty, not {value!r}")


def _require_max_size(storage_key: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigurationError(f"max_size of policy {storage_key!r} must be a number of bytes or None, not {value!r}")
    if value < 0:
        raise ConfigurationError(f"max_size of policy {storage_key!r} must not be negative, but is {value}")


def _require_prefix(storage_key: str, prefix: object) -> None:
    if not isinstance(prefix, str):
        raise ConfigurationError(f"key_prefix of policy {storage_key!r} must be a string or None, not {prefix!r}")
    try:
        for segment in prefix.split("/"):
            check_segment(segment)
        make_location(key_prefix=prefix, model_name="m", entity_id="1", field_name="f", original_filename=None)
    except InvalidLocationError as error:
        raise ConfigurationError(f"key_prefix of policy {storage_key!r} cannot be used: {error}") from error


def _require_retention(storage_key: str, value: object) -> None:
    if not isinstance(value, timedelta) or value < timedelta(0):
        raise ConfigurationError(f"retention of policy {storage_key!r} must be a timedelta that is not negative, not {value!r}")
