"""Programs of their own: forks, Ctrl-C, a blocked event loop, the journal's worker; each ends without closing anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.applications.processes import until
from tests.core.support import PROJECT, files_below

TIMEOUT = 60


def start(name: str, folder: Path, url: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.applications.program_app", name],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "APP_FOLDER": str(folder), "DATABASE_URL": url},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(name: str, folder: Path, url: str) -> str:
    with start(name, folder, url) as process:
        try:
            said, _ = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    assert process.returncode == 0, said
    return said


def test_forks(tmp_path: Path, database_url: str) -> None:
    assert run("fork", tmp_path, database_url).splitlines()[-1] == "[b'2', b'3', b'4', b'5']"
    assert len(files_below(tmp_path / "files")) == 4


def test_interrupt_during_an_upload(tmp_path: Path, database_url: str) -> None:
    with start("upload_for_ever", tmp_path, database_url) as process:
        try:
            until(lambda: list((tmp_path / "files").rglob(".granite*.tmp")), "no upload begins")
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
    assert process.returncode == 0, said
    assert said.split() == ["uploading", "interrupted"]
    assert [(tmp_path / "files" / name).read_bytes() for name in files_below(tmp_path / "files")] == [b"2"]


@pytest.mark.parametrize("kind", ["sqlite"], indirect=True)
def test_a_session_blocks_a_loop_and_nothing_else(tmp_path: Path, database_url: str) -> None:
    warned, printed = run("block", tmp_path, database_url).splitlines()
    assert "blocks the event loop" in warned
    assert printed == "[b'1']"


@pytest.mark.parametrize("kind", ["postgres"], indirect=True)
def test_the_worker_of_the_journal(tmp_path: Path, database_url: str) -> None:
    assert run("work", tmp_path, database_url) == "['2']\n"


@pytest.mark.parametrize("kind", ["sqlite"], indirect=True)
def test_a_program_that_leaves_everything_open_ends(tmp_path: Path, database_url: str) -> None:
    assert run("leave_open", tmp_path, database_url).startswith("[b'1', 1]\n")


@pytest.mark.parametrize("kind", ["sqlite"], indirect=True)
def test_a_thread_outlives_the_main_thread(tmp_path: Path, database_url: str) -> None:
    assert run("outlive_the_main_thread", tmp_path, database_url) == "['7']\n"


@pytest.mark.parametrize("kind", ["sqlite"], indirect=True)
def test_a_reader_is_its_process_own(tmp_path: Path, database_url: str) -> None:
    refusal, read = run("read_in_a_child", tmp_path, database_url).splitlines()
    assert refusal == "the reader was opened before this process was forked: open the object again in the child"
    assert read == "b'1'"
