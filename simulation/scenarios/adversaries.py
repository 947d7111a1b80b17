"""Scenarios: peers that lie or differ: forged records, worthless checkpoints, sybils, copied identities, newer software."""

from __future__ import annotations

from random import Random

from lutetia.simulation.config import SimulationConfig
from lutetia.simulation.faults.forgery import KINDS
from lutetia.simulation.faults.step import Step
from lutetia.simulation.scenarios.scenario import Scenario, advanced, all_held, audited_by_peers, caught, joins, refused_all

_SIGNED = SimulationConfig(shards=3, epochs=100, signed=True)


def _forgers(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """One node sends every kind of forged record to all replicas."""
    steps = joins(config, peers, rng)
    for round_ in range(4):
        at = 80 + 120 * round_ + rng.uniform(0, 60)
        steps += [Step(at + number, "forgery", (0, rng.randrange(1, peers)), detail=kind) for number, kind in enumerate(KINDS)]
    return steps


def _liars(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """A third of the nodes offer checkpoints with NaN, with wrong shapes, or with bytes that do not match their digest."""
    steps = joins(config, peers, rng)
    for index in range(0, peers, 3):
        steps.append(Step(0.0, "behaviour", (index,), detail=rng.choice(("not-a-number", "wrong-shapes", "corrupt"))))
    return steps


def _sybils(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """Half of all identities are one attacker's: their replicas accept records and never return them."""
    steps = joins(config, peers, rng)
    return steps + [Step(0.0, "hides records", (index,)) for index in range(0, peers, 2)]


def _double(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """A state folder was copied: two nodes use one identity."""
    return [*joins(config, peers, rng), Step(rng.uniform(60, 200), "copied identity", (0, 1))]


def _versions(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """A third of the nodes write a field into every record that the others do not know."""
    return [Step(0.0, "newer version", (index,)) for index in range(0, peers, 3)] + joins(config, peers, rng)


def _cheats(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """A quarter of the nodes fake: some offer their parent again, some take only the first steps."""
    steps = joins(config, peers, rng)
    for index in range(0, peers, 4):
        steps.append(Step(rng.uniform(0, 400), "behaviour", (index,), detail="untrained" if index % 8 else "poisoned"))
    return steps


def _auditors(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """Cheats as above; of the other nodes some call every result valid, some call every one invalid, some die in a replay."""
    steps = _cheats(config, peers, rng)
    for index in range(1, peers, 4):
        steps.append(Step(0.0, "audits without replay", (index,), detail="valid" if index % 8 == 1 else "invalid"))
    for index in range(2, peers, 4):
        at = rng.uniform(100, 1500)
        steps += [Step(at, "kill", (index,)), Step(at + rng.uniform(10, 300), "join", (index,))]
    return steps


ADVERSARY_SCENARIOS = (
    Scenario(
        "auditors",
        "idle nodes replay the work of others; some of them lie, some die during a replay",
        11,
        _auditors,
        peers=16,
        seconds=2400,
        config=SimulationConfig(shards=4, epochs=200, operators=6),
        ends=(all_held, caught, audited_by_peers(10), advanced(0.2)),
        min_peers=8,
    ),
    Scenario(
        "cheats",
        "plausible results that were not trained: audits find them, their authors are quarantined, lineages are rolled back",
        11,
        _cheats,
        peers=12,
        seconds=2400,
        config=SimulationConfig(shards=4, epochs=200),
        ends=(all_held, caught, advanced(0.2)),
        min_peers=4,
    ),
    Scenario(
        "forgers",
        "forged records: endless, dated in the future, of another owner, prolonged, too large, with unknown fields",
        11,
        _forgers,
        peers=7,
        seconds=700,
        config=_SIGNED,
        strict=True,
        ends=(all_held, refused_all(5), advanced(0.3)),
        min_peers=2,
    ),
    Scenario(
        "liars",
        "checkpoints with NaN, of wrong shapes, or corrupt",
        11,
        _liars,
        peers=9,
        config=SimulationConfig(shards=4, epochs=200),
        ends=(advanced(0.15),),
        min_peers=3,
    ),
    Scenario(
        "sybils",
        "half of all identities never return the records that they hold",
        12,
        _sybils,
        peers=24,
        config=SimulationConfig(shards=4, epochs=200),
        ends=(advanced(0.15),),
        min_peers=2,
    ),
    Scenario(
        "double-identity",
        "two nodes use one key",
        13,
        _double,
        config=SimulationConfig(shards=4, epochs=200),
        ends=(advanced(0.3),),
        min_peers=2,
    ),
    Scenario(
        "versions",
        "old and new software, with unknown fields in records",
        16,
        _versions,
        peers=9,
        seconds=700,
        config=_SIGNED,
        strict=True,
        ends=(advanced(0.2),),
        min_peers=3,
    ),
)
