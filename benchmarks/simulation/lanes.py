"""What lanes cost the coordinator, by their number: the crowd scenario with one node for each lane, in virtual time."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.report import Machine
from lutetia.simulation.config import with_lanes
from lutetia.simulation.runner import SimulationOutcome, simulate
from lutetia.simulation.scenarios.catalogue import SCENARIOS

SHARDS = 16
HEADS = (
    "lanes in all", "nodes", "seconds", "utilisation", "work in accepted epochs", "results that wait for a check", "audits due",
    "stimuli of the judge per second", "processor seconds", "MiB",
)  # fmt: skip


def study(counts: Sequence[int], seconds: float, out: Path) -> int:
    """Measure runs with so many lanes of each of SHARDS shards, and write the table. Returns 60 if an invariant was violated."""
    rows, violations = [], list[str]()
    for lanes in counts:
        scenario = SCENARIOS["crowd"]
        scenario = replace(scenario, config=with_lanes(replace(scenario.config, shards=SHARDS), lanes))
        began = time.process_time()
        outcome = simulate(scenario, max(SHARDS, SHARDS * lanes), 1, seconds=seconds, shrink=False)
        gc.collect()  # the simulation itself runs without the collector
        rows.append(_row(lanes, outcome, time.process_time() - began))
        print(rows[-1], flush=True)
        if outcome.violation:
            violations.append(f"{SHARDS * lanes} lanes: {outcome.violation}")
    (out / "lanes-simulated.md").write_text(_report(rows, violations, seconds))
    return 60 if violations else 0


def _row(lanes: int, outcome: SimulationOutcome, cpu: float) -> str:
    facts = outcome.facts
    cells = (
        SHARDS * lanes, outcome.peers, f"{outcome.seconds:.0f}", f"{100 * facts['utilisation']:.0f} %",
        f"{100 * (facts['useful'] or 0):.0f} %", facts["results_waiting"], facts["audits_due"],
        f"{facts['judged'] / outcome.seconds:.1f}", f"{cpu:.0f}", round(facts["peak_memory_bytes"] / 2**20),
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _report(rows: Sequence[str], violations: Sequence[str], seconds: float) -> str:
    config = SCENARIOS["crowd"].config
    return "\n".join([
        "# What lanes cost the coordinator, simulated", "",
        f"`python -m benchmarks simulate lanes` on {Machine.this()}: the scenario `crowd` with {SHARDS} shards,",
        f"one node for each lane, seed 1, {seconds:.0f} virtual seconds. A node of speed 1 takes {config.epoch_seconds:.0f} s "
        f"for an epoch, a check {config.check_seconds} s,",
        f"and {config.checks_at_once} results are checked at once. Work in accepted epochs: steps that stand, of all taken.", "",
        f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS), *rows, "",
        *(violations or ["No invariant was violated."]), "",
    ])  # fmt: skip
