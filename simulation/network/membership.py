"""The node records as a volunteer reads them, and what follows for each: a model of `node.services.membership` that many
readers share.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import islice

from lutetia.node.runtime.replication_policy import FREE, point
from lutetia.node.services.standby_policy import STEADY, WAVES, assign_shards, buckets_before, is_standby
from lutetia.protocol.schema.records import NodeRecord, node_bucket


class SharedMembership:
    """`seen` are all node records at one moment. Duties are made from all of them: a part that is `enough` gives the same."""

    def __init__(self, run: str, seen: Sequence[NodeRecord], shards: int, turn: int) -> None:
        free = [record.owner for record in seen if is_standby(record)]
        unfit = dict.fromkeys((record.owner for record in seen if record.state in FREE), frozenset[int]())
        self.duties = {**unfit, **assign_shards(run, free, shards, turn)}
        self._run = run
        self._all = Counter(node_bucket(record.owner) for record in seen)
        self._free = Counter(node_bucket(owner) for owner in free)
        self._places: dict[int, list[int]] = {}
        for owner in free:
            self._places.setdefault(node_bucket(owner), []).append(point(run, "peer", owner))
        for places in self._places.values():
            places.sort()

    def read_by(self, owner: str) -> tuple[int, int]:
        """(buckets, records) that `owner` reads until it knows enough standbys before it."""
        own, place = node_bucket(owner), point(self._run, "peer", owner)
        buckets = iter(buckets_before(owner))
        before = buckets_read = records = 0
        for wave in WAVES:
            for bucket in islice(buckets, wave):
                before += bisect_left(self._places.get(own, ()), place) if bucket == own else self._free[bucket]
                buckets_read, records = buckets_read + 1, records + self._all[bucket]
            if before >= STEADY:
                break
        return buckets_read, records
