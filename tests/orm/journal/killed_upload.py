"""Two large uploads, for a process that is killed in their middle; arguments: a database, a folder, whether to synchronise."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator

from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from granite_storage import StorageManager, StoragePolicy
from granite_storage.backends.local import LocalStorageBackend
from granite_storage.backends.wrappers import PrefixedBackend
from granite_storage.orm import Attachment, StorageJournal, bind_storage
from tests.orm.environment import Base, Doc

MIB = 1 << 20


async def main(url: str, root: str, fsync: str) -> None:
    engine = create_async_engine(url)
    store = PrefixedBackend(LocalStorageBackend(root, fsync=fsync == "True"), "some/prefix")
    manager = StorageManager(backends={"store": store}, policies={"docs": StoragePolicy("docs", "store")})
    bind_storage(Base, manager, journal=StorageJournal(engine))
    async with AsyncSession(engine) as session:
        session.add(Doc(id=1, file=Attachment(endless("file"), filename="a"), other=Attachment(endless("other"), filename="b")))
        await session.commit()


async def endless(name: str) -> AsyncIterator[bytes]:
    for _ in range(12):
        yield bytes(MIB)
    os.write(1, f"{name} has begun\n".encode())
    await asyncio.sleep(3600)
    yield b""


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
