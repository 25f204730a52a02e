"""Objects in any store that obstore speaks to: S3, Google Cloud Storage, Azure, HTTP, memory, a local disk."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from datetime import timedelta
from functools import partial
from typing import Any

from granite_storage.backends._identity import MARKER, MARKER_SIZE, IdentityObject
from granite_storage.backends._listing import Listing
from granite_storage.backends._obstore_client import ObjectStoreConfigurationError, make_client
from granite_storage.backends._obstore_upload import ObjectWriter, slices
from granite_storage.backends._remote import RemoteBackend, check_key, delete_each, read_beginning, require_expiry
from granite_storage.backends._resuming import open_resuming
from granite_storage.backends.base import ObjectInfo, Place, object_headers
from granite_storage.exceptions import BackendError, ConfigurationError, InvalidLocationError, MissingDependencyError

__all__ = ["ObjectStoreBackend", "ObjectStoreConfigurationError"]

_MIB = 1024 * 1024
_SMALLEST_PART = 5 * _MIB
_LARGEST_COPY = 5 * 1024 * _MIB
_COPY_STEP = _MIB
# On a local disk obstore writes to a file whose name has "#" and a number at its end, which must fit too.
_LONGEST_LOCAL_SEGMENT = 245
_LOCAL_TEMPORARY = re.compile(r"#\d+$")


class ObjectStoreBackend(RemoteBackend):
    """Stores each object under one key of an obstore store.

    What fits in one part is one exclusive request (`If-None-Match: *` or the service's equivalent). More is a multipart upload;
    obstore has no condition for it, so a HEAD before and after the parts checks for an existing object: of two concurrent
    multipart uploads to *one* location the later one may win. Locations that the manager makes are unique, so two writers never
    meet there. Where an answer was lost, a HEAD tells what became of the write, by an id in the object's metadata. A write that
    fails or is cancelled leaves no object and no part; a cancelled caller waits for that clean-up, at most 30 seconds.

    A reader holds a connection until it is closed or read to its end. What is cut off is opened again by `StoredObjectReader`,
    with the same version of the object or not at all.

    A killed process cannot abort its upload, and no other program knows its id: give an S3 or Google bucket a lifecycle
    rule for incomplete multipart uploads. Azure drops parts that were never joined after a week.

    It satisfies `SupportsCopy` and `SupportsBatchDelete`. Over HTTP it only reads: whatever would write or delete is refused.

    Args:
        store: A store of `obstore.store`, which stays yours, or a URL such as `s3://bucket/prefix`, `gs://bucket`,
            `az://container`, `https://host/folder`, `memory:///` or `file:///folder`.
        config: The store's own options, for a URL, as obstore has them, such as `{"region": "eu-central-1"}`; those of the HTTP
            client are refused here.
        client_options: Options of the HTTP client, for a URL: timeouts, proxies, `{"allow_http": True}`. By default it waits 10
            seconds for a connection, and 60 for bytes.
        retry_config: For a URL: which failures are retried, and how; by default 4 times within 60 seconds.
        credential_provider: For a URL: a callable of yours that gives credentials.
        part_size: The size of the parts in bytes, at least 5 MiB. An object has 10,000 parts at the most, 78 GiB by default.
        part_concurrency: The most parts of one write in flight at a time; two more are in memory.
        list_by_folder: Whether listings walk the keys folder by folder. None detects the order, and raises where a long
            listing turns out to be in another order than that of bytes; False trusts the order, and has the store begin at
            `start_after`.

    Raises:
        ConfigurationError: An argument cannot work.
        MissingDependencyError: obstore is not installed; the extra `obstore` brings it.

    Example:
        >>> ObjectStoreBackend("s3://my-bucket/uploads", config={"region": "eu-central-1"})
        ObjectStoreBackend('s3://my-bucket/uploads')
    """

    def __init__(
        self,
        store: Any,
        *,
        config: Mapping[str, Any] | None = None,
        client_options: Mapping[str, Any] | None = None,
        retry_config: Mapping[str, Any] | None = None,
        credential_provider: Any = None,
        part_size: int = 8 * _MIB,
        part_concurrency: int = 4,
        list_by_folder: bool | None = None,
    ) -> None:
        if importlib.util.find_spec("obstore") is None:
            raise MissingDependencyError("ObjectStoreBackend needs obstore: pip install 'granite-storage[obstore]'")
        if part_size < _SMALLEST_PART:
            raise ConfigurationError(f"part_size must be at least 5 MiB, as S3 requires, not {part_size} bytes")
        if part_concurrency < 1:
            raise ConfigurationError(f"part_concurrency must be at least 1, not {part_concurrency!r}")
        options = {
            "config": config,
            "client_options": client_options,
            "retry_config": retry_config,
            "credential_provider": credential_provider,
        }
        self._client = self._service = make_client(store, options)
        self._part_size = part_size
        self._part_concurrency = part_concurrency
        self._listing = Listing(self._client, list_by_folder)
        self._identity = IdentityObject()

    def __repr__(self) -> str:
        return f"ObjectStoreBackend({self._client.name!r})"

    async def store(self) -> Any:
        """Return obstore's store, for operations that this backend lacks; its calls raise obstore's errors."""
        return await self._client.store()

    async def put_bytes(self, location: str, content: bytes, *, content_type: str | None = None) -> Mapping[str, Any]:
        """Create an object; see `StorageBackend.put_bytes`. Large content is a multipart upload and is not copied.

        Returns:
            `version_id` in a bucket that has versions.
        """
        writer = self._writer(location, content_type)
        if len(content) <= self._part_size:
            return _receipt(await writer.put([content]))
        return _receipt(await writer.write(slices(content)))

    async def put_stream(
        self, location: str, stream: AsyncIterator[bytes], *, content_type: str | None = None
    ) -> Mapping[str, Any]:
        """Create an object from a stream; see `StorageBackend.put_stream`. The result is that of `put_bytes`."""
        return _receipt(await self._writer(location, content_type).write(stream))

    async def delete(self, location: str) -> None:
        """Delete an object; see `StorageBackend.delete`. In a bucket with versions the old ones stay."""
        self._check(location)
        self._require_writable()
        await self._client.delete(location)

    async def copy(self, source: str, target: str) -> Mapping[str, Any]:
        """Copy an object inside the store, with its content type; see `SupportsCopy.copy`.

        S3 has no condition for copies, so a HEAD checks for an existing object first. Over 5 GiB, and for a public policy, whose
        headers obstore can give to no copy, the bytes pass through this program.
        """
        self._check(source)
        writer = self._writer(target, None)
        is_public = object_headers.get() is not None and self._client.kind.keeps_attributes
        if is_public or (self._client.kind.name == "S3" and (await self.stat(source)).size > _LARGEST_COPY):
            return await self.put_stream(target, self._bytes_of(source), content_type=(await self.stat(source)).content_type)
        return _receipt(await writer.copy(source))

    async def signed_url(self, location: str, *, expires_in: timedelta) -> str:
        """Return a URL that serves a GET of the object, with its stored content type, until it expires.

        obstore signs no headers of the answer. So this is not `SupportsPresign`, and `StorageManager.url` does not use it: what a
        client uploaded is served as the type that the client declared. The URL grants what it says to anyone who has it: do not
        log it.

        Args:
            location: The object's address; it is not checked that it exists.
            expires_in: How long the URL works, from one second to seven days.

        Raises:
            ObjectStoreConfigurationError: The store signs no URLs, or has no key to sign with.
            ValueError: `expires_in` is too short or too long.
        """
        self._check(location)
        require_expiry(expires_in)
        if not self._client.kind.signs:
            raise ObjectStoreConfigurationError(
                f"{self._client.name} cannot sign URLs: only S3, Google Cloud Storage and Azure can", location=location
            )
        return await self._client.signed(location, expires_in)

    async def iter_objects(self, prefix: str = "", *, start_after: str | None = None) -> AsyncIterator[ObjectInfo]:
        """Yield objects in byte order; see `StorageBackend.iter_objects`.

        Raises:
            ObjectStoreConfigurationError: The store lists in another order, which began too late to be detected in time.
        """
        async for info in self._listing.objects(prefix, start_after):
            if info.location != MARKER:
                yield info

    async def identities(self, *, create: bool = False) -> Sequence[str]:
        """Return the lines of the object `.granite-storage`; see `SupportsIdentity.identities`. Over HTTP none is created."""
        read = partial(read_beginning, self._service, MARKER, MARKER_SIZE)
        return await self._identity.identities(read, self._create_marker, create=create and self._client.kind.writes)

    async def places(self) -> frozenset[Place]:
        """Return the server, bucket and prefix, or the folder; see `SupportsPlaces.places`."""
        return await self._client.places()

    async def aclose(self) -> None:
        """Close a store of our own, which the next call opens again; see `StorageBackend.aclose`. One passed in stays open."""
        self._client.close()

    async def _delete_batch(self, locations: Sequence[str]) -> dict[str, BackendError]:
        self._require_writable()
        if self._client.kind.deletes_in_batches:
            try:
                await self._client.call("delete", None, lambda store: store.delete_async(locations))
            except BackendError:  # obstore does not say of which: one by one they do
                pass
            else:
                return {}
        return await delete_each(locations, self._client.delete, BackendError)

    async def _bytes_of(self, location: str) -> AsyncIterator[bytes]:
        async with aclosing(await open_resuming(self, location)) as reader:
            while chunk := await reader.read(_COPY_STEP):
                yield chunk

    async def _create_marker(self, content: bytes) -> None:
        await self._unchecked_writer(MARKER, "text/plain").put([content])

    def _writer(self, location: str, content_type: str | None) -> ObjectWriter:
        self._check(location)
        self._require_writable()
        headers = object_headers.get()
        if headers is not None and headers.acl is not None:
            raise ObjectStoreConfigurationError(
                f"obstore cannot store an ACL, such as {headers.acl!r} of a policy's PublicURL: omit it, and allow public "
                "reads in the policy of the bucket",
                location=location,
            )
        return self._unchecked_writer(location, content_type)

    def _unchecked_writer(self, location: str, content_type: str | None) -> ObjectWriter:
        return ObjectWriter(
            self._client, location, content_type, part_size=self._part_size, part_concurrency=self._part_concurrency
        )

    def _check(self, location: str) -> None:
        prefix = self._client.prefix
        check_key(location, f"{prefix}/" if prefix else "")
        if self._client.kind.names_temporary_files:
            _check_local(location)

    def _require_writable(self) -> None:
        if not self._client.kind.writes:
            raise ObjectStoreConfigurationError(f"{self._client.name} can only be read: HTTP cannot create an object exclusively")


def _check_local(location: str) -> None:
    for segment in location.split("/"):
        if len(segment.encode()) > _LONGEST_LOCAL_SEGMENT or _LOCAL_TEMPORARY.search(segment):
            raise InvalidLocationError(
                f"obstore cannot store {segment[:80]!r} on a local disk: the name is longer than {_LONGEST_LOCAL_SEGMENT} bytes, "
                "or ends in '#' and a number"
            )


def _receipt(answer: Mapping[str, Any]) -> dict[str, Any]:
    version = answer.get("version")
    return {"version_id": version} if version else {}
