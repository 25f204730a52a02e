"""How a draft becomes an object with a receipt, or nothing."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from granite_storage._configuration import Configuration
from granite_storage._identities import Identities
from granite_storage._lifecycle import Lifecycle
from granite_storage._tasks import finish
from granite_storage.backends.base import SupportsCopy
from granite_storage.drafts import ObjectDraft
from granite_storage.exceptions import BackendError
from granite_storage.readers import StoredObjectReader, require_recorded_size
from granite_storage.refs import StoredObjectRef
from granite_storage.streams import (
    BytesLike,
    ByteSource,
    MeasuredStream,
    Pace,
    PacedStream,
    SizeLimitedStream,
    fingerprint,
    require_declared_size,
    require_size,
    size_of,
)

__all__ = ["DraftWriter"]


class DraftWriter:
    """Stores what drafts describe.

    Args:
        configuration: Where.
        lifecycle: Who counts the calls.
        pace: How fast streams must be; None where they may take their time.

    Attributes:
        identities: What is known of the stores' identities.
    """

    def __init__(self, configuration: Configuration, lifecycle: Lifecycle, pace: Pace | None) -> None:
        self.identities: Identities = Identities()
        self._configuration = configuration
        self._lifecycle = lifecycle
        self._pace = pace

    async def put_bytes(self, draft: ObjectDraft, content: BytesLike) -> StoredObjectRef:
        """Store content that is in memory."""
        require_size(size_of(content), draft.policy.max_size)
        with self._lifecycle.call():
            data, checksum = await fingerprint(content)
            with self._configuration.blaming(draft.policy.backend_key) as backend:
                identity = await self.identities.current(draft.policy.backend_key, backend)
                details = await backend.put_bytes(draft.location, data, content_type=draft.content_type)
            return await self._receipt(draft, len(data), checksum, details, identity)

    async def put_stream(
        self, draft: ObjectDraft, stream: ByteSource, size: int | None = None, checksum: str | None = None
    ) -> StoredObjectRef:
        """Store a stream, whose size and checksum are verified where they are declared."""
        if size is not None:
            require_declared_size(size)
            require_size(size, draft.policy.max_size)
        limited = SizeLimitedStream(stream, draft.policy.max_size)
        if self._pace is None:
            async with self._lifecycle.upload():
                return await self._store(draft, MeasuredStream(limited, size=size, checksum=checksum))
        paced = PacedStream(limited, self._pace)
        content = MeasuredStream(paced, size=size, checksum=checksum)
        try:
            async with self._lifecycle.upload(paced.begin):
                return await self._store(draft, content)
        except BaseException:
            await content.aclose()
            raise

    async def copy(
        self, ref: StoredObjectRef, draft: ObjectDraft, open_whole: Callable[[], Awaitable[StoredObjectReader]]
    ) -> StoredObjectRef:
        """Copy an object, on the server where it can; what passes through the program comes from `open_whole`."""
        source = self._configuration.backend(ref.backend)
        require_size(ref.size, draft.policy.max_size)
        if draft.policy.backend_key == ref.backend and isinstance(source, SupportsCopy):
            return await self._copy_in_place(ref, source, draft)
        return await self._copy_through(ref, draft, open_whole)

    async def _store(self, draft: ObjectDraft, content: MeasuredStream) -> StoredObjectRef:
        """Store a stream; nothing is awaited between the object's publication and its receipt, so no cancellation parts them."""
        key = draft.policy.backend_key
        try:
            with self._configuration.blaming(key) as backend:
                identity = await self.identities.current(key, backend)
                details = await backend.put_stream(draft.location, content, content_type=draft.content_type)
        except BaseException:
            await content.aclose()
            raise
        if content.checksum is None:
            await content.aclose()
            await self._withdraw(draft)
            raise BackendError(f"the backend {key!r} returned before the stream had ended", backend=key, location=draft.location)
        return await self._receipt(draft, content.size, content.checksum, details, identity)

    async def _receipt(
        self, draft: ObjectDraft, size: int, checksum: str, details: Mapping[str, Any] | None, identity: str | None
    ) -> StoredObjectRef:
        try:
            return draft.receipt(size, checksum, details, identity)
        except Exception:
            await self._withdraw(draft)
            raise

    async def _withdraw(self, draft: ObjectDraft) -> None:
        """Remove an object that nobody will get a receipt of."""
        backend = self._configuration.backends[draft.policy.backend_key]
        await finish(backend.delete(draft.location), f"deleting the object {draft.location!r}, which has no receipt")

    async def _copy_in_place(self, ref: StoredObjectRef, backend: SupportsCopy, draft: ObjectDraft) -> StoredObjectRef:
        with self._lifecycle.call(), self._configuration.at(ref) as storage:
            require_recorded_size(ref, (await storage.stat(ref.location)).size)
            identity = await self.identities.current(ref.backend, storage)
            details = await backend.copy(ref.location, draft.location)
            return await self._receipt(draft, ref.size, ref.checksum, details, identity)

    async def _copy_through(
        self, ref: StoredObjectRef, draft: ObjectDraft, open_whole: Callable[[], Awaitable[StoredObjectReader]]
    ) -> StoredObjectRef:
        async with self._lifecycle.upload():
            reader = await open_whole()
            try:
                content = MeasuredStream(aiter(reader), size=ref.size, checksum=ref.checksum or None)
                copy = await self._store(draft, content)
            except BaseException:
                await reader.aclose()
                raise
            # Iteration to the end has let go of the handle already.
            return copy
