"""The engine that prepares, stores, copies, reads, lists and deletes objects.

The manager, the ORM hooks, the garbage collector, the web and the command line all go this one way.
"""

from __future__ import annotations

import asyncio
import builtins
import logging
import re
import threading
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack, cast

from granite_storage._documentation import Page
from granite_storage._headers import Disposition, content_disposition, served_type
from granite_storage._portal import portal
from granite_storage._tasks import CLEANUP_TIMEOUT, shielded_cleanup, wait_uncancelled
from granite_storage._telemetry import fields_of, load, traced
from granite_storage._words import require_timedelta
from granite_storage.backends._remote import delete_each
from granite_storage.backends.base import (
    ObjectHeaders,
    ObjectInfo,
    ObjectReader,
    Place,
    StorageBackend,
    SupportsAbort,
    SupportsBatchDelete,
    SupportsCopy,
    SupportsExtraKeys,
    SupportsIdentity,
    SupportsPlaces,
    SupportsPresignedUpload,
    UploadRequest,
    closing_listing,
    object_headers,
    overlap,
)
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
from granite_storage.inspection.base import HEAD_SIZE, Checks, UploadPreview, Validator
from granite_storage.inspection.scanning import scan_stored
from granite_storage.locations import check_location, clean_filename, make_location
from granite_storage.policies import StoragePolicy, load_gate
from granite_storage.readers import OpeningReader, StoredObjectReader, require_recorded_size
from granite_storage.refs import (
    ReadOnlyDict,
    StoredObjectRef,
    canonical_checksum,
    canonical_timestamp,
    read_only,
    require_scanned,
    storable,
)
from granite_storage.signing import UrlSigner, signed_urls
from granite_storage.streams import (
    BytesLike,
    ByteSource,
    ManagedStream,
    MeasuredStream,
    Pace,
    PacedStream,
    expected_size,
    fingerprint,
    is_upload,
    regroup,
    require_checksum,
    require_declared_size,
    require_size,
    size_mismatch,
    size_of,
)

if TYPE_CHECKING:
    from granite_storage.inspection.gate import Gate, Pieces, Verdict


# What is known of an object before its bytes are stored, and the receipt that becomes of it.


_LONGEST_CONTENT_TYPE = 255
_OPAQUE = "application/octet-stream"
# A token, and a quoted string, of RFC 9110, section 5.6; neither goes back over what it has taken.
_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_QUOTED = r'"(?:[ !#-\[\]-~]|\\[ -~])*+"'
_MEDIA_TYPE = re.compile(rf"{_WORD}/{_WORD}(?:[ \t]*;[ \t]*(?:{_WORD}=(?:{_WORD}|{_QUOTED}))?)*+")


class Owner(TypedDict):
    """What owns an object: the segments of its location that say so."""

    model_name: str
    entity_id: str
    field_name: str


@dataclass(frozen=True, slots=True)
class PreparedUpload:
    """What is known of an object before its bytes are stored.

    Attributes:
        policy: The policy that it is stored under.
        location: Where it will be.
        content_type: Its media type.
        original_filename: Its name, cleaned.
        extra: The caller's own keys.
        checks: What is asked of its content before it is published; None for nothing.
        media: What its content was found to be, where it is known already.
        scan: What a scanner said of it, where it was asked already.
        source: The location of its original, if it is a variant.
        recipe: The digest of the recipe that it is made by, if it is a variant.
    """

    policy: StoragePolicy
    location: str
    content_type: str | None
    original_filename: str | None
    extra: ReadOnlyDict | None
    checks: Checks | None = None
    media: Mapping[str, Any] | None = None
    scan: Mapping[str, Any] | None = None
    source: str | None = None
    recipe: str | None = None

    @property
    def max_size(self) -> int | None:
        """The most bytes that it may have; None for any number, as of a variant, which no client sends."""
        return self.policy.max_size if self.source is None else None

    @property
    def preview(self) -> UploadPreview:
        """What the checks know of the upload besides its content."""
        return UploadPreview(
            self.policy.storage_key, b"", self.original_filename, declared_type=self.content_type, content_type=self.content_type
        )

    def judged(self, verdict: Verdict) -> PreparedUpload:
        """Return the upload as its checks have accepted it."""
        return PreparedUpload(  # replace() would take twice as long
            self.policy,
            self.location,
            verdict.content_type,
            verdict.filename,
            self.extra,
            self.checks,
            media=verdict.media or self.media,
            scan=verdict.scan or self.scan,
        )

    def validated_by(self, validator: Validator) -> PreparedUpload:
        """Return it with one more function that may refuse it."""
        checks = self.checks or Checks()
        return replace(self, checks=replace(checks, validators=(*checks.validators, validator)))

    def as_copy_of(self, ref: StoredObjectRef) -> PreparedUpload:
        """Return the upload as a copy of an object; within one policy the checks are not repeated."""
        checks = self.checks
        if checks is not None and ref.storage_key == self.policy.storage_key and checks.were_passed_by(ref.media, ref.scan):
            checks = checks.validation
        return replace(self, checks=checks, media=ref.media, scan=ref.scan)

    def derived_as(self, content_type: str | None, filename: str | None, media: Mapping[str, Any] | None) -> PreparedUpload:
        """Return the variant with what its recipe says of the finished content."""
        require_content_type(content_type or None)
        kept = storable(media, "media") if media else self.media
        return replace(self, content_type=content_type or None, original_filename=clean_filename(filename), media=kept)

    def receipt(
        self, size: int, checksum: str, details: Mapping[str, Any] | None, identity: str | None = None
    ) -> StoredObjectRef:
        """Return the ref of the stored object.

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
            media=self.media,
            scan=self.scan,
            recipe=self.recipe,
        )
        return ref if identity is None else ref.with_identity(identity)


def upload_names(source: object) -> tuple[str | None, str | None]:
    """Return the file name and the media type that an upload says of itself, None for what it does not say.

    A client may send anything as a media type: what is none, or cannot be kept, is left out.
    """
    content_type = getattr(source, "content_type", None)
    is_named = is_upload(source)
    # Django's uploads have a `name`; of other files it is a path on this machine.
    filename = getattr(source, "filename" if is_named else "name", None) if is_named or hasattr(source, "content_type") else None
    return (
        filename if isinstance(filename, str) and filename else None,
        content_type if isinstance(content_type, str) and is_media_type(content_type) else None,
    )


def is_media_type(content_type: str) -> bool:
    """Return whether a text that comes from a client is one media type (RFC 9110, section 8.3.1) that can be kept."""
    return _can_be_kept(content_type) and _MEDIA_TYPE.fullmatch(content_type) is not None


def _can_be_kept(content_type: str) -> bool:
    return 0 < len(content_type) <= _LONGEST_CONTENT_TYPE and content_type.isascii() and content_type.isprintable()


def require_content_type(content_type: object) -> None:
    """Raise `InvalidReferenceError` unless the value is None or a media type that can be kept."""
    if content_type is not None and not (isinstance(content_type, str) and _can_be_kept(content_type)):
        raise InvalidReferenceError(f"content_type must be a media type in printable ASCII, not {content_type!r:.120}")


# The state of a manager on each event loop: whether it is open, the calls in progress, and the readers to close.


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

    def call(self, *, while_closing: bool = False) -> _Call:
        """Guard one call: refuse it if the manager is closed or, by default, closing, and let closing wait for it."""
        return _Call(self._here(), asyncio.current_task(), while_closing)

    @asynccontextmanager
    async def upload(self, begin: Callable[[], Awaitable[object]] | None = None) -> AsyncIterator[None]:
        """Guard a call that stores a stream, and wait for an upload slot, unless the enclosing call has one already.

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
        """Close a reader together with the manager, if it is still open then."""
        self._here().readers.add(reader)

    async def open(self) -> None:
        """Accept calls again, once a close in progress has ended."""
        state = self._here()
        if state.closing is not None:
            await asyncio.wait([state.closing])
            state.closing = None

    async def close(self, drain_timeout: float, release: Release) -> None:
        """Refuse new calls, wait for those in progress, cancel the late ones, and release what was opened; once.

        Every caller waits until all is closed. Being cancelled shortens the wait, and closes all the same: the calls
        in progress are then cancelled at once.
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
        finally:
            if portal.is_here:  # later synchronous calls reopen the backends
                self._loops.pop(asyncio.get_running_loop(), None)

    def _here(self) -> _LoopState:
        loop = asyncio.get_running_loop()
        state = self._loops.get(loop)
        if state is None:
            with self._lock:
                state = self._loops.setdefault(loop, _LoopState())
            if portal.is_here:
                portal.add_user(self)
        return state


class _Call:
    """Guards one call. It is a class because a generator took twice as long, and an insert with a file needs four."""

    __slots__ = ("_state", "_task")

    def __init__(self, state: _LoopState, task: asyncio.Task[Any] | None, while_closing: bool) -> None:
        if task not in state.calls and not (while_closing and state.is_closing):
            state.require_open()
        self._state = state
        self._task = task

    def __enter__(self) -> None:
        self._state.calls[self._task] += 1

    def __exit__(self, *_: object) -> None:
        self._state.leave(self._task)


class _LoopState:
    def __init__(self) -> None:
        self.closing: asyncio.Task[None] | None = None
        self.room: asyncio.Semaphore | None = None
        self.with_room: set[asyncio.Task[Any] | None] = set()
        self.calls: Counter[asyncio.Task[Any] | None] = Counter()
        self.readers: weakref.WeakSet[StoredObjectReader] = weakref.WeakSet()
        self._closers: weakref.WeakSet[asyncio.Task[Any]] = weakref.WeakSet()
        self._changed = asyncio.Event()

    @property
    def is_closing(self) -> bool:
        return self.closing is not None and not self.closing.done()

    def require_open(self) -> None:
        if self.is_closing:
            raise ConfigurationError(
                "the storage manager is being closed and accepts no calls: enter it again with 'async with' once it is closed"
            )
        if self.closing is not None:
            raise ConfigurationError(
                "the storage manager is closed: enter it again with 'async with', or create another one", see=Page.MANAGER
            )

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
    """Return whether two backends lead to the same objects; None if one of them does not name its places."""
    if backend is other:
        return True
    places, others = await places_of(backend), await places_of(other)
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
    except AccessDeniedError:  # without s3:ListBucket, S3 denies access to missing objects too
        return ()


async def places_of(backend: StorageBackend) -> set[Place] | None:
    """Return all names of a backend's place, its identity among them: a server may have names that cannot be compared."""
    if not isinstance(backend, SupportsPlaces):
        return None
    places = set(await backend.places())
    try:
        identities = await identities_of(backend) or ()
    except BackendError:  # it is unreachable; only the backend that is collected must answer
        identities = ()
    for identity in identities:
        store, _, prefix = identity.partition("/")
        places.add(Place(f"identity {store}", tuple(filter(None, prefix.split("/")))))
    return places


class Engine:
    """Prepares, stores, copies, opens, lists and deletes objects: one way for the manager and for every module above it.

    Args:
        backends: The backends by their keys.
        policies: The policies by their storage keys.
        lifecycle: Counts the calls, so that closing can wait for them.
        pace: How fast streams must be; None for any speed.
        url_signer: Signs URLs for backends that sign none of their own.

    Attributes:
        backends: The backends by their keys, read-only.
        policies: The policies by their storage keys, read-only.
        url_signer: The signer, or None.

    Raises:
        ConfigurationError: Backends and policies do not fit together.
    """

    def __init__(
        self,
        backends: Mapping[str, StorageBackend],
        policies: Mapping[str, StoragePolicy],
        *,
        lifecycle: Lifecycle,
        pace: Pace | None = None,
        url_signer: UrlSigner | None = None,
    ) -> None:
        _require_mapping("backends", backends)
        _require_mapping("policies", policies)
        for key, backend in backends.items():
            _require_backend(key, backend)
        for key, policy in policies.items():
            _require_policy(key, policy, backends)
        self.backends: Mapping[str, StorageBackend] = MappingProxyType(dict(backends))
        self.policies: Mapping[str, StoragePolicy] = MappingProxyType(dict(policies))
        self.url_signer: UrlSigner | None = url_signer
        self._lifecycle = lifecycle
        self._pace = pace
        self._identified: dict[str, SupportsIdentity] = {
            key: backend for key, backend in backends.items() if isinstance(backend, SupportsIdentity)
        }
        load()

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

    def prepare(
        self,
        *,
        storage_key: str,
        content_type: str | None = None,
        original_filename: str | None = None,
        extra: Mapping[str, Any] | None = None,
        **owner: Unpack[Owner],
    ) -> PreparedUpload:
        """Choose the location of an object, and check its metadata; nothing is stored.

        It is for what must know the location before there is anything at it, such as a journal. It is good for one object.
        """
        policy = self.policy(storage_key)
        require_content_type(content_type)
        filename = clean_filename(original_filename)
        location_name = filename
        if policy.accept is not None:  # a web server on a folder goes by the extension, whatever the receipt says
            location_name = load_gate().fit_location(filename, policy.accept)
        if policy.public is not None:
            location_name = load_gate().fit_public(location_name, content_type)
        location = make_location(key_prefix=policy.key_prefix, original_filename=location_name, **owner)
        own_keys = None if extra is None else read_only(extra, "extra")
        return PreparedUpload(policy, location, content_type, filename, own_keys, policy.checks)

    def prepare_variant(
        self, source: str, filename: str, recipe: str, *, storage_key: str, **owner: Unpack[Owner]
    ) -> PreparedUpload:
        """Choose the location of a variant, as `prepare` does; the limits of client uploads do not apply.

        Args:
            source: The location of its original.
            filename: Its name in the location.
            recipe: The digest of its recipe.
            storage_key: The policy of its original.
            owner: The segments of its location.
        """
        prepared = self.prepare(storage_key=storage_key, original_filename=filename, **owner)
        return replace(prepared, original_filename=None, checks=None, source=source, recipe=recipe)

    def prepare_copy(
        self,
        ref: StoredObjectRef,
        *,
        storage_key: str | None = None,
        extra: Mapping[str, Any] | None = None,
        **owner: Unpack[Owner],
    ) -> PreparedUpload:
        """Choose the location of a copy, as `prepare` does; None keeps the policy and the own keys of the ref."""
        with self._lifecycle.call(), self._at(ref) as source:
            # What a backend itself wrote into `extra` would be untrue of a copy elsewhere.
            own_keys = source.extra_keys if isinstance(source, SupportsExtraKeys) else frozenset[str]()
        if extra is None:
            extra = {key: value for key, value in (ref.extra or {}).items() if key not in own_keys}
        prepared = self.prepare(
            storage_key=storage_key or ref.storage_key,
            content_type=ref.content_type,
            original_filename=ref.original_filename,
            extra=extra,
            **owner,
        )
        return prepared.as_copy_of(ref)

    @traced("put")
    async def put(
        self,
        prepared: PreparedUpload,
        content: BytesLike | ByteSource,
        *,
        size: int | None = None,
        checksum: str | None = None,
    ) -> StoredObjectRef:
        """Store bytes or a stream, whose size and checksum are verified where they are declared."""
        if size is not None:
            require_declared_size(size)
            require_size(size, prepared.max_size)
        if isinstance(content, bytes | bytearray | memoryview):
            return await self._put_bytes(prepared, cast(BytesLike, content), size, checksum)
        limited = ManagedStream(content, prepared.max_size)
        stream = limited if self._pace is None else PacedStream(limited, self._pace)
        try:
            async with self._lifecycle.upload(stream.begin if isinstance(stream, PacedStream) else None):
                if prepared.checks is None:
                    return await self._store(prepared, MeasuredStream(stream, size=size, checksum=checksum))
                expected = expected_size(content) if size is None else size
                if prepared.checks.strip is None:
                    pieces: Pieces = regroup(stream)
                else:  # what is declared is true of what comes in, not of what is stored
                    pieces, size, checksum = MeasuredStream(stream, size=size, checksum=checksum), None, None
                gate = load_gate().Gate(pieces, prepared.checks, replace(prepared.preview, size=expected))
                return await self._store_judged(prepared, gate, size, checksum)
        except BaseException:
            await stream.aclose()
            raise

    async def _store_judged(
        self, prepared: PreparedUpload, gate: Gate, size: int | None, checksum: str | None
    ) -> StoredObjectRef:
        try:
            await gate.begin()
            return await self._store(prepared, MeasuredStream(gate, size=size, checksum=checksum), gate)
        except BaseException:
            await gate.aclose()
            raise

    async def copy(self, ref: StoredObjectRef, prepared: PreparedUpload) -> StoredObjectRef:
        """Copy an object, on the server where source and target share a backend that can."""
        source = self.backend(ref.backend)
        require_size(ref.size, prepared.policy.max_size)
        try:
            checks = prepared.checks
            if checks is not None and checks.is_only_validation:
                await self._validate_copy(ref, prepared, checks)
                prepared = replace(prepared, checks=None)
            if prepared.checks is None and prepared.policy.backend_key == ref.backend and isinstance(source, SupportsCopy):
                return await self._copy_on_server(ref, source, prepared)
            return await self._copy_through(ref, prepared)
        except ObjectNotFoundError as error:
            await explain_missing(error, ref, source)
            raise

    def open(self, ref: StoredObjectRef, *, offset: int = 0, length: int | None = None, verify: bool = False) -> OpeningReader:
        """Return what opens an object, or a range of one, when it is awaited or entered."""
        return OpeningReader(partial(self._open, ref, offset, length, verify))

    @traced("open")
    async def _open(self, ref: StoredObjectRef, offset: int, length: int | None, verify: bool) -> StoredObjectReader:
        async def open_range(start: int, count: int | None) -> ObjectReader:
            with self._lifecycle.call(), self._at(ref) as backend:
                return await backend.open(ref.location, offset=start, length=count)

        require_ref(ref)
        with self._lifecycle.call():
            try:
                reader = await StoredObjectReader(ref, open_range, offset=offset, length=length, verify=verify).start()
            except ObjectNotFoundError as error:
                await explain_missing(error, ref, self.backend(ref.backend))
                raise
            self._lifecycle.track(reader)
        return reader

    async def get(self, ref: StoredObjectRef) -> bytes:
        """Return all bytes of an object, verified."""
        with self._lifecycle.call():
            async with self.open(ref, verify=True) as reader:
                return await reader.read()

    async def scan(self, ref: StoredObjectRef) -> StoredObjectRef:
        """Have an object scanned by the scanner of its policy; return the ref with the verdict."""
        require_ref(ref)
        policy = self.policy(ref.storage_key)
        if policy.scanner is None:
            raise ConfigurationError(
                f"the policy {policy.storage_key!r} has no scanner, so its objects cannot be scanned: give it one, with"
                " StoragePolicy(..., scanner=...)"
            )
        with self._lifecycle.call():
            async with self.open(ref, verify=True) as reader, aclosing(regroup(aiter(reader))) as pieces:
                verdict = await scan_stored(policy.scanner, pieces)
        return type(ref).from_dict({**ref.to_dict(), "scan": verdict})

    async def exists(self, ref: StoredObjectRef) -> bool:
        """Return whether an object is there."""
        with self._lifecycle.call(), self._at(ref) as backend:
            return await backend.exists(ref.location)

    async def stat(self, ref: StoredObjectRef) -> ObjectInfo:
        """Return what the backend knows of an object."""
        with self._lifecycle.call(), self._at(ref) as backend:
            try:
                return await backend.stat(ref.location)
            except ObjectNotFoundError as error:
                await explain_missing(error, ref, backend)
                raise

    async def list(
        self, storage_key: str, prefix: str = "", *, start_after: str | None = None
    ) -> AsyncGenerator[ObjectInfo, None]:
        """Yield the objects of a policy whose locations continue with `prefix` after the policy's own prefix."""
        policy = self.policy(storage_key)
        with self._lifecycle.call():  # closing the manager waits for calls, not for an iteration that may never end
            whole = prefix if policy.key_prefix is None else f"{policy.key_prefix}/{prefix}"
            objects = self.backend(policy.backend_key).iter_objects(whole, start_after=start_after)
        async with closing_listing(objects):
            with self._attribute_errors(policy.backend_key):
                async for info in objects:
                    yield info

    async def delete(self, ref: StoredObjectRef, *, while_closing: bool = False) -> None:
        """Delete an object; a missing object is not an error.

        Args:
            ref: The object.
            while_closing: Whether closing waits for this call, too, where it has begun: nothing else deletes what a rollback
                leaves.
        """
        with self._lifecycle.call(while_closing=while_closing), self._at(ref) as backend:
            await backend.delete(ref.location)

    async def delete_many(self, backend_key: str, locations: Sequence[str]) -> Mapping[str, StorageError]:
        """Delete the objects at locations of one backend, in batches if it can; return the failures with their errors."""
        for location in locations:
            check_location(location)
        with self._lifecycle.call(), self._attribute_errors(backend_key) as backend:
            failures: Mapping[str, StorageError]
            if not isinstance(backend, SupportsBatchDelete):
                failures = await delete_each(locations, backend.delete, StorageError)
            else:
                try:
                    failures = await backend.delete_many(locations)
                except StorageError as failure:
                    failures = dict.fromkeys(locations, failure)
        for error in failures.values():
            if isinstance(error, BackendError):
                error.backend = error.backend or backend_key
        return failures

    async def delete_upload(self, backend_key: str, location: str, upload_id: str | None = None) -> None:
        """Delete the object at a location without a ref, and the remains of an interrupted upload there.

        Args:
            backend_key: The backend's key.
            location: The address.
            upload_id: The id of a multipart upload that was begun there, where one is known.
        """
        check_location(location)
        with self._lifecycle.call(), self._attribute_errors(backend_key) as backend:
            await backend.delete(location)
            if isinstance(backend, SupportsAbort):
                await backend.abort_upload(location, upload_id)

    async def identity(self, backend_key: str) -> str | None:
        """Return the identity of a backend's store, created at its first use; None if the store cannot keep one."""
        with self._lifecycle.call(), self._attribute_errors(backend_key):
            return await self._current_identity(backend_key)

    def public_url(self, ref: StoredObjectRef) -> str:
        """Return the URL at which anyone can read an object of a public policy."""
        require_ref(ref)
        policy = self.policy(ref.storage_key)
        if policy.public is None:
            raise ConfigurationError(
                f"the policy {policy.storage_key!r} is not public: sign a URL with 'await storage.url(...)', or pass"
                " public=PublicURL('https://...') to the policy",
                see=Page.PUBLIC_FILES,
            )
        if policy.backend_key != ref.backend:
            raise ConfigurationError(
                f"the object at {ref.location!r} is in the backend {ref.backend!r}, and the public URLs of the policy"
                f" {policy.storage_key!r} are those of {policy.backend_key!r}: migrate it first",
                see=Page.PUBLIC_FILES,
            )
        require_scanned(ref)
        check_location(ref.location)
        return policy.public.url_of(ref.location)

    @traced("url")
    async def urls(
        self,
        refs: Iterable[StoredObjectRef],
        *,
        expires_in: timedelta,
        disposition: Disposition,
        filename: str | None = None,
        stable_for: timedelta | None = None,
    ) -> builtins.list[str]:
        """Return URLs with which any client can read objects until they expire, in the order of the refs."""
        wanted = list(refs)
        places: dict[str, list[int]] = {}
        require_timedelta("expires_in", expires_in)
        if stable_for is not None:
            require_timedelta("stable_for", stable_for)
        for place, ref in enumerate(wanted):
            require_ref(ref)
            check_location(ref.location)
            places.setdefault(ref.backend, []).append(place)
        found: dict[int, str] = {}
        with self._lifecycle.call():
            for key, chosen in places.items():
                with self._attribute_errors(key) as backend:
                    urls = await signed_urls(
                        backend,
                        self.url_signer,
                        [wanted[place] for place in chosen],
                        expires_in=expires_in,
                        disposition=disposition,
                        filename=filename,
                        stable_for=stable_for,
                    )
                found.update(zip(chosen, urls, strict=True))
        return [found[place] for place in range(len(wanted))]

    async def upload_request(
        self, prepared: PreparedUpload, *, expires_in: timedelta, min_size: int, max_size: int
    ) -> UploadRequest | None:
        """Return a request with which a client stores an object directly in its backend; None if that signs none.

        What a client stores by it is not verified.

        Args:
            prepared: Where, and of which media type.
            expires_in: How long the request works.
            min_size: The fewest bytes that it may bring.
            max_size: The most bytes.

        Raises:
            ContentTooLargeError: The backend takes no request with so many bytes.
            ValueError: It cannot hold a client to this.
            BackendError: The backend could not sign.
        """
        with self._lifecycle.call(), self._attribute_errors(prepared.policy.backend_key) as backend:
            if not isinstance(backend, SupportsPresignedUpload):
                return None
            content_type = prepared.content_type or _OPAQUE
            if prepared.policy.public is not None:
                content_type = _OPAQUE  # it is not judged yet, and readable for all who know its location
            return await backend.presign_upload(
                prepared.location, expires_in=expires_in, content_type=content_type, min_size=min_size, max_size=max_size
            )

    async def close_backends(self) -> None:
        """Close what the backends have opened on this event loop."""
        for key, backend in self.backends.items():
            await shielded_cleanup(backend.aclose(), f"closing the backend {key!r}")

    async def _current_identity(self, backend_key: str) -> str | None:
        """Return the identity of a store for new refs, created at its first use; no upload fails for lack of one."""
        backend = self._identified.get(backend_key)
        if backend is None:
            return None
        try:
            return next(iter(await backend.identities(create=True)), None)
        except (BackendUnavailableError, ConfigurationError):
            return None  # the write fails for the same reason, and its error says so
        except StorageError as error:
            self._identified.pop(backend_key, None)
            logger.warning(
                "the identity of the backend %r could not be written, so new refs do not record their store: %s",
                backend_key,
                error,
                extra=fields_of(backend=backend_key),
            )
            return None

    def _at(self, ref: StoredObjectRef) -> _AttributedErrors:
        """Yield the backend that a ref names, after checking the ref and its location."""
        require_ref(ref)
        check_location(ref.location)
        return self._attribute_errors(ref.backend)

    def _attribute_errors(self, backend_key: str) -> _AttributedErrors:
        """Yield a backend, and add its key to the errors that it raises, because a backend does not know its own key."""
        return _AttributedErrors(backend_key, self.backend(backend_key))

    async def _put_bytes(
        self, prepared: PreparedUpload, content: BytesLike, size: int | None, declared: str | None
    ) -> StoredObjectRef:
        require_size(size_of(content), prepared.max_size)
        if size is not None and size != size_of(content):
            raise size_mismatch(size, size_of(content))
        expected = None if declared is None else canonical_checksum(declared)
        key = prepared.policy.backend_key
        with self._lifecycle.call():
            if expected is not None:  # of what comes in, before it is stripped
                content, actual = await fingerprint(content)
                require_checksum(expected, actual)
            if prepared.checks is not None:
                content, verdict = await load_gate().judge_bytes(content, prepared.checks, prepared.preview)
                prepared = prepared.judged(verdict)
            data, checksum = await fingerprint(content)
            with self._attribute_errors(key) as backend:
                identity = await self._current_identity(key)
                with _stored_headers(prepared) as content_type:
                    details = await backend.put_bytes(prepared.location, data, content_type=content_type)
            return await self._receipt(prepared, len(data), checksum, details, identity)

    async def _store(self, prepared: PreparedUpload, content: MeasuredStream, gate: Gate | None = None) -> StoredObjectRef:
        """Store a stream; nothing is awaited between publication and receipt, so no cancellation can separate the two."""
        key = prepared.policy.backend_key
        judged = prepared if gate is None else prepared.judged(gate.verdict)
        try:
            with self._attribute_errors(key) as backend:
                identity = await self._current_identity(key)
                with _stored_headers(judged) as content_type:
                    details = await backend.put_stream(prepared.location, content, content_type=content_type)
        except BaseException:
            await content.aclose()
            raise
        if content.checksum is None:
            await content.aclose()
            await self._withdraw(prepared)
            raise BackendError(
                f"the backend {key!r} returned before the stream had ended", backend=key, location=prepared.location
            )
        prepared = prepared if gate is None else prepared.judged(gate.verdict)
        return await self._receipt(prepared, content.size, content.checksum, details, identity)

    async def _receipt(
        self, prepared: PreparedUpload, size: int, checksum: str, details: Mapping[str, Any] | None, identity: str | None
    ) -> StoredObjectRef:
        try:
            return prepared.receipt(size, checksum, details, identity)
        except Exception:
            await self._withdraw(prepared)
            raise

    async def _withdraw(self, prepared: PreparedUpload) -> None:
        """Delete an object for which no receipt is returned."""
        backend = self.backends[prepared.policy.backend_key]
        await shielded_cleanup(
            backend.delete(prepared.location), f"deleting the object {prepared.location!r}, which has no receipt"
        )

    async def _validate_copy(self, ref: StoredObjectRef, prepared: PreparedUpload, checks: Checks) -> None:
        async with self.open(ref, length=HEAD_SIZE) as reader:
            head = await reader.read()
        await load_gate().validate(checks, replace(prepared.preview, head=head, size=ref.size))

    async def _copy_on_server(self, ref: StoredObjectRef, backend: SupportsCopy, prepared: PreparedUpload) -> StoredObjectRef:
        with self._lifecycle.call(), self._at(ref) as storage:
            require_recorded_size(ref, (await storage.stat(ref.location)).size)
            identity = await self._current_identity(ref.backend)
            with _stored_headers(prepared):
                details = await backend.copy(ref.location, prepared.location)
            return await self._receipt(prepared, ref.size, ref.checksum, details, identity)

    async def _copy_through(self, ref: StoredObjectRef, prepared: PreparedUpload) -> StoredObjectRef:
        async with self._lifecycle.upload():
            reader = await self.open(ref)
            try:
                content = MeasuredStream(aiter(reader), size=ref.size, checksum=ref.checksum or None)
                if prepared.checks is None:
                    copy = await self._store(prepared, content)
                else:
                    gate = load_gate().Gate(content, prepared.checks, replace(prepared.preview, size=ref.size))
                    copy = await self._store_judged(prepared, gate, None, None)
            except BaseException:
                await reader.aclose()
                raise
            # Iterating to the end has released the handle.
            return copy


class _AttributedErrors:
    """Yields a backend, and adds its key to the errors that it raises."""

    __slots__ = ("_backend", "_key")

    def __init__(self, key: str, backend: StorageBackend) -> None:
        self._key = key
        self._backend = backend

    def __enter__(self) -> StorageBackend:
        return self._backend

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, BackendError):
            error.backend = error.backend or self._key


@contextmanager
def _stored_headers(prepared: PreparedUpload) -> Iterator[str | None]:
    """Set the headers that a public policy stores, during a write or a copy; yield the media type to store."""
    public, content_type, headers = prepared.policy.public, prepared.content_type, None
    if public is not None:
        disposition = content_disposition(public.disposition, prepared.original_filename, content_type)
        content_type = served_type(content_type)
        headers = ObjectHeaders(content_type, disposition, public.cache_control, public.acl)
    token = object_headers.set(headers)  # None, too: a stream may store another object while it is read
    try:
        yield content_type
    finally:
        object_headers.reset(token)


def _require_mapping(argument: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{argument} must be a mapping by key, not a {type(value).__name__}", see=Page.MANAGER)


def require_seconds(argument: str, value: object) -> None:
    """Raise `ConfigurationError` unless the value is a number of seconds."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ConfigurationError(f"{argument} must be a number of seconds, not {value!r}")


def require_positive(argument: str, value: object) -> None:
    """Raise `ConfigurationError` unless the value is None or a number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{argument} must be a number of at least 1, or None, not {value!r}")


def _require_backend(key: object, backend: object) -> None:
    if not isinstance(key, str) or not key:
        raise ConfigurationError(f"a backend's key must be a non-empty string, not {key!r}")
    if isinstance(backend, type):
        raise ConfigurationError(f"the backend {key!r} is the class {backend.__name__}, not an instance of it", see=Page.MANAGER)
    if not isinstance(backend, StorageBackend):
        raise ConfigurationError(
            f"the backend {key!r} is a {type(backend).__name__}, which is not a StorageBackend", see=Page.MANAGER
        )


def _require_policy(key: object, policy: object, backends: Mapping[str, StorageBackend]) -> None:
    if not isinstance(policy, StoragePolicy):
        raise ConfigurationError(f"the policy {key!r} is a {type(policy).__name__}, not a StoragePolicy", see=Page.MANAGER)
    if key != policy.storage_key:
        raise ConfigurationError(
            f"the policy under the key {key!r} has the storage key {policy.storage_key!r}: use the same name for both",
            see=Page.MANAGER,
        )
    if policy.backend_key not in backends:
        raise UnknownBackendError(
            f"the policy {key!r} names the backend {policy.backend_key!r}, which does not exist (there are: "
            f"{', '.join(sorted(backends)) or 'none'})"
        )


def require_ref(ref: object) -> None:
    """Raise `InvalidReferenceError` unless the value is a ref."""
    if not isinstance(ref, StoredObjectRef):
        raise InvalidReferenceError(
            f"expected a StoredObjectRef, not {type(ref).__name__}: convert a mapping with StoredObjectRef.from_dict"
        )
