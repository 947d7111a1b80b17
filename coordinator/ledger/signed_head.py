"""The signed head of the ledger: written after every durable event, compared at every start, shown in the status document."""

from __future__ import annotations

import time
from pathlib import Path

from pydantic import ValidationError

from lutetia.coordinator.ledger.log import Ledger
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.ledger_head import SignedHead
from lutetia.protocol.schema.manifest import Manifest
from lutetia.system.errors import IntegrityError
from lutetia.system.files import write_atomic

_REMEDY = "restore the newest ledger, or start with --recover to recover the lost acceptances from peers"


class HeadFile:
    """Keeps the signed head of `ledger` in `path`. After a crash the ledger may be ahead of it, never behind."""

    def __init__(self, path: Path, ledger: Ledger, identity: Identity) -> None:
        self.path, self._ledger, self._identity = path, ledger, identity
        self.signed: SignedHead | None = None
        ledger.on_durable = self.write

    def write(self) -> None:
        """Sign the ledger's present end. Raises DiskError."""
        events, chain = self._ledger.head
        self.signed = SignedHead.sign(self._ledger.state.run, events, chain, time.time(), self._identity)
        write_atomic(self.path, canonical(self.signed))


def read_head(path: Path) -> SignedHead | None:
    """The head in `path`, or None. Raises IntegrityError when it cannot be read."""
    try:
        return SignedHead.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise IntegrityError(f"the ledger's head {path} is damaged; {_REMEDY}") from error


def check_head(path: Path, ledger: Ledger, manifest: Manifest) -> None:
    """Raises IntegrityError when `ledger` ends before the signed head in `path`, or has another history."""
    signed = read_head(path)
    if signed is None:
        return
    if not signed.holds(manifest.run_id, manifest.coordinators):
        raise IntegrityError(f"the ledger's head {path} is not signed by a coordinator of this run; {_REMEDY}")
    head, (events, _) = signed.head, ledger.head
    if events < head.events:
        raise IntegrityError(
            f"the ledger {ledger.path} ends at event {events}, but this coordinator has signed event {head.events}; {_REMEDY}"
        )
    if ledger.chain_at(head.events) != head.chain:
        raise IntegrityError(
            f"event {head.events} of the ledger {ledger.path} is not the one that this coordinator has signed; {_REMEDY}"
        )
