"""The names of the place where a backend keeps its objects, by which two backends on one store are noticed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from granite_storage.backends.base import Place

__all__ = ["bucket_place", "folder_places", "web_place"]

_DEFAULT_PORTS = {"http": 80, "https": 443}
_THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0"})  # noqa: S104  # nothing is bound to it
_AMAZON = (".amazonaws.com", ".amazonaws.com.cn")


def folder_places(folder: Path) -> frozenset[Place]:
    """Return the names of a folder: its path without links, and the inode of it and of every folder above; blocking.

    A bind mount, another spelling on a file system that ignores case, and a link to a folder above all lead to a known inode.
    """
    real = Path(os.path.realpath(folder))
    places = {Place("disk", real.parts)}
    for above in (real, *real.parents):
        try:
            found = os.stat(above)
        except OSError:
            continue  # it is not there yet, or may not be looked at
        places.add(Place(f"inode {found.st_dev}:{found.st_ino}", real.parts[len(above.parts) :]))
    return frozenset(places)


def bucket_place(service: str, endpoint: str | None, bucket: str, prefix: str) -> Place:
    """Return the place of a prefix in a bucket.

    Args:
        service: The kind of service, such as `s3`.
        endpoint: The server's URL; None for the service's own, in which a bucket's name is unique.
        bucket: The bucket.
        prefix: What stands before each location in it.
    """
    server = "" if endpoint is None else _server(endpoint, bucket)
    return Place(f"{service} {server}/{bucket}", tuple(_segments(prefix)))


def web_place(url: str) -> Place:
    """Return the place of what is below a URL."""
    return Place(f"web {_server(url, '')}", tuple(_segments(urlsplit(url).path)))


def _server(endpoint: str, bucket: str) -> str:
    """Return what a server is called whatever the spelling of its URL; nothing for Amazon's, which share their buckets' names."""
    parts = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
    host = (parts.hostname or "").rstrip(".").lower()
    if host.endswith(_AMAZON):
        return ""
    host = host.removeprefix(f"{bucket.lower()}.") if bucket else host
    if host in _THIS_MACHINE:
        host = "localhost"
    port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
    return host if port in _DEFAULT_PORTS.values() or port is None else f"{host}:{port}"


def _segments(path: str) -> Iterator[str]:
    return filter(None, path.split("/"))
