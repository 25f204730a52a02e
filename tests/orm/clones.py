"""Tables and bases beside the models' own, whose rows refer to the same objects."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import StorageManager, StoragePolicy
from granite_storage.orm import Attachment, StorageJournal, attachment, bind_storage, journal_tables
from tests.orm.environment import OrmEnvironment

__all__ = ["COPIES", "bound_beside", "cloned", "cloned_as", "copy_id"]


@asynccontextmanager
async def cloned(env: OrmEnvironment) -> AsyncIterator[str]:
    """Give a schema that has a clone of `doc` with all its rows: a schema, a database or an attached file."""
    if env.database.is_sqlite:
        async with _attached(env) as schema:
            await env.sql(f"CREATE TABLE {schema}.doc AS SELECT * FROM main.doc")  # noqa: S608
            yield schema
            await env.sql(f"DROP TABLE {schema}.doc")
        return
    schema = "cloned" if env.database.is_postgres else f"{env.database.url.database}_cloned"
    await env.sql(f"CREATE SCHEMA {schema}")
    try:
        like = "(LIKE public.doc INCLUDING ALL)" if env.database.is_postgres else "LIKE doc"
        await env.sql(f"CREATE TABLE {schema}.doc {like}")
        await env.sql(f"INSERT INTO {schema}.doc SELECT * FROM doc")  # noqa: S608
        yield schema
    finally:
        await env.sql(f"DROP SCHEMA {schema}" + (" CASCADE" if env.database.is_postgres else ""))


COPIES = [
    ("mariadb", "text", "file"),
    ("mariadb", "varchar(2000) CHARACTER SET latin1", "file"),
    ("mariadb", "longtext COLLATE utf8mb4_general_ci", "JSON_VALUE(file, '$.location')"),
    ("mariadb", "blob", "file"),
    ("mariadb", "varbinary(2000)", "file"),
    ("asyncpg", "cloned.document", "file"),
    ("asyncpg", "cloned.plain_document", "file::json"),
    ("asyncpg", "text", "file"),
    ("asyncpg", "varchar(2000)", "file"),
    ("asyncpg", "bytea", "convert_to(file::text, 'UTF8')"),
    ("asyncpg", "jsonb[]", "ARRAY[file]"),
    ("asyncpg", "bytea[]", "ARRAY[convert_to(file::text, 'UTF8')]"),
    ("asyncpg", "cloned.pair", "ROW(1, file)::cloned.pair"),
]
"""Databases, types of a column, and what a ref of `doc` is as such a value."""
_TYPES = (
    "CREATE DOMAIN cloned.inner_document AS jsonb",
    "CREATE DOMAIN cloned.document AS cloned.inner_document CHECK (VALUE IS NOT NULL)",
    "CREATE DOMAIN cloned.plain_document AS json",
    "CREATE TYPE cloned.pair AS (number int, file jsonb)",
)


def copy_id(copy: tuple[str, str, str]) -> str:
    """Return how a test with one of the copies is called."""
    return " ".join(copy[:2])


@asynccontextmanager
async def cloned_as(env: OrmEnvironment, kind: str, value: str) -> AsyncIterator[str]:
    """Give a schema that has a table `doc` with all files of the first, in a column of another type."""
    schema = "cloned" if env.database.is_postgres else f"{env.database.url.database}_cloned"
    await env.sql(f"CREATE SCHEMA {schema}")
    try:
        for statement in _TYPES if env.database.is_postgres else ():
            await env.sql(statement)
        await env.sql(f"CREATE TABLE {schema}.doc (id int, file {kind})")
        cast = f"CAST({value} AS {kind})" if env.database.is_postgres else value
        await env.sql(f"INSERT INTO {schema}.doc SELECT id, {cast} FROM doc WHERE file IS NOT NULL")  # noqa: S608
        yield schema
    finally:
        await env.sql(f"DROP SCHEMA {schema}" + (" CASCADE" if env.database.is_postgres else ""))


@asynccontextmanager
async def _attached(env: OrmEnvironment) -> AsyncIterator[str]:
    path = Path(env.database.url.database or "").with_name("cloned.db")

    def attach(connection: Any, _: Any) -> None:
        connection.execute(f"ATTACH '{path}' AS cloned").close()

    await env.engine.dispose()
    event.listen(env.engine.sync_engine.pool, "connect", attach)
    try:
        yield "cloned"
    finally:
        event.remove(env.engine.sync_engine.pool, "connect", attach)
        env.database.spoil()
        await env.engine.dispose()
        path.unlink()


@asynccontextmanager
async def bound_beside(env: OrmEnvironment, *, is_same_manager: bool = True, is_journaled: bool = False) -> AsyncIterator[None]:
    """Bind another base in the same database, with one table `paper`, to the storage of an environment."""

    class Other(DeclarativeBase):
        pass

    class Paper(Other):
        __tablename__ = "paper"
        id: Mapped[int] = mapped_column(primary_key=True)
        file: Mapped[Attachment | None] = attachment("docs")

    manager = env.manager
    if not is_same_manager:
        manager = StorageManager(backends={"another": env.backend}, policies={"docs": StoragePolicy("docs", "another")})
    journal = None
    if is_journaled:
        journal_tables(Other.metadata)
        journal = StorageJournal(env.engine)
    async with env.engine.begin() as connection:
        await connection.run_sync(Paper.metadata.create_all)
    binding = bind_storage(Other, manager, session_factory=env.sessions, journal=journal)
    try:
        yield
    finally:
        binding.unbind()
        if journal is not None:
            await journal.aclose()
        await env.sql("DROP TABLE paper")
