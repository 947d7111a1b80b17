"""`coordinator pardon`: lifts a quarantine, at once or by a note that the serving coordinator takes up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from lutetia.coordinator.ledger.events import PeerPardoned
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.run_folder import RunFolder
from lutetia.protocol.schema.identity import peer_id_of
from lutetia.system.errors import IdentityError, UsageError
from lutetia.system.files import write_atomic


def pardon(root: Path, who: str) -> tuple[str, bool]:
    """Lift the quarantine of `who`: a public key, its first eight or more digits, or a peer id.

    Returns the public key, and whether it is done; otherwise the coordinator that serves the run does it within seconds.
    Raises UsageError (nobody or several of that name are quarantined), ConfigError (no run there) or IntegrityError (ledger).
    """
    folder = RunFolder(root)
    manifest = folder.read_manifest(now=0.0).manifest
    try:
        with folder.locked():
            ledger = Ledger.open(folder.ledger, manifest.run_id)
            try:
                owner = _meant(ledger.state, who)
                ledger.append([PeerPardoned(time=time.time(), owner=owner)])
            finally:
                ledger.close()
            return owner, True
    except IdentityError:
        ledger = Ledger.open(folder.ledger, manifest.run_id)
        ledger.close()
        owner = _meant(ledger.state, who)
        write_atomic(_notes(folder) / owner, b"")
        return owner, False


def _meant(run: RunState, who: str) -> str:
    found = [owner for owner in run.quarantined if who in (owner, peer_id_of(owner)) or (len(who) >= 8 and owner.startswith(who))]
    if len(found) != 1:
        how_many = f"{len(found)} quarantined peers are" if found else "no quarantined peer is"
        raise UsageError(f"{how_many} called {who}; `lutetia coordinator replay` names them")
    return found[0]


def _notes(folder: RunFolder) -> Path:
    return folder.root / "pardons"


def noted_pardons(folder: RunFolder) -> list[str]:
    """The public keys that notes ask to pardon. Blocks on the disk."""
    return sorted(path.name for path in _notes(folder).glob("[0-9a-f]*"))


def remove_notes(folder: RunFolder, owners: Sequence[str]) -> None:
    """What they asked for is in the ledger, or asked for nothing. Blocks on the disk."""
    for owner in owners:
        (_notes(folder) / owner).unlink(missing_ok=True)
