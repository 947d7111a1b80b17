"""Every scenario keeps every invariant, from several seeds; equal seeds give equal runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lutetia.simulation.config import with_lanes
from lutetia.simulation.runner import simulate
from lutetia.simulation.scenarios.catalogue import NOT_SIMULATED, SCENARIOS

_HEAVY = {"herd": 80, "churn": 32, "crowd": 20, "lent": 10}
"""Large scenarios run once here, with so many nodes; `python -m benchmarks simulate seeds` runs many seeds of all."""
_CASES = [(name, seed) for name in SCENARIOS for seed in ((1,) if name in _HEAVY else (1, 2))]


@pytest.mark.parametrize(("name", "seed"), _CASES)
def test_scenario_keeps_every_invariant(name: str, seed: int) -> None:
    scenario = SCENARIOS[name]
    outcome = simulate(scenario, _HEAVY.get(name, scenario.peers), seed)
    assert outcome.violation is None, "\n".join([str(outcome.violation), *outcome.plan, *outcome.trace])
    assert outcome.accepted > 0
    assert {"I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8"} <= outcome.checks.keys() | ({"I4"} if name == "alone" else set())


@pytest.mark.parametrize(("name", "seed"), [("cards", 1008), ("lent", 1042)])
def test_conditions_at_the_end_hold_in_spite_of_chance(name: str, seed: int) -> None:
    """A device is too slow for every lane; the first node that holds a shard never trains a checkpoint of it."""
    outcome = simulate(SCENARIOS[name], SCENARIOS[name].peers, seed, shrink=False)
    assert outcome.violation is None, str(outcome.violation)


@pytest.mark.parametrize("name", ["killed", "liars", "cheats"])
def test_scenario_keeps_every_invariant_with_three_lanes(name: str) -> None:
    scenario = SCENARIOS[name]
    outcome = simulate(replace(scenario, config=with_lanes(scenario.config, 3)), scenario.peers, 1)
    assert outcome.violation is None, "\n".join([str(outcome.violation), *outcome.plan, *outcome.trace])
    assert outcome.accepted > 0
    assert outcome.checks["I8"] >= scenario.seconds // scenario.config.lease - 1, "once per lease"


def test_crowd_with_lanes_keeps_nine_of_ten_devices_at_work() -> None:
    crowd = SCENARIOS["crowd"]
    config = with_lanes(replace(crowd.config, shards=2), 16)
    outcome = simulate(replace(crowd, config=config), 30, 1, seconds=900)
    assert outcome.violation is None, str(outcome.violation)
    assert outcome.facts["utilisation"] >= 0.9
    assert 0.3 < outcome.facts["training"] <= outcome.facts["utilisation"], "some wait for the merge"
    alone = simulate(replace(crowd, config=replace(config, team=None)), 30, 1, seconds=300)
    assert alone.facts["utilisation"] < 0.2, "without lanes two of thirty work"


def test_lanes_are_merged_where_nodes_check_the_merges() -> None:
    crowd = SCENARIOS["crowd"]
    config = with_lanes(replace(crowd.config, shards=2, lent=True), 4)
    outcome = simulate(replace(crowd, config=config), 12, 1, seconds=1200, shrink=False)
    assert outcome.violation is None, str(outcome.violation)
    assert min(outcome.facts["epochs"]) >= 1
    assert outcome.facts["useful"] > 0.3


def test_every_fault_has_a_scenario_or_a_reason() -> None:
    assert {scenario.fault for scenario in SCENARIOS.values()} - {0} | NOT_SIMULATED.keys() == set(range(1, 21))


@pytest.mark.parametrize("name", ["partition", "forgers", "bad-lines"])
def test_equal_seeds_give_equal_runs(name: str) -> None:
    scenario = SCENARIOS[name]
    first, second, other = (simulate(scenario, 6, seed, seconds=400) for seed in (5, 5, 6))
    assert (first.events, first.checks, first.facts["epochs"]) == (second.events, second.checks, second.facts["epochs"])
    assert first.costs == second.costs
    assert first.events != other.events
