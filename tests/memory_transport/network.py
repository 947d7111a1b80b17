"""A whole network in one process: seeded latency, loss, one-way blocks, partitions, clock skew and sudden death.

Every peer keeps its own part of the DHT. A record is stored at the `replicas` live peers that follow its key on a hash ring,
and readers ask the same peers. Each replica and each reader applies its own check by its own clock. Under `run_virtual` the
seed alone determines a run.
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import itertools
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.transport.base import RecordCheck
from lutetia.system.errors import IdentityError
from tests.memory_transport.transport import MemoryTransport
from tests.memory_transport.virtual_time import VirtualTimeLoop

RPC_TIMEOUT = 3.0
RETRANSMIT = 0.2

Latency = float | Callable[[random.Random, str, str], float]
"""Seconds one way, or (generator, source peer id, target peer id) -> seconds."""


class MemoryNetwork:
    """Peers and the links between them.

    `loss` is the share of packets lost. A lost request times out after `timeout` seconds, a lost stream packet is sent again.
    """

    def __init__(
        self, seed: int = 0, latency: Latency = 0.02, loss: float = 0.0, replicas: int = 5, timeout: float = RPC_TIMEOUT
    ) -> None:
        self.random = random.Random(seed)
        self.loss, self.replicas, self.timeout = loss, replicas, timeout
        self._latency = latency
        self._numbers = itertools.count(1)
        self._peers: dict[str, MemoryTransport] = {}
        self._ring: list[tuple[int, str]] = []
        self._group: dict[str, int] = {}
        self._blocked: set[tuple[str, str]] = set()
        self._bandwidth: dict[str, float] = {}

    def peer(self, identity: Identity, check: RecordCheck, skew: float = 0.0) -> MemoryTransport:
        """A new peer of the DHT whose clock is `skew` seconds ahead. Raises IdentityError while this identity is online."""
        transport = self._start(identity, skew)
        transport.check = check
        self.place(transport)
        return transport

    async def start(
        self, identity: Identity, *, listen: str, state_folder: Path, announce: Sequence[str] = ()
    ) -> MemoryTransport:
        """A `StartTransport`: a new peer that is not in the DHT yet. It gets an address of its own whatever `listen` says."""
        return self._start(identity, 0.0)

    def place(self, transport: MemoryTransport) -> None:
        """Put a peer on the ring of the DHT and give it the records that it is to hold."""
        place = (_position(transport.peer_id), transport.peer_id)
        if place not in self._ring:
            bisect.insort(self._ring, place)
        transport.take_over(self._followers(transport.peer_id, place[0]))

    def partition(self, groups: Sequence[Collection[str]]) -> None:
        """Cut the network into `groups` of peer ids; peers that are not named form one more. Streams across the cut break."""
        self._group = {peer_id: number for number, group in enumerate(groups, 1) for peer_id in group}
        for transport in self._peers.values():
            transport.break_streams(self.together)

    def heal(self) -> None:
        """Undo all partitions and blocks."""
        self._group.clear()
        self._blocked.clear()

    def block(self, source: str, target: str) -> None:
        """Block one way, as a NAT does: `source` cannot dial `target`. What `target` dials works in both directions."""
        self._blocked.add((source, target))

    def throttle(self, peer_id: str, bytes_per_second: float) -> None:
        """Limit the rate at which `peer_id` sends on streams."""
        self._bandwidth[peer_id] = bytes_per_second

    def kill(self, peer: str | MemoryTransport) -> None:
        """End a peer without notice: its streams break and its replicas are lost. `peer()` can bring it back."""
        transport = self._peers.pop(peer if isinstance(peer, str) else peer.peer_id, None)
        if transport:
            transport.die()

    def now(self) -> float:
        """Unix seconds; under virtual time those of the loop."""
        loop = asyncio.get_running_loop()
        return loop.time() if isinstance(loop, VirtualTimeLoop) else time.time()

    def find(self, peer_id: str) -> MemoryTransport | None:
        return self._peers.get(peer_id)

    def places(self, source: str) -> dict[str, str]:
        """The address of each peer that `source` can dial, without peer id."""
        others = {name: peer for name, peer in self._peers.items() if name != source and self.reachable(source, name)}
        return {name: peer.addresses()[0].partition("/p2p/")[0] for name, peer in others.items()}

    def reachable(self, source: str, target: str) -> bool:
        """Whether `source` can dial `target`."""
        return target in self._peers and self.together(source, target) and (source, target) not in self._blocked

    def together(self, source: str, target: str) -> bool:
        """Whether no partition lies between them."""
        return self._group.get(source, 0) == self._group.get(target, 0)

    def nearest(self, source: str, key: str) -> list[MemoryTransport]:
        """The replicas of `key` as `source` finds them: live peers that it can talk to, itself included."""
        return list(self._followers(source, _position(key)))

    def delay(self, source: str, target: str) -> float:
        return self._latency if isinstance(self._latency, (int, float)) else self._latency(self.random, source, target)

    def lost(self) -> bool:
        return self.loss > 0 and self.random.random() < self.loss

    def link(self, source: str, target: str, size: int) -> tuple[float, float]:
        """(latency, transmission) in seconds of `size` stream bytes. Every lost packet costs a retransmission."""
        latency = self.delay(source, target)
        while self.lost():
            latency += RETRANSMIT
        return latency, size / self._bandwidth.get(source, float("inf"))

    def _start(self, identity: Identity, skew: float) -> MemoryTransport:
        if identity.peer_id in self._peers:
            raise IdentityError(f"peer {identity.peer_id} is online already; give every node its own identity")
        transport = MemoryTransport(self, identity.peer_id, skew, next(self._numbers))
        self._peers[identity.peer_id] = transport
        return transport

    def _followers(self, source: str, position: int) -> Iterator[MemoryTransport]:
        start, found = bisect.bisect_left(self._ring, (position, "")), 0
        for offset in range(len(self._ring)):
            peer_id = self._ring[(start + offset) % len(self._ring)][1]
            if self.reachable(source, peer_id) or (peer_id == source and source in self._peers):
                yield self._peers[peer_id]
                found += 1
                if found == self.replicas:
                    return


def _position(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
