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
    "lanes in all", "nodes", "seconds", "checks at once", "have a lane", "take steps", "work in accepted epochs",
    "results that wait for a check", "audits due", "stimuli of the judge per second", "processor seconds", "MiB",
)  # fmt: skip


def study(counts: Sequence[int], seconds: float, out: Path) -> int:
    """Measure runs with so many lanes of each of SHARDS shards, and write the table. Returns 60 if an invariant was violated.

    Each is measured with the coordinator's default number of checks at once, and where that is too small for the lanes also with
    as many as they need.
    """
    rows, violations = [], list[str]()
    crowd = SCENARIOS["crowd"]
    for lanes in counts:
        config = with_lanes(replace(crowd.config, shards=SHARDS), lanes)
        for checks in sorted({crowd.config.checks_at_once, config.checks_at_once}):
            began = time.process_time()
            scenario = replace(crowd, config=replace(config, checks_at_once=checks))
            outcome = simulate(scenario, SHARDS * lanes, 1, seconds=seconds, shrink=False)
            gc.collect()  # the simulation itself runs without the collector
            rows.append(_row(lanes, checks, outcome, time.process_time() - began))
            print(rows[-1], flush=True)
            if outcome.violation:
                violations.append(f"{SHARDS * lanes} lanes, {checks} checks at once: {outcome.violation}")
            (out / "lanes-simulated.md").write_text(_report(rows, violations, seconds))
    return 60 if violations else 0


def _percent(share: float | None) -> str:
    return f"{100 * (share or 0):.0f} %"


def _row(lanes: int, checks: int, outcome: SimulationOutcome, cpu: float) -> str:
    facts = outcome.facts
    cells = (
        SHARDS * lanes, outcome.peers, f"{outcome.seconds:.0f}", checks, _percent(facts["utilisation"]),
        _percent(facts["training"]), _percent(facts["useful"]), facts["results_waiting"], facts["audits_due"],
        f"{facts['judged'] / outcome.seconds:.1f}", f"{cpu:.0f}", round(facts["peak_memory_bytes"] / 2**20),
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def _report(rows: Sequence[str], violations: Sequence[str], seconds: float) -> str:
    config = SCENARIOS["crowd"].config
    size = (config.weights_bytes + config.state_bytes) / 2**20
    most = int(config.checks_at_once * config.epoch_seconds / config.check_seconds)
    return "\n".join([
        "# What lanes cost the coordinator, simulated", "",
        f"`python -m benchmarks simulate lanes` on {Machine.this()}: the scenario `crowd` with {SHARDS} shards,",
        f"one node for each lane, seed 1, {seconds:.0f} virtual seconds. A node of speed 1 takes {config.epoch_seconds:.0f} s "
        f"for an epoch, a check {config.check_seconds} s.",
        "Have a lane: of the fit devices that are online, on average over looks once per lease. Take steps: of the same; the",
        "others fetch, or wait for a verdict or for the merge.",
        "Work in accepted epochs: steps that stand, of all taken. Processor seconds are those of the whole simulation.", "",
        f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS), *rows, "",
        *(violations or ["No invariant was violated."]), "",
        "## What breaks first, and the remedy", "",
        f"Every lane gives one result per epoch. With {config.checks_at_once} checks at once, the default, {most} results can be",
        f"checked in the {config.epoch_seconds:.0f} s of an epoch. With more lanes results wait for their check, merges wait for",
        "results, and nodes for merges. The owner then raises `checks_at_once`, on a machine that can bear it, or lends checks",
        "to nodes (`lend_checks`, [lent-checks.md](lent-checks.md)).", "",
        f"A result is {size:.0f} MiB here, and the coordinator fetches it once: {size * 1024 / config.epoch_seconds:.0f} MiB/s",
        "with 1024 lanes.",
        "Its line breaks next. Lanes of smaller shares do not make a result smaller.", "",
    ])  # fmt: skip
