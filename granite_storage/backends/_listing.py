"""Listing a store in the byte order of UTF-8, also where the store lists in another order, or in none.

S3, Google and Azure list in byte order. A server that keeps keys as a tree of folders, as SeaweedFS and Azure's hierarchical
namespaces do, lists a folder's content where the folder's bare name belongs: `t/a` before `t-/b`, although `-` comes before `/`.
A local disk lists as it likes. What is short is sorted in memory, whatever its order. What is long is taken as it comes where
that is in order, and is walked folder by folder otherwise, which takes a request for each folder of more than a page.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any, Protocol

from granite_storage.backends._obstore_client import ObjectStoreConfigurationError, StoreClient, info_of
from granite_storage.backends._s3_client import S3Client
from granite_storage.backends._s3_errors import S3ConfigurationError
from granite_storage.backends.base import ObjectInfo
from granite_storage.exceptions import BackendError, InvalidLocationError
from granite_storage.locations import check_location

_TREE_SERVERS = ("seaweedfs",)
_PAGE = 1000
_MAX_SORTED = 10_000

Entry = Mapping[str, Any]
Item = tuple[bytes, Entry | None]
"""A key with what the store says of its object, or a folder, which ends in a slash, with None."""

_key_of = itemgetter(0)


class _Store(Protocol):
    """What a walk needs of a store."""

    async def in_order(self, folder: str) -> AsyncIterator[Item] | None:
        """Return everything below a folder in byte order; None if that requires a walk."""
        ...

    def children(self, folder: str) -> AsyncIterator[Item]:
        """Yield the objects and folders that are directly in a folder, in byte order."""
        ...


async def _walk(store: _Store, folder: str, prefix: bytes, after: bytes) -> AsyncIterator[Entry]:
    """Yield what is below a folder, begins with a prefix and comes after a key, in byte order."""
    ordered = await store.in_order(folder)
    async for key, entry in store.children(folder) if ordered is None else ordered:
        if entry is not None:
            if key > after and key.startswith(prefix):
                yield entry
        elif key >= after[: len(key)] and (key.startswith(prefix) or prefix.startswith(key)):
            async for inner in _walk(store, key.decode(), prefix, after):
                yield inner


async def _sorted(items: list[Item]) -> AsyncIterator[Item]:
    for item in sorted(items, key=_key_of):
        yield item


async def _checked(pages: AsyncIterator[list[Item]], first: list[Item], error: type[BackendError]) -> AsyncIterator[Item]:
    """Yield a first page and those that follow it, and raise where they turn out not to be in byte order."""
    previous = b""
    for item in first:
        previous = item[0]
        yield item
    async for page in pages:
        for item in page:
            if item[0] <= previous and previous:
                raise error("the store does not list in byte order: pass list_by_folder=True")
            previous = item[0]
            yield item


# S3.


async def list_keys(client: S3Client, prefix: str, *, start_after: str | None, page_size: int | None) -> AsyncIterator[Entry]:
    """Yield the SDK's entries of the keys that begin with a prefix, in the byte order of UTF-8.

    Args:
        client: The event loop's client.
        prefix: Characters, taken literally.
        start_after: Yield only what comes after this key.
        page_size: How many keys to ask for at a time, None for as many as the server gives.

    Raises:
        S3ConfigurationError: The server lists in another order.
    """
    bucket = _Bucket(client, {} if page_size is None else {"MaxKeys": page_size})
    first = await bucket.page(prefix, start_after=start_after)
    by_folder = client.settings.list_by_folder
    if _is_tree_server(first) if by_folder is None else by_folder:
        # a tree finds what is under `a/` for the prefix `a//`, too
        async for entry in _walk(bucket, prefix, prefix.encode(), (start_after or "").encode()):
            yield entry
        return
    async for _, found in _checked(bucket.items(first), [], S3ConfigurationError):
        if found is not None:
            yield found


def _is_tree_server(answer: Mapping[str, Any]) -> bool:
    server: str = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("server", "")
    return server.lower().startswith(_TREE_SERVERS)


class _Bucket:
    """A bucket; see `_Store`. A folder is any prefix of keys here."""

    def __init__(self, client: S3Client, parameters: Mapping[str, Any]) -> None:
        self._client = client
        self._parameters = parameters

    async def page(self, prefix: str, *, delimiter: str = "", start_after: str | None = None) -> dict[str, Any]:
        """Return the first page of keys, with what was asked for."""
        asked = {
            **self._parameters,
            "Prefix": prefix,
            **({"Delimiter": delimiter} if delimiter else {}),
            **({"StartAfter": start_after} if start_after else {}),
        }
        return {**await self._client.call("list_objects_v2", **asked), "asked": asked}

    async def items(self, page: dict[str, Any]) -> AsyncIterator[list[Item]]:
        """Yield the objects and folders of a first page, and of those that follow it."""
        asked = page["asked"]
        while True:
            objects = [(entry["Key"].encode(), entry) for entry in page.get("Contents", ())]
            yield [*objects, *((folder["Prefix"].encode(), None) for folder in page.get("CommonPrefixes", ()))]
            if not page.get("IsTruncated"):
                return
            page = await self._client.call("list_objects_v2", **asked, ContinuationToken=page["NextContinuationToken"])

    async def in_order(self, folder: str) -> AsyncIterator[Item] | None:
        """Return what is below a folder of one page."""
        page = await self.page(folder)
        return None if page.get("IsTruncated") else _sorted([item async for items in self.items(page) for item in items])

    async def children(self, folder: str) -> AsyncIterator[Item]:
        """Yield what is directly in a folder.

        It arrives in the order of the bare names; so a folder waits until no name can come that is before it and its slash.
        """
        waiting: list[bytes] = []
        entries: dict[bytes, Entry | None] = {}
        async for items in self.items(await self.page(folder, delimiter="/")):
            found = dict(items)
            for key in sorted(found, key=lambda key: key.rstrip(b"/")):
                bare = key.rstrip(b"/")
                while waiting and waiting[0] < bare:
                    first = heapq.heappop(waiting)
                    yield first, entries.pop(first)
                if key not in entries:
                    entries[key] = found[key]
                    heapq.heappush(waiting, key)
        while waiting:
            first = heapq.heappop(waiting)
            yield first, entries.pop(first)


# obstore.


@dataclass(frozen=True, slots=True)
class Listing:
    """One way to list a store of obstore's; see `_Store`.

    Attributes:
        client: The store.
        by_folder: Whether to walk folder by folder; None finds out, False trusts the store's order and has it begin where asked.
        page_size: How many entries to take at a time.
        max_sorted: Up to how many entries are sorted in memory.
    """

    client: StoreClient
    by_folder: bool | None
    page_size: int = _PAGE
    max_sorted: int = _MAX_SORTED

    async def objects(self, prefix: str, start_after: str | None) -> AsyncIterator[ObjectInfo]:
        """Yield the objects whose location begins with a prefix, in the byte order of UTF-8.

        Raises:
            ObjectStoreConfigurationError: The store lists in another order, which began too late to be detected in time.
        """
        folder = prefix.rpartition("/")[0]
        after = (start_after or "").encode()
        if folder and not _is_location(folder):
            return
        entries = self._trusted(folder, prefix, after) if self._trusts_order() else _walk(self, folder, prefix.encode(), after)
        async for entry in entries:
            yield info_of(entry["path"], entry)

    def _trusts_order(self) -> bool:
        return self.client.kind.lists_in_order is True if self.by_folder is None else not self.by_folder

    async def _trusted(self, folder: str, prefix: str, after: bytes) -> AsyncIterator[Entry]:
        offset = after.decode() if _is_location(after.decode()) else None
        async for key, entry in _checked(self._pages(folder, offset), [], ObjectStoreConfigurationError):
            if entry is not None and key > after and key.startswith(prefix.encode()):
                yield entry

    async def in_order(self, folder: str) -> AsyncIterator[Item] | None:
        """Return what is in a folder sorted where it is short, and as it comes where that is in order."""
        pages = self._pages(folder, None)
        first: list[Item] = []
        async for page in pages:
            first.extend(page)
            if len(first) > self.max_sorted:
                break
        else:
            return _sorted(first)
        may_be_in_order = self.by_folder is None and self.client.kind.lists_in_order is None
        if may_be_in_order and all(one[0] < other[0] for one, other in pairwise(first)):
            return _checked(pages, first, ObjectStoreConfigurationError)
        return None

    async def children(self, folder: str) -> AsyncIterator[Item]:
        """Yield what is directly in a folder."""
        path = folder.rstrip("/") or None
        found: Mapping[str, Any] = await self.client.call("list", None, lambda store: store.list_with_delimiter_async(path))
        folders: list[Item] = [(f"{name}/".encode(), None) for name in found["common_prefixes"]]
        for item in sorted([*folders, *((entry["path"].encode(), entry) for entry in found["objects"])], key=_key_of):
            yield item

    async def _pages(self, folder: str, offset: str | None) -> AsyncIterator[list[Item]]:
        store = await self.client.store()
        stream = store.list(folder.rstrip("/") or None, offset=offset, chunk_size=self.page_size)
        while True:
            page: list[Entry] | None = await self.client.call("list", None, lambda _: anext(stream, None))
            if not page:
                return
            yield [(entry["path"].encode(), entry) for entry in page]


def _is_location(text: str) -> bool:
    try:
        check_location(text, windows=False)
    except InvalidLocationError:
        return False
    return True
