"""The SQLite file of a ledger: how it is opened, and what its errors mean in one sentence."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from lutetia.system.errors import ConfigError, DiskError, IntegrityError

APPLICATION = 0x4C757431  # "Lut1": tells ledgers from other SQLite databases


def refuse_foreign(path: Path) -> None:
    """Checked read-only before the file is opened for writing, so that another program's database is never changed."""
    with contextlib.closing(connect_to_read(path)) as connection:
        if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
            raise ConfigError(f"{path} is a database of another program, not a ledger; give the run's folder")


def connect_to_read(path: Path) -> sqlite3.Connection:
    """A connection that writes nothing, not even the files beside a ledger that SQLite makes where it may."""
    where = f"{path.absolute().as_uri()}?mode=ro"
    connection = sqlite3.connect(where, uri=True, isolation_level=None, timeout=5.0, check_same_thread=False)
    try:
        connection.execute("PRAGMA application_id").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        pending = path.with_name(f"{path.name}-wal")
        if pending.exists() and pending.stat().st_size:
            raise  # some events are in a file that only a writer can read in
        connection = sqlite3.connect(f"{where}&immutable=1", uri=True, isolation_level=None, check_same_thread=False)
    return connection


def connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=5.0, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    return connection


def refuse_damaged(connection: sqlite3.Connection, path: Path) -> None:
    """Raises IntegrityError when SQLite finds the file's pages damaged. Reads the whole file."""
    if connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise IntegrityError(f"the ledger {path} is damaged; restore it from a backup")


@contextlib.contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """SQLite's errors as one sentence. Its message about damage quotes the damaged bytes, which need not be text."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise IntegrityError(f"the ledger {path} is damaged (a text is not UTF-8); restore it from a backup") from error
    except sqlite3.DatabaseError as error:
        text = str(error)
        damaged = "not a database" in text or "malformed" in text or "no such table" in text
        if damaged or isinstance(error, sqlite3.DataError):  # a row that claims more than the largest length
            raise IntegrityError(f"the ledger {path} is damaged ({text}); restore it from a backup") from error
        if isinstance(error, sqlite3.OperationalError):
            raise DiskError(
                f"cannot use the ledger {path}: {text}; free disk space or stop the other process that uses it"
            ) from error
        raise
