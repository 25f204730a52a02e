"""The pytest fixtures, as users have them."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

LOOPS = ["-o", "asyncio_default_fixture_loop_scope=function"]
CONFTEST = 'pytest_plugins = ["granite_storage.testing.fixtures"]\n'

BODY = """
import pytest
from granite_storage import StoragePolicy
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.testing import FaultInjectingBackend

WHERE = {{"model_name": "user", "entity_id": "1", "field_name": "avatar"}}
{mark}

{before}
async def test_memory(granite_memory_storage):
    ref = await granite_memory_storage.put_bytes(storage_key="files", content=b"bytes", **WHERE)
    assert await granite_memory_storage.get(ref) == b"bytes"

{before}
async def test_local(granite_local_storage, tmp_path):
    ref = await granite_local_storage.put_stream(storage_key="files", stream=[b"by", b"tes"], **WHERE)
    assert (tmp_path / "granite-storage" / ref.location).read_bytes() == b"bytes"

{before}
async def test_make(granite_make_storage):
    faults = FaultInjectingBackend(MemoryStorageBackend())
    faults.fail("put_bytes", error=RuntimeError("on purpose"))
    storage = granite_make_storage(faults, policies={{"avatars": StoragePolicy("avatars", "anywhere", max_size=3)}})
    with pytest.raises(RuntimeError, match="on purpose"):
        await storage.put_bytes(storage_key="avatars", content=b"...", **WHERE)
    await storage.put_bytes(storage_key="avatars", content=b"...", **WHERE)

def test_backends(granite_make_storage):
    backends = {{"one": MemoryStorageBackend(), "two": MemoryStorageBackend()}}
    assert set(granite_make_storage(backends=backends, policies={{}}).backends) == {{"one", "two"}}
"""


@pytest.mark.parametrize(
    ("plugins", "before", "mark"),
    [
        ([*LOOPS, "--asyncio-mode=auto"], "", ""),
        ([*LOOPS, "--asyncio-mode=strict"], "@pytest.mark.asyncio", ""),
        (
            ["-p", "no:asyncio"],
            "@pytest.mark.anyio",
            "@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n",
        ),
    ],
    ids=["pytest-asyncio auto", "pytest-asyncio strict", "anyio"],
)
def test_fixtures(pytester: pytest.Pytester, plugins: list[str], before: str, mark: str) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(BODY.format(before=before, mark=mark))
    pytester.makeini("[pytest]\nfilterwarnings = error\n")
    result = pytester.runpytest_subprocess(*plugins)
    result.assert_outcomes(passed=4)


def test_policies_are_overridden(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        """
        import pytest
        from granite_storage import StoragePolicy

        @pytest.fixture
        def granite_storage_policies():
            return {"one": StoragePolicy("one", "disk"), "two": StoragePolicy("two", "cloud")}

        def test_policies(granite_memory_storage):
            assert set(granite_memory_storage.policies) == {"one", "two"}
            assert set(granite_memory_storage.backends) == {"disk", "cloud"}
        """
    )
    pytester.makeini("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    pytester.runpytest_subprocess().assert_outcomes(passed=1)
