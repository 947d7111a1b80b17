"""`python -m benchmarks lying-checkers [--tries N]`: how often liars among nodes that check are found, and decide.

Pure: the coordinator's own lending and settling, with reports that are made up. Honest ones differ by more than processors do.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.attacks.tables import interval
from benchmarks.lending import silent_checkers
from lutetia.coordinator.acceptance.checks import compare_losses, compare_raw
from lutetia.coordinator.lending.agreement import numbers
from lutetia.coordinator.lending.loans import Asker, LendingDesk, LentCheck, lend_check, take_report
from lutetia.protocol.rpc.check_request import CheckReport
from lutetia.protocol.schema.identity import Identity

ROWS = 8
"""The fewest."""
POOL = 12
"""Nodes that stand by, each of an operator of its own."""
TOLERANCE, RAW_TOLERANCE = 0.02, 0.3
_APART = 2e-4
"""Relative standard deviation of an honest loss: more than float32 on two processors, about that of two kinds of device."""
Losses = tuple[float, ...]


@dataclass(frozen=True)
class Truth:
    """What honest nodes find: losses of the parent, and of a result that is `excess` worse than it."""

    parent: Losses
    averages: Losses

    @classmethod
    def drawn(cls, draw: random.Random, excess: float) -> Truth:
        parent = tuple(draw.uniform(0.3, 1.0) for _ in range(ROWS))
        return cls(parent, tuple(loss * (1 + excess + draw.gauss(0, 0.02)) for loss in parent))


def _times(factor: float) -> Callable[[Truth, random.Random], Losses]:
    return lambda truth, draw: tuple(loss * factor for loss in truth.averages)


LIES: dict[str, tuple[float, Callable[[Truth, random.Random], Losses]]] = {
    "praises a bad result": (0.5, lambda truth, draw: tuple(loss * draw.uniform(0.9, 0.99) for loss in truth.parent)),
    "blames a good result": (-0.05, lambda truth, draw: tuple(loss * draw.uniform(1.3, 1.6) for loss in truth.parent)),
    "repeats the parent's losses": (0.5, lambda truth, draw: truth.parent),
    "makes numbers up": (-0.05, lambda truth, draw: tuple(draw.uniform(0.1, 2.0) for _ in truth.parent)),
    "moves a bad result by 0.4 %": (0.13, _times(0.996)),
    "moves a good result by 0.4 %": (0.0, _times(1.004)),
}
"""Name -> (how much worse than its parent the result truly is, the losses that the liar reports)."""


@dataclass(frozen=True)
class Check:
    """One check: whether its verdict is that of honest losses, how many lied, and how many of those were found."""

    right: bool
    lied: int
    found: int
    wronged: int
    reports: int


def passes(report: CheckReport) -> bool:
    """Whether the coordinator's comparisons accept these losses."""
    parent, averages, raw = (numbers(rows) for rows in (report.parent, report.averages, report.raw))
    return compare_losses(averages, parent, TOLERANCE) is None and compare_raw(raw, averages, parent, RAW_TOLERANCE) is None


def check(draw: random.Random, lie: str, liars: int, together: bool, known: int) -> Check:
    """One check by nodes of a pool.

    Args:
        draw: randomness.
        lie: what liars report.
        liars: how many of the pool lie.
        together: all of them with the same numbers.
        known: how many of the honest have accepted work.
    """
    excess, told = LIES[lie]
    truth = Truth.drawn(draw, excess)
    names = [Identity.derived(f"checker {number}").public_key for number in range(POOL)]
    lying = set(draw.sample(names, liars))
    common = told(truth, draw)
    desk, now = LendingDesk().with_check(LentCheck("c", "result", 0, 0.0, fewest=ROWS)), 0.0
    trusted = frozenset(sorted(set(names) - lying)[:known])
    asked, lied, reports = list(names), 0, 0
    draw.shuffle(asked)
    for owner in asked * 2:  # who gets none asks again
        asker = Asker(owner, frozenset({"result"}), frozenset({0}), frozenset(), owner in trusted)
        desk, lent = lend_check(desk, asker, f"{reports:064x}", now, trusted)
        if lent is None:
            continue
        lies = owner in lying
        rows = (common if together else told(truth, draw)) if lies else _measured(truth.averages, draw)
        lied, reports = lied + lies, reports + 1
        desk, _, settled = take_report(desk, _report(owner, lent.loans[owner].id, truth, rows, draw), now)
        if settled:
            found = len(settled.liars & lying)
            honest = _report(owner, "0" * 64, truth, truth.averages, draw)
            right = settled.report is None or passes(settled.report) == passes(honest)
            return Check(right, lied, found, len(settled.liars - lying), reports)
    return Check(True, lied, 0, 0, reports)


def _measured(losses: Losses, draw: random.Random) -> Losses:
    return tuple(loss * (1 + draw.gauss(0, _APART)) for loss in losses)


def _report(owner: str, id_: str, truth: Truth, averages: Losses, draw: random.Random) -> CheckReport:
    return CheckReport(
        run="0" * 64, owner=owner, id=id_, outcome="done", seconds=1.0, parent=_measured(truth.parent, draw),
        averages=averages, raw=_measured(averages, draw),
    )  # fmt: skip


def table(tries: int) -> str:
    heads = (
        "lie",
        "liars",
        "lied alike",
        "with accepted work",
        "wrong verdicts",
        "of those who lied, found",
        "honest nodes wronged",
        "reports, mean",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for lie in LIES:
        for liars, together, known in ((1, False, 0), (4, False, 0), (4, True, 0), (4, True, 3)):
            draw = random.Random(f"{lie} {liars} {together} {known}")
            found = [check(draw, lie, liars, together, known) for _ in range(tries)]
            wrong = sum(not one.right for one in found)
            lied, caught = sum(one.lied for one in found), sum(one.found for one in found)
            wronged, reports = sum(one.wronged for one in found), sum(one.reports for one in found)
            cells = (
                lie, f"{liars} of {POOL}", "yes" if together else "no", f"{known}", interval(wrong, tries),
                interval(caught, lied), interval(wronged, reports - lied), f"{reports / tries:.2f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks lying-checkers", description=__doc__)
    parser.add_argument("--tries", type=int, default=2000, help="checks of each kind (default 2000)")
    arguments = parser.parse_args(argv)
    print(f"{arguments.tries} checks of each kind, {ROWS} rows, a pool of {POOL} nodes.\n")
    print(table(arguments.tries))
    few = max(1, arguments.tries // 100)
    print(f"\n{silent_checkers.CHECKS} checks one after another, {few} times: how long each takes.\n")
    print(silent_checkers.table(few))
