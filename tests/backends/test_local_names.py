"""Names that a file system lists otherwise than they were stored, and folders as deep as a location is long."""

from __future__ import annotations

import contextlib
import os
import time
import unicodedata
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from granite_storage.backends import _local_tree
from granite_storage.backends.local import LocalStorageBackend


class DecomposedEntry:
    """What HFS+ lists: the name decomposed, of the same file."""

    def __init__(self, entry: os.DirEntry[str]) -> None:
        self.name = unicodedata.normalize("NFD", entry.name)
        self.is_dir, self.is_file, self.inode, self.stat = entry.is_dir, entry.is_file, entry.inode, entry.stat


class DecomposingSystem:
    """The calls of the system as they answer on HFS+: names are listed decomposed, and found under both spellings."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    @staticmethod
    @contextlib.contextmanager
    def scandir(directory: int) -> Iterator[Iterator[DecomposedEntry]]:
        with os.scandir(directory) as entries:
            yield map(DecomposedEntry, entries)


@pytest.mark.case("RA-04")
async def test_a_listing_has_names_as_they_were_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LocalStorageBackend(tmp_path, fsync=False)
    stored = sorted(["Müller/1/file/Résumé.pdf", "Müller/1/file/a.pdf", "plain/Å", "plain/z", "日本/ガ"])
    assert any(unicodedata.normalize("NFD", location) != location for location in stored)
    for location in stored:
        await backend.put_bytes(location, b"...")
    monkeypatch.setattr(_local_tree, "os", DecomposingSystem())
    assert [info.location async for info in backend.iter_objects()] == stored
    assert [info.location async for info in backend.iter_objects("Müller/")] == stored[:2]
    assert [info.location async for info in backend.iter_objects(start_after=stored[1])] == stored[2:]
    await backend.aclose()


class StutteringSystem(DecomposingSystem):
    """The calls of a system that lists each name twice, as one may while its directory is changed."""

    @staticmethod
    @contextlib.contextmanager
    def scandir(directory: int) -> Iterator[Iterator[os.DirEntry[str]]]:  # type: ignore[override]
        with os.scandir(directory) as entries:
            yield iter([*entries] * 2)


async def test_a_name_that_is_listed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LocalStorageBackend(tmp_path, fsync=False)
    for location in ("a", "b"):
        await backend.put_bytes(location, b"...")
    monkeypatch.setattr(_local_tree, "os", StutteringSystem())
    assert [info.location async for info in backend.iter_objects()] == ["a", "a", "b", "b"]
    await backend.aclose()


async def test_both_spellings_may_be_files_of_their_own(tmp_path: Path) -> None:
    """As on most file systems of Linux."""
    backend = LocalStorageBackend(tmp_path, fsync=False)
    stored = sorted(["e\u0301", "\u00e9", "only/e\u0301"])
    for location in stored:
        await backend.put_bytes(location, b"...")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/\u00e9").write_bytes(b"...")
    os.link(tmp_path / "linked/\u00e9", tmp_path / "linked/e\u0301")
    assert [info.location async for info in backend.iter_objects()] == sorted([*stored, "linked/e\u0301", "linked/\u00e9"])
    await backend.aclose()


@pytest.mark.case("RE-15")
async def test_a_sweep_of_folders_as_deep_as_a_location_is_long(tmp_path: Path) -> None:
    backend = LocalStorageBackend(tmp_path, fsync=False)
    deepest = "/".join("d" * 512)
    await backend.put_bytes(deepest, b"...")
    with contextlib.ExitStack() as stack:
        directory = os.open(tmp_path, os.O_RDONLY)
        for _ in range(511):
            inside = os.open("d", os.O_RDONLY, dir_fd=directory)
            os.close(directory)
            directory = inside
        stack.callback(os.close, directory)
        os.close(os.open(".granite-0123.tmp", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
        os.utime(".granite-0123.tmp", (time.time() - 7200,) * 2, dir_fd=directory)
    assert await backend.cleanup_incomplete(older_than=timedelta(hours=1)) == 1
    assert await backend.cleanup_incomplete(older_than=timedelta(hours=1)) == 0
    assert await backend.exists(deepest)
    await backend.delete(deepest)
    assert [entry.name for entry in tmp_path.iterdir()] == [".granite-storage"]
    await backend.aclose()
