"""Protocols of what inspects an upload before it is stored: inspectors, scanners and strippers, and their arguments."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from granite_storage.exceptions import ConfigurationError

_LONGEST_TEXT = 200

HEAD_SIZE = 64 * 1024
"""How much of the beginning of an upload is looked at before any of it is stored, in bytes."""

OnMismatch: TypeAlias = Literal["refuse", "correct"]
"""What becomes of an upload whose content contradicts the declared type."""

StripMode: TypeAlias = Literal["location", "all"]
"""What goes out of a picture: what tells where it was taken, or all that is not needed to show it."""

OnUnavailable: TypeAlias = Literal["refuse", "hold", "accept"]
"""What becomes of an upload that the scanner cannot judge."""

OnUnstrippable: TypeAlias = Literal["refuse", "keep"]
"""What becomes of pictures, films and sound out of which no metadata can be taken."""


def require_positive(argument: str, value: object, kinds: type | tuple[type, ...] = int) -> None:
    """Raise `ConfigurationError` if a value is not a positive number."""
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < float("inf"):  # type: ignore[operator]
        raise ConfigurationError(f"{argument} must be a positive number, not {value!r}")


@dataclass(frozen=True, slots=True)
class UploadPreview:
    """The properties of an upload that are known before any of it is stored.

    Attributes:
        storage_key: The policy that it is to be stored under.
        head: Its first bytes, `HEAD_SIZE` of them or all where it has fewer.
        filename: The name that the client gave, cleaned, or None.
        declared_type: The media type that the client or the caller declared, or None.
        content_type: The media type that it will be kept under: found from the content where the policy accepts certain types
            only, otherwise the declared one.
        size: How many bytes it has, where that is known, or was declared, before it is read; None for most streams.
    """

    storage_key: str
    head: bytes
    filename: str | None = None
    declared_type: str | None = None
    content_type: str | None = None
    size: int | None = None


class Inspection(Protocol):
    """The inspection of one upload, chunk by chunk, in a thread."""

    def feed(self, piece: bytes, /) -> bool:
        """Inspect the next chunk, of at most 1 MiB, starting with the head; return whether more is needed.

        Raises:
            ContentRejectedError: The upload is refused; the message is for the client.
        """
        ...

    def finish(self) -> Mapping[str, Any] | None:
        """Return the findings as JSON values for the ref's `media`; called after the last chunk that is needed.

        Raises:
            ContentRejectedError: The upload is refused.
        """
        ...


@runtime_checkable
class Inspector(Protocol):
    """Inspects the content of uploads as they are stored, and may refuse them. It serves several at a time."""

    def begin(self, upload: UploadPreview, /) -> Inspection | None:
        """Return the inspection of this upload, or None if the upload does not concern this inspector. Called in a thread.

        Raises:
            ContentRejectedError: The upload is refused; the message is for the client.
        """
        ...


class HeadInspector:
    """An inspector that is asked before it begins whether a short look at the head is enough, which saves it a thread."""

    def inspect_head(self, upload: UploadPreview, /) -> Mapping[str, Any] | None:
        """Return what was found, as `Inspection.finish` does, where nothing more is needed; None where it begins.

        It runs on the event loop, and looks at a few KiB.

        Raises:
            ContentRejectedError: The upload is refused; the message is for the client.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class ScanResult:
    """The verdict of a scanner.

    Attributes:
        is_clean: Whether nothing was found.
        by: The scanner, such as `clamd 1.4.2`.
        signature: What was found, in the scanner's words; None where nothing was.

    Both texts are kept in rows, so that they are cut at 200 characters and lose what cannot be printed: no database takes a NUL.
    """

    is_clean: bool
    by: str
    signature: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.is_clean, bool):
            raise TypeError(f"is_clean must be True or False, not {self.is_clean!r}")
        if self.is_clean and self.signature is not None:
            raise ValueError(f"a clean result must not have a signature, but this one has {self.signature!r:.80}")
        object.__setattr__(self, "by", _shortened(self.by))
        if self.signature is not None:
            object.__setattr__(self, "signature", _shortened(self.signature))


def _shortened(text: str) -> str:
    return "".join(filter(str.isprintable, text))[:_LONGEST_TEXT]


@runtime_checkable
class Scanner(Protocol):
    """Scans whole uploads for viruses. It serves several at a time."""

    @property
    def on_unavailable(self) -> OnUnavailable:
        """How an upload that it cannot scan is treated: refused, held until it is scanned, or accepted."""
        ...

    async def scan(self, content: AsyncIterator[bytes], /) -> ScanResult:
        """Scan content, in bounded memory and time. A clean verdict counts only if all of the content was read.

        Raises:
            ScannerUnavailableError: It cannot be judged.
        """
        ...


Validator: TypeAlias = Callable[[UploadPreview], Awaitable[object] | object]
"""A function of the application that looks at an upload before any of it is stored, and may refuse it: it raises
`ContentRejectedError`, or ValueError itself, with a message for the client; what it returns must be None. One that is no
coroutine function runs in a thread."""


@dataclass(frozen=True, slots=True)
class Checks:
    """All that a policy requires of an upload.

    Attributes:
        accept: The media types that are accepted, found from the content; None for any, which are then not looked at.
        on_mismatch: Whether a declared type that the content contradicts is refused or corrected.
        inspectors: What looks at the content.
        scanner: What looks for viruses, or None.
        strip: Which metadata is taken out of images; None for none.
        on_unstrippable: Whether pictures, films and sound of other types than those it is taken out of are refused or kept.
        validators: Functions of the application, of the policy and of the column.
    """

    accept: tuple[str, ...] | None = None
    on_mismatch: OnMismatch = "refuse"
    inspectors: tuple[Inspector, ...] = ()
    scanner: Scanner | None = None
    strip: StripMode | None = None
    on_unstrippable: OnUnstrippable = "refuse"
    validators: tuple[Validator, ...] = ()

    @property
    def needs_type(self) -> bool:
        """Whether the type of the content has to be found."""
        return self.accept is not None or bool(self.inspectors) or self.strip is not None

    @property
    def is_only_validation(self) -> bool:
        """Whether only the validators are required."""
        return not self.needs_type and self.scanner is None

    @property
    def validation(self) -> Checks | None:
        """The validators alone, or None if there are none."""
        return Checks(validators=self.validators) if self.validators else None

    def were_passed_by(self, media: Mapping[str, Any] | None, scan: Mapping[str, Any] | None) -> bool:
        """Return whether an object of the same policy has passed all but the validators, by what its ref says."""
        return (not self.needs_type or media is not None) and (self.scanner is None or scan is not None)

    def would_pass(self, media: Mapping[str, Any] | None, scan: Mapping[str, Any] | None) -> bool:
        """Return whether an object of another policy passes, by what its ref says; what cannot be told does not pass."""
        from granite_storage.inspection.media_types import matches  # which the policy has loaded

        found = None if media is None else media.get("type")
        is_accepted = self.accept is None or (isinstance(found, str) and matches(found, self.accept))
        status = None if scan is None else scan.get("status")
        # What waits for a scanner may wait here, too.
        is_scanned = self.scanner is None or status == "clean" or (status == "pending" and self.scanner.on_unavailable == "hold")
        return is_accepted and is_scanned and not self.inspectors and self.strip is None and not self.validators
