"""`python -m benchmarks judge-attacks [--tries N]`: what hostile results cost honest ones at the judge, in virtual time."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from benchmarks.attacks.stalled_judging import ATTACKS, USUAL, honest_delay


def stalled_judging(tries: int) -> str:
    """A table of seconds from an honest offer to its acceptance."""
    lines = [
        f"Seconds to an acceptance that usually takes {USUAL:g}, {tries} tries each: median, longest.",
        "",
        "| attack | newcomer | owner with accepted work |",
        "|---|---|---|",
    ]
    for attack in ATTACKS:
        cells = []
        for newcomer in (True, False):
            waits = [honest_delay(attack, seed, newcomer) for seed in range(tries)]
            cells.append(f"{statistics.median(waits):.1f}, {max(waits):.1f}")
        lines.append(f"| {attack.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks judge-attacks", description=__doc__)
    parser.add_argument("--tries", type=int, default=20, help="times that each attack is tried (default 20)")
    arguments = parser.parse_args(argv)
    print(stalled_judging(arguments.tries))
