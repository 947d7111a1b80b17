"""Who may hand in results or ask for audits now: many identities behind one address share what one address may have.

Pure but for its memory. A peer's own rate is the judge's business. Origins count here (see
`protocol.transport.network_origin`): how often results
are offered or audits asked for from one, and how many undecided results, each of which costs the coordinator a download and a
check, come from it. Peers behind relays share one origin.
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
        """Seconds to wait; counts this request otherwise."""
        moments = self._moments.get(origin) or deque()
        while moments and moments[0] <= now - _MINUTE:
            moments.popleft()
        if len(moments) >= self.per_minute:
            return moments[0] + _MINUTE - now
        moments.append(now)
        _remember(self._moments, origin, moments)
        return None


class Admission:
    """`offers_per_minute` and `undecided` are of one origin."""

    def __init__(self, offers_per_minute: int = 120, undecided: int = 8) -> None:
        self._pace, self._undecided = RateWindow(offers_per_minute), undecided
        self._origins: OrderedDict[str, str] = OrderedDict()

    def refusal(self, peer_id: str, origin: str, waiting: Collection[str], now: float) -> OfferReply | None:
        """Why this offer must come later, or None. `waiting`: the peer ids whose results are undecided."""
        if wait := self._pace.wait(origin, now):
            return OfferReply(verdict="busy", text="too many offers from this address", retry_after=wait)
        here = sum(self._origins.get(other) == origin for other in waiting)
        if peer_id not in waiting and here >= self._undecided:
            text = f"{here} results from this address are being judged; offer yours again later"
            return OfferReply(verdict="busy", text=text, retry_after=BUSY_SECONDS)
        _remember(self._origins, peer_id, origin)
        return None


def _remember(known: OrderedDict[str, T], name: str, value: T) -> None:
    """The newest _REMEMBERED entries."""
    known[name] = value
    known.move_to_end(name)
    if len(known) > _REMEMBERED:
        known.popitem(last=False)
