"""Share replicas and places in the routing table among network origins. Pure.

Making keys until one lies close to a target costs almost nothing; network addresses cost more, and neighbouring ones less than
others. So no prefix (`protocol.transport.network_origin`) may fill a bucket that others want, as in Ethereum's discovery.
Newcomers of one origin are admitted at a bounded rate, because for every new neighbour a peer looks through all records that it
keeps. With a single prefix nothing changes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from lutetia.protocol.transport.network_origin import prefix_of, quotas_of

Name = TypeVar("Name")

NEWCOMERS_AT_ONCE = 64
NEWCOMERS_PER_SECOND = 1.0


def member_to_replace(members: Mapping[Name, str], origin: str) -> Name | None:
    """Which member of a full bucket a newcomer of `origin` replaces: the newest of the most frequent prefix, or None.

    `members` maps each member to its origin, the oldest first: Kademlia prefers nodes that have been there for long.
    """
    counts = Counter(map(prefix_of, members.values()))
    most_frequent, most = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if most < counts[prefix_of(origin)] + 2:
        return None
    return [name for name, other in members.items() if prefix_of(other) == most_frequent][-1]


def alternate(names: Sequence[Name], origins: Sequence[str]) -> list[Name]:
    """Reorder `names`: the first of each prefix, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    ranks: list[int] = []
    for prefix in map(prefix_of, origins):
        ranks.append(seen[prefix])
        seen[prefix] += 1
    return [names[place] for place in sorted(range(len(names)), key=ranks.__getitem__)]


@dataclass
class NewcomerLimit:
    """A token bucket for each origin, and one for each prefix, which bound the rate of its newcomers or calls.

    `at_once` is the size of an origin's bucket, `per_second` the rate at which it refills. A prefix has PREFIX_FACTOR times both.
    """

    at_once: int = NEWCOMERS_AT_ONCE
    per_second: float = NEWCOMERS_PER_SECOND
    _spent: dict[str, tuple[float, float, int]] = field(default_factory=dict)

    def admits(self, origin: str, now: float, cost: float = 1.0) -> bool:
        """Whether another one of `origin` is admitted at `now` (seconds of any clock). Takes `cost` tokens if so."""
        quotas = quotas_of(origin)
        spent = {name: self._spent_of(name, share, now) + cost for name, share in quotas}
        if any(spent[name] > share * self.at_once for name, share in quotas):
            return False
        if len(self._spent) > 2 * self.at_once:
            self._spent = {name: entry for name, entry in self._spent.items() if self._spent_of(name, entry[2], now) > 0}
        for name, share in quotas:
            self._spent[name] = spent[name], now, share
        return True

    def _spent_of(self, name: str, share: int, now: float) -> float:
        """How many of the tokens that an origin or prefix has spent are not refilled yet."""
        spent, since, _ = self._spent.get(name, (0.0, now, share))
        return max(0.0, spent - (now - since) * share * self.per_second)
