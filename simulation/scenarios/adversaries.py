"""Peers that lie: forged records, worthless checkpoints, sybils, copied identities, versions that nobody else knows."""

from __future__ import annotations

from random import Random

from lutetia.simulation.config import SimulationConfig
from lutetia.simulation.faults.forgery import KINDS
from lutetia.simulation.faults.step import Step
from lutetia.simulation.scenarios.scenario import Scenario, advanced, audited_by_peers, caught, joins, owned, refused_all

_SIGNED = SimulationConfig(shards=3, epochs=100, signed=True)


def _forgers(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """A liar throws every kind of bad record at everybody."""
    steps = joins(config, peers, rng)
    for round_ in range(4):
        at = 80 + 120 * round_ + rng.uniform(0, 60)
        steps += [Step(at + number, "forgery", (0, rng.randrange(1, peers)), word=kind) for number, kind in enumerate(KINDS)]
    return steps


def _liars(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """A third of the boxes offer checkpoints that are not numbers, of another shape, or bytes that do not match their name."""
    steps = joins(config, peers, rng)
    for index in range(0, peers, 3):
        steps.append(Step(0.0, "conduct", (index,), word=rng.choice(("not-a-number", "wrong-shapes", "spoilt"))))
    return steps


def _sybils(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """Half of all identities are one attacker's: they take part in the DHT and deny every record, but never claim."""
    steps = joins(config, peers, rng)
    return steps + [Step(0.0, "denies records", (index,)) for index in range(0, peers, 2)]


def _double(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """Somebody copied the state folder: two boxes speak under one identity."""
    return [*joins(config, peers, rng), Step(rng.uniform(60, 200), "copied identity", (0, 1))]


def _versions(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """A third of the boxes write a field into every record that the others do not know."""
    return [Step(0.0, "newer version", (index,)) for index in range(0, peers, 3)] + joins(config, peers, rng)


def _cheats(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """A quarter of the boxes fake: some offer their parent again, some take the first steps and invent the rest."""
    steps = joins(config, peers, rng)
    for index in range(0, peers, 4):
        steps.append(Step(rng.uniform(0, 400), "conduct", (index,), word="untrained" if index % 8 else "poisoned"))
    return steps


def _auditors(config: SimulationConfig, peers: int, rng: Random) -> list[Step]:
    """Cheats as above; a quarter of the others call every result valid, some every one invalid, and some die over a replay."""
    steps = _cheats(config, peers, rng)
    for index in range(1, peers, 4):
        steps.append(Step(0.0, "audits without replay", (index,), word="valid" if index % 8 == 1 else "invalid"))
    for index in range(2, peers, 4):
        at = rng.uniform(100, 1500)
        steps += [Step(at, "kill", (index,)), Step(at + rng.uniform(10, 300), "join", (index,))]
    return steps


LIES = (
    Scenario(
        "auditors",
        "peers that stand by replay the work of others; some of them lie, some die over it",
        11,
        _auditors,
        peers=16,
        seconds=2400,
        config=SimulationConfig(shards=4, epochs=200, operators=6),
        ends=(owned, caught, audited_by_peers(10), advanced(0.2)),
        least=8,
    ),
    Scenario(
        "cheats",
        "plausible results that were not trained: audits find them, their authors are quarantined, lineages fall back",
        11,
        _cheats,
        peers=12,
        seconds=2400,
        config=SimulationConfig(shards=4, epochs=200),
        ends=(owned, caught, advanced(0.2)),
        least=4,
    ),
    Scenario(
        "forgers",
        "records with unbounded life, future dates, foreign names, prolonged, oversized, with unknown fields",
        11,
        _forgers,
        peers=7,
        seconds=700,
        config=_SIGNED,
        strict=True,
        ends=(owned, refused_all(5), advanced(0.3)),
        least=2,
    ),
    Scenario(
        "liars",
        "checkpoints that are not numbers, of another shape, or spoilt",
        11,
        _liars,
        peers=9,
        config=SimulationConfig(shards=4, epochs=200),
        ends=(advanced(0.15),),
        least=3,
    ),
    Scenario(
        "sybils",
        "half of all identities deny every record they are given",
        12,
        _sybils,
        peers=24,
        config=SimulationConfig(shards=4, epochs=200),
        ends=(advanced(0.15),),
        least=2,
    ),
    Scenario(
        "double-identity",
        "one key on two boxes",
        13,
        _double,
        config=SimulationConfig(shards=4, epochs=200),
        ends=(advanced(0.3),),
        least=2,
    ),
    Scenario(
        "versions",
        "old and new software, unknown fields in records",
        16,
        _versions,
        peers=9,
        seconds=700,
        config=_SIGNED,
        strict=True,
        ends=(advanced(0.2),),
        least=3,
    ),
)
