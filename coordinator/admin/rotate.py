"""`run rotate`: a new key for the coordinator, signed in by the run's owner; whatever the old key signs from then on is refused.

Peers learn the new version of the manifest from the new coordinator, whom they find through each other. What was accepted stays:
the new coordinator signs the ledger's acceptances, the ledger's head and the mixture anew.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from lutetia.coordinator.admin.upgrade import publish_version
from lutetia.coordinator.ledger.log import Ledger
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.coordinator.ledger.signed_head import HeadFile
from lutetia.coordinator.run_folder import RunFolder
from lutetia.models.mixing.description import FILE as MIXTURE_FILE
from lutetia.models.mixing.description import SignedMixture, read_mixture
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.manifest_upgrade import next_version
from lutetia.protocol.schema.ticket import Ticket
from lutetia.system.errors import AuthorisationError
from lutetia.system.files import fsync_folder, write_atomic

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rotated:
    """`ticket` is for new volunteers: the old one names the old key."""

    manifest: Manifest
    old: str
    new: str
    ticket: str


def rotate_run(folder: RunFolder, owner_key: Path | None = None) -> Rotated:
    """Give the run in `folder` a new coordinator's key, while nobody serves it.

    Raises IdentityError (it is being served, no owner's key), AuthorisationError (another key than the owner's), ConfigError.
    """
    folder.read_manifest(now=0.0)  # where there is no run, nothing is made for its lock
    with folder.locked():
        settle_rotation(folder)
        signed = folder.read_manifest(now=0.0)
        old, fresh = Identity.load(folder.coordinator_key), Identity.generate()
        others = [key for key in signed.manifest.coordinators if key != old.public_key]
        if len(others) == len(signed.manifest.coordinators):
            raise AuthorisationError(
                f"{folder.coordinator_key} is no coordinator of this run; put the key that the manifest names"
            )
        manifest = next_version(signed.manifest, {"coordinators": [fresh.public_key, *others]}, time.time())
        fresh.save(folder.next_key)
        publish_version(folder, signed, manifest, Identity.load(owner_key or folder.owner_key))
        settle_rotation(folder)
        return Rotated(manifest, old.public_key, fresh.public_key, folder.ticket.read_text().strip())


def settle_rotation(folder: RunFolder) -> None:
    """Finish a rotation that was begun, or undo one that the owner had not signed: a crash may come between any two steps."""
    if not folder.next_key.exists():
        return
    fresh, old = Identity.load(folder.next_key), Identity.load(folder.coordinator_key)
    manifest = folder.read_manifest(now=0.0).manifest
    if fresh.public_key not in manifest.coordinators:
        folder.next_key.unlink()
        return
    ticket = Ticket.decode(folder.ticket.read_text())
    places = tuple(address.replace(f"/p2p/{old.peer_id}", f"/p2p/{fresh.peer_id}") for address in ticket.addresses)
    write_atomic(folder.ticket, ticket.model_copy(update={"addresses": places}).encode().encode() + b"\n")
    ledger = Ledger.open(folder.ledger, manifest.run_id)
    HeadFile(folder.head, ledger, fresh).write()
    ledger.close()
    os.replace(folder.next_key, folder.coordinator_key)
    fsync_folder(folder.root)
    _log.info("the coordinator's key is %s now; %s is of no use any more", fresh.public_key[:16], old.public_key[:16])


def sign_mixture_anew(folder: RunFolder, state: RunState, coordinator: Identity) -> None:
    """The mixture that this run's ledger knows, signed by an earlier key, gets this one's signature."""
    path = folder.mixture / MIXTURE_FILE
    if not path.is_file() or state.mixture is None:
        return
    signed = read_mixture(folder.mixture)
    mine = SignedMixture.sign(signed.mixture, coordinator.sign)
    if mine != signed and signed.mixture.digest == state.mixture.mixture:
        write_atomic(path, canonical(mine))
        _log.info("signed mixture %s anew", signed.mixture.digest[:12])
