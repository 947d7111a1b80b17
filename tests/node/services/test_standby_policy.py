"""Each shard is watched by a few standbys, and all readers assign the same shards."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lutetia.node.services.standby_policy import (
    CHANGING,
    FULL_PACE,
    STEADY,
    assign_shards,
    buckets_before,
    has_enough_standbys,
    is_standby,
    read_interval_factor,
    shards_to_watch,
)
from lutetia.protocol.schema.identity import Identity
from lutetia.protocol.schema.records import NODE_BUCKETS, DeviceEntry, Hardware, NodeRecord, NodeState, node_bucket

RUN = "ab" * 32
PEER = Identity.derived("any peer").peer_id


def node(number: int, state: NodeState = "idle", rate: float = 1.0) -> NodeRecord:
    return NodeRecord(
        run=RUN, owner=f"{number:064x}", issued=0.0, peer_id=PEER, hardware=Hardware(device="cpu", memory_bytes=1, cores=1),
        samples_per_second=rate, software="0", state=state,
    )  # fmt: skip


def standbys(count: int) -> dict[str, float]:
    return {node(number).owner: 1.0 for number in range(count)}


def slots(count: int) -> dict[int, float]:
    """Shards that any node may train."""
    return dict.fromkeys(range(count), 0.0)


def test_few_standbys_watch_all_shards():
    assert assign_shards(RUN, standbys(STEADY), slots(5), 0) == dict.fromkeys(standbys(STEADY), frozenset(range(5)))


@settings(max_examples=25)
@given(st.integers(1, 200), st.integers(0, 200), st.integers(0, 9))
def test_lanes_are_watched_by_nodes_that_are_fast_enough(slow: int, fast: int, lease_number: int):
    rates = {owner: 1.0 if number < slow else 2.0 for number, owner in enumerate(standbys(slow + fast))}
    lanes = {0: 0.5, 4096: 1.5, 8192: 1.5, 12288: 3.0}
    assigned = assign_shards(RUN, rates, lanes, lease_number)
    watchers = {lane: [owner for owner, watched in assigned.items() if lane in watched] for lane in lanes}
    assert all(rates[owner] >= need for lane, need in lanes.items() for owner in watchers[lane])
    assert len(watchers[0]) >= min(STEADY, slow + fast)
    assert all(STEADY + CHANGING >= len(watchers[lane]) >= min(STEADY, fast) for lane in (4096, 8192))
    assert watchers[12288] == []


@settings(max_examples=25)
@given(st.integers(STEADY + 1, 300), st.integers(1, 40), st.integers(0, 1000))
def test_every_shard_has_the_same_number_of_watchers(count: int, shards: int, lease_number: int):
    assigned = assign_shards(RUN, standbys(count), slots(shards), lease_number)
    for shard in range(shards):
        assert STEADY <= sum(shard in watched for watched in assigned.values()) <= STEADY + CHANGING


def test_half_of_the_watchers_stay_and_half_change():
    first, second = (assign_shards(RUN, standbys(300), slots(10), lease_number) for lease_number in (1, 2))
    for shard in range(10):
        early, late = ({owner for owner, watched in found.items() if shard in watched} for found in (first, second))
        assert len(early & late) >= STEADY
        assert early != late


@settings(max_examples=25)
@given(st.sets(st.integers(0, 2000), min_size=1, max_size=150), st.integers(0, 9), st.data())
def test_reading_only_earlier_buckets_gives_the_same_shards(numbers: set[int], lease_number: int, data: st.DataObject):
    states: st.SearchStrategy[NodeState] = st.sampled_from(["idle", "claiming", "training", "paused"])
    nodes = [node(number, data.draw(states), data.draw(st.sampled_from([0.0, 1.0, 1.0]))) for number in sorted(numbers)]
    own = data.draw(st.sampled_from(nodes))
    order, read = buckets_before(own.owner), []
    assert sorted(order) == list(range(NODE_BUCKETS))
    for bucket in order:
        read += [other for other in nodes if node_bucket(other.owner) == bucket]
        if has_enough_standbys(RUN, own.owner, read):
            break
    assert shards_to_watch(RUN, own.owner, read, slots(12), lease_number) == shards_to_watch(
        RUN, own.owner, nodes, slots(12), lease_number
    )


def test_node_not_listed_as_free_watches_all_shards():
    assert shards_to_watch(RUN, node(1).owner, [node(1, "training"), *(node(n) for n in range(2, 40))], slots(6), 0) is None


def test_node_with_a_free_device_is_a_standby_while_another_trains():
    entries = tuple(
        DeviceEntry(device=f"cuda:{number}", state=state, samples_per_second=1.0)
        for number, state in enumerate(("training", "idle"))
    )
    busy = node(0, "training").model_copy(update={"devices": entries})
    assert is_standby(busy)
    assert shards_to_watch(RUN, busy.owner, [busy], slots(3), 0) == frozenset({0, 1, 2})
    assert not is_standby(busy.model_copy(update={"devices": entries[:1]}))


def test_node_without_a_working_expert_watches_nothing():
    unfit, others = node(1, rate=0.0), [node(number) for number in range(2, 40)]
    assert shards_to_watch(RUN, unfit.owner, [unfit, *others], slots(6), 0) == frozenset()
    for other in others:
        assert shards_to_watch(RUN, other.owner, [unfit, *others], slots(6), 0) == shards_to_watch(
            RUN, other.owner, others, slots(6), 0
        )


def test_large_swarm_is_read_less_often():
    assert read_interval_factor(10) == read_interval_factor(FULL_PACE) == 1
    assert read_interval_factor(4 * FULL_PACE) == 4
