"""Objects in a bucket of Amazon S3, or of a server that speaks its protocol: MinIO, Ceph, R2, SeaweedFS."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from granite_storage._words import require_timedelta
from granite_storage.backends._identity import MARKER, MARKER_SIZE, IdentityObject, bucket_place
from granite_storage.backends._listing import list_keys
from granite_storage.backends._remote import (
    Opened,
    RemoteBackend,
    check_key,
    delete_each,
    error_at,
    read_beginning,
    require_expiry,
)
from granite_storage.backends._s3_client import S3Client, S3Clients, S3Settings, is_installed, version_of
from granite_storage.backends._s3_errors import ConflictError, S3ConfigurationError, translate, translate_response
from granite_storage.backends._s3_upload import (
    LARGEST_PART,
    PROBE_PREFIX,
    ObjectWriter,
    PartSource,
    abort_upload,
    abort_uploads,
    date_of,
    remove_probes,
)
from granite_storage.backends.base import (
    ByteRange,
    ObjectInfo,
    Place,
    PresignRequest,
    UploadRequest,
    object_headers,
)
from granite_storage.exceptions import (
    BackendError,
    ConfigurationError,
    InvalidLocationError,
    MissingDependencyError,
    ObjectNotFoundError,
)
from granite_storage.locations import check_segment
from granite_storage.streams import MeasuredStream, regroup, require_size

__all__ = ["S3ConfigurationError", "S3StorageBackend"]

logger: logging.Logger = logging.getLogger("granite_storage")

_MIB = 1024 * 1024
_SMALLEST_PART = 5 * _MIB
_CONNECTION_LIMITS = ("max_pool_connections", "max_attempts", "connect_timeout", "read_timeout", "pool_timeout")
_POSITIVE = ("part_concurrency", "max_parts_in_memory", *_CONNECTION_LIMITS)
_OURS = frozenset({"Body", "Bucket", "ContentLength", "ContentMD5", "IfMatch", "IfNoneMatch", "Key"})

_HEADERS = {
    "ACL": "x-amz-acl",
    "BucketKeyEnabled": "x-amz-server-side-encryption-bucket-key-enabled",
    "SSEKMSEncryptionContext": "x-amz-server-side-encryption-context",
    "SSEKMSKeyId": "x-amz-server-side-encryption-aws-kms-key-id",
    "ServerSideEncryption": "x-amz-server-side-encryption",
    "StorageClass": "x-amz-storage-class",
}
"""The parameters that decide how the bytes are kept; the others are for the copy that is made of what a client has stored."""

_FIELDS = _HEADERS | {"ACL": "acl"}
_ARCHIVES = ("GLACIER", "DEEP_ARCHIVE")


# Presigned requests: nothing of them can be changed by the client that makes them.


def _require_presignable(settings: S3Settings) -> None:
    """Raise `S3ConfigurationError` for parameters that presigned uploads do not support.

    Raises:
        S3ConfigurationError: There are some.
    """
    extra = settings.extra_put_kwargs
    if any(name.startswith("SSECustomer") for name in extra):
        raise S3ConfigurationError(
            "direct uploads do not support an encryption key of your own (SSECustomerKey in extra_put_kwargs): the client "
            "would have to know it"
        )
    if extra.get("StorageClass") in _ARCHIVES:
        raise S3ConfigurationError(
            f"direct uploads do not support the storage class {extra['StorageClass']!r} of extra_put_kwargs: its objects "
            "cannot be read at once"
        )


async def _presigned_form(
    client: S3Client, location: str, expires_in: int, content_type: str, min_size: int, max_size: int
) -> UploadRequest:
    """Return a form that stores an object: every condition of its policy names one value, but for the size.

    Source: Amazon S3 API reference, "Creating an HTML form (using AWS signature version 4)".
    """
    key = client.settings.key(location)
    fields = {"Content-Type": content_type, **_named(client.settings.extra_put_kwargs, _FIELDS)}
    form = await client.signer.generate_presigned_post(
        client.settings.bucket,
        key,
        Fields=dict(fields),
        Conditions=[
            ["eq", "$key", key],
            *(["eq", f"${name}", value] for name, value in fields.items()),
            ["content-length-range", min_size, max_size],
        ],
        ExpiresIn=expires_in,
    )
    return UploadRequest("POST", form["url"], fields=form["fields"])


async def _presigned_put(client: S3Client, location: str, expires_in: int, content_type: str, _: int, size: int) -> UploadRequest:
    """Return a PUT that stores an object of one size, which is signed as its Content-Length."""
    extra = client.settings.extra_put_kwargs
    parameters = {
        **{name: extra[name] for name in _HEADERS if name in extra},
        "Bucket": client.settings.bucket,
        "Key": client.settings.key(location),
        "ContentType": content_type,
        "ContentLength": size,
    }
    url = await client.signer.generate_presigned_url("put_object", Params=parameters, ExpiresIn=expires_in)
    return UploadRequest("PUT", url, headers={"Content-Type": content_type, **_named(extra, _HEADERS)})


def _named(extra: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Return parameters of the SDK as a client sends them."""
    values = {name: extra[parameter] for parameter, name in names.items() if parameter in extra}
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}


def _warn_of_early_end(client: S3Client, expires_in: timedelta) -> None:
    """Log that what was just signed ends with the temporary credentials that signed it, once for each set of these."""
    end = client.end_of_credentials()
    if end is None or end == client.traits.warned_of_end:
        return
    left = end - datetime.now(UTC)
    if left < expires_in:
        client.traits.warned_of_end = end
        logger.warning(
            "a presigned request for bucket %r should be valid for %s, but its temporary credentials expire after %s: presign "
            "for a shorter time, or sign with credentials that last longer",
            client.settings.bucket,
            expires_in,
            timedelta(seconds=max(0, int(left.total_seconds()))),
        )


# Downloads.


def _info_of(location: str, answer: Mapping[str, Any], size: int) -> ObjectInfo:
    """Return what an answer of the SDK says of an object."""
    modified: datetime = answer["LastModified"]
    etag = str(answer.get("ETag") or "").strip('"') or None
    content_type, encoding = answer.get("ContentType"), answer.get("ContentEncoding") or None
    return ObjectInfo(location, size, modified.astimezone(UTC), etag, content_type, encoding)


class _Service:
    """A bucket for readers; see `Service`."""

    def __init__(self, clients: S3Clients, attempts: int) -> None:
        self.attempts = attempts
        self._clients = clients

    async def get(self, location: str, start: int, stop: int | None, same: Mapping[str, Any] | None = None, /) -> Opened:
        """Ask for a range; see `Service.get`."""
        wanted = dict(same or {})
        if start or stop is not None:
            wanted["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        client = await self._clients.get()
        answer, lease = await client.start("get_object", location=location, **wanted)
        try:
            size, sent = _size_and_range(answer)
            this = {**({"IfMatch": answer["ETag"]} if "ETag" in answer else {}), **version_of(answer)}
            opened = Opened(_info_of(location, answer, size), sent, lease, this)
        except BaseException:
            lease.release()
            raise
        lease.lend()
        return opened

    async def head(self, location: str, /) -> ObjectInfo:
        """Ask what is known of an object; see `Service.head`."""
        head = await (await self._clients.get()).head(location)
        return _info_of(location, head, head["ContentLength"])


def _size_and_range(answer: Mapping[str, Any]) -> tuple[int, ByteRange]:
    """Return the size of the whole object, and which of its bytes the answer has."""
    content_range: str | None = answer.get("ContentRange")
    if not content_range:
        size = int(answer["ContentLength"])
        return size, ByteRange(0, size)
    sent, _, size_text = content_range.removeprefix("bytes ").partition("/")
    start, _, last = sent.partition("-")
    return int(size_text), ByteRange(int(start), int(last) + 1)


class S3StorageBackend(RemoteBackend):
    """Stores each object under one key of a bucket.

    A write is exclusive (`If-None-Match: *`) and verified by the server against a SHA-256 of the bytes. What fits in one part is
    one request; more is a multipart upload, which buffers `part_size` times `part_concurrency` bytes. A transient
    failure is retried; if the response to a write was lost, a HEAD tells its outcome. A write that fails or is cancelled leaves
    no object and no part; a cancelled caller waits for that clean-up, at most 30 seconds.

    A reader holds a connection until it is closed or read to its end, or until another call waits for one while it is not read.
    What is cut off, or lost its connection, is opened again by `StoredObjectReader`, with the same version of the object or not
    at all. In a bucket with versions, `delete` leaves a delete marker, as S3 does.

    The client opens with the first call on each event loop. Every write has the metadata entry `granite-write-id`. The object
    `.granite-storage` below the prefix has the identity of the store; listings pass it over.

    The credentials need `s3:GetObject`, `s3:PutObject`, `s3:DeleteObject`, `s3:AbortMultipartUpload`,
    `s3:ListMultipartUploadParts`, `s3:ListBucketMultipartUploads` and `s3:ListBucket`; without the last one S3 answers
    "forbidden" for what is not there, and so does this backend. Give the bucket a lifecycle rule for incomplete multipart
    uploads, or call `cleanup_incomplete` now and then: a killed process cannot clean up.

    Args:
        bucket: The bucket's name; it must exist.
        prefix: Whole segments, such as `app/uploads`, before every key; locations do not contain them.
        session: An `aioboto3.Session` or an `aiobotocore.session.AioSession`, which stays yours; None makes one from the
            environment, of aioboto3 where both are installed.
        endpoint_url: The server, where it is not Amazon's.
        presign_endpoint_url: The server as browsers reach it, for presigned URLs and forms, where that is another address, such
            as `https://files.example.com` for a container that the application calls `http://minio:9000`.
        region_name: The bucket's region, where the environment does not tell it.
        client_kwargs: More arguments for `session.client("s3", ...)`.
        config: A botocore or aiobotocore `Config`; what it sets goes before what this backend would set.
        extra_put_kwargs: More parameters for every write, such as `ServerSideEncryption`, `StorageClass` or `Metadata`.
        part_size: The size of the parts in bytes, at least 5 MiB. 10,000 parts always suffice: where the size of the content is
            known (bytes, or a stream whose size was declared) all parts are equal, and larger if need be; of other streams the
            first 4,500 parts have this size, then it doubles every 500.
        part_concurrency: The most parts of one write in memory and in flight.
        max_parts_in_memory: The most parts of all streams that an event loop's writes buffer. A stream with more than
            1 MiB waits for a place; smaller ones never do.
        max_pool_connections: The most connections in use; further calls wait for one to be released, or for a reader that is
            not being read.
        conditional_writes: Whether the server knows `If-None-Match: *`. With False a HEAD before each write checks for an
            existing object instead, and of two concurrent writers the later one wins. None relies on it for a single PUT, and
            probes after the first multipart upload or copy, by seven small requests, whether the server honours it there; until
            then, and where it does not, which is logged, a HEAD precedes the completion of each.
        checksums: Whether the server knows `x-amz-checksum-sha256`. With False `Content-MD5` takes its place.
        max_attempts: How often a request is made before its failure is reported.
        connect_timeout: The longest wait for a connection to the server, in seconds.
        read_timeout: The longest time without a byte in either direction, in seconds.
        pool_timeout: The longest wait for one of the `max_pool_connections`, in seconds.
        presigned_post: Whether the server takes forms with a signed policy (POST), which may allow a range of sizes. R2 does not;
            with False `presign_upload` signs a PUT of exactly one size.
        list_by_folder: Whether listings walk the keys folder by folder, for servers that do not list in byte order; None
            recognises SeaweedFS, which does not, by its name.

    Raises:
        ConfigurationError: An argument cannot work.
        MissingDependencyError: Neither aioboto3 nor aiobotocore is installed; the extra `s3` brings the first,
            `s3-aiobotocore` the second.

    Example:
        >>> S3StorageBackend(bucket="my-bucket", prefix="uploads")
        S3StorageBackend('my-bucket', prefix='uploads')
    """

    def __init__(
        self,
        bucket: str,
        *,
        prefix: str = "",
        session: Any = None,
        endpoint_url: str | None = None,
        presign_endpoint_url: str | None = None,
        region_name: str | None = None,
        client_kwargs: Mapping[str, Any] | None = None,
        config: Any = None,
        extra_put_kwargs: Mapping[str, Any] | None = None,
        part_size: int = 8 * _MIB,
        part_concurrency: int = 4,
        max_parts_in_memory: int = 64,
        max_pool_connections: int = 50,
        conditional_writes: bool | None = None,
        checksums: bool = True,
        max_attempts: int = 5,
        connect_timeout: float = 10.0,
        read_timeout: float = 60.0,
        pool_timeout: float = 60.0,
        presigned_post: bool = True,
        list_by_folder: bool | None = None,
    ) -> None:
        if not is_installed():
            raise MissingDependencyError(
                "S3StorageBackend needs aioboto3 or aiobotocore: pip install 'granite-storage[s3]' or '[s3-aiobotocore]'"
            )
        if not bucket:
            raise ConfigurationError("bucket must not be empty")
        if not _SMALLEST_PART <= part_size <= LARGEST_PART:
            raise ConfigurationError(f"part_size must be from 5 MiB to 5 GiB, as S3 requires, not {part_size} bytes")
        named = {"endpoint_url": endpoint_url, "region_name": region_name}
        self._settings = S3Settings(
            bucket=bucket,
            prefix=_checked_prefix(prefix),
            session=session,
            client_kwargs=_checked(
                "client_kwargs",
                {**(client_kwargs or {}), **{name: value for name, value in named.items() if value is not None}},
                reserved={"config", "service_name"},
            ),
            config=config,
            presign_endpoint_url=_checked_endpoint(presign_endpoint_url),
            extra_put_kwargs=_checked("extra_put_kwargs", dict(extra_put_kwargs or {}), reserved=_OURS),
            part_size=part_size,
            part_concurrency=part_concurrency,
            max_parts_in_memory=max_parts_in_memory,
            max_pool_connections=max_pool_connections,
            conditional_writes=conditional_writes,
            checksums=checksums,
            max_attempts=max_attempts,
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
            pool_timeout=pool_timeout,
            list_by_folder=list_by_folder,
        )
        for name in _POSITIVE:
            if (number := getattr(self._settings, name)) <= 0:
                raise ConfigurationError(f"{name} must be greater than 0, not {number!r}")
        self._presigned_post = presigned_post
        self._clients = S3Clients(self._settings)
        self._service = _Service(self._clients, max_attempts)
        self._page_size: int | None = None
        self._identity = IdentityObject()

    def __repr__(self) -> str:
        prefix = f", prefix={self.prefix!r}" if self.prefix else ""
        return f"S3StorageBackend({self.bucket!r}{prefix})"

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self._settings.bucket

    @property
    def prefix(self) -> str:
        """The prefix of every key in the bucket, without the slash that follows it."""
        return self._settings.prefix.rstrip("/")

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        """Yield the running event loop's client of the SDK, for operations that this backend lacks; the backend closes it.

        Its calls raise the SDK's errors and are not made again. Keys are `prefix + "/" + location`.
        """
        yield (await self._clients.get()).raw

    async def put_bytes(self, location: str, content: bytes, *, content_type: str | None = None) -> Mapping[str, Any]:
        """Create an object; see `StorageBackend.put_bytes`. Large content is a multipart upload and is not copied.

        Returns:
            `bucket`, and `version_id` in a bucket that has versions.
        """
        self._check(location)
        try:
            return await self._write(location, content, content_type)
        except ConflictError:
            # S3 wants a multipart upload in conflict with another write made again, which only bytes can be
            return await self._write(location, content, content_type)

    async def put_stream(
        self, location: str, stream: AsyncIterator[bytes], *, content_type: str | None = None
    ) -> Mapping[str, Any]:
        """Create an object from a stream; see `StorageBackend.put_stream`. The result is that of `put_bytes`."""
        self._check(location)
        size = stream.declared_size if isinstance(stream, MeasuredStream) else None
        async with aclosing(regroup(stream)) as pieces:
            return await self._write(location, pieces, content_type, size)

    async def delete(self, location: str) -> None:
        """Delete an object; see `StorageBackend.delete`. In a bucket with versions the old ones stay."""
        self._check(location)
        await self._delete(location)

    async def copy(self, source: str, target: str) -> Mapping[str, Any]:
        """Copy an object inside the server, with its content type; see `SupportsCopy.copy`.

        Other headers, metadata and tags stay behind: the copy has those of `extra_put_kwargs`, like every write.
        """
        self._check(source)
        self._check(target)
        client = await self._clients.get()
        info = await client.head(source)
        return self._receipt(await ObjectWriter(client, target, _stored_headers()).copy(source, info))

    async def presign_get(
        self, location: str, *, expires_in: timedelta, content_type: str | None = None, disposition: str | None = None
    ) -> str:
        """Return a URL that serves a GET until it expires, after at most seven days; see `SupportsPresign.presign_get`.

        The URL grants what it says to anyone who has it: do not log it. It ends with the credentials that sign it, if these are
        temporary and end sooner; the log warns of that once for each of them.
        """
        return (await self.presign_many([PresignRequest(location, expires_in, content_type, disposition)]))[0]

    async def presign_many(self, requests: Sequence[PresignRequest]) -> Sequence[str]:
        """Return the URLs of objects, which are signed in the process; see `SupportsBatchPresign.presign_many`.

        They are those of the SDK's signer, to the byte. It signs them itself, at fifty times the cost, where the client is
        configured for another signature than Signature Version 4, or signs something else besides.

        Raises:
            S3ConfigurationError: One is for a time that is past, and the SDK's signer would have to sign it.
        """
        for request in requests:
            self._check(request.location)
            require_expiry(request.expires_in)
        client = await self._clients.get()
        try:
            urls = await client.presigned(requests)
        except S3ConfigurationError:
            raise
        except Exception as error:
            location = requests[0].location if len(requests) == 1 else None
            raise translate(error, "presign_get", bucket=self.bucket, location=location) from error
        now = int(time.time())
        ends = [request.expires_in.total_seconds() + (request.signed_at or now) for request in requests]
        if ends:
            _warn_of_early_end(client, timedelta(seconds=max(ends) - now))
        return urls

    async def presign_upload(
        self, location: str, *, expires_in: timedelta, content_type: str, min_size: int, max_size: int
    ) -> UploadRequest:
        """Return a request that stores an object of at most 5 GiB; see `SupportsPresignedUpload.presign_upload`.

        A form's policy names the key, the content type and the range of sizes (`content-length-range`). A PUT is of one size. Of
        `extra_put_kwargs` the request demands what decides how the bytes are kept: encryption, storage class and ACL.

        Raises:
            S3ConfigurationError: `extra_put_kwargs` has an encryption key of the caller's own, which a client must not see, or a
                storage class from which nothing can be read.
        """
        self._check(location)
        require_expiry(expires_in)
        if "${filename}" in self._settings.key(location):
            raise InvalidLocationError(
                f"location {location!r} contains ${{filename}}, which an S3 form replaces by the client's file name"
            )
        if not 0 <= min_size <= max_size:
            raise ValueError(f"min_size must be from 0 to max_size, but they are {min_size} and {max_size}")
        require_size(min_size, LARGEST_PART)
        _require_presignable(self._settings)
        if not self._presigned_post and min_size != max_size:
            raise ValueError(
                f"presigned_post=False signs a PUT of one size: pass equal min_size and max_size, not {min_size} and {max_size}"
            )
        client = await self._clients.get()
        sign = _presigned_form if self._presigned_post else _presigned_put
        try:
            request = await sign(client, location, int(expires_in.total_seconds()), content_type, min_size, max_size)
        except Exception as error:
            raise translate(error, "presign_upload", bucket=self.bucket, location=location) from error
        _warn_of_early_end(client, expires_in)
        return request

    async def iter_objects(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        """Yield objects in byte order; see `StorageBackend.iter_objects`.

        What other programs have put under keys that are not valid locations is yielded too.

        Raises:
            S3ConfigurationError: The server lists in another order than S3.
        """
        settings = self._settings
        client = await self._clients.get()
        after = None if start_after is None else settings.key(start_after)
        async for entry in list_keys(client, settings.key(prefix), start_after=after, page_size=self._page_size):
            location = entry["Key"].removeprefix(settings.prefix)
            if location and location != MARKER and not location.startswith(PROBE_PREFIX):
                yield _info_of(location, entry, entry["Size"])

    async def cleanup_incomplete(self, *, older_than: timedelta) -> int:
        """Abort the multipart uploads under the prefix; see `SupportsCleanup.cleanup_incomplete`.

        An upload is old when it began, and its last part arrived, so long ago. Those of other programs are aborted too.
        """
        require_timedelta("older_than", older_than)
        client = await self._clients.get()
        removed = await remove_probes(client, await self.now() - older_than)
        return removed + await abort_uploads(client, older_than=older_than)

    async def now(self) -> datetime:
        """Return the time by the server's clock, in whole seconds; see `SupportsClock.now`."""
        client = await self._clients.get()
        return date_of(await client.call("list_objects_v2", MaxKeys=1, Prefix=self._settings.prefix))

    async def abort_upload(self, location: str, upload_id: str | None) -> None:
        """Abort an unfinished multipart upload; see `SupportsAbort.abort_upload`."""
        self._check(location)
        await abort_upload(await self._clients.get(), location, upload_id)

    async def identities(self, *, create: bool = False) -> Sequence[str]:
        """Return the lines of the object `.granite-storage` below the prefix; see `SupportsIdentity.identities`."""
        read = partial(read_beginning, self._service, MARKER, MARKER_SIZE)
        return await self._identity.identities(read, self._create_marker, create=create)

    async def places(self) -> frozenset[Place]:
        """Return the server, bucket and prefix; see `SupportsPlaces.places`."""
        endpoint: str = (await self._clients.get()).raw.meta.endpoint_url
        return frozenset({bucket_place("s3", endpoint, self.bucket, self.prefix)})

    async def aclose(self) -> None:
        """Close the running event loop's client; see `StorageBackend.aclose`. Readers that are still open break."""
        await self._clients.aclose()

    async def _create_marker(self, content: bytes) -> None:
        await self._write(MARKER, content, "text/plain")

    def _check(self, location: str) -> None:
        check_key(location, self._settings.prefix)

    async def _write(
        self, location: str, content: bytes | AsyncIterator[bytes], content_type: str | None, size: int | None = None
    ) -> Mapping[str, Any]:
        client = await self._clients.get()
        headers = {} if content_type is None else {"ContentType": content_type}
        writer = ObjectWriter(client, location, headers | _stored_headers())
        return self._receipt(await writer.write(PartSource(content, client.room, size)))

    def _receipt(self, answer: Mapping[str, Any]) -> dict[str, Any]:
        version = version_of(answer)
        return {"bucket": self.bucket, **({"version_id": version["VersionId"]} if version else {})}

    async def _delete(self, location: str) -> None:
        client = await self._clients.get()
        try:
            await client.call("delete_object", location=location)
        except ObjectNotFoundError:  # some servers say so
            return

    async def _delete_batch(self, locations: Sequence[str]) -> dict[str, BackendError]:
        client = await self._clients.get()
        keys = {self._settings.key(location): location for location in locations}
        try:
            answer = await client.call("delete_objects", Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True})
        except BackendError as error:
            if type(error) is BackendError:  # the server does not know the request, or wants other checksums of it
                return await delete_each(locations, self._delete, BackendError)
            return {location: error_at(location, error) for location in locations}
        failures: dict[str, BackendError] = {}
        for entry in answer.get("Errors", ()):
            location = keys[entry["Key"]]
            failure = translate_response({"Error": entry}, "delete_objects", bucket=self.bucket, location=location)
            if not isinstance(failure, ObjectNotFoundError):
                failures[location] = failure
        return failures


def _stored_headers() -> dict[str, str]:
    """Return the SDK's parameters of what a write stores with its object, for a public policy."""
    headers = object_headers.get()
    if headers is None:
        return {}
    acl = {} if headers.acl is None else {"ACL": headers.acl}
    return {
        "CacheControl": headers.cache_control,
        "ContentDisposition": headers.content_disposition,
        "ContentType": headers.content_type,
        **acl,
    }


def _checked_prefix(prefix: str) -> str:
    """Return a prefix as it stands before a location: empty, or segments each with a slash."""
    bare = prefix.removesuffix("/")
    if not bare:
        return ""
    for segment in bare.split("/"):
        try:
            check_segment(segment, windows=False)
        except InvalidLocationError as error:
            raise ConfigurationError(f"prefix {prefix!r} cannot be used: {error}") from error
    return f"{bare}/"


def _checked_endpoint(url: str | None) -> str | None:
    """Return the address of a server; raise `ConfigurationError` for anything else."""
    if url is None:
        return None
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment or parts.username:
        raise ConfigurationError(
            "presign_endpoint_url must be the address of a server as browsers reach it, such as https://files.example.com"
        )
    return url


def _checked(argument: str, given: dict[str, Any], *, reserved: frozenset[str] | set[str]) -> dict[str, Any]:
    for name in given:
        if name in reserved or name.startswith("Checksum"):
            raise ConfigurationError(f"{argument} must not contain {name!r}: the backend sets it")
    return given
