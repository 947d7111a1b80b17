"""The node records as nodes read them, and the shards that each watches: `node.services.membership`, shared by many readers."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice

from lutetia.node.runtime.replication_policy import FREE, point
from lutetia.node.services.standby_policy import STEADY, WAVES, assign_shards, buckets_before, free_rate
from lutetia.protocol.schema.records import NodeRecord, node_bucket


class SharedMembership:
    """`seen`: all node records at one moment. A real node reads only some of them.

    They are enough to compute the same for itself; where lanes need unlike speeds, it watches a few more.
    """

    def __init__(self, run: str, seen: Sequence[NodeRecord], slots: Mapping[int, float], lease_number: int) -> None:
        self._run, self._slots, self._lease_number = run, slots, lease_number
        self._standbys = free = {record.owner: rate for record in seen if (rate := free_rate(record)) > 0}
        self._unfit = [record.owner for record in seen if record.state in FREE]
        self._all = Counter(node_bucket(record.owner) for record in seen)
        self._free = Counter(node_bucket(owner) for owner in free)
        self._places: dict[int, list[int]] = {}
        for owner in free:
            self._places.setdefault(node_bucket(owner), []).append(point(run, "peer", owner))
        for places in self._places.values():
            places.sort()

    @cached_property
    def watched_shards(self) -> dict[str, frozenset[int]]:
        """By public key; made when the first reader that stands by asks for it."""
        assigned = assign_shards(self._run, self._standbys, self._slots, self._lease_number)
        return {**dict.fromkeys(self._unfit, frozenset[int]()), **assigned}

    def read_by(self, owner: str) -> tuple[int, int]:
        """(buckets, records) that `owner` reads until it knows enough standbys before it."""
        own_bucket, place = node_bucket(owner), point(self._run, "peer", owner)
        buckets = iter(buckets_before(owner))
        before = buckets_read = records = 0
        for wave in WAVES:
            for bucket in islice(buckets, wave):
                before += bisect_left(self._places.get(own_bucket, ()), place) if bucket == own_bucket else self._free[bucket]
                buckets_read, records = buckets_read + 1, records + self._all[bucket]
            if before >= STEADY:
                break
        return buckets_read, records
