"""`coordinator pardon`: lift a quarantine, at once or by a note for the coordinator that serves the run."""

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

    Returns the public key, and whether the quarantine is lifted; if not, the serving coordinator lifts it within seconds.
    Raises UsageError (no or several quarantined peers match), ConfigError (no run there) or IntegrityError (ledger).
    """
    folder = RunFolder(root)
    manifest = folder.read_manifest(now=0.0).manifest
    try:
        with folder.locked():
            ledger = Ledger.open(folder.ledger, manifest.run_id)
            try:
                owner = _quarantined(ledger.state, who)
                ledger.append([PeerPardoned(time=time.time(), owner=owner)])
            finally:
                ledger.close()
            return owner, True
    except IdentityError:
        ledger = Ledger.open(folder.ledger, manifest.run_id)
        ledger.close()
        owner = _quarantined(ledger.state, who)
        write_atomic(_notes(folder) / owner, b"")
        return owner, False


def _quarantined(run: RunState, who: str) -> str:
    matches = [
        owner
        for owner in sorted(run.quarantined.keys() | run.refuted_checkers.keys())
        if who in (owner, peer_id_of(owner)) or (len(who) >= 8 and owner.startswith(who))
    ]
    if len(matches) != 1:
        how_many = (
            f"{len(matches)} quarantined peers or refuted checkers are"
            if matches
            else "no quarantined peer or refuted checker is"
        )
        raise UsageError(f"{how_many} called {who}; `lutetia coordinator replay` names them")
    return matches[0]


def _notes(folder: RunFolder) -> Path:
    return folder.root / "pardons"


def noted_pardons(folder: RunFolder) -> list[str]:
    """The public keys that the notes name. Blocks on the disk."""
    return sorted(path.name for path in _notes(folder).glob("[0-9a-f]*"))


def remove_notes(folder: RunFolder, owners: Sequence[str]) -> None:
    """Call this once their pardons are in the ledger. Blocks on the disk."""
    for owner in owners:
        (_notes(folder) / owner).unlink(missing_ok=True)
