"""Who keeps a copy of an accepted checkpoint when too few peers do: a pure rule, by which the right few fetch and nobody else.

Every accepted checkpoint is to be held by WANTED peers that are online, besides the coordinator. All peers rank themselves by one
rule: who stands by goes before who trains, and among equals they follow one another on a ring (consistent hashing, Karger and
others 1997: one hash per peer and shard, where rendezvous hashing takes one per pair). As many from the top as copies are
missing fetch it; when one of them cannot (its disk is full, it is gone), the next moves up after a lease.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import BlobRef, Digest, lease_seconds
from lutetia.protocol.schema.records import NODE_BUCKETS, AcceptanceRecord, NodeRecord, node_bucket

WANTED = 2
LOOKED_AT = 2 * WANTED
"""Who ranks behind this many does not even look at the shard: so a node's reads do not grow with the swarm."""

FREE = ("idle", "claiming")
"""What a node record says of who stands by."""
_ARC = 2**64 // NODE_BUCKETS
_AWAY = ("joining", "probing", "draining", "left")


class Replica(Frozen):
    """An accepted checkpoint that this box keeps for others."""

    shard: int
    epoch: int
    checkpoint: Digest
    weights: BlobRef
    state: BlobRef

    @classmethod
    def of(cls, given: AcceptanceRecord) -> Replica:
        return cls(shard=given.shard, epoch=given.epoch, checkpoint=given.checkpoint, weights=given.weights, state=given.state)

    @property
    def bytes(self) -> int:
        return self.weights.size + self.state.size


@dataclass(frozen=True)
class UnderReplicated:
    """A checkpoint as this node sees it: `holders` besides the coordinators, and `since` when it has had too few."""

    seed: Replica
    holders: frozenset[str]
    since: float


class PeerRing:
    """The peers that may keep copies. Equal on all peers that see the same nodes."""

    def __init__(self, run: str, nodes: Iterable[NodeRecord]) -> None:
        self._run = run
        fit = [node for node in nodes if node.state not in _AWAY]
        self._rings = [
            sorted((point(run, "peer", node.owner), node.owner) for node in fit if (node.state in FREE) == free)
            for free in (True, False)
        ]

    def order(self, shard: int) -> Iterator[str]:
        """Public keys, who is to keep a copy of the shard's checkpoint first."""
        start = point(self._run, "shard", str(shard))
        for ring in self._rings:
            first = bisect_left(ring, (start, ""))
            yield from (owner for _, owner in (*ring[first:], *ring[:first]))

    def looked_at(self, owner: str, shards: int) -> list[int]:
        """The shards of which `owner` may have to keep copies."""
        return [shard for shard in range(shards) if owner in islice(self.order(shard), LOOKED_AT)]

    def is_due(self, owner: str, thin: UnderReplicated, now: float, heartbeat: float) -> bool:
        """Whether `owner` is to fetch it now.

        A checkpoint is given one heartbeat, in which its author's own announcement arrives or the next epoch is accepted.
        """
        waited, missing = now - thin.since - heartbeat, WANTED - len(thin.holders)
        if missing <= 0 or waited < 0 or owner in thin.holders:
            return False
        others = (peer for peer in self.order(thin.seed.shard) if peer not in thin.holders)
        return owner in islice(others, missing + int(waited // lease_seconds(heartbeat)))


def affordable(due: Iterable[UnderReplicated], spare: int) -> list[Replica]:
    """What of `due` fits into `spare` bytes, those with the fewest holders first."""
    chosen = []
    for thin in sorted(due, key=lambda t: (len(t.holders), t.seed.bytes, t.seed.shard)):
        if thin.seed.bytes <= spare:
            chosen.append(thin.seed)
            spare -= thin.seed.bytes
    return chosen


def outdated(kept: Iterable[Replica], newest: Mapping[int, Replica]) -> list[Replica]:
    """What need not be kept: another checkpoint of its shard is the accepted one now."""
    return [seed for seed in kept if seed.shard in newest and newest[seed.shard].checkpoint != seed.checkpoint]


@lru_cache(maxsize=1 << 15)
def point(run: str, kind: str, name: str) -> int:
    """Where a peer or a shard lies on the ring of the run. The peers of one bucket of node records are neighbours."""
    place = int.from_bytes(hashlib.sha256(f"{run}|seeding|{kind}|{name}".encode()).digest()[:8], "big")
    return node_bucket(name) * _ARC + place % _ARC if kind == "peer" else place
