"""What the database says of the journal's own tables, as errors that say what to do.

A table may be dropped or renamed while processes run, and a role may lack rights on it. The database says so to whichever
statement comes first, with an error of the driver's own that names no remedy.
"""

from __future__ import annotations

import errno
import re
import sqlite3
from typing import Final

from sqlalchemy.exc import DBAPIError

from granite_storage._documentation import Page
from granite_storage.exceptions import BackendUnavailableError, ConfigurationError, StorageError
from granite_storage.orm._util import codes_of

_MISSING: Final = ("42P01", 1146)
_DENIED: Final = ("42501", 1142, 1143)
"""The codes of PostgreSQL and of MariaDB; SQLite has none of its own for a table that is missing, and no rights."""

_MISSING_ON_SQLITE: Final = "no such table"
_DAMAGED: Final = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
_OUT_OF_ORDER: Final = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
_OUT_OF_ORDER_TOO: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_NOT_WRITABLE: Final = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH)
"""What SQLite and the operating system say of a file, by their codes."""

_TABLE: Final = re.compile(r'(?:([\w$-]+)[`"]?\.[`"]?)?\b(granite_storage_(?:intent|reclaim|decision|meta|job))\b')
"""The name of one of the journal's tables, quoted or not, perhaps with its schema."""

_ACCOUNT: Final = re.compile(r"'[^']*'@'[^']*'")
_LACKING: Final = re.compile(r"(?:, |SELECT|INSERT|UPDATE|DELETE)+")
"""The role, and what it lacks, as MariaDB names them."""

_RIGHTS: Final = "SELECT, INSERT, UPDATE, DELETE"


def explain_fault(error: BaseException | None, role: str | None) -> ConfigurationError | None:
    """Return what to raise for an error about a table of the journal that is missing, or that the role may not use.

    Args:
        error: The error of a statement.
        role: The name that has connected.

    Returns:
        The error to raise from that of the driver; None if it is about something else.
    """
    return explain_missing(error) or explain_denied(error, role)


def explain_missing(error: BaseException | None, *, sidecar: str | None = None) -> ConfigurationError | None:
    """Return what to raise for an error about a table that is missing from the database, or from the sidecar at a path."""
    if not isinstance(error, DBAPIError):
        return None
    said = _message_of(error)
    found = _TABLE.search(said)
    if found is None or (codes_of(error).isdisjoint(_MISSING) and _MISSING_ON_SQLITE not in said):
        return None
    named = f"the journal's table {_name_of(found)} is missing"
    if sidecar is not None:
        return ConfigurationError(
            f"{named} from the sidecar {sidecar}, which the library alone writes: {_replace(sidecar)}",
            see=Page.JOURNAL_ON_SQLITE,
        )
    return ConfigurationError(
        f"{named} from the database: if it was renamed, rename it back; if it was dropped, create it, by"
        " Base.metadata.create_all or a migration after journal_tables(Base.metadata), and run the garbage collector, which finds"
        " the objects that its rows named. On PostgreSQL the table may exist in a schema outside the connection's search_path",
        see=Page.JOURNAL,
    )


def explain_sidecar(error: BaseException, path: str) -> StorageError | None:
    """Return what to raise for an error about the sidecar as a file: it is damaged, not writable, or its disk is full.

    Args:
        error: The error of the driver, of SQLAlchemy or of the operating system.
        path: Where the file is.

    Returns:
        The error to raise from it; None if it is about something else.
    """
    original = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(original, "sqlite_errorcode", 0) & 0xFF
    if code in _DAMAGED:
        return damaged_sidecar(original, path)
    if code in _OUT_OF_ORDER or (isinstance(original, OSError) and original.errno in _OUT_OF_ORDER_TOO):
        return BackendUnavailableError(
            f"the journal's sidecar {path} cannot be written ({original}), so nothing is stored: make room on its disk, or repair"
            " the disk; then the transaction may be tried again"
        )
    if code in _NOT_WRITABLE or isinstance(original, OSError):
        return ConfigurationError(
            f"the journal's sidecar {path} cannot be opened, created or written: {original}. Let the application's user write to"
            " it and to its folder, or pass StorageJournal(..., sidecar=...) a path on the same machine, the same one in every"
            " process",
            see=Page.JOURNAL_ON_SQLITE,
        )
    return None


def damaged_sidecar(error: BaseException | None, path: str) -> ConfigurationError:
    """Return what to raise where the sidecar is not what the library has written."""
    return ConfigurationError(f"the journal's sidecar {path} is damaged ({error}): {_replace(path)}", see=Page.JOURNAL_ON_SQLITE)


def _replace(sidecar: str) -> str:
    """Return in words how a sidecar is replaced, and what that loses."""
    return (
        f"stop the processes that use it; then restore the file, or remove it with {sidecar}-wal and {sidecar}-shm, so that the"
        " library creates another one. Rows keep their files; uploads that were in progress cannot be committed, and the garbage"
        " collector finds the objects that only this file knew of"
    )


def explain_denied(error: BaseException | None, role: str | None) -> ConfigurationError | None:
    """Return what to raise for an error about a table that the role may not use; see `explain_fault`."""
    if not isinstance(error, DBAPIError) or codes_of(error).isdisjoint(_DENIED):
        return None
    said, statement = _message_of(error), (error.statement or "").lstrip()
    named, account = _TABLE.search(said), _ACCOUNT.search(said)
    to = account[0] if account is not None else role or "the role"
    for written in _TABLE.finditer(statement):
        if named is None and written[1] is not None and written[1] in said:
            # PostgreSQL names the schema alone where that is what the role may not use.
            return _denied(_verb_of(said, statement), written, said, f"GRANT USAGE ON SCHEMA {written[1]} TO {to}")
        if named is not None and named[2] == written[2]:  # with the schema, which PostgreSQL leaves out
            return _denied(_verb_of(said, statement), written, said, f"GRANT {_RIGHTS} ON {_name_of(written)} TO {to}")
    if named is None:
        return None
    to = to if account is not None else "the role that has created the triggers"
    return _denied("what a trigger does", named, said, f"GRANT {_RIGHTS} ON {_name_of(named)} TO {to}")


def _denied(what: str, found: re.Match[str], said: str, remedy: str) -> ConfigurationError:
    return ConfigurationError(
        f"the database refuses {what} on the journal's table {_name_of(found)} ({said}): sessions that store, replace or delete"
        f" files, and workers, need {_RIGHTS} on each table of the journal. Let its owner execute {remedy}",
        see=Page.JOURNAL,
    )


def _message_of(error: DBAPIError) -> str:
    original = error.orig
    if original is not None and len(original.args) > 1:  # those of MariaDB have the number before it
        return str(original.args[1])
    cause = None if original is None else original.__cause__  # asyncpg's own, without the name of its class
    return str(cause or original).partition("\n")[0]


def _verb_of(said: str, statement: str) -> str:
    lacking = _LACKING.match(said)  # PostgreSQL does not say
    return lacking[0] if lacking is not None else statement.partition(" ")[0].upper()


def _name_of(found: re.Match[str]) -> str:
    return ".".join(part for part in found.groups() if part)
