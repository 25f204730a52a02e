"""What importing the package costs, and what it leaves unloaded."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

PROGRAM = """
import json, sys, time
before = set(sys.modules)
start = time.perf_counter()
import granite_storage
{use}
seconds = time.perf_counter() - start
roots = sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})
print(json.dumps({{"seconds": seconds, "roots": roots}}))
"""
HEAVY = {"sqlalchemy", "aioboto3", "aiobotocore", "boto3", "botocore", "starlette", "fastapi", "pydantic", "pytest", "aiohttp"}


def imported(use: str = "") -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM.format(use=use)]
    result: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return result


def test_importing_is_cheap() -> None:
    """The best of several runs, so that a busy machine is not mistaken for a slow import."""
    assert min(imported()["seconds"] for _ in range(5)) < 0.060


def test_importing_loads_no_extra() -> None:
    assert not HEAVY & set(imported()["roots"])


def test_using_the_core_loads_no_extra() -> None:
    use = "from granite_storage import StorageManager, StoragePolicy, StoredObjectRef, SizeLimitedStream, StorageBackend\n"
    use += "from granite_storage.backends import base, local, memory"
    assert not HEAVY & set(imported(use)["roots"])


def test_using_the_core_is_cheap() -> None:
    use = "granite_storage.StorageManager, granite_storage.StoragePolicy, granite_storage.StoredObjectRef"
    assert min(imported(use)["seconds"] for _ in range(5)) < 0.250
