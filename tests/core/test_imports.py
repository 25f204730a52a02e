"""Importing the package loads next to nothing; `tests.benchmarks.bench_import` measures its cost."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
before = set(sys.modules)
import granite_storage
{use}
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
"""
NAMES = ["StorageManager", "StoragePolicy", "StoredObjectRef", "SizeLimitedStream", "StorageBackend", "StorageError"]


def imported(use: str = "") -> set[str]:
    """Return the packages that a new interpreter loads."""
    command = [sys.executable, "-c", PROGRAM.format(use=use)]
    return set(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))


def foreign(packages: set[str]) -> set[str]:
    return packages - sys.stdlib_module_names - {"granite_storage"}


def test_importing_loads_next_to_nothing() -> None:
    """Not even asyncio: heavy modules are loaded on first use of a name that needs them."""
    packages = imported()
    assert foreign(packages) == set()
    assert not packages & {"asyncio", "hashlib", "ssl", "logging", "dataclasses", "inspect"}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_core_loads_no_other_package(name: str) -> None:
    assert foreign(imported(f"granite_storage.{name}")) == set()


def loaded_after(use: str) -> set[str]:
    """Return the modules that judge uploads, and what they build on, which a program loads."""
    modules = ("filetype", "mimetypes", "PIL", "granite_storage.inspection.")
    program = f"import json, sys\n{use}\nprint(json.dumps([*sys.modules]))"
    named = json.loads(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    return {name.removeprefix("granite_storage.inspection.") for name in named if name.startswith(modules)}


def test_what_judges_uploads_is_loaded_with_the_first_policy_that_needs_it() -> None:
    """All of it, then: an upload on the event loop must not wait for a disk."""
    core = "from granite_storage import StorageManager, StoragePolicy, bind_storage, attachment\n"
    policy = 'StoragePolicy("files", "local")\n'
    needed = loaded_after(core + policy)
    assert needed == {"base", "scanning"}
    assert loaded_after("from granite_storage.inspection import Scanner") == {"base"}
    for use in ('StoragePolicy("files", "local", validate=print)', 'attachment("files", validate=print)'):
        more = loaded_after(core + use)
        assert {"gate", "media_types", "stripping"} <= more
        assert not {"clamd", "images", "PIL"} & more
    assert "filetype" in loaded_after(core + 'StoragePolicy("files", "local", accept=("image/*",))')


def test_neither_the_command_nor_the_web_is_loaded_with_what_applications_use() -> None:
    loaded = imported(
        "from granite_storage import StorageManager, bind_storage, StorageGarbageCollector\n"
        "from granite_storage.migration import migrate\n"
        "from granite_storage.verification import verify"
    )
    assert "sqlalchemy" in loaded
    assert not loaded & {"alembic", "click", "rich", "starlette", "python_multipart", "pydantic"}


def test_the_backends_load_only_what_they_need() -> None:
    assert foreign(imported("from granite_storage.backends import base, memory, wrappers")) == set()
    assert foreign(imported("from granite_storage.backends import local")) == {"aiofiles"}
    assert foreign(imported("from granite_storage.backends.s3 import S3StorageBackend")) == set()
    assert foreign(imported("from granite_storage.backends.obstore import ObjectStoreBackend")) == set()
