"""Which shards a standby watches: each shard is watched by a few standbys, however many there are. Pure.

Standbys and shards have positions on a ring (consistent hashing, Karger and others 1997). The next STEADY standbys after a shard
watch it for as long as they stay, so that they see a stalled claim long enough to ignore it (`protocol.stalled_claims`).
CHANGING more watch it for one lease each, so that no shard depends on a few nodes that do not fit it or that lie. If there are
at most STEADY standbys, each watches every shard.

Lanes of unlike shares need nodes of unlike speed: a standby watches a lane only if it is fast enough by its own record.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from lutetia.node.runtime.replication_policy import FREE, point
from lutetia.protocol.schema.records import NODE_BUCKETS, NodeRecord, node_bucket

STEADY = CHANGING = 8
FULL_PACE = 500
"""Up to this many node records are read twice per lease; more are read less often, so that the bytes do not grow."""
WAVES = (1, 3, NODE_BUCKETS - 4)
"""How many buckets of node records are read at a time until enough standbys are known."""


def free_rate(node: NodeRecord) -> float:
    """Samples per second of the node's fastest device that could take a shard; 0: none could."""
    if node.devices:
        return max([device.samples_per_second for device in node.devices if device.state in FREE], default=0.0)
    return node.samples_per_second if node.state in FREE else 0.0


def is_standby(node: NodeRecord) -> bool:
    """Whether the node could take a shard: it has none, or a device of it has none, and an expert of the run works on it."""
    return free_rate(node) > 0


def assign_shards(
    run: str, standbys: Mapping[str, float], slots: Mapping[int, float], lease_number: int
) -> dict[str, frozenset[int]]:
    """Public key -> the shards that it watches.

    Args:
        run: the run's id.
        standbys: samples per second of each, by public key.
        slots: what can be claimed, the numbers of the shards or of their lanes (`protocol.claims.slots_of`), with the samples per
            second that each needs.
        lease_number: changes every lease, and with it the CHANGING watchers.
    """
    ring = sorted((point(run, "peer", owner), owner) for owner in standbys)
    watched: dict[str, set[int]] = {owner: set() for owner in standbys}
    alike: dict[float, list[int]] = {}
    for slot, need in slots.items():
        alike.setdefault(need, []).append(slot)
    for need, group in alike.items():
        fit = [(place, owner) for place, owner in ring if standbys[owner] >= need]
        if len(fit) <= STEADY:
            for _, owner in fit:
                watched[owner].update(group)
        else:
            _assign(run, fit, group, lease_number, watched)
    return {owner: frozenset(own) for owner, own in watched.items()}


def _assign(
    run: str, ring: Sequence[tuple[int, str]], slots: Iterable[int], lease_number: int, watched: Mapping[str, set[int]]
) -> None:  # fmt: skip
    """Add each slot to what the standbys after it on the ring watch."""
    places = [place for place, _ in ring]
    for count, suffix in ((STEADY, ""), (CHANGING, f" in turn {lease_number}")):
        after: list[list[int]] = [[] for _ in ring]
        for shard in slots:
            after[bisect_left(places, point(run, "shard", f"{shard}{suffix}")) % len(ring)].append(shard)
        for first, shards in enumerate(after):
            for place in range(first, first + count):
                watched[ring[place % len(ring)][1]].update(shards)


def buckets_before(owner: str) -> list[int]:
    """All buckets of node records, from `owner`'s own backwards on the ring."""
    own = node_bucket(owner)
    return [(own - step) % NODE_BUCKETS for step in range(NODE_BUCKETS)]


def has_enough_standbys(run: str, owner: str, nodes: Iterable[NodeRecord]) -> bool:
    """Whether `nodes`, from `owner`'s bucket and some before it, include enough standbys before `owner`.

    Nodes farther away affect neither the shards that it watches nor the copies that it keeps (`replication_policy`). Where lanes
    need unlike speeds, some of them are too slow for what it watches, so that it watches a few lanes more than it has to.
    """
    own, place = node_bucket(owner), point(run, "peer", owner)
    before = sum(
        is_standby(node) and (node_bucket(node.owner) != own or point(run, "peer", node.owner) < place) for node in nodes
    )
    return before >= STEADY


def shards_to_watch(
    run: str, owner: str, nodes: Sequence[NodeRecord], slots: Mapping[int, float], lease_number: int
) -> frozenset[int] | None:
    """The shards that `owner` watches; None means all, while `nodes` do not show it as a standby.

    Empty if no expert of the run works on its machine. `nodes`: all, or as many as `has_enough_standbys` needs.
    """
    own = next((node for node in nodes if node.owner == owner), None)
    if own is None or not (own.state in FREE or is_standby(own)):
        return None
    standbys = {node.owner: rate for node in nodes if (rate := free_rate(node)) > 0}
    return assign_shards(run, standbys, slots, lease_number).get(owner, frozenset())


def read_interval_factor(records: float) -> float:
    """How many half leases to wait between two reads of that many node records."""
    return max(1.0, records / FULL_PACE)


def read_pause(lease: float, records: float = 0.0) -> float:
    """Seconds until the next read of the node records, after a read of that many."""
    return lease / 2 * read_interval_factor(records)


def watch_until(now: float, pause: float) -> float:
    """Until when the shards to watch stay valid that were read at `now`: one read may fail."""
    return now + 2 * pause
