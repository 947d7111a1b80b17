"""Limits per network origin: all identities behind one address share the quota of that address.

The judge limits the rate of each peer; here requests are counted by origin (`protocol.transport.network_origin`): offers and
audit requests per minute, and undecided results, each of which costs the coordinator a download and a check. Peers behind relays
share one origin. No clock of its own.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TypeVar

from lutetia.protocol.rpc.checkpoint_offer import OfferReply

T = TypeVar("T")

_MINUTE = 60.0
_REMEMBERED = 4096
BUSY_SECONDS = 10.0


@dataclass
class RateWindow:
    """At most `per_minute` requests from one origin within any minute."""

    per_minute: int
    _moments: OrderedDict[str, deque[float]] = field(default_factory=OrderedDict)

    def wait(self, origin: str, now: float) -> float | None:
        """Seconds to wait, or None; the request is counted then."""
        moments = self._moments.get(origin) or deque()
        while moments and moments[0] <= now - _MINUTE:
            moments.popleft()
        if len(moments) >= self.per_minute:
            return moments[0] + _MINUTE - now
        moments.append(now)
        _remember(self._moments, origin, moments)
        return None


class Admission:
    """Whether an offer is looked at now. Of one origin: at most `offers_per_minute`, and `undecided` results at a time."""

    def __init__(self, offers_per_minute: int = 120, undecided: int = 8) -> None:
        self._pace, self._undecided = RateWindow(offers_per_minute), undecided
        self._origins: OrderedDict[str, str] = OrderedDict()

    def refusal(self, peer_id: str, origin: str, waiting: Collection[str], now: float) -> OfferReply | None:
        """The reply to an offer that must come later, or None. `waiting`: the peer ids with undecided results."""
        if wait := self._pace.wait(origin, now):
            return OfferReply(verdict="busy", text="too many offers from this address", retry_after=wait)
        here = sum(self._origins.get(other) == origin for other in waiting)
        if peer_id not in waiting and here >= self._undecided:
            text = f"{here} results from this address are being checked; offer yours again later"
            return OfferReply(verdict="busy", text=text, retry_after=BUSY_SECONDS)
        _remember(self._origins, peer_id, origin)
        return None

    def origin(self, peer_id: str) -> str:
        """The network origin from which this peer last offered; empty for a peer that never did."""
        return self._origins.get(peer_id, "")


def _remember(known: OrderedDict[str, T], name: str, value: T) -> None:
    """Keep the newest _REMEMBERED entries."""
    known[name] = value
    known.move_to_end(name)
    if len(known) > _REMEMBERED:
        known.popitem(last=False)
