"""Every scenario keeps every promise, from several seeds; the same seed always tells the same story."""

from __future__ import annotations

import pytest

from lutetia.simulation.runner import simulate
from lutetia.simulation.scenarios.catalogue import NOT_SIMULATED, SCENARIOS

_HEAVY = {"herd": 80, "churn": 32, "crowd": 20}
"""Scenarios that run once here, with so many peers; `python -m benchmarks simulate` runs hundreds of seeds of all."""
_CASES = [(name, seed) for name in SCENARIOS for seed in ((1,) if name in _HEAVY else (1, 2))]


@pytest.mark.parametrize(("name", "seed"), _CASES)
def test_every_promise_holds_after_every_event(name: str, seed: int) -> None:
    scenario = SCENARIOS[name]
    outcome = simulate(scenario, _HEAVY.get(name, scenario.peers), seed)
    assert outcome.violation is None, "\n".join([str(outcome.violation), *outcome.plan, *outcome.trace])
    assert outcome.accepted > 0
    assert {"I1", "I2", "I3", "I4", "I5", "I6", "I7"} <= outcome.checks.keys() | ({"I4"} if name == "alone" else set())


def test_each_of_the_twenty_faults_is_a_scenario_or_says_why_not() -> None:
    assert {scenario.fault for scenario in SCENARIOS.values()} - {0} | NOT_SIMULATED.keys() == set(range(1, 21))


@pytest.mark.parametrize("name", ["partition", "forgers", "bad-lines"])
def test_equal_seeds_give_equal_runs(name: str) -> None:
    scenario = SCENARIOS[name]
    first, second, other = (simulate(scenario, 6, seed, seconds=400) for seed in (5, 5, 6))
    assert (first.events, first.checks, first.facts["epochs"]) == (second.events, second.checks, second.facts["epochs"])
    assert first.costs == second.costs
    assert first.events != other.events
