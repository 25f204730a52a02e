import asyncio

from alembic import context
from granite_storage.alembic import include_storage
from sqlalchemy.engine import Connection

from app.database import engine
from app.models import Base

include_storage(context)


def run_migrations(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Base.metadata)
    with context.begin_transaction():
        context.run_migrations()


async def run() -> None:
    async with engine.connect() as connection:
        await connection.run_sync(run_migrations)
    await engine.dispose()


asyncio.run(run())
