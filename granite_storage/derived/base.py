"""What a derived file is made from and by: recipes, their sources and results, as protocols and dataclasses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

from granite_storage._documentation import Page
from granite_storage._tasks import is_async_callable
from granite_storage.exceptions import ConfigurationError
from granite_storage.inspection.base import require_positive
from granite_storage.refs import StoredObjectRef

_UNKNOWN = "application/octet-stream"

When: TypeAlias = Literal["flush", "later", "request"]
"""When a derived file is made: in the flush that stores the original, by the journal's worker, or when it is asked for."""

Missing: TypeAlias = Literal["nothing", "original"]
"""What a reader sees while the derived file is missing."""


@dataclass(frozen=True, slots=True)
class DerivationSource:
    """The original that a file is derived from.

    Attributes:
        ref: The receipt of the original.
        open: Opens it: an async context manager of chunks of bytes, such as `StorageManager.open(ref, verify=True)` returns.
    """

    ref: StoredObjectRef
    open: Callable[[], AbstractAsyncContextManager[AsyncIterable[bytes]]]


@dataclass(frozen=True, slots=True)
class Derivation:
    """A derived file.

    Attributes:
        content: Its bytes, or where there are many, the path of a temporary file that is there while `Recipe.make` is entered.
        content_type: Its media type; a function's result may leave it empty for that of the recipe.
        media: What it is, JSON values for the receipt's `media`: `width`, `height`, `frames`, `placeholder`. None for nothing.
        filename: The name under which it is downloaded, or None.
    """

    content: bytes | Path
    content_type: str = ""
    media: Mapping[str, Any] | None = None
    filename: str | None = None


@runtime_checkable
class Recipe(Protocol):
    """Makes one derived file from an original, always with the same result. It serves several originals at a time.

    One that has a `content_type`, the media type of its files, gives their locations an extension, by which a web server goes.
    """

    @property
    def when(self) -> When:
        """When the file is made."""
        ...

    @property
    def missing(self) -> Missing:
        """The result for readers while the file is missing."""
        ...

    def digest(self, name: str, /) -> str:
        """Return what identifies the recipe under this name of a variant, `sha256:` and 32 hex digits.

        It is the same in every process and on every Python, and another one where anything differs that decides the content:
        then the file is to be made again. `when`, `missing` and the limits are not part of it.
        """
        ...

    def make(self, source: DerivationSource, /) -> AbstractAsyncContextManager[Derivation]:
        """Make the file; its temporary files are removed when the context manager exits.

        Raises:
            DerivationRefusedError: No file can be made of this original; more attempts change nothing.
            DerivationFailedError: It failed, and may be tried again.
            StorageError: The original could not be read.
        """
        ...


@runtime_checkable
class SupportsAccept(Protocol):
    """A recipe for originals of certain media types; it is not called for others, which have no such variant."""

    @property
    def accept(self) -> tuple[str, ...] | None:
        """The media ranges, such as `image/*`; None for originals of all types."""
        ...


@dataclass(frozen=True, slots=True)
class EffectEvent:
    """A file was added to a row, or removed from it.

    Attributes:
        ref: The receipt of the file.
        column: The address of the column, such as `documents.file`.
        key: The primary key of the row, or None where the row is gone.
    """

    ref: StoredObjectRef
    column: str
    key: tuple[Any, ...] | None = None


class EffectHandler(Protocol):
    """Updates another service. It may be called more than once for one event, and must be idempotent."""

    def __call__(self, event: EffectEvent, /) -> Awaitable[object]:
        """Handle the event; an exception is a failed attempt."""
        ...


@dataclass(frozen=True, slots=True)
class Effect:
    """Keeps data in another service in step with files, such as a document in a search index.

    Attributes:
        put: Called after a file has come to a row, once for each row that holds it.
        remove: Called after no row of a column with this effect holds the file any more. Its bytes may be gone by then, unless
            the policy's retention is longer than the queue. It may be called without a `put` before.
        version: Another one lets `granite-storage derive --stale` call `put` again for every row.
        timeout: The longest that a call may take, in seconds; it is cancelled then, and tried again.

    Raises:
        ConfigurationError: A handler is not an async function, nor an object with an async `__call__`, or another argument is
            invalid.
    """

    put: EffectHandler
    remove: EffectHandler
    version: int | str = 1
    timeout: float = 60.0

    def __post_init__(self) -> None:
        for argument in ("put", "remove"):
            if not is_async_callable(handler := getattr(self, argument)):
                found = "a synchronous function" if callable(handler) else "not a function"
                raise ConfigurationError(
                    f"{argument} of an effect must be an async function that takes an EffectEvent, not {handler!r}, which is"
                    f" {found}: declare it with 'async def'",
                    see=Page.EFFECTS,
                )
        if isinstance(self.version, bool) or not isinstance(self.version, int | str):
            raise ConfigurationError(f"the version of an effect must be a number or a string, not {self.version!r}")
        require_positive("the timeout of an effect", self.timeout, (int, float))


def check_accepted_types(accept: object) -> tuple[str, ...] | None:
    """Return the media ranges of a recipe, lower case; None for all types.

    Raises:
        ConfigurationError: They are none, or there are none.
    """
    if accept is None:
        return None
    if accept == ():
        raise ConfigurationError(
            "accept of a recipe must not be empty, because the recipe would never be used: pass None to accept all types"
        )
    from granite_storage.inspection.media_types import check_accept

    return check_accept(accept)


def is_accepted(ref: StoredObjectRef, accept: tuple[str, ...] | None) -> bool:
    """Return whether an original is of one of the media types that a recipe is for.

    What was found in the content counts, otherwise what the client said. An original of which neither says anything is accepted:
    the recipe looks at it.
    """
    if accept is None:
        return True
    from granite_storage.inspection._media_names import canonical
    from granite_storage.inspection.media_types import matches  # which the recipe has loaded

    found = None if ref.media is None else ref.media.get("type")
    if isinstance(found, str):
        return matches(found, accept)
    stated = ref.content_type or _UNKNOWN
    return canonical(stated) == _UNKNOWN or matches(stated, accept)


def make_digest(kind: str, name: str, parameters: Mapping[str, Any]) -> str:
    """Return a digest of JSON values that is the same everywhere."""
    text = json.dumps([kind, name, parameters], sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def require_choice(argument: str, value: object, choices: object) -> None:
    """Raise `ConfigurationError` where a value is none of those that a `Literal` has."""
    if not isinstance(value, str) or value not in get_args(choices):
        allowed = ", ".join(map(repr, get_args(choices)))
        raise ConfigurationError(f"{argument} must be one of {allowed}, not {value!r}")
