"""The answering side of hivemind's three calls, with bounds on what each caller may cost.

hivemind answers every call, of any length and at any rate. Here the keys of a call are limited, an answer fits into a message of
p2pd, and the calls of one network origin are limited together.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import msgpack

from lutetia.protocol.schema.records import RecordRefused
from lutetia.protocol.transport.base import RecordCheck
from lutetia.protocol.transport.hivemind.bindings import DHTID, P2P, DHTRecord, DictionaryDHTValue, dht_messages
from lutetia.protocol.transport.hivemind.dht.ip_diversity import NewcomerLimit
from lutetia.protocol.transport.hivemind.dht.record_quota import RecordQuota
from lutetia.protocol.transport.hivemind.dht.routing_table import YIELD_EVERY, PlacementProtocol, position_of
from lutetia.protocol.transport.hivemind.dht.storage import MAX_RECORDS_PER_KEY, KeyRecords, merged, sample_within
from lutetia.system.log_limit import LimitedLog

log = logging.getLogger(__name__)
_refused = LimitedLog(log)

MAX_KEYS_PER_FIND = 16
"""hivemind never asks for more at once; our own lookups ask for one."""
ANSWER_BYTES = 3 << 20
"""Bytes of records in one answer. p2pd takes messages of up to 4 MiB."""
CALLS_AT_ONCE, CALLS_PER_SECOND = 8192, 256.0
"""Calls of one origin: burst and rate. Twenty nodes behind one address, on a run of a thousand shards, need 170 a second."""
_BYTES_PER_CALL = 4096
_RECORDS_PER_CALL = 4
"""Bytes of an answer, and records to verify, that cost as much as one more call."""


class WireRecordCheck:
    """A RecordCheck for records as they are on the wire: with a hashed key, and owner and value in MessagePack."""

    def __init__(self, check: RecordCheck) -> None:
        self._check = check

    def key_of(self, record: DHTRecord) -> str | None:
        """The key of a record if it passes and is stored under the hash of that key and by its owner; else None."""
        owner, value = _unpacked(record.subkey, str), _unpacked(record.value, bytes)
        if owner is None or value is None:
            return None
        key = self._passed(None, owner, value, record.expiration_time)
        return key if key is not None and DHTID.generate(source=key).to_bytes() == record.key else None

    def passes(self, key: str, owner: str, value: bytes, expires: float) -> bool:
        """The check for a reader, which knows the key."""
        return self._passed(key, owner, value, expires) == key

    def _passed(self, key: str | None, owner: str, value: bytes, expires: float) -> str | None:
        try:
            return self._check(key, owner, value, expires)
        except RecordRefused as error:
            log.debug("refused a record of %s: %s", owner[:16], error)
            return None


class RpcServer(PlacementProtocol):
    """The answering side of hivemind's protocol."""

    check: WireRecordCheck
    quota: RecordQuota
    calls: NewcomerLimit

    async def serve(self, p2p: P2P) -> None:
        """Start to answer the calls of others."""
        for name, answer, request in (
            ("rpc_ping", self.rpc_ping, dht_messages.PingRequest),
            ("rpc_find", self.rpc_find, dht_messages.FindRequest),
            ("rpc_store", self.rpc_store, dht_messages.StoreRequest),
        ):
            await p2p.add_protobuf_handler(f"DHTProtocol.{name}", answer, request)

    async def rpc_ping(self, request: Any, context: Any) -> Any:
        """Answer a ping. A request to call back (`validate`) is ignored: no honest peer makes one."""
        await self._require_calls_left(context, 1)
        self._meet_caller(request, context)
        return dht_messages.PingResponse(peer=self.node_info, dht_time=time.time(), available=False)

    async def rpc_find(self, request: Any, context: Any) -> Any:
        """Answer with the records kept under each key and the known peers near it."""
        if len(request.keys) > MAX_KEYS_PER_FIND or len(set(request.keys)) < len(request.keys):
            raise ValueError(f"a call asks for at most {MAX_KEYS_PER_FIND} keys, each once")
        keys, answer, room = [DHTID.from_bytes(key) for key in request.keys], [], ANSWER_BYTES
        await self._require_calls_left(context, len(keys))
        for key in keys:
            records, size = sample_within(self.kept(key), room)
            await self._require_calls_left(context, size / _BYTES_PER_CALL)
            room -= size
            answer.append(records)
        self._meet_caller(request, context)
        results = [self._result(key, records, context) for key, records in zip(keys, answer, strict=True)]
        return dht_messages.FindResponse(results=results, peer=self.node_info)

    async def rpc_store(self, request: Any, context: Any) -> Any:
        """Keep the records of a caller, within the quota of its origin. They never go into the cache."""
        origin = await self._origin(context)
        self._meet_caller(request, context)
        kept: list[bool] = []
        for parts in zip(request.keys, request.subkeys, request.values, request.expiration_time, strict=True):
            admitted = self._admits(origin, 1 / _RECORDS_PER_CALL + len(parts[2]) / _BYTES_PER_CALL)
            records = self._offered(*parts) if admitted else []
            admitted = admitted and self._admits(origin, len(records) / _RECORDS_PER_CALL)
            kept.append(admitted and await self._keep_all(records, origin))
        return dht_messages.StoreResponse(store_ok=kept, peer=self.node_info)

    def kept(self, key: DHTID) -> KeyRecords:
        """The records under a key that this peer holds, as a replica or because it has read them."""
        held, seen = self.storage.of(key), self.cache.of(key)
        return merged([held, seen]) if held and seen else held or seen or KeyRecords()

    def _validate_dictionary(self, key_bytes: bytes, dictionary: DictionaryDHTValue) -> bool:
        """Drop the records of another peer's answer that do not pass the check."""
        for number, (owner, (value, expires)) in enumerate(list(dictionary.items())):
            record = DHTRecord(key_bytes, self.serializer.dumps(owner), value, expires)
            if number >= MAX_RECORDS_PER_KEY or self.check.key_of(record) is None:
                del dictionary[owner]
        return True

    def _validate_record(self, key_bytes: bytes, subkey_bytes: bytes, value_bytes: bytes, expiration_time: float) -> bool:
        return self.check.key_of(DHTRecord(key_bytes, subkey_bytes, value_bytes, expiration_time)) is not None

    def _result(self, key: DHTID, records: DictionaryDHTValue, context: Any) -> Any:
        result = dht_messages.FindResult(type=dht_messages.NOT_FOUND)
        if records:
            result.type, result.value = dht_messages.FOUND_DICTIONARY, self.serializer.dumps(records)
            result.expiration_time = records.latest_expiration_time
        asker = position_of(context.remote_id)
        for position, peer in self.routing_table.get_nearest_neighbors(key, k=self.bucket_size, exclude=asker):
            result.nearest_node_ids.append(position.to_bytes())
            result.nearest_peer_ids.append(peer.to_bytes())
        return result

    def _offered(self, key: bytes, tag: bytes, value: bytes, expires: float) -> list[DHTRecord]:
        """The records in one part of a request: one record, or all of a dictionary."""
        if tag != self.IS_DICTIONARY:
            return [DHTRecord(key, tag, value, expires)]
        unpacked: Any = self.serializer.loads(value)
        return [DHTRecord(key, self.serializer.dumps(owner), each, ends) for owner, (each, ends) in unpacked.items()]

    async def _keep_all(self, records: list[DHTRecord], origin: str) -> bool:
        kept = 0
        for number, record in enumerate(records, start=1):
            kept += self._keep(record, origin)
            if number % YIELD_EVERY == 0:
                await asyncio.sleep(0)
        return kept == len(records)

    def _keep(self, record: DHTRecord, origin: str) -> bool:
        """Keep one record. A record that is not newer than the one held is dropped before any expensive check."""
        owner, key_id = _unpacked(record.subkey, str), DHTID.from_bytes(record.key)
        if owner is None or not self.storage.is_newer(key_id, owner, record.expiration_time):
            return False
        key = self.check.key_of(record)
        if key is None:
            return False
        if not self.quota.admits(key, owner, origin, record.expiration_time, time.time()):
            source = origin or "relays"
            _refused(logging.INFO, source, "refused a record under %s: too many from %s", key, source)
            return False
        return self.storage.store_subkey(key_id, owner, record.value, record.expiration_time)

    def _meet_caller(self, request: Any, context: Any) -> None:
        """Put a caller that takes part in the DHT into the routing table."""
        if request.peer.node_id:
            position = DHTID.from_bytes(request.peer.node_id)
            asyncio.create_task(self.update_routing_table(position, context.remote_id, responded=True))

    async def _require_calls_left(self, context: Any, cost: float) -> None:
        """Raises ConnectionRefusedError, which is sent to the caller, when its origin has used up its calls."""
        if not self._admits(await self._origin(context), cost):
            raise ConnectionRefusedError("too many calls from your network address")

    def _admits(self, origin: str, cost: float) -> bool:
        return self.calls.admits(origin, time.monotonic(), cost)

    async def _origin(self, context: Any) -> str:
        return await self.origins.of(context.remote_id.to_base58())


def _unpacked(packed: bytes, kind: type[Any]) -> Any:
    """Unpack MessagePack. None when it is invalid or not of that kind."""
    try:
        value = msgpack.unpackb(packed)
    except ValueError:
        return None
    return value if isinstance(value, kind) else None
