"""What the web API says of a peer besides its results: its name and its credit. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import Field

from lutetia.coordinator.credit.accounts import credit_in_flops
from lutetia.coordinator.ledger.run_state import RunState
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.owner.orders import OwnerOrders


class CreditDocument(Frozen):
    """A peer's credit in FLOPs, as docs/explanation/credit.md counts it."""

    total: float = Field(description="All of it")
    epochs: float = Field(description="Of its accepted epochs; void ones count, unless it was found to cheat")
    audits: float = Field(description="Of the audits and lent checks that it carried out and that counted")
    copies: float = Field(description="Of the copies of accepted checkpoints that it kept")
    recent: float = Field(description="Recent average in FLOPs per day; it halves in a week without work")


@dataclass(frozen=True)
class People:
    """The run's peers: `run` counts their credit, `names` has what they are called, by public key; `orders`: the owner's."""

    run: RunState = field(default_factory=RunState)
    names: Mapping[str, str] = field(default_factory=dict)
    orders: OwnerOrders = OwnerOrders()

    def credit(self, owner: str, now: float) -> CreditDocument:
        """The peer's credit at `now` (Unix seconds)."""
        credit = credit_in_flops(self.run.credit.get(owner, {}), self.run.flops, now)
        return CreditDocument(
            total=credit.total, epochs=credit.epochs, audits=credit.audits, copies=credit.copies, recent=credit.recent
        )

    def name(self, owner: str) -> str:
        """What the peer is called; empty: nothing."""
        return "" if owner in self.orders.hidden_names else self.names.get(owner, "")

    def banned(self, owner: str) -> str | None:
        """Why the owner has banned the peer; None: it is not banned."""
        ban = self.orders.ban_of(owner)
        return None if ban is None else ban.text or "the owner gave no reason"
