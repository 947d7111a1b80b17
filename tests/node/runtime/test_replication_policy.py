"""Who keeps copies of accepted checkpoints: the right few, all of one mind, and somebody else when they cannot."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lutetia.node.runtime.replication_policy import LOOKED_AT, WANTED, PeerRing, Replica, UnderReplicated, affordable, outdated
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.manifest import BlobRef
from lutetia.protocol.schema.records import Hardware, NodeRecord, NodeState

RUN = "ab" * 32
HEARTBEAT, NOW = 20.0, 1_800_000_000.0
KEYS = [f"{index:064x}" for index in range(40)]
PEER = Identity.derived("any peer").peer_id


def node(index: int, state: NodeState = "idle") -> NodeRecord:
    return NodeRecord(
        run=RUN, owner=KEYS[index], issued=NOW, peer_id=PEER, hardware=Hardware(device="cpu", memory_bytes=1, cores=1),
        samples_per_second=1.0, software="0", state=state,
    )  # fmt: skip


def seed(shard: int = 0, epoch: int = 1, size: int = 100) -> Replica:
    refs = [BlobRef(digest=f"{shard:02d}{epoch:02d}{kind}".ljust(64, "0"), size=size) for kind in "12"]
    return Replica(shard=shard, epoch=epoch, checkpoint=f"{shard:032x}{epoch:032x}", weights=refs[0], state=refs[1])


def thin(holders: set[str], waited: float, shard: int = 0) -> UnderReplicated:
    return UnderReplicated(seed(shard), frozenset(holders), NOW - waited)


def due(nodes: list[NodeRecord], found: UnderReplicated) -> set[str]:
    ring = PeerRing(RUN, nodes)
    return {peer.owner for peer in nodes if ring.is_due(peer.owner, found, NOW, HEARTBEAT)}


STATES = st.sampled_from(["idle", "claiming", "training", "publishing", "paused", "draining", "left", "joining"])


@given(st.lists(STATES, min_size=1, max_size=30), st.integers(0, 3), st.integers(0, 7), st.randoms())
def test_as_many_peers_fetch_as_copies_are_missing(states: list[NodeState], held: int, shard: int, random):
    nodes = [node(index, state) for index, state in enumerate(states)]
    fit = {peer.owner for peer in nodes if peer.state not in ("draining", "left", "joining")}
    holders = {peer.owner for peer in random.sample(nodes, min(held, len(nodes)))}
    found = due(nodes, thin(holders, HEARTBEAT, shard))
    assert len(found) == min(max(0, WANTED - len(holders)), len(fit - holders))
    assert found <= fit - holders
    free = {peer.owner for peer in nodes if peer.state in ("idle", "claiming")} - holders
    assert found <= free or free <= found, "who trains is asked only when nobody else is left"
    random.shuffle(nodes)
    assert due(nodes, thin(holders, HEARTBEAT, shard)) == found, "all are of one mind, whatever order they see"


def test_no_peer_fetches_before_the_author_can_announce():
    nodes = [node(index) for index in range(5)]
    assert due(nodes, thin(set(), HEARTBEAT - 1)) == set()
    assert len(due(nodes, thin(set(), HEARTBEAT))) == WANTED


def test_next_peer_is_due_when_the_first_cannot():
    nodes = [node(index) for index in range(8)]
    order = list(PeerRing(RUN, nodes).order(0))
    for leases in range(4):
        assert due(nodes, thin(set(), HEARTBEAT + leases * 3 * HEARTBEAT)) == set(order[: WANTED + leases])


def test_peer_looks_only_at_shards_it_may_have_to_keep():
    nodes = [node(index) for index in range(40)]
    ring, shards = PeerRing(RUN, nodes), 200
    looks = {peer.owner: ring.looked_at(peer.owner, shards) for peer in nodes}
    assert sum(map(len, looks.values())) == LOOKED_AT * shards
    for shard in range(0, shards, 9):
        for owner in due(nodes, thin(set(), HEARTBEAT, shard)):
            assert shard in looks[owner]


def test_shards_spread_over_the_peers():
    nodes = [node(index) for index in range(40)]
    ring = PeerRing(RUN, nodes)
    first = [next(ring.order(shard)) for shard in range(400)]
    assert len(set(first)) > 25
    assert max(first.count(owner) for owner in set(first)) < 80


def test_small_disk_keeps_the_rarest_copies():
    rare, common = thin(set(), 0.0, 1), thin({KEYS[0]}, 0.0, 2)
    assert affordable([common, rare], 400) == [rare.seed, common.seed]
    assert affordable([common, rare], 399) == [rare.seed]
    assert affordable([common, rare], 0) == []


def test_copy_is_outdated_by_a_newer_checkpoint():
    kept = [seed(0, 1), seed(1, 4), seed(2, 9)]
    assert outdated(kept, {0: seed(0, 2), 1: seed(1, 4)}) == [kept[0]]
