"""`python -m benchmarks judge-attacks [--tries N]`: what hostile results cost honest ones at the judge, in virtual time."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

from benchmarks.attacks.buried_newcomer import TENURE, buried_newcomer, copies_by_new_keys
from benchmarks.attacks.poison_number import poison_number
from benchmarks.attacks.stalled_judging import ATTACKS, USUAL, honest_delay
from benchmarks.attacks.time_bomb import time_bomb
from lutetia.coordinator.acceptance.audit_comparison import lottery, secret_steps
from lutetia.protocol.schema.manifest import AuditPolicy


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


def copies_by_keys(tries: int, epochs: int = 40) -> str:
    """A sentence on how much honest work stands after copies under ever new keys."""
    found = [copies_by_new_keys(epochs, seed) for seed in range(tries)]
    standing, convicted = min(one.standing for one in found), max(one.convicted for one in found)
    return (
        f"Copies of each accepted epoch under ever new keys, offered at once, for the time of {epochs} epochs, {tries} tries: "
        f"at least {standing} honest epochs stand, at most {convicted} keys were accepted and convicted."
    )


def places_of_the_cheat(audits: int = 20_000) -> str:
    """A table of the share of audits that replay past the step from which an epoch is faked, by the judge's own draws."""
    policy, lines = AuditPolicy(), ["| faked from step on | of an epoch of 16 | of 100 | of 1,000 |", "|---|---|---|---|"]
    replayed: dict[int, list[int]] = {}
    for epoch in (16, 100, 1000):
        drawn = ((lottery(b"secret", f"{n:064x}", "whole"), lottery(b"secret", f"{n:064x}", "steps")) for n in range(audits))
        replayed[epoch] = [
            epoch if whole < policy.whole_epoch else secret_steps(steps, policy.replay_steps, epoch) for whole, steps in drawn
        ]
    for first in (0, 4, 8, 15, 50, 99, 250, 500, 999):
        shares = (
            f"{sum(steps > first for steps in counts) / audits:.3f}" if first < epoch else ""
            for epoch, counts in replayed.items()
        )
        lines.append(f"| {first} | {' | '.join(shares)} |")
    means = (f"{sum(counts) / audits:.1f}" for counts in replayed.values())
    return "\n".join([*lines, f"| steps replayed, mean | {' | '.join(means)} |"])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks judge-attacks", description=__doc__)
    parser.add_argument("--tries", type=int, default=20, help="times that each attack is tried (default 20)")
    arguments = parser.parse_args(argv)
    print(stalled_judging(arguments.tries))
    print()
    print(time_bombs(arguments.tries))
    print()
    print(buried_newcomers(arguments.tries))
    print(f"\n{copies_by_keys(arguments.tries)}")
    print(f"\n{places_of_the_cheat()}")
    print(f"\nRecords with numbers of up to 4,000 digits, {arguments.tries} tries:")
    for outcome, count in sorted(poison_number(arguments.tries).items()):
        print(f"- {outcome}: {count}")
