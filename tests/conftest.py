"""What every test is watched for, and the backends and servers that tests run against."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import importlib
import inspect
import itertools
import os
import re
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from blockbuster import BlockBuster
from hypothesis import settings

from granite_storage._portal import portal
from granite_storage.backends.base import StorageBackend
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.backends.wrappers import PrefixedBackend
from granite_storage.locations import RESERVED_PREFIX
from granite_storage.orm._interfaces import active_bindings
from granite_storage.testing import BackendConformance
from tests import termination, tiers
from tests.pooled import is_pooled_file, pooled_descriptors, pooled_threads
from tests.services import service

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

    from tests.azurite import AzureServer
    from tests.servers import S3Server

SETTLING = 30.0
"""How long what is just ending may take to end, in seconds."""

POOLED_THREADS = ("granite-", "asyncio_", "ThreadPoolExecutor-", "pytest_timeout", "waitpid-")
"""Beginnings of the names of threads that are kept for later work, or that the runner owns."""


CASES_OF_THE_SUITE = {
    "test_abandoned_readers": ["STR-13"],
    "test_another_process_knows_the_store": ["RA-01", "RA-03"],
    "test_cancelled_copy": ["CAN-01", "CAN-04"],
    "test_cancelled_delete": ["CAN-01"],
    "test_cancelled_listing": ["CAN-01"],
    "test_cancelled_read": ["CAN-01", "CAN-04"],
    "test_cancelled_second_write": ["CAN-01"],
    "test_cancelled_write": ["CAN-01", "CAN-04", "S3F-05"],
    "test_change_behind_a_listing": ["S3F-11"],
    "test_deleted_while_open": ["S3F-10"],
    "test_event_loops_in_threads": ["POL-06"],
    "test_event_loops_one_after_the_other": ["POL-06"],
    "test_extra_keys": ["RA-12"],
    "test_extra_keys_stay_behind": ["RA-12"],
    "test_failing_sibling": ["CAN-05"],
    "test_full_store": ["DSK-01"],
    "test_hostile_location": ["LOC-15", "LOC-19", "LOC-20", "LOC-21"],
    "test_identity": ["RA-03"],
    "test_killed_writer": ["DSK-03"],
    "test_many_readers": ["S3F-19"],
    "test_missing_is_silent": ["S3F-15"],
    "test_more_than_one_page": ["S3F-11"],
    "test_odd_location": ["S3F-12"],
    "test_over_the_limit": ["LIM-01"],
    "test_page_sizes": ["S3F-11"],
    "test_places": ["RA-01"],
    "test_round_trip": ["STR-10"],
    "test_source_raises": ["STR-03", "STR-11"],
    "test_timeout": ["CAN-03", "STR-06"],
    "test_use_after_close": ["POL-06"],
    "test_wrong_declaration": ["STR-08", "STR-09"],
}
"""The rows that cases of the public suite stand for; the suite itself knows no such marks."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run everything: every matrix, random seeds, long histories")


def pytest_configure(config: pytest.Config) -> None:
    tiers.configure(config)
    termination.configure(config)
    options = {"deadline": None, "database": None, "print_blob": True}
    settings.register_profile("default", derandomize=True, **options)
    settings.register_profile("exhaustive", **options)
    settings.load_profile("exhaustive" if tiers.is_exhaustive() else "default")


def pytest_report_header() -> str:
    return tiers.report_header()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Collect without looking for garbage among a million objects that stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Pass over the files that have nothing for this run; to import and to collect them all takes ten seconds."""
    return True if tiers.may_be_passed_over(collection_path, config) else None


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Leave out what the tier does not run, as soon as all parameters are known."""
    tiers.narrow(metafunc)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the cases of the public suite with the rows they stand for, and choose the tier."""
    for item in items:
        suite = getattr(item, "cls", None)
        if suite is not None and issubclass(suite, BackendConformance):
            item.add_marker(pytest.mark.case(*CASES_OF_THE_SUITE.get(getattr(item, "originalname", ""), ())))
    tiers.choose(config, items)


def pytest_collection_finish() -> None:
    """Leave what imports and the collected tests consist of, a million objects, out of each later garbage collection.

    A fifth of the time of the tests of attachments went into going through them again and again.
    """
    _set_aside()


_tests_run = itertools.count(1)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Leave out what earlier tests have left for good as well, such as compiled statements: the collections grow longer else."""
    if next(_tests_run) % 100 == 0:
        _set_aside()


def _set_aside() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _blocking_calls() -> Iterator[BlockBuster]:
    """What `_nothing_blocks` watches; to make it, or to put it in place, takes as long as a quick test."""
    watched = BlockBuster("granite_storage", excluded_modules=["granite_storage.testing"])
    for function in watched.functions.values():
        function.can_block_in("asyncpg/connection.py", {"connect"})
    try:
        yield watched
    finally:
        watched.deactivate()


@pytest.fixture(autouse=True)
def _nothing_blocks(_blocking_calls: BlockBuster) -> Iterator[BlockBuster]:
    """Fail a call that blocks an event loop where the library is in the stack; what tests do by themselves is not looked at.

    The suite for backends is left out because it is a test that the library ships, and so is what a driver does to open a
    connection: asyncpg looks for a file of passwords.
    """
    allowed = {function: list(function.can_block_functions) for function in _blocking_calls.functions.values()}
    _blocking_calls.activate()  # it stays so until the end, where no test ends it
    try:
        yield _blocking_calls
    finally:
        for function, exceptions in allowed.items():
            function.can_block_functions[:] = exceptions


@pytest.fixture(scope="session", autouse=True)
def _temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give `tempfile` and child processes a folder of this run, so that what is left there is theirs; sockets want it short."""
    tmp_path_factory.getbasetemp()  # made now, so that pytest's own folders are not below this one
    with termination.temporary_folder() as folder:
        yield folder


@pytest.fixture(scope="session", autouse=True)
def _processes_of_derivations(_temporary_folder: Path) -> Iterator[None]:
    """Keep the worker processes from one test to the next, and end them before the folder that they may work in goes."""
    yield
    if (derived := sys.modules.get("granite_storage.derived.processes")) is not None:
        derived.close_all()


_folders_made = itertools.count()


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each test, as pytest's.

    Pytest's own looks through those of all earlier tests for a free number, and puts a link to the newest: it takes longer than
    most tests.
    """
    name = re.sub(r"\W", "_", request.node.name)[:30]
    path = tmp_path_factory.getbasetemp() / f"{name}{next(_folders_made)}"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture(scope="session")
def moto_server(_temporary_folder: Path) -> Iterator[S3Server]:
    """An S3 server that is quick and lenient; see `tests.servers`."""
    yield from _started("moto_s3")


@pytest.fixture(scope="session")
def seaweedfs_server(_temporary_folder: Path) -> Iterator[S3Server]:
    """An S3 server that checks signatures, checksums and conditions; see `tests.servers`."""
    yield from _started("seaweedfs")


@pytest.fixture(scope="session")
def postgres_server(_temporary_folder: Path) -> Iterator[URL]:
    """A PostgreSQL of this run, one for all who ask: a fixture that is imported into a `conftest.py` would start it once more."""
    from tests.orm.databases import postgres

    with postgres(_temporary_folder) as url:
        yield url


@pytest.fixture(scope="session")
def azurite_server(_temporary_folder: Path) -> Iterator[AzureServer]:
    """A stand-in for Azure's blobs; see `tests.azurite`."""
    yield from _started("azurite", "tests.azurite")


@pytest.fixture(scope="session", autouse=True)
async def _started_loop() -> asyncio.AbstractEventLoop:
    """The event loop that all tests share; made before any of them, so that what it opens is not taken for a test's."""
    return asyncio.get_running_loop()


@pytest.fixture(scope="session", autouse=True)
def _threads_of_obstore() -> None:
    """Start the threads that obstore keeps for all stores of a process, so that what they open is not taken for a test's."""
    with contextlib.suppress(ImportError):
        from obstore.store import MemoryStore

        asyncio.run(MemoryStore().put_async("warm", b""))


BACKENDS = [
    "memory",
    "memory-prefixed",
    "local",
    "local-prefixed",
    "s3-moto",
    "s3-moto-prefixed",
    "s3-seaweedfs",
    "s3-seaweedfs-prefixed",
]


@pytest.fixture(params=BACKENDS)
async def backend(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[StorageBackend]:
    """Every backend, fresh and empty, with and without a prefix."""
    kind, _, rest = request.param.partition("-")
    prefixed = request.param.endswith("prefixed")
    async with contextlib.AsyncExitStack() as stack:
        backend: StorageBackend
        if kind == "s3":
            server: S3Server = request.getfixturevalue(f"{rest.partition('-')[0]}_server")
            bucket = await stack.enter_async_context(server.bucket())
            backend = server.backend(bucket, prefix="some/prefix" if prefixed else "")
        else:
            backend = MemoryStorageBackend() if kind == "memory" else LocalStorageBackend(tmp_path, fsync=False)
            backend = PrefixedBackend(backend, "some/prefix") if prefixed else backend
        stack.push_async_callback(backend.aclose)
        yield backend


def _started(server: str, module: str = "tests.servers") -> Iterator[Any]:
    with service(server, _server(server, module)) as started:
        yield started


@contextlib.contextmanager
def _server(name: str, module: str) -> Iterator[Any]:
    servers = importlib.import_module(module)
    with getattr(servers, name)() as started:
        yield started


@pytest.fixture(autouse=True)
def _nothing_left(
    request: pytest.FixtureRequest, _temporary_folder: Path, _started_loop: asyncio.AbstractEventLoop
) -> Iterator[None]:
    """Fail a test that leaves a thread, an open file or connection, or a temporary file behind."""
    for server in _servers_of(request):
        request.getfixturevalue(server)
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    threads, files = set(threading.enumerate()), _temporary_files(_temporary_folder, None)
    generators = weakref.WeakSet(_started_loop._asyncgens)  # type: ignore[attr-defined]
    descriptors = _descriptors(str(_temporary_folder))
    yield
    turn = functools.partial(_turn, _started_loop)
    portal.close()  # the loop of synchronous callers is the process's
    _close_generators(_started_loop, generators)
    _require_settled("threads", turn, lambda: [thread.name for thread in _own_threads(threads)])
    _require_settled("open files or connections", turn, lambda: sorted(_descriptors(str(_temporary_folder)) - descriptors))
    _require_settled("temporary files", turn, lambda: sorted(_temporary_files(_temporary_folder, folder) - files))


@pytest.fixture(autouse=True)
def _no_binding_left() -> Iterator[None]:
    """Unbind what a test leaves bound, and fail it: a binding would have its say in the tests that follow."""
    before = active_bindings()
    yield
    left = [binding for binding in active_bindings() if binding not in before]
    for binding in left:
        binding.unbind()
    if left:
        pytest.fail(f"the test left bases bound: {', '.join(binding.base_name for binding in left)}")


@pytest.fixture(autouse=True)
def _no_task_left(
    request: pytest.FixtureRequest, _nothing_left: None, _started_loop: asyncio.AbstractEventLoop
) -> Iterator[None]:
    """Fail a coroutine test that leaves a task behind."""
    if not inspect.iscoroutinefunction(getattr(request.node, "obj", None)):
        yield
        return
    before = asyncio.all_tasks(_started_loop)
    yield
    deadline = time.monotonic() + SETTLING
    while left := asyncio.all_tasks(_started_loop) - before:
        if time.monotonic() > deadline:
            pytest.fail(f"the test left tasks behind: {left}")
        _turn(_started_loop, 0.01)


def _servers_of(request: pytest.FixtureRequest) -> list[str]:
    """The servers that a test needs: they start before it is watched."""
    backend = getattr(request.node, "callspec", None)
    backend = backend.params.get("backend", "") if backend else ""
    wanted = [f"{backend.split('-')[1]}_server"] if isinstance(backend, str) and backend.startswith("s3-") else []
    return [
        name for name in ("moto_server", "seaweedfs_server", "azurite_server") if name in request.fixturenames or name in wanted
    ]


def _own_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    known = before | pooled_threads()
    return [thread for thread in threading.enumerate() if thread not in known and not thread.name.startswith(POOLED_THREADS)]


def _descriptors(ignored: str) -> set[tuple[str, str]]:
    """What is open, by number: files, sockets, pipes.

    Not the connections that a pool keeps for the next test, the standard streams, which the runner redirects as it likes, nor the
    unnamed files right in a folder in which moto keeps its objects.
    """
    found: set[tuple[str, str]] = set()
    numbers = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    for number in sorted(set(numbers) - {"0", "1", "2"} - pooled_descriptors()):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{number}")
            if not target.startswith(f"{ignored}/#") and not is_pooled_file(target):
                found.add((number, target))
    return found


def _temporary_files(folder: Path, own: Path | None) -> set[str]:
    """What lies in the folder of `tempfile`, and the unfinished files of backends in a test's own folder."""
    found = {entry.name for entry in folder.iterdir()}
    if own is not None:
        found |= {str(path) for path in own.rglob(f"{RESERVED_PREFIX}*.tmp")}
    return found


def _close_generators(loop: asyncio.AbstractEventLoop, before: weakref.WeakSet[Any]) -> None:
    """Close what a test's generators hold, as `asyncio.run` does at the end of a program: the loop of the tests goes on."""
    for generator in [item for item in loop._asyncgens if item not in before]:  # type: ignore[attr-defined]
        with contextlib.suppress(Exception):
            loop.run_until_complete(generator.aclose())


def _turn(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    """Let the loop run: what is closed there, or was dropped, is gone only after another of its turns."""
    if loop.is_closed():
        time.sleep(seconds)
    else:
        loop.run_until_complete(asyncio.sleep(seconds))


def _require_settled(what: str, turn: Callable[[float], None], left: Callable[[], list[Any]]) -> None:
    start = time.monotonic()
    collect_after = 0.05  # most of it ends by itself, and collecting takes longer than that
    while found := left():
        waited = time.monotonic() - start
        if waited > SETTLING:
            pytest.fail(f"the test left {what} behind: {found}")
        if waited > collect_after:
            gc.collect()
            collect_after = 2 * (time.monotonic() - start)  # what is collected ends a while later
        turn(0.005)
