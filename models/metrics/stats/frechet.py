"""Distances between two sets of features: Fréchet between Gaussians, with and without its bias, and kernel MMD.

The Fréchet distance of finite samples is biased upwards. At the N of video studies that bias is larger than most effects: the
distance of two halves of one real set is several hundred. So four figures are reported together:

- the plain distance, comparable with papers at equal N;
- the debiased distance: less the mean distance *within* each set at the same subset size, so that equal distributions give 0 in
  expectation at any N (built like an energy distance);
- the extrapolation to 1/N = 0 (Chong & Forsyth 2020, "Effectively unbiased FID"). It needs N well above D, which is 400 for the
  logits of I3D; at smaller N it removes only a part of the bias (see docs/results/metrics-validation.md);
- the polynomial MMD (Binkowski et al. 2018, "KID"), unbiased by construction.

All statistics are float64 numpy arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file, save_file

from lutetia.system.errors import DataError
from lutetia.system.files import atomic_path

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and unbiased covariance [D, D] of `count` feature vectors."""

    mean: Array
    covariance: Array
    count: int


def gaussian(features: ArrayLike) -> Gaussian:
    """The statistics of features [N, D], N >= 2. Raises DataError if there are fewer, or if they are not finite."""
    rows = _rows(features)
    return Gaussian(rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False)), len(rows))


def frechet(first: Gaussian, second: Gaussian) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the square of the 2-Wasserstein distance of two Gaussians.

    The last trace is the sum of the square roots of the eigenvalues of C1^(1/2) C2 C1^(1/2). That product is symmetric, so
    `eigvalsh` is exact and fast. `sqrtm` of the plain product is neither when N < D makes the covariances singular.
    """
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ second.covariance @ root)
    cross = np.sqrt(np.maximum(inner, 0)).sum()
    shift = first.mean - second.mean
    return float(shift @ shift + np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross)


def frechet_of_rows(first: ArrayLike, second: ArrayLike) -> float:
    """`frechet` of two samples [N, D] and [M, D] without forming covariances: much faster for N < D, as resampling needs.

    The cross term is the nuclear norm of A Bᵀ, where Aᵀ A and Bᵀ B are the covariances.
    """
    x, y = _rows(first), _rows(second)
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    a, b = _factor(x - mean_x), _factor(y - mean_y)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    shift = mean_x - mean_y
    return float(shift @ shift + np.square(a).sum() + np.square(b).sum() - 2 * cross)


def frechet_at_infinity(first: ArrayLike, second: ArrayLike, *, sizes: int = 6, repeats: int = 3, seed: int = 0) -> float:
    """The Fréchet distance extrapolated to infinitely many clips: a least-squares line over 1/n, evaluated at 1/n = 0.

    Args:
        first: features [N, D], N >= 12.
        second: features [M, D], M >= 12.
        sizes: number of subset sizes n, evenly spaced in 1/n from a third of min(N, M) to min(N, M).
        repeats: subsets per size, drawn without replacement from both sets.
        seed: of the draws.
    """
    x, y = _rows(first), _rows(second)
    total = min(len(x), len(y))
    if total < 12:
        raise DataError(f"{total} clips are too few to extrapolate a Fréchet distance; use 12 or more on both sides")
    generator = np.random.default_rng(seed)
    inverse, values = [], []
    for share in np.linspace(1 / total, 3 / total, sizes):
        n = max(round(1 / share), 4)
        drawn = [_subset_distance(x, y, n, generator) for _ in range(1 if n == len(x) == len(y) else repeats)]
        inverse.append(1 / n)
        values.append(float(np.mean(drawn)))
    return float(np.polyfit(inverse, values, 1)[1])


def frechet_debiased(first: ArrayLike, second: ArrayLike, *, repeats: int = 3, seed: int = 0) -> float:
    """The mean distance between halves of the two sets, less the mean distance between the halves of each, over random halvings.

    0 in expectation for equal distributions at any N, slightly too low for distant ones; it may be negative. Needs N >= 4.
    """
    x, y = _rows(first), _rows(second)
    half = min(len(x), len(y)) // 2
    if half < 2:
        raise DataError(f"{min(len(x), len(y))} clips are too few to halve for a debiased distance; use 4 or more on both sides")
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(repeats):
        (a, b), (c, d) = (_halves(rows, half, generator) for rows in (x, y))
        between = sum(frechet_of_rows(u, v) for u, v in ((a, c), (b, d), (a, d), (b, c))) / 4
        drawn.append(between - (frechet_of_rows(a, b) + frechet_of_rows(c, d)) / 2)
    return float(np.mean(drawn))


def polynomial_mmd(first: ArrayLike, second: ArrayLike) -> float:
    """Unbiased squared MMD under k(x, y) = (x·y / D + 1)^3, the kernel of KID. 0 in expectation for equal distributions."""
    x, y = _rows(first), _rows(second)
    n, m, width = len(x), len(y), x.shape[1]
    within_x, within_y, between = ((u @ v.T / width + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    same = (within_x.sum() - np.trace(within_x)) / (n * (n - 1)) + (within_y.sum() - np.trace(within_y)) / (m * (m - 1))
    return float(same - 2 * between.mean())


def save_gaussian(path: Path, statistics: Gaussian) -> None:
    """Write the statistics of a reference set atomically (safetensors, float64)."""
    tensors = {
        "mean": torch.from_numpy(statistics.mean),
        "covariance": torch.from_numpy(statistics.covariance),
        "count": torch.tensor([statistics.count]),
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary)


def load_gaussian(path: Path) -> Gaussian:
    """Read statistics that `save_gaussian` wrote. Raises DataError if there are none."""
    if not path.is_file():
        raise DataError(f"there are no reference statistics at {path}; compute them from the reference clips")
    tensors = load_file(path)
    return Gaussian(tensors["mean"].numpy(), tensors["covariance"].numpy(), int(tensors["count"]))


def _rows(features: ArrayLike) -> Array:
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise DataError(
            f"a distance between distributions needs at least 2 clips on each side, not features of shape {rows.shape}"
        )
    if not np.isfinite(rows).all():
        raise DataError("the features of some clips are not finite numbers; check clips and weights")
    return rows


def _halves(rows: Array, half: int, generator: np.random.Generator) -> tuple[Array, Array]:
    order = generator.permutation(len(rows))
    return rows[order[:half]], rows[order[half : 2 * half]]


def _factor(centred: Array) -> Array:
    """A matrix A of at most D rows with Aᵀ A = covariance."""
    scaled = centred / np.sqrt(len(centred) - 1)
    return np.asarray(np.linalg.qr(scaled, mode="r")) if len(scaled) > scaled.shape[1] else scaled


def _subset_distance(x: Array, y: Array, n: int, generator: np.random.Generator) -> float:
    chosen = (generator.choice(len(rows), size=min(n, len(rows)), replace=False) for rows in (x, y))
    return frechet_of_rows(*(rows[index] for rows, index in zip((x, y), chosen, strict=True)))
