"""The signed head of a coordinator's ledger. A reader that has seen one can detect a shorter or changed ledger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from lutetia.protocol.schema.canonical import Frozen, WireDocument, canonical
from lutetia.protocol.schema.fields import Count, Digest, Moment, PublicKey, Signature
from lutetia.protocol.schema.identity import Identity, verify

_SIGNING_DOMAIN = b"lutetia-ledger-head-1\n"


class LedgerHead(WireDocument):
    """The length and hash of a ledger at some moment."""

    format: Literal[1] = Field(default=1, description="Version of this document's format")
    run: Digest = Field(description="Run id")
    events: Count = Field(description="Events in the ledger")
    chain: Digest = Field(description="Hash chain over these events (hex)")
    time: Moment = Field(description="Time of the head in Unix seconds")
    coordinator: PublicKey = Field(description="Public key of the coordinator that keeps the ledger")


class SignedHead(Frozen):
    """A head and its signature."""

    head: LedgerHead = Field(description="The head")
    signature: Signature = Field(description="The coordinator's Ed25519 signature over the canonical bytes (hex)")

    @classmethod
    def sign(cls, run: str, events: int, chain: str, time: float, coordinator: Identity) -> SignedHead:
        head = LedgerHead(run=run, events=events, chain=chain, time=time, coordinator=coordinator.public_key)
        return cls(head=head, signature=coordinator.sign(_SIGNING_DOMAIN + canonical(head)))

    def holds(self, run: str, coordinators: Sequence[str]) -> bool:
        """Whether one of `coordinators` (public keys) signed it for `run`."""
        head = self.head
        known = head.run == run and head.coordinator in coordinators
        return known and verify(head.coordinator, _SIGNING_DOMAIN + canonical(head), self.signature)
