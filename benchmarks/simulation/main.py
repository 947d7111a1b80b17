"""`python -m benchmarks simulate seeds|costs|standstill|lanes`: many seeds of every scenario, costs by size, few clips, lanes.

`seeds` runs every scenario from N seeds and writes a table of what was checked and violated. `costs` measures messages, bytes,
keys, coordinator work, memory and time by the number of peers and shards, draws them (log-log) and says what breaks first.
`standstill` runs honest nodes on 20 to 60 clips. `lanes` measures what lanes cost the
coordinator. All write into docs/results, or into --out.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Machine
from lutetia.simulation.runner import simulate
from lutetia.simulation.scenarios.catalogue import NOT_SIMULATED, SCENARIOS
from lutetia.system.files import write_atomic

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
PEERS = {"herd": 80, "crowd": 60}
"""Scenarios of large swarms, of which many seeds are run with so many peers."""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks simulate", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    seeds = parts.add_parser("seeds", help="every scenario from many seeds")
    seeds.add_argument("--seeds", type=int, default=100, help="how many of each (default: 100)")
    seeds.add_argument("--first", type=int, default=1000, help="the first seed (default: 1000)")
    seeds.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="only this one; may be given again")
    costs = parts.add_parser("costs", help="cost by peers and shards")
    costs.add_argument("--most", type=int, default=10_000, help="largest swarm that is simulated (default: 10000)")
    still = parts.add_parser("standstill", help="honest runs on few clips, under the earlier rules and today's")
    still.add_argument("--seeds", type=int, default=1000, help="how many runs under each (default: 1000)")
    lanes = parts.add_parser("lanes", help="what lanes cost the coordinator, by their number")
    lanes.add_argument("--lanes", type=int, nargs="+", default=[1, 4, 16, 64], help="lanes of each shard (default: 1 4 16 64)")
    lanes.add_argument("--seconds", type=float, default=3600.0, help="virtual seconds (default: 3600)")
    for part in (seeds, costs, still, lanes):
        part.add_argument("--out", type=Path, default=RESULTS, help=f"folder for table and picture (default: {RESULTS})")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part == "costs":
        from benchmarks.simulation.costs import study

        study(options.most, options.out)
    elif options.part == "lanes":
        from benchmarks.simulation.lanes import study as lanes_study

        sys.exit(lanes_study(options.lanes, options.seconds, options.out))
    elif options.part == "standstill":
        from benchmarks.simulation.standstill import study as standstill

        sys.exit(standstill(options.seeds, options.out))
    else:
        sys.exit(_seeds(options.scenario or list(SCENARIOS), options.first, options.seeds, options.out))


def _seeds(names: Sequence[str], first: int, count: int, out: Path) -> int:
    """Run the seeds that the notes in `out` lack; an interrupted study continues. Returns 60 if an invariant was violated."""
    notes = out / "simulation-seeds.json"
    known: dict[str, Any] = json.loads(notes.read_text()) if notes.exists() else {}
    for number in range(count):
        for name in names:
            row = known.setdefault(name, {"first": first, "done": 0, "checks": {}, "accepted": 0, "seconds": 0.0, "failed": []})
            if row["done"] == number:
                _one_seed(name, row["first"] + number, row)
                print(name, row["first"] + number, *row["failed"][-1:], flush=True)
                write_atomic(notes, json.dumps(known, indent=1).encode())
        (out / "simulation-seeds.md").write_text(_report(known))
    return 60 if any(known[name]["failed"] for name in names) else 0


def _one_seed(name: str, seed: int, row: dict[str, Any]) -> None:
    scenario, started = SCENARIOS[name], time.process_time()
    outcome = simulate(scenario, PEERS.get(name, scenario.peers), seed, shrink=False)
    gc.collect()  # the simulation itself runs without the collector
    row["checks"] = dict(Counter(row["checks"]) + Counter(outcome.checks))
    row["accepted"] += outcome.accepted
    row["done"] += 1
    row["seconds"] += time.process_time() - started
    if outcome.violation is not None:
        row["failed"].append(f"`lutetia simulate {name} --peers {outcome.peers} --seed {seed}`: {outcome.violation}")


def _line(name: str, row: dict[str, Any]) -> str:
    scenario = SCENARIOS[name]
    fault, hours = scenario.fault or "", scenario.seconds * row["done"] / 3600
    return (
        f"| {name} | {fault} | {PEERS.get(name, scenario.peers)} | {row['done']} | {hours:.0f} | {row['accepted']} "
        f"| {sum(row['checks'].values())} | {len(row['failed'])} | {row['seconds']:.0f} |"
    )


def _report(known: dict[str, Any]) -> str:
    """The page, from the notes alone."""
    rows = {name: known[name] for name in SCENARIOS if name in known}
    total = sum((Counter(row["checks"]) for row in rows.values()), Counter[str]())
    runs = sum(row["done"] for row in rows.values())
    hours = sum(SCENARIOS[name].seconds * row["done"] for name, row in rows.items()) / 3600
    checks = ", ".join(f"{name} {number}" for name, number in sorted(total.items()))
    missing = [f"- Fault {number} is not simulated: {why}." for number, why in NOT_SIMULATED.items()]
    broken = [f"- {line}" for row in rows.values() for line in row["failed"]] or ["None."]
    first = min(row["first"] for row in rows.values())
    fewer = ", ".join(f"`{name}` (of {SCENARIOS[name].peers})" for name in PEERS)
    return "\n".join(
        (
            "# Scenarios from many seeds", "",
            f"`python -m benchmarks simulate seeds`: {len(rows)} of {len(SCENARIOS)} scenarios, {runs} runs, {hours:.0f} virtual "
            f"hours, {sum(total.values())} checks, on {Machine.this()}. Seeds begin at {first}. Run with fewer peers than the "
            f"scenario has: {fewer}.", "",
            "| scenario | fault | peers | seeds | virtual hours | epochs accepted | checks | violated | CPU seconds |",
            "|---|---|---|---|---|---|---|---|---|", *(_line(name, row) for name, row in rows.items()), "",
            f"Checks in all: {checks}.", "", *missing, "", "## Invariants violated", "", *broken, "",
        )
    )  # fmt: skip
