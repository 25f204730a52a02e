"""The demo runs, on files that are given and on ones that it finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def quickstart(*arguments: str | Path) -> str:
    command = [sys.executable, "-X", "utf8", str(ROOT / "examples/quickstart.py"), "--mebibytes", "8", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=True, text=True, encoding="utf-8", timeout=120).stdout


def test_it_finds_files_of_its_own() -> None:
    output = quickstart()
    assert "stored README.md" in output
    assert "lecture.mp4" in output
    assert "ContentTooLargeError" in output
    assert "ChecksumMismatchError" in output
    assert "rolled back: " in output
    assert "committed: kept.txt is new on the disk" in output
    assert "0 are left" in output


def test_it_stores_the_files_given(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "über [1].txt").write_bytes(b"text")
    (tmp_path / "film.mkv").write_bytes(bytes(1_000_000))
    root = tmp_path / "storage"
    output = quickstart("--root", root, "--large", tmp_path / "film.mkv", tmp_path / "empty.txt", tmp_path / "über [1].txt")
    assert "stored empty.txt" in output
    assert "stored über [1].txt" in output
    assert [path.name for path in root.iterdir()] == [".granite-storage"]


def test_a_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large.bin").write_bytes(bytes(17 * 1024 * 1024))
    assert "refused large.bin" in quickstart(tmp_path / "large.bin")


def test_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        quickstart(tmp_path / "nothing")
    assert caught.value.returncode == 2
    assert "is not a file" in caught.value.stderr
