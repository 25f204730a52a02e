"""The errors of the library: one family, none of it an `OSError`.

Starlette takes an `OSError` raised while a body is streamed for a client that went away, so a failing disk must not look like
one. The system's or the SDK's own error is always the `__cause__`. Every error pickles, and none carries a secret.

Errors of configuration and usage lead to a page of the documentation. Its address is in a note, which tracebacks show below the
message, and never in the message itself, which may reach a client.
"""

from __future__ import annotations

from typing import ClassVar

from granite_storage._documentation import Page

__all__ = [
    "AccessDeniedError",
    "BackendError",
    "BackendUnavailableError",
    "ChecksumMismatchError",
    "CollectionFullError",
    "CollectionRefusedError",
    "ConfigurationError",
    "ConsumedSourceError",
    "ContentError",
    "ContentRejectedError",
    "ContentTooLargeError",
    "DerivationFailedError",
    "DerivationRefusedError",
    "DerivationUnavailableError",
    "EmptyUploadError",
    "InfectedContentError",
    "InfectedObjectError",
    "InvalidLocationError",
    "InvalidReferenceError",
    "MissingDependencyError",
    "ObjectExistsError",
    "ObjectNotFoundError",
    "ScanPendingError",
    "ScannerUnavailableError",
    "SizeMismatchError",
    "StaleAttachmentError",
    "StorageError",
    "StorageFullError",
    "StreamTimeoutError",
    "UnboundAttachmentError",
    "UnknownBackendError",
    "UnknownPolicyError",
    "UnknownVariantError",
    "UnsupportedContentError",
]


class StorageError(Exception):
    """Base class of every error that this library raises on purpose.

    Attributes:
        docs: The address of the page of the documentation about it, which a traceback shows below the message; None where the
            message says all.
    """

    docs: str | None = None
    _page: ClassVar[Page | None] = None

    def __init__(self, *args: object, see: Page | None = None) -> None:
        super().__init__(*args)
        page = self._page if see is None else see
        if page is not None:
            self.docs = page.url
            self.add_note(f"See {page.url}")


class ConfigurationError(StorageError):
    """The configuration is invalid; raised when it is given, not at the first upload."""


class UnknownPolicyError(ConfigurationError, LookupError):
    """No policy has the given `storage_key`."""

    _page = Page.MANAGER


class UnknownBackendError(ConfigurationError, LookupError):
    """No backend has the given key."""

    _page = Page.MANAGER


class UnknownVariantError(ConfigurationError, KeyError):
    """An attachment column declares no variant of the given name."""

    _page = Page.VARIANTS

    def __str__(self) -> str:
        return Exception.__str__(self)


class MissingDependencyError(ConfigurationError, ImportError):
    """A package of an optional extra is not installed; the message names the extra."""

    _page = Page.EXTRAS


class InvalidLocationError(StorageError, ValueError):
    """A location, or a part of one, is unsafe; no storage was accessed."""

    _page = Page.LOCATIONS


class InvalidReferenceError(StorageError, ValueError):
    """A value is not a `StoredObjectRef`; the message names the invalid field."""

    _page = Page.REFS


class ContentError(StorageError):
    """The content is not what was declared or allowed."""


class ContentTooLargeError(ContentError):
    """The content has more bytes than its policy allows; nothing of it was stored.

    Attributes:
        max_size: The limit, in bytes.
    """

    def __init__(self, message: str = "", *, max_size: int | None = None) -> None:
        super().__init__(message)
        self.max_size = max_size


class ChecksumMismatchError(ContentError):
    """The bytes do not have the expected checksum.

    Attributes:
        expected: The checksum that was declared or recorded, `sha256:<hex>`.
        actual: The checksum of the bytes, `sha256:<hex>`.
    """

    def __init__(self, message: str = "", *, expected: str | None = None, actual: str | None = None) -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual


class SizeMismatchError(ContentError):
    """The number of bytes is not the one that was declared or recorded.

    Attributes:
        expected: The declared or recorded size, in bytes.
        actual: The size found, in bytes; None where counting stopped early.
    """

    def __init__(self, message: str = "", *, expected: int | None = None, actual: int | None = None) -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual


class EmptyUploadError(ContentError):
    """An upload has neither a name nor content, as an empty file input of a form sends it."""


class UnsupportedContentError(ContentError):
    """The type of the content is not accepted by its policy, or is not the declared one; nothing was stored.

    The message is for the client.

    Attributes:
        found: The media type that the content was found to be; None where it is of none that is known.
        declared: The media type that was declared, or None.
        accept: What the policy accepts.
    """

    def __init__(
        self, message: str = "", *, found: str | None = None, declared: str | None = None, accept: tuple[str, ...] = ()
    ) -> None:
        super().__init__(message)
        self.found = found
        self.declared = declared
        self.accept = accept


class ContentRejectedError(ContentError):
    """An inspector or a validator has refused the content; nothing of it was stored.

    Its message is for the client: a `validate=` function raises it with what the client shall read.
    """


class InfectedContentError(ContentError):
    """A virus scanner has found the content infected; nothing of it was stored.

    Attributes:
        signature: What the scanner calls it.
    """

    def __init__(self, message: str = "", *, signature: str | None = None) -> None:
        super().__init__(message)
        self.signature = signature


class CollectionFullError(ContentError):
    """A collection of files would have more files or bytes than it allows; nothing of the flush was kept.

    Attributes:
        max_files: The most files, where there would be too many; None otherwise.
        max_total_size: The most bytes of all files, where there would be too many; None otherwise.
    """

    def __init__(self, message: str = "", *, max_files: int | None = None, max_total_size: int | None = None) -> None:
        super().__init__(message)
        self.max_files = max_files
        self.max_total_size = max_total_size


class DerivationRefusedError(ContentError):
    """A file can never be derived from the original: it is damaged, of another type, or too large when decoded.

    Its message is for the client: a function of the application raises it with what the client shall read.
    """


class DerivationFailedError(StorageError):
    """A file could not be derived from the original; it may be tried again.

    Its process died, ran out of time or memory, or its function raised.
    """


class DerivationUnavailableError(DerivationFailedError):
    """Nothing was attempted: no worker process was free or could be started, or temporary files could not be written."""


class ScanPendingError(StorageError):
    """An object is not served yet, because the virus scanner has not scanned it."""


class InfectedObjectError(StorageError):
    """An object is not served, because a virus scanner found it infected after it was stored."""


class ScannerUnavailableError(StorageError):
    """The virus scanner did not answer, or could not scan the content; the upload was not stored, and may be tried again."""


class StreamTimeoutError(ContentError):
    """A stream yielded nothing for too long, or too few bytes per second; nothing of it was stored."""


class CollectionRefusedError(StorageError):
    """The garbage collector has deleted nothing, because its findings are implausible; the message says why, and what to do.

    Attributes:
        report: The `GarbageCollectionReport` of what was looked at until then, where there is one.
    """

    _page = Page.REFUSED_COLLECTIONS

    def __init__(self, message: str = "", *, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class StaleAttachmentError(StorageError):
    """A row or an object that the transaction depends on has changed meanwhile; the transaction may be tried again."""

    _page = Page.CONCURRENCY


class UnboundAttachmentError(StorageError):
    """An attachment does not know its manager: `bind_storage` was not called for its base."""

    _page = Page.BINDING


class ConsumedSourceError(StorageError):
    """A stream was already read and cannot be read a second time."""

    _page = Page.STREAMS


class BackendError(StorageError):
    """An operation of a backend failed.

    Attributes:
        backend: The backend's key in the manager, where one is known.
        location: The object's address inside the backend, where the call had one.
    """

    def __init__(self, message: str = "", *, backend: str | None = None, location: str | None = None) -> None:
        super().__init__(message)
        self.backend = backend
        self.location = location


class ObjectNotFoundError(BackendError):
    """No object exists at the location."""


class ObjectExistsError(BackendError):
    """An object already exists at the location; it was not changed."""


class AccessDeniedError(BackendError):
    """The backend refused permission; never reported as "not found"."""


class StorageFullError(BackendError):
    """The backend is full; nothing of the write was stored."""


class BackendUnavailableError(BackendError):
    """The backend cannot be reached or is overloaded; the operation may be tried again."""
