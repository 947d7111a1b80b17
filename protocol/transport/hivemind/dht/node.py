"""hivemind's DHT with Lutetia's rules: every record is checked on store and on read, and no answer is trusted.

It differs from plain hivemind:

- One invalid or expired record does not invalidate the others under its key.
- A peer's position in the key space is the hash of its peer id: it keeps it over restarts and cannot choose it.
- A search counts only peers that answer (`lookup`), and ignores the expiry that a peer claims for a whole answer.
- A record counts as stored when at least one other peer took it.
- One network origin is limited in records (`record_quota`), in calls (`rpc_server`) and in its share of replicas and neighbours
  (`ip_diversity`).
- The cache holds only records that this peer has read, none that others sent unasked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgpack

from lutetia.protocol.async_helpers import keep_cancellation
from lutetia.protocol.transport.base import RPC_TIMEOUT, RecordCheck, StoredValue
from lutetia.protocol.transport.hivemind.bindings import (
    DHTID,
    P2P,
    DHTProtocol,
    DictionaryDHTValue,
    Multiaddr,
    PeerID,
    dht_messages,
)
from lutetia.protocol.transport.hivemind.dht.ip_diversity import NewcomerLimit, alternate
from lutetia.protocol.transport.hivemind.dht.lookup import Lookup, UnresponsivePeers, run_lookup
from lutetia.protocol.transport.hivemind.dht.p2p_fixes import apply_fixes, responsive
from lutetia.protocol.transport.hivemind.dht.record_quota import RecordQuota
from lutetia.protocol.transport.hivemind.dht.routing_table import DiverseRoutingTable, OriginLookup, position_of
from lutetia.protocol.transport.hivemind.dht.rpc_server import CALLS_AT_ONCE, CALLS_PER_SECOND, RpcServer, WireRecordCheck
from lutetia.protocol.transport.hivemind.dht.storage import RecordStorage, merged

log = logging.getLogger(__name__)

REPLICAS = 5
SEARCH_WIDTH = 10
SEARCH_TIMEOUT = 30.0
MAX_NEIGHBOURS = 40
BUCKET_SIZE, DEPTH_MODULO = 20, 5


class HivemindDht:
    """A DHT node over a running p2pd. Make it with `start`."""

    def __init__(self, p2p: P2P, protocol: RpcServer) -> None:
        self._p2p, self._protocol = p2p, protocol
        self._unresponsive = UnresponsivePeers()

    @classmethod
    async def start(
        cls, control_address: str, check: RecordCheck, origins: Callable[[], Awaitable[dict[str, str]]]
    ) -> HivemindDht:
        """Start a node.

        Args:
            control_address: Multiaddr of p2pd's control socket.
            check: Applied to every record.
            origins: Returns the network origin of each connected peer, by peer id.
        """
        p2p = await P2P.replicate(Multiaddr(control_address))
        assert p2p.peer_id
        apply_fixes(p2p)
        position = position_of(p2p.peer_id)
        DHTProtocol._collect_rpc_handlers()  # under hivemind's class name, which is part of the calls' names on the wire
        protocol = await DHTProtocol.create(
            p2p, position, BUCKET_SIZE, DEPTH_MODULO, REPLICAS, RPC_TIMEOUT,
            client_mode=True,  # else hivemind would already answer calls, without our checks
        )  # fmt: skip
        protocol.__class__ = RpcServer
        assert isinstance(protocol, RpcServer)
        protocol.node_info = dht_messages.NodeInfo(node_id=position.to_bytes())
        protocol.storage, protocol.cache = RecordStorage(), RecordStorage()
        protocol.check, protocol.quota, protocol.calls = (
            WireRecordCheck(check),
            RecordQuota(),
            NewcomerLimit(CALLS_AT_ONCE, CALLS_PER_SECOND),
        )
        protocol.origins, protocol.newcomers = OriginLookup(origins), NewcomerLimit()
        protocol.routing_table = DiverseRoutingTable(position, BUCKET_SIZE, DEPTH_MODULO)
        await protocol.serve(p2p)
        return cls(p2p, protocol)

    @property
    def responsive(self) -> bool:
        """Whether calls still work."""
        return responsive(self._p2p)

    def neighbours(self) -> list[str]:
        """The peers in the routing table."""
        return [peer_id.to_base58() for peer_id in self._protocol.routing_table.peer_id_to_uid]

    async def meet(self, peer_id: str) -> bool:
        """Ping a connected peer and put it into the routing table. False when it does not answer; it is then removed."""
        peer = PeerID.from_base58(peer_id)
        node_id = await keep_cancellation(self._protocol.call_ping(peer, validate=False, strict=False))
        if node_id is None or node_id != position_of(peer):
            return False
        self._unresponsive.forget(peer)
        await self._protocol.update_routing_table(node_id, peer, responded=True)
        return True

    async def look_around(self) -> None:
        """Find the peers nearest to this one. That fills the routing table and announces this peer to them."""
        await self._search(self._protocol.node_id, BUCKET_SIZE)

    async def store(self, key: str, subkey: str, value: bytes, expires: float) -> bool:
        """Keep a record here and send it to the nearest REPLICAS peers that answer. True if one took it, or if there is none."""
        if not self._protocol.check.passes(key, subkey, value, expires):
            return False
        key_id, packed = DHTID.generate(source=key), msgpack.packb(value)
        assert packed is not None
        self._protocol.storage.store_subkey(key_id, subkey, packed, expires)
        alone = not self.neighbours()
        async with asyncio.timeout(SEARCH_TIMEOUT):
            nearest, _ = await self._search(key_id, SEARCH_WIDTH)
            return alone or await self._send_to(nearest, key_id, subkey, packed, expires) > 0

    async def get(self, key: str) -> dict[str, StoredValue]:
        """The live records under `key` that pass the check. Of each subkey the one that expires last."""
        key_id = DHTID.generate(source=key)
        async with asyncio.timeout(SEARCH_TIMEOUT):
            _, returned = await self._search(key_id, SEARCH_WIDTH)
        records = merged([self._protocol.kept(key_id), *returned])
        for owner, value, expires in records.entries():
            if self._protocol.storage.is_newer(key_id, owner, expires):
                self._protocol.cache.store_subkey(key_id, owner, value, expires)
        values = {owner: StoredValue(msgpack.unpackb(value), expires) for owner, value, expires in records.entries()}
        return {
            owner: each for owner, each in values.items() if self._protocol.check.passes(key, owner, each.value, each.expires)
        }

    async def close(self) -> None:
        await self._p2p.shutdown()

    async def _search(self, target: DHTID, width: int) -> tuple[list[PeerID], list[DictionaryDHTValue]]:
        """The peers nearest to `target` that answer, the nearest first, and the records that all asked peers returned."""
        table = self._protocol.routing_table
        peers = dict(table.get_nearest_neighbors(target, BUCKET_SIZE, exclude=self._protocol.node_id))
        returned: list[DictionaryDHTValue] = []

        async def ask(position: int) -> Iterable[int] | None:
            node_id = DHTID(position)
            answer = await self._ask(peers[node_id], target)
            if answer is None:
                return None
            records, named = answer
            if records is not None:
                returned.append(records)
            peers.update(named)
            return named

        search = Lookup(target, width, peers)
        await run_lookup(search, ask)
        return [peers[DHTID(position)] for position in search.nearest()], returned

    async def _ask(self, peer: PeerID, key: DHTID) -> tuple[Any, dict[DHTID, PeerID]] | None:
        """The checked records that a peer returns for `key`, if any, and the peers it names. None when it does not answer."""
        if self._unresponsive.paused(peer, time.monotonic()):
            return None
        answer = await keep_cancellation(self._protocol.call_find(peer, [key]))
        if not answer:
            self._unresponsive.add(peer, time.monotonic())
            return None
        self._unresponsive.forget(peer)
        value, named = answer[key]
        records = value.value if value and isinstance(value.value, DictionaryDHTValue) else None
        return records, {position: other for position, other in _plausible(named).items() if other != self._p2p.peer_id}

    async def _send_to(self, candidates: list[PeerID], key_id: DHTID, subkey: str, packed: bytes, expires: float) -> int:
        """Send a record to REPLICAS peers at once, and to others in place of those that do not take it. Returns how many did.

        The nearest peer of each origin comes first, so that one origin with many peers around a key does not get all replicas.
        """
        candidates = alternate(candidates, await self._protocol.origins.of_all([peer.to_base58() for peer in candidates]))
        taken = 0
        while candidates and taken < REPLICAS:
            batch, candidates = candidates[: REPLICAS - taken], candidates[REPLICAS - taken :]
            calls = [self._protocol.call_store(peer, [key_id], [packed], [expires], subkeys=[subkey]) for peer in batch]
            for reply in await asyncio.gather(*calls):
                taken += bool(reply and reply[0])
        return taken


def _plausible(peers: dict[DHTID, PeerID]) -> dict[DHTID, PeerID]:
    """The peers that a peer names, without those at a wrong position, and at most MAX_NEIGHBOURS of them."""
    return {node_id: peer_id for node_id, peer_id in list(peers.items())[:MAX_NEIGHBOURS] if node_id == position_of(peer_id)}
