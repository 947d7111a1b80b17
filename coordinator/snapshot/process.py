"""Replays a whole ledger at low priority, compares a snapshot with it, and writes a new one.

`python -m lutetia.coordinator.snapshot RUN ORDER`, where RUN is the run's folder and ORDER a SnapshotOrder.

It runs beside the coordinator that serves the run, which neither waits for it nor gives it any of its state.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from pydantic import Field

from lutetia.coordinator.ledger.log import verified_events
from lutetia.coordinator.ledger.reducer import apply
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.run_folder import RunFolder
from lutetia.coordinator.snapshot.document import SnapshotHeader, header_of, parts_of, rules_digest, write_snapshot
from lutetia.coordinator.web.api.history import History
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.fields import Digest
from lutetia.protocol.schema.identity import Identity
from lutetia.system.errors import DiskError, IntegrityError
from lutetia.system.process import ParentChannel, give_way

NICE = 19


class SnapshotOrder(Frozen):
    """What a coordinator wants."""

    rules: Digest = Field(description="`rules_digest` of the coordinator's process")
    known: SnapshotHeader | None = Field(default=None, description="Header of the snapshot that it started from; null: none")


class SnapshotReport(Frozen):
    """What a replay of the whole ledger found."""

    events: int = Field(default=0, ge=0, description="Events that the new snapshot covers; 0: none was written")
    size: int = Field(default=0, ge=0, description="Size of its parts in bytes")
    seconds: float = Field(default=0.0, ge=0, description="Processor seconds that replay and writing took")
    fits: bool | None = Field(default=None, description="Whether the known snapshot follows from the ledger; null: none is known")
    broken: str = Field(default="", description="Why the ledger itself cannot be replayed; empty: it can")
    unwritten: str = Field(default="", description="Why the new snapshot was not written; empty: it was")


def replay_and_write(folder: RunFolder, order: SnapshotOrder) -> SnapshotReport:
    """Replay the ledger of `folder`, compare the known snapshot with it on the way, and write a new one."""
    if order.rules != rules_digest():
        return SnapshotReport(unwritten="the software on the disk is not what this coordinator runs; start it again")
    known = order.known
    began, fits, state, history, chain = time.process_time(), None, RunState(), History(), b""
    try:
        for row, event in verified_events(folder.ledger):
            state, chain = apply(state, event), row.chain
            history.add(row.id, event)
            if known and row.id == known.events:
                same = header_of(state.run, row.id, chain.hex(), parts_of(state, history), known.coordinator)
                fits = (same.parts, same.chain) == (known.parts, known.chain)
    except IntegrityError as error:
        return SnapshotReport(broken=str(error), fits=fits)
    if known and fits is None:
        fits = False  # it covers more events than there are
    coordinator = Identity.load(folder.coordinator_key)
    parts = parts_of(state, history)
    header = header_of(state.run, state.events, chain.hex(), parts, coordinator.public_key)
    try:
        write_snapshot(folder.snapshot, header, parts, coordinator)
    except DiskError as error:
        return SnapshotReport(fits=fits, unwritten=str(error))
    return SnapshotReport(
        events=state.events, size=sum(map(len, parts)), seconds=time.process_time() - began, fits=fits
    )  # fmt: skip


def main() -> None:
    """Do it once, and report to the parent."""
    channel = ParentChannel()
    give_way(NICE)
    report = replay_and_write(RunFolder(Path(sys.argv[1])), SnapshotOrder.model_validate_json(sys.argv[2]))
    channel.send(report.model_dump(mode="json"))
