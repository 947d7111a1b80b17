"""How much worse than its parent a result may score on held-out rows: a tolerance, and an interval for few rows. Pure.

A row is one held-out clip with one noise and one time. The same rows score both sides, so each gives a difference, and the mean
of the differences has a standard error. Two clips with four noises each are eight rows: their mean moves by several percent
between epochs that are equally good. So a result is refused only if its excess over the tolerance is significant, or larger than
the tolerance again (at least WIDEST): beyond that no spread of the rows is an excuse, because an author can make them spread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.99
"""One-sided confidence that a refused result is worse than the tolerance allows."""
WIDEST = 0.1
"""The interval widens the bound at most by this fraction of the loss, or by the tolerance if that is larger."""

FEWEST_ROWS = 8
"""A result is never judged on fewer rows than this, unless its shard has fewer. `chance_refused` says what so few rows show."""

Losses = Sequence[float]
"""Held-out losses row by row."""


@dataclass(frozen=True, slots=True)
class Excess:
    """A comparison of two mean losses. `bound` is the highest mean that passes."""

    loss: float
    base: float
    bound: float
    rows: int

    @property
    def over(self) -> float:
        """By which fraction of the base the loss exceeds its bound."""
        return (self.loss - self.bound) / self.base if self.base > 0 else math.inf

    @property
    def passes(self) -> bool:
        return math.isfinite(self.loss) and self.loss <= self.bound


def mean(losses: Losses) -> float:
    """NaN without rows, and where any row is NaN."""
    return math.fsum(losses) / len(losses) if losses and all(map(math.isfinite, losses)) else math.nan


def in_common(*losses: Losses) -> tuple[Losses, ...]:
    """The first rows, as many as each side has: where time was short one side may have scored fewer of the same order."""
    count = min(map(len, losses))
    return tuple(rows[:count] for rows in losses)


def compare_rows(losses: Losses, base: Losses, tolerance: float) -> Excess:
    """Whether `losses` exceed `base` by more than the fraction `tolerance` and the uncertainty of so few rows.

    Args:
        losses: of the weights that are judged, row by row.
        base: of the weights that they are compared with, on the same rows.
        tolerance: fraction of `base` that is always allowed.
    """
    ours, theirs = mean(losses), mean(base)
    bound = theirs * (1 + tolerance)
    if math.isfinite(ours) and ours > bound:
        bound += min(_half_width(losses, base, tolerance), max(tolerance, WIDEST) * theirs)
    return Excess(ours, theirs, bound, len(losses))


def _half_width(losses: Losses, base: Losses, tolerance: float) -> float:
    """Half width of the one-sided interval of the mean excess. Without a second row it is unbounded."""
    excess = [ours - (1 + tolerance) * theirs for ours, theirs in zip(losses, base, strict=True)]
    count, centre = len(excess), mean(excess)
    if count < 2:
        return math.inf
    from scipy.special import stdtrit  # 0.2 s; most results never need it

    deviation = math.sqrt(math.fsum((value - centre) ** 2 for value in excess) / (count - 1))
    return float(stdtrit(count - 1, CONFIDENCE)) * deviation / math.sqrt(count)


def chance_refused(rows: int, excess: float, spread: float, tolerance: float) -> float:
    """The probability that `compare_rows` refuses a result, if differences of rows are normally distributed.

    With `excess` at `tolerance` it is the rate at which results are refused that just may pass, with more the power of the check.
    The mean and the standard deviation of a normal sample are independent, so the mean's part of the probability is summed over
    equally likely values of the deviation (chi-square with `rows` - 1 degrees of freedom).

    Args:
        rows: number of rows that both sides were scored on, at least 2.
        excess: the true relative excess of the result's loss over its parent's.
        spread: standard deviation over the rows of loss minus allowed loss, as a fraction of the parent's mean loss.
        tolerance: fraction that is always allowed.
    """
    from scipy.special import chdtri, ndtr, stdtrit

    t, steps, total = float(stdtrit(rows - 1, CONFIDENCE)), 400, 0.0
    error = spread / math.sqrt(rows)
    for step in range(steps):
        deviation = spread * math.sqrt(float(chdtri(rows - 1, 1 - (step + 0.5) / steps)) / (rows - 1))
        half = min(t * deviation / math.sqrt(rows), max(tolerance, WIDEST))
        total += float(ndtr((excess - tolerance - half) / error)) if error else float(excess > tolerance)
    return total / steps
