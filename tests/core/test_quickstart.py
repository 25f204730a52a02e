"""The demo runs, on files that are given and on ones that it finds."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import program

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples/quickstart.py"


def quickstart(folder: Path, *arguments: str | Path) -> str:
    """Run the demo in this process, and return what it says."""
    said = io.StringIO()
    with program(folder, os.environ), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(sys, "argv", [str(DEMO), "--mebibytes", "8", *map(str, arguments)])
        runpy.run_path(str(DEMO), run_name="__main__")
    return said.getvalue()


def test_it_finds_files_of_its_own() -> None:
    command = [sys.executable, "-X", "utf8", str(DEMO), "--mebibytes", "8"]
    output = subprocess.run(command, capture_output=True, check=True, text=True, encoding="utf-8", timeout=120).stdout
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
    given = tmp_path / "empty.txt", tmp_path / "über [1].txt"
    output = quickstart(tmp_path, "--root", root, "--large", tmp_path / "film.mkv", *given)
    assert "stored empty.txt" in output
    assert "stored über [1].txt" in output
    assert [path.name for path in root.iterdir()] == [".granite-storage"]


def test_a_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large.bin").write_bytes(bytes(17 * 1024 * 1024))
    assert "refused large.bin" in quickstart(tmp_path, tmp_path / "large.bin")


def test_a_file_that_is_not_there_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        quickstart(tmp_path, tmp_path / "nothing")
    assert caught.value.code == 2
    assert "is not a file" in capsys.readouterr().err
