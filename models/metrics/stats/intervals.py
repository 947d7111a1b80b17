"""Figures with intervals. A statistic is a function of index arrays, one per independent sample; paired sets share an index.

- `bca` is for means and other nearly unbiased statistics.
- `subsampling` is for distances between distributions. A bootstrap puts duplicates into a sample, which lower its variance and
  raise a Fréchet distance; subsets without replacement (the delete-d jackknife of Shao & Wu 1989) do not.
- `across_seeds` is for trainings: the spread between seeds cannot be estimated within one training.

Arguments that the intervals share: `sizes` is the size of each sample, `resamples` the number of draws, `seed` that of the draws,
`level` the confidence level (0 to 1), `seeds` those of the trainings or samplings, for the record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from lutetia.protocol.schema.canonical import Frozen
from lutetia.system.errors import DataError

Index = NDArray[np.intp]
Statistic = Callable[..., float]


class Figure(Frozen):
    """A measured value with its interval."""

    value: float = Field(description="the value, in the unit of the metric")
    low: float = Field(description="lower end of the interval")
    high: float = Field(description="upper end of the interval")
    n: int = Field(ge=0, description="number of clips, or of pairs")
    seeds: tuple[int, ...] = Field(default=(), description="seeds of the trainings or samplings")
    method: Literal["percentile", "bca", "subsampling", "across seeds", "nested", "none"] = Field(
        default="none", description="how the interval was computed; none: there is no interval"
    )
    level: float = Field(default=0.95, description="confidence level of the interval, 0 to 1")

    def __str__(self) -> str:
        digits = 0 if abs(self.value) >= 100 else 2 if abs(self.value) >= 1 else 4
        if self.method == "none":
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def plain(value: float, n: int, seeds: Sequence[int] = ()) -> Figure:
    """A figure without an interval."""
    return Figure(value=value, low=value, high=value, n=n, seeds=tuple(seeds))


def percentile(
    statistic: Statistic,
    sizes: Sequence[int],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    seeds: Sequence[int] = (),
) -> Figure:
    """Efron's percentile interval: each sample is redrawn with replacement, independently of the others."""
    value, drawn = _bootstrap(statistic, sizes, resamples, seed)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return _figure(value, low, high, sizes, "percentile", level, seeds)


def bca(
    statistic: Statistic,
    sizes: Sequence[int],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    seeds: Sequence[int] = (),
) -> Figure:
    """Efron's bias-corrected and accelerated interval (1987). The acceleration comes from the jackknife over every sample.

    It falls back to the percentile interval if all resamples agree, or if the statistic lies outside all of them.
    """
    value, drawn = _bootstrap(statistic, sizes, resamples, seed)
    below = (np.mean(drawn < value) + np.mean(drawn <= value)) / 2
    if not 0 < below < 1:
        return percentile(statistic, sizes, resamples=resamples, seed=seed, level=level, seeds=seeds)
    normal = NormalDist()
    bias, acceleration = normal.inv_cdf(float(below)), _acceleration(statistic, sizes)
    points = []
    for z in (normal.inv_cdf((1 - level) / 2), normal.inv_cdf((1 + level) / 2)):
        points.append(normal.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))))
    low, high = np.quantile(drawn, points)
    return _figure(value, low, high, sizes, "bca", level, seeds)


def subsampling(
    statistic: Statistic,
    sizes: Sequence[int],
    *,
    fraction: float = 0.8,
    resamples: int = 100,
    seed: int = 0,
    level: float = 0.95,
    seeds: Sequence[int] = (),
) -> Figure:
    """Delete-d jackknife: the spread of the statistic over subsets of `fraction` of every sample, drawn without replacement.

    The variance over subsets of m is (n - m) / m times that over samples of n; the interval is value ± z · the scaled spread.
    It is an interval for the expectation of the statistic *at this n*: a bias that depends on n stays, and shows in the floor.
    """
    generator = np.random.default_rng(seed)
    kept = [max(2, round(size * fraction)) for size in sizes]
    drawn = [
        statistic(*(np.sort(generator.choice(size, m, replace=False)) for size, m in zip(sizes, kept, strict=True)))
        for _ in range(resamples)
    ]
    scale = math.sqrt(fraction / (1 - fraction))
    margin = NormalDist().inv_cdf((1 + level) / 2) * scale * float(np.std(drawn, ddof=1))
    value = statistic(*(np.arange(size) for size in sizes))
    return _figure(value, value - margin, value + margin, sizes, "subsampling", level, seeds)


def mean(values: ArrayLike, *, seeds: Sequence[int] = (), resamples: int = 2000, seed: int = 0) -> Figure:
    """The mean of one number per clip, with its BCa interval."""
    numbers = _vector(values)
    return bca(lambda index: float(numbers[index].mean()), [len(numbers)], resamples=resamples, seed=seed, seeds=seeds)


def paired_difference(first: ArrayLike, second: ArrayLike, *, seeds: Sequence[int] = (), seed: int = 0) -> Figure:
    """mean(first) - mean(second) over the same clips or prompts. What both sides share by prompt cancels out of the interval."""
    a, b = _pair(first, second)
    return mean(a - b, seeds=seeds, seed=seed)


def paired_ratio(
    first: ArrayLike, second: ArrayLike, *, seeds: Sequence[int] = (), resamples: int = 2000, seed: int = 0
) -> Figure:
    """mean(first) / mean(second) over the same clips or prompts, BCa."""
    a, b = _pair(first, second)
    return bca(lambda index: float(a[index].mean() / b[index].mean()), [len(a)], resamples=resamples, seed=seed, seeds=seeds)


def across_seeds(values: Sequence[float], *, seeds: Sequence[int], n: int, level: float = 0.95, ratio: bool = False) -> Figure:
    """The mean over independent trainings with Student's t interval (degrees of freedom: seeds - 1).

    With `ratio`, the geometric mean, with the interval computed on logarithms. Raises DataError with fewer than two seeds.
    """
    if len(values) < 2 or len(values) != len(seeds):
        raise DataError(f"{len(values)} values of {len(seeds)} seeds give no interval; train at least 2 seeds")
    from scipy.stats import t as student

    numbers = np.log(_vector(values)) if ratio else _vector(values)
    margin = float(student.ppf((1 + level) / 2, len(numbers) - 1) * numbers.std(ddof=1) / math.sqrt(len(numbers)))
    centre = float(numbers.mean())
    value, low, high = ((math.exp(x) if ratio else x) for x in (centre, centre - margin, centre + margin))
    return Figure(value=value, low=low, high=high, n=n, seeds=tuple(seeds), method="across seeds", level=level)


def nested(
    statistics: Sequence[Statistic],
    sizes: Sequence[int],
    *,
    seeds: Sequence[int],
    fraction: float = 0.8,
    resamples: int = 100,
    seed: int = 0,
    level: float = 0.95,
) -> Figure:
    """The mean of one statistic per training seed, where both the seeds and the clips vary.

    The margin is the root of the sum of two squares: Student's t margin of the seeds, and the margin of the clips from
    `subsampling`, with the same subset for all seeds because they share prompts and reference. The first includes a part of the
    second, so the interval is rather too wide.
    """
    count = len(statistics)
    if count < 2 or count != len(seeds):
        raise DataError(f"{count} statistics of {len(seeds)} seeds give no interval over seeds; train at least 2 seeds")
    whole = [statistic(*(np.arange(size) for size in sizes)) for statistic in statistics]
    trained = across_seeds(whole, seeds=seeds, n=min(sizes), level=level)

    def together(*index: Index) -> float:
        return float(np.mean([statistic(*index) for statistic in statistics]))

    clips = subsampling(together, sizes, fraction=fraction, resamples=resamples, seed=seed, level=level)
    margin = math.hypot(trained.high - trained.value, clips.high - clips.value)
    return _figure(clips.value, clips.value - margin, clips.value + margin, sizes, "nested", level, seeds)


def _bootstrap(statistic: Statistic, sizes: Sequence[int], resamples: int, seed: int) -> tuple[float, NDArray[np.float64]]:
    generator = np.random.default_rng(seed)
    drawn = np.array([statistic(*(generator.integers(size, size=size) for size in sizes)) for _ in range(resamples)])
    return statistic(*(np.arange(size) for size in sizes)), drawn


def _acceleration(statistic: Statistic, sizes: Sequence[int]) -> float:
    whole = [np.arange(size) for size in sizes]
    cubes = squares = 0.0
    for which, index in enumerate(whole):
        left = np.array([statistic(*whole[:which], np.delete(index, i), *whole[which + 1 :]) for i in range(len(index))])
        influence = (left.mean() - left) / len(index)
        cubes, squares = cubes + float((influence**3).sum()), squares + float((influence**2).sum())
    return cubes / (6 * squares**1.5) if squares > 0 else 0.0


def _figure(
    value: float, low: float, high: float, sizes: Sequence[int], method: str, level: float, seeds: Sequence[int]
) -> Figure:
    return Figure.model_validate(
        {"value": value, "low": low, "high": high, "n": min(sizes), "seeds": tuple(seeds), "method": method, "level": level}
    )


def _vector(values: ArrayLike) -> NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) < 2 or not np.isfinite(numbers).all():
        raise DataError(f"an interval needs a vector of at least 2 finite numbers, not an array of shape {numbers.shape}")
    return numbers


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = _vector(first), _vector(second)
    if len(a) != len(b):
        raise DataError(f"{len(a)} and {len(b)} values are not pairs; measure both sides on the same clips or prompts")
    return a, b
