"""Models whose tables have triggers, and SQL that bypasses the sessions that writes to them."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import weakref
from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy import ForeignKey, String, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import StoredObjectRef
from granite_storage.orm import Attachment, StoredObjectRefType, attachment, journal_tables, storage_triggers
from granite_storage.refs import iter_refs
from tests.orm.databases import Database
from tests.orm.derivations import Upper
from tests.orm.environment import OrmEnvironment, orm_environment
from tests.orm.journal.test_recovery import journal_of

__all__ = [
    "Base",
    "Child",
    "Doc",
    "Grandchild",
    "Link",
    "Parent",
    "Part",
    "Picture",
    "code_of",
    "environment",
    "locations",
    "put",
    "refused",
    "run",
    "stored",
    "stored_with_variant",
    "value_of",
]


class Base(DeclarativeBase):
    pass


class Doc(Base):
    __tablename__ = "doc"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(100), default="", server_default="")
    file: Mapped[Attachment | None] = attachment("docs")
    other: Mapped[Attachment | None] = attachment("docs")


class Link(Base):
    """Holds a ref by hand: nobody nominates it, and it is evidence all the same."""

    __tablename__ = "link"
    id: Mapped[int] = mapped_column(primary_key=True)
    ref: Mapped[StoredObjectRef | None] = mapped_column(StoredObjectRefType())


class Parent(Base):
    __tablename__ = "parent"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("docs")


class Child(Base):
    __tablename__ = "child"
    id: Mapped[int] = mapped_column(primary_key=True)
    parent_id: Mapped[int] = mapped_column(ForeignKey("parent.id", ondelete="CASCADE"))
    file: Mapped[Attachment | None] = attachment("docs")


class Grandchild(Base):
    __tablename__ = "grandchild"
    id: Mapped[int] = mapped_column(primary_key=True)
    child_id: Mapped[int] = mapped_column(ForeignKey("child.id", ondelete="CASCADE"))
    file: Mapped[Attachment | None] = attachment("docs")


class Picture(Base):
    """Has a variant that the journal's worker makes."""

    __tablename__ = "picture"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("docs", variants={"upper": Upper()})


class Part(Base):
    """Partitioned by its kind, into tables that only the database knows of."""

    __tablename__ = "part"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("docs")
    __table_args__ = {"postgresql_partition_by": "LIST (kind)"}


journal_tables(Base.metadata)
storage_triggers(Base.metadata)


_partitioned: weakref.WeakSet[Database] = weakref.WeakSet()
"""Those that have partitions already."""


@contextlib.asynccontextmanager
async def environment(database: Database, **options: Any) -> AsyncIterator[OrmEnvironment]:
    """Give an environment with empty tables that have triggers, and an empty journal."""
    async with orm_environment(database, journaled=True, base=Base, **options) as env:
        assert env.journal is not None
        async with env.engine.begin() as connection:
            if database.is_postgres and database not in _partitioned:
                for number in (1, 2):
                    await connection.execute(text(f"CREATE TABLE part_{number} PARTITION OF part FOR VALUES IN ({number})"))
                await connection.run_sync(Base.metadata.create_all)  # the triggers of the partitions
                _partitioned.add(database)
            for table in journal_tables(Base.metadata).all[:3]:
                await connection.execute(table.delete())
        yield env


def value_of(ref: StoredObjectRef) -> str:
    """Return a ref as SQL writes it."""
    return "'" + json.dumps(ref.to_dict()).replace("'", "''").replace(":", r"\:") + "'"


async def run(target: OrmEnvironment | AsyncConnection, *statements: str, **values: StoredObjectRef) -> int:
    """Run SQL, past every session, in one transaction; `{name}` in it is the value of a ref. Return the last row count."""
    if not isinstance(target, AsyncConnection):
        async with target.engine.begin() as connection:
            return await run(connection, *statements, **values)
    count = 0
    for statement in statements:
        for name, ref in values.items():
            statement = statement.replace(f"{{{name}}}", value_of(ref))
        count = (await target.execute(text(statement))).rowcount
    return count


async def refused(target: OrmEnvironment | AsyncConnection, *statements: str, **values: StoredObjectRef) -> bool:
    """Run SQL, and return whether a guard has refused it; any other error is raised."""
    try:
        await run(target, *statements, **values)
    except DBAPIError as error:
        is_violation = code_of(error) in ("23503", "1452") or isinstance(error.orig, sqlite3.IntegrityError)
        if not is_violation or "gone or going" not in str(error.orig):
            raise
        return True
    return False


def code_of(error: DBAPIError) -> str | None:
    """Return the SQLSTATE of an error; its number on MariaDB."""
    number = next(iter(getattr(error.orig, "args", ())), None)
    if isinstance(number, int):
        return str(number)
    return getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)


async def stored(env: OrmEnvironment, *instances: Any) -> list[StoredObjectRef]:
    """Commit rows, and return the refs of their files."""
    await env.add(*instances)
    return [instance.file.ref for instance in instances if instance.file is not None]


def locations(*refs: StoredObjectRef) -> set[str]:
    """Return the locations of objects, and of their variants."""
    return {one.location for ref in refs for one in iter_refs(ref)}


async def put(env: OrmEnvironment, name: str = "a") -> StoredObjectRef:
    """Store an object that no journal knows of."""
    return await env.manager.put_bytes(content=b"x", storage_key="docs", model_name="doc", entity_id=name, field_name="file")


async def stored_with_variant(env: OrmEnvironment) -> StoredObjectRef:
    """Let a row have a file with a variant, of which the journal knows nothing more; return its ref."""
    original, variant = await put(env, "a"), await put(env, "v")
    whole = original.with_variants({"thumb": variant})
    await journal_of(env).adopt([whole])
    await run(env, "INSERT INTO doc (id, file) VALUES (1, {ref})", "DELETE FROM granite_storage_intent", ref=whole)
    return whole
