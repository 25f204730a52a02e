"""Listing a bucket in the byte order of UTF-8, on servers that list so and on one kind that does not.

S3 promises the order. A server that keeps keys as a tree of folders, as SeaweedFS does, lists a folder's content where the
folder's bare name belongs: `t/a` before `t-/b`, although `-` comes before `/`. There the tree is walked folder by folder, which
takes a request for each folder of more than a page.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Mapping
from typing import Any

from granite_storage.backends._s3_client import S3Client
from granite_storage.backends._s3_errors import S3ConfigurationError

__all__ = ["list_keys"]

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
