"""hivemind's DHT with Lutetia's rules: every record checked on store and on read, peers placed by their key, answers not trusted.

What differs from hivemind as it comes: one invalid or just expired record does not void the others under its key; a peer's place
in the key space is the hash of its peer id, so that it keeps it over restarts and cannot choose it; a search counts only peers
that answer it (`transport_hivemind_search`), and the expiry that a peer claims for a whole answer counts for nothing; a record
counts as stored when at least one other peer took it; what one network address hands over is bounded
(`protocol.transport.hivemind.dht.record_quota`), and
so are its calls (`transport_hivemind_answers`) and its share of replicas and neighbours
(`protocol.transport.hivemind.dht.ip_diversity`); nothing that
others hand over is taken into the cache, where only lies what this peer has read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgpack

from lutetia.protocol.async_helpers import keep_cancellation
from lutetia.protocol.transport.base import RecordCheck, StoredValue
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
from lutetia.protocol.transport.hivemind.dht.lookup import Lookup, UnresponsivePeers, run
from lutetia.protocol.transport.hivemind.dht.p2p_fixes import mend, speaks
from lutetia.protocol.transport.hivemind.dht.record_quota import RecordQuota
from lutetia.protocol.transport.hivemind.dht.routing_table import DiverseRoutingTable, OriginLookup, place_of
from lutetia.protocol.transport.hivemind.dht.rpc_server import CALLS_AT_ONCE, CALLS_PER_SECOND, RpcServer, WireRecordCheck
from lutetia.protocol.transport.hivemind.dht.storage import RecordStorage, merged

log = logging.getLogger(__name__)

REPLICAS = 5
SEARCH_WIDTH = 10
RPC_TIMEOUT = 3.0
SEARCH_TIMEOUT = 30.0
MAX_NEIGHBOURS = 40
BUCKET_SIZE, DEPTH_MODULO = 20, 5


class HivemindDht:
    """A DHT node over a running p2pd. Make it with `start`."""

    def __init__(self, p2p: P2P, protocol: RpcServer) -> None:
        self._p2p, self._protocol = p2p, protocol
        self._silent = UnresponsivePeers()

    @classmethod
    async def start(
        cls, control_address: str, check: RecordCheck, origins: Callable[[], Awaitable[dict[str, str]]]
    ) -> HivemindDht:
        """`control_address` is the multiaddr of p2pd's control socket; `origins` gives those of the connected peers."""
        p2p = await P2P.replicate(Multiaddr(control_address))
        assert p2p.peer_id
        mend(p2p)
        place = place_of(p2p.peer_id)
        DHTProtocol._collect_rpc_handlers()  # under hivemind's name for the class, by which others know its calls
        protocol = await DHTProtocol.create(
            p2p, place, BUCKET_SIZE, DEPTH_MODULO, REPLICAS, RPC_TIMEOUT,
            client_mode=True,  # else it would already answer, as hivemind does
        )  # fmt: skip
        protocol.__class__ = RpcServer
        assert isinstance(protocol, RpcServer)
        protocol.node_info = dht_messages.NodeInfo(node_id=place.to_bytes())
        protocol.storage, protocol.cache = RecordStorage(), RecordStorage()
        protocol.check, protocol.crowd, protocol.calls = (
            WireRecordCheck(check),
            RecordQuota(),
            NewcomerLimit(CALLS_AT_ONCE, CALLS_PER_SECOND),
        )
        protocol.origins, protocol.door = OriginLookup(origins), NewcomerLimit()
        protocol.routing_table = DiverseRoutingTable(place, BUCKET_SIZE, DEPTH_MODULO)
        await protocol.serve(p2p)
        return cls(p2p, protocol)

    @property
    def speaks(self) -> bool:
        """Whether calls still come and go."""
        return speaks(self._p2p)

    def neighbours(self) -> list[str]:
        """The peers in the routing table."""
        return [peer_id.to_base58() for peer_id in self._protocol.routing_table.peer_id_to_uid]

    async def meet(self, peer_id: str) -> bool:
        """Ping a connected peer and exchange places with it. False when it does not answer (it then leaves the table)."""
        peer = PeerID.from_base58(peer_id)
        node_id = await keep_cancellation(self._protocol.call_ping(peer, validate=False, strict=False))
        if node_id is None or node_id != place_of(peer):
            return False
        self._silent.forget(peer)
        await self._protocol.update_routing_table(node_id, peer, responded=True)
        return True

    async def look_around(self) -> None:
        """Find the peers nearest to this one, which fills the routing table and announces this peer to them."""
        await self._search(self._protocol.node_id, BUCKET_SIZE)

    async def store(self, key: str, subkey: str, value: bytes, expires: float) -> bool:
        """Keep a record here and hand it to the nearest REPLICAS peers that answer. True if one took it, or if there is none."""
        if not self._protocol.check.passes(key, subkey, value, expires):
            return False
        key_id, packed = DHTID.generate(source=key), msgpack.packb(value)
        assert packed is not None
        self._protocol.storage.store_subkey(key_id, subkey, packed, expires)
        alone = not self.neighbours()
        async with asyncio.timeout(SEARCH_TIMEOUT):
            nearest, _ = await self._search(key_id, SEARCH_WIDTH)
            return alone or await self._hand_to(nearest, key_id, subkey, packed, expires) > 0

    async def get(self, key: str) -> dict[str, StoredValue]:
        """The live records under `key` that pass the check, the longest-lived of each subkey."""
        key_id = DHTID.generate(source=key)
        async with asyncio.timeout(SEARCH_TIMEOUT):
            _, found = await self._search(key_id, SEARCH_WIDTH)
        records = merged([self._protocol.kept(key_id), *found])
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
        """The peers nearest to `target` that answer, the nearest first, and the records that all who were asked showed."""
        table = self._protocol.routing_table
        peers = dict(table.get_nearest_neighbors(target, BUCKET_SIZE, exclude=self._protocol.node_id))
        found: list[DictionaryDHTValue] = []

        async def ask(place: int) -> Iterable[int] | None:
            node_id = DHTID(place)
            answer = await self._ask(peers[node_id], target)
            if answer is None:
                return None
            records, named = answer
            if records is not None:
                found.append(records)
            peers.update(named)
            return named

        search = Lookup(target, width, peers)
        await run(search, ask)
        return [peers[DHTID(place)] for place in search.nearest()], found

    async def _ask(self, peer: PeerID, key: DHTID) -> tuple[Any, dict[DHTID, PeerID]] | None:
        """The checked records that a peer shows under `key`, if any, and whom it names; None when it does not answer."""
        if self._silent.left_alone(peer, time.monotonic()):
            return None
        answer = await keep_cancellation(self._protocol.call_find(peer, [key]))
        if not answer:
            self._silent.add(peer, time.monotonic())
            return None
        self._silent.forget(peer)
        shown, named = answer[key]
        records = shown.value if shown and isinstance(shown.value, DictionaryDHTValue) else None
        return records, {place: other for place, other in _believable(named).items() if other != self._p2p.peer_id}

    async def _hand_to(self, candidates: list[PeerID], key_id: DHTID, subkey: str, packed: bytes, expires: float) -> int:
        """Ask REPLICAS peers at once, and further ones in place of those that do not take it. Returns how many did.

        The nearest of each origin come first, so that one address that has crowded around a key is not all that keeps it.
        """
        candidates = alternate(candidates, await self._protocol.origins.of_all([peer.to_base58() for peer in candidates]))
        taken = 0
        while candidates and taken < REPLICAS:
            batch, candidates = candidates[: REPLICAS - taken], candidates[REPLICAS - taken :]
            calls = [self._protocol.call_store(peer, [key_id], [packed], [expires], subkeys=[subkey]) for peer in batch]
            for reply in await asyncio.gather(*calls):
                taken += bool(reply and reply[0])
        return taken


def _believable(peers: dict[DHTID, PeerID]) -> dict[DHTID, PeerID]:
    """The neighbours that a peer names, as far as they sit where it says and are not too many."""
    return {node_id: peer_id for node_id, peer_id in list(peers.items())[:MAX_NEIGHBOURS] if node_id == place_of(peer_id)}
