"""Room for many networks: how the places around a key, and those in a routing table, are shared out among origins. Pure.

Whoever makes enough keys can sit close to anything in the key space, for next to nothing; network addresses cost more. So no
origin (`protocol.transport.network_origin`) fills what others would like a place in, as in Ethereum's discovery, and the
strangers of one origin
come in at a bounded rate: every new neighbour costs this peer a look at all that it keeps. With one origin only, nothing changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Name = TypeVar("Name")

STRANGERS_AT_ONCE = 64
STRANGERS_PER_SECOND = 1.0


def gives_way(members: Mapping[Name, str], origin: str) -> Name | None:
    """Which member of a full bucket leaves it for a newcomer of `origin`: the newest of the most crowded origin, or none.

    `members` maps each to its origin, the oldest first: Kademlia trusts who has been there for long.
    """
    crowds = Counter(members.values())
    fullest, most = max(crowds.items(), key=lambda crowd: crowd[1], default=("", 0))
    if most < crowds[origin] + 2:
        return None
    return [name for name, own in members.items() if own == fullest][-1]


def alternate(names: Sequence[Name], origins: Sequence[str]) -> list[Name]:
    """The same names in another order: the first of each origin, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    ranks: list[int] = []
    for origin in origins:
        ranks.append(seen[origin])
        seen[origin] += 1
    return [names[place] for place in sorted(range(len(names)), key=ranks.__getitem__)]


@dataclass
class NewcomerLimit:
    """Lets in strangers, or calls, of each origin at a bounded rate: a token bucket for each. A flood waits and comes again."""

    at_once: int = STRANGERS_AT_ONCE
    per_second: float = STRANGERS_PER_SECOND
    _spent: dict[str, tuple[float, float]] = field(default_factory=dict)

    def admits(self, origin: str, now: float, cost: float = 1.0) -> bool:
        """Whether another of `origin` may come in at `now` (seconds of any clock); counts it, as `cost` of them, if so."""
        spent = self._left_of(origin, now) + cost
        if spent > self.at_once:
            return False
        if len(self._spent) > 2 * self.at_once:
            self._spent = {each: entry for each, entry in self._spent.items() if self._left_of(each, now) > 0}
        self._spent[origin] = (spent, now)
        return True

    def _left_of(self, origin: str, now: float) -> float:
        """How much of what an origin has spent still counts."""
        spent, since = self._spent.get(origin, (0.0, now))
        return max(0.0, spent - (now - since) * self.per_second)
