"""All scenarios by name: one or more for each fault, a calm run, and everything at once."""

from __future__ import annotations

from random import Random

from lutetia.protocol.schema.model.team_spec import TeamSpec
from lutetia.simulation.config import SimulationConfig
from lutetia.simulation.faults.step import Step
from lutetia.simulation.scenarios.adversaries import ADVERSARY_SCENARIOS
from lutetia.simulation.scenarios.cards import CARD_SCENARIOS
from lutetia.simulation.scenarios.few_clips import FEW_CLIP_SCENARIOS
from lutetia.simulation.scenarios.lent import LENT_SCENARIOS
from lutetia.simulation.scenarios.links import LINK_SCENARIOS
from lutetia.simulation.scenarios.machines import MACHINE_SCENARIOS
from lutetia.simulation.scenarios.scenario import Scenario, advanced, all_held, caught, completed, joins, no_double_work
from lutetia.system.errors import UsageError

NOT_SIMULATED = {
    19: "a file lock and a port keep two daemons on one machine apart; only a real machine has these",
}
"""Faults that need a real machine, and why."""


def _calm(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    return joins(config, peers, rng)


def _late(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    return [Step(300.0, "join", (index,)) for index in range(peers)]


def _herd(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    return joins(config, peers, rng, within=1.0)


def _crowd(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """An ordinary hour of a large swarm: a node dies every two hours on average, and is back ten minutes later."""
    steps = joins(config, peers, rng)
    for index in range(peers):
        at = rng.expovariate(1 / 7200)
        while at < 3600:
            steps += [Step(at + 60, "kill", (index,)), Step(at + 60 + rng.expovariate(1 / 600), "join", (index,))]
            at += 700 + rng.expovariate(1 / 7200)
    return steps


def _chaos(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """Once a minute a random fault hits a random node, until a quarter of an hour before the end."""
    steps, cut = joins(config, peers, rng), False
    for minute in range(2, 45):
        at, node = 60.0 * minute + rng.uniform(0, 50), rng.randrange(1, peers)
        kind = rng.choice(
            ("kill", "stop", "pause", "trainer fails", "network process dies", "disk full", "device lost", "cut", "coordinator")
        )
        if kind == "kill":
            steps += [Step(at, "kill", (node,)), Step(at + rng.uniform(5, 200), "join", (node,))]
        elif kind == "stop":
            steps += [Step(at, "stop", (node,)), Step(at + rng.uniform(5, 150), "continue", (node,))]
        elif kind == "pause":
            steps.append(Step(at, "pause", (node,), value=rng.uniform(5, 120)))
        elif kind == "trainer fails":
            steps.append(Step(at, "trainer fails", (node,), detail=rng.choice(("crash", "out-of-memory", "bad-state"))))
        elif kind == "network process dies":
            steps.append(Step(at, "network process dies", (node,)))
        elif kind == "disk full":
            steps += [Step(at, "disk full", (node,)), Step(at + rng.uniform(5, 100), "disk free", (node,))]
        elif kind == "device lost":
            steps += [Step(at, "device lost", (node,)), Step(at + rng.uniform(5, 100), "device back", (node,))]
        elif kind == "cut" and not cut:
            half = tuple(sorted(rng.sample(range(peers), peers // 2)))
            steps += [Step(at, "partition", half, detail=rng.choice(("", "with"))), Step(at + rng.uniform(20, 150), "heal")]
        elif kind == "coordinator":
            steps += [Step(at, "coordinator crashes"), Step(at + rng.uniform(2, 100), "coordinator starts")]
    return steps


def _team(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """The liar joins first and so has a lane; the killed node comes back."""
    late = [Step(step.at + 30, step.action, step.nodes) for step in joins(config, peers, rng) if step.nodes != (0,)]
    faults = [Step(0.0, "behaviour", (0,), detail="untrained"), Step(400.0, "kill", (1,)), Step(700.0, "join", (1,))]
    return [Step(0.0, "join", (0,)), *late, *faults]


SCENARIOS: dict[str, Scenario] = {
    scenario.name: scenario
    for scenario in (
        Scenario("calm", "nothing goes wrong", 0, _calm, seconds=2400, ends=(completed, no_double_work)),
        Scenario(
            "herd",
            "all nodes join within one second, and the origin has room for four downloads",
            17,
            _herd,
            seconds=600,
            peers=300,
            config=SimulationConfig(shards=12, epochs=1000, origin_slots=4),
            ends=(all_held, advanced(0.4)),
        ),
        Scenario(
            "alone",
            "one node, and none before it joins",
            18,
            _late,
            seconds=1500,
            peers=1,
            config=SimulationConfig(shards=2, epochs=6, speed_sigma=0.0),
            ends=(completed,),
        ),
        Scenario(
            "chaos",
            "kills, stops, partitions, full disks, lost devices and coordinator crashes, one a minute",
            0,
            _chaos,
            seconds=3600,
            peers=10,
            config=SimulationConfig(shards=4, epochs=200),
            ends=(all_held, advanced(0.15)),
        ),
        Scenario(
            "crowd",
            "an ordinary hour of a thousand nodes that come and go",
            0,
            _crowd,
            seconds=3600,
            peers=1000,
            config=SimulationConfig(shards=16, epochs=500, epoch_seconds=300.0, join_within=60.0, status_every=60.0),
            ends=(advanced(0.5),),
            min_peers=16,
        ),
        Scenario(
            "team",
            "three lanes of each shard: a node is killed, one is slow, one offers what it never trained",
            0,
            _team,
            seconds=1800,
            peers=8,
            config=SimulationConfig(
                shards=2,
                epochs=40,
                speed_sigma=0.8,
                team=TeamSpec(lanes=3, shares=(1.0, 1.0, 0.5), quorum=0.6, deadline=90.0),
            ),
            ends=(advanced(0.3), caught),
            min_peers=6,
        ),
        *MACHINE_SCENARIOS,
        *LINK_SCENARIOS,
        *ADVERSARY_SCENARIOS,
        *FEW_CLIP_SCENARIOS,
        *LENT_SCENARIOS,
        *CARD_SCENARIOS,
    )
}


def scenario(name: str) -> Scenario:
    """The scenario of that name. Raises UsageError for an unknown name."""
    try:
        return SCENARIOS[name]
    except KeyError:
        raise UsageError(f"there is no scenario {name!r}; `lutetia simulate --list` prints all {len(SCENARIOS)}") from None
