"""How far a ledger reaches, signed by its coordinator: whoever has seen a head can tell a shorter or changed ledger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lutetia.protocol.schema.canonical import Frozen, canonical
from lutetia.protocol.schema.identity import Identity, verify
from lutetia.protocol.schema.manifest import Digest, PublicKey, Signature

_SIGNING_DOMAIN = b"lutetia-ledger-head-1\n"


class LedgerHead(Frozen):
    """The first `events` events of the ledger of `run` hash to `chain`, at `time` (Unix seconds)."""

    format: Literal[1] = 1
    run: Digest
    events: int = Field(ge=1)
    chain: Digest
    time: float
    coordinator: PublicKey


class SignedHead(Frozen):
    """A head and its coordinator's signature over the canonical bytes."""

    head: LedgerHead
    signature: Signature

    @classmethod
    def sign(cls, run: str, events: int, chain: str, time: float, coordinator: Identity) -> SignedHead:
        head = LedgerHead(run=run, events=events, chain=chain, time=time, coordinator=coordinator.public_key)
        return cls(head=head, signature=coordinator.sign(_SIGNING_DOMAIN + canonical(head)))

    def holds(self, run: str, coordinators: Sequence[str]) -> bool:
        """Whether one of `coordinators` signed it for `run`."""
        head = self.head
        known = head.run == run and head.coordinator in coordinators
        return known and verify(head.coordinator, _SIGNING_DOMAIN + canonical(head), self.signature)
