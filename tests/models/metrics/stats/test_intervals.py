"""Intervals have their coverage, and take pairs and seeds into account."""

from __future__ import annotations

import numpy as np
import pytest

from lutetia.models.metrics.stats.frechet import frechet_of_rows
from lutetia.models.metrics.stats.intervals import (
    Figure,
    across_seeds,
    bca,
    mean,
    nested,
    paired_difference,
    paired_ratio,
    percentile,
    plain,
    subsampling,
)
from lutetia.system.errors import DataError


def test_bca_covers_the_mean_of_skewed_values() -> None:
    generator = np.random.default_rng(0)
    covered = sum(
        figure.low <= 1 <= figure.high
        for figure in (mean(generator.exponential(size=40), resamples=400, seed=number) for number in range(100))
    )
    assert 87 <= covered <= 99


def test_subsampling_covers_a_distance_and_bootstrap_does_not() -> None:
    generator = np.random.default_rng(1)
    spread = 5 / np.arange(1, 61) ** 0.7

    def draw(shift: float) -> np.ndarray:
        return generator.normal(size=(40, 60)) * spread + shift

    expected = np.mean([frechet_of_rows(draw(0), draw(0.3)) for _ in range(150)])
    covered = {"subsampling": 0, "percentile": 0}
    for number in range(24):
        x, y = draw(0), draw(0.3)
        for name, interval in (("subsampling", subsampling), ("percentile", percentile)):
            figure = interval(lambda i, j, x=x, y=y: frechet_of_rows(x[i], y[j]), [40, 40], resamples=40, seed=number)
            covered[name] += bool(figure.low <= expected <= figure.high)
    assert covered["subsampling"] >= 20
    assert covered["percentile"] <= 8  # duplicates lower the variance: the interval lies above the value


def test_paired_statistics_cancel_common_variation() -> None:
    generator = np.random.default_rng(2)
    hard = generator.normal(size=50) * 5
    first, second = hard + 0.5 + generator.normal(size=50) * 0.2, hard + generator.normal(size=50) * 0.2
    difference = paired_difference(first, second)
    assert difference.low > 0.3
    assert difference.high < 0.7
    ratio = paired_ratio(first + 100, second + 100)
    assert 1.003 < ratio.low < ratio.value < ratio.high < 1.008
    with pytest.raises(DataError, match=r"not pairs"):
        paired_difference(first, second[:10])


def test_across_seeds_uses_student_t_over_seeds() -> None:
    figure = across_seeds([2.0, 2.5, 3.0], seeds=(0, 1, 2), n=256)
    assert figure.value == pytest.approx(2.5)
    assert figure.high - figure.value == pytest.approx(4.303 * 0.5 / 3**0.5, rel=1e-3)
    ratio = across_seeds([1.0, 4.0], seeds=(0, 1), n=256, ratio=True)
    assert ratio.value == pytest.approx(2)
    assert ratio.low * ratio.high == pytest.approx(4)
    with pytest.raises(DataError, match=r"at least 2 seeds"):
        across_seeds([2.0], seeds=(0,), n=256)


def test_nested_interval_is_wider_than_across_seeds() -> None:
    values = np.random.default_rng(3).normal(size=(3, 60)) + np.array([[0.0], [0.3], [0.9]])
    statistics = [lambda index, row=row: float(row[index].mean()) for row in values]
    both = nested(statistics, [60], seeds=(0, 1, 2), resamples=40)
    seeds = across_seeds([row.mean() for row in values], seeds=(0, 1, 2), n=60)
    assert both.value == pytest.approx(values.mean())
    assert both.high - both.low > seeds.high - seeds.low


def test_constant_statistic_has_an_empty_interval() -> None:
    figure = bca(lambda index: 1.0, [10], resamples=20)
    assert (figure.low, figure.value, figure.high) == (1, 1, 1)
    assert str(figure) == "1.00 [1.00, 1.00]"
    assert str(plain(123.4, 5)) == "123"
    assert Figure.model_validate_json(figure.model_dump_json()) == figure
    with pytest.raises(DataError, match=r"at least 2 finite numbers"):
        mean([1.0])


def test_intervals_depend_only_on_the_seed() -> None:
    values = np.random.default_rng(4).normal(size=30)
    assert mean(values, seed=5) == mean(values, seed=5)
    assert mean(values, seed=5) != mean(values, seed=6)
