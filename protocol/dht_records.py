"""Publish this peer's records in the DHT and read the records of all peers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import NodeRecord, Record, RecordLimits, read_envelope, seal
from lutetia.protocol.transport.base import RecordStore

log = logging.getLogger(__name__)

_STEP = 0.001

_last_expiry: WeakKeyDictionary[RecordStore, dict[str, float]] = WeakKeyDictionary()
"""Transport -> key -> the expiry of the record that was stored last."""


def next_expiry(usual: float, before: float, skew: float) -> float:
    """The expiry of a new record of one owner and key, in Unix seconds: never before `before`, that of the record it replaces.

    An earlier expiry is ignored if it lies more than `skew` seconds beyond the usual one: this clock was ahead then, and no peer
    took that record.
    """
    return usual if before > usual + skew else max(usual, before + _STEP)


async def publish(
    transport: RecordStore, identity: Identity, record: Record, ttl: float, skew: float = RecordLimits.maximum_clock_skew
) -> bool:
    """Seal `record` and store it. Returns False when no peer took it.

    The DHT keeps the record of each owner that expires last, so the expiry follows `next_expiry`. For a node record this also
    logs an error if another node uses this identity.

    Args:
        transport: The DHT.
        identity: The owner's key.
        record: What to publish.
        ttl: Time to live in seconds.
        skew: Seconds by which clocks of peers may differ.
    """
    expiries = _last_expiry.setdefault(transport, {})
    key = record.key()
    if isinstance(record, NodeRecord):
        await _warn_of_double(transport, key, record, expiries)
    expires = expiries[key] = next_expiry(transport.now() + ttl, expiries.get(key, 0.0), skew)
    return await transport.store(key, record.owner, seal(record, identity, expires), expires)


async def read_records(transport: RecordStore, key: str) -> list[tuple[Record, float]]:
    """The live records under `key` and their expiry in Unix seconds, by owner. Raises ConnectionError when offline."""
    stored = await transport.get(key)
    return [(read_envelope(stored[owner].value), stored[owner].expires) for owner in sorted(stored)]


async def _warn_of_double(transport: RecordStore, key: str, record: NodeRecord, expiries: Mapping[str, float]) -> None:
    """Log an error when the DHT holds a newer record under this identity than the one this node stored last."""
    stored = (await transport.get(key)).get(record.owner)
    last = expiries.get(key)  # read only now: this node may have published again during the lookup
    if last is not None and stored is not None and stored.expires > last:
        other = read_envelope(stored.value)
        log.error(
            "another node is online under this identity (it published %s); give every node its own identity, or both lose work",
            other.addresses if isinstance(other, NodeRecord) else (),
        )
