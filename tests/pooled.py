"""What pools keep from one test to the next, connections and worker processes, and no test has left open."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import weakref
from typing import Any

__all__ = ["is_pooled_file", "keep", "keep_files_below", "pooled_descriptors", "pooled_threads"]

_sockets: weakref.WeakSet[Any] = weakref.WeakSet()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
_folders: set[str] = set()


def keep(connection: Any) -> None:
    """Note a connection of asyncpg, psycopg, asyncmy, PyMySQL or aiosqlite that goes back to a pool when a test ends."""
    if (thread := getattr(connection, "_thread", None)) is not None:
        _threads.add(thread)
    else:
        _sockets.add(getattr(connection, "_transport", None) or getattr(connection, "_sock", None) or connection)


def keep_files_below(folder: os.PathLike[str]) -> None:
    """Note where the database files of pooled connections lie."""
    _folders.add(f"{os.fspath(folder)}/")


def pooled_descriptors() -> set[str]:
    """Return the numbers of the open sockets of pooled connections and processes."""
    found: set[str] = set()
    if (derived := sys.modules.get("granite_storage.derived.processes")) is not None:
        found |= {str(number) for pool in derived._all_processes for worker in list(pool.workers) for number in worker.filenos()}
    for owner in list(_sockets):
        with contextlib.suppress(Exception):  # closed meanwhile: each driver says so in its own way
            socket = owner.get_extra_info("socket") if hasattr(owner, "get_extra_info") else owner
            found.add(str(socket.fileno()))
    return found


def pooled_threads() -> set[threading.Thread]:
    """Return the threads of pooled connections."""
    return set(_threads)


def is_pooled_file(target: str) -> bool:
    """Tell whether an open file belongs to a database of pooled connections."""
    return target.startswith(tuple(_folders))
