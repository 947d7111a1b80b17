"""Which shards a standby looks after: each shard is looked at by a few standbys, however many there are. Pure.

Standbys are placed on a ring by their names, shards by theirs (consistent hashing, Karger and others 1997). Of each shard the
next STEADY standbys are in charge for as long as they stay, so that somebody sees a claim that does no work long enough to pass
it over (`protocol.stalled_claims`); and CHANGING more, other ones every lease, so that no shard depends on a few boxes that do
not
fit it, or that lie. Where there are no more standbys than STEADY, each looks after every shard.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from lutetia.node.runtime.replication_policy import FREE, point
from lutetia.protocol.schema.records import NODE_BUCKETS, NodeRecord, node_bucket

STEADY = CHANGING = 8
FULL_PACE = 500
"""Node records of which a peer reads up to so many twice per lease; more, less often, so that the bytes do not grow."""
WAVES = (1, 3, NODE_BUCKETS - 4)
"""How many buckets of node records are read at a time, while too few standbys are known."""


def stands_by(node: NodeRecord) -> bool:
    """Whether it could take a shard: it has none, and some expert of the run works on it."""
    return node.state in FREE and node.samples_per_second > 0


def duties(run: str, standbys: Iterable[str], shards: int, turn: int) -> dict[str, frozenset[int]]:
    """Public key -> the shards that it looks after in `turn` (a number that changes every lease)."""
    ring = sorted((point(run, "peer", owner), owner) for owner in standbys)
    found: dict[str, set[int]] = {owner: set() for _, owner in ring}
    if len(ring) <= STEADY:
        return dict.fromkeys(found, frozenset(range(shards)))
    for shard in range(shards):
        for count, name in ((STEADY, str(shard)), (CHANGING, f"{shard} in turn {turn}")):
            first = bisect_left(ring, (point(run, "shard", name), ""))
            for place in range(first, first + count):
                found[ring[place % len(ring)][1]].add(shard)
    return {owner: frozenset(held) for owner, held in found.items()}


def buckets_before(owner: str) -> list[int]:
    """All buckets of node records, from `owner`'s own backwards on the ring."""
    own = node_bucket(owner)
    return [(own - step) % NODE_BUCKETS for step in range(NODE_BUCKETS)]


def enough(run: str, owner: str, nodes: Iterable[NodeRecord]) -> bool:
    """Whether `nodes`, of `owner`'s bucket and of some before it, show enough standbys before it.

    Those farther off are of no consequence to its duties, nor to the copies that it keeps (`seeding`).
    """
    own, place = node_bucket(owner), point(run, "peer", owner)
    before = sum(stands_by(node) and (node_bucket(node.owner) != own or point(run, "peer", node.owner) < place) for node in nodes)
    return before >= STEADY


def own_duty(run: str, owner: str, nodes: Sequence[NodeRecord], shards: int, turn: int) -> frozenset[int] | None:
    """The shards that `owner` looks after; `nodes` are `enough` or all. None, for all shards, while they do not show it free.

    None at all where no expert of the run works on its box.
    """
    own = next((node for node in nodes if node.owner == owner), None)
    if own is None or own.state not in FREE:
        return None
    return duties(run, [node.owner for node in nodes if stands_by(node)], shards, turn).get(owner, frozenset())


def pace(records: float) -> float:
    """How many times longer than half a lease one waits before reading that many node records again."""
    return max(1.0, records / FULL_PACE)
