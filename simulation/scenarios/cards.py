"""Scenario: nodes with several devices, each of which trains a lane of its own under the node's one identity."""

from __future__ import annotations

from collections import Counter
from random import Random

from lutetia.protocol.claims import slot_name
from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.simulation.config import SimulationConfig
from lutetia.simulation.faults.step import Step
from lutetia.simulation.scenarios.scenario import Scenario, advanced, joins
from lutetia.simulation.world import SimulatedWorld


def _plan(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """A node of four devices dies and comes back, one loses a device for a while, one is paused, one sleeps."""
    steps = joins(config, peers, rng)
    many = [index for index in range(peers) if config.devices[index % len(config.devices)] > 1]
    dying, losing, resting, sleeping = (many[number % len(many)] for number in range(4))
    died = rng.uniform(150, 300)
    steps += [Step(died, "kill", (dying,)), Step(died + rng.uniform(5, 150), "join", (dying,))]
    lost = rng.uniform(350, 500)
    steps += [Step(lost, "device lost", (losing,)), Step(lost + rng.uniform(20, 120), "device back", (losing,))]
    steps += [Step(rng.uniform(500, 600), "pause", (resting,), value=rng.uniform(20, 200))]
    slept = rng.uniform(700, 800)
    return [*steps, Step(slept, "stop", (sleeping,)), Step(slept + rng.uniform(70, 150), "continue", (sleeping,))]


def each_device_works(world: SimulatedWorld) -> str | None:
    """Every fit device has a lane of its own, as long as there are enough of them, and no identity holds a lane twice."""
    held = [peer.state.work.shard for peer in world.nodes if peer.running and peer.state.work and peer.state.work.owned]
    if twice := [slot for slot, count in Counter(held).items() if count > 1]:
        return f"{slot_name(twice[0])} has several holders"
    able = sum(peer.answering and any(peer.state.fitness.values()) for peer in world.nodes)
    least = min(able, len(world.config.slots))
    return None if len(held) >= least else f"{len(held)} devices have work, fewer than {least}"


def several_leases(world: SimulatedWorld) -> str | None:
    """The coordinator sees one identity with a lease for each of its devices that is fast enough for some lane."""
    claims = Counter(claim.record.owner for claim in world.coordinators[0].view.claims)
    devices = max(sum(any(device.state.fitness.values()) for device in peer.devices) for peer in world.nodes)
    most = max(claims.values(), default=0)
    return None if most == devices else f"the most leases of one identity are {most}, not {devices}"


CARD_SCENARIOS = (
    Scenario(
        "cards",
        "nodes with one, four and two devices, one lease each: one dies, one loses a device, one is paused, one sleeps",
        0,
        _plan,
        seconds=1200,
        peers=6,
        config=SimulationConfig(shards=3, epochs=60, devices=(1, 4, 2), team=TeamSpec(lanes=5, quorum=0.6, deadline=120.0)),
        ends=(each_device_works, several_leases, advanced(0.3)),
        min_peers=3,
    ),
)
