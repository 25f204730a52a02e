"""What a request may bring."""

from __future__ import annotations

from dataclasses import dataclass, fields

from granite_storage.exceptions import ConfigurationError
from granite_storage.web.exceptions import RequestTooLargeError

__all__ = ["DEFAULT_LIMITS", "UploadLimits"]

_MAY_BE_NONE = frozenset({"max_size", "max_file_size"})


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadLimits:
    """What a request may bring; the first byte or part beyond a limit ends it, whatever its Content-Length says.

    Files are limited by the policy that they are stored under as well, whichever is less.

    Attributes:
        max_size: The most bytes of the whole body, 1 GiB; None for as much as the other limits let pass.
        max_file_size: The most bytes of one file; None for the policy's limit alone.
        max_files: The most files, in all fields together.
        max_fields: The most fields that are not files.
        max_field_size: The most bytes of one field; in a URL-encoded body, with its name and before it is decoded.
        max_fields_size: The most bytes of all fields together, which are kept in memory; of a URL-encoded body, all of it.
        max_headers: The most headers of one part.
        max_header_size: The most bytes of one header of a part.
        max_padding: The most bytes before the first boundary, and after the last one.

    Raises:
        ConfigurationError: A limit is not a number, or is negative.
    """

    max_size: int | None = 1 << 30
    max_file_size: int | None = None
    max_files: int = 100
    max_fields: int = 1000
    max_field_size: int = 1 << 20
    max_fields_size: int = 4 << 20
    max_headers: int = 8
    max_header_size: int = 4224
    max_padding: int = 65536

    def __post_init__(self) -> None:
        for name in (item.name for item in fields(self)):
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigurationError(f"{name} must be a number that is not negative, not {value!r}")

    def require(self, limit: str, actual: int, what: str) -> None:
        """Raise `RequestTooLargeError` where there is more of something than a limit allows."""
        maximum = getattr(self, limit)
        if maximum is not None and actual > maximum:
            raise RequestTooLargeError(f"{what} (at most {maximum})", limit=limit, maximum=maximum)


DEFAULT_LIMITS = UploadLimits()
