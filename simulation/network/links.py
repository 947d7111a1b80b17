"""The links between peers: how long a packet takes, whether it arrives, and which peers cannot reach each other."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Protocol

from lutetia.node.pacing import LOOKUPS_AT_ONCE
from lutetia.protocol.transport.base import RPC_TIMEOUT
from lutetia.simulation.config import SimulationConfig

RETRANSMIT = 0.2
_BITS = 10


class SimulatedPeer(Protocol):
    """A peer on the network: a node or a coordinator."""

    index: int
    access_latency: float
    up: float

    @property
    def answering(self) -> bool: ...


class Links:
    """Delays come from a table drawn from the setting's distribution: exact enough, and a third of the cost of drawing each.

    A look at n shards takes ceil(n / LOOKUPS_AT_ONCE) rounds, each as long as its slowest lookup.
    """

    def __init__(self, config: SimulationConfig, seed: int) -> None:
        self.loss = config.loss
        self.slow: dict[int, float] = {}
        self.random = random.Random(f"{seed}|lines")
        self.version = 0
        self.whole = True
        """Nobody is cut off or blocked."""
        self._group: dict[int, int] = {}
        self._blocked: set[tuple[int, int]] = set()
        self._replicas = config.replicas
        self.draw(config)

    def draw(self, config: SimulationConfig, latency: float | None = None, jitter: float | None = None) -> None:
        """Make the tables of one packet, one lookup (find, then ask each replica) and one round of lookups."""
        rng, median = self.random, config.latency if latency is None else latency
        spread = config.jitter if jitter is None else jitter
        one = [median * rng.lognormvariate(0.0, config.latency_sigma) + spread * rng.uniform(-1, 1) for _ in range(1 << _BITS)]
        self._packet = [max(0.001, value) for value in one]

        def lookup() -> float:
            return max(4 * self._packet[rng.getrandbits(_BITS)] for _ in range(self._replicas))

        self._lookup = [lookup() for _ in range(1 << _BITS)]
        self._round = [
            max(self._lookup[rng.getrandbits(_BITS)] + self._lookup[rng.getrandbits(_BITS)] for _ in range(LOOKUPS_AT_ONCE))
            for _ in range(1 << _BITS)
        ]

    # reachability

    def partition(self, groups: Iterable[Iterable[int]]) -> None:
        """Cut the network into `groups`; peers that are not named form one more."""
        self._group = {index: number for number, group in enumerate(groups, 1) for index in group}
        self._changed()

    def block(self, source: int, target: int) -> None:
        """One-way, as behind a NAT: `source` cannot dial `target`."""
        self._blocked.add((source, target))
        self._changed()

    def heal(self) -> None:
        self._group.clear()
        self._blocked.clear()
        self._changed()

    def _changed(self) -> None:
        self.version += 1
        self.whole = not self._group and not self._blocked

    @property
    def blocked(self) -> bool:
        return bool(self._blocked)

    def group(self, index: int) -> int:
        return self._group.get(index, 0)

    def together(self, a: int, b: int) -> bool:
        return not self._group or self._group.get(a, 0) == self._group.get(b, 0)

    def dials(self, source: SimulatedPeer, target: SimulatedPeer) -> bool:
        """Whether `source` can open a stream or send a request to `target`."""
        if not (source.answering and target.answering):
            return False
        return self.whole or (
            self.together(source.index, target.index) and (not self._blocked or (source.index, target.index) not in self._blocked)
        )

    # delays

    def lost(self) -> bool:
        return self.loss > 0 and self.random.random() < self.loss

    def packet(self, a: SimulatedPeer, b: SimulatedPeer) -> float:
        """Seconds of one datagram, one way."""
        return self._packet[self.random.getrandbits(_BITS)] + a.access_latency + b.access_latency

    def stream(self, a: SimulatedPeer, b: SimulatedPeer, size: int = 0) -> float:
        """Seconds of one message of `size` bytes over a stream; lost packets are sent again."""
        seconds = self.packet(a, b) + size / self.rate(a)
        while self.lost():
            seconds += RETRANSMIT
        return seconds

    def rate(self, sender: SimulatedPeer) -> float:
        return min(sender.up, self.slow.get(sender.index, sender.up))

    def look(self, source: SimulatedPeer, shards: int) -> float:
        """Seconds of a look at claims and acceptances of so many shards."""
        if shards == 1:
            draw, table = self.random.getrandbits, self._lookup
            seconds = table[draw(_BITS)] + table[draw(_BITS)]
        else:
            seconds = sum(self._round[self.random.getrandbits(_BITS)] for _ in range(-(-shards // LOOKUPS_AT_ONCE)))
        seconds += 8 * source.access_latency
        if self.loss and self.random.random() < 1 - (1 - self.loss) ** (2 * self._replicas):
            seconds += RPC_TIMEOUT  # at least one answer is lost
        return seconds
