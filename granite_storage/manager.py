"""The manager: what the application talks to."""

from __future__ import annotations

import builtins
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Mapping
from datetime import timedelta
from functools import wraps
from inspect import signature
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from granite_storage._engine import Engine, Lifecycle, require_positive, require_ref, require_seconds, upload_names
from granite_storage._headers import Disposition
from granite_storage._portal import portal, require_no_loop, run_blocking
from granite_storage.backends.base import ObjectInfo, StorageBackend
from granite_storage.exceptions import StorageError
from granite_storage.locations import check_location
from granite_storage.policies import StoragePolicy
from granite_storage.readers import OpeningReader, SyncObjectReader
from granite_storage.refs import StoredObjectRef
from granite_storage.signing import UrlSigner
from granite_storage.streams import BytesLike, ByteSource, Pace, require_synchronous

__all__ = ["StorageManager", "SyncStorage"]


P = ParamSpec("P")
T = TypeVar("T")


class StorageManager:
    """Stores objects under named policies, and reads them by their refs.

    Writes go where the policy says; reads, deletes and checks go where the ref says. A policy that is pointed at another backend
    therefore loses nothing that was stored before.

    The manager opens nothing when it is created, so it may be created at import time. It serves any number of tasks, and
    several event loops, with separate clients for each. `async with manager:` or `aclose` closes the clients; the manager may
    be entered again.

    Args:
        backends: The backends by their keys. The manager closes them.
        policies: The policies by their storage keys.
        drain_timeout: How long `aclose` waits for calls in progress before it cancels them, in seconds.
        max_concurrent_uploads: How many streams are stored at a time on one event loop, which bounds their memory. A stream
            takes a slot with its first chunk; others wait with that chunk. None for no limit.
        upload_idle_timeout: How long a stream that has a slot may yield nothing, in seconds; then it fails with
            `StreamTimeoutError`, and nothing of it is stored. None for no limit. It has no effect without
            `max_concurrent_uploads`.
        min_upload_rate: The lowest average number of bytes per second for any stream, not counting the time that the storage
            takes and the first ten seconds. None for no limit.
        url_signer: Signs URLs for backends that cannot sign their own; see `url`.

    Raises:
        ConfigurationError: The configuration is invalid: a policy names a backend that does not exist (`UnknownBackendError`)
            or has another key than its own, or a value is not a backend or a policy.

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
        upload_idle_timeout: float | None = 60.0,
        min_upload_rate: int | None = None,
        url_signer: UrlSigner | None = None,
    ) -> None:
        require_seconds("drain_timeout", drain_timeout)
        if max_concurrent_uploads is not None:
            require_positive("max_concurrent_uploads", max_concurrent_uploads)
        if upload_idle_timeout is not None:
            require_seconds("upload_idle_timeout", upload_idle_timeout)
        if min_upload_rate is not None:
            require_positive("min_upload_rate", min_upload_rate)
        self._drain_timeout = drain_timeout
        self._lifecycle = Lifecycle(max_concurrent_uploads)
        pace = Pace(None if max_concurrent_uploads is None else upload_idle_timeout, min_upload_rate)
        is_paced = max_concurrent_uploads is not None or min_upload_rate is not None
        self._engine = Engine(
            backends, policies, lifecycle=self._lifecycle, pace=pace if is_paced else None, url_signer=url_signer
        )

    @property
    def backends(self) -> Mapping[str, StorageBackend]:
        """The backends by their keys, read-only."""
        return self._engine.backends

    @property
    def policies(self) -> Mapping[str, StoragePolicy]:
        """The policies by their storage keys, read-only."""
        return self._engine.policies

    @property
    def url_signer(self) -> UrlSigner | None:
        """Signs URLs for backends that cannot sign their own."""
        return self._engine.url_signer

    def policy(self, storage_key: str) -> StoragePolicy:
        """Return a policy; raise `UnknownPolicyError` if there is none with that key."""
        return self._engine.policy(storage_key)

    def backend(self, backend_key: str) -> StorageBackend:
        """Return a backend; raise `UnknownBackendError` if there is none with that key."""
        return self._engine.backend(backend_key)

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
        is left, unless the storage's answer was lost. An object is never overwritten: every call creates a new one.

        Args:
            storage_key: The policy to store it under.
            model_name: The kind of its owner, such as `user`; a segment of its location, like the next two.
            entity_id: The id of the owner, such as a primary key.
            field_name: The name of the owner's field, such as `avatar`.
            content: The bytes; changing the buffer during the call is the caller's mistake.
            content_type: Its media type; stored as given, unless the policy detects it from the content.
            original_filename: The client's file name; sanitized, never trusted.
            extra: Your own keys with JSON values to store in the ref; the backend's keys take precedence.

        Returns:
            The receipt.

        Raises:
            UnknownPolicyError: No policy has this storage key.
            InvalidLocationError: `model_name`, `entity_id` or `field_name` is not safe.
            InvalidReferenceError: `content_type` or `extra` is invalid.
            ContentTooLargeError: It is larger than the policy allows.
            UnsupportedContentError: The policy does not accept its type, or it is not of the declared type.
            ContentRejectedError: An inspector or a validator of the policy refuses it.
            InfectedContentError: The policy's scanner has found it infected.
            ScannerUnavailableError: The scanner could not scan it, and the policy refuses such uploads.
            BackendError: The backend could not store it.
        """
        if not isinstance(content, bytes | bytearray | memoryview):
            raise TypeError(f"content must be bytes, not {type(content).__name__}; use put_stream for a stream")
        prepared = self._engine.prepare(
            storage_key=storage_key,
            model_name=model_name,
            entity_id=entity_id,
            field_name=field_name,
            content_type=content_type,
            original_filename=original_filename,
            extra=extra,
        )
        return await self._engine.put(prepared, content)

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

        The limit is enforced chunk by chunk: no byte over it reaches the backend. When the call returns, the object is stored
        as durably as its backend promises; when it raises or is cancelled, nothing of it is left, unless the storage's answer
        was lost.

        Args:
            storage_key: The policy to store it under.
            model_name: The kind of its owner, such as `lesson`; a segment of its location, like the next two.
            entity_id: The id of the owner, such as a primary key.
            field_name: The name of the owner's field, such as `video`.
            stream: A binary file object (read in a thread), an object with an async `read`, an async iterable or an iterable of
                bytes. An upload, which is a file object with a `filename`, is read from its beginning; any other stream from its
                current position. It is never closed.
            content_type: Its media type; stored as given, unless the policy detects it from the content. None for that of an
                upload.
            original_filename: The client's file name; sanitized, never trusted. None for that of an upload.
            extra: Your own keys with JSON values to store in the ref; the backend's keys take precedence.
            size: The size in bytes, if known; verified, and refused before the first byte if too large.
            checksum: `sha256:<hex>`, if known; verified before the object is published.

        Returns:
            The receipt.

        Raises:
            UnknownPolicyError: No policy has this storage key.
            InvalidLocationError: `model_name`, `entity_id` or `field_name` is not safe.
            InvalidReferenceError: `content_type`, `extra` or `checksum` is invalid.
            ContentTooLargeError: The stream has more bytes than the policy allows.
            UnsupportedContentError: The policy does not accept its type, or it is not of the declared type.
            ContentRejectedError: An inspector or a validator of the policy refuses it.
            InfectedContentError: The policy's scanner has found it infected.
            ScannerUnavailableError: The scanner could not scan it, and the policy refuses such uploads.
            StreamTimeoutError: It was idle for too long, or too slow; see the arguments of the manager.
            SizeMismatchError: Its size is not the declared one or, for an upload that cannot seek, not its own `size`.
            EmptyUploadError: It is an upload without a name and without bytes.
            ConsumedSourceError: It is an upload that was closed, or that was stored before and cannot seek; or any other stream
                that another call is storing.
            ChecksumMismatchError: Its checksum is not the declared one.
            TypeError: It is not a stream of bytes.
            BackendError: The backend could not store it. An error that the stream itself raises passes through unchanged.
        """
        own_filename, own_content_type = upload_names(stream)
        prepared = self._engine.prepare(
            storage_key=storage_key,
            model_name=model_name,
            entity_id=entity_id,
            field_name=field_name,
            content_type=own_content_type if content_type is None else content_type,
            original_filename=own_filename if original_filename is None else original_filename,
            extra=extra,
        )
        return await self._engine.put(prepared, stream, size=size, checksum=checksum)

    async def get(self, ref: StoredObjectRef) -> bytes:
        """Return all bytes of an object, verified: wrong bytes are never returned.

        Only for objects that fit in memory; `open` streams.

        Raises:
            ObjectNotFoundError: The object does not exist.
            SizeMismatchError: Its size is not the one in the ref.
            ChecksumMismatchError: Its checksum is not the one in the ref.
            BackendError: It could not be read.
        """
        return await self._engine.get(ref)

    def open(self, ref: StoredObjectRef, *, offset: int = 0, length: int | None = None, verify: bool = False) -> OpeningReader:
        """Open an object, or a range of one, for streaming: `async with manager.open(ref)` or `await manager.open(ref)`.

        Args:
            ref: What to open.
            offset: Where the range begins, in bytes; bytes before it are not read.
            length: How long the range is, in bytes, cut at the end of the object; None for all that is left.
            verify: Whether to verify the bytes as they are read: the reader then reads once, from start to end, and raises
                `ChecksumMismatchError` in place of the last bytes of a wrong body.

        Returns:
            An object to await or to enter; both return a `StoredObjectReader`. The caller closes an awaited one.

        Raises:
            ObjectNotFoundError: The object does not exist.
            SizeMismatchError: Its size is not the one in the ref.
            ValueError: The range is negative or begins past the end, or a range is to be verified.
            BackendError: It could not be opened.
        """
        return self._engine.open(ref, offset=offset, length=length, verify=verify)

    async def scan(self, ref: StoredObjectRef) -> StoredObjectRef:
        """Scan the stored object again with the scanner of its policy.

        It is for applications that store refs themselves: the caller stores the returned ref in place of the given one, and
        decides what to do with an infected object. Nothing else changes. The files of attachments are scanned by the worker of
        a journal.

        Args:
            ref: The object, whatever its ref says of an earlier scan.

        Returns:
            The same ref with the verdict as its `scan`: `clean`, or `infected` with the `signature` that was found.

        Raises:
            ScannerUnavailableError: The scanner could not scan it.
            UnknownPolicyError: The policy of the ref does not exist.
            ConfigurationError: The policy has no scanner.
            ObjectNotFoundError: The object does not exist.
            SizeMismatchError: Its size is not the one in the ref.
            ChecksumMismatchError: Its checksum is not the one in the ref.
            BackendError: It could not be read.
        """
        return await self._engine.scan(ref)

    async def exists(self, ref: StoredObjectRef) -> bool:
        """Return whether the object exists; a refused permission or an unavailable backend raises an error."""
        return await self._engine.exists(ref)

    async def stat(self, ref: StoredObjectRef) -> ObjectInfo:
        """Return the object's properties in the backend; raise `ObjectNotFoundError` if it does not exist."""
        return await self._engine.stat(ref)

    async def identity(self, backend_key: str) -> str | None:
        """Return the identity of a backend's store, and create it if there is none; None if the store cannot have one.

        New refs have it as `StoredObjectRef.identity`.

        Raises:
            UnknownBackendError: No backend has the key.
        """
        return await self._engine.identity(backend_key)

    async def url(
        self,
        ref: StoredObjectRef,
        *,
        expires_in: timedelta,
        disposition: Disposition = "attachment",
        filename: str | None = None,
        stable_for: timedelta | None = None,
    ) -> str:
        """Return a URL with which anyone can read the object until it expires: do not log it.

        A backend that signs its own, such as S3, serves it itself; for others the `url_signer` signs, and the application serves
        it with `granite_storage.web.SignedFiles`. It is not checked that the object exists.

        Args:
            ref: The object.
            expires_in: How long the URL works at least, from one second to seven days, or to what the signer allows.
            disposition: `inline` lets a browser show it in its window, where its media type is safe to show.
            filename: The name for saving it; None for its original name.
            stable_for: How long the same URL is returned, so that caches keep what they have read by it; None for a new one each
                time. Windows of this length follow each other, and begin at another time for each object. A URL works to the end
                of its window and `expires_in` after it, so together they are at most seven days, or what the signer allows. All
                processes with the same credentials or keys return the same URL.

        Raises:
            ConfigurationError: The backend cannot sign URLs, and the manager has no signer; or it cannot sign stable URLs.
            ValueError: `expires_in` or `stable_for` is out of bounds, or the disposition is not known.
            ScanPendingError: A virus scanner has not scanned the object yet.
            InfectedObjectError: A virus scanner has found the object infected.
            BackendError: The backend could not sign.
        """
        urls = await self._engine.urls(
            [ref], expires_in=expires_in, disposition=disposition, filename=filename, stable_for=stable_for
        )
        return urls[0]

    async def urls(
        self,
        refs: Iterable[StoredObjectRef],
        *,
        expires_in: timedelta,
        disposition: Disposition = "attachment",
        stable_for: timedelta | None = None,
    ) -> builtins.list[str]:
        """Return the URLs of several objects in one batch, in their order, as `url` does for one.

        Args:
            refs: The objects, of any policies and backends.
            expires_in: How long the URLs work at least.
            disposition: `inline` lets a browser show in its window what is safe to show.
            stable_for: How long the same URLs are returned; see `url`.

        Raises:
            StorageError: One could not be signed, as `url` says.
            ValueError: As `url`.
        """
        return await self._engine.urls(refs, expires_in=expires_in, disposition=disposition, stable_for=stable_for)

    def public_url(self, ref: StoredObjectRef) -> str:
        """Return the permanent URL at which anyone can read an object of a public policy.

        It is computed without I/O and never changes, so caches may keep a response forever. It is not checked that the object
        exists.

        Args:
            ref: The object.

        Raises:
            ConfigurationError: The policy of the ref has no `public`, or writes to another backend now than the object is in.
            UnknownPolicyError: The policy of the ref does not exist.
            ScanPendingError: A virus scanner has not scanned the object yet.
            InfectedObjectError: A virus scanner has found the object infected.
        """
        return self._engine.public_url(ref)

    def list(self, *, storage_key: str, prefix: str = "", start_after: str | None = None) -> AsyncGenerator[ObjectInfo, None]:
        """Iterate over the objects of a policy in the order of their locations, in constant memory.

        Objects of other policies are listed too where they share the backend and the policy's `key_prefix`, or where it has
        none. The iteration holds a connection open: one that ends early is closed by `contextlib.aclosing`.

        Args:
            storage_key: The policy.
            prefix: How the location continues after the policy's `key_prefix` and a slash, such as `user/1/avatar/`; empty for
                all objects.
            start_after: A whole location: only objects after it are listed; it need not exist.

        Raises:
            UnknownPolicyError: No policy has this storage key.
            BackendError: The backend could not be listed.
        """
        return self._engine.list(storage_key, prefix, start_after=start_after)

    async def delete(self, ref: StoredObjectRef) -> None:
        """Delete the object permanently; a missing object is not an error."""
        await self._engine.delete(ref)

    async def delete_many(self, refs: Iterable[StoredObjectRef]) -> dict[StoredObjectRef, StorageError]:
        """Delete objects permanently, in few requests if their backends can; a missing object is not an error.

        Returns:
            The refs that could not be deleted, each with its error; empty if all were deleted. A failure does not stop the
            others.

        Raises:
            UnknownBackendError: A ref names a backend that does not exist; nothing was deleted.
            InvalidReferenceError: One of `refs` is not a ref, or leads out of its backend; nothing was deleted.
        """
        by_backend: dict[str, dict[str, StoredObjectRef]] = {}
        for ref in refs:
            require_ref(ref)
            self._engine.backend(ref.backend)
            check_location(ref.location)
            by_backend.setdefault(ref.backend, {})[ref.location] = ref
        failures: dict[StoredObjectRef, StorageError] = {}
        for key, found in by_backend.items():
            failed = await self._engine.delete_many(key, tuple(found))
            failures.update((found[location], error) for location, error in failed.items())
        return failures

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
        """Copy an object to a new one, on the server if source and target share a backend that can.

        Name, media type, checksum and the caller's own `extra` keys are kept. Otherwise as `put_stream`; bytes that pass
        through the program are verified against the ref.

        Args:
            ref: What to copy.
            model_name: The kind of the copy's owner.
            entity_id: The id of the owner.
            field_name: The name of the owner's field.
            storage_key: The policy of the copy; None for that of the ref.
            extra: Keys to keep in the new ref; None for those of the ref.

        Returns:
            The receipt of the copy.

        Raises:
            ObjectNotFoundError: The object does not exist.
            SizeMismatchError: Its size is not the one in the ref; nothing is kept of the copy.
            ContentTooLargeError: It is larger than the copy's policy allows.
            BackendError: It could not be copied.
        """
        prepared = self._engine.prepare_copy(
            ref, storage_key=storage_key, model_name=model_name, entity_id=entity_id, field_name=field_name, extra=extra
        )
        return await self._engine.copy(ref, prepared)

    async def aclose(self) -> None:
        """Close the connections of this event loop and of synchronous callers; idempotent.

        New calls are refused at once. Calls in progress have `drain_timeout` to end; then they are cancelled, and leave nothing
        behind. Readers that are still open are closed. If `aclose` itself is cancelled, it cancels the calls at once, and still
        closes everything.
        """
        await self._close_here()
        if portal.is_used_by(self._lifecycle) and not portal.is_here:
            await portal.run_here(self._close_here())
            portal.release(self._lifecycle)

    async def _close_here(self) -> None:
        await self._lifecycle.close(self._drain_timeout, self._engine.close_backends)

    @property
    def sync(self) -> SyncStorage:
        """The same methods for synchronous code, in threads without a running event loop."""
        return SyncStorage(self)

    async def __aenter__(self) -> Self:
        await self._lifecycle.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<StorageManager policies={sorted(self.policies)} backends={sorted(self.backends)}>"


def _blocking(
    method: Callable[Concatenate[StorageManager, P], Coroutine[Any, Any, T]], *, stores: bool = False
) -> Callable[[Callable[..., object]], Callable[Concatenate[SyncStorage, P], T]]:
    """Replace a stub by a method that blocks until the manager's has returned; only its name and docstring stay.

    Args:
        method: The manager's method.
        stores: Whether it returns the ref of a new object, which is deleted where the wait was interrupted after its end.
    """

    def decorate(documented: Callable[..., object]) -> Callable[Concatenate[SyncStorage, P], T]:
        @wraps(method)
        def call(self: SyncStorage, /, *args: P.args, **kwargs: P.kwargs) -> T:
            if "stream" in kwargs:
                require_synchronous(kwargs["stream"])
            manager, name = self._manager, method.__name__
            work: Coroutine[Any, Any, T] = getattr(manager, name)(*args, **kwargs)
            undo: Any = manager.delete if stores else None
            return run_blocking(work, f"storage.sync.{name}", f"'await storage.{name}(...)'", undo)

        call.__doc__, call.__qualname__ = documented.__doc__, documented.__qualname__
        own = vars(call)
        own["__signature__"] = signature(method)
        del own["__wrapped__"]  # frameworks that unwrap it would find a coroutine function, and await what it returns
        return call

    return decorate


class SyncStorage:
    """The methods of a `StorageManager` for synchronous code: `storage.sync.put_bytes(...)`.

    Each does what the verb of the same name does, and returns and raises the same; the calling thread waits for the library's own
    event loop, which runs in a thread and serves all threads side by side. Where an event loop runs in the calling thread, they
    raise `ConfigurationError`, because it would stand still. An exception that interrupts the wait, such as `KeyboardInterrupt`,
    cancels the operation, and is raised once nothing of it is left.

    `with storage.sync:` or `close` closes what synchronous callers have opened; so does the end of the process.
    """

    def __init__(self, manager: StorageManager) -> None:
        self._manager = manager

    @_blocking(StorageManager.put_bytes, stores=True)
    def put_bytes(self) -> None:
        """Store content that is in memory; see `StorageManager.put_bytes`."""

    @_blocking(StorageManager.put_stream, stores=True)
    def put_stream(self) -> None:
        """Store a stream; see `StorageManager.put_stream`.

        The stream is read in another thread. It may be a binary file, an iterable of bytes, or an upload whose `file` is a
        binary file, such as Starlette's.

        Raises:
            TypeError: It is an asynchronous stream, which belongs to an event loop.
        """

    @_blocking(StorageManager.get)
    def get(self) -> None:
        """Return all bytes of an object, verified; see `StorageManager.get`."""

    def open(self, ref: StoredObjectRef, *, offset: int = 0, length: int | None = None, verify: bool = False) -> SyncObjectReader:
        """Open an object, or a range of one, as a binary file; see `StorageManager.open`."""
        opening = self._manager.open(ref, offset=offset, length=length, verify=verify)
        return SyncObjectReader(run_blocking(opening.start(), "storage.sync.open", "'await storage.open(...)'"))

    @_blocking(StorageManager.scan)
    def scan(self) -> None:
        """Scan the stored object again; see `StorageManager.scan`."""

    @_blocking(StorageManager.exists)
    def exists(self) -> None:
        """Return whether the object exists; see `StorageManager.exists`."""

    @_blocking(StorageManager.stat)
    def stat(self) -> None:
        """Return the object's properties in the backend; see `StorageManager.stat`."""

    @_blocking(StorageManager.url)
    def url(self) -> None:
        """Return a URL with which anyone can read the object until it expires; see `StorageManager.url`."""

    @_blocking(StorageManager.urls)
    def urls(self) -> None:
        """Return the URLs of several objects, in their order; see `StorageManager.urls`."""

    def list(self, *, storage_key: str, prefix: str = "", start_after: str | None = None) -> Generator[ObjectInfo, None, None]:
        """Iterate over the objects of a policy; see `StorageManager.list`."""
        require_no_loop("storage.sync.list", "'async for info in storage.list(...)'")
        return portal.iterate(self._manager.list(storage_key=storage_key, prefix=prefix, start_after=start_after))

    @_blocking(StorageManager.delete)
    def delete(self) -> None:
        """Delete the object permanently; see `StorageManager.delete`."""

    @_blocking(StorageManager.delete_many)
    def delete_many(self) -> None:
        """Delete objects permanently; see `StorageManager.delete_many`."""

    @_blocking(StorageManager.copy, stores=True)
    def copy(self) -> None:
        """Copy an object to a new one; see `StorageManager.copy`."""

    def close(self) -> None:
        """Close the connections of synchronous callers; see `StorageManager.aclose`. A later call opens new ones."""
        run_blocking(self._manager._close_here(), "storage.sync.close", "'await storage.aclose()'")
        portal.release(self._manager._lifecycle)

    def __enter__(self) -> Self:
        require_no_loop("storage.sync.close", "'async with storage'")
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SyncStorage of {self._manager!r}>"
