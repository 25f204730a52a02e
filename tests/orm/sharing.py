"""What refers to a variant beside the row that it was made for, and what takes it from that row."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from sqlalchemy import delete, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import StoredObjectRef, bind_storage
from granite_storage.orm import StoredObjectRefType, journal_tables
from granite_storage.orm.journal.journal import StorageJournal
from granite_storage.rederivation import rederive
from tests.orm.clones import bound_beside, cloned
from tests.orm.derivations import declared
from tests.orm.environment import Doc, OrmEnvironment, file

__all__ = ["SHARED", "TAKEN", "emptied", "named_by_a_plain_ref"]


@asynccontextmanager
async def _in_another_base(env: OrmEnvironment, ref: StoredObjectRef) -> AsyncIterator[None]:
    async with bound_beside(env, is_journaled=env.journal is not None):
        await env.sql("INSERT INTO paper (id, file) SELECT id, file FROM doc")
        yield


@asynccontextmanager
async def _in_another_schema(env: OrmEnvironment, ref: StoredObjectRef) -> AsyncIterator[None]:
    async with cloned(env):
        yield


@asynccontextmanager
async def _in_another_column(env: OrmEnvironment, ref: StoredObjectRef) -> AsyncIterator[None]:
    await env.sql("UPDATE doc SET other = file")
    await env.sql("INSERT INTO doc (id, title, other) SELECT 9, '', other FROM doc")
    await env.sql("UPDATE doc SET other = NULL WHERE id = 1")
    yield


@asynccontextmanager
async def named_by_a_plain_ref(env: OrmEnvironment, *refs: StoredObjectRef) -> AsyncIterator[None]:
    """Bind another base whose rows have plain refs."""

    class Other(DeclarativeBase):
        pass

    class Cover(Other):
        __tablename__ = "cover"
        id: Mapped[int] = mapped_column(primary_key=True)
        shown: Mapped[StoredObjectRef | None] = mapped_column(StoredObjectRefType)

    journal = None
    if env.journal is not None:
        journal_tables(Other.metadata)
        journal = StorageJournal(env.engine)
    async with env.engine.begin() as connection:
        await connection.run_sync(Cover.metadata.create_all)
    binding = bind_storage(Other, env.manager, session_factory=env.sessions, journal=journal)
    try:
        async with env.sessions.begin() as session:
            session.add_all(Cover(id=number, shown=ref) for number, ref in enumerate(refs))
        yield
    finally:
        binding.unbind()
        if journal is not None:
            await journal.aclose()
        await env.sql("DROP TABLE cover")


def _by_a_plain_ref(env: OrmEnvironment, ref: StoredObjectRef) -> AbstractAsyncContextManager[None]:
    return named_by_a_plain_ref(env, *(ref.variants or {}).values())


def _within_a_plain_ref(env: OrmEnvironment, ref: StoredObjectRef) -> AbstractAsyncContextManager[None]:
    return named_by_a_plain_ref(env, ref)


SHARED: dict[str, Callable[[OrmEnvironment, StoredObjectRef], AbstractAsyncContextManager[None]]] = {
    "another base": _in_another_base,
    "another schema": _in_another_schema,
    "another column": _in_another_column,
    "a plain ref": _by_a_plain_ref,
    "a plain ref to the original": _within_a_plain_ref,
}


def own_schema(env: OrmEnvironment) -> str:
    """Return the schema of the environment's own tables: a run over all schemas would change their clones as well."""
    if env.database.is_sqlite:
        return "main"
    return "public" if env.database.is_postgres else str(env.database.url.database)


async def _make_all_again(env: OrmEnvironment) -> None:
    await rederive(env.binding, which="all", columns=["doc.file"], schemas=[own_schema(env)])


async def _drop_undeclared(env: OrmEnvironment) -> None:
    with declared({}):
        await rederive(env.binding, drop_undeclared=True, columns=["doc.file"], schemas=[own_schema(env)])


async def _delete(env: OrmEnvironment) -> None:
    async with env.sessions.begin() as session:
        await session.delete(await session.get_one(Doc, 1))


async def _replace(env: OrmEnvironment) -> None:
    async with env.sessions.begin() as session:
        (await session.get_one(Doc, 1)).file = file("y")


async def _clear_in_a_savepoint(env: OrmEnvironment) -> None:
    async with env.sessions.begin() as session, session.begin_nested():
        (await session.get_one(Doc, 1)).file = None


async def _delete_in_bulk(env: OrmEnvironment) -> None:
    async with env.sessions.begin() as session:
        await session.execute(delete(Doc).where(Doc.id == 1))


async def _clear_in_bulk(env: OrmEnvironment) -> None:
    async with env.sessions.begin() as session:
        await session.execute(update(Doc).where(Doc.id == 1).values(file=None))


TAKEN: dict[str, Callable[[OrmEnvironment], Awaitable[None]]] = {
    "made again": _make_all_again,
    "not declared": _drop_undeclared,
    "deleted": _delete,
    "replaced": _replace,
    "cleared in a savepoint": _clear_in_a_savepoint,
    "deleted in bulk": _delete_in_bulk,
    "cleared in bulk": _clear_in_bulk,
}


async def emptied(env: OrmEnvironment) -> None:
    """Delete rows and objects, which are shared at the end of a test."""
    await env.sql("DELETE FROM doc")
    for location in await env.objects():
        await env.backend.delete(location)
