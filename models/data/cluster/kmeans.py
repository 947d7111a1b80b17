"""Partition clips into K clusters: fine k-means, merged by weighted Ward linkage, with bounds on the sizes.

As in DDM, many fine centroids (up to 1,024) are found first and merged to K coarse clusters; a clip belongs to the cluster of its
fine centroid. No coarse cluster may hold more than `largest_share` of the clips, since an expert of a catch-all cluster does not
specialise, nor fewer than `smallest` clips. `random` clusters are the control of a study; `kinds` uses the labels of the user.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lutetia.models.data.build_settings import MAX_FINE, ClusterSettings
from lutetia.system.errors import DataError

Labels = NDArray[np.int64]
Vectors = NDArray[np.float32]

_SMALLEST = 24  # clips of a cluster, where there are enough
_CLIPS_PER_FINE = 6
_DIMENSIONS = 64
_MINI_BATCH_BEYOND = 50_000
_log = logging.getLogger(__name__)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def smallest_cluster(settings: ClusterSettings, count: int) -> int:
    """The fewest of `count` clips that a cluster may hold. Raises DataError if there are too few for all clusters."""
    usual = max(2, min(_SMALLEST, count // (2 * settings.experts)))
    smallest = settings.smallest or usual
    if count < settings.experts * smallest:
        fit = count // smallest
        fewer = f"at most {_counted(fit, 'expert')} (--experts), " if fit else ""
        raise DataError(
            f"{_counted(count, 'clip')} {'is' if count == 1 else 'are'} too few for {_counted(settings.experts, 'expert')} of "
            f"at least {smallest} clips each; use {fewer}more clips, or a smaller minimum (--smallest)"
        )
    return smallest


@dataclass(frozen=True)
class Clustering:
    """The clusters of N clips.

    Attributes:
        labels: cluster of each clip [N], 0 to K-1, 0 the largest.
        fine: fine centroids [m, D], to place clips that were not clustered.
        fine_labels: cluster of each fine centroid [m].
        uncapped_share: share of the largest cluster before large clusters were split.
    """

    labels: Labels
    fine: Vectors
    fine_labels: Labels
    uncapped_share: float

    def place(self, vectors: Vectors) -> Labels:
        """The clusters of other clips with features `vectors` [N, D]: those of the nearest fine centroids."""
        return self.fine_labels[_nearest(vectors, self.fine)]


def cluster(vectors: Vectors, keys: Sequence[str], kinds: Sequence[str], settings: ClusterSettings) -> Clustering:
    """Cluster clips. Deterministic in its arguments.

    Args:
        vectors: features [N, D].
        keys: N content digests; clips with equal keys get the same cluster.
        kinds: N labels of the user, for the method `kinds`.
        settings: method, number and sizes.

    Raises DataError if the clips are too few, or too uneven, for that many clusters of that size.
    """
    count, experts = len(vectors), settings.experts
    smallest = smallest_cluster(settings, count)
    if settings.method == "random":
        return _finish(vectors, _random(keys, settings), 1 / experts)
    if settings.method == "kinds":
        return _finish(vectors, _by_kind(kinds, settings), 1.0)
    reduced = _reduce(vectors)
    distinct = len(np.unique(reduced, axis=0))
    if distinct < experts:
        raise DataError(
            f"the clips have only {distinct} distinct features, too few for {experts} experts; use at most {distinct}"
        )
    fine = _fine(reduced, min(settings.fine or MAX_FINE, max(experts, count // _CLIPS_PER_FINE), distinct), settings.seed)
    centroids, weights = _centroids(reduced, fine)
    free = merge(centroids, weights, experts, cap=float(count))
    share = float(np.bincount(free, weights).max() / count)
    cap = settings.largest_share or min(0.9, 2.2 / experts)
    coarse = free
    if share > cap:
        _log.info(
            "the largest cluster would hold %.0f %% of the clips and is split; the limit is %.0f %%",
            100 * share,
            100 * cap,
        )
        coarse = merge(centroids, weights, experts, cap * count)
    labels = _enforce_smallest(reduced, coarse[fine], settings, smallest)
    return _finish(vectors, labels, share)


def merge(centroids: NDArray[Any], weights: NDArray[Any], experts: int, cap: float) -> Labels:
    """Merge fine centroids [m, D] to `experts` groups [m] by weighted Ward linkage, none heavier than `cap` where possible."""
    places, sizes = centroids.astype(np.float64).copy(), weights.astype(np.float64).copy()
    group = np.arange(len(places))
    cost = _ward(places, sizes, places, sizes)
    heavy = sizes[:, None] + sizes > cap
    np.fill_diagonal(cost, np.inf)
    for _ in range(len(places) - experts):
        allowed = np.where(heavy, np.inf, cost)
        flat = int(np.argmin(allowed if np.isfinite(allowed.min()) else cost))
        keep, drop = sorted(divmod(flat, len(places)))
        places[keep] = (sizes[keep] * places[keep] + sizes[drop] * places[drop]) / (sizes[keep] + sizes[drop])
        sizes[keep] += sizes[drop]
        group[group == drop] = keep
        cost[drop, :] = cost[:, drop] = np.inf
        alive = np.isfinite(cost[keep])
        row = np.where(alive, _ward(places[keep : keep + 1], sizes[keep : keep + 1], places, sizes)[0], np.inf)
        row[keep] = np.inf
        cost[keep, :] = cost[:, keep] = row
        heavy[keep, :] = heavy[:, keep] = sizes[keep] + sizes > cap
    return np.unique(group, return_inverse=True)[1].astype(np.int64)


def _ward(a: NDArray[Any], a_sizes: NDArray[Any], b: NDArray[Any], b_sizes: NDArray[Any]) -> NDArray[np.float64]:
    """By how much the total within-cluster scatter grows if each of `a` is merged with each of `b`."""
    distance = np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0)
    return a_sizes[:, None] * b_sizes / (a_sizes[:, None] + b_sizes) * distance


def _reduce(vectors: Vectors) -> Vectors:
    """The leading principal components: they keep the distances and drop noise."""
    from sklearn.decomposition import PCA
    from threadpoolctl import threadpool_limits

    if vectors.shape[1] <= _DIMENSIONS:
        return vectors
    with threadpool_limits(1):  # one order of summation, so that equal input gives equal clusters
        width = min(_DIMENSIONS, len(vectors))
        return PCA(width, svd_solver="full").fit_transform(vectors.astype(np.float64)).astype(np.float32)


def _fine(vectors: Vectors, number: int, seed: int) -> Labels:
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    large = len(vectors) > _MINI_BATCH_BEYOND
    options: dict[str, Any] = {"n_clusters": number, "n_init": 1 if large else 2, "random_state": seed}
    chosen = MiniBatchKMeans(**options, batch_size=8192) if large else KMeans(**options)
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # if there are fewer distinct points than centroids, some stay empty
        labels = chosen.fit_predict(vectors)
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)  # drops the empty ones


def _centroids(vectors: Vectors, labels: Labels) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means [m, D] and sizes [m] of the labelled groups."""
    sizes = np.bincount(labels).astype(np.float64)
    sums = np.zeros((len(sizes), vectors.shape[1]))
    np.add.at(sums, labels, vectors.astype(np.float64))
    return sums / sizes[:, None], sizes


def _enforce_smallest(vectors: Vectors, labels: Labels, settings: ClusterSettings, smallest: int) -> Labels:
    """Merge clusters below `smallest` into their nearest neighbour, and split the largest one instead."""
    for _ in range(4 * settings.experts):
        centroids, sizes = _centroids(vectors, labels)
        small = int(np.argmin(sizes))
        if sizes[small] >= smallest:
            return labels
        cost = _ward(centroids[small : small + 1], sizes[small : small + 1], centroids, sizes)[0]
        cost[small] = np.inf
        labels = np.where(labels == small, int(np.argmin(cost)), labels)
        largest = int(np.argmax(np.bincount(labels, minlength=len(sizes))))
        members = np.flatnonzero(labels == largest)
        if len(members) < 2 * smallest:
            break
        labels[members[_half(vectors[members], settings.seed, smallest)]] = small
    raise DataError(
        f"the clusters are too uneven for {settings.experts} experts of at least {smallest} clips; "
        "use fewer experts (--experts), more clips, or a smaller minimum (--smallest)"
    )


def _half(vectors: Vectors, seed: int, smallest: int) -> NDArray[np.bool_]:
    """Which clips go to a new cluster: by 2-means, or, if that is too uneven, split at the median of the main direction."""
    labels = _fine(vectors, min(2, len(np.unique(vectors, axis=0))), seed)
    if min(labels.sum(), len(labels) - labels.sum()) >= smallest:
        return labels == 1
    centred = vectors - vectors.mean(0)
    main = np.linalg.svd(centred, full_matrices=False)[2][0]
    order = np.argsort(centred @ main, kind="stable")
    upper = np.zeros(len(vectors), bool)
    upper[order[len(order) // 2 :]] = True
    return upper


def _random(keys: Sequence[str], settings: ClusterSettings) -> Labels:
    """Equal shares by a seeded hash of the content: the control of a study."""
    ranked = sorted(set(keys), key=lambda key: hashlib.sha256(f"{settings.seed}|{key}".encode()).digest())
    label = {key: place % settings.experts for place, key in enumerate(ranked)}
    return np.array([label[key] for key in keys], np.int64)


def _by_kind(kinds: Sequence[str], settings: ClusterSettings) -> Labels:
    names = sorted(set(kinds))
    if len(names) != settings.experts or "" in names:
        listed = ", ".join(name or "(none)" for name in names[:8])
        raise DataError(f"clustering by kind needs one kind per expert: {settings.experts} experts, but the kinds are {listed}")
    return np.array([names.index(kind) for kind in kinds], np.int64)


def _finish(vectors: Vectors, labels: Labels, uncapped_share: float) -> Clustering:
    """Number the clusters by size, and compute fine centroids to place other clips."""
    sizes = np.bincount(labels)
    first = [int(np.argmax(labels == c)) for c in range(len(sizes))]
    order = sorted(range(len(sizes)), key=lambda c: (-sizes[c], first[c]))
    rank = np.argsort(order)
    labels = rank[labels].astype(np.int64)
    fine, owners = [], []
    for index in range(len(sizes)):
        members = vectors[labels == index]
        parts = _fine(
            members, max(1, min(MAX_FINE // len(sizes), len(members) // _CLIPS_PER_FINE, len(np.unique(members, axis=0)))), 0
        )
        fine.append(_centroids(members, parts)[0])
        owners += [index] * (int(parts.max()) + 1)
    return Clustering(labels, np.concatenate(fine).astype(np.float32), np.array(owners, np.int64), uncapped_share)


def _nearest(vectors: Vectors, centroids: Vectors) -> NDArray[np.int64]:
    distance = (centroids**2).sum(1) - 2 * vectors @ centroids.T
    return np.argmin(distance, axis=1)
