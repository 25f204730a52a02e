"""The one place that makes requests of an S3 server.

A request waits for its turn among `max_pool_connections`, is made again after a passing failure, and raises the library's
errors. Nothing else in the backend retries a request or sees an error of the SDK.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from granite_storage._threads import ThreadPool
from granite_storage.backends._s3_errors import ExpiredCredentialsError, S3ConfigurationError, translate
from granite_storage.backends._s3_pool import ConnectionPool, Lease
from granite_storage.backends._s3_traits import ServerTraits
from granite_storage.exceptions import BackendError, BackendUnavailableError, ObjectNotFoundError, StorageError

__all__ = ["S3Client", "S3Settings", "backoff", "threads", "version_of"]

threads = ThreadPool("granite-s3", 4)

_FIRST_BACKOFF = 0.2
_LONGEST_BACKOFF = 10.0
_EVERYWHERE = frozenset({"ExpectedBucketOwner", "RequestPayer", "SSECustomerAlgorithm", "SSECustomerKey", "SSECustomerKeyMD5"})


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Settings:
    """What `S3StorageBackend` was given, checked; its docstring tells the meanings."""

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


@dataclass(slots=True)
class _Retries:
    """How often one request has been made again, and what for.

    Attributes:
        max_attempts: The most attempts.
        refreshes: How often the credentials had been refreshed when the request was first made.
        made: How many more attempts there were.
        refreshed: Whether one of them had fresh credentials.
    """

    max_attempts: int
    refreshes: int
    made: int = 0
    refreshed: bool = False


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
        retries = _Retries(self.settings.max_attempts, self._refreshes)
        while True:
            lease = await self._connections.lease()
            try:
                response = await self._send(operation, request)
            except Exception as error:  # noqa: BLE001  # translate tells what it is
                lease.release()
                problem = translate(error, operation, bucket=self.settings.bucket, location=location)
                try:
                    if not await self._may_try_again(problem, retries):
                        raise problem from error
                finally:
                    del problem  # or its traceback would hold this frame, and the frame the request's body
            except BaseException:
                lease.release()
                raise
            else:
                metadata = response["ResponseMetadata"]
                metadata["RetryAttempts"] = metadata.get("RetryAttempts", 0) + retries.made
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
        """Tell whether the SDK's operation takes a parameter; not all of its versions know all of them."""
        model = self.raw.meta.service_model.operation_model(self.raw.meta.method_to_api_mapping[operation])
        return parameter in model.input_shape.members

    def end_of_credentials(self) -> datetime | None:
        """Return when the credentials end by which was signed last; None where they do not, or the SDK does not know."""
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

    async def _may_try_again(self, problem: StorageError, retries: _Retries) -> bool:
        """Wait or refresh as the failure of an attempt demands; tell whether the request may be made again."""
        if isinstance(problem, ExpiredCredentialsError):
            again = not retries.refreshed and await self._refresh_credentials(retries.refreshes)
            retries.refreshed = True
        else:
            again = isinstance(problem, BackendUnavailableError) and retries.made + 1 < retries.max_attempts
            if again:
                await asyncio.sleep(backoff(retries.made + 1))
        retries.made += 1
        return again

    async def _refresh_credentials(self, refreshes: int) -> bool:
        """Have expired credentials fetched again, once for all the calls that met them; tell whether that could be done."""
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
    """Return how long to wait after the so-manieth failed attempt, in seconds: doubling, bounded, with jitter."""
    longest = min(_LONGEST_BACKOFF, _FIRST_BACKOFF * 2.0 ** (attempt - 1))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311  # it spreads the load and keeps no secret


def version_of(answer: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameter that names the version that an answer speaks of, nothing in a bucket without versions."""
    version = answer.get("VersionId")
    return {"VersionId": version} if version and version != "null" else {}
