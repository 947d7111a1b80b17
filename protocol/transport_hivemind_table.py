"""hivemind's routing table and who gets a place in it: bounded in size, and shared out among network addresses."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from .diversity import Door, gives_way
from .transport_hivemind_library import DHTID, DHTProtocol, KBucket, PeerID, RoutingTable

_ORIGINS_KEPT, _ORIGINS_ASKED = 60.0, 0.5


@dataclass
class Origins:
    """The origins of connected peers, asked from p2pd when a stranger appears, but not all the time."""

    ask: Callable[[], Awaitable[dict[str, str]]]
    _known: dict[str, str] = field(default_factory=dict)
    _asked: float = float("-inf")
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def of(self, peer_id: str) -> str:
        """ "" for who is behind a relay or gone again. Strangers that come at once wait for one answer, half a second at most."""
        if peer_id not in self._known or time.monotonic() - self._asked > _ORIGINS_KEPT:
            await self._ask_anew(time.monotonic())
        return self._known.get(peer_id, "")

    async def _ask_anew(self, wanted: float) -> None:
        async with self._asking:
            if self._asked < wanted:
                await asyncio.sleep(self._asked + _ORIGINS_ASKED - wanted)
                self._asked = time.monotonic()
                with contextlib.suppress(ConnectionError):  # p2pd has ended, and this peer is off the network
                    self._known = await self.ask()


class Table(RoutingTable):
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


class Placing(DHTProtocol):
    """The part of the DHT's protocol that says who becomes a neighbour."""

    origins: Origins
    door: Door
    routing_table: Table

    async def update_routing_table(self, node_id: DHTID | None, peer_id: PeerID, responded: bool = True) -> None:
        """A peer sits at its place or nowhere, and strangers of one origin come in at a bounded rate."""
        place = place_of(peer_id)
        if node_id not in (None, place):
            return
        if responded and place not in self.routing_table:
            origin = await self.origins.of(peer_id.to_base58())
            if not self.door.admits(origin, time.monotonic()):
                return
            self.routing_table.origins[place] = origin
        await super().update_routing_table(node_id, peer_id, responded)


def place_of(peer_id: PeerID) -> DHTID:
    """Where in the key space a peer sits."""
    return DHTID.generate(source=peer_id.to_bytes())
