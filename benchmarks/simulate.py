"""`python -m benchmarks simulate seeds|costs`: many seeds of every scenario, and what a swarm costs by its size.

`seeds` runs every scenario from N seeds and writes a table of what was checked and what broke. `costs` measures messages, bytes,
keys, coordinator work, memory and time by the number of peers and shards, draws them (log-log) and says what breaks first.
Both write into docs/results unless told otherwise.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lutetia.simulation.driver import simulate
from lutetia.simulation.scenarios import NOT_SIMULATED, SCENARIOS

from .report import Machine

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks simulate", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    seeds = parts.add_parser("seeds", help="every scenario from many seeds")
    seeds.add_argument("--seeds", type=int, default=100, help="how many of each (default: 100)")
    seeds.add_argument("--first", type=int, default=1000, help="the first seed (default: 1000)")
    seeds.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="only this one; may be given again")
    costs = parts.add_parser("costs", help="cost by peers and shards")
    costs.add_argument("--most", type=int, default=10_000, help="largest swarm that is simulated (default: 10000)")
    for part in (seeds, costs):
        part.add_argument("--out", type=Path, default=RESULTS, help=f"folder for table and picture (default: {RESULTS})")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part == "costs":
        from .simulate_costs import study

        study(options.most, options.out)
    else:
        sys.exit(_seeds(options.scenario or list(SCENARIOS), options.first, options.seeds, options.out))


def _seeds(names: Sequence[str], first: int, count: int, out: Path) -> int:
    """Run them; the exit code is 60 if any promise was broken."""
    lines, broken, total = [], [], Counter[str]()
    for name in names:
        begun, checks, accepted, failed = time.process_time(), Counter[str](), 0, []
        scenario = SCENARIOS[name]
        for seed in range(first, first + count):
            outcome = simulate(scenario, scenario.peers, seed, shrink=False)
            checks.update(outcome.checks)
            accepted += outcome.accepted
            if outcome.violation is not None:
                failed.append(f"`lutetia simulate {name} --seed {seed}`: {outcome.violation}")
        seconds = time.process_time() - begun
        fault, hours = scenario.fault or "", scenario.seconds * count / 3600
        lines.append(
            f"| {name} | {fault} | {scenario.peers} | {count} | {hours:.0f} | {accepted} | {sum(checks.values())} "
            f"| {len(failed)} | {seconds:.0f} |"
        )
        print(lines[-1], *failed, sep="\n", flush=True)
        broken += failed
        total.update(checks)
    (out / "simulation-seeds.md").write_text(_report(names, first, count, lines, broken, total))
    return 60 if broken else 0


def _report(
    names: Sequence[str], first: int, count: int, lines: Sequence[str], broken: Sequence[str], total: Counter[str]
) -> str:
    checks = ", ".join(f"{name} {number}" for name, number in sorted(total.items()))
    missing = "\n".join(f"- Fault {number} is not simulated: {why}." for number, why in NOT_SIMULATED.items())
    found = "\n".join(f"- {line}" for line in broken) or "None."
    return "\n".join(
        (
            "# Scenarios from many seeds", "",
            f"`python -m benchmarks simulate seeds --seeds {count} --first {first}`: {len(names)} scenarios, {count} seeds each, "
            f"on {Machine.this()}.", "",
            "| scenario | fault | peers | seeds | virtual hours | epochs accepted | checks | broken | CPU seconds |",
            "|---|---|---|---|---|---|---|---|---|", *lines, "", f"Checks in all: {checks}.", "", missing, "",
            "## Promises broken", "", found, "",
        )
    )  # fmt: skip
