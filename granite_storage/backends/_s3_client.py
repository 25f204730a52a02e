"""The one place that makes requests of an S3 server.

A request waits for its turn among `max_pool_connections`, is made again after a passing failure, and raises the library's
errors. Nothing else in the backend retries a request or sees an error of the SDK. Each event loop has a client of its own: it is
opened when first needed, off the loop where possible, and shared by every call.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import logging
import math
import random
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from granite_storage._threads import ThreadPool
from granite_storage.backends._identity import AMAZON_DOMAINS
from granite_storage.backends._resuming import ConnectionTakenError
from granite_storage.backends._s3_errors import ExpiredCredentialsError, S3ConfigurationError, translate
from granite_storage.backends._sigv4 import Credentials, QuerySigner, timestamp
from granite_storage.backends.base import PresignRequest
from granite_storage.exceptions import BackendError, BackendUnavailableError, ObjectNotFoundError

logger = logging.getLogger("granite_storage")

threads = ThreadPool("granite-s3", 4)

_FIRST_BACKOFF = 0.2
_LONGEST_BACKOFF = 10.0
_EVERYWHERE = frozenset({"ExpectedBucketOwner", "RequestPayer", "SSECustomerAlgorithm", "SSECustomerKey", "SSECustomerKeyMD5"})
_CANCEL_TIMEOUT = 5.0
_SDKS = ("aioboto3", "aiobotocore")
_MODELS = ("service-2", "endpoint-rule-set-1")
_TABLES = ("_retry", "endpoints", "partitions", "sdk-default-configuration")
# How long a reader is not read before its connection is taken for a call that waits.
_IDLE_SECONDS = 1.0
# How long a call waits before it takes the connection of a reader between two reads, however short the time between them.
_OVERDUE_SECONDS = 1.0
_CHECK_SECONDS = 0.05
# How long what was learned of the SDK's signer counts: a redirect to another region changes it, for one.
_RELEARN_SECONDS = 60.0
_LEARNING_ATTEMPTS = 3
# What no location is called, and no encoding changes.
_PROBE_KEY = ".granite-presigned"
# How many URLs are signed in one turn of the event loop: about 2 ms.
_URLS_IN_A_TURN = 128


# Connections.
#
# A reader holds a connection for as long as it is open, but uses it only while it is read. Clients that do not read would
# so hold up every other call. So a call that waits takes the connection of a reader that is not being read: the reader goes
# on with another request where it was.


class Lease:
    """One of the connections that may be in use at a time, with the body that is read from it; see `_remote.Body`.

    Attributes:
        body: The body, where there is one.
        idle_since: Since when a reader that holds it has not been reading, by the loop's clock; None while it is in use.
    """

    __slots__ = ("__weakref__", "_loop", "_pool", "body", "idle_since")

    def __init__(self, pool: ConnectionPool) -> None:
        self.body: Any = None
        self.idle_since: float | None = None
        self._pool: ConnectionPool | None = pool
        self._loop = asyncio.get_running_loop()

    def lend(self) -> None:
        """Mark it as held by a reader: a waiting call may take the connection, except during `read`."""
        if self._pool is not None:
            self.idle_since = self._loop.time()
            self._pool.readers.add(self)

    async def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes of the body."""
        if self._pool is None:  # the connection is another call's
            raise ConnectionTakenError
        self.idle_since = None
        try:
            chunk: bytes = await self.body.read(size)
            return chunk
        finally:
            if self._pool is not None:
                self.idle_since = self._loop.time()
                self._pool.serve_overdue()

    def release(self) -> None:
        """Return the connection to the pool, which replaces it if bytes are still to come on it; idempotent."""
        pool, self._pool = self._pool, None
        if pool is not None:
            self.idle_since = None
            pool.end(self.body)
            self.body = None

    async def aclose(self) -> None:
        """Release it."""
        self.release()

    def __del__(self) -> None:
        if self._pool is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._pool.end, self.body)


class ConnectionPool:
    """Bounds the connections in use; further calls wait for one, in the order in which they came.

    Args:
        size: How many.
        timeout: The longest wait, in seconds.
        bucket: The bucket's name, for messages.

    Attributes:
        readers: The leases that readers hold.
    """

    def __init__(self, size: int, *, timeout: float, bucket: str) -> None:
        self.readers: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._free = size
        self._timeout = timeout
        self._bucket = bucket
        self._waiting: deque[_Waiter] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def lease(self) -> Lease:
        """Wait for a connection.

        Raises:
            BackendUnavailableError: None became free in time.
        """
        if self._free:
            self._free -= 1
            return Lease(self)
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop.create_future(), loop.time())
        self._waiting.append(waiter)
        if self._timer is None:
            self._take_idle()
        try:
            async with asyncio.timeout(self._timeout):
                await waiter.turn
        except BaseException as error:
            self._leave(waiter)
            if not isinstance(error, TimeoutError):
                raise
            raise BackendUnavailableError(
                f"none of the connections to bucket {self._bucket!r} became free within {self._timeout:g} s: "
                "raise max_pool_connections or pool_timeout"
            ) from error
        return Lease(self)

    def end(self, body: Any) -> None:
        """Close what is left of a body, and let the next call have its connection."""
        if body is not None:
            body.close()
        while self._waiting:
            turn = self._waiting.popleft().turn
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    def serve_overdue(self) -> None:
        """Take the connection of a reader that has just been read, where a call has waited for too long."""
        if self._waiting and asyncio.get_running_loop().time() - self._waiting[0].began >= _OVERDUE_SECONDS:
            self._take_idle()

    def _take_idle(self) -> None:
        """Take connections of readers that are not being read, one for each call that waits; check again while one waits."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        idle = sorted((lease.idle_since, id(lease), lease) for lease in self.readers if lease.idle_since is not None)
        for since, _, lease in idle:
            if not self._waiting:
                break
            if now - since < _IDLE_SECONDS and now - self._waiting[0].began < _OVERDUE_SECONDS:
                break
            lease.release()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(_CHECK_SECONDS, self._take_idle) if self._waiting else None

    def _leave(self, waiter: _Waiter) -> None:
        """Stop waiting, and pass on a connection that arrived at the same moment."""
        if waiter in self._waiting:
            self._waiting.remove(waiter)
        elif not waiter.turn.cancelled():
            self.end(None)


class _Waiter(NamedTuple):
    """A call that waits for a connection.

    Attributes:
        turn: Done when it has one.
        began: Since when it has waited, by the loop's clock.
    """

    turn: asyncio.Future[None]
    began: float


class ServerTraits:
    """What is known of the server behind a backend: some silently ignore a condition or a checksum.

    Args:
        bucket: The bucket's name, for the log.
        conditional_writes: What the backend was told; None to find it out.

    Attributes:
        bucket: The bucket's name.
        sends_conditions: Whether writes have a condition.
        checks_completions: Whether the server honours the condition of a CompleteMultipartUpload; None while that is unknown.
        asking: Whether a probe of that is in progress.
        warned_of_end: The end of the temporary credentials of which the log has warned last.
    """

    def __init__(self, bucket: str, conditional_writes: bool | None) -> None:
        self.bucket = bucket
        self.sends_conditions: bool = conditional_writes is not False
        self.checks_completions: bool | None = conditional_writes
        self.asking = False
        self.warned_of_end: datetime | None = None
        self._confirms_checksums = True

    def note_checksum(self, answer: Mapping[str, Any]) -> None:
        """Warn once if an answer to a write does not confirm the SHA-256 that was sent."""
        if self._confirms_checksums and not answer.get("ChecksumSHA256"):
            self._confirms_checksums = False
            logger.warning(
                "the S3 server of bucket %r does not confirm the SHA-256 of what is written, and may not have verified it: pass "
                "checksums=False to send Content-MD5, which older servers verify; the checksum in each ref is not affected",
                self.bucket,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Settings:
    """The checked arguments of `S3StorageBackend`, whose docstring describes them."""

    bucket: str
    prefix: str
    session: Any = field(repr=False)
    client_kwargs: Mapping[str, Any] = field(repr=False)
    presign_endpoint_url: str | None = field(default=None, repr=False)
    config: Any = field(repr=False)
    extra_put_kwargs: Mapping[str, Any] = field(repr=False)
    part_size: int
    part_concurrency: int
    max_parts_in_memory: int
    max_pool_connections: int
    conditional_writes: bool | None
    checksums: bool
    max_attempts: int
    connect_timeout: float
    read_timeout: float
    pool_timeout: float
    list_by_folder: bool | None

    def key(self, location: str) -> str:
        """Return the key of a location in the bucket."""
        return self.prefix + location


class S3Client:
    """A client on its event loop.

    Attributes:
        closed: Whether it has been closed.
        raw: The SDK's client.
        signer: The SDK's client that presigns: the same, or one for the address by which browsers reach the server.
        settings: What the backend was given.
        traits: What is known of the server.
        room: How many more parts of streams may be in memory.
    """

    def __init__(
        self, raw: Any, session: Any, settings: S3Settings, traits: ServerTraits, *, signer: Any, pool_size: int
    ) -> None:
        self.closed = False
        self.raw = raw
        self.signer = signer
        self.settings = settings
        self.traits = traits
        self.room = asyncio.Semaphore(settings.max_parts_in_memory)
        self._session = session
        self._connections = ConnectionPool(pool_size, timeout=settings.pool_timeout, bucket=settings.bucket)
        self._refreshing = asyncio.Lock()
        self._refreshes = 0
        self._bucket_seen = False
        self._learned: dict[bool, tuple[float, QuerySigner | None]] = {}

    async def call(self, operation: str, *, location: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Make a request in the bucket, again after a passing failure, and return the SDK's answer.

        Its `ResponseMetadata["RetryAttempts"]` tells how often it was made again: what an earlier attempt did is not known.

        Args:
            operation: The name of the SDK's method.
            location: The object's location; it becomes the `Key`.
            **parameters: The SDK's parameters, without `Bucket` and `Key`.

        Raises:
            BackendError: What `translate` says of the last failure.
        """
        response, lease = await self.start(operation, location=location, **parameters)
        lease.release()
        return response

    async def start(self, operation: str, *, location: str | None = None, **parameters: Any) -> tuple[dict[str, Any], Lease]:
        """Do as `call` does, but leave the connection in use: the caller reads the body and releases the lease."""
        request = self._completed(operation, location, parameters)
        refreshes: int | None = self._refreshes  # None once the request was made with fresh credentials
        retries = 0
        while True:
            lease = await self._connections.lease()
            try:
                response = await self._send(operation, request)
            except Exception as error:  # noqa: BLE001  # translate tells what it is
                lease.release()
                problem = translate(error, operation, bucket=self.settings.bucket, location=location)
                try:
                    if isinstance(problem, ExpiredCredentialsError):
                        if refreshes is None or not await self._refresh_credentials(refreshes):
                            raise problem from error
                        refreshes = None
                    elif isinstance(problem, BackendUnavailableError) and retries + 1 < self.settings.max_attempts:
                        await asyncio.sleep(backoff(retries + 1))
                    else:
                        raise problem from error
                    retries += 1
                finally:
                    del problem  # otherwise its traceback would keep this frame alive, and with it the body
            except BaseException:
                lease.release()
                raise
            else:
                metadata = response["ResponseMetadata"]
                metadata["RetryAttempts"] = metadata.get("RetryAttempts", 0) + retries
                self._bucket_seen = True
                lease.body = response.get("Body")
                return response, lease

    async def head(self, location: str, **parameters: Any) -> dict[str, Any]:
        """Ask for an object's headers.

        Raises:
            ObjectNotFoundError: There is no object.
            S3ConfigurationError: There is no bucket; a HEAD's answer does not tell one from the other, so it is asked once.
        """
        try:
            return await self.call("head_object", location=location, **parameters)
        except ObjectNotFoundError:
            await self._require_bucket()
            raise

    def supports(self, operation: str, parameter: str) -> bool:
        """Return whether the SDK's operation takes a parameter; not all of its versions know all of them."""
        model = self.raw.meta.service_model.operation_model(self.raw.meta.method_to_api_mapping[operation])
        return parameter in model.input_shape.members

    async def presigned(self, requests: Sequence[PresignRequest]) -> list[str]:
        """Return the URLs of requests, signed here where that gives the same as the SDK's signer, and else by that.

        Raises:
            S3ConfigurationError: One is for a time that is past, for which only Signature Version 4 can sign.
        """
        if not requests:
            return []
        own = await self._own_signer()
        urls: list[str] = []
        now = int(time.time())
        for request in requests:
            if own is None:
                urls.append(await self._presigned_by_sdk(request))
                continue
            signer, credentials = own
            date = timestamp(now if request.signed_at is None else request.signed_at)
            key, expires = self.settings.key(request.location), int(request.expires_in.total_seconds())
            urls.append(signer.sign(key, credentials, date, expires, request.content_type, request.disposition))
            if not len(urls) % _URLS_IN_A_TURN:
                await asyncio.sleep(0)
        return urls

    async def _own_signer(self) -> tuple[QuerySigner, Credentials] | None:
        """Return a signer that signs as the SDK does, with its current credentials; None if there is none."""
        held = getattr(getattr(self.signer, "_request_signer", None), "_credentials", None)
        if held is None:
            return None
        credentials: Credentials = await held.get_frozen_credentials()
        learned_at, signer = self._learned.get(credentials.token is not None, (-math.inf, None))
        now = time.monotonic()
        for _ in range(_LEARNING_ATTEMPTS):
            if now - learned_at < _RELEARN_SECONDS:
                break
            url = await self._presigned_by_sdk(PresignRequest("", timedelta(minutes=1)), key=_PROBE_KEY)
            before, credentials = credentials, await held.get_frozen_credentials()
            if before == credentials:  # otherwise they were refreshed meanwhile
                learned_at, signer = now, QuerySigner.learn(url, _PROBE_KEY, credentials)
                self._learned[credentials.token is not None] = learned_at, signer
        return None if signer is None else (signer, credentials)

    async def _presigned_by_sdk(self, request: PresignRequest, *, key: str | None = None) -> str:
        if request.signed_at is not None:
            raise S3ConfigurationError(
                "stable_for needs URLs that are signed by Signature Version 4 (s3v4) in the query, which this client of the SDK"
                " does not make: leave stable_for out, or remove signature_version from the client's config and hooks from its"
                " signing"
            )
        parameters = {"Bucket": self.settings.bucket, "Key": key or self.settings.key(request.location)}
        if request.content_type is not None:
            parameters["ResponseContentType"] = request.content_type
        if request.disposition is not None:
            parameters["ResponseContentDisposition"] = request.disposition
        url: str = await self.signer.generate_presigned_url(
            "get_object", Params=parameters, ExpiresIn=int(request.expires_in.total_seconds())
        )
        return url

    def end_of_credentials(self) -> datetime | None:
        """Return when the credentials that signed last expire; None if they do not, or the SDK does not know."""
        credentials = getattr(getattr(self.signer, "_request_signer", None), "_credentials", None)
        end: datetime | None = getattr(credentials, "_expiry_time", None)
        return end

    def http_sessions(self) -> Iterator[Any]:
        """Yield the HTTP sessions under the SDK's client, as far as they can be found."""
        endpoint = getattr(self.raw, "_endpoint", None)
        sessions = getattr(getattr(endpoint, "http_session", None), "_sessions", None)
        yield from (sessions or {}).values()  # aiobotocore 3 has None there once it is closed

    def _completed(self, operation: str, location: str | None, parameters: Mapping[str, Any]) -> dict[str, Any]:
        request: dict[str, Any] = {"Bucket": self.settings.bucket, **parameters}
        if location is not None:
            request["Key"] = self.settings.key(location)
        for name in _EVERYWHERE & self.settings.extra_put_kwargs.keys():
            if self.supports(operation, name):
                request.setdefault(name, self.settings.extra_put_kwargs[name])
        return request

    async def _send(self, operation: str, request: Mapping[str, Any]) -> dict[str, Any]:
        method: Callable[..., Awaitable[dict[str, Any]]] = getattr(self.raw, operation)
        body = request.get("Body")
        if body is None:
            return await method(**request)
        payload = body.payload()
        if payload is not body:
            return await method(**{**request, "Body": payload})
        async with body.watched(self.settings.read_timeout):
            return await method(**request)

    async def _refresh_credentials(self, refreshes: int) -> bool:
        """Refresh expired credentials, once for all calls that failed by them; return whether that was possible."""
        if self.settings.client_kwargs.get("aws_access_key_id"):
            return False
        async with self._refreshing:
            if self._refreshes == refreshes:
                try:
                    await (await self._session.get_credentials())._protected_refresh(is_mandatory=True)
                except Exception:  # noqa: BLE001  # they cannot be refreshed: the caller raises what the server said
                    return False
                self._refreshes += 1
        return True

    async def _require_bucket(self) -> None:
        if self._bucket_seen:
            return
        try:
            await self.call("head_bucket")
        except ObjectNotFoundError as error:
            bucket = self.settings.bucket
            raise S3ConfigurationError(
                f"there is no bucket {bucket!r}: check the name, the endpoint_url and the region_name"
            ) from error
        except BackendError:
            self._bucket_seen = True  # it cannot be asked, for lack of a permission perhaps; the next error will tell


def backoff(attempt: int) -> float:
    """Return how long to wait after the n-th failed attempt, in seconds: doubling, bounded, with jitter."""
    longest = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2.0 ** (attempt - 1))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311  # it spreads the load and keeps no secret


def version_of(answer: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameter that names the version that an answer speaks of, nothing in a bucket without versions."""
    version = answer.get("VersionId")
    return {"VersionId": version} if version and version != "null" else {}


# One client for each event loop.


class S3Clients:
    """Opens a client for each event loop that calls, and closes it with the loop or before.

    A client lives in an asynchronous generator, which the loop closes when `asyncio.run` ends; so one that was not closed
    leaves no connection behind.
    """

    def __init__(self, settings: S3Settings) -> None:
        self._settings = settings
        self._loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopState] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self._preparing = threading.Lock()
        self._session = settings.session
        self._traits = ServerTraits(settings.bucket, settings.conditional_writes)

    async def get(self) -> S3Client:
        """Return the running loop's client; the first of several calls at once opens it."""
        state = self._here()
        async with state.opening:
            if state.client is None or state.client.closed:
                state.client = await self._open(state)
            return state.client

    async def aclose(self) -> None:
        """Close the running loop's client, and drop those whose loops are closed."""
        state = self._here()
        async with state.opening:
            state.client = None
            if state.life is not None:
                life, state.life = state.life, None
                await life.aclose()

    def _here(self) -> _LoopState:
        loop = asyncio.get_running_loop()
        state = self._loops.get(loop)
        if state is None:
            with self._lock:
                for closed in [other for other in self._loops if other.is_closed()]:
                    self._loops.pop(closed).discard()
                state = self._loops.setdefault(loop, _LoopState())
        return state

    async def _open(self, state: _LoopState) -> S3Client:
        try:
            session, config = await threads.run(self._prepare, cancel_timeout=_CANCEL_TIMEOUT)
            state.life = _live(session, config, self._settings, self._traits)
            return await anext(state.life)
        except Exception as error:
            raise translate(error, "open", bucket=self._settings.bucket) from error

    def _prepare(self) -> tuple[Any, Any]:
        """Do the slow work once for all loops: import the SDK and read its models, which it caches."""
        with self._preparing:
            if self._session is None:
                self._session = _new_session()
            with contextlib.suppress(ImportError):  # a session of aiobotocore does without
                importlib.import_module("aioboto3.s3.inject")
            _read_models(self._session)
            return self._session, client_config(self._settings)


async def _live(session: Any, config: Any, settings: S3Settings, traits: ServerTraits) -> AsyncGenerator[S3Client, None]:
    """Yield a client and close it. The generator knows nothing of who holds it: dropped, it is closed by its loop at once."""
    open_client = session.create_client if _is_bare(session) else session.client
    async with contextlib.AsyncExitStack() as clients:
        raw = signer = await clients.enter_async_context(
            open_client("s3", **_with_verify(settings.client_kwargs, config), config=config)
        )
        await asyncio.sleep(0)  # so that the first request's own set-up is another turn of the loop
        if settings.presign_endpoint_url is not None:
            kwargs = {**settings.client_kwargs, "endpoint_url": settings.presign_endpoint_url}
            signer = await clients.enter_async_context(open_client("s3", **_with_verify(kwargs, config), config=config))
        elif "endpoint_url" not in settings.client_kwargs:
            _sign_for_the_region(raw, settings.bucket)
        client = S3Client(raw, session, settings, traits, signer=signer, pool_size=config.max_pool_connections)
        try:
            yield client
        finally:
            client.closed = True


def _sign_for_the_region(raw: Any, bucket: str) -> None:
    """Make Amazon's presigned URLs name the bucket's own host in its region.

    The SDK signs them for `bucket.s3.amazonaws.com`, which answers 307 for buckets of other regions: a browser's preflight may
    not follow that, and newer regions refuse the signature. A name with a dot has no host of its own that TLS would accept.
    """
    host = urlsplit(raw.meta.endpoint_url).hostname or ""
    given = raw.meta.config.s3 or {}
    if host.endswith(AMAZON_DOMAINS) and "." not in bucket and "addressing_style" not in given:
        raw.meta.config.s3 = {**given, "addressing_style": "virtual"}


class _LoopState:
    def __init__(self) -> None:
        self.opening = asyncio.Lock()
        self.client: S3Client | None = None
        self.life: AsyncGenerator[S3Client, None] | None = None

    def discard(self) -> None:
        """Drop a client whose loop was closed without closing its generators: nothing can be awaited any more."""
        if self.client is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                for session in self.client.http_sessions():
                    session.detach()
            self.client = self.life = None


def is_installed() -> bool:
    """Return whether there is an SDK."""
    return any(importlib.util.find_spec(name) is not None for name in _SDKS)


def _new_session() -> Any:
    """Return a session of aioboto3 where that is installed, else one of aiobotocore."""
    if importlib.util.find_spec(_SDKS[0]) is not None:
        return importlib.import_module(_SDKS[0]).Session()
    return importlib.import_module("aiobotocore.session").get_session()


def _is_bare(session: Any) -> bool:
    """Return whether a session is one of aiobotocore itself, and not of aioboto3, which has one inside."""
    return hasattr(session, "create_client")


def _with_verify(client_kwargs: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Spare a plain HTTP endpoint the reading of all the certificates, which takes 50 ms of the loop and verifies nothing."""
    plain = str(client_kwargs.get("endpoint_url") or "").startswith("http://")
    if plain and not config.proxies and not getproxies():
        return {"verify": False, **client_kwargs}
    return dict(client_kwargs)


def _read_models(session: Any) -> None:
    """Load what making a client reads from disk; an SDK that keeps it elsewhere reads it later, on the loop."""
    with contextlib.suppress(Exception):
        botocore_session = session if _is_bare(session) else session._session
        loader = botocore_session.get_component("data_loader")
        for model in _MODELS:
            loader.load_service_model("s3", model, api_version=None)
        for table in _TABLES:
            loader.load_data(table)
        botocore_session.get_scoped_config()


def client_config(settings: S3Settings) -> Any:
    """Return the client's configuration: what the caller gave, over what the backend needs."""
    config_class = importlib.import_module("aiobotocore.config").AioConfig
    given = settings.config
    ours = config_class(
        connect_timeout=settings.connect_timeout,
        max_pool_connections=settings.max_pool_connections,
        read_timeout=settings.read_timeout,
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"mode": "standard", "total_max_attempts": 1},
        s3={"payload_signing_enabled": False, "us_east_1_regional_endpoint": "regional"},
        signature_version="s3v4",
    )
    if given is None:
        return ours
    merged = ours.merge(given)
    merged.s3 = {**(given.s3 or ours.s3), "payload_signing_enabled": False}
    for name in ("connector_args", "http_session_cls"):
        if hasattr(given, name):
            setattr(merged, name, getattr(given, name))
    return merged
