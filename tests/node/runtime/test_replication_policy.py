"""Which peers keep copies of accepted checkpoints: as many as needed, the same for all readers, with successors."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lutetia.node.runtime.replication_policy import (
    COPIES_WANTED,
    RANKS_CHECKED,
    PeerRing,
    Replica,
    UnderReplicated,
    affordable,
    outdated,
)
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.model.blob_ref import BlobRef
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


def replica(shard: int = 0, epoch: int = 1, size: int = 100) -> Replica:
    refs = [BlobRef(digest=f"{shard:02d}{epoch:02d}{kind}".ljust(64, "0"), size=size) for kind in "12"]
    return Replica(shard=shard, epoch=epoch, checkpoint=f"{shard:032x}{epoch:032x}", weights=refs[0], state=refs[1])


def rare(holders: set[str], waited: float, shard: int = 0) -> UnderReplicated:
    return UnderReplicated(replica(shard), frozenset(holders), NOW - waited)


def due(nodes: list[NodeRecord], found: UnderReplicated) -> set[str]:
    ring = PeerRing(RUN, nodes)
    return {peer.owner for peer in nodes if ring.is_due(peer.owner, found, NOW, HEARTBEAT)}


STATES = st.sampled_from(["idle", "claiming", "training", "publishing", "paused", "draining", "left", "joining"])


@given(st.lists(STATES, min_size=1, max_size=30), st.integers(0, 3), st.integers(0, 7), st.randoms())
def test_as_many_peers_fetch_as_copies_are_missing(states: list[NodeState], held: int, shard: int, random):
    nodes = [node(index, state) for index, state in enumerate(states)]
    fit = {peer.owner for peer in nodes if peer.state not in ("draining", "left", "joining")}
    holders = {peer.owner for peer in random.sample(nodes, min(held, len(nodes)))}
    found = due(nodes, rare(holders, HEARTBEAT, shard))
    assert len(found) == min(max(0, COPIES_WANTED - len(holders)), len(fit - holders))
    assert found <= fit - holders
    free = {peer.owner for peer in nodes if peer.state in ("idle", "claiming")} - holders
    assert found <= free or free <= found, "nodes that train come after standbys"
    random.shuffle(nodes)
    assert due(nodes, rare(holders, HEARTBEAT, shard)) == found, "the order of the records does not matter"


def test_no_peer_fetches_before_the_author_can_announce():
    nodes = [node(index) for index in range(5)]
    assert due(nodes, rare(set(), HEARTBEAT - 1)) == set()
    assert len(due(nodes, rare(set(), HEARTBEAT))) == COPIES_WANTED


def test_next_peer_is_due_when_the_first_cannot():
    nodes = [node(index) for index in range(8)]
    order = list(PeerRing(RUN, nodes).order(0))
    for leases in range(4):
        assert due(nodes, rare(set(), HEARTBEAT + leases * 3 * HEARTBEAT)) == set(order[: COPIES_WANTED + leases])


def test_peer_looks_only_at_shards_it_may_have_to_keep():
    nodes = [node(index) for index in range(40)]
    ring, shards = PeerRing(RUN, nodes), 200
    looks = {peer.owner: ring.shards_to_check(peer.owner, shards) for peer in nodes}
    assert sum(map(len, looks.values())) == RANKS_CHECKED * shards
    for shard in range(0, shards, 9):
        for owner in due(nodes, rare(set(), HEARTBEAT, shard)):
            assert shard in looks[owner]


def test_shards_spread_over_the_peers():
    nodes = [node(index) for index in range(40)]
    ring = PeerRing(RUN, nodes)
    first = [next(ring.order(shard)) for shard in range(400)]
    assert len(set(first)) > 25
    assert max(first.count(owner) for owner in set(first)) < 80


def test_small_disk_keeps_the_rarest_copies():
    rarest, common = rare(set(), 0.0, 1), rare({KEYS[0]}, 0.0, 2)
    assert affordable([common, rarest], 400) == [rarest.replica, common.replica]
    assert affordable([common, rarest], 399) == [rarest.replica]
    assert affordable([common, rarest], 0) == []


def test_copy_is_outdated_by_a_newer_checkpoint():
    kept = [replica(0, 1), replica(1, 4), replica(2, 9)]
    assert outdated(kept, {0: replica(0, 2), 1: replica(1, 4)}) == [kept[0]]
