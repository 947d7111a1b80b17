"""hivemind's routing table, bounded in size and shared among network origins, and the rule who gets into it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lutetia.protocol.transport.hivemind.bindings import DHTID, DHTProtocol, KBucket, PeerID, RoutingTable
from lutetia.protocol.transport.hivemind.dht.ip_diversity import NewcomerLimit, member_to_replace
from lutetia.protocol.transport.hivemind.dht.storage import KeyRecords, RecordStorage

BATCH_BYTES, BATCH_RECORDS = 1 << 19, 512
_OVERHEAD = 256  # key, owner, expiry and what packing adds
_ORIGINS_KEPT, _ORIGINS_ASKED = 60.0, 0.5
YIELD_EVERY = 64
"""Records that are processed before the event loop may answer other calls."""

_PackedRecord = tuple[DHTID, str, bytes, float]
"""Hashed key, owner, packed value, expiry."""


@dataclass
class OriginLookup:
    """The network origins of connected peers. p2pd is asked when an unknown peer appears, at most twice a second."""

    ask: Callable[[], Awaitable[dict[str, str]]]
    _known: dict[str, str] = field(default_factory=dict)
    _asked: float = float("-inf")
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def of(self, peer_id: str) -> str:
        """The origin of a peer; "" behind a relay or if it is gone. Unknown peers wait up to half a second."""
        return (await self.of_all([peer_id]))[0]

    async def of_all(self, peer_ids: Sequence[str]) -> list[str]:
        """The origins of many peers, with at most one request to p2pd."""
        now = time.monotonic()
        if peer_ids and (now - self._asked > _ORIGINS_KEPT or not self._known.keys() >= set(peer_ids)):
            await self._refresh(now)
        return [self._known.get(peer_id, "") for peer_id in peer_ids]

    async def _refresh(self, wanted: float) -> None:
        async with self._asking:
            if self._asked < wanted:
                await asyncio.sleep(self._asked + _ORIGINS_ASKED - wanted)
                self._asked = time.monotonic()
                with contextlib.suppress(ConnectionError):  # p2pd has ended, so this peer is off the network
                    self._known = await self.ask()


class DiverseRoutingTable(RoutingTable):
    """In a full bucket a newcomer of a less frequent origin replaces a member. Replacements are limited to the bucket's size."""

    def __init__(self, node_id: DHTID, bucket_size: int, depth_modulo: int) -> None:
        super().__init__(node_id, bucket_size, depth_modulo)
        self.origins: dict[DHTID, str] = {}

    def add_or_update_node(self, node_id: DHTID, peer_id: PeerID) -> Any:
        to_ping = super().add_or_update_node(node_id, peer_id)
        bucket = self.buckets[self.get_bucket_index(node_id)]
        if node_id in bucket.replacement_nodes:
            self._make_room(bucket, node_id)
        for surplus in list(bucket.replacement_nodes)[: -bucket.size]:
            del self[surplus]
        return to_ping

    def __delitem__(self, node_id: DHTID) -> None:
        super().__delitem__(node_id)
        self.origins.pop(node_id, None)

    def _make_room(self, bucket: KBucket, node_id: DHTID) -> None:
        members = {member: self.origins.get(member, "") for member in bucket.nodes_to_peer_id}
        replaced = member_to_replace(members, self.origins.get(node_id, ""))
        if replaced is not None:
            bucket.nodes_to_peer_id[node_id] = bucket.replacement_nodes.pop(node_id)
            bucket.replacement_nodes[replaced] = bucket.nodes_to_peer_id.pop(replaced)


class PlacementProtocol(DHTProtocol):
    """The part of the DHT's protocol that decides who becomes a neighbour, and sends newcomers the records they should keep."""

    origins: OriginLookup
    newcomers: NewcomerLimit
    routing_table: DiverseRoutingTable
    storage: RecordStorage
    cache: RecordStorage

    async def update_routing_table(self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True) -> None:
        """Add or remove a peer. It must be at its own position, and newcomers of one origin are admitted at a bounded rate."""
        position = position_of(peer_id)
        if node_id not in (None, position):
            return
        if not responded:
            if position in self.routing_table:
                del self.routing_table[position]
            return
        if position not in self.routing_table and not await self._admit(position, peer_id):
            return
        to_ping = self.routing_table.add_or_update_node(position, peer_id)
        if to_ping is not None:
            asyncio.create_task(self.call_ping(to_ping[1]))

    async def _admit(self, position: DHTID, peer_id: PeerID) -> bool:
        origin = await self.origins.of(peer_id.to_base58())
        if position in self.routing_table:
            return True  # it made several calls at once
        if not self.newcomers.admits(origin, time.monotonic()):
            return False
        self.routing_table.origins[position] = origin
        asyncio.create_task(self._send_records(position, peer_id))
        return True

    async def _send_records(self, position: DHTID, peer_id: PeerID) -> None:
        """Send a newcomer the records that it should keep and this peer is nearest to, in messages of bounded size."""
        keys: list[DHTID] = []
        for number, (key, _) in enumerate(list(self.storage.items()), start=1):
            if self._should_keep(key, position):
                keys.append(key)
            if number % YIELD_EVERY == 0:
                await asyncio.sleep(0)
        for batch in _batches((key, *entry) for key in keys for entry in (self.storage.of(key) or KeyRecords()).entries()):
            ids, owners, values, ends = zip(*batch, strict=True)
            if await self.call_store(peer_id, ids, values, ends, subkeys=owners) is None:
                return

    def _should_keep(self, key: DHTID, position: DHTID) -> bool:
        nearest = self.routing_table.get_nearest_neighbors(key, self.num_replicas, exclude=position)
        if not nearest:
            return True
        return position ^ key < nearest[-1][0] ^ key and self.node_id ^ key < nearest[0][0] ^ key


def _batches(records: Iterable[_PackedRecord]) -> Iterator[list[_PackedRecord]]:
    """Split `records`, in order, into batches of at most BATCH_BYTES and BATCH_RECORDS."""
    batch: list[_PackedRecord] = []
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


def position_of(peer_id: PeerID) -> DHTID:
    """A peer's position in the key space."""
    return DHTID.generate(source=peer_id.to_bytes())
