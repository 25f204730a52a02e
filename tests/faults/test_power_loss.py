"""A power loss during a write: a name that reaches the disk leads to all of the bytes, whether or not the write has returned."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tests.core.support import in_new_process
from tests.faults.test_disk import RECORDED


def test_no_name_is_on_the_disk_before_its_bytes(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    effects = json.loads(in_new_process(RECORDED, root, "folder/name"))
    volatile: list[tuple[str, str]] = []
    safe: set[tuple[str, str]] = set()
    named = 0
    for kind, path, *rest in effects:
        match kind:
            case "entry":
                volatile.append((path, rest[0]))
            case "data":
                volatile.append((path, "bytes"))
            case "fsync":
                safe.update(item for item in volatile if item[0] == path)
                volatile = [item for item in volatile if item[0] != path]
        for size in range(len(volatile) + 1):
            for lucky in itertools.combinations(volatile, size):
                on_disk = safe | set(lucky)
                if {(str(root), "folder"), (f"{root}/folder", "name")} <= on_disk:
                    named += 1
                    assert any(_is_of_the_file(item, root) for item in on_disk), (kind, path, on_disk)
    assert named


def _is_of_the_file(item: tuple[str, str], root: Path) -> bool:
    """Tell whether it is the bytes of the file, written under a temporary name beside it; those of the root's marker are not."""
    path, what = item
    return what == "bytes" and Path(path).parent == root / "folder"
