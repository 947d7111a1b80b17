"""Fréchet video distance (FVD) and related distances, each with an interval and a floor, and a cache of reference statistics.

FVD compares the logits of I3D. It hardly notices wrong motion, so a second distance compares fields of optical flow
(`motion.py`). Each comes in four forms: the plain distance at this N, the debiased one, the extrapolation to infinite N, and the
unbiased kernel distance. The floor is the distance between two real sets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from torch import Tensor

from lutetia.models.metrics.features import Extractor, FeatureCache, set_digest
from lutetia.models.metrics.stats.frechet import (
    Gaussian,
    frechet_at_infinity,
    frechet_debiased,
    frechet_of_rows,
    gaussian,
    load_gaussian,
    polynomial_mmd,
    save_gaussian,
)
from lutetia.models.metrics.stats.intervals import Figure, Statistic, nested, subsampling
from lutetia.protocol.schema.canonical import Frozen
from lutetia.system.errors import DataError

Array = NDArray[np.float64]


class Distances(Frozen):
    """All distances of one set of clips from one real set, in squared units of the features."""

    plain: Figure = Field(description="Fréchet distance at this number of clips")
    debiased: Figure = Field(description="Fréchet distance less the mean distance within each set")
    at_infinity: Figure = Field(description="Fréchet distance extrapolated to infinitely many clips")
    kernel: Figure = Field(description="polynomial kernel distance (MMD), unbiased")
    floor: Figure | None = Field(default=None, description="plain distance of real clips from real clips")
    kernel_floor: Figure | None = Field(default=None, description="kernel distance of real clips from real clips")


def distances(
    reference: ArrayLike, clips: ArrayLike, *, spare: ArrayLike | None = None, resamples: int = 60, seeds: Sequence[int] = ()
) -> Distances:
    """Distances of clips from reference clips.

    Args:
        reference: features [M, D] of the reference clips.
        clips: features [N, D] of the clips.
        spare: features of more real clips. The floor compares N of them with the reference. Without them it compares two halves
            of the reference, at half the number of clips, and is too high; its `n` shows that.
        resamples: subsets drawn for each interval.
        seeds: seeds of the sampling, for the record.
    """
    x, y = np.asarray(reference, np.float64), np.asarray(clips, np.float64)

    def distance(statistic: Callable[[Array, Array], float], a: Array, b: Array, times: int = resamples) -> Figure:
        return subsampling(lambda i, j: statistic(a[i], b[j]), [len(a), len(b)], resamples=times, seeds=seeds)

    floor_x, floor_y = floor_pair(x, None if spare is None else np.asarray(spare, np.float64), len(y))
    return Distances(
        plain=distance(frechet_of_rows, x, y),
        # each of these two is itself about a dozen distances
        debiased=distance(frechet_debiased, x, y, max(12, resamples // 4)),
        at_infinity=distance(frechet_at_infinity, x, y, max(12, resamples // 4)),
        kernel=distance(polynomial_mmd, x, y),
        floor=distance(frechet_of_rows, floor_x, floor_y),
        kernel_floor=distance(polynomial_mmd, floor_x, floor_y),
    )


def floor_pair(reference: Array, spare: Array | None, wanted: int) -> tuple[Array, Array]:
    """Two disjoint real sets: the reference and `wanted` spare clips, or two halves of the reference if there are none."""
    if spare is not None and len(spare) >= 2:
        return reference, spare[:wanted]
    if len(reference) < 4:
        raise DataError(f"{len(reference)} real clips are too few for a floor; use 4 or more")
    order = np.random.default_rng(0).permutation(len(reference))
    half = len(reference) // 2
    return reference[order[:half]], reference[order[half : 2 * half]]


def distance_ratio(
    reference: ArrayLike,
    first: ArrayLike | Sequence[ArrayLike],
    second: ArrayLike | Sequence[ArrayLike],
    *,
    seeds: Sequence[int] = (),
    statistic: Callable[[Array, Array], float] = frechet_of_rows,
    resamples: int = 100,
) -> Figure | None:
    """distance(first) / distance(second), for instance FVD(monolith) / FVD(mixture), with an interval.

    Args:
        reference: features [M, D] of real clips.
        first: features [N, D] of clips, or a list of them, one per training seed. A list gives the mean over seeds, and an
            interval that includes the spread between seeds.
        second: likewise, from the same prompts in the same order; the sides are resampled as pairs.
        seeds: training seeds.
        statistic: the distance.
        resamples: subsets drawn for the interval.

    Returns None if the second distance is 0, for instance the motion of clips without any motion.
    Raises DataError if the sides have different numbers of clips.
    """
    x = np.asarray(reference, np.float64)
    pairs = list(zip(_sets(first), _sets(second), strict=True))
    count = len(pairs[0][0])
    if any(len(a) != count or len(b) != count for a, b in pairs):
        raise DataError(
            "a ratio of distances needs equally many clips on both sides, from the same prompts; generate the missing clips"
        )

    def ratio_of(pair: tuple[Array, Array]) -> Statistic:
        return lambda i, j: statistic(x[i], pair[0][j]) / statistic(x[i], pair[1][j])

    sizes = [len(x), count]
    with contextlib.suppress(ZeroDivisionError):
        if len(pairs) == 1:
            return subsampling(ratio_of(pairs[0]), sizes, resamples=resamples, seeds=seeds)
        return nested([ratio_of(pair) for pair in pairs], sizes, seeds=seeds, resamples=resamples)
    return None


def reference_statistics(
    cache: FeatureCache,
    extractor: Extractor,
    clips: Tensor,
    name: str = "logits",
    on_progress: Callable[[int, int], None] | None = None,
) -> Gaussian:
    """Mean and covariance of a reference set; kept in the cache under the digest of the clips, so computed once."""
    path = statistics_path(cache, extractor, clips, name)
    if path is not None and path.is_file():
        return load_gaussian(path)
    statistics = gaussian(cache.extract(extractor, clips, on_progress)[name].numpy())
    if path is not None:
        save_gaussian(path, statistics)
    return statistics


def statistics_path(cache: FeatureCache, extractor: Extractor, clips: Tensor, name: str) -> Path | None:
    """The file in which `reference_statistics` keeps those of `clips`; None without a cache folder."""
    path = cache.path(extractor.tag, set_digest(clips))
    return path.with_name(f"{path.stem}-{name}-statistics.safetensors") if path else None


def _sets(features: ArrayLike | Sequence[ArrayLike]) -> list[Array]:
    if isinstance(features, (list, tuple)):
        return [np.asarray(one, np.float64) for one in features]
    array = features.numpy() if isinstance(features, torch.Tensor) else np.asarray(features, np.float64)
    return [np.asarray(array, np.float64)] if array.ndim == 2 else [np.asarray(one, np.float64) for one in array]
