"""`python -m benchmarks judge-attacks [--tries N]`: what hostile results cost honest ones at the judge, in virtual time."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from benchmarks.attacks.buried_newcomer import TENURE, buried_newcomer
from benchmarks.attacks.poison_number import poison_number
from benchmarks.attacks.stalled_judging import ATTACKS, USUAL, honest_delay
from benchmarks.attacks.time_bomb import time_bomb


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


def time_bombs(tries: int) -> str:
    """A table of honest epochs that a conviction voids."""
    lines = [
        "Honest epochs in eight shards of 60 that a cheater's conviction voids: largest of the tries, and whole replays (mean).",
        "",
        "| the cheater | honest epochs | void | lazy epochs accepted | whole replays |",
        "|---|---|---|---|---|",
    ]
    for name, honest_first in (("is lazy from its first epoch on", 0), ("is honest three times first", 3), ("twelve times", 12)):
        found = [time_bomb(honest_first=honest_first, seed=seed) for seed in range(tries)]
        replays = statistics.mean(one.whole_replays for one in found)
        cells = (found[0].accepted, max(one.lost for one in found), max(one.lazy for one in found), f"{replays:.0f}")
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def buried_newcomers(tries: int) -> str:
    """A table of epochs of others that a newcomer's conviction voids, by the time that its whole replay takes."""
    lines = [
        "One shard, an epoch each ten minutes, a tenure of ten. Epochs of others that a newcomer's conviction voids, and the",
        f"longest time in tenures that an honest result was held: largest of {tries} tries.",
        "",
        "| the replay takes, in epochs | held-out loss falls | it does not | longest hold |",
        "|---|---|---|---|",
    ]
    for epochs in (1, 5, 30, 60):
        falls, flat = ([buried_newcomer(epochs, improves, seed=seed) for seed in range(tries)] for improves in (True, False))
        longest = max(one.longest_wait for one in (*falls, *flat)) / TENURE
        lines.append(f"| {epochs} | {max(one.lost for one in falls)} | {max(one.lost for one in flat)} | {longest:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks judge-attacks", description=__doc__)
    parser.add_argument("--tries", type=int, default=20, help="times that each attack is tried (default 20)")
    arguments = parser.parse_args(argv)
    print(stalled_judging(arguments.tries))
    print()
    print(time_bombs(arguments.tries))
    print()
    print(buried_newcomers(arguments.tries))
    print(f"\nRecords with numbers of up to 4,000 digits, {arguments.tries} tries:")
    for outcome, count in sorted(poison_number(arguments.tries).items()):
        print(f"- {outcome}: {count}")
