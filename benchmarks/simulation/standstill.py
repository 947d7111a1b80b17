"""Honest runs on few clips: how long a shard is without acceptance, under the earlier rules for losses and under today's."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import Machine
from lutetia.coordinator.acceptance.checks import CheckFailed, CheckRunner, Verdict
from lutetia.coordinator.acceptance.loss_bounds import mean
from lutetia.coordinator.ledger.events import CheckpointAccepted, ResultDoubted, ResultRefused
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.records import AcceptanceRecord, CheckpointRecord
from lutetia.simulation.network import held_out
from lutetia.simulation.rules_under_test import RulesUnderTest
from lutetia.simulation.runner import run_world
from lutetia.simulation.scenarios.few_clips import FEW_CLIP_SCENARIOS, LONGEST_GAP, all_accepted, gaps
from lutetia.system.files import write_atomic


async def bare_tolerance(
    record: CheckpointRecord,
    parent: AcceptanceRecord | None,
    manifest: Manifest,
    runner: CheckRunner,
    clock: Callable[[], float],
) -> Verdict:
    """The earlier checks: a bare tolerance on the mean, whatever the number of rows, and a final refusal without losses."""
    try:
        await runner.fetch(record)
        await runner.inspect(record)
        before, loss = mean(await runner.parent_losses(record, parent)), mean(await runner.losses(record))
        raw = mean(await runner.raw_losses(record))
    except CheckFailed as stop:
        return stop.verdict
    if not loss <= before * (1 + manifest.holdout_tolerance):
        return Verdict("invalid", "holdout", f"{loss:.5f} after {before:.5f}")
    if not raw <= max(loss, before) * (1 + manifest.raw_tolerance):
        return Verdict("invalid", "raw", f"{raw:.5f} beside {loss:.5f}")
    return Verdict("valid", "holdout", "", loss, before)


RULES: Mapping[str, RulesUnderTest] = {
    "interval and proofs": RulesUnderTest(),
    "bare tolerance, final refusals": RulesUnderTest(run_checks=bare_tolerance),
}
"""Today's first: an interrupted study has those."""


def study(seeds: int, out: Path) -> int:
    """Run the seeds that the notes in `out` lack. Returns 60 if a shard stood still under today's rules."""
    notes = out / "standstill.json"
    known: dict[str, list[dict[str, Any]]] = json.loads(notes.read_text()) if notes.exists() else {}
    for name, rules in RULES.items():
        rows = known.setdefault(name, [])
        for number in range(len(rows), seeds):
            rows.append(one_run(number, rules))
            if number % 50 == 49 or number == seeds - 1:
                write_atomic(notes, json.dumps(known, indent=None, separators=(",", ":")).encode())
                (out / "standstill.md").write_text(report(known))
                print(f"{name}: {number + 1} of {seeds}", flush=True)
    return 60 if any(row["gap"] > LONGEST_GAP for row in known["interval and proofs"]) else 0


def one_run(number: int, rules: RulesUnderTest) -> dict[str, Any]:
    """What happened in the run of that number: scenarios take turns."""
    scenario = FEW_CLIP_SCENARIOS[number % len(FEW_CLIP_SCENARIOS)]
    began = time.process_time()
    world = run_world(scenario, scenario.peers, number, rules, all_accepted)
    gc.collect()
    ledger = world.coordinators[0].ledger
    accepted = [event for event in ledger if isinstance(event, CheckpointAccepted)]
    return {
        "scenario": scenario.name, "seed": number, "until": scenario.seconds, "gap": round(max(gap for _, gap in gaps(world)), 2),
        "accepted": len(accepted), "of": scenario.config.epochs * scenario.config.shards,
        "noted": sum(bool(event.note) for event in accepted),
        "doubted": sum(isinstance(event, ResultDoubted) for event in ledger),
        "refused": sum(isinstance(event, ResultRefused) and event.verdict == "invalid" for event in ledger),
        "seconds": round(time.process_time() - began, 2),
    }  # fmt: skip


def report(known: Mapping[str, list[dict[str, Any]]]) -> str:
    """The page, from the notes alone."""
    heads = (
        f"| rules | runs | seconds of each, at most | stood longer than {LONGEST_GAP} times the pace "
        "| longest time without acceptance (median; 99 %; most) | epochs accepted | with a note | results refused | CPU seconds |"
    )
    first = held_out
    return "\n".join(
        (
            "# Runs on few clips that stand still", "",
            f"`python -m benchmarks simulate standstill`, on {Machine.this()}: honest nodes, default settings (20 epochs, "
            "tolerances 2 % and 30 %), one to six held-out clips in each shard, as data of 20 to 60 clips in one or two shards "
            "have. Half of the runs have three nodes of different speed and kind on two shards, half one node on one shard. Node "
            "machine, judge, checks, ledger and audits are the real ones; held-out losses are drawn. Times are multiples of the "
            "time of an epoch on the slowest machine; a replay takes the coordinator as long as an epoch of a node of speed 1, "
            "also when up to three run at once, in a process each.",
            "", heads, "|---|---|---|---|---|---|---|---|---|", *(_line(name, rows) for name, rows in known.items()), "",
            "## The model of noise", "",
            "log loss(row) = level(draw, row) + quality(weights, clip) + jitter(weights, draw, row), four rows for each clip "
            "(`simulation/network/held_out.py`). What an epoch adds to the quality follows from shard, epoch and parent alone, "
            "so all honest nodes end alike, and who trains again is refused again.", "",
            "| | model | measured |", "|---|---|---|",
            f"| level of a row | normal, deviation {first.LEVEL} | 0.4 to 1.0 within a clip |",
            f"| trend of the first epoch | −{first.LEARNS}, fading by e each epoch | −0.6 on average of three clips |",
            f"| overfitting each epoch | 0 to {first.OVERFITS} by shard, fading by e in ten epochs "
            "| 0.03, 0.11, 0.08, 0.04, 0.02, 0.03, 0.01, 0.01 (epochs 2 to 9) |",
            f"| change of a clip in an epoch | normal, deviation {first.EARLY} in the first, then {first.CLIP} "
            "| 0.44, 0.11, 0.06, 0.03, then at most 0.02 |",
            f"| jitter of a row | normal, deviation {first.ROW} | 0.13, 0.21, 0.08, 0.05, then at most 0.02 |",
            f"| raw parameters over averages | log-normal, median {first.RAW}, deviation {first.RAW_SPREAD} by shard; "
            f"{first.RAW_CLIP} by clip | 0.01 to 0.08 |", "",
            "Measured: 30 drawn clips of 8 frames of 32 × 32 pixels in two shards, 12 clips to train on and three held out, "
            "batch 8, the demo's expert of 1.2 million parameters, nine epochs of 100 steps. Later epochs of that run are calmer "
            "than the model, which keeps the noise of the fourth epoch to the end.", "",
        )
    )  # fmt: skip


def _line(name: str, rows: list[dict[str, Any]]) -> str:
    times = sorted(row["gap"] for row in rows)
    stood = sum(gap > LONGEST_GAP for gap in times)
    spread = f"{median(times):.1f}; {times[int(0.99 * (len(times) - 1))]:.1f}; {times[-1]:.1f}"
    accepted, of = sum(row["accepted"] for row in rows), sum(row["of"] for row in rows)
    noted, refused = sum(row["noted"] for row in rows), sum(row["refused"] for row in rows)
    seconds = sum(row["seconds"] for row in rows)
    lengths = " or ".join(f"{length:,}" for length in sorted({int(row["until"]) for row in rows}))
    return f"| {name} | {len(rows)} | {lengths} | {stood} | {spread} | {accepted} of {of} | {noted} | {refused} | {seconds:.0f} |"
