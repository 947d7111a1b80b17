"""The records that a peer keeps: the newest of each owner per key, bounded in number and in memory."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable
from typing import Any

from lutetia.protocol.transport.hivemind.bindings import (
    DHTID,
    DHTLocalStorage,
    DictionaryDHTValue,
    TimedStorage,
    ValueWithExpiration,
)

MAX_RECORDS_PER_KEY = 4096
MAX_KEYS = 1 << 17
_SLACK = 64


class _CompactStorage(TimedStorage):
    """hivemind's storage without two faults.

    It registers the expiry of an entry before it refuses the entry, so storing an older record again would expire the newer one
    early. And it never forgets an expiry, so every such store would cost memory.
    """

    def store(self, key: Any, value: Any, expiration_time: float) -> bool:
        held = self.data.get(key)
        if held is not None and held.expiration_time >= expiration_time:
            return False
        stored = super().store(key, value, expiration_time)
        if len(self.expiration_heap) > 2 * len(self.data) + _SLACK:
            self.expiration_heap = list(self.key_to_heap.values())
            heapq.heapify(self.expiration_heap)
        return stored


class KeyRecords(_CompactStorage, DictionaryDHTValue):
    """The records under one key, by owner. Beyond MAX_RECORDS_PER_KEY the ones that expire first are dropped."""

    def __init__(self) -> None:
        super().__init__(MAX_RECORDS_PER_KEY)

    def entries(self) -> list[tuple[str, bytes, float]]:
        """Owner, packed value and expiry of each live record."""
        items: list[tuple[str, Any]] = list(self.items())
        return [(owner, entry.value, entry.expiration_time) for owner, entry in items]


class RecordStorage(_CompactStorage, DHTLocalStorage):
    """The records of all keys. Beyond MAX_KEYS the keys whose last record expires first are dropped."""

    def __init__(self) -> None:
        super().__init__(MAX_KEYS)

    def store_subkey(self, key: DHTID, subkey: str, value: bytes, expiration_time: float) -> bool:
        """Store a record. False when the one held does not expire before it."""
        records = self.of(key) or KeyRecords()
        stored = records.store(subkey, value, expiration_time)
        if stored:
            self.store(key, records, expiration_time)
        return stored

    def of(self, key: DHTID) -> KeyRecords | None:
        entry: Any = self.get(key)
        return entry.value if entry else None

    def is_newer(self, key: DHTID, subkey: str, expires: float) -> bool:
        """Whether a record of that owner and expiry would replace the one held."""
        records = self.of(key)
        held = records.get(subkey) if records else None
        return held is None or expires > held.expiration_time


def merged(parts: Iterable[Any]) -> KeyRecords:
    """The newest record of each owner in several dictionaries of records."""
    records = KeyRecords()
    for part in parts:
        for owner, (value, expires) in part.items():
            records.store(owner, value, expires)
    return records


def sample_within(records: DictionaryDHTValue, room: int) -> tuple[DictionaryDHTValue, int]:
    """Random records that fit into `room` bytes together, and their size in bytes.

    Random, so that long-lived records cannot push out others, and so that several replicas together show more than one does.
    """
    items: list[tuple[str, ValueWithExpiration[bytes]]] = list(records.items())
    random.shuffle(items)
    chosen, size = DictionaryDHTValue(), 0
    for owner, entry in items:
        needed = len(owner) + len(entry.value) + 32  # 32: overhead of MessagePack
        if size + needed <= room:
            chosen.data[owner] = entry  # without the expiry heap, since it is packed at once
            chosen.latest_expiration_time = max(chosen.latest_expiration_time, entry.expiration_time)
            size += needed
    return chosen, size
