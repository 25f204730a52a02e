"""The scan of an object that is stored already: one that was held back, or one that is to be judged again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

from granite_storage.exceptions import ScannerUnavailableError
from granite_storage.inspection.base import Scanner, ScanResult
from granite_storage.refs import canonical_timestamp

__all__ = ["scan_stored"]

_LONGEST_SCAN = 3600.0


async def scan_stored(scanner: Scanner, content: AsyncIterator[bytes]) -> Mapping[str, Any]:
    """Return what a scanner says of the whole of a stored object, for the ref's `scan`.

    Args:
        scanner: The scanner.
        content: The object, in pieces of at most 1 MiB; its error passes through.

    Raises:
        ScannerUnavailableError: The scanner cannot judge it, failed, took longer than an hour, or called it clean before it had
            read all of it.
    """
    source = _Source(content)
    try:
        async with asyncio.timeout(_LONGEST_SCAN), aclosing(source.pieces()) as pieces:
            result: object = await scanner.scan(pieces)
    except ScannerUnavailableError:
        source.require_sound()
        raise
    except Exception as error:
        source.require_sound()
        problem = f"no verdict came within {_LONGEST_SCAN:g} s" if isinstance(error, TimeoutError) else f"it failed: {error}"
        raise ScannerUnavailableError(f"the scanner has not judged the object: {problem}") from error
    source.require_sound()
    if not isinstance(result, ScanResult):
        raise ScannerUnavailableError(f"scan() must return a ScanResult, not {type(result).__name__}")
    found = {"by": result.by, "at": canonical_timestamp(datetime.now(UTC))}
    if not result.is_clean:
        return {"status": "infected", **({} if result.signature is None else {"signature": result.signature}), **found}
    if not source.was_read:
        raise ScannerUnavailableError("the scanner called the object clean before it had read all of it")
    return {"status": "clean", **found}


class _Source:
    """The pieces of an object on their way to a scanner, which may hide the error of their source, or not read all of them."""

    def __init__(self, content: AsyncIterator[bytes]) -> None:
        self._content = content
        self._error: Exception | None = None
        self.was_read = False

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        try:
            async for piece in self._content:
                yield piece
        except Exception as error:
            self._error = error
            raise
        self.was_read = True

    def require_sound(self) -> None:
        """Raise what the source has raised."""
        if self._error is not None:
            raise self._error
