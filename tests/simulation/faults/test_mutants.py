"""The checks of the invariants can fail: a mutant of each is noticed, its plan shrunk and its cause explained."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lutetia.simulation.faults.mutants import MUTANTS
from lutetia.simulation.invariants import NAMES
from lutetia.simulation.runner import SimulationOutcome, simulate, steps_of
from lutetia.simulation.scenarios.catalogue import SCENARIOS


def first_violation(name: str, max_tries: int = 12) -> SimulationOutcome:
    """The first seed that shows the mutant, with a plan shrunk in at most `max_tries` runs."""
    mutant = MUTANTS[name]
    scenario = SCENARIOS[mutant.scenario]
    for seed in range(8):
        outcome = simulate(scenario, scenario.peers, seed, decide=mutant.decide(), max_tries=max_tries)
        if outcome.violation is not None:
            return outcome
    raise AssertionError(f"no seed shows the mutant {name}")


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_noticed_shrunk_and_explained(name: str) -> None:
    mutant = MUTANTS[name]
    outcome = first_violation(name)
    assert outcome.violation is not None
    assert outcome.violation.name == mutant.invariant
    assert len(outcome.shortest) < outcome.steps
    assert outcome.trace
    assert len(outcome.plan) == len(outcome.shortest)
    scenario = SCENARIOS[mutant.scenario]
    again = simulate(scenario, outcome.peers, outcome.seed, keep=outcome.shortest, decide=mutant.decide(), shrink=False)
    assert again.violation is not None
    assert str(again.violation) == str(outcome.violation)
    honest = simulate(scenario, outcome.peers, outcome.seed, keep=outcome.shortest, shrink=False)
    assert honest.violation is None or honest.violation.name == "end"


def test_every_invariant_has_a_mutant() -> None:
    assert {mutant.invariant for mutant in MUTANTS.values()} == NAMES.keys() - {"end"}


def test_shortest_plan_needs_every_step() -> None:
    outcome = first_violation("resume-elsewhere", max_tries=400)
    scenario, decide = SCENARIOS["resume"], MUTANTS["resume-elsewhere"].decide()
    assert len(steps_of(scenario, outcome.peers, outcome.seed)) == outcome.steps
    seconds = outcome.violation.time - 1_800_000_000.0 + 1 if outcome.violation else 0.0
    for number in outcome.shortest:
        others = [other for other in outcome.shortest if other != number]
        shorter = simulate(scenario, outcome.peers, outcome.seed, seconds=seconds, keep=others, decide=decide, shrink=False)
        assert shorter.violation is None


def test_shrinking_keeps_joins_for_a_condition_at_the_end() -> None:
    killed = SCENARIOS["killed"]
    scenario = replace(killed, ends=(lambda world: f"{world.accepted} epochs were accepted, too few",))
    outcome = simulate(scenario, 4, 0, seconds=killed.seconds, max_tries=20)
    steps = steps_of(scenario, 4, 0)
    assert outcome.violation is not None
    assert [*outcome.shortest] == [number for number, step in enumerate(steps) if step.action == "join"]
    assert outcome.accepted > 0
