"""Listing a bucket in the byte order of UTF-8, on servers that list so and on one kind that does not.

S3 promises the order. A server that keeps keys as a tree of folders, as SeaweedFS does, lists a folder's content where the
folder's bare name belongs: `t/a` before `t-/b`, although `-` comes before `/`. There the tree is walked folder by folder, which
takes a request for each folder of more than a page.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from granite_storage.backends._obstore_client import ObjectStoreConfigurationError, StoreClient, info_of
from granite_storage.backends._s3_client import S3Client
from granite_storage.backends._s3_errors import S3ConfigurationError
from granite_storage.backends.base import ObjectInfo
from granite_storage.exceptions import InvalidLocationError
from granite_storage.locations import check_location

__all__ = ["Listing", "list_keys"]

_TREE_SERVERS = ("seaweedfs",)


async def list_keys(
    client: S3Client, prefix: str, *, start_after: str | None, page_size: int | None
) -> AsyncIterator[Mapping[str, Any]]:
    """Yield the SDK's entries of the keys that begin with a prefix, in the byte order of UTF-8.

    Args:
        client: The event loop's client.
        prefix: Characters, taken literally.
        start_after: Yield only what comes after this key.
        page_size: How many keys to ask for at a time, None for as many as the server gives.

    Raises:
        S3ConfigurationError: The server lists in another order.
    """
    pages = _Pages(client, {} if page_size is None else {"MaxKeys": page_size})
    first = await pages.first(prefix, start_after=start_after)
    by_folder = client.settings.list_by_folder
    if _is_tree_server(first) if by_folder is None else by_folder:
        after = (start_after or "").encode()
        async for entry in _walk(pages, prefix, after):
            if entry["Key"].startswith(prefix):  # a tree finds what is under `a/` for the prefix `a//`, too
                yield entry
        return
    previous = b""
    async for page in pages.rest(first):
        for entry in page.get("Contents", ()):
            key = entry["Key"].encode()
            if key <= previous and previous:
                raise S3ConfigurationError("the server does not list in byte order: give list_by_folder=True")
            previous = key
            yield entry


def _is_tree_server(answer: Mapping[str, Any]) -> bool:
    server: str = answer["ResponseMetadata"].get("HTTPHeaders", {}).get("server", "")
    return server.lower().startswith(_TREE_SERVERS)


class _Pages:
    def __init__(self, client: S3Client, parameters: Mapping[str, Any]) -> None:
        self._client = client
        self._parameters = parameters

    async def first(self, prefix: str, *, delimiter: str = "", start_after: str | None = None) -> dict[str, Any]:
        asked = {
            **self._parameters,
            "Prefix": prefix,
            **({"Delimiter": delimiter} if delimiter else {}),
            **({"StartAfter": start_after} if start_after else {}),
        }
        return {**await self._client.call("list_objects_v2", **asked), "asked": asked}

    async def rest(self, page: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Yield a first page and those that follow it."""
        asked = page["asked"]
        yield page
        while page.get("IsTruncated"):
            page = await self._client.call("list_objects_v2", **asked, ContinuationToken=page["NextContinuationToken"])
            yield page


async def _walk(pages: _Pages, prefix: str, after: bytes) -> AsyncIterator[Mapping[str, Any]]:
    """Yield what begins with a prefix, in byte order, from a server that lists folders in the order of their bare names."""
    page = await pages.first(prefix)
    if not page.get("IsTruncated"):
        for entry in sorted(page.get("Contents", ()), key=lambda entry: entry["Key"].encode()):
            if entry["Key"].encode() > after:
                yield entry
        return
    async for entry in _children(pages, prefix):
        key = entry["Key"].encode()
        if "Size" in entry:
            if key > after:
                yield entry
        elif key >= after[: len(key)]:
            async for inner in _walk(pages, entry["Key"], after):
                yield inner


async def _children(pages: _Pages, prefix: str) -> AsyncIterator[Mapping[str, Any]]:
    """Yield the objects and folders that are directly under a prefix, in byte order; a folder has no `Size`.

    They arrive in the order of their bare names; so a folder waits until no name can come that is before it and its slash.
    """
    waiting: list[bytes] = []
    entries: dict[bytes, Mapping[str, Any]] = {}
    async for page in pages.rest(await pages.first(prefix, delimiter="/")):
        folders = [{"Key": folder["Prefix"]} for folder in page.get("CommonPrefixes", ())]
        found = {entry["Key"].encode(): entry for entry in (*page.get("Contents", ()), *folders)}
        for key in sorted(found, key=lambda key: key.rstrip(b"/")):
            bare = key.rstrip(b"/")
            while waiting and waiting[0] < bare:
                yield entries.pop(heapq.heappop(waiting))
            if key not in entries:
                entries[key] = found[key]
                heapq.heappush(waiting, key)
    while waiting:
        yield entries.pop(heapq.heappop(waiting))


# Listing an object store in the byte order of UTF-8, also where the store lists in an order of its own, or in none.
#
# S3, Google and Azure list in byte order, but SeaweedFS and Azure's hierarchical namespaces list folder by folder, and a
# local disk as it likes. What is short is sorted in memory, whatever its order; what is long is taken as it comes where
# that is in order, and walked folder by folder otherwise.


_PAGE = 1000
_SORTED_AT_A_TIME = 10_000

Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Listing:
    """One way to list a store.

    Attributes:
        client: The store.
        by_folder: Whether to walk folder by folder; None finds out, False trusts the store's order and has it begin where asked.
        page_size: How many entries to take at a time.
        sorted_at_a_time: Up to how many entries are sorted in memory.
    """

    client: StoreClient
    by_folder: bool | None
    page_size: int = _PAGE
    sorted_at_a_time: int = _SORTED_AT_A_TIME

    async def objects(self, prefix: str, start_after: str | None) -> AsyncIterator[ObjectInfo]:
        """Yield the objects whose location begins with a prefix, in the byte order of UTF-8.

        Raises:
            ObjectStoreConfigurationError: The store lists in another order, which began too late to be noticed in time.
        """
        folder = prefix.rpartition("/")[0]
        after = (start_after or "").encode()
        if folder and not _is_location(folder):
            return
        entries = self._in_order(folder, prefix, after) if self._trusts_order() else self._walk(folder, prefix, after)
        async for entry in entries:
            location: str = entry["path"]
            if location.startswith(prefix) and location.encode() > after:
                yield info_of(location, entry)

    def _trusts_order(self) -> bool:
        return self.client.kind.lists_in_order is True if self.by_folder is None else not self.by_folder

    async def _in_order(self, folder: str, prefix: str, after: bytes) -> AsyncIterator[Entry]:
        offset = after.decode() if _is_location(after.decode()) else None
        async for entry in _checked(self._pages(folder, offset)):
            yield entry

    async def _walk(self, folder: str, prefix: str, after: bytes) -> AsyncIterator[Entry]:
        """Yield what is in a folder: sorted where it is short, as it comes where that is in order, else folder by folder."""
        pages = self._pages(folder, None)
        first: list[Entry] = []
        async for page in pages:
            first.extend(page)
            if len(first) > self.sorted_at_a_time:
                break
        else:
            for entry in sorted(first, key=_key):
                yield entry
            return
        if self.by_folder is None and self.client.kind.lists_in_order is None and _is_sorted(first):
            async for entry in _checked(pages, first):
                yield entry
            return
        del first
        for name, child in await self._children(folder):
            if child is not None:
                yield child
            elif name >= after[: len(name)] and (name.startswith(prefix.encode()) or prefix.encode().startswith(name)):
                async for inner in self._walk(name.decode().rstrip("/"), prefix, after):
                    yield inner

    async def _pages(self, folder: str, offset: str | None) -> AsyncIterator[list[Entry]]:
        store = await self.client.store()
        stream = store.list(folder or None, offset=offset, chunk_size=self.page_size)
        while page := await self.client.call("list", None, lambda _: anext(stream, None)):
            yield page

    async def _children(self, folder: str) -> list[tuple[bytes, Entry | None]]:
        """Return the objects and folders that are directly in a folder, in byte order; a folder ends in a slash."""
        found = await self.client.call("list", None, lambda store: store.list_with_delimiter_async(folder or None))
        folders = [(f"{name}/".encode(), None) for name in found["common_prefixes"]]
        return sorted([*folders, *((_key(entry), entry) for entry in found["objects"])], key=lambda child: child[0])


async def _checked(pages: AsyncIterator[list[Entry]], first: Iterable[Entry] = ()) -> AsyncIterator[Entry]:
    previous = b""
    for entry in first:
        previous = _key(entry)
        yield entry
    async for page in pages:
        for entry in page:
            if _key(entry) <= previous:
                raise ObjectStoreConfigurationError("the store does not list in byte order: give list_by_folder=True")
            previous = _key(entry)
            yield entry


def _key(entry: Entry) -> bytes:
    path: str = entry["path"]
    return path.encode()


def _is_sorted(entries: list[Entry]) -> bool:
    keys = [_key(entry) for entry in entries]
    return all(one < other for one, other in pairwise(keys))


def _is_location(text: str) -> bool:
    try:
        check_location(text, windows=False)
    except InvalidLocationError:
        return False
    return True
