import io
from collections.abc import AsyncIterator

import httpx
import pytest
from granite_storage import StorageManager, bind_storage
from granite_storage.backends.memory import MemoryStorageBackend
from PIL import Image
from sqlalchemy.ext.asyncio import AsyncConnection

from app.database import engine, sessions
from app.main import app
from app.models import Base, User
from app.storage import storage
from app.users import hash_token


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def files(anyio_backend: str) -> AsyncIterator[dict[str, MemoryStorageBackend]]:
    """The storage of the application, with its policies, in memory."""
    backends = {key: MemoryStorageBackend() for key in storage.backends}
    async with StorageManager(backends=backends, policies=storage.policies) as manager:
        binding = bind_storage(Base, manager)
        yield backends
        binding.unbind()


@pytest.fixture
async def connection(
    files: dict[str, MemoryStorageBackend],
) -> AsyncIterator[AsyncConnection]:
    """A transaction that holds all sessions of a test, and is rolled back."""
    async with engine.connect() as connection:
        await connection.begin()
        await connection.run_sync(Base.metadata.create_all)
        sessions.configure(bind=connection, join_transaction_mode="create_savepoint")
        yield connection
        sessions.configure(bind=engine)
        await connection.rollback()
    await engine.dispose()


async def client_of(email: str, is_admin: bool = False) -> httpx.AsyncClient:
    async with sessions.begin() as session:
        session.add(User(email=email, token_hash=hash_token(email), is_admin=is_admin))
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app),
        base_url="http://test",
        headers={"Authorization": f"Bearer {email}"},
    )


@pytest.fixture
async def anna(connection: AsyncConnection) -> AsyncIterator[httpx.AsyncClient]:
    async with await client_of("anna@example.org", is_admin=True) as client:
        yield client


@pytest.fixture
async def ben(connection: AsyncConnection) -> AsyncIterator[httpx.AsyncClient]:
    async with await client_of("ben@example.org") as client:
        yield client


@pytest.fixture
def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (640, 480), "teal").save(file, "PNG")
    return file.getvalue()
