"""Refusing at start-up what could not keep the promise."""

from __future__ import annotations

from sqlalchemy import Table, bindparam, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from granite_storage.exceptions import ConfigurationError
from granite_storage.orm.journal.database import JournalPool
from granite_storage.orm.journal.heartbeat import insert_if_absent
from granite_storage.orm.journal.schemas import effective
from granite_storage.orm.journal.tables import SCHEMA_VERSION, VERSION_NAME, JournalTables, clock

__all__ = ["check_database"]

_OLDEST_MARIADB = (10, 6)


async def check_database(pool: JournalPool, tables: JournalTables, others: list[Table]) -> None:
    """Refuse tables, storage engines and settings of the database with which the journal could not keep its promise.

    Args:
        pool: The journal's own connections.
        tables: The journal's tables.
        others: The tables of the application that have attachments.

    Raises:
        ConfigurationError: The message says what to do.
    """
    async with pool.durable() as connection:
        if not pool.is_postgresql:
            names = [(effective(table.schema, pool.translate_map), table.name) for table in (*tables.all, *others)]
            await _check_mariadb(connection, names)
    for table in tables.all:
        await _check_table(pool, table)
    await _check_version(pool, tables)


async def _check_table(pool: JournalPool, table: Table) -> None:
    """See that a table is there with its columns, and may be written to."""
    nothing = table.delete().where(text("1 = 0"))
    try:
        async with pool.reading() as connection:
            await connection.execute(select(table).limit(0))
            await connection.execute(nothing)
            await connection.execute(insert(table).from_select(list(table.c.keys()), select(table).where(text("1 = 0"))))
    except DBAPIError as error:
        name = ".".join(part for part in (effective(table.schema, pool.translate_map), table.name) if part)
        raise ConfigurationError(
            f"the journal's table {name} is missing, is of another version or may not be written to: {error.orig}."
            " Create it with the models' own (Base.metadata.create_all or a migration) after journal_tables(Base.metadata),"
            " and let the application's database user read and write it. Sessions with a schema_translate_map of their own share"
            " one set of the journal's tables: it is where the engine that was passed to StorageJournal finds it, with that"
            " engine's map if it has one, or in journal_tables(Base.metadata, schema=...)"
        ) from error


async def _check_version(pool: JournalPool, tables: JournalTables) -> None:
    meta = tables.meta
    async with pool.durable() as connection:
        await insert_if_absent(connection, tables, {"name": VERSION_NAME, "value": str(SCHEMA_VERSION), "changed": clock()})
        found = (await connection.execute(select(meta.c.value).where(meta.c.name == VERSION_NAME))).scalar_one()
    if found != str(SCHEMA_VERSION):
        raise ConfigurationError(
            f"the journal's tables are of version {found}, and this library works with version {SCHEMA_VERSION}:"
            " run the migrations of the library's version, or install the version of the library that made them"
        )


async def _check_mariadb(connection: AsyncConnection, tables: list[tuple[str | None, str]]) -> None:
    version = (await connection.execute(text("SELECT VERSION()"))).scalar_one()
    numbers = tuple(int(part) for part in version.split("-")[0].split(".")[:2])
    if "mariadb" not in version.lower():
        raise ConfigurationError(f"the journal was proved on MariaDB, and this is MySQL {version}: leave journal=... out")
    if numbers < _OLDEST_MARIADB:
        raise ConfigurationError(f"the journal needs MariaDB 10.6 or newer, where SKIP LOCKED is, and this is {version}")
    if (await connection.execute(text("SELECT @@innodb_flush_log_at_trx_commit"))).scalar_one() != 1:
        raise ConfigurationError(
            "with innodb_flush_log_at_trx_commit other than 1 a crash takes back what was committed: set it to 1"
        )
    level = (await connection.execute(text("SELECT @@global.tx_isolation"))).scalar_one()
    if level == "READ-UNCOMMITTED":
        raise ConfigurationError("at READ UNCOMMITTED the journal's rows are not where they are looked for: set another level")
    await _check_engines(connection, tables)


async def _check_engines(connection: AsyncConnection, tables: list[tuple[str | None, str]]) -> None:
    """Refuse tables whose engine knows no transactions, such as MyISAM and Aria."""
    found = await connection.execute(
        text(
            "SELECT table_schema, table_schema = DATABASE(), table_name, engine FROM information_schema.tables"
            " WHERE table_name IN :names AND engine <> 'InnoDB'"
        ).bindparams(bindparam("names", expanding=True)),
        {"names": sorted({name for _, name in tables})},
    )
    wrong = [
        f"{name} ({engine})"
        for schema, is_default, name, engine in found
        if (schema, name) in tables or (is_default and (None, name) in tables)
    ]
    if wrong:
        raise ConfigurationError(
            f"the journal needs InnoDB, and these tables have another engine: {', '.join(wrong)};"
            " change them with ALTER TABLE ... ENGINE=InnoDB"
        )
