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
    LaneAccepted,
    LanesMerged,
    LineageRolledBack,
    QuarantineRecovered,
    ResetRecovered,
    RunCreated,
    read_event,
)
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.ledger.sqlite_file import (
    APPLICATION,
    connect,
    connect_to_read,
    refuse_damaged,
    refuse_foreign,
    sqlite_errors,
)
from lutetia.protocol.schema.canonical import canonical
from lutetia.system.errors import ConfigError, IntegrityError

_log = logging.getLogger(__name__)

_START = b"\0" * 32
_DURABLE = (
    CheckpointAccepted | LaneAccepted | LanesMerged | LineageRolledBack | RunCreated | AcceptanceRecovered | ResetRecovered
    | QuarantineRecovered
)  # fmt: skip
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


@dataclass(frozen=True)
class LedgerStart:
    """The state after the first `events` events, to which only later ones are added; `chain`: the hash (hex) after them."""

    events: int
    chain: str
    state: RunState


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
        self.trusted = 0
        """The first events, which were neither read nor verified when the ledger was opened."""

    @classmethod
    def create(cls, path: Path, first: RunCreated) -> Ledger:
        """A new ledger that starts with `first`. Raises ConfigError when the file exists."""
        if path.exists():
            raise ConfigError(f"the ledger {path} already exists; choose a new run folder")
        with sqlite_errors(path):
            connection = connect(path)
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.executescript(_SCHEMA)
        ledger = cls(path, connection)
        ledger.append([first])
        return ledger

    @classmethod
    def open(cls, path: Path, run: str | None = None, *, to_read: bool = False, start: LedgerStart | None = None) -> Ledger:
        """Read and verify the ledger of `run` (None: of any run), and rebuild its state.

        Args:
            path: the ledger's file.
            run: id of the run.
            to_read: write nothing, so that neither the file nor its folder need be writable.
            start: read only the events after it, if it fits the ledger. The caller must then verify the others (`replayed`).

        Raises:
            ConfigError: the file is absent, no ledger, or another run's.
            IntegrityError: it is damaged or was changed.
        """
        if not path.is_file():
            raise ConfigError(f"there is no ledger at {path}; create the run first or restore the file from a backup")
        with sqlite_errors(path):
            refuse_foreign(path)
            connection = connect_to_read(path) if to_read else connect(path)
            ledger = cls(path, connection)
            try:
                ledger._load(run, start)
            except BaseException:
                connection.close()
                raise
        return ledger

    def _load(self, run: str | None, start: LedgerStart | None) -> None:
        if start is None or not self._load_after(start):
            refuse_damaged(self._connection, self.path)
            self._chain, self._count = _START, 0
            self._add_up(RunState())
        if not self._count:
            raise IntegrityError(f"the ledger {self.path} is empty; restore it from a backup")
        if run is not None and self.state.run != run:
            raise ConfigError(
                f"the ledger {self.path} is of run {self.state.run[:12]}, not of {run[:12]}; give the folder of that run"
            )

    def _load_after(self, start: LedgerStart) -> bool:
        """Whether `start` is of this ledger, and the events after it follow from it. Then it is loaded."""
        if self.chain_at(start.events) != start.chain:
            return False
        self._chain, self._count = bytes.fromhex(start.chain), start.events
        try:
            self._add_up(start.state)
        except IntegrityError:
            return False  # reading the whole ledger tells which of the two is wrong
        self.trusted = start.events
        return True

    def _add_up(self, state: RunState) -> None:
        """Add the events that come after those already loaded to `state`."""
        for row, event in self._verified(self._count, self._chain):
            state = apply(state, event)
            self._chain, self._count = row.chain, row.id
        self.state = state

    def catch_up(self) -> bool:
        """Add what another process has appended since; returns whether it has. For a ledger that was opened `to_read`.

        Raises IntegrityError when that does not follow from what was read before.
        """
        with self._writing, sqlite_errors(self.path):
            before = self._count
            self._add_up(self.state)
            return self._count > before

    def restore(self) -> RunState:
        """Rebuild the state from all events. Raises IntegrityError when they do not follow from each other."""
        with self._writing:
            self.state, self.trusted = self.replay(), 0
            return self.state

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
        with sqlite_errors(self.path):
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?)", rows)

    def rows(self) -> Iterator[LedgerRow]:
        """Every row, verified against the chain. Raises IntegrityError at the first that does not fit."""
        with sqlite_errors(self.path):
            for row, _ in self._verified():
                yield row

    def rows_after(self, event: int, limit: int) -> list[LedgerRow]:
        """At most `limit` rows after that event. They were verified when the ledger was opened. May be called from any thread."""
        query = "SELECT id, time, event, chain FROM events WHERE id > ? ORDER BY id LIMIT ?"
        with self._writing, sqlite_errors(self.path):
            return [LedgerRow(*line) for line in self._connection.execute(query, (event, limit))]

    def accepted_blobs(self, states_only: bool) -> set[str]:
        """Digests of the training states, and of weights and traces too, of all results that were ever accepted.

        Reads the whole file, while others may append. May be called from any thread.

        Args:
            states_only: leave out weights and traces of epochs, but not the weights of lanes' results.
        """
        epochs, lanes = "IN ('checkpoint-accepted', 'lanes-merged')", "= 'lane-accepted'"
        kept = [("acceptance.weights", epochs), ("trace", "= 'lanes-merged'")]
        gone = [("acceptance.state", epochs), ("acceptance.state", lanes), ("acceptance.weights", lanes)]
        traces = ("record.trace", "= 'checkpoint-seen'")
        with sqlite_errors(self.path), contextlib.closing(connect_to_read(self.path)) as connection:

            def digests(fields: list[tuple[str, str]]) -> set[str | None]:
                query = "SELECT event ->> '$.{}.digest' FROM events WHERE event ->> '$.kind' {}"
                return {digest for field in fields for (digest,) in connection.execute(query.format(*field))}

            found = digests(gone) - digests(kept) if states_only else digests([*gone, *kept, traces])
        return {digest for digest in found if digest}

    def stitched(self) -> list[str]:
        """Digests of all mixtures, oldest first. May be called from any thread."""
        query = "SELECT event ->> '$.mixture' FROM events WHERE event ->> '$.kind' = 'mixture-stitched' ORDER BY id"
        with self._writing, sqlite_errors(self.path):
            return [digest for (digest,) in self._connection.execute(query)]

    def has_accepted(self, checkpoint: str) -> bool:
        """Whether this checkpoint was ever accepted. Reads the whole file; may be called from any thread."""
        names = ("checkpoint-accepted", "lanes-merged", "acceptance-recovered")
        kinds = "(" + " OR ".join(f"event LIKE '%\"{name}\"%'" for name in names) + ")"
        accepted = f"SELECT EXISTS (SELECT 1 FROM events WHERE {kinds} AND instr(event, ?))"
        with self._writing, sqlite_errors(self.path):
            return bool(self._connection.execute(accepted, (f'"checkpoint":"{checkpoint}"',)).fetchone()[0])

    def _verified(self, after: int = 0, chain: bytes = _START) -> Iterator[tuple[LedgerRow, Event]]:
        """The events after the first `after`, which end with the hash `chain`."""
        expected = after + 1
        query = "SELECT id, time, event, chain FROM events WHERE id > ? ORDER BY id"
        for row in (LedgerRow(*line) for line in self._connection.execute(query, (after,))):
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
        with sqlite_errors(self.path):
            row = self._connection.execute("SELECT chain FROM events WHERE id = ?", (event,)).fetchone()
        return row[0].hex() if row else None

    def copy_to(self, path: Path) -> None:
        """A consistent copy in a new file, also while another process appends. Raises DiskError."""
        with sqlite_errors(path), contextlib.closing(sqlite3.connect(path)) as target:
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
        """Close the file, once no other thread is reading or writing it: SQLite crashes when that happens during a statement."""
        with self._writing:
            self._connection.close()


def verified_events(path: Path) -> Iterator[tuple[LedgerRow, Event]]:
    """Every event of a ledger that a coordinator may be appending to, verified, with little of it in memory.

    Raises IntegrityError when the file is damaged or was changed.
    """
    with sqlite_errors(path):
        refuse_foreign(path)
        with contextlib.closing(connect_to_read(path)) as connection:
            refuse_damaged(connection, path)
            yield from Ledger(path, connection)._verified()


def _link(chain: bytes, time: float, text: str) -> bytes:
    return hashlib.sha256(chain + repr(time).encode() + b"\n" + text.encode()).digest()
