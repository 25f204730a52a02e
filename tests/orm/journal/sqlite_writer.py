"""Another program that writes rows with files into an SQLite database, at random and without the library, until it is killed.

`python sqlite_writer.py PATH SEED`, with the tables of `tests.orm.journal.test_sqlite_triggers`.
"""

from __future__ import annotations

import sqlite3
import sys
import time
from random import Random

ROWS = 5
COLUMNS = [("doc", "file"), ("doc", "other"), *((table, "file") for table in ("parent", "child", "grandchild", "node", "word"))]
EXPECTED = ("gone or going", "UNIQUE constraint failed", "FOREIGN KEY constraint failed", "is locked")
"""What anyone would try again."""

SETTINGS = {
    "recursive_triggers": ("ON", "OFF", "OFF"),
    "foreign_keys": ("ON", "ON", "OFF"),
    "synchronous": ("OFF",),  # it is the program that is killed, not the machine
}

STATEMENTS = [
    "DELETE FROM doc WHERE id IN ({a}, {b})",
    "UPDATE doc SET file = NULL WHERE id = {a}",
    "INSERT INTO doc (id, file) SELECT {a}, file FROM doc WHERE id = {b} ON CONFLICT (id) DO UPDATE SET file = excluded.file",
    "INSERT INTO doc (id, file) SELECT id + 1, file FROM doc WHERE id IN ({a}, {b}) ON CONFLICT DO NOTHING",
    "REPLACE INTO doc (id, file, other) SELECT {a}, other, file FROM doc WHERE id = {b}",
    "REPLACE INTO doc (code, file) SELECT {a}, file FROM doc WHERE id = {b}",
    "REPLACE INTO doc (id, title, shelf, place) VALUES ({a}, {b}, {a}, {b})",
    "UPDATE OR REPLACE doc SET id = {a}, code = {b} WHERE id = {b}",
    "UPDATE OR REPLACE doc SET title = {a}, file = other WHERE id = {b}",
    "UPDATE doc SET file = s.file FROM (SELECT id, file FROM doc) s WHERE s.id = {a} + {b} - doc.id AND doc.id IN ({a}, {b})",
    "UPDATE doc SET file = other, other = file WHERE id = {a}",
    "INSERT INTO parent SELECT id, file FROM doc WHERE id = {a}",
    "REPLACE INTO parent SELECT {a}, file FROM doc WHERE id = {b}",
    "INSERT OR IGNORE INTO child SELECT {a}, {b}, file FROM doc WHERE id = {b}",
    "INSERT OR IGNORE INTO grandchild SELECT {a}, {b}, file FROM child WHERE id = {b}",
    "DELETE FROM parent WHERE id IN ({a}, {b})",
    "REPLACE INTO node SELECT {a}, nullif({b}, {a}), file FROM doc WHERE id = {b}",
    "DELETE FROM node WHERE id = {a}",
    "REPLACE INTO word SELECT char({u} + {a}), file FROM doc WHERE id = {b}",
    "DELETE FROM word WHERE id = char({u} + {a})",
]

REPLACES = [
    "REPLACE INTO doc (id) VALUES ({a})",
    "REPLACE INTO parent (id) VALUES ({a})",
    "INSERT OR REPLACE INTO word (id) VALUES (char({u} + {a}))",
]
"""Most of what they push out is in no other row, so that nothing else nominates it."""


class Writer:
    """One connection after the other, each with settings of its own."""

    def __init__(self, path: str, seed: str) -> None:
        self._path = path
        self._random = Random(seed)
        self._seen: list[str] = []
        self._connection: sqlite3.Connection | None = None

    def write(self) -> None:
        """Run a transaction of some statements; what is refused is rolled back or left out."""
        random = self._random
        if self._connection is None or random.random() < 0.1:
            self.close()
            self._connection = self._connect()
        connection = self._connection
        try:
            connection.execute(f"BEGIN {random.choice(['IMMEDIATE', 'DEFERRED'])}")
            for _ in range(random.randint(1, 6)):
                self._run(connection)
                if random.random() < 0.2:
                    connection.execute("SAVEPOINT inner")
                    self._run(connection)
                    connection.execute(random.choice(["ROLLBACK TO inner", "RELEASE inner"]))
            connection.execute("COMMIT" if random.random() < 0.9 else "ROLLBACK")
        except sqlite3.Error as error:
            self.close()
            if not any(text in str(error) for text in EXPECTED):
                raise

    def close(self) -> None:
        """Close the connection, and so roll back what is open."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=5, isolation_level=None, check_same_thread=False)
        for pragma, values in SETTINGS.items():
            connection.execute(f"PRAGMA {pragma} = {self._random.choice(values)}")
        return connection

    def _run(self, connection: sqlite3.Connection) -> None:
        random = self._random
        a, b = random.randint(1, ROWS), random.randint(1, ROWS)
        try:
            if self._seen and random.random() < 0.15:  # what it has seen in a row before: an undo, or a ref of what is gone
                connection.execute("INSERT OR REPLACE INTO doc (id, file) VALUES (?, ?)", (a, random.choice(self._seen)))
            else:
                u = random.choice([64, 96])
                statements = REPLACES if random.random() < 0.2 else STATEMENTS
                connection.execute(random.choice(statements).format(a=a, b=b, u=u))
        except sqlite3.IntegrityError as error:  # the statement is undone, and the transaction may go on
            if not any(text in str(error) for text in EXPECTED):
                raise
        table, column = random.choice(COLUMNS)
        found = connection.execute(f"SELECT {column} FROM {table} WHERE {column} IS NOT NULL")  # noqa: S608  # ours
        self._seen = (self._seen + [value for (value,) in found])[-20:]


if __name__ == "__main__":
    writer = Writer(*sys.argv[1:])
    while True:
        writer.write()
        time.sleep(0.002)  # SQLite lets nobody wait in a queue
