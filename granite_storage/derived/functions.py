"""Derived files that a function of the application makes: text, pages, stills."""

from __future__ import annotations

import asyncio
import inspect
import os
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from granite_storage._documentation import Page
from granite_storage._tasks import UnexpectedExitError, contained
from granite_storage.derived.base import (
    Derivation,
    DerivationSource,
    Missing,
    When,
    check_accepted_types,
    make_digest,
    require_choice,
)
from granite_storage.derived.processes import MIB, Limits, run_in_process
from granite_storage.exceptions import ConfigurationError, DerivationFailedError, StorageError

Function: TypeAlias = (
    Callable[[BinaryIO], bytes | str | Derivation] | Callable[[DerivationSource], Awaitable[bytes | str | Derivation]]
)

_MOST_MESSAGE = 4000


class Derived:
    """A derived file that a function makes from the original.

    A plain function gets the original as a binary file, whose `name` is a path, and runs in a worker process within limits. It
    must be importable there. A coroutine function gets a `DerivationSource` and runs on the event loop: it is for services that
    do the work elsewhere, and must not decode anything itself; of the limits it has `timeout` and `max_size`.

    Both return bytes, text, or a `Derivation` with what the receipt shall say. They raise `DerivationRefusedError` where no file
    can be made of this original; any other error is a failure that is tried again.

    Args:
        function: The function. Its module and name are part of the recipe's digest, its code is not.
        content_type: The media type of the file.
        when: When it is made: `flush`, `later` or `request`.
        accept: The media types of the originals that the function is for, such as `("application/pdf",)`; those of other types
            have no such variant, and one of unknown type is shown to the function. None for all.
        version: Another number or text makes all files again: change it with the function's code.
        timeout: The longest that it may take, in seconds, and in a process the most processor time.
        max_memory: The most private memory of its process, in bytes. One that needs more fails and is not a refusal: the limit is
            the application's, not the file's, and may be raised.
        max_source: The largest original, in bytes; a larger one is refused.
        max_size: The largest result, in bytes, and the largest file that the function may write.
        missing: What a reader sees while the file is missing: `nothing` or `original`.
        filename: The name under which it is downloaded.

    Raises:
        ConfigurationError: An argument is wrong, or a process could not import the function.

    Example:
        >>> from json import load
        >>> Derived(load, content_type="application/json", when="later")
        Derived(json:load, content_type='application/json', when='later', version=1)
    """

    def __init__(
        self,
        function: Function,
        *,
        content_type: str,
        when: When = "flush",
        accept: tuple[str, ...] | None = None,
        version: int | str = 1,
        timeout: float = 60.0,
        max_memory: int = 1024 * MIB,
        max_source: int = 256 * MIB,
        max_size: int = 64 * MIB,
        missing: Missing = "nothing",
        filename: str | None = None,
    ) -> None:
        require_choice("when", when, When)
        require_choice("missing", missing, Missing)
        if not isinstance(content_type, str) or "/" not in content_type:
            raise ConfigurationError(f"content_type must be a media type, not {content_type!r}")
        self.function = function
        self.identity: str = _identify(function)
        self.content_type = content_type
        self.when: When = when
        self.accept: tuple[str, ...] | None = check_accepted_types(accept)
        self.version = version
        self.missing: Missing = missing
        self.filename = filename
        self._limits = Limits(timeout, max_memory, max_source, max_size)

    def __repr__(self) -> str:
        return f"Derived({self.identity}, content_type={self.content_type!r}, when={self.when!r}, version={self.version!r})"

    def digest(self, name: str, /) -> str:
        """Return what identifies the recipe under this name of a variant."""
        parameters = {"content_type": self.content_type, "version": self.version, "filename": self.filename}
        return make_digest("function", name, {"function": self.identity, **parameters})

    @asynccontextmanager
    async def make(self, source: DerivationSource, /) -> AsyncIterator[Derivation]:
        """Make the file; see `Recipe.make`."""
        if inspect.iscoroutinefunction(self.function):
            yield self._complete(await self._await(source))
            return
        async with run_in_process(self.identity, {}, source, self._limits) as made:
            yield self._complete(made)

    def _complete(self, made: Derivation) -> Derivation:
        return replace(made, content_type=made.content_type or self.content_type, filename=made.filename or self.filename)

    async def _await(self, source: DerivationSource) -> Derivation:
        function: Any = self.function
        limits, limit = self._limits, asyncio.timeout(self._limits.timeout)
        try:
            with contained(self.identity):
                async with limit:
                    value = await function(source)
        except StorageError:
            raise
        except UnexpectedExitError as error:
            raise DerivationFailedError(f"the derivation failed: {error}") from error
        except Exception as error:  # its message may have the secrets of the service that it calls
            what = f"took longer than {limits.timeout:g} s" if limit.expired() else f"raised {type(error).__name__}"
            raise DerivationFailedError(f"the derivation failed: {self.identity} {what}") from error
        try:
            made, size = await _measure(value)
        except (TypeError, ValueError, OSError) as error:
            said = traceback.format_exception_only(error)[-1].strip()[:_MOST_MESSAGE]  # as a worker process says it
            raise DerivationFailedError(f"the derivation failed: {self.identity} raised {said}") from error
        if size > limits.max_size:
            raise DerivationFailedError(f"the derivation failed: its result has {size} bytes, more than {limits.max_size}")
        return made


async def _measure(value: object) -> tuple[Derivation, int]:
    """Return what a coroutine function has returned as a derivation, with its size; raise as a worker process does."""
    if inspect.iscoroutine(value):
        value.close()
    made = value if isinstance(value, Derivation) else Derivation(b"")
    content: object = made.content if isinstance(value, Derivation) else value
    if isinstance(content, Path):
        return made, await asyncio.to_thread(_size_of, content)
    if not isinstance(content, bytes | bytearray | memoryview | str):
        raise TypeError(f"it must return bytes, text or a Derivation, not {type(content).__name__}")
    data = content.encode() if isinstance(content, str) else bytes(content)
    return replace(made, content=data), len(data)


def _size_of(path: Path) -> int:
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size


def _identify(function: Any) -> str:
    """Return `module:qualname` of a function that another process can import."""
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not callable(function) or not module or not qualname or inspect.ismethod(function):
        problem = "it is not a plain function"
    elif "<" in qualname:
        problem = "it is a lambda or is defined inside another function"
    elif module == "__main__" and not inspect.iscoroutinefunction(function):
        problem = "it is defined in the program that runs, which a worker process does not import"
    else:
        return f"{module}:{qualname}"
    raise ConfigurationError(
        f"a worker process cannot import {function!r:.80}: {problem}; define it at the top level of a module",
        see=Page.DERIVED_FUNCTIONS,
    )
