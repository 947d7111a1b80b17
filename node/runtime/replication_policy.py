"""Which peers keep a copy of an accepted checkpoint that too few peers hold. Pure.

Every accepted checkpoint should be held by COPIES_WANTED online peers besides the coordinator. All peers compute the same
ranking: standbys before nodes that train, and within each group by position on a ring (consistent hashing, Karger and others
1997: one hash per peer and shard, where rendezvous hashing takes one per pair). As many peers from the top fetch it as copies are
missing. If one of them cannot (full disk, gone), the next one moves up after a lease.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.fields import Digest
from lutetia.protocol.schema.manifest import lease_seconds
from lutetia.protocol.schema.model.blob_ref import BlobRef
from lutetia.protocol.schema.records import NODE_BUCKETS, AcceptanceRecord, NodeRecord, node_bucket

COPIES_WANTED = 2
RANKS_CHECKED = 2 * COPIES_WANTED
"""A peer ranked below this does not check the shard, so that its reads do not grow with the swarm."""

FREE = ("idle", "claiming")
"""Node states of a standby."""
_ARC = 2**64 // NODE_BUCKETS
_AWAY = ("joining", "probing", "draining", "left")


class Replica(Frozen):
    """An accepted checkpoint of which this node keeps a copy for other peers."""

    shard: int
    epoch: int
    checkpoint: Digest
    weights: BlobRef
    state: BlobRef

    @classmethod
    def of(cls, acceptance: AcceptanceRecord) -> Replica:
        return cls(
            shard=acceptance.shard, epoch=acceptance.epoch, checkpoint=acceptance.checkpoint,
            weights=acceptance.weights, state=acceptance.state,
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        return self.weights.size + self.state.size


@dataclass(frozen=True)
class UnderReplicated:
    """A checkpoint with its `holders` besides the coordinators, and `since` when (seconds) it has had too few."""

    replica: Replica
    holders: frozenset[str]
    since: float


class PeerRing:
    """The ranking of the peers that may keep copies. Equal on all peers that see the same nodes."""

    def __init__(self, run: str, nodes: Iterable[NodeRecord]) -> None:
        self._run = run
        fit = [node for node in nodes if node.state not in _AWAY]
        self._rings = [
            sorted((point(run, "peer", node.owner), node.owner) for node in fit if (node.state in FREE) == free)
            for free in (True, False)
        ]

    def order(self, shard: int) -> Iterator[str]:
        """Public keys of the peers, in the order in which they are to keep a copy of the shard's checkpoint."""
        start = point(self._run, "shard", str(shard))
        for ring in self._rings:
            first = bisect_left(ring, (start, ""))
            yield from (owner for _, owner in (*ring[first:], *ring[:first]))

    def shards_to_check(self, owner: str, shards: int) -> list[int]:
        """The shards of which `owner` may have to keep copies. `shards`: how many the run has."""
        return [shard for shard in range(shards) if owner in islice(self.order(shard), RANKS_CHECKED)]

    def is_due(self, owner: str, rare: UnderReplicated, now: float, heartbeat: float) -> bool:
        """Whether `owner` is to fetch it now. Times in seconds.

        Nobody fetches for one heartbeat, in which the author's own announcement arrives or the next epoch is accepted.
        """
        waited, missing = now - rare.since - heartbeat, COPIES_WANTED - len(rare.holders)
        if missing <= 0 or waited < 0 or owner in rare.holders:
            return False
        others = (peer for peer in self.order(rare.replica.shard) if peer not in rare.holders)
        return owner in islice(others, missing + int(waited // lease_seconds(heartbeat)))


def affordable(due: Iterable[UnderReplicated], spare: int) -> list[Replica]:
    """Those of `due` that fit into `spare` bytes, the rarest first."""
    chosen = []
    for rare in sorted(due, key=lambda t: (len(t.holders), t.replica.bytes, t.replica.shard)):
        if rare.replica.bytes <= spare:
            chosen.append(rare.replica)
            spare -= rare.replica.bytes
    return chosen


def outdated(kept: Iterable[Replica], newest: Mapping[int, Replica]) -> list[Replica]:
    """Copies that are not the newest accepted checkpoint of their shard any more."""
    return [replica for replica in kept if replica.shard in newest and newest[replica.shard].checkpoint != replica.checkpoint]


@lru_cache(maxsize=1 << 15)
def point(run: str, kind: str, name: str) -> int:
    """Position of a peer or shard on the run's ring. The peers of one bucket of node records are neighbours.

    All peers must agree on it, so the hashed text stays as it is.
    """
    position = int.from_bytes(hashlib.sha256(f"{run}|seeding|{kind}|{name}".encode()).digest()[:8], "big")
    return node_bucket(name) * _ARC + position % _ARC if kind == "peer" else position
