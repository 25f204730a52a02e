"""How a draft becomes an object with a receipt, or nothing."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Self, TypeAlias

from granite_storage._tasks import CLEANUP_TIMEOUT, shielded_cleanup, wait_uncancelled
from granite_storage.backends.base import Place, StorageBackend, SupportsCopy, SupportsIdentity, SupportsPlaces, overlap
from granite_storage.exceptions import (
    AccessDeniedError,
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    InvalidReferenceError,
    ObjectNotFoundError,
    StorageError,
    UnknownBackendError,
    UnknownPolicyError,
)
from granite_storage.locations import check_location, clean_filename, make_location
from granite_storage.policies import StoragePolicy
from granite_storage.readers import StoredObjectReader, require_recorded_size
from granite_storage.refs import ReadOnlyDict, StoredObjectRef, canonical_timestamp, read_only
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

__all__ = [
    "Configuration",
    "DraftWriter",
    "Identities",
    "Lifecycle",
    "ObjectDraft",
    "describe_mismatch",
    "explain_missing",
    "identities_of",
    "is_media_type",
    "may_overlap",
    "require_positive",
    "require_ref",
    "require_seconds",
    "upload_names",
]


# What is known of an object before its bytes are stored, and the receipt that becomes of it.


_LONGEST_CONTENT_TYPE = 255
# A token, and a quoted string, of RFC 9110, section 5.6; neither goes back over what it has taken.
_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_QUOTED = r'"(?:[ !#-\[\]-~]|\\[ -~])*+"'
_MEDIA_TYPE = re.compile(rf"{_WORD}/{_WORD}(?:[ \t]*;[ \t]*(?:{_WORD}=(?:{_WORD}|{_QUOTED}))?)*+")


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

    @classmethod
    def of(
        cls,
        policy: StoragePolicy,
        *,
        model_name: str,
        entity_id: str,
        field_name: str,
        content_type: str | None,
        original_filename: str | None,
        extra: Mapping[str, Any] | None,
    ) -> Self:
        """Choose a location of its own for an object, and check what is to be kept of it."""
        _require_content_type(content_type)
        filename = clean_filename(original_filename)
        location = make_location(
            key_prefix=policy.key_prefix,
            model_name=model_name,
            entity_id=entity_id,
            field_name=field_name,
            original_filename=filename,
        )
        return cls(policy, location, content_type, filename, None if extra is None else read_only(extra, "extra"))

    def receipt(
        self, size: int, checksum: str, details: Mapping[str, Any] | None, identity: str | None = None
    ) -> StoredObjectRef:
        """Return the ref of the object, now that its bytes are known.

        Args:
            size: How many they are.
            checksum: Their checksum.
            details: The backend's own keys.
            identity: That of the store.
        """
        extra = {**(self.extra or {}), **(details or {})}
        ref = StoredObjectRef(
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
        return ref if identity is None else ref.with_identity(identity)


def upload_names(source: object) -> tuple[str | None, str | None]:
    """Return the file name and the media type that an upload says of itself, None for what it does not say.

    A client may send anything as a media type: what is none, or cannot be kept, is left out.
    """
    content_type = getattr(source, "content_type", None)
    is_named = hasattr(source, "filename")
    # Django's uploads have a `name`; of other files it is a path on this machine.
    filename = getattr(source, "filename" if is_named else "name", None) if is_named or hasattr(source, "content_type") else None
    return (
        filename if isinstance(filename, str) and filename else None,
        content_type if isinstance(content_type, str) and is_media_type(content_type) else None,
    )


def is_media_type(content_type: str) -> bool:
    """Tell whether a text that comes from a client is one media type (RFC 9110, section 8.3.1) that can be kept."""
    return _can_be_kept(content_type) and _MEDIA_TYPE.fullmatch(content_type) is not None


def _can_be_kept(content_type: str) -> bool:
    return 0 < len(content_type) <= _LONGEST_CONTENT_TYPE and content_type.isascii() and content_type.isprintable()


def _require_content_type(content_type: object) -> None:
    if content_type is not None and not (isinstance(content_type, str) and _can_be_kept(content_type)):
        raise InvalidReferenceError(f"content_type must be a media type in printable ASCII, not {content_type!r:.120}")


# What a manager is made of, checked when it is made.


class Configuration:
    """Backends and policies that fit together.

    Attributes:
        backends: The backends by their keys, read-only.
        policies: The policies by their storage keys, read-only.
    """

    def __init__(self, backends: Mapping[str, StorageBackend], policies: Mapping[str, StoragePolicy]) -> None:
        _require_mapping("backends", backends)
        _require_mapping("policies", policies)
        for key, backend in backends.items():
            _require_backend(key, backend)
        for key, policy in policies.items():
            _require_policy(key, policy, backends)
        self.backends: Mapping[str, StorageBackend] = MappingProxyType(dict(backends))
        self.policies: Mapping[str, StoragePolicy] = MappingProxyType(dict(policies))

    def policy(self, storage_key: str) -> StoragePolicy:
        """Return a policy; `UnknownPolicyError` where there is none of that key."""
        try:
            return self.policies[storage_key]
        except (KeyError, TypeError):
            known = ", ".join(sorted(self.policies)) or "none"
            raise UnknownPolicyError(f"no policy has the storage key {storage_key!r} (there are: {known})") from None

    def backend(self, backend_key: str) -> StorageBackend:
        """Return a backend; `UnknownBackendError` where there is none of that key."""
        try:
            return self.backends[backend_key]
        except (KeyError, TypeError):
            known = ", ".join(sorted(self.backends)) or "none"
            raise UnknownBackendError(f"no backend has the key {backend_key!r} (there are: {known})") from None

    @contextmanager
    def at(self, ref: StoredObjectRef) -> Iterator[StorageBackend]:
        """Give the backend that a ref names, once the ref is found to be one that leads nowhere else."""
        require_ref(ref)
        check_location(ref.location)
        with self.blaming(ref.backend) as backend:
            yield backend

    @contextmanager
    def blaming(self, backend_key: str) -> Iterator[StorageBackend]:
        """Give the backend, and put its key on the errors it raises: a backend does not know what it is called."""
        backend = self.backend(backend_key)
        try:
            yield backend
        except BackendError as error:
            error.backend = error.backend or backend_key
            raise


def _require_mapping(argument: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{argument} must be a mapping by key, not a {type(value).__name__}")


def require_seconds(argument: str, value: object) -> None:
    """Refuse what is no time to wait."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ConfigurationError(f"{argument} must be a number of seconds, not {value!r}")


def require_positive(argument: str, value: object) -> None:
    """Refuse what is no number of things, of which there must be some."""
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


def require_ref(ref: object) -> None:
    """Refuse what was not read back as a ref."""
    if not isinstance(ref, StoredObjectRef):
        raise InvalidReferenceError(f"a StoredObjectRef is needed, not {type(ref).__name__}; see StoredObjectRef.from_dict")


# What a manager holds per event loop: whether it is open there, what is under way, and what must be closed.


Release: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


class Lifecycle:
    """Counts a manager's calls on each event loop, so that closing can wait for them.

    A manager may serve several loops, one after the other or in threads; closing it on one does not disturb another.

    Args:
        max_uploads: How many streams may come in at a time on each loop; None for any number.
    """

    def __init__(self, max_uploads: int | None = None) -> None:
        self._max_uploads = max_uploads
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopState] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Stand around one call: refuse it where the manager is closed, and let closing wait for it."""
        state = self._here()
        task = asyncio.current_task()
        if task not in state.calls:
            state.require_open()
        state.calls[task] += 1
        try:
            yield
        finally:
            state.leave(task)

    @asynccontextmanager
    async def upload(self, begin: Callable[[], Awaitable[object]] | None = None) -> AsyncIterator[None]:
        """Stand around a call that takes a stream in; wait for room, except in a call that has room already.

        Args:
            begin: Waits for the first piece of the stream; a stream that yields nothing takes no room.
        """
        with self.call():
            state, task = self._here(), asyncio.current_task()
            if self._max_uploads is None or task in state.with_room:
                yield
                return
            if begin is not None:
                await begin()
            state.room = state.room or asyncio.Semaphore(self._max_uploads)
            async with state.room:
                state.with_room.add(task)
                try:
                    yield
                finally:
                    state.with_room.discard(task)

    def track(self, reader: StoredObjectReader) -> None:
        """Have a reader closed with the manager, if it is still open then."""
        self._here().readers.add(reader)

    async def open(self) -> None:
        """Let calls in again, once a closing that is under way has ended."""
        state = self._here()
        if state.closing is not None:
            await asyncio.wait([state.closing])
            state.closing = None

    async def close(self, drain_timeout: float, release: Release) -> None:
        """Refuse new calls, wait for those under way, cancel the late ones, and release what was opened; all of it once.

        Everybody who calls it waits until all is closed. Being cancelled shortens the wait, and closes all the same: the calls
        under way are then cancelled at once.
        """
        state = self._here()
        state.exempt(asyncio.current_task())
        if state.closing is None:
            state.closing = asyncio.ensure_future(state.close(drain_timeout, release))
        try:
            await asyncio.shield(state.closing)
        except asyncio.CancelledError:
            state.cancel_calls()
            await wait_uncancelled(state.closing)
            raise

    def _here(self) -> _LoopState:
        loop = asyncio.get_running_loop()
        state = self._loops.get(loop)
        if state is None:
            with self._lock:
                state = self._loops.setdefault(loop, _LoopState())
        return state


class _LoopState:
    def __init__(self) -> None:
        self.closing: asyncio.Task[None] | None = None
        self.room: asyncio.Semaphore | None = None
        self.with_room: set[asyncio.Task[Any] | None] = set()
        self.calls: Counter[asyncio.Task[Any] | None] = Counter()
        self.readers: weakref.WeakSet[StoredObjectReader] = weakref.WeakSet()
        self._closers: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self._changed = asyncio.Event()

    def require_open(self) -> None:
        if self.closing is not None:
            raise ConfigurationError("the storage manager is closed; enter it again with 'async with', or make another")

    def leave(self, task: asyncio.Task[Any] | None) -> None:
        self.calls[task] -= 1
        if not self.calls[task]:
            del self.calls[task]
        self._changed.set()

    def exempt(self, task: asyncio.Task[Any] | None) -> None:
        """Do not wait for a task that closes the manager from within a call: it would wait for itself."""
        if task is not None:
            self._closers.add(task)
            self._changed.set()

    async def close(self, drain_timeout: float, release: Release) -> None:
        try:
            if not await self._wait_until_idle(drain_timeout):
                self.cancel_calls()
                await self._wait_until_idle(CLEANUP_TIMEOUT)
            for reader in list(self.readers):
                await shielded_cleanup(reader.aclose(), f"closing the reader of {reader.ref.location!r}")
        finally:
            self._closers.clear()
            await release()

    def cancel_calls(self) -> None:
        for task in self._waited_for():
            task.cancel("the storage manager is closing")

    async def _wait_until_idle(self, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                while self._waited_for():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _waited_for(self) -> list[asyncio.Task[Any]]:
        return [task for task in self.calls if task is not None and task not in self._closers]


# Which store a backend leads to: the identity that new refs keep, and whether two backends have the same objects.


logger: logging.Logger = logging.getLogger("granite_storage")


class Identities:
    """The identities that new refs keep. No upload fails because a store keeps none."""

    def __init__(self) -> None:
        self._refused: set[str] = set()

    async def current(self, backend_key: str, backend: StorageBackend) -> str | None:
        """Return the identity of a backend's store, which is given one at its first use; None where it has none."""
        if backend_key in self._refused or not isinstance(backend, SupportsIdentity):
            return None
        try:
            return next(iter(await backend.identities(create=True)), None)
        except (BackendUnavailableError, ConfigurationError):
            return None  # the write will meet the same, and say so
        except StorageError as error:
            self._refused.add(backend_key)
            logger.warning(
                "the store of the backend %r can be given no identity, so refs do not say which store they are of: %s",
                backend_key,
                error,
            )
            return None


async def explain_missing(error: ObjectNotFoundError, ref: StoredObjectRef, backend: StorageBackend) -> None:
    """Complete the message of an error about a missing object, once, where the ref was written to another store."""
    if ref.identity is None or ref.identity in str(error) or not isinstance(backend, SupportsIdentity):
        return
    try:
        found = await backend.identities()
    except StorageError:
        return
    if ref.identity not in found:
        error.args = (f"{error}; {describe_mismatch(ref.backend, ref.identity, found[0] if found else None)}", *error.args[1:])


def describe_mismatch(backend_key: str, identity: str, found: str | None) -> str:
    """Say that a backend's key leads to another store than it did, and what to do."""
    written = f"it was written to the store {identity}, and the backend {backend_key!r} leads to"
    if found is None:
        return (
            f"{written} one that has no identity in its marker '.granite-storage' now: its disk is not mounted, or it is another"
            " store, which needs a key of its own"
        )
    return (
        f"{written} the store {found} now: give each store a key of its own, or, where the objects were moved, add {identity} as"
        " a line to the new store's '.granite-storage'"
    )


async def may_overlap(backend: StorageBackend, other: StorageBackend) -> bool | None:
    """Tell whether two backends lead to the same objects; None where one of them does not tell its places."""
    if backend is other:
        return True
    places, others = await _places_of(backend), await _places_of(other)
    return None if places is None or others is None else overlap(places, others)


async def identities_of(backend: StorageBackend) -> tuple[str, ...] | None:
    """Return the identities that a backend's store answers to now; None for a backend that knows none.

    Raises:
        BackendError: The store is out of reach.
    """
    if not isinstance(backend, SupportsIdentity):
        return None
    try:
        return tuple(await backend.identities())
    except AccessDeniedError:  # S3 says so also where there is none, to those who may not list
        return ()


async def _places_of(backend: StorageBackend) -> set[Place] | None:
    """Return all names of a backend's place, its identity among them: a server may be called by names that nobody can compare."""
    if not isinstance(backend, SupportsPlaces):
        return None
    places = set(await backend.places())
    try:
        identities = await identities_of(backend) or ()
    except BackendError:  # it is out of reach, and only the one that is collected has to be
        identities = ()
    for identity in identities:
        store, _, prefix = identity.partition("/")
        places.add(Place(f"identity {store}", tuple(filter(None, prefix.split("/")))))
    return places


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
        await shielded_cleanup(backend.delete(draft.location), f"deleting the object {draft.location!r}, which has no receipt")

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
