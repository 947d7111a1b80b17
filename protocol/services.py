"""What a peer does on the network, over any transport: publish and read records, offer and ask documents, join a swarm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

from .documents import (
    HELLO,
    MANIFEST,
    PROTOCOL_VERSION,
    STATUS,
    Hello,
    ask_document,
    serve_document,
    serve_introduction,
    software_version,
)
from .identity import Identity, peer_id_of
from .joining import enter_swarm, join_swarm
from .manifest import Manifest
from .peer_cache import PeerCache
from .records import NodeRecord, Record, RecordLimits, RecordRefused, open_record, read_envelope, seal
from .transport import RecordCheck, Transport

__all__ = [
    "HELLO",
    "MANIFEST",
    "PROTOCOL_VERSION",
    "STATUS",
    "Hello",
    "PeerCache",
    "ask_document",
    "enter_swarm",
    "join_swarm",
    "publish",
    "read_records",
    "record_check",
    "serve_document",
    "serve_introduction",
    "software_version",
]

log = logging.getLogger("lutetia.protocol.services")

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


def record_check(manifest: Manifest | Callable[[], Manifest], now: Callable[[], float]) -> RecordCheck:
    """The check of every record of this run: `open_record`, and what the manifest says of runs, shards and the allowlist.

    Given a function, each record is checked by the manifest that it gives at that moment.
    """
    current = manifest if callable(manifest) else lambda: manifest
    rules = _Rules(current())

    def check(key: str | None, subkey: str, value: bytes, expires: float) -> str:
        nonlocal rules
        if rules.manifest is not current():
            rules = _Rules(current())
        trusted = rules.manifest.coordinators
        record = open_record(
            value, key=key, subkey=subkey, expires=expires, now=now(), limits=rules.limits, coordinators=trusted
        )  # fmt: skip
        rules.check(record)
        return record.key()

    return check


class _Rules:
    """What one version of the manifest says of records."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.limits = RecordLimits(manifest.timing.heartbeat, manifest.timing.maximum_clock_skew)
        self._run, self._shards = manifest.run_id, len(manifest.shards)
        self._allowed = None if manifest.allowlist is None else {*manifest.allowlist, *manifest.coordinators}

    def check(self, record: Record) -> None:
        """Raises RecordRefused."""
        if record.run != self._run:
            raise RecordRefused(f"record is of run {record.run[:12]}, not of {self._run[:12]}")
        if self._allowed is not None and record.owner not in self._allowed:
            raise RecordRefused(f"owner {record.owner[:16]}… is not on the run's allowlist")
        if (getattr(record, "shard", None) or 0) >= self._shards:
            raise RecordRefused(f"the run has {self._shards} shards and no such one")
        _check_addresses(record)


def _check_addresses(record: Record) -> None:
    """A record may only send others to its owner."""
    peer_id = getattr(record, "peer_id", None)
    if peer_id is None:
        return
    own = peer_id_of(record.owner)
    if peer_id != own or not all(address.endswith(f"/p2p/{own}") for address in getattr(record, "addresses", ())):
        raise RecordRefused(f"record of peer {own} names another peer")


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
