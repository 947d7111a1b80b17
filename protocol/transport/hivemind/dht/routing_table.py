"""hivemind's routing table and who gets a place in it: bounded in size, and shared out among network addresses."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lutetia.protocol.transport.hivemind.bindings import DHTID, DHTProtocol, KBucket, PeerID, RoutingTable
from lutetia.protocol.transport.hivemind.dht.ip_diversity import NewcomerLimit, gives_way
from lutetia.protocol.transport.hivemind.dht.storage import KeyRecords, RecordStorage

BATCH_BYTES, BATCH_RECORDS = 1 << 19, 512
_OVERHEAD = 256  # key, owner, expiry and what packing adds
_ORIGINS_KEPT, _ORIGINS_ASKED = 60.0, 0.5
BREATH = 64
"""Records looked at in one go, before others are answered."""

_Handed = tuple[DHTID, str, bytes, float]
"""Hashed key, owner, packed value, expiry."""


@dataclass
class OriginLookup:
    """The origins of connected peers, asked from p2pd when a stranger appears, but not all the time."""

    ask: Callable[[], Awaitable[dict[str, str]]]
    _known: dict[str, str] = field(default_factory=dict)
    _asked: float = float("-inf")
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def of(self, peer_id: str) -> str:
        """ "" for who is behind a relay or gone again. Strangers that come at once wait for one answer, half a second at most."""
        return (await self.of_all([peer_id]))[0]

    async def of_all(self, peer_ids: Sequence[str]) -> list[str]:
        """Those of many, after one question at most."""
        now = time.monotonic()
        if peer_ids and (now - self._asked > _ORIGINS_KEPT or not self._known.keys() >= set(peer_ids)):
            await self._ask_anew(now)
        return [self._known.get(peer_id, "") for peer_id in peer_ids]

    async def _ask_anew(self, wanted: float) -> None:
        async with self._asking:
            if self._asked < wanted:
                await asyncio.sleep(self._asked + _ORIGINS_ASKED - wanted)
                self._asked = time.monotonic()
                with contextlib.suppress(ConnectionError):  # p2pd has ended, and this peer is off the network
                    self._known = await self.ask()


class DiverseRoutingTable(RoutingTable):
    """A full bucket makes room for a newcomer from a less crowded origin, and remembers only as many others as it has places."""

    def __init__(self, node_id: DHTID, bucket_size: int, depth_modulo: int) -> None:
        super().__init__(node_id, bucket_size, depth_modulo)
        self.origins: dict[DHTID, str] = {}

    def add_or_update_node(self, node_id: DHTID, peer_id: PeerID) -> Any:
        to_ping = super().add_or_update_node(node_id, peer_id)
        bucket = self.buckets[self.get_bucket_index(node_id)]
        if node_id in bucket.replacement_nodes:
            self._share_out(bucket, node_id)
        for surplus in list(bucket.replacement_nodes)[: -bucket.size]:
            del self[surplus]
        return to_ping

    def __delitem__(self, node_id: DHTID) -> None:
        super().__delitem__(node_id)
        self.origins.pop(node_id, None)

    def _share_out(self, bucket: KBucket, node_id: DHTID) -> None:
        members = {member: self.origins.get(member, "") for member in bucket.nodes_to_peer_id}
        leaves = gives_way(members, self.origins.get(node_id, ""))
        if leaves is not None:
            bucket.nodes_to_peer_id[node_id] = bucket.replacement_nodes.pop(node_id)
            bucket.replacement_nodes[leaves] = bucket.nodes_to_peer_id.pop(leaves)


class PlacementProtocol(DHTProtocol):
    """The part of the DHT's protocol that says who becomes a neighbour, and hands newcomers what they should keep."""

    origins: OriginLookup
    door: NewcomerLimit
    routing_table: DiverseRoutingTable
    storage: RecordStorage
    cache: RecordStorage

    async def update_routing_table(self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True) -> None:
        """A peer sits at its place or nowhere, and strangers of one origin come in at a bounded rate."""
        place = place_of(peer_id)
        if node_id not in (None, place):
            return
        if not responded:
            if place in self.routing_table:
                del self.routing_table[place]
            return
        if place not in self.routing_table and not await self._let_in(place, peer_id):
            return
        to_ping = self.routing_table.add_or_update_node(place, peer_id)
        if to_ping is not None:
            asyncio.create_task(self.call_ping(to_ping[1]))

    async def _let_in(self, place: DHTID, peer_id: PeerID) -> bool:
        origin = await self.origins.of(peer_id.to_base58())
        if place in self.routing_table:
            return True  # it called more than once at a time
        if not self.door.admits(origin, time.monotonic()):
            return False
        self.routing_table.origins[place] = origin
        asyncio.create_task(self._hand_over(place, peer_id))
        return True

    async def _hand_over(self, place: DHTID, peer_id: PeerID) -> None:
        """Give a newcomer the records that it should keep and we are the nearest to, in messages of bounded size."""
        keys: list[DHTID] = []
        for number, (key, _) in enumerate(list(self.storage.items()), start=1):
            if self._should_keep(key, place):
                keys.append(key)
            if number % BREATH == 0:
                await asyncio.sleep(0)
        for batch in _batches((key, *entry) for key in keys for entry in (self.storage.of(key) or KeyRecords()).entries()):
            ids, owners, values, ends = zip(*batch, strict=True)
            if await self.call_store(peer_id, ids, values, ends, subkeys=owners) is None:
                return

    def _should_keep(self, key: DHTID, place: DHTID) -> bool:
        nearest = self.routing_table.get_nearest_neighbors(key, self.num_replicas, exclude=place)
        if not nearest:
            return True
        return place ^ key < nearest[-1][0] ^ key and self.node_id ^ key < nearest[0][0] ^ key


def _batches(records: Iterable[_Handed]) -> Iterator[list[_Handed]]:
    """In the same order, each of at most BATCH_BYTES and BATCH_RECORDS."""
    batch: list[_Handed] = []
    size = 0
    for record in records:
        needed = len(record[2]) + _OVERHEAD
        if batch and (size + needed > BATCH_BYTES or len(batch) == BATCH_RECORDS):
            yield batch
            batch, size = [], 0
        batch.append(record)
        size += needed
    if batch:
        yield batch


def place_of(peer_id: PeerID) -> DHTID:
    """Where in the key space a peer sits."""
    return DHTID.generate(source=peer_id.to_bytes())
