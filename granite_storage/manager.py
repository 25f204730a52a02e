"""The manager: what the application talks to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Self

from granite_storage._concurrency import finish
from granite_storage._lifecycle import Lifecycle
from granite_storage.backends.base import ObjectInfo, ObjectReader, StorageBackend, SupportsAbort, SupportsCopy
from granite_storage.exceptions import (
    BackendError,
    ConfigurationError,
    InvalidReferenceError,
    UnknownBackendError,
    UnknownPolicyError,
)
from granite_storage.locations import check_location, clean_filename, make_location
from granite_storage.policies import StoragePolicy
from granite_storage.readers import OpeningReader, StoredObjectReader, require_recorded_size
from granite_storage.refs import ReadOnlyDict, StoredObjectRef, canonical_timestamp, read_only
from granite_storage.streams import (
    BytesLike,
    ByteSource,
    MeasuredStream,
    SizeLimitedStream,
    fingerprint,
    require_declared_size,
    require_size,
    size_of,
)

__all__ = ["ObjectDraft", "StorageManager"]

_LONGEST_CONTENT_TYPE = 255


class StorageManager:
    """Stores objects under named policies and reads them back by their refs.

    Writes go where the policy says; reads, deletes and checks go where the ref says. A policy that is pointed at another backend
    therefore loses nothing that was stored before.

    The manager opens nothing when it is made, so it may be made at import time. It serves any number of tasks, and several event
    loops, with clients of their own for each. `async with manager:` or `aclose` closes what was opened; it may be entered again.

    Args:
        backends: The backends by their keys. The manager closes them.
        policies: The policies by their storage keys.
        drain_timeout: How long `aclose` waits for calls under way before it cancels them, in seconds.
        max_concurrent_uploads: How many streams are stored at a time on one event loop, which bounds the memory that any number
            of them takes; others wait before their first byte is read. None for any number.

    Raises:
        ConfigurationError: The configuration cannot work: a policy names a backend that is not there (`UnknownBackendError`) or
            stands under a key that is not its own, or something is not a backend or a policy.

    Example:
        >>> from granite_storage.backends.memory import MemoryStorageBackend
        >>> manager = StorageManager(
        ...     backends={"memory": MemoryStorageBackend()},
        ...     policies={"avatars": StoragePolicy("avatars", "memory", max_size=1024)},
        ... )
        >>> sorted(manager.policies)
        ['avatars']
    """

    def __init__(
        self,
        *,
        backends: Mapping[str, StorageBackend],
        policies: Mapping[str, StoragePolicy],
        drain_timeout: float = 30.0,
        max_concurrent_uploads: int | None = None,
    ) -> None:
        _require_mapping("backends", backends)
        _require_mapping("policies", policies)
        for key, backend in backends.items():
            _require_backend(key, backend)
        for key, policy in policies.items():
            _require_policy(key, policy, backends)
        _require_seconds("drain_timeout", drain_timeout)
        if max_concurrent_uploads is not None:
            _require_positive("max_concurrent_uploads", max_concurrent_uploads)
        self._backends = dict(backends)
        self._policies = dict(policies)
        self._drain_timeout = drain_timeout
        self._lifecycle = Lifecycle(max_concurrent_uploads)

    @property
    def backends(self) -> Mapping[str, StorageBackend]:
        """The backends by their keys, read-only."""
        return MappingProxyType(self._backends)

    @property
    def policies(self) -> Mapping[str, StoragePolicy]:
        """The policies by their storage keys, read-only."""
        return MappingProxyType(self._policies)

    def policy(self, storage_key: str) -> StoragePolicy:
        """Return a policy; `UnknownPolicyError` where there is none of that key."""
        try:
            return self._policies[storage_key]
        except (KeyError, TypeError):
            known = ", ".join(sorted(self._policies)) or "none"
            raise UnknownPolicyError(f"no policy has the storage key {storage_key!r} (there are: {known})") from None

    def backend(self, backend_key: str) -> StorageBackend:
        """Return a backend; `UnknownBackendError` where there is none of that key."""
        try:
            return self._backends[backend_key]
        except (KeyError, TypeError):
            known = ", ".join(sorted(self._backends)) or "none"
            raise UnknownBackendError(f"no backend has the key {backend_key!r} (there are: {known})") from None

    async def put_bytes(
        self,
        *,
        storage_key: str,
        model_name: str,
        entity_id: str,
        field_name: str,
        content: BytesLike,
        content_type: str | None = None,
        original_filename: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> StoredObjectRef:
        """Store content that is in memory.

        When it returns, the object is stored as durably as its backend promises. When it raises or is cancelled, nothing of it
        is left. An object is never overwritten: every call makes a new one.

        Args:
            storage_key: The policy to store it under.
            model_name: What kind of thing owns it, such as `user`; a segment of its location, like the next two.
            entity_id: Which of them, such as a primary key.
            field_name: Which of its files, such as `avatar`.
            content: The bytes; changing the buffer during the call is the caller's mistake.
            content_type: Its media type, kept as given.
            original_filename: The name that the visitor gave; made safe, never trusted.
            extra: Keys of your own to keep in the ref, JSON values; the backend's own keys win.

        Returns:
            The receipt.

        Raises:
            UnknownPolicyError: No policy has this storage key.
            InvalidLocationError: `model_name`, `entity_id` or `field_name` is not safe.
            InvalidReferenceError: `content_type` or `extra` cannot be kept.
            ContentTooLargeError: It is larger than the policy allows.
            BackendError: The backend could not store it.
        """
        if not isinstance(content, bytes | bytearray | memoryview):
            raise TypeError(f"content must be bytes, not {type(content).__name__}; use put_stream for a stream")
        draft = self.draft(
            storage_key=storage_key,
            model_name=model_name,
            entity_id=entity_id,
            field_name=field_name,
            content_type=content_type,
            original_filename=original_filename,
            extra=extra,
        )
        return await self.put_draft(draft, content)

    async def put_stream(
        self,
        *,
        storage_key: str,
        model_name: str,
        entity_id: str,
        field_name: str,
        stream: ByteSource,
        content_type: str | None = None,
        original_filename: str | None = None,
        extra: Mapping[str, Any] | None = None,
        size: int | None = None,
        checksum: str | None = None,
    ) -> StoredObjectRef:
        """Store a stream, in bounded memory.

        The limit is enforced chunk by chunk: no byte over it reaches the backend. When the call returns, the object is stored as
        durably as its backend promises; when it raises or is cancelled, nothing of it is left.

        Args:
            storage_key: The policy to store it under.
            model_name: What kind of thing owns it, such as `lesson`; a segment of its location, like the next two.
            entity_id: Which of them, such as a primary key.
            field_name: Which of its files, such as `video`.
            stream: A binary file object (read in a thread), an object with an async `read`, an async iterable or an iterable of
                bytes. It is read from where it stands to its end, and never closed; that is the caller's.
            content_type: Its media type, kept as given.
            original_filename: The name that the visitor gave; made safe, never trusted.
            extra: Keys of your own to keep in the ref, JSON values; the backend's own keys win.
            size: The size in bytes, where the caller knows it; verified, and refused before the first byte if too large.
            checksum: `sha256:<hex>`, where the caller knows it; verified before the object is published.

        Returns:
            The receipt.

        Raises:
            UnknownPolicyError: No policy has this storage key.
            InvalidLocationError: `model_name`, `entity_id` or `field_name` is not safe.
            InvalidReferenceError: `content_type`, `extra` or `checksum` cannot be kept.
            ContentTooLargeError: The stream has more bytes than the policy allows.
            SizeMismatchError: It has not the declared size.
            ChecksumMismatchError: It has not the declared checksum.
            TypeError: It is not a stream of bytes.
            BackendError: The backend could not store it. An error that the stream itself raises passes through unchanged.
        """
        draft = self.draft(
            storage_key=storage_key,
            model_name=model_name,
            entity_id=entity_id,
            field_name=field_name,
            content_type=content_type,
            original_filename=original_filename,
            extra=extra,
        )
        return await self._put_stream(draft, stream, size, checksum)

    def draft(
        self,
        *,
        storage_key: str,
        model_name: str,
        entity_id: str,
        field_name: str,
        content_type: str | None = None,
        original_filename: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> ObjectDraft:
        """Decide where an object will be, and all else of its receipt that does not depend on its bytes.

        It is for what must know the location before there is anything at it, such as a journal; `put_bytes` and `put_stream` do
        both steps. Nothing is stored, and a draft is good for one object. Arguments and errors are those of `put_bytes`.
        """
        policy = self.policy(storage_key)
        _require_content_type(content_type)
        filename = clean_filename(original_filename)
        location = make_location(
            key_prefix=policy.key_prefix,
            model_name=model_name,
            entity_id=entity_id,
            field_name=field_name,
            original_filename=filename,
        )
        return ObjectDraft(policy, location, content_type, filename, None if extra is None else read_only(extra, "extra"))

    async def put_draft(self, draft: ObjectDraft, content: BytesLike | ByteSource) -> StoredObjectRef:
        """Store the content of a draft: bytes as `put_bytes` does, a stream as `put_stream` does, with their errors."""
        if not isinstance(content, bytes | bytearray | memoryview):
            return await self._put_stream(draft, content)
        require_size(size_of(content), draft.policy.max_size)
        with self._lifecycle.call():
            data, checksum = await fingerprint(content)
            with self._blaming(draft.policy.backend_key) as backend:
                details = await backend.put_bytes(draft.location, data, content_type=draft.content_type)
            return await self._receipt(draft, len(data), checksum, details)

    async def get(self, ref: StoredObjectRef) -> bytes:
        """Return all bytes of an object, verified: wrong bytes are never returned.

        Only for objects that fit in memory; `open` streams.

        Raises:
            ObjectNotFoundError: The object is not there.
            SizeMismatchError: It has not the size that the ref says.
            ChecksumMismatchError: It has not the checksum that the ref says.
            BackendError: It could not be read.
        """
        with self._lifecycle.call():
            async with self.open(ref, verify=True) as reader:
                return await reader.read()

    def open(self, ref: StoredObjectRef, *, offset: int = 0, length: int | None = None, verify: bool = False) -> OpeningReader:
        """Open an object, or a range of one, for streaming: `async with manager.open(ref)` or `await manager.open(ref)`.

        Args:
            ref: What to open.
            offset: Where the range begins, in bytes; what lies before it is not read.
            length: How long the range is, in bytes, cut at the end of the object; None for all that is left.
            verify: Whether to check the bytes as they pass: the reader then reads once, from start to end, and raises
                `ChecksumMismatchError` in place of the last bytes of a wrong body.

        Returns:
            Something to await or to enter; either gives a `StoredObjectReader`. An awaited one is the caller's to close.

        Raises:
            ObjectNotFoundError: The object is not there.
            SizeMismatchError: It has not the size that the ref says.
            ValueError: The range is negative or begins past the end, or a range is to be verified.
            BackendError: It could not be opened.
        """

        async def open_range(start: int, count: int) -> ObjectReader:
            with self._lifecycle.call(), self._at(ref) as backend:
                return await backend.open(ref.location, offset=start, length=count)

        async def start() -> StoredObjectReader:
            _require_ref(ref)
            with self._lifecycle.call():
                reader = await StoredObjectReader(ref, open_range, offset=offset, length=length, verify=verify).start()
                self._lifecycle.track(reader)
            return reader

        return OpeningReader(start)

    async def exists(self, ref: StoredObjectRef) -> bool:
        """Tell whether the object is there; a backend that refuses permission or is out of reach raises, it is not False."""
        with self._lifecycle.call(), self._at(ref) as backend:
            return await backend.exists(ref.location)

    async def stat(self, ref: StoredObjectRef) -> ObjectInfo:
        """Return what the backend knows of the object; `ObjectNotFoundError` where it is not there."""
        with self._lifecycle.call(), self._at(ref) as backend:
            return await backend.stat(ref.location)

    async def delete(self, ref: StoredObjectRef) -> None:
        """Remove the object, for good; one that is not there is no error."""
        with self._lifecycle.call(), self._at(ref) as backend:
            await backend.delete(ref.location)

    async def reclaim(self, backend_key: str, location: str, *, upload_id: str | None = None, unfinished: bool = False) -> None:
        """Remove what is at a location that no ref leads to: a journal's work, not an application's.

        Args:
            backend_key: The backend's key.
            location: The address.
            upload_id: The id of an upload in parts that was begun there, where one is known.
            unfinished: Whether an upload may have been cut off; what it has left is removed too, until nothing of it remains.

        Raises:
            BackendError: Something could not be removed; it may be tried again.
        """
        check_location(location)
        with self._lifecycle.call(), self._blaming(backend_key) as backend:
            await backend.delete(location)
            if unfinished and isinstance(backend, SupportsAbort):
                await backend.abort_upload(location, upload_id)

    async def copy(
        self,
        ref: StoredObjectRef,
        *,
        model_name: str,
        entity_id: str,
        field_name: str,
        storage_key: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> StoredObjectRef:
        """Copy an object to a new one of its own, on the server where source and target share a backend that can.

        Name, media type, checksum and the caller's own `extra` keys come along. Otherwise as `put_stream`; bytes that pass
        through the program are verified against the ref on their way.

        Args:
            ref: What to copy.
            model_name: What kind of thing owns the copy.
            entity_id: Which of them.
            field_name: Which of its files.
            storage_key: The policy of the copy; None for that of the ref.
            extra: Keys to keep in the new ref; None for those of the ref.

        Returns:
            The receipt of the copy.

        Raises:
            ObjectNotFoundError: The object is not there.
            SizeMismatchError: It has not the size that the ref says; nothing is kept of the copy.
            ContentTooLargeError: It is larger than the copy's policy allows.
            BackendError: It could not be copied.
        """
        draft = self.draft_copy(
            ref, storage_key=storage_key, model_name=model_name, entity_id=entity_id, field_name=field_name, extra=extra
        )
        return await self.copy_draft(ref, draft)

    def draft_copy(
        self,
        ref: StoredObjectRef,
        *,
        model_name: str,
        entity_id: str,
        field_name: str,
        storage_key: str | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> ObjectDraft:
        """Decide where the copy of an object will be; the first step of `copy`, as `draft` is of `put_bytes`."""
        with self._lifecycle.call(), self._at(ref) as source:
            own_keys = _own_keys(source)
        if extra is None:
            extra = {key: value for key, value in (ref.extra or {}).items() if key not in own_keys}
        return self.draft(
            storage_key=storage_key or ref.storage_key,
            model_name=model_name,
            entity_id=entity_id,
            field_name=field_name,
            content_type=ref.content_type,
            original_filename=ref.original_filename,
            extra=extra,
        )

    async def copy_draft(self, ref: StoredObjectRef, draft: ObjectDraft) -> StoredObjectRef:
        """Copy an object to where a draft says; the second step of `copy`, with its errors."""
        source = self.backend(ref.backend)
        require_size(ref.size, draft.policy.max_size)
        if draft.policy.backend_key == ref.backend and isinstance(source, SupportsCopy):
            return await self._copy_in_place(ref, source, draft)
        return await self._copy_through(ref, draft)

    async def aclose(self) -> None:
        """Close what this event loop has opened; idempotent.

        New calls are refused at once. Calls under way have `drain_timeout` to end; then they are cancelled, and leave nothing
        behind. Readers that are still open are closed. When it is cancelled itself, it cancels the calls at once, and closes
        everything all the same.
        """
        await self._lifecycle.close(self._drain_timeout, self._close_backends)

    async def _close_backends(self) -> None:
        for key, backend in self._backends.items():
            await finish(backend.aclose(), f"closing the backend {key!r}")

    async def __aenter__(self) -> Self:
        await self._lifecycle.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<StorageManager policies={sorted(self._policies)} backends={sorted(self._backends)}>"

    async def _put_stream(
        self, draft: ObjectDraft, stream: ByteSource, size: int | None = None, checksum: str | None = None
    ) -> StoredObjectRef:
        if size is not None:
            require_declared_size(size)
            require_size(size, draft.policy.max_size)
        content = MeasuredStream(SizeLimitedStream(stream, draft.policy.max_size), size=size, checksum=checksum)
        async with self._lifecycle.upload():
            return await self._store(draft, content)

    async def _store(self, draft: ObjectDraft, content: MeasuredStream) -> StoredObjectRef:
        """Store a stream; nothing is awaited between the object's publication and its receipt, so no cancellation parts them."""
        key = draft.policy.backend_key
        try:
            with self._blaming(key) as backend:
                details = await backend.put_stream(draft.location, content, content_type=draft.content_type)
        except BaseException:
            await content.aclose()
            raise
        if content.checksum is None:
            await content.aclose()
            await self._withdraw(draft)
            raise BackendError(f"the backend {key!r} returned before the stream had ended", backend=key, location=draft.location)
        return await self._receipt(draft, content.size, content.checksum, details)

    async def _receipt(self, draft: ObjectDraft, size: int, checksum: str, details: Mapping[str, Any] | None) -> StoredObjectRef:
        try:
            return draft.receipt(size, checksum, details)
        except Exception:
            await self._withdraw(draft)
            raise

    async def _withdraw(self, draft: ObjectDraft) -> None:
        """Remove an object that nobody will get a receipt of."""
        backend = self._backends[draft.policy.backend_key]
        await finish(backend.delete(draft.location), f"deleting the object {draft.location!r}, which has no receipt")

    async def _copy_in_place(self, ref: StoredObjectRef, backend: SupportsCopy, draft: ObjectDraft) -> StoredObjectRef:
        with self._lifecycle.call(), self._at(ref) as storage:
            require_recorded_size(ref, (await storage.stat(ref.location)).size)
            details = await backend.copy(ref.location, draft.location)
            return await self._receipt(draft, ref.size, ref.checksum, details)

    async def _copy_through(self, ref: StoredObjectRef, draft: ObjectDraft) -> StoredObjectRef:
        async with self._lifecycle.upload():
            reader = await self.open(ref)
            try:
                content = MeasuredStream(aiter(reader), size=ref.size, checksum=ref.checksum or None)
                copy = await self._store(draft, content)
            except BaseException:
                await reader.aclose()
                raise
            # Iteration to the end has let go of the handle already.
            return copy

    @contextmanager
    def _at(self, ref: StoredObjectRef) -> Iterator[StorageBackend]:
        _require_ref(ref)
        check_location(ref.location)
        with self._blaming(ref.backend) as backend:
            yield backend

    @contextmanager
    def _blaming(self, backend_key: str) -> Iterator[StorageBackend]:
        """Give the backend, and put its key on the errors it raises: a backend does not know what it is called."""
        backend = self.backend(backend_key)
        try:
            yield backend
        except BackendError as error:
            error.backend = error.backend or backend_key
            raise


@dataclass(frozen=True, slots=True)
class ObjectDraft:
    """What is known of an object before its bytes are stored.

    Attributes:
        policy: The policy that it is stored under.
        location: Where it will be.
        content_type: Its media type.
        original_filename: Its name, cleaned.
        extra: The caller's own keys.
    """

    policy: StoragePolicy
    location: str
    content_type: str | None
    original_filename: str | None
    extra: ReadOnlyDict | None

    def receipt(self, size: int, checksum: str, details: Mapping[str, Any] | None) -> StoredObjectRef:
        """Return the ref of the object, now that its bytes are known; `details` are the backend's own keys."""
        extra = {**(self.extra or {}), **(details or {})}
        return StoredObjectRef(
            storage_key=self.policy.storage_key,
            backend=self.policy.backend_key,
            location=self.location,
            size=size,
            checksum=checksum,
            content_type=self.content_type,
            original_filename=self.original_filename,
            created_at=canonical_timestamp(datetime.now(UTC)),
            extra=extra or None,
        )


def _require_mapping(argument: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{argument} must be a mapping by key, not a {type(value).__name__}")


def _require_seconds(argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ConfigurationError(f"{argument} must be a number of seconds, not {value!r}")


def _require_positive(argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{argument} must be a number of at least 1, or None, not {value!r}")


def _require_backend(key: object, backend: object) -> None:
    if not isinstance(key, str) or not key:
        raise ConfigurationError(f"a backend's key must be a string that is not empty, not {key!r}")
    if isinstance(backend, type):
        raise ConfigurationError(f"the backend {key!r} is the class {backend.__name__}, not an instance of it")
    if not isinstance(backend, StorageBackend):
        raise ConfigurationError(f"the backend {key!r} is a {type(backend).__name__}, which is not a StorageBackend")


def _require_policy(key: object, policy: object, backends: Mapping[str, StorageBackend]) -> None:
    if not isinstance(policy, StoragePolicy):
        raise ConfigurationError(f"the policy {key!r} is a {type(policy).__name__}, not a StoragePolicy")
    if key != policy.storage_key:
        raise ConfigurationError(f"the policy under the key {key!r} has the storage key {policy.storage_key!r}")
    if policy.backend_key not in backends:
        raise UnknownBackendError(
            f"the policy {key!r} names the backend {policy.backend_key!r}, which is not there"
            f" (there are: {', '.join(sorted(backends)) or 'none'})"
        )


def _require_ref(ref: object) -> None:
    if not isinstance(ref, StoredObjectRef):
        raise InvalidReferenceError(f"a StoredObjectRef is needed, not {type(ref).__name__}; see StoredObjectRef.from_dict")


def _require_content_type(content_type: object) -> None:
    if content_type is None:
        return
    if (
        not isinstance(content_type, str)
        or not 0 < len(content_type) <= _LONGEST_CONTENT_TYPE
        or not (content_type.isascii() and content_type.isprintable())
    ):
        raise InvalidReferenceError(f"content_type must be a media type in printable ASCII, not {content_type!r:.120}")


def _own_keys(backend: StorageBackend) -> frozenset[str]:
    """The keys of `extra` that a backend itself wrote, which would be untrue of a copy elsewhere."""
    return getattr(backend, "extra_keys", frozenset())
