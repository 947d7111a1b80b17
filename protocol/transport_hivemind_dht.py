"""hivemind's DHT with Lutetia's rules: every record checked on store and on read, peers placed by their key, answers not trusted.

What differs from hivemind as it comes: one invalid or just expired record does not void the others under its key; a peer's place
in the key space is the hash of its peer id, so that it keeps it over restarts and cannot choose it; the expiry that a peer claims
for a whole answer is recomputed from the records in it; a record counts as stored when at least one other peer took it; what one
network address hands over is bounded (`protocol.crowding`), and so is its share of replicas and neighbours
(`protocol.diversity`); nothing is taken into hivemind's cache, which has no such bounds.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection
from contextvars import ContextVar
from typing import Any

import msgpack

from .crowding import Crowd
from .diversity import Door, alternate
from .records import RecordRefused
from .transport import RecordCheck, Stored
from .transport_hivemind_library import (
    DHTID,
    P2P,
    DHTNode,
    DHTRecord,
    DictionaryDHTValue,
    Multiaddr,
    PeerID,
    RecordValidatorBase,
    ValueWithExpiration,
    dht_messages,
)
from .transport_hivemind_table import Origins, Placing, Table, place_of
from .waiting import heeding

log = logging.getLogger("lutetia.protocol.transport_hivemind")

REPLICAS = 5
LOOKUP_WIDTH = 10
RPC_TIMEOUT = 3.0
LOOKUP_TIMEOUT = 30.0
MAX_RECORDS_PER_KEY = 4096
MAX_KEYS = 1 << 17
MAX_NEIGHBOURS = 40
_STORE_CALL = "DHTProtocol.rpc_store"

_handed_by: ContextVar[str | None] = ContextVar("handed_by", default=None)
"""The origin of the peer whose records are being looked at; None for what this peer stores or reads itself."""


class _Validator(RecordValidatorBase):
    """Adapts a RecordCheck: hivemind passes the hashed key and msgpack-ed subkey and value."""

    def __init__(self, check: RecordCheck) -> None:
        self._check, self._crowd = check, Crowd()

    def validate(self, record: DHTRecord) -> bool:
        try:
            subkey, value = msgpack.unpackb(record.subkey), msgpack.unpackb(record.value)
        except ValueError:
            return False
        if not isinstance(subkey, str) or not isinstance(value, bytes):
            return False
        key = self._key_of(None, subkey, value, record.expiration_time)
        if key is None or DHTID.generate(source=key).to_bytes() != record.key:
            return False
        origin = _handed_by.get()
        if origin is None or self._crowd.admits(key, subkey, origin, record.expiration_time, time.time()):
            return True
        log.info("refused a record under %s: too many come from %s", key, origin or "relays")
        return False

    def passes(self, key: str, subkey: str, value: bytes, expires: float) -> bool:
        """The check of a reader, who knows the key."""
        return self._key_of(key, subkey, value, expires) == key

    def _key_of(self, key: str | None, subkey: str, value: bytes, expires: float) -> str | None:
        try:
            return self._check(key, subkey, value, expires)
        except RecordRefused as error:
            log.debug("refused a record of %s: %s", subkey[:16], error)
            return None


class _Protocol(Placing):
    """The RPC side, with our rules about what is kept."""

    async def rpc_store(self, request: Any, context: Any) -> Any:
        """Somebody wants us to keep records: known by where it calls from, and never in the cache."""
        del request.in_cache[:]
        request.in_cache.extend([False] * len(request.keys))
        reset = _handed_by.set(await self.origins.of(context.remote_id.to_base58()))
        try:
            return await super().rpc_store(request, context)
        finally:
            _handed_by.reset(reset)

    def _validate_record(self, key_bytes: bytes, subkey_bytes: bytes, value_bytes: bytes, expiration_time: float) -> bool:
        held = self.storage.get(DHTID.from_bytes(key_bytes))
        records: Any = held.value if held else None
        if isinstance(records, DictionaryDHTValue):
            records.maxsize = MAX_RECORDS_PER_KEY  # beyond it the records that expire first give way
        return super()._validate_record(key_bytes, subkey_bytes, value_bytes, expiration_time)

    def _validate_dictionary(self, key_bytes: bytes, dictionary: DictionaryDHTValue) -> bool:
        """Drop the records that do not pass and keep the rest."""
        for subkey, (value, expires) in list(dictionary.items()):
            if not self._validate_record(key_bytes, self.serializer.dumps(subkey), value, expires):
                del dictionary[subkey]
        return True


class _Node(DHTNode):
    """The lookup side."""

    async def _call_find_with_blacklist(self, peer_id: PeerID, keys: Collection[DHTID]) -> Any:
        response = await super()._call_find_with_blacklist(peer_id, keys)
        return response and {key: (_own_expiry(found), _believable(peers)) for key, (found, peers) in response.items()}


def _pack(value: str | bytes) -> bytes:
    packed = msgpack.packb(value)
    assert packed is not None
    return packed


def _own_expiry(found: Any) -> Any:
    """A dictionary lives as long as its longest record; a peer that claims more would end every search at its own answer."""
    if found is None or not isinstance(found.value, DictionaryDHTValue):
        return None
    latest = max((expires for _, (_, expires) in found.value.items()), default=None)
    return None if latest is None else ValueWithExpiration(found.value, latest)


def _believable(peers: dict[DHTID, PeerID]) -> dict[DHTID, PeerID]:
    """The neighbours that a peer names, as far as they sit where it says and are not too many."""
    return {node_id: peer_id for node_id, peer_id in list(peers.items())[:MAX_NEIGHBOURS] if node_id == place_of(peer_id)}


class Dht:
    """A DHT node over a running p2pd. Make it with `start`."""

    def __init__(self, p2p: P2P, node: _Node, protocol: _Protocol, validator: _Validator) -> None:
        self._p2p, self._node, self._protocol, self._validator = p2p, node, protocol, validator

    @classmethod
    async def start(cls, control_address: str, check: RecordCheck, origins: Callable[[], Awaitable[dict[str, str]]]) -> Dht:
        """`control_address` is the multiaddr of p2pd's control socket; `origins` gives those of the connected peers."""
        p2p, validator = await P2P.replicate(Multiaddr(control_address)), _Validator(check)
        assert p2p.peer_id
        node = await _Node.create(
            p2p=p2p,
            node_id=place_of(p2p.peer_id),
            num_replicas=REPLICAS,
            wait_timeout=RPC_TIMEOUT,
            cache_nearest=0,
            cache_on_store=False,
            cache_refresh_before_expiry=0,
            reuse_get_requests=False,
            record_validator=validator,
        )
        assert isinstance(node, _Node)
        protocol = node.protocol
        protocol.__class__ = _Protocol  # hivemind builds its protocol itself; there is no parameter for another class
        assert isinstance(protocol, _Protocol)
        protocol.storage.maxsize = protocol.cache.maxsize = MAX_KEYS
        protocol.origins, protocol.door = Origins(origins), Door()
        empty = protocol.routing_table
        protocol.routing_table = Table(empty.node_id, empty.bucket_size, empty.depth_modulo)
        await p2p.remove_protobuf_handler(_STORE_CALL)  # the handler that was registered is the base class's
        await p2p.add_protobuf_handler(_STORE_CALL, protocol.rpc_store, dht_messages.StoreRequest)
        return cls(p2p, node, protocol, validator)

    def neighbours(self) -> list[str]:
        """The peers in the routing table."""
        return [peer_id.to_base58() for peer_id in self._protocol.routing_table.peer_id_to_uid]

    async def meet(self, peer_id: str) -> bool:
        """Ping a connected peer and exchange places with it. False when it does not answer (it then leaves the table)."""
        peer = PeerID.from_base58(peer_id)
        node_id = await heeding(self._protocol.call_ping(peer, validate=False, strict=False))
        if node_id is None or node_id != place_of(peer):
            return False
        await self._protocol.update_routing_table(node_id, peer, responded=True)
        return True

    async def look_around(self) -> None:
        """Find the peers nearest to this one, which fills the routing table and announces this peer to them."""
        await heeding(self._node.find_nearest_nodes([self._node.node_id]))

    async def store(self, key: str, subkey: str, value: bytes, expires: float) -> bool:
        """Keep a record here and hand it to the nearest REPLICAS peers that answer. True if one took it, or if there is none."""
        key_id, packed = DHTID.generate(source=key), _pack(value)
        if not self._validator.validate(DHTRecord(key_id.to_bytes(), _pack(subkey), packed, expires)):
            return False
        self._protocol.storage.store(key_id, packed, expires, subkey=subkey)
        async with asyncio.timeout(LOOKUP_TIMEOUT):
            nearest = await heeding(self._node.find_nearest_nodes([key_id], k_nearest=LOOKUP_WIDTH, exclude_self=True))
            candidates = list(nearest[key_id].values())
            if not candidates:
                return True
            return await self._hand_to(candidates, key_id, subkey, packed, expires) > 0

    async def get(self, key: str) -> dict[str, Stored]:
        """The live records under `key` that pass the check, the longest-lived of each subkey."""
        async with asyncio.timeout(LOOKUP_TIMEOUT):
            search = self._node.get_many([key], sufficient_expiration_time=math.inf, beam_size=LOOKUP_WIDTH)
            results: Any = await heeding(search)
        found: Any = results[key]
        records = found.value if found and isinstance(found.value, dict) else {}
        return {
            subkey: Stored(each.value, each.expiration_time)
            for subkey, each in records.items()
            if self._validator.passes(key, subkey, each.value, each.expiration_time)
        }

    async def close(self) -> None:
        self._node.is_alive = False
        await self._p2p.shutdown()

    async def _hand_to(self, candidates: list[PeerID], key_id: DHTID, subkey: str, packed: bytes, expires: float) -> int:
        """Ask REPLICAS peers at once, and further ones in place of those that do not answer. Returns how many took it.

        The nearest of each origin come first, so that one address that has crowded around a key is not all that keeps it.
        """
        candidates = alternate(candidates, [await self._protocol.origins.of(peer.to_base58()) for peer in candidates])
        taken = answered = 0
        while candidates and answered < REPLICAS:
            batch, candidates = candidates[: REPLICAS - answered], candidates[REPLICAS - answered :]
            calls = [self._protocol.call_store(peer, [key_id], [packed], [expires], subkeys=[subkey]) for peer in batch]
            for reply in await asyncio.gather(*calls):
                answered += reply is not None
                taken += bool(reply and reply[0])
        return taken
