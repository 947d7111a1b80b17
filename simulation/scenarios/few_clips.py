"""Scenarios: runs of honest nodes on 20 to 60 clips at default settings, where few held-out clips decide over results."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from lutetia.coordinator.ledger.events import CheckpointAccepted
from lutetia.simulation.config import SimulationConfig
from lutetia.simulation.faults.step import Step
from lutetia.simulation.scenarios.scenario import Scenario, joins
from lutetia.simulation.world import SimulatedWorld

LONGEST_GAP = 5
"""A shard may be without acceptance for so many times its pace."""
_EPOCHS = 20
"""As many as by default: 64,000 samples in intervals of 3,200."""
_SECONDS = 6000.0
"""Half as long again as 20 epochs take the slowest machine of 1,000 seeds, so that a slow run ends, too."""


def gaps(world: SimulatedWorld) -> Iterator[tuple[int, float]]:
    """(shard, time without an acceptance in multiples of its pace), for each time from one acceptance to the next.

    A shard's pace is the time of an epoch on the slowest machine that is online. The first time begins when all have joined, the
    last one ends with the run.
    """
    config = world.config
    times = {shard: [config.join_within] for shard in range(config.shards)}
    for event in world.coordinators[0].ledger:
        if isinstance(event, CheckpointAccepted):
            times[event.acceptance.shard].append(event.time - world.queue.now + world.now)
    pace = config.epoch_seconds / min(peer.machine.speed for peer in world.nodes)
    for shard, moments in times.items():
        if world.invariants.heads[shard] < world.manifest.epochs:
            moments.append(world.now)
        yield from ((shard, (after - before) / pace) for before, after in zip(moments, moments[1:], strict=False))


def all_accepted(world: SimulatedWorld) -> bool:
    return all(head >= world.manifest.epochs for head in world.invariants.heads)


def never_stands_still(world: SimulatedWorld) -> str | None:
    shard, longest = max(gaps(world), key=lambda gap: gap[1])
    if longest <= LONGEST_GAP:
        return None
    return f"shard {shard} was without acceptance for {longest:.1f} times its pace"


def _plan(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    return joins(config, peers, rng)


FEW_CLIP_SCENARIOS = (
    Scenario(
        "few-clips",
        "three honest nodes on two shards with one to six held-out clips each",
        0,
        _plan,
        seconds=_SECONDS,
        peers=3,
        config=SimulationConfig(shards=2, epochs=_EPOCHS, held_out_clips=(1, 6)),
        ends=(never_stands_still,),
    ),
    Scenario(
        "few-clips-alone",
        "one honest node on one shard with one to six held-out clips",
        0,
        _plan,
        seconds=_SECONDS,
        peers=1,
        config=SimulationConfig(shards=1, epochs=_EPOCHS, held_out_clips=(1, 6)),
        ends=(never_stands_still,),
    ),
)
