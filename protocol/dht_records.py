"""Publish this peer's signed records in the DHT and read those of others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from weakref import WeakKeyDictionary

from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import NodeRecord, Record, RecordLimits, read_envelope, seal
from lutetia.protocol.transport.base import Transport

log = logging.getLogger(__name__)


_last_expiry: WeakKeyDictionary[Transport, dict[str, float]] = WeakKeyDictionary()


_STEP = 0.001


async def publish(
    transport: Transport, identity: Identity, record: Record, ttl: float, skew: float = RecordLimits.maximum_clock_skew
) -> bool:
    """Seal `record` and store it for `ttl` seconds. False when no peer took it.

    The DHT keeps of each owner the record that expires last. So a record never gets an earlier expiry than the one it replaces: a
    shorter `ttl` cannot take an earlier record back. Only what was sealed while this clock was more than `skew` seconds ahead
    does not count: nobody took it, nor would take what outlives it. For node records it also looks whether another box uses this
    identity, and says so in the log.
    """
    expiries = _last_expiry.setdefault(transport, {})
    key = record.key()
    if isinstance(record, NodeRecord):
        await _warn_of_a_double(transport, key, record, expiries)
    usual, before = transport.now() + ttl, expiries.get(key, 0.0)
    expires = usual if before > usual + skew else max(usual, before + _STEP)
    expiries[key] = expires
    return await transport.store(key, record.owner, seal(record, identity, expires), expires)


async def read_records(transport: Transport, key: str) -> list[tuple[Record, float]]:
    """The live records under `key` with their expiry, ordered by owner. Raises ConnectionError when this peer is offline."""
    found = await transport.get(key)
    return [(read_envelope(found[owner].value), found[owner].expires) for owner in sorted(found)]


async def _warn_of_a_double(transport: Transport, key: str, record: NodeRecord, expiries: Mapping[str, float]) -> None:
    """Compare what the DHT holds under our name with what we stored last."""
    stored = (await transport.get(key)).get(record.owner)
    ours = expiries.get(key)  # read now: this box may have published again while the DHT was asked
    if ours is not None and stored is not None and stored.expires > ours:
        other = read_envelope(stored.value)
        log.error(
            "another box is online under this identity (it published %s); give every box its own identity, or both lose work",
            getattr(other, "addresses", ()),
        )
