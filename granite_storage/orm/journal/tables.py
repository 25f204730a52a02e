"""The tables of a journal, and its clock, which is that of the database."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Boolean, Column, DateTime, Float, Index, Integer, MetaData, String, Table, Text, Uuid, bindparam, select
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.sql.type_api import TypeEngine

from granite_storage.exceptions import ConfigurationError, DerivationRefusedError
from granite_storage.orm._interfaces import JOURNAL_KEY, JournalTables

SCHEMA_VERSION = 2
"""The version of the tables that this code requires; stored in the table `granite_storage_meta`.

Version 2 added `granite_storage_job`, and to the intents and their reclaims the location of the original of what is derived.
"""

WORKER_VERSION = 2
"""The version of what a worker does; each notes it with its heartbeat.

Version 2 expects objects that rows share, which triggers need; version 1 notes none.
"""

VERSION_NAME = "schema_version"
"""The key of the version in that table."""

LONGEST_META_NAME = 64
RETENTION_PREFIX = "retention:"
"""What the keys of the policies' retentions begin with, in seconds, in that table."""

SIDECAR_NAME = "sidecar"
"""The key of the name of the file with the intents of uploads, on SQLite, in that table of both files."""

UPLOAD, DELETE = "upload", "delete"
STAGING = "staging"
"""The kind of an intent whose object a client stores directly; its `upload_id` contains the state of the upload."""
COMMIT, ABORT = "commit", "abort"

_LONGEST_LOCATION = 1024

_Time = DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
# The databases of this family compare text without regard to case or accents unless they are told to compare its bytes.
_Exact = String(_LONGEST_LOCATION).with_variant(
    mysql.VARCHAR(_LONGEST_LOCATION, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
)
_Key = String(255).with_variant(mysql.VARCHAR(255, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb")


def journal_tables(metadata: MetaData, *, schema: str | None = None) -> JournalTables:
    """Declare the journal's tables beside the models, where `create_all` and migrations find them. Idempotent.

    Args:
        metadata: The declarative base's metadata.
        schema: The schema to keep them in; None for the metadata's own.

    Raises:
        ConfigurationError: They are declared already, in another schema.

    Example:
        >>> from sqlalchemy import MetaData
        >>> sorted(table.name for table in journal_tables(MetaData()).all)[0]
        'granite_storage_decision'
    """
    wanted = schema if schema is not None else metadata.schema
    found: JournalTables | None = metadata.info.get(JOURNAL_KEY)
    if found is None:
        found = metadata.info[JOURNAL_KEY] = _declare(metadata, wanted)
    elif found.intent.schema != wanted:
        raise ConfigurationError(f"the journal's tables are already declared in the schema {found.intent.schema!r}")
    return found


def _declare(metadata: MetaData, schema: str | None) -> JournalTables:
    def table(name: str, *items: Any) -> Table:
        return Table(f"granite_storage_{name}", metadata, *items, schema=schema, mysql_engine="InnoDB", mariadb_engine="InnoDB")

    def what() -> list[Column[Any]]:
        return [
            Column("id", Uuid(), primary_key=True),
            Column("kind", String(8), nullable=False),
            Column("backend", _Key, nullable=False),
            Column("location", _Exact, nullable=False),
            Column("upload_id", Text()),
            Column("source", _Exact),
            Column("due", _Time, nullable=False),
        ]

    def found_by(name: str) -> list[Index]:
        prefix = {"location": 255}
        return [
            Index(f"ix_granite_storage_{name}_due", "backend", "due"),
            Index(f"ix_granite_storage_{name}_location", "location", mysql_length=prefix, mariadb_length=prefix),
        ]

    return JournalTables(
        intent=table("intent", *what(), *found_by("intent")),
        reclaim=table(
            "reclaim",
            *what(),
            Column("attempts", Integer(), nullable=False),
            Column("takeovers", Integer(), nullable=False),
            Column("error", Text()),
            Column("emptied", Boolean(), nullable=False),
            Column("dead", Boolean(), nullable=False),
            *found_by("reclaim"),
        ),
        decision=table("decision", Column("id", Uuid(), primary_key=True), Column("outcome", String(8), nullable=False)),
        meta=table(
            "meta",
            Column("name", String(LONGEST_META_NAME), primary_key=True),
            Column("value", Text(), nullable=False),
            Column("changed", _Time, nullable=False),
        ),
        job=table(
            "job",
            Column("id", Uuid(), primary_key=True),
            Column("table_name", _Key, nullable=False),
            Column("column_name", _Key, nullable=False),
            Column("backend", _Key, nullable=False),
            Column("location", _Exact, nullable=False),
            Column("key", _Key, nullable=False),
            Column("recipe", Text(), nullable=False),
            Column("due", _Time, nullable=False),
            Column("attempts", Integer(), nullable=False),
            Column("takeovers", Integer(), nullable=False),
            Column("error", Text()),
            Column("dead", Boolean(), nullable=False),
            Index("ix_granite_storage_job_due", "backend", "due"),
        ),
    )


class clock(FunctionElement[Any]):  # noqa: N801  # it reads as a function of SQL
    """The database's time at this moment, so many seconds from it; not that of the transaction's beginning."""

    inherit_cache: bool | None = True
    type: TypeEngine[Any] = DateTime(timezone=True)
    name: str = "clock"

    def __init__(self, seconds: float | str = 0.0) -> None:
        """Make the expression; a string is the name of the parameter that the seconds come in."""
        given = bindparam(seconds, type_=Float()) if isinstance(seconds, str) else bindparam(None, seconds, type_=Float())
        super().__init__(given)


async def moment_in(connection: AsyncConnection, seconds: float) -> datetime:
    """Return the moment so many seconds from now, by the database's clock."""
    moment: datetime = (await connection.execute(select(clock(seconds)))).scalar_one()
    return moment


@compiles(clock, "postgresql")
def _on_postgresql(element: clock, compiler: Any, **kw: Any) -> str:
    return f"(clock_timestamp() + make_interval(secs => {compiler.process(element.clauses, **kw)}))"


@compiles(clock, "mysql")
@compiles(clock, "mariadb")
def _on_mariadb(element: clock, compiler: Any, **kw: Any) -> str:
    return f"TIMESTAMPADD(MICROSECOND, 1000000 * {compiler.process(element.clauses, **kw)}, UTC_TIMESTAMP(6))"


@compiles(clock, "sqlite")
def _on_sqlite(element: clock, compiler: Any, **kw: Any) -> str:
    # In the format of SQLAlchemy's DateTime there, so that moments compare as texts.
    seconds = f"printf('%+.6f seconds', {compiler.process(element.clauses, **kw)})"
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', {seconds})"


def in_utc(moment: datetime) -> datetime:
    """Return a moment of the database with its time zone, which not every driver tells."""
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


_LONGEST_ERROR = 500


def describe_error(error: Exception) -> str:
    """Return what the journal keeps of an error: printable characters, as PostgreSQL stores no others in every text."""
    text = f"{type(error).__name__}: {error}"[: 2 * _LONGEST_ERROR]
    return "".join(character if character.isprintable() else " " for character in text)[:_LONGEST_ERROR]


REFUSED = f"{DerivationRefusedError.__name__}: "
"""What the errors of jobs begin with that a recipe has refused."""


def describe_refusal(error: Exception) -> str:
    """Return what the journal keeps of a refusal, of whatever class."""
    return describe_error(DerivationRefusedError(str(error)))


# The report of a pass of recovery.


@dataclass(frozen=True, slots=True)
class FailedReclaim:
    """An object that could not be deleted or scanned, or whose variant or effect has failed.

    Attributes:
        backend: Its backend's key.
        location: Its address there.
        error: What went wrong the last time.
        attempts: How often it was tried.
        next_attempt: When it is tried again; None for a dead letter, which is not.
    """

    backend: str
    location: str
    error: str
    attempts: int
    next_attempt: datetime | None


@dataclass(slots=True)
class RecoveryReport:
    """The results of a pass of recovery, and what it left.

    Attributes:
        claimed: How many intents and unfinished reclaims it took over.
        deleted: How many objects it deleted, or found to be gone already.
        kept: How many it kept because a row refers to them.
        confirmed: How many late looks at the place of a deleted upload ended its row.
        leased: How many uploads are still under their leases.
        waiting: How many deletes wait for their retention, or for a transaction in progress.
        failed: What could not be deleted, each with its next attempt, and what cannot be scanned or derived.
        scanned: How many held objects it scanned, whose rows now have the verdict.
        held: How many are held until a scanner has judged them, and are tried again.
        derived: How many variants it made, which rows now have.
        underived: How many variants are still to be made.
        refused: The variants that this pass has found not to be possible: their recipes refuse the originals. Only this pass
            reports them, and they are not failures.
        underivable: How many variants are not possible, as this pass and earlier ones have found.
        effects: How many effects it called for a file.
        pending_effects: How many are still to be called.
        unknown_backends: Backends that rows of the journal name and the manager does not have; nothing of theirs is touched.
    """

    claimed: int = 0
    deleted: int = 0
    kept: int = 0
    confirmed: int = 0
    leased: int = 0
    waiting: int = 0
    scanned: int = 0
    held: int = 0
    derived: int = 0
    underived: int = 0
    underivable: int = 0
    effects: int = 0
    pending_effects: int = 0
    failed: list[FailedReclaim] = field(default_factory=list)
    refused: list[FailedReclaim] = field(default_factory=list)
    unknown_backends: set[str] = field(default_factory=set)

    def add(self, other: RecoveryReport) -> None:
        """Add the counts of another pass."""
        for name in ("claimed", "deleted", "kept", "confirmed", "scanned", "derived", "effects", "failed", "refused"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
