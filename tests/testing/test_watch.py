"""Our own tests are watched: what one leaves behind, or blocks, fails."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

LEAKS = """
import asyncio, socket, tempfile, threading, time
from pathlib import Path

KEPT = []

async def test_task():
    KEPT.append(asyncio.ensure_future(asyncio.sleep(100)))

def test_thread():
    threading.Thread(target=time.sleep, args=(1,), name="own", daemon=True).start()

def test_file(tmp_path):
    KEPT.append(open(tmp_path / "file", "w"))

def test_connection():
    KEPT.append(socket.create_server(("127.0.0.1", 0)))

def test_temporary_file():
    KEPT.append(tempfile.mkdtemp())

def test_unfinished_file(tmp_path):
    (tmp_path / ".granite-0123.tmp").touch()

async def test_blocking(tmp_path, monkeypatch):
    from granite_storage.backends.memory import MemoryStorageBackend
    source = compile("def stat(self, location): time.sleep(0.001)", MemoryStorageBackend.put_bytes.__code__.co_filename, "exec")
    names = {"time": time}
    exec(source, names)
    names["stat"](None, "x")

async def test_clean(tmp_path):
    with open(tmp_path / "file", "w"), tempfile.TemporaryFile():
        await asyncio.sleep(0)
"""


@pytest.fixture
def watched(pytester: pytest.Pytester) -> pytest.Pytester:
    """An inner run that is watched as ours is, with less patience."""
    own = Path(__file__).parents[1] / "conftest.py"
    impatient, changed = re.subn(r"^SETTLING = .*$", "SETTLING = 0.2", own.read_text(), flags=re.MULTILINE)
    assert changed == 1
    pytester.makeconftest(impatient)
    scopes = [f"asyncio_default_{what}_loop_scope = session" for what in ("fixture", "test")]
    pytester.makeini("\n".join(["[pytest]", "asyncio_mode = auto", "markers = case", *scopes]))
    return pytester


@pytest.mark.parametrize(("ci", "outcome"), [("", {"skipped": 1}), ("true", {"errors": 1})])
def test_a_missing_server_is_said(
    watched: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, ci: str, outcome: dict[str, int]
) -> None:
    """A server that is unavailable skips what needs it, with the reason, and fails it in CI."""
    monkeypatch.setenv("CI", ci)
    inner = watched.mkpydir("tests")
    for module in Path(__file__).parents[1].glob("*.py"):
        if module.name not in ("__init__.py", "conftest.py"):
            shutil.copy(module, inner)
    (inner / "servers.py").write_text("def moto_s3():\n    raise RuntimeError('no such program')\n")
    watched.makepyfile("def test_server(moto_server): pass")
    result = watched.runpytest_subprocess("-rsE")
    result.assert_outcomes(**outcome)
    result.stdout.fnmatch_lines(["*moto_s3 is unavailable: no such program*"])


def test_leaks_fail(watched: pytest.Pytester) -> None:
    watched.makepyfile(LEAKS)
    result = watched.runpytest_subprocess("-rA")
    result.assert_outcomes(passed=7, failed=1, errors=6)
    result.stdout.fnmatch_lines_random(
        [
            "*the test left tasks behind*",
            "*the test left threads behind: *'own'*",
            "*the test left open files or connections behind: *file*",
            "*the test left open files or connections behind: *socket*",
            "*the test left temporary files behind: *tmp*",
            "*the test left temporary files behind: *.granite-0123.tmp*",
            "*Blocking call to time.sleep*",
            "PASSED *test_clean",
        ]
    )
