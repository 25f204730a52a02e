"""Policies: which backend a logical slot writes to, and under which limits."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from types import ModuleType
from typing import get_args

from granite_storage._documentation import Page
from granite_storage._headers import Disposition, require_base_url, url_path
from granite_storage.exceptions import ConfigurationError, InvalidLocationError
from granite_storage.inspection.base import (
    Checks,
    Inspector,
    OnMismatch,
    OnUnavailable,
    OnUnstrippable,
    Scanner,
    StripMode,
    Validator,
)
from granite_storage.locations import check_segment, make_location

__all__ = ["PublicURL", "StoragePolicy"]

_HEADER = re.compile(r"[!-~](?:[ !-~]*[!-~])?")


@dataclass(frozen=True, slots=True)
class PublicURL:
    """Makes the objects of a policy public: their base URL, and the headers that are stored with them.

    The URL of an object is `base_url`, a slash and its location, percent-encoded (RFC 3986): anyone who knows it can read the
    object, as long as it is stored. A location is never used again, so caches may keep the object forever. A prefix of the
    backend itself, such as that of `S3StorageBackend(prefix=...)`, belongs to `base_url`.

    A backend that keeps headers stores `cache_control`, and a Content-Type and a Content-Disposition with which browsers
    execute nothing: HTML, SVG and scripts are `application/octet-stream` and downloads, whatever the ref says. Configure the
    bucket for public reads yourself, unless `acl` does it.

    Args:
        base_url: Where clients find the objects, such as `https://cdn.example.com`, or where `granite_storage.web.PublicFiles` is
            mounted.
        cache_control: The Cache-Control of every object.
        disposition: `inline` lets a browser show types that are safe to show; `attachment` makes all objects downloads.
        acl: The canned ACL of S3, such as `public-read`; None for none, which buckets without ACLs need.

    Raises:
        ConfigurationError: An argument is invalid; the message names it.

    Example:
        >>> PublicURL("https://cdn.example.com").url_of("avatars/1/0190-me & you.png")
        'https://cdn.example.com/avatars/1/0190-me%20%26%20you.png'
    """

    base_url: str
    cache_control: str = "public, max-age=31536000, immutable"
    disposition: Disposition = "inline"
    acl: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_url", require_base_url(self.base_url))
        for argument, value in (("cache_control", self.cache_control), ("acl", self.acl)):
            if (value is not None or argument != "acl") and not (isinstance(value, str) and _HEADER.fullmatch(value)):
                raise ConfigurationError(f"{argument} of a PublicURL must be the value of a header in ASCII, not {value!r:.120}")
        if self.disposition not in get_args(Disposition):
            raise ConfigurationError(f"disposition of a PublicURL must be 'attachment' or 'inline', not {self.disposition!r}")

    def url_of(self, location: str) -> str:
        """Return the URL of a location; applications call `StorageManager.public_url`."""
        return f"{self.base_url}/{url_path(location)}"


@dataclass(frozen=True, slots=True)
class StoragePolicy:
    """Maps a storage key to a backend, with limits.

    A policy is checked when it is created, so an invalid one never exists.

    Args:
        storage_key: The logical name that the application uses, such as `avatars`.
        backend_key: The key of the backend in the manager that new objects are written to.
        max_size: The most bytes an object may have; 0 allows only empty objects, None any size.
        key_prefix: Path segments put before every generated location, such as `avatars` or `tenant/avatars`; an empty one
            is the same as None.
        retention: How long an object is kept after its row has released it, so that a database restored from a backup of that
            age still finds it, and an undo can restore it. It needs a journal, which records the pending deletes.
        accept: The media types that are accepted, such as `("image/*", "application/pdf")`. The type is detected from the
            content and recorded in the ref; the declared type counts only if the content does not show its type. `image/*` does
            not accept types that a browser executes, such as `image/svg+xml`, unless they are named. None accepts any content
            as it is declared.
        on_mismatch: How to treat an upload whose declared type contradicts its content: `refuse` it, or `correct` the type to
            the detected one, which must be accepted too.
        inspect: Inspectors of the content, such as `ImageLimits`. Their findings are recorded in the ref's `media`.
        scanner: The virus scanner, such as `ClamdScanner("127.0.0.1:3310")`.
        strip: Metadata to remove from JPEG, PNG and WebP images, without changing their pixels: `location`, or `all` except the
            orientation and the colour profile. The size and the checksum of the ref are those of the stored object.
        on_unstrippable: How to treat images, films and sound of other types, some of which contain a location: `refuse` them,
            or `keep` them unchanged.
        validate: A function that is called with an `UploadPreview` of each upload before any of it is stored, and refuses it by
            raising `ContentRejectedError`, or ValueError itself, with a message for the client. It must return None. A
            coroutine function is awaited, any other runs in a thread.
        public: Where anyone may read the objects, such as `PublicURL("https://cdn.example.com")`; None for private objects.

    Raises:
        ConfigurationError: An argument is invalid; the message names it.
        MissingDependencyError: `accept` needs the type of the content, and `granite-storage[inspect]` is not installed.

    Example:
        >>> StoragePolicy("avatars", "local", max_size=2 * 1024 * 1024).max_size
        2097152
    """

    storage_key: str
    backend_key: str
    max_size: int | None = None
    key_prefix: str | None = None
    retention: timedelta = timedelta(0)
    accept: tuple[str, ...] | None = None
    on_mismatch: OnMismatch = "refuse"
    inspect: Sequence[Inspector] = ()
    scanner: Scanner | None = None
    strip: StripMode | None = None
    on_unstrippable: OnUnstrippable = "refuse"
    validate: Validator | None = None
    public: PublicURL | None = None
    checks: Checks | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        _require_name("storage_key", self.storage_key)
        _require_name("backend_key", self.backend_key)
        _require_max_size(self.storage_key, self.max_size)
        if self.key_prefix == "":
            object.__setattr__(self, "key_prefix", None)
        if self.key_prefix is not None:
            _require_prefix(self.storage_key, self.key_prefix)
        _require_retention(self.storage_key, self.retention)
        object.__setattr__(self, "inspect", _require_inspectors(self.storage_key, self.inspect))
        if self.accept is not None:
            from granite_storage.inspection.media_types import check_accept

            object.__setattr__(self, "accept", check_accept(self.accept))
        _require_choice(self.storage_key, "on_mismatch", self.on_mismatch, get_args(OnMismatch))
        if self.on_mismatch != "refuse" and self.accept is None:
            raise ConfigurationError(f"on_mismatch of policy {self.storage_key!r} has no effect without accept")
        _require_choice(self.storage_key, "strip", self.strip, (None, *get_args(StripMode)))
        _require_choice(self.storage_key, "on_unstrippable", self.on_unstrippable, get_args(OnUnstrippable))
        _require_scanner(self.storage_key, self.scanner)
        require_validator(f"policy {self.storage_key!r}", self.validate)
        _require_public(self.storage_key, self.public, may_hold=self.may_hold)
        checks = Checks(
            accept=self.accept,
            on_mismatch=self.on_mismatch,
            inspectors=tuple(self.inspect),
            scanner=self.scanner,
            strip=self.strip,
            on_unstrippable=self.on_unstrippable,
            validators=() if self.validate is None else (self.validate,),
        )
        if checks.needs_type:
            from granite_storage.inspection.media_types import require_detector

            require_detector()
        is_judged = checks.needs_type or checks.scanner is not None or bool(checks.validators)
        if is_judged or self.public is not None:
            load_gate()
        if is_judged:
            object.__setattr__(self, "checks", checks)

    @property
    def may_hold(self) -> bool:
        """Whether its scanner may hold an upload until it can scan it."""
        return self.scanner is not None and self.scanner.on_unavailable == "hold"


def _require_name(argument: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise ConfigurationError(f"a policy's {argument} must be a non-empty string, not {value!r}")


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
        raise ConfigurationError(f"retention of policy {storage_key!r} must be a non-negative timedelta, not {value!r}")


def _require_inspectors(storage_key: str, value: object) -> tuple[Inspector, ...]:
    if isinstance(value, Inspector):
        raise ConfigurationError(f"inspect of policy {storage_key!r} must be a list of inspectors: put the {value!r} into one")
    if not isinstance(value, list | tuple):
        raise ConfigurationError(f"inspect of policy {storage_key!r} must be a list of inspectors, not {value!r}")
    for item in value:
        if isinstance(item, type) or not isinstance(item, Inspector):
            raise ConfigurationError(f"inspect of policy {storage_key!r} contains {item!r}, which has no begin()")
        if inspect.iscoroutinefunction(item.begin):
            raise ConfigurationError(
                f"begin() of {item!r}, in inspect of policy {storage_key!r}, must not be a coroutine function"
            )
    return tuple(value)


def _require_choice(storage_key: str, argument: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(value is choice or value == choice for choice in choices):
        known = ", ".join(map(repr, choices))
        raise ConfigurationError(f"{argument} of policy {storage_key!r} must be one of {known}, not {value!r}")


def _require_scanner(storage_key: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, type) or not isinstance(value, Scanner):
        raise ConfigurationError(f"scanner of policy {storage_key!r} must have scan() and on_unavailable, but is {value!r}")
    _require_choice(storage_key, "scanner.on_unavailable", value.on_unavailable, get_args(OnUnavailable))


def _require_public(storage_key: str, value: object, *, may_hold: bool) -> None:
    if value is None:
        return
    if not isinstance(value, PublicURL):
        raise ConfigurationError(
            f"public of policy {storage_key!r} must be a PublicURL, such as PublicURL('https://cdn.example.com'), not {value!r}",
            see=Page.PUBLIC_FILES,
        )
    if may_hold:
        raise ConfigurationError(
            f"policy {storage_key!r} is public, but its scanner holds uploads that it cannot scan, which would be public "
            "before they are scanned: use a scanner with on_unavailable='refuse', or sign URLs instead",
            see=Page.PUBLIC_FILES,
        )


@cache
def load_gate() -> ModuleType:
    """Return what judges uploads: loading reads files, which an upload on the event loop must not wait for.

    It takes as long to load as the rest, so only the policies that need it load it.
    """
    from granite_storage.inspection import gate

    return gate


def require_validator(owner: str, value: object) -> None:
    """Raise `ConfigurationError` unless the value is a function that takes an upload."""
    if value is None:
        return
    if isinstance(value, type) or not callable(value):
        raise ConfigurationError(
            f"validate of {owner} must be a function that takes an UploadPreview, not {value!r}", see=Page.VALIDATORS
        )
    if inspect.isgeneratorfunction(value) or inspect.isasyncgenfunction(value):
        raise ConfigurationError(
            f"validate of {owner} must not be a generator function, because calling it runs nothing: remove its yield",
            see=Page.VALIDATORS,
        )
    load_gate()
    try:
        inspect.signature(value).bind(None)
    except TypeError as error:
        raise ConfigurationError(
            f"validate of {owner} must take one argument, the UploadPreview: {error}", see=Page.VALIDATORS
        ) from error
    except ValueError:  # not everything that is written in C has a signature
        return
