"""The checks can fail: every promise has a rule which, broken, is caught, shrunk to a shortest plan and told as a story."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lutetia.simulation.faults.mutants import BROKEN
from lutetia.simulation.invariants import NAMES
from lutetia.simulation.runner import SimulationOutcome, simulate, steps_of
from lutetia.simulation.scenarios.catalogue import SCENARIOS


def first_violation(name: str, most_tries: int = 12) -> SimulationOutcome:
    """The first seed that shows the broken rule, with a plan that is shrunk as far as so many runs go."""
    broken = BROKEN[name]
    scenario = SCENARIOS[broken.scenario]
    for seed in range(8):
        outcome = simulate(scenario, scenario.peers, seed, decide=broken.decide(), most_tries=most_tries)
        if outcome.violation is not None:
            return outcome
    raise AssertionError(f"no seed shows that {name} is broken")


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_noticed_shrunk_and_told(name: str) -> None:
    broken = BROKEN[name]
    outcome = first_violation(name)
    assert outcome.violation is not None
    assert outcome.violation.name == broken.promise
    assert len(outcome.shortest) < outcome.steps
    assert outcome.trace
    assert len(outcome.plan) == len(outcome.shortest)
    scenario = SCENARIOS[broken.scenario]
    again = simulate(scenario, outcome.peers, outcome.seed, keep=outcome.shortest, decide=broken.decide(), shrink=False)
    assert again.violation is not None
    assert str(again.violation) == str(outcome.violation)
    honest = simulate(scenario, outcome.peers, outcome.seed, keep=outcome.shortest, shrink=False)
    assert honest.violation is None or honest.violation.name == "end"


def test_every_promise_has_a_broken_rule() -> None:
    assert {broken.promise for broken in BROKEN.values()} == NAMES.keys() - {"end"}


def test_nothing_of_the_shortest_plan_can_be_left_out() -> None:
    outcome = first_violation("resume-elsewhere", most_tries=400)
    scenario, decide = SCENARIOS["resume"], BROKEN["resume-elsewhere"].decide()
    assert len(steps_of(scenario, outcome.peers, outcome.seed)) == outcome.steps
    seconds = outcome.violation.time - 1_800_000_000.0 + 1 if outcome.violation else 0.0
    for number in outcome.shortest:
        rest = [other for other in outcome.shortest if other != number]
        less = simulate(scenario, outcome.peers, outcome.seed, seconds=seconds, keep=rest, decide=decide, shrink=False)
        assert less.violation is None


def test_a_plan_is_not_shrunk_to_a_swarm_that_nobody_joins() -> None:
    killed = SCENARIOS["killed"]
    scenario = replace(killed, ends=(lambda world: f"{world.accepted} epochs were accepted, too few",))
    outcome = simulate(scenario, 4, 0, seconds=killed.seconds, most_tries=20)
    steps = steps_of(scenario, 4, 0)
    assert outcome.violation is not None
    assert [*outcome.shortest] == [number for number, step in enumerate(steps) if step.what == "join"]
    assert outcome.accepted > 0
