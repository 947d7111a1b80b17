"""What the owner orders of all peers in the manifest: a pause, bans, names that are not shown. Pure.

Each order makes the next version of the manifest, so it is signed by the owner, reaches every peer, and cannot be replayed: peers
follow the highest version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from lutetia.protocol.schema.canonical import WireDocument
from lutetia.protocol.schema.fields import Explanation, Moment, OpenWord, PublicKey
from lutetia.protocol.schema.identity import public_key_of
from lutetia.system.errors import ConfigError

MOST_BANS = 512
MOST_HIDDEN = 1024
OrderKind = Literal["pause", "resume", "ban", "unban", "hide-name", "show-name"]


class PauseOrder(WireDocument):
    """Nothing is accepted until the owner resumes the run."""

    since: Moment = Field(description="When the owner paused the run, in Unix seconds")
    text: Explanation = Field(default="", description="Why, for people")


class BanOrder(WireDocument):
    """A peer that may not take part any more. What it had accepted stays."""

    peer: PublicKey = Field(description="Public key of the peer")
    since: Moment = Field(description="When the owner banned it, in Unix seconds")
    text: Explanation = Field(default="", description="Why, for people")


class OwnerOrders(WireDocument):
    """What the owner orders of all peers."""

    paused: PauseOrder | None = Field(default=None, description="The pause; null: the run goes on")
    resumed: Moment | None = Field(
        default=None, description="When the last pause ended, in Unix seconds: what should have come during it is not late"
    )
    banned: Annotated[tuple[BanOrder, ...], Field(max_length=MOST_BANS)] = Field(
        default=(), description="Peers whose records, results and requests are refused"
    )
    hidden_names: Annotated[tuple[PublicKey, ...], Field(max_length=MOST_HIDDEN)] = Field(
        default=(), description="Public keys of the peers whose names are not shown"
    )

    def ban_of(self, owner: str) -> BanOrder | None:
        """The ban of this peer; None: it is not banned."""
        return next((ban for ban in self.banned if ban.peer == owner), None)

    def bans(self, peer_id: str) -> bool:
        """Whether the peer of this id is banned."""
        return bool(self.banned) and self.ban_of(public_key_of(peer_id) or "") is not None

    def refusal_of(self, owner: str) -> str:
        """Why this peer is refused; empty: it is not banned."""
        ban = self.ban_of(owner)
        return f"the run's owner has banned this peer{because(ban.text)}" if ban else ""


class GivenOrder(WireDocument):
    """One order, as the ledger keeps it."""

    order: OpenWord = Field(description="pause, resume, ban, unban, hide-name or show-name")
    peer: PublicKey | None = Field(default=None, description="Public key of the peer; null: the order is about the run")
    text: Explanation = Field(default="", description="Why, for people")


@dataclass(frozen=True)
class Order:
    """What the owner asks for."""

    kind: OrderKind
    peer: str = ""
    """Public key; empty for pause and resume."""
    text: str = ""
    """Why, for people."""


def because(text: str) -> str:
    """`: text` to put behind a sentence; nothing without a reason."""
    return f": {text}" if text else ""


def with_order(old: OwnerOrders, order: Order, now: float) -> OwnerOrders:
    """The orders after one more, given at `now` (Unix seconds). Raises ConfigError where it changes nothing or has no room."""
    peer, bans, hidden = order.peer, old.banned, old.hidden_names
    banned, is_hidden = old.ban_of(peer) is not None, peer in hidden
    match order.kind:
        case "pause":
            _refuse(old.paused is not None, "the run is paused already; resume it with `lutetia run resume`")
            return old.model_copy(update={"paused": PauseOrder(since=now, text=order.text)})
        case "resume":
            _refuse(old.paused is None, "the run is not paused; there is nothing to resume")
            return old.model_copy(update={"paused": None, "resumed": now})
        case "ban":
            _refuse(banned, f"peer {peer[:16]}… is banned already; lift it with `lutetia run unban`")
            _refuse(len(bans) >= MOST_BANS, f"{MOST_BANS} peers are banned already; lift some, or name those who may take part")
            return old.model_copy(update={"banned": (*bans, BanOrder(peer=peer, since=now, text=order.text))})
        case "unban":
            _refuse(not banned, f"peer {peer[:16]}… is not banned; there is nothing to lift")
            return old.model_copy(update={"banned": tuple(ban for ban in bans if ban.peer != peer)})
        case "hide-name":
            _refuse(is_hidden, f"the name of peer {peer[:16]}… is hidden already")
            return old.model_copy(update={"hidden_names": (*hidden, peer)[-MOST_HIDDEN:]})
        case "show-name":
            _refuse(not is_hidden, f"the name of peer {peer[:16]}… is not hidden; there is nothing to show again")
            return old.model_copy(update={"hidden_names": tuple(other for other in hidden if other != peer)})


def _refuse(wrong: bool, text: str) -> None:
    if wrong:
        raise ConfigError(text)


def given_orders(old: OwnerOrders, new: OwnerOrders) -> tuple[GivenOrder, ...]:
    """The orders that lead from `old` to `new`, for the ledger."""
    given: list[GivenOrder] = []
    if new.paused and old.paused != new.paused:
        given.append(GivenOrder(order="pause", text=new.paused.text))
    if new.paused is None and new.resumed != old.resumed:
        given.append(GivenOrder(order="resume"))
    before, after = {ban.peer for ban in old.banned}, {ban.peer for ban in new.banned}
    given += [GivenOrder(order="ban", peer=ban.peer, text=ban.text) for ban in new.banned if ban.peer not in before]
    given += [GivenOrder(order="unban", peer=ban.peer) for ban in old.banned if ban.peer not in after]
    given += [GivenOrder(order="hide-name", peer=peer) for peer in new.hidden_names if peer not in old.hidden_names]
    given += [GivenOrder(order="show-name", peer=peer) for peer in old.hidden_names if peer not in new.hidden_names]
    return tuple(given)
