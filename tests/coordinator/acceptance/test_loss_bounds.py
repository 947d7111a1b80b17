"""Bounds on held-out losses know how few rows they stand on."""

from __future__ import annotations

import math
import random

import pytest

from lutetia.coordinator.acceptance.checks import compare_losses, compare_raw
from lutetia.coordinator.acceptance.loss_bounds import FEWEST_ROWS, WIDEST, chance_refused, compare_rows, in_common

PARENT = [0.30, 0.50, 0.70, 0.90, 0.35, 0.55, 0.75, 0.95]
"""Two clips with four noises each."""


def scaled(*factors: float) -> list[float]:
    return [loss * factor for loss, factor in zip(PARENT, factors, strict=True)]


def test_an_excess_within_the_noise_of_eight_rows_passes():
    """0.6 % above the bare tolerance, where single rows differ by 10 %."""
    raw = scaled(1.25, 1.36, 1.41, 1.22, 1.38, 1.24, 1.35, 1.28)
    assert sum(raw) > 1.3 * sum(PARENT)
    assert compare_raw(raw, PARENT, PARENT, 0.3) is None


def test_the_same_excess_in_every_row_is_refused():
    verdict = compare_losses(scaled(*[1.021] * 8), PARENT, 0.02)
    assert verdict is not None
    assert (verdict.outcome, verdict.check) == ("invalid", "holdout")
    assert "on 8 rows" in verdict.text


def test_an_excess_in_one_row_is_no_excuse_beyond_the_widest_interval():
    """One row may be made arbitrarily bad, which makes the interval arbitrarily wide."""
    assert not compare_rows(scaled(1, 1, 1, 1, 1, 1, 1, 2.5), PARENT, 0.02).passes
    assert compare_rows([10.0], [10.0 * (1 + 0.02 + WIDEST / 2)], 0.02).passes
    assert not compare_rows([10.0 * (1 + 0.02 + 1.01 * WIDEST)], [10.0], 0.02).passes


@pytest.mark.parametrize("losses", [[], [math.nan] * 8, [math.inf] + [0.1] * 7])
def test_losses_that_are_not_numbers_never_pass(losses: list[float]):
    verdict = compare_losses(losses, PARENT, 0.02)
    assert verdict is not None
    assert verdict.loss is None


def test_many_rows_leave_only_the_tolerance():
    draw = random.Random(5)
    base = [draw.uniform(0.2, 1.0) for _ in range(4000)]
    losses = [loss * (1.03 + draw.gauss(0, 0.05)) for loss in base]
    found = compare_rows(losses, base, 0.02)
    assert not found.passes
    assert found.bound < 1.023 * found.base


def test_honest_noise_on_few_rows_is_rarely_refused():
    """Of 2,000 comparisons of equally good weights on eight rows; the bare tolerance refuses a quarter."""
    draw, refused, bare = random.Random(1), 0, 0
    for _ in range(2000):
        losses = [loss * (1 + draw.gauss(0, 0.1)) for loss in PARENT]
        refused += compare_losses(losses, PARENT, 0.02) is not None
        bare += sum(losses) > 1.02 * sum(PARENT)
    assert refused <= 40
    assert bare > 500


@pytest.mark.parametrize(("rows", "excess", "spread"), [(8, 0.02, 0.05), (8, 0.08, 0.05), (8, 0.02, 0.2), (64, 0.04, 0.05)])
def test_chance_refused_is_what_samples_of_rows_show(rows: int, excess: float, spread: float):
    draw, base, refused, tries = random.Random(1), [1.0] * rows, 0, 1500
    for _ in range(tries):
        refused += not compare_rows([1.0 + draw.gauss(excess, spread) for _ in range(rows)], base, 0.02).passes
    expected = chance_refused(rows, excess, spread, 0.02)
    assert abs(refused / tries - expected) < 4 * math.sqrt(expected * (1 - expected) / tries) + 0.002


def test_power_grows_with_rows_and_excess_and_honest_results_pass():
    assert chance_refused(FEWEST_ROWS, 0.02, 0.05, 0.02) <= 1.01 * 0.01
    powers = [chance_refused(FEWEST_ROWS, excess, 0.05, 0.02) for excess in (0.02, 0.05, 0.1, 0.2)]
    assert powers == sorted(powers)
    assert powers[-1] > 0.99
    assert chance_refused(64, 0.05, 0.05, 0.02) > 2 * chance_refused(FEWEST_ROWS, 0.05, 0.05, 0.02)


def test_sides_of_unequal_length_are_compared_on_the_first_rows():
    assert in_common((1.0, 2.0, 3.0), (4.0, 5.0)) == ((1.0, 2.0), (4.0, 5.0))
