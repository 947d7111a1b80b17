"""A simulated swarm over some minutes: takeovers in time, few claims of many joiners, partitions."""

from __future__ import annotations

import random

import pytest

from lutetia.protocol.schema.records import claim_key
from lutetia.simulation.config import SimulationConfig
from lutetia.simulation.event_queue import START
from lutetia.simulation.world import SimulatedWorld

LEASE = 60.0


def started(seed: int, peers: int, shards: int, epochs: int, within: float = 1.0) -> SimulatedWorld:
    world = SimulatedWorld(SimulationConfig(shards=shards, epochs=epochs), peers, seed, strict=False)
    rng = random.Random(seed)
    for peer in world.nodes:
        world.queue.after(rng.uniform(0, within), peer.start)
    return world


def run(world: SimulatedWorld, seconds: float) -> None:
    world.queue.run(START + world.now + seconds)


def holder_counts(world: SimulatedWorld) -> dict[int, int]:
    return {shard: len(held) for shard, held in world.holders().items()}


@pytest.mark.parametrize("seed", range(3))
def test_shard_of_a_killed_node_is_taken_over_in_time(seed: int) -> None:
    world = started(seed, peers=5, shards=3, epochs=50)
    run(world, 200)
    victim = next(peer for peer in world.nodes if peer.state.work)
    assert victim.state.work
    shard = victim.state.work.shard
    victim.kill()
    run(world, LEASE + 5)
    assert holder_counts(world).get(shard) == 1
    reached = world.invariants.heads[shard]
    run(world, 240)
    assert world.invariants.heads[shard] > reached


def test_thousand_joiners_make_few_claims_per_shard() -> None:
    world = started(7, peers=1000, shards=8, epochs=90)
    run(world, 20)
    assert holder_counts(world) == dict.fromkeys(range(8), 1)
    for shard in range(8):
        key = claim_key(world.manifest.run_id, shard)
        claimants = {owner for peer in world.nodes for owner in peer.parts.get(key, {})}
        assert len(claimants) <= 30
    for held in list(world.holders().values()):
        held[0].kill()
    run(world, LEASE + 5)
    assert holder_counts(world) == dict.fromkeys(range(8), 1)


def test_partitioned_swarm_keeps_one_lineage() -> None:
    world = started(2, peers=8, shards=2, epochs=50)
    run(world, 120)
    reached = list(world.invariants.heads)
    holders = [held[0].index for held in world.holders().values()]
    world.links.partition([[index for index in range(8) if index not in holders]])  # the holders stay with the coordinator
    twice = set[int]()
    for _ in range(12):  # the others cannot fetch the newest checkpoints: they claim, give up and claim again
        run(world, LEASE / 4)
        twice |= {shard for shard, count in holder_counts(world).items() if count == 2}
    assert twice == {0, 1}
    world.links.heal()
    run(world, 2 * LEASE)
    assert holder_counts(world) == {0: 1, 1: 1}
    assert all(later > earlier for earlier, later in zip(reached, world.invariants.heads, strict=True))
