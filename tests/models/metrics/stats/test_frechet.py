"""Distances between distributions against closed forms and a second implementation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import sqrtm

from lutetia.models.metrics.fvd import distance_ratio, distances
from lutetia.models.metrics.stats.frechet import (
    Gaussian,
    frechet,
    frechet_at_infinity,
    frechet_debiased,
    frechet_of_rows,
    gaussian,
    load_gaussian,
    polynomial_mmd,
    save_gaussian,
)
from lutetia.system.errors import DataError

SPECTRUM = 3 / np.arange(1, 101) ** 0.5


def sample(seed: int, count: int, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 100)) * SPECTRUM * scale + shift


def test_frechet_of_diagonal_gaussians_matches_closed_form() -> None:
    first = Gaussian(np.array([0.0, 0.0]), np.diag([4.0, 9.0]), 10)
    second = Gaussian(np.array([3.0, 4.0]), np.diag([1.0, 9.0]), 10)
    assert frechet(first, second) == pytest.approx(25 + 1)  # |m1 - m2|^2 + (2 - 1)^2 + (3 - 3)^2
    assert frechet(first, first) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(300, 250), (40, 60), (40, 300)])
def test_frechet_by_three_methods_agrees(n: int, m: int) -> None:
    x, y = sample(0, n), sample(1, m, 0.2, 1.3)
    a, b = gaussian(x), gaussian(y)
    root = np.asarray(sqrtm(a.covariance @ b.covariance))
    by_sqrtm = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance) - 2 * np.trace(root).real
    assert frechet(a, b) == pytest.approx(by_sqrtm, rel=1e-4)  # sqrtm is the inexact one if N < D
    assert frechet_of_rows(x, y) == pytest.approx(frechet(a, b), rel=1e-6)
    assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-6)


def test_debiased_distance_of_equal_distributions_is_zero() -> None:
    pairs = [(sample(seed, 64), sample(seed + 100, 64)) for seed in range(8)]
    plain = np.mean([frechet_of_rows(x, y) for x, y in pairs])
    debiased = np.mean([frechet_debiased(x, y) for x, y in pairs])
    kernel = np.mean([polynomial_mmd(x, y) for x, y in pairs])
    assert plain > 15
    assert abs(debiased) < 0.1 * plain
    assert abs(kernel) < 0.02
    assert debiased < np.mean([frechet_at_infinity(x, y) for x, y in pairs]) < plain


def test_debiased_distance_matches_known_distance() -> None:
    truth = 100 * 0.5**2
    measured = np.mean([frechet_debiased(sample(seed, 128), sample(seed + 50, 128, 0.5)) for seed in range(6)])
    assert measured == pytest.approx(truth, rel=0.1)
    assert frechet_of_rows(sample(0, 128), sample(50, 128, 0.5)) > 1.3 * truth


def test_extrapolation_is_right_for_many_clips() -> None:
    x, y = sample(0, 1600)[:, :16], sample(1, 1600, 0.5)[:, :16]
    assert frechet_at_infinity(x, y) == pytest.approx(16 * 0.25, rel=0.1)
    assert frechet_at_infinity(x, y) == frechet_at_infinity(x, y)


def test_statistics_round_trip_through_a_file(tmp_path: Path) -> None:
    statistics = gaussian(sample(0, 30))
    save_gaussian(tmp_path / "s.safetensors", statistics)
    again = load_gaussian(tmp_path / "s.safetensors")
    assert (again.covariance == statistics.covariance).all()
    assert (again.mean == statistics.mean).all()
    with pytest.raises(DataError, match=r"no reference statistics at .*absent"):
        load_gaussian(tmp_path / "absent.safetensors")


def test_too_few_or_infinite_features_are_refused() -> None:
    with pytest.raises(DataError, match=r"at least 2 clips"):
        frechet_of_rows(np.zeros((1, 4)), np.zeros((5, 4)))
    with pytest.raises(DataError, match=r"not finite"):
        gaussian(np.full((4, 4), np.nan))
    with pytest.raises(DataError, match=r"use 12 or more"):
        frechet_at_infinity(np.zeros((5, 4)), np.zeros((50, 4)))


def test_distances_have_interval_and_floor() -> None:
    real, spare = sample(0, 40), sample(1, 40)
    measured = distances(real, sample(2, 40, 0.6), spare=spare, resamples=20, seeds=(7,))
    assert measured.floor is not None
    assert measured.floor.value == pytest.approx(frechet_of_rows(real, spare))
    assert measured.plain.low < measured.plain.value < measured.plain.high
    assert measured.plain.low > measured.floor.high
    assert measured.plain.seeds == (7,)
    halves = distances(real, spare, resamples=12)
    assert halves.floor is not None
    assert halves.floor.n == 20


def test_distance_ratio_uses_pairs_and_seeds() -> None:
    real = sample(0, 60)
    noise = sample(1, 60)
    worse, better = noise + 1.0, noise + 0.5  # the same prompts: the same deviations
    ratio = distance_ratio(real, worse, better, statistic=frechet_debiased, resamples=20)
    assert ratio
    assert ratio.low < 4 < ratio.high * 1.2
    assert ratio.low > 2
    several = distance_ratio(real, [worse, worse + 0.1], [better, better - 0.05], seeds=(1, 2), resamples=20)
    assert several
    assert several.method == "nested"
    assert several.seeds == (1, 2)
    assert several.high - several.low > ratio.high - ratio.low
    with pytest.raises(DataError, match=r"equally many clips"):
        distance_ratio(real, worse, better[:50])
    still = np.zeros_like(real)
    assert distance_ratio(still, worse, still, resamples=20) is None
