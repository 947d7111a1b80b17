"""Scenario: a coordinator that lends its checks, and nodes among those that check that lie, are silent or slow."""

from __future__ import annotations

from random import Random

from lutetia.coordinator.ledger.events import CheckerRefuted, CheckpointAccepted, ResultSeen
from lutetia.simulation.config import SimulationConfig
from lutetia.simulation.faults.step import Step
from lutetia.simulation.scenarios.scenario import Scenario, all_held, caught, joins
from lutetia.simulation.world import SimulatedWorld

LONGEST, LONG = 1200.0, 400.0
"""A loan that nothing comes of is counted on for 600 seconds. So a shard may be without an acceptance for LONGEST seconds, and
longer than LONG but once: whoever let a loan go by is not counted on again."""
_POLICIES = ("honest", "praises", "blames", "silent", "slow")


def _plan(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """Node 0 takes a shard and offers what is no checkpoint. Of four others one each lies, is silent or slow when it checks."""
    late = [Step(step.at + 30, step.action, step.nodes) for step in joins(config, peers, rng) if step.nodes != (0,)]
    checkers = rng.sample(range(1, peers), len(_POLICIES) - 1)
    lies = [Step(0.0, "checks", (index,), detail=policy) for index, policy in zip(checkers, _POLICIES[1:], strict=True)]
    return [
        Step(0.0, "behaviour", (0,), detail=rng.choice(("not-a-number", "wrong-shapes"))),
        *lies,
        Step(0.0, "join", (0,)),
        *late,
    ]


def never_stalls(world: SimulatedWorld) -> str | None:
    """No shard with work left is without an acceptance for longer than LONGEST, nor more than once longer than LONG.

    From the first sound result on: before that a shard may be held by a node that trains what is no checkpoint.
    """
    times: dict[int, list[float]] = {shard: [] for shard in range(world.config.shards)}
    for event in world.coordinators[0].ledger:
        match event:
            case ResultSeen(record=record) if not times[record.shard] and world.blobs.contents[record.digest].sound:
                times[record.shard].append(event.time - world.queue.now + world.now)
            case CheckpointAccepted(acceptance=given):
                times[given.shard].append(event.time - world.queue.now + world.now)
            case _:
                pass
    gaps = []
    for shard, moments in times.items():
        if world.invariants.heads[shard] < world.manifest.epochs:
            moments[:] = [*(moments or [world.config.join_within]), world.now]
        gaps += [after - before for before, after in zip(moments, moments[1:], strict=False) if after - before > LONG]
    if max(gaps, default=0.0) > LONGEST:
        return f"a shard was without an acceptance for {max(gaps):.0f} s"
    return f"shards were without an acceptance for {[round(gap) for gap in gaps]} s" if len(gaps) > 1 else None


def only_sound(world: SimulatedWorld) -> str | None:
    """Nothing that is no checkpoint was accepted, however one of the checkers praised it."""
    for event in world.coordinators[0].ledger:
        if isinstance(event, CheckpointAccepted) and not world.blobs.contents[event.acceptance.checkpoint].sound:
            return f"epoch {event.acceptance.epoch} of shard {event.acceptance.shard} was accepted, and is no checkpoint"
    return None


def liars_alone_are_found(world: SimulatedWorld) -> str | None:
    """A liar is written down, and no honest checker is."""
    liars = {peer.machine.owner for peer in world.nodes if peer.checker.policy in ("praises", "blames")}
    found = {event.owner for event in world.coordinators[0].ledger if isinstance(event, CheckerRefuted)}
    if found - liars:
        return f"{len(found - liars)} honest checkers were written down as liars"
    return None if found else "no liar was found"


LENT_SCENARIOS = (
    Scenario(
        "lent",
        "the coordinator lends its checks; of the nodes that check two lie, one is silent, one is slow",
        11,
        _plan,
        seconds=2400,
        peers=10,
        config=SimulationConfig(shards=2, epochs=100, lent=True),
        ends=(all_held, caught, only_sound, liars_alone_are_found, never_stalls),
        min_peers=9,
    ),
)
