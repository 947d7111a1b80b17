"""Runs a scenario from a seed; when an invariant is violated, finds the shortest plan that violates it, with a trace."""

from __future__ import annotations

import gc
import re
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from lutetia.simulation.costs import Costs
from lutetia.simulation.event_queue import START
from lutetia.simulation.faults.plan import schedule
from lutetia.simulation.faults.step import Step
from lutetia.simulation.invariants import Violation
from lutetia.simulation.rules_under_test import RulesUnderTest
from lutetia.simulation.scenarios.scenario import Scenario
from lutetia.simulation.shrink import MAX_TRIES, shortest
from lutetia.simulation.trace import Trace
from lutetia.simulation.world import SimulatedWorld

OnProgress = Callable[[float, float], None]
"""(virtual seconds done, of how many)"""
_SLICES = 200


@dataclass(frozen=True)
class SimulationOutcome:
    """One run. `violation` is None when every invariant held; then `shortest`, `plan` and `trace` are empty."""

    scenario: str
    peers: int
    seed: int
    seconds: float
    wall: float
    events: int
    checks: dict[str, int]
    accepted: int
    owners: dict[int, list[int]]
    steps: int
    costs: Costs
    facts: dict[str, Any] = field(default_factory=dict)
    violation: Violation | None = None
    shortest: tuple[int, ...] = ()
    plan: tuple[str, ...] = ()
    trace: tuple[str, ...] = ()
    tries: int = 0


def steps_of(scenario: Scenario, peers: int, seed: int) -> list[Step]:
    """The scenario's plan in order of time; a step's number is its index in this list."""
    return sorted(scenario.plan(scenario.config, peers, Random(f"{seed}|plan")), key=lambda step: step.at)


def simulate(
    scenario: Scenario, peers: int, seed: int, *, seconds: float | None = None, keep: Sequence[int] | None = None,
    decide: RulesUnderTest | None = None, on_progress: OnProgress | None = None, shrink: bool = True,
    max_tries: int = MAX_TRIES,
) -> SimulationOutcome:  # fmt: skip
    """One run of `scenario`; `keep` leaves out all steps of the plan but these (by number). `max_tries` bounds the shrinking."""
    steps = steps_of(scenario, peers, seed)
    numbers = list(range(len(steps))) if keep is None else [number for number in keep if number < len(steps)]
    length = scenario.seconds if seconds is None else seconds
    started = time.perf_counter()

    def run(chosen: Sequence[int], until: float, trace: Trace | None = None) -> tuple[SimulatedWorld, Violation | None]:
        return _run(scenario, peers, seed, [steps[number] for number in chosen], until, decide, trace)

    world, violation = _run(scenario, peers, seed, [steps[number] for number in numbers], length, decide, None, on_progress)
    details: dict[str, Any] = {}
    if violation is not None and shrink:
        until, kind, tries = length, _kind(violation), 0

        def breaks(chosen: Sequence[int]) -> bool:
            nonlocal until, tries
            tries += 1
            again = run(chosen, until)[1]
            if again is None or _kind(again) != kind:
                return False
            if again.name != "end":
                until = min(until, again.time - START + 1.0)
            return True

        # without joins every condition at the end fails, so only faults are left out there
        kept = [number for number in numbers if violation.name == "end" and steps[number].action == "join"]
        removable = [number for number in numbers if number not in kept]
        fewest = sorted([*kept, *shortest(removable, lambda chosen: breaks(sorted([*kept, *chosen])), max_tries)])
        trace = Trace()
        violation = run(fewest, until, trace)[1] or violation
        details = {"shortest": tuple(fewest), "trace": tuple(trace.explain(violation.causes)), "tries": tries}
        details["plan"] = tuple(f"{number}: {steps[number].at:.1f} s {steps[number].sentence}" for number in fewest)
    return SimulationOutcome(
        scenario.name, peers, seed, length, time.perf_counter() - started, world.queue.done, dict(world.invariants.checks),
        world.accepted, {shard: [peer.index for peer in held] for shard, held in sorted(world.holders().items())}, len(numbers),
        world.costs, facts_of(world), violation, **details,
    )  # fmt: skip


def _kind(violation: Violation) -> tuple[str, str]:
    """The violated invariant; for a condition at the end also its text without numbers, which tells conditions apart."""
    return violation.name, re.sub("[0-9]+", "", violation.text) if violation.name == "end" else ""


def _run(
    scenario: Scenario, peers: int, seed: int, steps: Sequence[Step], until: float, decide: RulesUnderTest | None,
    trace: Trace | None = None, on_progress: OnProgress | None = None, done: Callable[[SimulatedWorld], bool] | None = None,
) -> tuple[SimulatedWorld, Violation | None]:  # fmt: skip
    world = SimulatedWorld(scenario.config, peers, seed, decide, trace, strict=scenario.strict)
    schedule(world, steps)
    gc.freeze()  # what exists now stays; scanning it again and again costs a sixth of the time
    gc.disable()
    try:
        for part in range(1, _SLICES + 1):
            world.queue.run(START + until * part / _SLICES)
            if on_progress is not None:
                on_progress(until * part / _SLICES, until)
            if done is not None and done(world):
                break
        if until >= scenario.seconds:
            for end in scenario.ends:
                if (problem := end(world)) is not None:
                    raise Violation("end", problem, world.queue.now)
    except Violation as violation:
        return world, violation
    finally:
        gc.enable()
        gc.unfreeze()
    return world, None


def run_world(
    scenario: Scenario, peers: int, seed: int, decide: RulesUnderTest | None = None,
    done: Callable[[SimulatedWorld], bool] | None = None,
) -> SimulatedWorld:  # fmt: skip
    """The world at the end of one run, or soon after `done` holds, whatever it violated."""
    return _run(scenario, peers, seed, steps_of(scenario, peers, seed), scenario.seconds, decide, done=done)[0]


def facts_of(world: SimulatedWorld) -> dict[str, Any]:
    """Figures at the end of the run.

    `utilisation`: of the fit devices that are online, the share that has a shard or lane; `training`: that takes steps. Both are
    means over looks once per lease.
    """
    taken = sum(peer.trainer.taken for peer in world.nodes)
    counts = world.invariants.utilisation
    return {
        "utilisation": counts.share(counts.at_work),
        "training": counts.share(counts.training),
        "epochs": list(world.invariants.heads),
        "peers_online": sum(peer.answering and peer.host is peer for peer in world.nodes),
        "rolled_back": world.invariants.rolled_back,
        "quarantined": len(world.coordinators[0].state.run.quarantined),
        "results_accepted": world.coordinators[0].state.run.accepted,
        "refused": world.coordinators[0].state.run.rejected,
        "audits_due": len(world.coordinators[0].state.run.audits),
        "results_waiting": sum(len(shard.candidates) for shard in world.coordinators[0].state.run.shards.values()),
        "judged": world.costs.judged,
        "steps_taken": taken,
        "useful": round(world.useful_steps / taken, 3) if taken else None,
        "keys": len({key for peer in world.nodes for key in peer.parts}),
        "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
