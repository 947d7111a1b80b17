"""Scenarios: faults of the network and of clocks."""

from __future__ import annotations

from random import Random

from lutetia.simulation.config import MIB, SimulationConfig
from lutetia.simulation.faults.step import Step
from lutetia.simulation.scenarios.scenario import Scenario, advanced, all_held, joins

_LONG = SimulationConfig(shards=4, epochs=200)


def _partition(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """Twice the swarm is partitioned for several leases, with the coordinator once on each side, and heals."""
    steps = joins(config, peers, rng)
    for number, side in enumerate(rng.sample(("with", ""), 2)):
        half = tuple(sorted(rng.sample(range(peers), peers // 2)))
        at = 120 + 450 * number + rng.uniform(0, 60)
        steps += [Step(at, "partition", half, detail=side), Step(at + rng.uniform(1, 4) * config.lease, "heal")]
    return steps


def _bad_links(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """30 % of packets are lost, latency is 500 ± 500 ms."""
    return [*joins(config, peers, rng), Step(100.0, "loss", value=0.3), Step(100.0, "latency", value=0.5, detail="0.5")]


def _one_way(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """A third of the nodes cannot dial another third, which can dial them."""
    steps, third = joins(config, peers, rng), max(1, peers // 3)
    blind = tuple(range(third, 2 * third))
    return steps + [Step(rng.uniform(20, 120), "one-way", (index, *blind)) for index in range(third)]


def _slow_loris(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """A third of the nodes send 1 KiB/s, and another third die, so that others must fetch from the slow ones."""
    steps = joins(config, peers, rng)
    steps += [Step(0.0, "slow link", (index,), value=1024.0) for index in range(0, peers, 3)]
    return steps + [Step(rng.uniform(200, 800), "kill", (index,)) for index in range(1, peers, 3)]


def _clocks(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """Clocks differ by up to 10 s; some jump by minutes, one by an hour, and are corrected later."""
    steps = joins(config, peers, rng)
    for index in range(0, peers, 2):
        jump = 3600.0 if index == 0 else rng.choice((-1, 1)) * rng.uniform(60, 300)
        at = rng.uniform(100, 400)
        steps += [
            Step(at, "clock jumps", (index,), value=jump),
            Step(at + rng.uniform(30, 300), "clock jumps", (index,), value=-jump),
        ]
    return steps


def _bad_provider(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """A third of the nodes serve corrupt bytes, a third die, a third lose their network process."""
    steps = joins(config, peers, rng)
    steps += [Step(rng.uniform(100, 300), "serves corrupt bytes", (index,)) for index in range(0, peers, 3)]
    steps += [Step(rng.uniform(200, 900), "kill", (index,)) for index in range(1, peers, 3)]
    steps += [Step(rng.uniform(200, 900), "network process dies", (index,)) for index in range(2, peers, 3)]
    return steps


LINK_SCENARIOS = (
    Scenario(
        "partition",
        "twice the swarm is partitioned for several leases, then heals",
        6,
        _partition,
        config=_LONG,
        peers=8,
        ends=(all_held, advanced(0.3)),
        min_peers=2,
    ),
    Scenario("bad-lines", "30 % packet loss, 500 ms ± 500 ms", 7, _bad_links, config=_LONG, ends=(advanced(0.3),)),
    Scenario("one-way", "some nodes cannot dial others", 7, _one_way, config=_LONG, peers=9, ends=(advanced(0.3),), min_peers=3),
    # where the fast nodes have died, a shard may wait: a node that could not deliver does not claim again for a while
    Scenario("slow-loris", "some nodes send 1 KiB/s", 7, _slow_loris, config=_LONG, peers=9, ends=(advanced(0.2),)),
    Scenario(
        "clocks",
        "clocks are wrong by up to 10 s, some jump by minutes or an hour",
        8,
        _clocks,
        config=SimulationConfig(shards=4, epochs=200, skew=10.0),
        strict=True,
        ends=(advanced(0.25),),
    ),
    Scenario(
        "bad-provider",
        "some providers serve corrupt bytes, others vanish during a transfer",
        10,
        _bad_provider,
        config=SimulationConfig(shards=4, epochs=200, up=1.0 * MIB, origin_up=2.0 * MIB),
        peers=9,
        ends=(advanced(0.1),),
        min_peers=3,
    ),
)
