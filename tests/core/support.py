"""What the tests of the core share."""

from __future__ import annotations

import asyncio
import os
import pickle
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from granite_storage import StorageBackend, StorageManager, StoragePolicy
from granite_storage.backends.local import LocalStorageBackend

MIB = 1 << 20
SLOT: dict[str, str] = {"storage_key": "files", "model_name": "doc", "entity_id": "1", "field_name": "file"}
PLACE: dict[str, str] = {name: SLOT[name] for name in ("model_name", "entity_id", "field_name")}
PROJECT = Path(__file__).resolve().parents[2]
API_REFERENCE = "\n".join(page.read_text() for page in sorted((PROJECT / "docs/api").glob("*.md")))


def texts(**options: Any) -> st.SearchStrategy[str]:
    """Any text that UTF-8 can encode, as `st.text` gives, which first looks for seconds for what that is."""
    return st.text(st.characters(exclude_categories=["Cs"]), **options)


def manager_on(backend: StorageBackend, **options: Any) -> StorageManager:
    """Return a manager with one policy, `files`, on one backend, `store`; options are the manager's or the policy's."""
    manager_options = {name: options.pop(name) for name in ("drain_timeout", "max_concurrent_uploads") if name in options}
    return StorageManager(
        backends={"store": backend}, policies={"files": StoragePolicy("files", "store", **options)}, **manager_options
    )


def local_manager(root: Path, **options: Any) -> StorageManager:
    return manager_on(LocalStorageBackend(root, fsync=False), **options)


def files_below(root: Path) -> list[str]:
    """The files below a directory, except the marker of a store, relative to it."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.name != ".granite-storage")


def left_below(root: Path) -> list[str]:
    """Everything below a directory except the marker, empty directories included."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.name != ".granite-storage")


async def chunks_of(*chunks: Any, then: BaseException | None = None) -> AsyncIterator[Any]:
    for chunk in chunks:
        await asyncio.sleep(0)
        yield chunk
    if then is not None:
        raise then


async def many(chunk: bytes, times: int) -> AsyncIterator[bytes]:
    for _ in range(times):
        yield chunk


async def endless(chunk: bytes = b"x", pause: float = 0.001) -> AsyncIterator[bytes]:
    while True:
        await asyncio.sleep(pause)
        yield chunk


async def gathered(stream: AsyncIterator[Any]) -> bytes:
    return b"".join([bytes(chunk) async for chunk in stream])


def in_new_process(program: str, *arguments: Any, preexec: Callable[[], None] | None = None, timeout: float = 240) -> str:
    """Run a program in an interpreter of its own, and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program, *map(str, arguments)],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        preexec_fn=preexec,
    )
    assert done.returncode == 0, f"the program ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def open_files(below: Path) -> list[str]:
    """The files below a directory that this process holds open."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if target.startswith(str(below)):
            found.append(target)
    return found


async def eventually(condition: Callable[[], object], *, within: float = 60.0) -> None:
    """Wait until a condition holds; on a machine that has other things to do, too."""
    deadline = asyncio.get_running_loop().time() + within
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not happen in time"
        await asyncio.sleep(0.005)


def pickled(value: Any, protocol: int | None = None) -> Any:
    """Return what comes back from pickling."""
    return pickle.loads(pickle.dumps(value, protocol))  # noqa: S301  # it is our own


class Lag:
    """Counts, while it is entered, how often another task had its turn of the event loop.

    Attributes:
        turns: How often; it asks for one every 5 ms.
    """

    turns = 0

    async def __aenter__(self) -> Lag:
        self._task = asyncio.ensure_future(self._watch())
        await asyncio.sleep(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.005)
            self.turns += 1
