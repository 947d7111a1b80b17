"""A whole network inside one process: seeded latency, loss, one-way blocks, partitions, clock skew and sudden death.

Every peer keeps its own part of the DHT. A record goes to the `replicas` live peers that follow its key on a hash ring, and
readers ask the same ones; each replica and each reader applies its own check by its own clock. Under `run_virtual` a run is
determined by its seed alone.
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import logging
import random
import time
from collections.abc import Callable, Collection, Iterator, Sequence

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import RecordRefused
from lutetia.protocol.transport.base import Handler, RecordCheck, StoredValue, Stream, Transport
from lutetia.protocol.transport.inbound_limits import HandlerTasks
from lutetia.protocol.transport.network_origin import origin_of
from lutetia.system.errors import IdentityError
from tests.memory_transport.stream import MemoryStream, Pipe
from tests.memory_transport.virtual_time import VirtualTimeLoop

log = logging.getLogger(__name__)

RPC_TIMEOUT = 3.0
RETRANSMIT = 0.2

Latency = float | Callable[[random.Random, str, str], float]
"""Seconds one way, or (generator, source peer id, target peer id) -> seconds."""


class MemoryNetwork:
    """Peers and the lines between them.

    `loss` is the share of packets lost: a lost request times out (after `timeout` seconds), a lost packet of a stream is resent.
    """

    def __init__(
        self, seed: int = 0, latency: Latency = 0.02, loss: float = 0.0, replicas: int = 5, timeout: float = RPC_TIMEOUT
    ) -> None:
        self.random = random.Random(seed)
        self.loss, self.replicas, self.timeout = loss, replicas, timeout
        self._latency = latency
        self._peers: dict[str, MemoryTransport] = {}
        self._ring: list[tuple[int, str]] = []
        self._group: dict[str, int] = {}
        self._blocked: set[tuple[str, str]] = set()
        self._bandwidth: dict[str, float] = {}

    def peer(self, identity: Identity, check: RecordCheck, skew: float = 0.0) -> MemoryTransport:
        """A new peer whose clock is `skew` seconds ahead. Raises IdentityError while another live peer has this identity."""
        if identity.peer_id in self._peers:
            raise IdentityError(f"peer {identity.peer_id} is online already; give every box its own identity")
        transport = MemoryTransport(self, identity.peer_id, check, skew, number=len(self._ring) + 1)
        self._peers[identity.peer_id] = transport
        place = (_position(identity.peer_id), identity.peer_id)
        if place not in self._ring:
            bisect.insort(self._ring, place)
        transport.take_over(self._followers(identity.peer_id, place[0]))
        return transport

    def partition(self, groups: Sequence[Collection[str]]) -> None:
        """Cut the network into `groups` of peer ids; unnamed peers form one more. Streams across the cut break."""
        self._group = {peer_id: number for number, group in enumerate(groups, 1) for peer_id in group}
        for transport in self._peers.values():
            transport.break_streams(self.together)

    def heal(self) -> None:
        """Undo all partitions and blocks."""
        self._group.clear()
        self._blocked.clear()

    def block(self, source: str, target: str) -> None:
        """One-way, as behind a NAT: `source` cannot dial `target`; what `target` dials works in both directions."""
        self._blocked.add((source, target))

    def throttle(self, peer_id: str, bytes_per_second: float) -> None:
        """What `peer_id` sends on streams is this slow."""
        self._bandwidth[peer_id] = bytes_per_second

    def kill(self, peer: str | MemoryTransport) -> None:
        """The peer is gone without a word: its streams break, its replicas are lost. It may come back by `peer()`."""
        transport = self._peers.pop(peer if isinstance(peer, str) else peer.peer_id, None)
        if transport:
            transport.die()

    def now(self) -> float:
        """Unix seconds: the loop's own under virtual time."""
        loop = asyncio.get_running_loop()
        return loop.time() if isinstance(loop, VirtualTimeLoop) else time.time()

    def find(self, peer_id: str) -> MemoryTransport | None:
        return self._peers.get(peer_id)

    def reachable(self, source: str, target: str) -> bool:
        """Whether `source` can dial `target`."""
        return target in self._peers and self.together(source, target) and (source, target) not in self._blocked

    def together(self, source: str, target: str) -> bool:
        """Whether no partition lies between them."""
        return self._group.get(source, 0) == self._group.get(target, 0)

    def nearest(self, source: str, key: str) -> list[MemoryTransport]:
        """The replicas of `key` as `source` finds them: live peers that it can talk with, itself included."""
        return list(self._followers(source, _position(key)))

    def delay(self, source: str, target: str) -> float:
        return self._latency if isinstance(self._latency, (int, float)) else self._latency(self.random, source, target)

    def lost(self) -> bool:
        return self.loss > 0 and self.random.random() < self.loss

    def link(self, source: str, target: str, size: int) -> tuple[float, float]:
        """(latency, transmission) in seconds of `size` stream bytes; every lost packet costs a retransmission."""
        latency = self.delay(source, target)
        while self.lost():
            latency += RETRANSMIT
        return latency, size / self._bandwidth.get(source, float("inf"))

    def _followers(self, source: str, position: int) -> Iterator[MemoryTransport]:
        start, found = bisect.bisect_left(self._ring, (position, "")), 0
        for offset in range(len(self._ring)):
            peer_id = self._ring[(start + offset) % len(self._ring)][1]
            if self.reachable(source, peer_id) or (peer_id == source and source in self._peers):
                yield self._peers[peer_id]
                found += 1
                if found == self.replicas:
                    return


class MemoryTransport(Transport):
    """One peer of a MemoryNetwork."""

    def __init__(self, network: MemoryNetwork, peer_id: str, check: RecordCheck, skew: float, number: int) -> None:
        self.peer_id, self.skew = peer_id, skew
        self._network, self._check = network, check
        self._address = f"/ip4/10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}/tcp/4001/p2p/{peer_id}"
        self._records: dict[str, dict[str, StoredValue]] = {}
        self._handlers: dict[str, Handler] = {}
        self._tasks = HandlerTasks()
        self._streams: list[tuple[str, MemoryStream]] = []
        self._alive = True

    def now(self) -> float:
        return self._network.now() + self.skew

    def addresses(self) -> list[str]:
        return [self._address]

    def alive(self) -> bool:
        return self._alive

    async def store(self, key: str, subkey: str, value: bytes, expires: float) -> bool:
        self._require_alive()
        stored = StoredValue(value, expires)
        if not self.keep(key, subkey, stored):
            return False
        others = [peer for peer in self._network.nearest(self.peer_id, key) if peer is not self]
        answered = await self._ask(others)
        return not others or sum(peer.keep(key, subkey, stored) for peer in answered) > 0

    async def get(self, key: str) -> dict[str, StoredValue]:
        self._require_alive()
        others = [peer for peer in self._network.nearest(self.peer_id, key) if peer is not self]
        found: dict[str, StoredValue] = {}
        for peer in [self, *await self._ask(others)]:
            for subkey, stored in peer.held(key).items():
                newer = subkey not in found or stored.expires > found[subkey].expires
                if newer and self._accepts(key, subkey, stored):
                    found[subkey] = stored
        return found

    async def open_stream(self, peer_id: str, protocol: str, addresses: Sequence[str] = ()) -> Stream:
        self._require_alive()
        await self._dial(peer_id)
        target = self._network.find(peer_id)
        if target is None or not self._network.reachable(self.peer_id, peer_id):
            raise ConnectionError(f"peer {peer_id} went away")
        forth = Pipe(lambda size: self._network.link(self.peer_id, peer_id, size))
        back = Pipe(lambda size: self._network.link(peer_id, self.peer_id, size))
        ours, theirs = MemoryStream(peer_id, back, forth), MemoryStream(self.peer_id, forth, back)
        theirs.origin = origin_of(self._address)
        if not target.answer(protocol, theirs):
            raise ConnectionError(f"peer {peer_id} does not answer {protocol}")
        self._streams.append((peer_id, ours))
        return ours

    async def serve(self, protocol: str, handler: Handler) -> None:
        self._require_alive()
        self._handlers[protocol] = handler

    async def close(self) -> None:
        if self._alive:
            self._network.kill(self)
        await self._tasks.close()

    def keep(self, key: str, subkey: str, stored: StoredValue) -> bool:
        """File a record here if this peer's check accepts it and it outlives the one that it replaces."""
        if not self._accepts(key, subkey, stored):
            return False
        mine = self._records.setdefault(key, {})
        if subkey not in mine or mine[subkey].expires < stored.expires:
            mine[subkey] = stored
        return True

    def held(self, key: str) -> dict[str, StoredValue]:
        """The records here that live by this peer's clock."""
        now = self.now()
        live = {subkey: stored for subkey, stored in self._records.get(key, {}).items() if stored.expires > now}
        if key in self._records:
            self._records[key] = live
        return live

    def take_over(self, neighbours: Iterator[MemoryTransport]) -> None:
        """What a newcomer learns: the neighbours hand it the records that it is to hold from now on."""
        for neighbour in neighbours:
            for key in list(neighbour._records) if neighbour is not self else ():
                if self in self._network.nearest(self.peer_id, key):
                    for subkey, stored in neighbour.held(key).items():
                        self.keep(key, subkey, stored)

    def answer(self, protocol: str, stream: MemoryStream) -> bool:
        """Take an inbound stream. False when nothing here serves `protocol`."""
        handler = self._handlers.get(protocol)
        if handler is None or not self._tasks.start(protocol, handler, stream):
            return False
        self._streams = [(peer_id, old) for peer_id, old in self._streams if not old.closed]
        self._streams.append((stream.peer_id, stream))
        return True

    def break_streams(self, together: Callable[[str, str], bool]) -> None:
        for peer_id, stream in self._streams:
            if not together(self.peer_id, peer_id):
                stream.break_(f"the line to {peer_id} broke")

    def die(self) -> None:
        self._alive = False
        self.break_streams(lambda a, b: False)
        self._streams.clear()
        self._handlers.clear()
        self._records.clear()

    def _accepts(self, key: str, subkey: str, stored: StoredValue) -> bool:
        try:
            return self._check(key, subkey, stored.value, stored.expires) == key
        except RecordRefused as error:
            log.debug("%s refused a record under %s: %s", self.peer_id, key, error)
            return False

    async def _ask(self, peers: Sequence[MemoryTransport]) -> list[MemoryTransport]:
        """One lookup and one request to each of `peers`, all at once. Returns those whose answer comes."""
        answered, longest = [], 0.0
        for peer in peers:
            trip = 2 * (self._network.delay(self.peer_id, peer.peer_id) + self._network.delay(peer.peer_id, self.peer_id))
            lost = self._network.lost() or self._network.lost()
            longest = max(longest, self._network.timeout if lost else trip)
            if not lost and trip < self._network.timeout:
                answered.append(peer)
        await asyncio.sleep(min(longest, self._network.timeout))
        self._require_alive()
        return [peer for peer in answered if peer.alive() and self._network.together(peer.peer_id, self.peer_id)]

    async def _dial(self, peer_id: str) -> None:
        """A round trip, with four attempts. Raises ConnectionError."""
        for _ in range(4):
            if self._network.reachable(self.peer_id, peer_id) and not self._network.lost():
                await asyncio.sleep(self._network.delay(self.peer_id, peer_id) + self._network.delay(peer_id, self.peer_id))
                return
            await asyncio.sleep(self._network.timeout / 4)
        raise ConnectionError(f"peer {peer_id} could not be dialled: no answer within {self._network.timeout:.1f} s")

    def _require_alive(self) -> None:
        if not self._alive:
            raise ConnectionError("this peer has left the network")


def _position(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
