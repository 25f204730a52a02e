"""Verdicts of scanners, and scans of objects that are already stored."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

from granite_storage._tasks import contained
from granite_storage.exceptions import ScannerUnavailableError
from granite_storage.inspection.base import Scanner, ScanResult
from granite_storage.refs import canonical_timestamp

_LONGEST_SCAN = 3600.0


async def scan_stored(scanner: Scanner, content: AsyncIterator[bytes]) -> Mapping[str, Any]:
    """Scan a stored object, and return the verdict for the ref's `scan`.

    Args:
        scanner: The scanner.
        content: The object, in pieces of at most 1 MiB; its error passes through.

    Raises:
        ScannerUnavailableError: The scanner cannot judge it, failed, took longer than an hour, or called it clean before it had
            read all of it.
    """
    scanned = ScannedContent(content)
    try:
        async with asyncio.timeout(_LONGEST_SCAN):
            outcome = await scanned.show_to(scanner)
    except TimeoutError:
        outcome = TimeoutError(f"no verdict came within {_LONGEST_SCAN:g} s")
    if scanned.error is not None:
        raise scanned.error
    return judge_outcome(outcome, was_read=scanned.was_read)


def judge_outcome(outcome: object, *, was_read: bool) -> Mapping[str, Any]:
    """Return the verdict on scanned content, clean or infected, for the ref's `scan`.

    Args:
        outcome: What the scanner returned, or the error that it raised.
        was_read: Whether it has read all of the content.

    Raises:
        ScannerUnavailableError: It has not judged the whole of the content.
    """
    if isinstance(outcome, ScannerUnavailableError):
        raise outcome
    if isinstance(outcome, Exception):
        raise ScannerUnavailableError(f"the scanner failed: {outcome}") from outcome
    if not isinstance(outcome, ScanResult):
        raise ScannerUnavailableError(f"the scanner failed: scan() must return a ScanResult, not {outcome!r:.80}")
    found = {"by": outcome.by, "at": canonical_timestamp(datetime.now(UTC))}
    if not outcome.is_clean:
        return {"status": "infected", **({} if outcome.signature is None else {"signature": outcome.signature}), **found}
    if not was_read:
        raise ScannerUnavailableError("the scanner called the content clean before it had read all of it")
    return {"status": "clean", **found}


class ScannedContent:
    """Content on its way to a scanner, which may hide the error of its source, or not read all of it.

    Attributes:
        error: What the source has raised.
        was_read: Whether the scanner has read all of it.
    """

    def __init__(self, content: AsyncIterator[bytes]) -> None:
        self.error: Exception | None = None
        self.was_read: bool = False
        self._content = content

    async def show_to(self, scanner: Scanner) -> object:
        """Return what the scanner returns, or the error that it raises."""
        try:
            async with aclosing(self._pieces()) as pieces:
                with contained("the scanner"):
                    return await scanner.scan(pieces)
        except Exception as error:  # noqa: BLE001  # whatever fails in a scanner of others, it has not judged
            return error

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        try:
            async for piece in self._content:
                yield piece
        except Exception as error:
            self.error = error
            raise
        self.was_read = True
