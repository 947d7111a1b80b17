"""The ledger: an append-only SQLite table of events, each chained to the one before by its hash.

Deleting, changing or reordering a row breaks the chain. A broken ledger is refused, not repaired.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from lutetia.coordinator.ledger.events import (
    AcceptanceRecovered,
    CheckpointAccepted,
    Event,
    LineageRolledBack,
    QuarantineRecovered,
    ResetRecovered,
    RunCreated,
    read_event,
)
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.protocol.schema.canonical import canonical
from lutetia.system.errors import ConfigError, DiskError, IntegrityError

_log = logging.getLogger(__name__)

_APPLICATION = 0x4C757431  # "Lut1": tells ledgers from other SQLite databases
_START = b"\0" * 32
_DURABLE = CheckpointAccepted | LineageRolledBack | RunCreated | AcceptanceRecovered | ResetRecovered | QuarantineRecovered
"""Events that must be on disk before anything is published."""
_SCHEMA = """
CREATE TABLE events (id INTEGER PRIMARY KEY, time REAL NOT NULL, event TEXT NOT NULL, chain BLOB NOT NULL) STRICT;
CREATE TRIGGER no_update BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""


@dataclass(frozen=True)
class LedgerRow:
    """One row of the ledger; `text` is the event's canonical JSON, `chain` the hash after it."""

    id: int
    time: float
    text: str
    chain: bytes

    def event(self) -> Event:
        return read_event(self.text)


class Ledger:
    """One run's ledger, open for one writer. Use `create` once, then `open`."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._chain = _START
        self._count = 0
        self._writing = threading.Lock()
        self.on_durable: Callable[[], None] = lambda: None
        """Called after a durable write."""
        self.state = RunState()

    @classmethod
    def create(cls, path: Path, first: RunCreated) -> Ledger:
        """A new ledger that starts with `first`. Raises ConfigError when the file exists."""
        if path.exists():
            raise ConfigError(f"the ledger {path} already exists; choose a new run folder")
        with _sqlite_errors(path):
            connection = _connect(path)
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.executescript(_SCHEMA)
        ledger = cls(path, connection)
        ledger.append([first])
        return ledger

    @classmethod
    def open(cls, path: Path, run: str | None = None, *, to_read: bool = False) -> Ledger:
        """Read and verify the ledger of `run` (None: of any run), and rebuild its state.

        With `to_read` nothing is written, so that neither the file nor its folder need be writable.

        Raises:
            ConfigError: the file is absent, no ledger, or another run's.
            IntegrityError: it is damaged or was changed.
        """
        if not path.is_file():
            raise ConfigError(f"there is no ledger at {path}; create the run first or restore the file from a backup")
        with _sqlite_errors(path):
            _refuse_foreign(path)
            connection = _connect_to_read(path) if to_read else _connect(path)
            ledger = cls(path, connection)
            try:
                ledger._load(run)
            except BaseException:
                connection.close()
                raise
        return ledger

    def _load(self, run: str | None) -> None:
        if self._connection.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise IntegrityError(f"the ledger {self.path} is damaged; restore it from a backup")
        for row, event in self._verified():
            self.state = apply(self.state, event)
            self._chain, self._count = row.chain, row.id
        if not self._count:
            raise IntegrityError(f"the ledger {self.path} is empty; restore it from a backup")
        if run is not None and self.state.run != run:
            raise ConfigError(
                f"the ledger {self.path} is of run {self.state.run[:12]}, not of {run[:12]}; give the folder of that run"
            )

    def append(self, events: Iterable[Event], durable: bool = False) -> RunState:
        """Write `events` in one transaction and return the state after them. May be called from any thread.

        Events such as acceptances (`_DURABLE`), and with `durable` all events, are on disk when this returns. Raises
        LedgerOutOfOrder or DiskError; then nothing was written.
        """
        with self._writing:
            state, chain, count, rows = self.state, self._chain, self._count, []
            for event in events:
                state = apply(state, event)
                text, count = canonical(event).decode(), count + 1
                chain = _link(chain, event.time, text)
                rows.append((count, event.time, text, chain))
                durable = durable or isinstance(event, _DURABLE)
            self._insert(rows, durable)
            self.state, self._chain, self._count = state, chain, count
            if durable:
                self.on_durable()
            return state

    def _insert(self, rows: list[tuple[int, float, str, bytes]], durable: bool) -> None:
        with _sqlite_errors(self.path):
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", rows)

    def rows(self) -> Iterator[LedgerRow]:
        """Every row, verified against the chain. Raises IntegrityError at the first that does not fit."""
        with _sqlite_errors(self.path):
            for row, _ in self._verified():
                yield row

    def rows_after(self, event: int, limit: int) -> list[LedgerRow]:
        """At most `limit` rows after that event. They were verified when the ledger was opened. May be called from any thread."""
        query = "SELECT id, time, event, chain FROM events WHERE id > ? ORDER BY id LIMIT ?"
        with self._writing, _sqlite_errors(self.path):
            return [LedgerRow(*line) for line in self._connection.execute(query, (event, limit))]

    def accepted_blobs(self, states_only: bool) -> set[str]:
        """Digests of the training states, and of weights and traces too, of all results that were ever accepted."""
        accepted = "FROM events WHERE event ->> '$.kind' = 'checkpoint-accepted'"
        queries = [f"SELECT event ->> '$.acceptance.state.digest' {accepted}"]
        if not states_only:
            queries.append(f"SELECT event ->> '$.acceptance.weights.digest' {accepted}")
            queries.append("SELECT event ->> '$.record.trace.digest' FROM events WHERE event ->> '$.kind' = 'checkpoint-seen'")
        with self._writing, _sqlite_errors(self.path):
            found = {digest for query in queries for (digest,) in self._connection.execute(query)}
        return found - {None}

    def stitched(self) -> list[str]:
        """Digests of all mixtures, oldest first. May be called from any thread."""
        query = "SELECT event ->> '$.mixture' FROM events WHERE event ->> '$.kind' = 'mixture-stitched' ORDER BY id"
        with self._writing, _sqlite_errors(self.path):
            return [digest for (digest,) in self._connection.execute(query)]

    def has_accepted(self, checkpoint: str) -> bool:
        """Whether this checkpoint was ever accepted. Reads the whole file; may be called from any thread."""
        kinds = "(event LIKE '%\"checkpoint-accepted\"%' OR event LIKE '%\"acceptance-recovered\"%')"
        accepted = f"SELECT EXISTS (SELECT 1 FROM events WHERE {kinds} AND instr(event, ?))"
        with self._writing, _sqlite_errors(self.path):
            return bool(self._connection.execute(accepted, (f'"checkpoint":"{checkpoint}"',)).fetchone()[0])

    def _verified(self) -> Iterator[tuple[LedgerRow, Event]]:
        chain, expected = _START, 1
        for row in (
            LedgerRow(*line) for line in self._connection.execute("SELECT id, time, event, chain FROM events ORDER BY id")
        ):
            chain = _link(chain, row.time, row.text)
            if row.id != expected or row.chain != chain:
                raise IntegrityError(f"the ledger {self.path} was changed at event {expected}; restore it from a backup")
            try:
                event = row.event()
            except ValidationError as error:
                raise IntegrityError(
                    f"event {row.id} of the ledger {self.path} cannot be read by this version of the software; use a newer one"
                ) from error
            yield row, event
            expected += 1

    @property
    def head(self) -> tuple[int, str]:
        """The number of events, and the chain's hash (hex) after the last."""
        return self._count, self._chain.hex()

    def chain_at(self, event: int) -> str | None:
        """The chain's hash (hex) after that many events; None beyond the end."""
        with _sqlite_errors(self.path):
            row = self._connection.execute("SELECT chain FROM events WHERE id = ?", (event,)).fetchone()
        return row[0].hex() if row else None

    def copy_to(self, path: Path) -> None:
        """A consistent copy in a new file, also while another process appends. Raises DiskError."""
        with _sqlite_errors(path), contextlib.closing(sqlite3.connect(path)) as target:
            self._connection.backup(target)
            target.execute("PRAGMA journal_mode = DELETE")  # so that the copy is a single file

    def replay(self, until: float | None = None) -> RunState:
        """The state at `until` (Unix seconds; None is now), rebuilt from the file."""
        state = RunState()
        for row in self.rows():
            if until is not None and row.time > until:
                break
            state = apply(state, row.event())
        return state

    def close(self) -> None:
        self._connection.close()


def _link(chain: bytes, time: float, text: str) -> bytes:
    return hashlib.sha256(chain + repr(time).encode() + b"\n" + text.encode()).digest()


def _refuse_foreign(path: Path) -> None:
    """Checked read-only before the file is opened for writing, so that another program's database is never changed."""
    with contextlib.closing(_connect_to_read(path)) as connection:
        if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION:
            raise ConfigError(f"{path} is a database of another program, not a ledger; give the run's folder")


def _connect_to_read(path: Path) -> sqlite3.Connection:
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


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, timeout=5.0, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    return connection


@contextlib.contextmanager
def _sqlite_errors(path: Path) -> Iterator[None]:
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
