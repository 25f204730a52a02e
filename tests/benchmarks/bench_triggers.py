"""What the triggers cost, in CPU time: `python -m tests.benchmarks.bench_triggers`, or with `sqlite` behind it.

Each statement is about 10,000 rows and is rolled back; the best of five counts. The CPU time of the server's process for the
connection is read from the operating system, so that other load on the machine does not matter much; SQLite works in this one.

On SQLite the retention of the policy is noted, as `journal.check()` does.

With the URL of a database on MariaDB behind it, it measures that, which is to be on this machine, because the CPU time is that
of the connection's thread. The index over locations is there in both columns of figures, as on PostgreSQL; the last lines show
what it costs. By hand, intents have ids in order, or those that the journal gives them, which are not in order and cost more.

On PostgreSQL an UPDATE that clears files inserts its intents row by row. Two thirds of its time are the starts and ends of so
many statements. Tried instead: to collect old values in a setting of the transaction and to insert some at a time. That took
230 ms for 20 rows at a time, and more for more, where it takes 180 ms now, because a setting is copied whole each time.
Transition tables would cost every UPDATE of the table.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from sqlalchemy import Connection, Engine, String, create_engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from granite_storage import Attachment, attachment, journal_tables
from granite_storage.orm import storage_triggers
from granite_storage.orm.journal.triggers import create_triggers, drop_triggers, sources_of
from tests.orm.databases import postgres, postgres_database

ROWS = 10_000
RUNS = 5
DELETE_BY_HAND = """
    WITH d AS (DELETE FROM doc RETURNING file)
    INSERT INTO granite_storage_intent (id, kind, backend, location, due)
    SELECT gen_random_uuid(), 'delete', file ->> 'backend', file ->> 'location', clock_timestamp() FROM d
"""
UPDATE_BY_HAND = """
    WITH u AS (UPDATE doc SET file = NULL FROM doc old WHERE old.id = doc.id RETURNING old.file)
    INSERT INTO granite_storage_intent (id, kind, backend, location, due)
    SELECT gen_random_uuid(), 'delete', file ->> 'backend', file ->> 'location', clock_timestamp() FROM u
"""
INTENTS_ON_MARIADB = """
    INSERT INTO granite_storage_intent (id, kind, backend, location, due)
    SELECT {id}, 'delete', JSON_VALUE(file, '$.backend'), JSON_VALUE(file, '$.location'), UTC_TIMESTAMP(6) FROM doc
"""
IN_ORDER = INTENTS_ON_MARIADB.format(id="UUID()")
_DIGEST = "LEFT(SHA2(CONCAT(JSON_VALUE(file, '$.backend'), JSON_VALUE(file, '$.location')), 256), 32)"
OWN_IDS = INTENTS_ON_MARIADB.format(id=f"INSERT(INSERT({_DIGEST}, 13, 1, '5'), 17, 1, '8')")
FILL_ON_MARIADB = """
    INSERT INTO doc (id, title, file) SELECT seq, '', JSON_OBJECT('backend', 'store', 'storage_key', 'docs', 'size', 100,
        'checksum', REPEAT('a', 71), 'location', CONCAT('doc/', MD5(seq), '/file/', MD5(CONCAT(seq, 'x')))) FROM seq_1_to_10000
"""
FILL = """
    INSERT INTO doc (id, title, file) SELECT n, '', jsonb_build_object('backend', 'store', 'storage_key', 'docs', 'size', 100,
        'checksum', repeat('a', 71), 'location', concat('doc/', md5(concat(n)), '/file/', md5(concat(n, 'x'))))
    FROM generate_series(1, :rows) n
"""


class Base(DeclarativeBase):
    pass


class Doc(Base):
    __tablename__ = "doc"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(100), default="")
    file: Mapped[Attachment | None] = attachment("docs")
    other: Mapped[Attachment | None] = attachment("docs")


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    file: Mapped[Attachment | None] = attachment("docs")


journal_tables(Base.metadata)
storage_triggers(Base.metadata)


def measure(engine: Engine, statement: str, *, has_triggers: bool) -> float:
    """Return the seconds of CPU time that a statement takes."""
    best = float("inf")
    for _ in range(RUNS):
        with engine.connect() as connection:
            role = "origin" if has_triggers else "replica"
            connection.execute(text("SET session_replication_role = replica"))
            connection.execute(text("TRUNCATE doc, note, granite_storage_intent"))
            connection.execute(text(FILL), {"rows": ROWS})
            connection.execute(text(f"SET session_replication_role = {role}"))
            connection.commit()
            vacuum(engine)
            best = min(best, seconds_of(connection, statement))
            connection.rollback()
            connection.execute(text("SET session_replication_role = origin"))
            connection.commit()
    return best


def measure_on_mariadb(connection: Connection, by_hand: str, statement: str) -> tuple[float, float]:
    """Return the seconds of CPU time that a statement takes on MariaDB, without triggers and one more statement, and with them.

    Both take turns, so that what else the machine does meanwhile slows both down.
    """
    bare, own = float("inf"), float("inf")
    drop_on_mariadb(connection)
    for table in ("doc", "note", "granite_storage_intent"):
        connection.execute(text(f"TRUNCATE {table}"))
    connection.execute(text(FILL_ON_MARIADB))
    connection.commit()
    for _ in range(RUNS):
        bare = min(bare, seconds_on_mariadb(connection, by_hand, statement))
        create_triggers(connection, sources_of(connection, Base.metadata))
        own = min(own, seconds_on_mariadb(connection, statement))
        drop_on_mariadb(connection)
    return bare, own


def drop_on_mariadb(connection: Connection) -> None:
    """Drop the triggers and leave the indexes over locations, which `drop_triggers` drops as well."""
    found = "SELECT trigger_name FROM information_schema.triggers WHERE trigger_schema = DATABASE()"
    for name in connection.execute(text(found)).scalars().all():
        connection.execute(text(f"DROP TRIGGER {name}"))


def seconds_on_mariadb(connection: Connection, *statements: str) -> float:
    pid = int(Path(connection.execute(text("SELECT @@pid_file")).scalar_one()).read_text())
    mine = "SELECT tid FROM information_schema.processlist WHERE id = CONNECTION_ID()"
    spent = Path(f"/proc/{pid}/task/{connection.execute(text(mine)).scalar_one()}/schedstat")  # nanoseconds come first
    before = int(spent.read_text().split()[0])
    for statement in filter(None, statements):
        connection.execute(text(statement))
    after = int(spent.read_text().split()[0])
    connection.rollback()
    return (after - before) / 1e9


def main_on_mariadb(engine: Engine) -> None:
    changed = "UPDATE doc SET title = 'x'"
    with engine.connect() as connection:
        for what, by_hand, statement in (
            ("DELETE, and one that inserts the intents by hand", OWN_IDS, "DELETE FROM doc"),
            ("the same, by hand with ids in order", IN_ORDER, "DELETE FROM doc"),
            ("UPDATE of another column", "", changed),
            ("UPDATE that clears the files", "", "UPDATE doc SET file = NULL"),
            ("the same, and one that inserts the intents by hand", OWN_IDS, "UPDATE doc SET file = NULL"),
            ("INSERT of copies", "", "INSERT INTO note (id, file) SELECT id, file FROM doc"),
        ):
            show(what, *measure_on_mariadb(connection, by_hand, statement))
        for what, statement in (("DELETE without triggers, and index", "DELETE FROM doc"), ("UPDATE, likewise", changed)):
            indexed = min(seconds_on_mariadb(connection, statement) for _ in range(RUNS))
            create_triggers(connection, sources_of(connection, Base.metadata))
            drop_triggers(connection, [Doc.__table__, Note.__table__])
            show(what, min(seconds_on_mariadb(connection, statement) for _ in range(RUNS)), indexed)
            create_triggers(connection, sources_of(connection, Base.metadata))
            drop_on_mariadb(connection)


def show(what: str, bare: float, own: float) -> None:
    print(f"{what:<50} {bare * 1000:7.0f} ms {own * 1000:7.0f} ms   {own / bare:5.2f} times")


def vacuum(engine: Engine) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE doc"))


def seconds_of(connection: Connection, statement: str) -> float:
    process = psutil.Process(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())
    before = process.cpu_times()
    connection.execute(text(statement))
    after = process.cpu_times()
    return after.user + after.system - before.user - before.system


SQLITE_BY_HAND = """
    INSERT INTO granite_storage_intent (id, kind, backend, location, due)
    SELECT lower(hex(randomblob(16))), 'delete', json_extract(file, '$.backend'), json_extract(file, '$.location'),
        strftime('%Y-%m-%d %H:%M:%f000', 'now')
    FROM doc
"""
SQLITE_FILL = """
    WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :rows)
    INSERT INTO doc (id, title, file) SELECT n, '', json_object('backend', 'store', 'storage_key', 'docs', 'size', 100,
        'checksum', printf('%071d', 0),
        'location', 'doc/' || lower(hex(randomblob(16))) || '/file/' || lower(hex(randomblob(16)))) FROM numbers
"""


def measure_on_sqlite(statements: tuple[str, ...], *, has_triggers: bool) -> float:
    """Return the seconds of CPU time that statements take together."""
    best = float("inf")
    for _ in range(RUNS):
        engine = create_engine("sqlite://")
        with engine.connect() as connection:
            Base.metadata.create_all(connection)
            drop_triggers(connection, [Doc.__table__, Note.__table__])
            connection.execute(text(SQLITE_FILL), {"rows": ROWS})
            connection.exec_driver_sql("INSERT INTO granite_storage_meta VALUES ('retention:docs', '0.000000', '')")
            if has_triggers:
                create_triggers(connection, sources_of(connection, Base.metadata))
            connection.commit()
            before = time.process_time()
            for statement in statements:
                connection.exec_driver_sql(statement)
            best = min(best, time.process_time() - before)
        engine.dispose()
    return best


def main_on_sqlite() -> None:
    # With a condition, because SQLite clears a table without triggers at once, however many rows there are.
    for what, by_hand, statement in (
        ("DELETE, and one that inserts the intents by hand", SQLITE_BY_HAND, "DELETE FROM doc WHERE id > 0"),
        ("UPDATE of another column", "", "UPDATE doc SET title = 'x'"),
        ("UPDATE that clears the files, likewise", SQLITE_BY_HAND, "UPDATE doc SET file = NULL"),
        ("INSERT of copies", "", "INSERT INTO note (id, file) SELECT id, file FROM doc"),
    ):
        bare = measure_on_sqlite((by_hand, statement) if by_hand else (statement,), has_triggers=False)
        own = measure_on_sqlite((statement,), has_triggers=True)
        show(what, bare, own)


@contextmanager
def database() -> Iterator[Engine]:
    """Give an engine on a PostgreSQL of its own, or on the one whose URL is the argument."""
    if len(sys.argv) > 1:
        yield create_engine(sys.argv[1])
        return
    with TemporaryDirectory() as folder, postgres(Path(folder)) as server, postgres_database(server, "psycopg") as found:
        yield create_engine(found.url)


def main() -> None:
    with database() as engine:
        Base.metadata.create_all(engine)
        if engine.dialect.name in ("mysql", "mariadb"):
            main_on_mariadb(engine)
        else:
            main_on_postgresql(engine)
        Base.metadata.drop_all(engine)
        engine.dispose()


def main_on_postgresql(engine: Engine) -> None:
    copies = "INSERT INTO note (id, file) SELECT id, file FROM doc"
    for what, by_hand, statement in (
        ("DELETE, and one that inserts the intents by hand", DELETE_BY_HAND, "DELETE FROM doc"),
        ("UPDATE of another column", "UPDATE doc SET title = 'x'", "UPDATE doc SET title = 'x'"),
        ("UPDATE that clears the files", "UPDATE doc SET file = NULL", "UPDATE doc SET file = NULL"),
        ("the same, and one that inserts the intents by hand", UPDATE_BY_HAND, "UPDATE doc SET file = NULL"),
        ("INSERT of copies", copies, copies),
    ):
        bare = measure(engine, by_hand, has_triggers=False)
        show(what, bare, measure(engine, statement, has_triggers=True))


if __name__ == "__main__":
    if sys.argv[1:] == ["sqlite"]:
        main_on_sqlite()
    else:
        main()
