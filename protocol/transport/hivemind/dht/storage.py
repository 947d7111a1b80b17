"""What a peer keeps of the DHT: per key the newest record of each owner, bounded in number and in memory."""

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


class _Tidy(TimedStorage):
    """hivemind's storage gives an entry its new end before it refuses it, and keeps all ends it ever had.

    So whoever stored an older record again would have taken the newer one away early, and cost memory each time.
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


class KeyRecords(_Tidy, DictionaryDHTValue):
    """The records under one key by owner. Beyond MAX_RECORDS_PER_KEY those that expire first give way."""

    def __init__(self) -> None:
        super().__init__(MAX_RECORDS_PER_KEY)

    def entries(self) -> list[tuple[str, bytes, float]]:
        """Owner, packed value and expiry of each that is live."""
        items: list[tuple[str, Any]] = list(self.items())
        return [(owner, entry.value, entry.expiration_time) for owner, entry in items]


class RecordStorage(_Tidy, DHTLocalStorage):
    """Keys with their records; beyond MAX_KEYS those give way whose last record expires first."""

    def __init__(self) -> None:
        super().__init__(MAX_KEYS)

    def store_subkey(self, key: DHTID, subkey: str, value: bytes, expiration_time: float) -> bool:
        """False where nothing changes: the one held lives as long."""
        records = self.of(key) or KeyRecords()
        stored = records.store(subkey, value, expiration_time)
        if stored:
            self.store(key, records, expiration_time)
        return stored

    def of(self, key: DHTID) -> KeyRecords | None:
        found: Any = self.get(key)
        return found.value if found else None

    def is_newer(self, key: DHTID, subkey: str, expires: float) -> bool:
        """Whether a record of that owner and expiry would change anything."""
        records = self.of(key)
        held = records.get(subkey) if records else None
        return held is None or expires > held.expiration_time


def merged(parts: Iterable[Any]) -> KeyRecords:
    """The newest of each owner in some dictionaries of records."""
    records = KeyRecords()
    for part in parts:
        for owner, (value, expires) in part.items():
            records.store(owner, value, expires)
    return records


def within(records: DictionaryDHTValue, room: int) -> tuple[DictionaryDHTValue, int]:
    """As many of `records` as fit into `room` bytes, by chance where not all do, and their size.

    By chance, so that nobody can push others out of answers by living longer, and several replicas show more than one.
    """
    items: list[tuple[str, ValueWithExpiration[bytes]]] = list(records.items())
    random.shuffle(items)
    chosen, size = DictionaryDHTValue(), 0
    for owner, entry in items:
        needed = len(owner) + len(entry.value) + 32  # and what MessagePack adds
        if size + needed <= room:
            chosen.data[owner] = entry  # without ends: it is packed at once
            chosen.latest_expiration_time = max(chosen.latest_expiration_time, entry.expiration_time)
            size += needed
    return chosen, size
