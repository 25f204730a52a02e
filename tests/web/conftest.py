"""A manager to serve files from, and an application that receives them, on the backend of the test's choice."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import httpx
import pytest
from sqlalchemy.ext.asyncio import async_sessionmaker

from granite_storage import StorageBackend, StorageManager
from granite_storage.backends.memory import MemoryStorageBackend
from granite_storage.orm import bind_storage
from tests.web.receiving import App, Base, engine_of, manager_of
from tests.web.serving import memory_manager


@pytest.fixture
async def manager() -> AsyncIterator[StorageManager]:
    async with memory_manager() as manager:
        yield manager


@pytest.fixture
async def receiving_manager(request: pytest.FixtureRequest) -> AsyncIterator[StorageManager]:
    """A manager on the `backend` of the test, in memory where it has none."""
    backend: StorageBackend = MemoryStorageBackend()
    if "backend" in request.fixturenames:
        backend = request.getfixturevalue("backend")
    async with manager_of(backend) as manager:
        yield manager


@pytest.fixture
async def receiving(receiving_manager: StorageManager, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[App]:
    engine = engine_of(tmp_path_factory.getbasetemp() / f"database-{uuid.uuid4().hex}")
    sessions = async_sessionmaker(engine, expire_on_commit=False)
    binding = bind_storage(Base, receiving_manager, session_factory=sessions)
    yield App(receiving_manager, sessions)
    binding.unbind()
    await engine.dispose()


@pytest.fixture
async def client(receiving: App) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=receiving.asgi(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client
