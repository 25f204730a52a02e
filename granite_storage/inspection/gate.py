"""The checks of an upload, made in the pass in which it is hashed; what they refuse is never published."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextvars import copy_context
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol, Self

from granite_storage._documentation import Page
from granite_storage._tasks import contained, shielded_cleanup
from granite_storage._threads import ThreadConsumer, ThreadPool
from granite_storage.exceptions import (
    ConfigurationError,
    ContentRejectedError,
    InfectedContentError,
    ScannerUnavailableError,
    UnsupportedContentError,
)
from granite_storage.inspection._media_names import fit_filename, fit_public
from granite_storage.inspection.base import (
    HEAD_SIZE,
    Checks,
    HeadInspector,
    Inspection,
    Inspector,
    Scanner,
    ScanResult,
    StripMode,
    UploadPreview,
    Validator,
)
from granite_storage.inspection.media_types import TAIL_SIZE, Judged, confirm_type, detect, fit_location, judge_type
from granite_storage.inspection.scanning import ScannedContent, judge_outcome
from granite_storage.inspection.stripping import Stripper, can_strip
from granite_storage.refs import ReadOnlyDict, canonical_timestamp, storable

__all__ = ["Gate", "Pieces", "Verdict", "fit_location", "fit_public", "judge_bytes", "validate"]

logger: logging.Logger = logging.getLogger("granite_storage")

_PIECE = 1 << 20
_MOST_PENDING = 1 << 20
_VERDICT_TIMEOUT = 300.0
_OUTCOMES = {"hold": "is held back until it is", "accept": "is accepted all the same"}
_BEARS_LOCATION = ("image/", "video/", "audio/")
_LONGEST_MESSAGE = 500

_threads = ThreadPool("granite-inspect", (os.cpu_count() or 1) + 2)


@dataclass(slots=True)
class Verdict:
    """How an accepted upload is stored.

    Attributes:
        content_type: Its media type.
        filename: Its name, with an extension that fits.
        media: What was found, for the ref.
        scan: What the scanner said, for the ref.
    """

    content_type: str | None
    filename: str | None
    media: Mapping[str, Any] | None = None
    scan: Mapping[str, Any] | None = None


class Pieces(Protocol):
    """Content in pieces of at most 1 MiB."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate the pieces."""
        ...

    def __anext__(self) -> Awaitable[bytes]:
        """Return the next piece."""
        ...

    def aclose(self) -> Awaitable[None]:
        """End the iteration early."""
        ...


class Gate:
    """A stream that is judged while it passes.

    `begin` looks at the head; then the stream is iterated, and ends only once every check has let it in: what publishes at the
    end of the stream never publishes what is refused.

    Args:
        pieces: The content; what they come from is the caller's to close.
        checks: What is asked of it.
        preview: What is known of it; without a head.

    Raises:
        ContentError: From `begin` and from iteration: it is refused.
        ScannerUnavailableError: The scanner cannot judge it, and it is to be refused then.
    """

    def __init__(self, pieces: Pieces, checks: Checks, preview: UploadPreview) -> None:
        self._incoming = pieces
        self._judge = _Judge(checks, preview)
        self._checks = checks
        self._kept: deque[bytes] = deque()
        self._consumer: ThreadConsumer | None = None
        self._scan: _Scan | None = None
        self._passed = self._judged()

    @property
    def verdict(self) -> Verdict:
        """How it is stored; complete once the stream has ended."""
        return self._judge.verdict

    async def begin(self) -> None:
        """Read the head, and make the decisions that depend on it."""
        head = bytearray()
        is_whole = True
        async for piece in self._incoming:
            self._kept.append(piece)
            head += piece[: HEAD_SIZE - len(head)]
            if len(head) == HEAD_SIZE:
                is_whole = False
                break
        await self._judge.look(bytes(head), is_whole=is_whole)
        if not self._judge.inspect_head():
            await _threads.run(self._judge.begin)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        return await self._passed.__anext__()

    async def aclose(self) -> None:
        """Stop the inspection, and close the content; idempotent."""
        try:
            await self._passed.aclose()
        finally:
            await self._incoming.aclose()

    async def _judged(self) -> AsyncGenerator[bytes, None]:
        judge = self._judge
        self._consumer = ThreadConsumer(_threads, judge.feed, max_pending=_MOST_PENDING)
        self._scan = None if self._checks.scanner is None else _Scan(self._checks.scanner)
        try:
            async for piece in self._all():
                judge.note(piece)
                if judge.wants_more:
                    await self._consumer.feed(piece)
                if self._scan is not None:
                    await self._scan.feed(piece)
                if judge.stripper is None:
                    yield piece
                elif stripped := await _threads.run(judge.stripper.feed, piece):
                    yield stripped
            if judge.stripper is not None and (rest := await _threads.run(judge.stripper.finish)):
                yield rest
            await self._consumer.drain()
            await judge.finish()
            if self._scan is not None:
                judge.verdict.scan = await self._scan.verdict()
        finally:
            try:
                await self._consumer.stop()
            finally:
                if self._scan is not None:
                    await self._scan.stop()

    async def _all(self) -> AsyncGenerator[bytes, None]:
        while self._kept:
            yield self._kept.popleft()
        async for piece in self._incoming:
            yield piece


async def judge_bytes(content: bytes | bytearray | memoryview, checks: Checks, preview: UploadPreview) -> tuple[bytes, Verdict]:
    """Judge content in memory; return the bytes to store, and how to store them.

    Raises:
        ContentError: It is refused.
        ScannerUnavailableError: The scanner cannot judge it, and it is to be refused then.
    """
    if not isinstance(content, bytes):
        content = await _threads.run(bytes, content)
    judge = _Judge(checks, preview, size=len(content))
    await judge.look(content[:HEAD_SIZE], is_whole=len(content) <= HEAD_SIZE)
    if judge.notes and len(content) > _PIECE:
        await _threads.run(judge.note, content)
    else:
        judge.note(content)
    judge.confirm()
    if not judge.inspect_head():
        await _threads.run(judge.inspect_whole, content)
    if checks.scanner is not None:
        scan = _Scan(checks.scanner)
        try:
            for start in range(0, len(content), _PIECE):
                await scan.feed(content[start : start + _PIECE])
            judge.verdict.scan = await scan.verdict()
        finally:
            await scan.stop()
    if judge.stripper is not None:
        content = await _threads.run(judge.stripper.strip, content)
    return content, judge.verdict


class _Judge:
    """The decisions about one upload, independent of how its bytes arrive."""

    def __init__(self, checks: Checks, preview: UploadPreview, *, size: int | None = None) -> None:
        self.verdict = Verdict(preview.declared_type, preview.filename)
        self.stripper: Stripper | None = None
        self._checks = checks
        self._preview = preview
        self._size = preview.size if size is None else size
        self._type: str | None = None
        self._unconfirmed: Judged | None = None
        self._tail = b""
        self._is_text = False
        self._waiting: list[Inspector] = []
        self._active: list[Inspection] = []
        self._ended: list[Inspection] = []
        self._found: dict[str, Any] = {}

    @property
    def wants_more(self) -> bool:
        """Whether an inspector needs more of the content."""
        return bool(self._active)

    @property
    def notes(self) -> bool:
        """Whether `note` looks at what it is given."""
        return self._is_text or self._unconfirmed is not None

    async def look(self, head: bytes, *, is_whole: bool) -> None:
        """Make the decisions that depend on the head."""
        if self._checks.needs_type:
            self._find_type(head)
        if self._checks.validators or self._checks.inspectors or self._unconfirmed is not None:  # making one takes microseconds
            self._preview = UploadPreview(
                self._preview.storage_key,
                head,
                self.verdict.filename,
                self._preview.declared_type,
                self.verdict.content_type,
                len(head) if is_whole else self._size,
            )
        await validate(self._checks, self._preview)

    def _find_type(self, head: bytes) -> None:
        checks, preview = self._checks, self._preview
        if checks.accept is None:
            self._type = detect(head).content_type or preview.declared_type
            self.verdict.content_type = preview.declared_type or self._type
        else:
            judged = judge_type(
                head,
                declared=preview.declared_type,
                filename=preview.filename,
                accept=checks.accept,
                on_mismatch=checks.on_mismatch,
            )
            self._is_text = judged.is_text
            self._unconfirmed = judged if judged.needs_tail else None
            self._type = judged.content_type.partition(";")[0]
            self.verdict.content_type = judged.content_type
            self.verdict.filename = fit_filename(preview.filename, judged.content_type)
        if self._type is not None:
            self.verdict.media = ReadOnlyDict({"type": self._type})
        if checks.strip is not None:
            self._choose_stripper(checks.strip)

    def _choose_stripper(self, strip: StripMode) -> None:
        found = self._type or ""
        if can_strip(found):
            self.stripper = Stripper(found, strip)
        elif found.startswith(_BEARS_LOCATION) and self._checks.on_unstrippable == "refuse":
            raise UnsupportedContentError(
                f"metadata cannot be removed from files of the type {found}: send a JPEG, PNG or WebP image",
                found=found,
                declared=self._preview.declared_type,
            )

    def inspect_head(self) -> bool:
        """Ask the inspectors that a short look at the head may be enough for; return whether that was all."""
        if not self._checks.inspectors:
            return True
        if self._type is not None and self._type != self._preview.content_type:
            self._preview = replace(self._preview, content_type=self._type)
        for item in self._checks.inspectors:
            found = item.inspect_head(self._preview) if isinstance(item, HeadInspector) else None
            if found is None:
                self._waiting.append(item)
            else:
                self._found |= found
        if self._found and not self._waiting:  # they are our own, and their numbers need no copy that takes microseconds
            self.verdict.media = ReadOnlyDict({**(self.verdict.media or {}), **self._found})
        return not self._waiting

    def begin(self) -> None:
        """Begin the inspections; in a thread."""
        self._active = [begun for item in self._waiting if (begun := item.begin(self._preview)) is not None]

    def note(self, piece: bytes) -> None:
        """Refuse binary in what is kept as text, and keep the end of what has passed, where that confirms the type."""
        if self._is_text and b"\0" in piece:
            raise UnsupportedContentError(
                "the file begins as text, but continues with binary content",
                found="application/octet-stream",
                declared=self._preview.declared_type,
                accept=self._checks.accept or (),
            )
        if self._unconfirmed is not None:
            self._tail = (self._tail + piece[-TAIL_SIZE:])[-TAIL_SIZE:]

    def feed(self, piece: bytes) -> None:
        """Show the inspectors a piece; in a thread."""
        active: list[Inspection] = []
        for item in self._active:
            (active if _wants_more(item, piece) else self._ended).append(item)
        self._active = active

    def inspect_whole(self, content: bytes) -> None:
        """Show the inspectors all of the content, and keep what they find; in a thread, in one go: content may be small."""
        self.begin()
        for start in range(0, len(content), _PIECE):
            if self._active:
                self.feed(content[start : start + _PIECE])
        self._collect()

    async def finish(self) -> None:
        """Make the decisions that depend on the whole content."""
        self.confirm()
        if self._waiting:
            await _threads.run(self._collect)

    def confirm(self) -> None:
        """Refuse an archive whose end does not confirm its beginning."""
        if self._unconfirmed is not None:
            confirm_type(self._unconfirmed, self._preview.head, self._tail, accept=self._checks.accept or ())

    def _collect(self) -> None:
        found = self._found
        for item in [*self._ended, *self._active]:
            own = item.finish()
            if own is not None and not isinstance(own, Mapping):
                raise TypeError(f"finish() of {item!r} must return a mapping or None, not {type(own).__name__}")
            found |= own or {}
        found.pop("type", None)
        own_type = {} if self._type is None else {"type": self._type}
        self.verdict.media = storable({**own_type, **found}, "what the inspectors found") or None


async def validate(checks: Checks, preview: UploadPreview) -> None:
    """Call the validators, one after the other.

    Raises:
        ContentRejectedError: One of them refuses it.
    """
    for validator in checks.validators:
        await _validate(validator, preview)


async def _validate(validator: Validator, preview: UploadPreview) -> None:
    try:
        with contained("the validator"):
            if inspect.iscoroutinefunction(validator):
                result: object = await validator(preview)
            else:
                result = await _threads.run(copy_context().run, validator, preview)
                if inspect.isawaitable(result):
                    result = await result
    except ValueError as error:
        if type(error) is not ValueError:  # what decoding or parsing raises is a bug of the validator, not a refusal
            raise
        raise ContentRejectedError(str(error)[:_LONGEST_MESSAGE] or "the file is refused") from error
    if result is not None:
        raise ConfigurationError(
            f"the function validate= of the policy {preview.storage_key!r} must return None, and raise ContentRejectedError to"
            f" refuse an upload, but returned {result!r:.80}",
            see=Page.VALIDATORS,
        )


def _wants_more(inspection: Inspection, piece: bytes) -> bool:
    wants_more: object = inspection.feed(piece)
    if not isinstance(wants_more, bool):
        if inspect.iscoroutine(wants_more):
            wants_more.close()
        raise TypeError(f"feed() of {inspection!r} must return True or False, and not be a coroutine function")
    return wants_more


class _Scan:
    """A scan in progress: a task that takes the pieces as fast as the scanner does, and two that wait for it."""

    def __init__(self, scanner: Scanner) -> None:
        self._scanner = scanner
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(2)
        self._content = ScannedContent(self._incoming())
        self._task = asyncio.ensure_future(self._content.show_to(scanner))

    async def feed(self, piece: bytes) -> None:
        """Hand over a piece; wait while two others are queued.

        Raises:
            InfectedContentError: The scanner has found something already.
            ScannerUnavailableError: It has failed already, and the content is to be refused then.
        """
        await self._hand_over(piece)
        if not self._task.done():
            return
        outcome = self._outcome()
        is_refused = not outcome.is_clean if isinstance(outcome, ScanResult) else self._scanner.on_unavailable == "refuse"
        if is_refused:  # `verdict` checks that what is called clean was read to its end
            self._decide(outcome)

    async def verdict(self) -> Mapping[str, Any]:
        """Return the verdict on the whole, for the ref.

        Raises:
            InfectedContentError: The scanner has found something.
            ScannerUnavailableError: It cannot judge the content, which is to be refused then.
        """
        await self._hand_over(None)
        await asyncio.wait([self._task], timeout=_VERDICT_TIMEOUT)
        return self._decide(self._outcome())

    async def stop(self) -> None:
        """End the scan; idempotent."""
        if not self._task.done():
            self._task.cancel()
            await shielded_cleanup(asyncio.wait([self._task]), "ending a scan")

    def _decide(self, outcome: object) -> Mapping[str, Any]:
        try:
            part = judge_outcome(outcome, was_read=self._content.was_read)
        except ScannerUnavailableError as error:
            on_unavailable = self._scanner.on_unavailable
            if on_unavailable == "refuse":
                raise
            logger.warning("an upload was not scanned and %s", _OUTCOMES[on_unavailable], exc_info=error)
            status = "pending" if on_unavailable == "hold" else "failed"
            return {"status": status, "at": canonical_timestamp(datetime.now(UTC))}
        if part["status"] == "infected":
            raise InfectedContentError("a virus scanner has found something in the file", signature=part.get("signature"))
        return part

    def _outcome(self) -> object:
        if not self._task.done() or self._task.cancelled():
            return TimeoutError(f"it was cancelled, or gave no answer for {_VERDICT_TIMEOUT:g} s")
        return self._task.result()

    async def _hand_over(self, piece: bytes | None) -> None:
        """Hand over a piece, or None after the last; abort the scanner if it does not read for too long."""
        if not self._pieces.full():
            self._pieces.put_nowait(piece)
            return
        handed = asyncio.ensure_future(self._pieces.put(piece))
        try:
            await asyncio.wait([handed, self._task], timeout=_VERDICT_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
            if not handed.done():
                await self.stop()
        finally:
            handed.cancel()

    async def _incoming(self) -> AsyncGenerator[bytes, None]:
        while (piece := await self._pieces.get()) is not None:
            yield piece
