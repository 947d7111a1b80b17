"""The record check of a run: what its manifest allows. Every peer applies it when it stores or reads a record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lutetia.protocol.schema.identity import peer_id_of
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import Record, RecordLimits, RecordRefused, open_record
from lutetia.protocol.transport.base import RecordCheck


def record_check(manifest: Manifest | Callable[[], Manifest], now: Callable[[], float]) -> RecordCheck:
    """The check of this run's records: `open_record`, then run id, shard numbers, allowlist and addresses.

    Args:
        manifest: The manifest, or a function that returns the one in force, which is called for each record.
        now: This peer's clock in Unix seconds.
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
    """What one version of the manifest allows."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.limits = RecordLimits(manifest.timing.heartbeat, manifest.timing.maximum_clock_skew)
        self._run, self._shards = manifest.run_id, len(manifest.shards)
        self._banned = frozenset(ban.peer for ban in manifest.orders.banned)
        self._allowed = None if manifest.allowlist is None else {*manifest.allowlist, *manifest.coordinators}

    def check(self, record: Record) -> None:
        """Raises RecordRefused."""
        if record.run != self._run:
            raise RecordRefused(f"record is of run {record.run[:12]}, not of {self._run[:12]}")
        if self._allowed is not None and record.owner not in self._allowed:
            raise RecordRefused(f"owner {record.owner[:16]}… is not on the run's allowlist")
        if record.owner in self._banned:
            raise RecordRefused(self.manifest.orders.refusal_of(record.owner))
        if (_declared(record, "shard") or 0) >= self._shards:
            raise RecordRefused(f"record names a shard that does not exist: the run has {self._shards}")
        _check_addresses(record)


def _check_addresses(record: Record) -> None:
    """Raises RecordRefused when a record directs others to a peer that is not its owner."""
    peer_id = _declared(record, "peer_id")
    if peer_id is None:
        return
    owner = peer_id_of(record.owner)
    if peer_id != owner or not all(address.endswith(f"/p2p/{owner}") for address in _declared(record, "addresses") or ()):
        raise RecordRefused(f"record of peer {owner} names another peer")


def _declared(record: Record, name: str) -> Any:
    """A field that this kind of record has by its schema; None for others. An unknown field of that name says nothing."""
    return getattr(record, name) if name in type(record).model_fields else None
