"""`run rotate`: give the coordinator a new key, by a manifest that the owner signs. From then on peers refuse the old key.

Peers get the new manifest from the coordinator with the new key, which they find through other peers. Acceptances stay: the
coordinator signs them, the ledger's head and the mixture again with its new key.
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
from lutetia.coordinator.mixtures.archive import renew_signatures
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
    """What `rotate_run` did. `ticket` is for new volunteers, because the old one names the old key."""

    manifest: Manifest
    old: str
    new: str
    ticket: str


def rotate_run(folder: RunFolder, owner_key: Path | None = None) -> Rotated:
    """Give the run in `folder` a new coordinator's key, while it is not served.

    Raises IdentityError (it is being served, no owner's key), AuthorisationError (not the owner's key) or ConfigError.
    """
    folder.read_manifest(now=0.0)  # raises before a lock file is made where there is no run
    with folder.locked():
        settle_rotation(folder)
        signed = folder.read_manifest(now=0.0)
        old, new = Identity.load(folder.coordinator_key), Identity.generate()
        others = [key for key in signed.manifest.coordinators if key != old.public_key]
        if len(others) == len(signed.manifest.coordinators):
            raise AuthorisationError(
                f"{folder.coordinator_key} is no coordinator of this run; put the key there that the manifest names"
            )
        manifest = next_version(signed.manifest, {"coordinators": [new.public_key, *others]}, time.time())
        new.save(folder.next_key)
        publish_version(folder, signed, manifest, Identity.load(owner_key or folder.owner_key))
        settle_rotation(folder)
        return Rotated(manifest, old.public_key, new.public_key, folder.ticket.read_text().strip())


def settle_rotation(folder: RunFolder) -> None:
    """Finish a rotation that a crash interrupted, or undo it if the owner had not signed yet."""
    if not folder.next_key.exists():
        return
    new, old = Identity.load(folder.next_key), Identity.load(folder.coordinator_key)
    manifest = folder.read_manifest(now=0.0).manifest
    if new.public_key not in manifest.coordinators:
        folder.next_key.unlink()
        return
    ticket = Ticket.decode(folder.ticket.read_text())
    places = tuple(address.replace(f"/p2p/{old.peer_id}", f"/p2p/{new.peer_id}") for address in ticket.addresses)
    write_atomic(folder.ticket, ticket.model_copy(update={"addresses": places}).encode().encode() + b"\n")
    ledger = Ledger.open(folder.ledger, manifest.run_id)
    HeadFile(folder.head, ledger, new).write()
    ledger.close()
    os.replace(folder.next_key, folder.coordinator_key)
    fsync_folder(folder.root)
    _log.info("the coordinator's key is now %s; peers refuse %s", new.public_key[:16], old.public_key[:16])


def renew_mixture_signature(folder: RunFolder, state: RunState, coordinator: Identity) -> None:
    """Sign the run's mixtures with this key, if an earlier key signed the current one."""
    path = folder.mixture / MIXTURE_FILE
    if not path.is_file() or state.mixture is None:
        return
    signed = read_mixture(folder.mixture)
    renewed = SignedMixture.sign(signed.mixture, coordinator.sign)
    if renewed != signed and signed.mixture.digest == state.mixture.mixture:
        renew_signatures(folder.mixtures, coordinator)
        write_atomic(path, canonical(renewed))  # last: it shows that all are done
        _log.info("signed mixture %s with the new key", signed.mixture.digest[:12])
