"""`coordinator rollback`: take a shard back to an earlier epoch, at once or by a note for the coordinator that serves the run."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lutetia.coordinator.ledger.events import LineageRolledBack
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.run_state import RunState, ShardLedger
from lutetia.coordinator.run_folder import RunFolder
from lutetia.protocol.blobs.store import BlobStore
from lutetia.system.errors import IdentityError, UsageError
from lutetia.system.files import write_atomic

_NOTE = re.compile(r"([0-9]{1,4})-([0-9]{1,9})-([0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class NotedRollback:
    """A note that shard `shard` is to go back to `epoch`. It holds for `term` only: another rollback makes it void."""

    shard: int
    term: int
    epoch: int

    @property
    def name(self) -> str:
        """The note's file name."""
        return f"{self.shard}-{self.term}-{self.epoch}"


def roll_back(root: Path, shard: int, epoch: int) -> tuple[int, bool]:
    """Take `shard` back to accepted `epoch` (0: the initial model), in a new term.

    Returns the number of epochs that are void, and whether it is done; if not, the serving coordinator does it within seconds.
    Raises UsageError (no such shard or epoch, or its training state is gone), ConfigError (no run) or IntegrityError (ledger).
    """
    folder = RunFolder(root)
    manifest = folder.read_manifest(now=0.0).manifest
    try:
        with folder.locked():
            ledger = Ledger.open(folder.ledger, manifest.run_id)
            try:
                noted = _checked(ledger.state, folder, shard, epoch)
                event = rolled_back(ledger.state, noted, time.time())
                assert event is not None
                ledger.append([event], durable=True)
            finally:
                ledger.close()
            return event.dropped, True
    except IdentityError:
        ledger = Ledger.open(folder.ledger, manifest.run_id)
        ledger.close()
        noted = _checked(ledger.state, folder, shard, epoch)
        write_atomic(_notes(folder) / noted.name, b"")
        return ledger.state.shards[shard].epoch - epoch, False


def rolled_back(run: RunState, noted: NotedRollback, now: float) -> LineageRolledBack | None:
    """The event of a rollback that the operator asked for; None when it no longer applies."""
    shard = run.shards.get(noted.shard)
    if shard is None or shard.term != noted.term or noted.epoch >= shard.epoch:
        return None
    first = next((link for link in shard.lineage if link.acceptance.epoch == noted.epoch + 1), None)
    if first is None or noted.epoch not in _epochs_known(shard):
        return None
    return LineageRolledBack(
        time=now, shard=noted.shard, epoch=noted.epoch, term=shard.term + 1, dropped=shard.epoch - noted.epoch,
        checkpoint=first.acceptance.checkpoint, why="operator",
    )  # fmt: skip


def _checked(run: RunState, folder: RunFolder, shard: int, epoch: int) -> NotedRollback:
    """The note for this rollback. Raises UsageError when it is impossible, with what is possible."""
    ledger = run.shards.get(shard)
    if ledger is None:
        raise UsageError(f"the run has no shard {shard}; its shards are 0 to {len(run.shards) - 1}")
    if epoch < 0 or epoch >= ledger.epoch:
        way = f"name an epoch from 0 to {ledger.epoch - 1}" if ledger.epoch else "there is nothing to take back"
        raise UsageError(f"shard {shard} is at epoch {ledger.epoch} and cannot go back to epoch {epoch}; {way}")
    possible = _possible(ledger, BlobStore(folder.blobs))
    if epoch not in possible:
        kept = f"{'epochs' if len(possible) > 1 else 'epoch'} {', '.join(map(str, possible))}" if possible else "no epoch"
        raise UsageError(
            f"shard {shard} cannot go back to epoch {epoch}, because the training state from which it would go on is not kept "
            f"any more; it can go back to {kept} (`kept_states` says how many are kept)"
        )
    return NotedRollback(shard, ledger.term, epoch)


def _epochs_known(shard: ShardLedger) -> Iterable[int]:
    """The epochs to which the ledger can go back: those whose successor it remembers, too."""
    known = [link.acceptance.epoch for link in shard.lineage]
    return [0, *known] if known and known[0] == 1 else known


def _possible(shard: ShardLedger, blobs: BlobStore) -> list[int]:
    """The epochs to which the shard can go back, and from which peers can train on."""
    states = {link.acceptance.epoch: link.acceptance.state.digest for link in shard.lineage}
    known = [epoch for epoch in _epochs_known(shard) if epoch < shard.epoch]
    return [epoch for epoch in known if epoch == 0 or blobs.has(states[epoch])]


def _notes(folder: RunFolder) -> Path:
    return folder.root / "rollbacks"


def noted_rollbacks(folder: RunFolder) -> list[NotedRollback]:
    """What the notes ask for, the shards in order. Blocks on the disk."""
    found = (_NOTE.fullmatch(path.name) for path in _notes(folder).glob("*"))
    return sorted((NotedRollback(*map(int, note.groups())) for note in found if note), key=lambda note: (note.shard, note.epoch))


def remove_rollback_notes(folder: RunFolder, done: Sequence[NotedRollback]) -> None:
    """Call this once they are in the ledger. Blocks on the disk."""
    for note in done:
        (_notes(folder) / note.name).unlink(missing_ok=True)
