"""How many records of one network origin, and of one prefix of them, a peer keeps of the DHT. No I/O.

The origin of a record is that of the connection over which it arrives (`protocol.transport.network_origin`). A peer that passes
on records of others, as replicas do for a newcomer, uses up its own quota; what exceeds it arrives from the owners with the next
heartbeat. Peers behind relays share one origin.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import TypeVar

from lutetia.protocol.transport.network_origin import quotas_of

Name = TypeVar("Name", str, tuple[str, str])

PER_KEY = {"claims": 64, "checkpoints": 64, "providers": 128}
"""Live records of one origin under one key, by kind of key."""
PER_OTHER_KEY = 512
PER_ORIGIN = 1 << 14
"""Live records of one origin under all keys together."""


@dataclass
class RecordQuota:
    """Counts the live records of each origin and each prefix. Keys are `<run>/<kind>/…`.

    `per_key` limits an origin under one key, by kind; `per_origin` limits it over all keys. A prefix may have PREFIX_FACTOR times
    as many.
    """

    per_key: dict[str, int] = field(default_factory=lambda: dict(PER_KEY))
    per_origin: int = PER_ORIGIN
    _held: dict[tuple[str, str], tuple[str, float]] = field(default_factory=dict)
    _under_key: Counter[tuple[str, str]] = field(default_factory=Counter)
    _of_origin: Counter[str] = field(default_factory=Counter)
    _ends: list[tuple[float, str, str]] = field(default_factory=list)

    def admits(self, key: str, owner: str, origin: str, expires: float, now: float) -> bool:
        """Whether a checked record may be kept. Counts it if so.

        Args:
            key: Its key.
            owner: Its owner.
            origin: Where it came from.
            expires: Its expiry in Unix seconds.
            now: Unix seconds.
        """
        self._forget(now)
        known = self._held.get((key, owner))
        if known and known[1] >= expires:
            return True  # counted already
        if known is None or known[0] != origin:
            most = self.per_key.get(key.split("/")[1], PER_OTHER_KEY)
            if any(
                self._under_key[key, name] >= share * most or self._of_origin[name] >= share * self.per_origin
                for name, share in quotas_of(origin)
            ):
                return False
            if known:
                self._drop(key, owner)
            for name, _ in quotas_of(origin):
                self._under_key[key, name] += 1
                self._of_origin[name] += 1
        self._held[key, owner] = origin, expires
        heapq.heappush(self._ends, (expires, key, owner))
        if len(self._ends) > 2 * len(self._held) + 64:  # renewals leave old expiries behind
            self._ends = [(ends, *names) for names, (_, ends) in self._held.items()]
            heapq.heapify(self._ends)
        return True

    def _forget(self, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            expires, key, owner = heapq.heappop(self._ends)
            if self._held.get((key, owner), ("", 0.0))[1] == expires:
                self._drop(key, owner)

    def _drop(self, key: str, owner: str) -> None:
        origin, _ = self._held.pop((key, owner))
        for name, _ in quotas_of(origin):
            _count_down(self._under_key, (key, name))
            _count_down(self._of_origin, name)


def _count_down(counter: Counter[Name], name: Name) -> None:
    counter[name] -= 1
    if not counter[name]:
        del counter[name]
