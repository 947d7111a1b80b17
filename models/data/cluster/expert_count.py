"""How many experts the data deserve: by silhouette, by the sizes of the clusters, and by the budget.

More experts specialise more, but each learns anew what the clusters share, on its own part of the budget. So the best number
grows with the budget: on the union of three sets, at 18,000 samples in all, mixtures of 3 and 4 experts did best and one of 8 was
worse than a single model (docs/results/union).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lutetia.models.data.build_settings import ClusterSettings
from lutetia.models.data.cluster.kmeans import Vectors, cluster, smallest_cluster
from lutetia.models.data.cluster.report import silhouettes
from lutetia.system.errors import DataError

CANDIDATES = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
SAMPLES_PER_EXPERT = 4_500
"""Training samples that an expert needs at least: 4 experts did well on 18,000, 8 did not."""
LEAST_SILHOUETTE = 0.05
"""Below it the clusters mean so little that experts would be isolated without being specialised."""
CLOSE = 0.02
"""Silhouettes this close are taken as equal, and the smaller number of experts wins."""


@dataclass(frozen=True)
class Candidate:
    """A number of experts that was tried: silhouette (-1 to 1) and sizes in clips, or why it cannot be had."""

    experts: int
    silhouette: float = 0.0
    smallest: int = 0
    largest: int = 0
    impossible: str = ""


@dataclass(frozen=True)
class Proposal:
    """The number of experts, why, and all that were tried."""

    experts: int
    reason: str
    tried: tuple[Candidate, ...]


def propose_experts(
    vectors: Vectors, keys: Sequence[str], kinds: Sequence[str], settings: ClusterSettings, samples: int | None
) -> Proposal:
    """Try the candidates that clips and budget allow, and choose one. Deterministic.

    Args:
        vectors: features of the training clips [N, D].
        keys, kinds: as for `cluster`.
        settings: of the clustering; its number of experts is not used.
        samples: training samples of all experts together; None: the budget sets no limit.
    """
    affordable = CANDIDATES[-1] if samples is None else samples // SAMPLES_PER_EXPERT
    tried = []
    for experts in CANDIDATES:
        if experts > affordable or experts > len(vectors) // 4:
            break
        tried.append(_try(vectors, keys, kinds, settings.model_copy(update={"experts": experts})))
    return choose(tried, len(vectors), samples)


def choose(tried: Sequence[Candidate], clips: int, samples: int | None) -> Proposal:
    """The candidate with the highest silhouette; among those that are close to it, the one with the fewest experts."""
    possible = [each for each in tried if not each.impossible]
    budget = "" if samples is None else f", and {samples:,} samples give each expert at least {SAMPLES_PER_EXPERT:,}"
    if not possible:
        why = tried[0].impossible if tried else f"{clips} clips" + ("" if samples is None else f" and {samples:,} samples")
        return Proposal(1, f"1 expert: there is not enough for two ({why})", tuple(tried))
    best = max(each.silhouette for each in possible)
    if best < LEAST_SILHOUETTE:
        text = f"1 expert: the clips form no clusters (best silhouette {best:.2f}, with {_named(possible, best).experts} experts)"
        return Proposal(1, text, tuple(tried))
    chosen = next(each for each in possible if each.silhouette >= best - CLOSE)
    text = (
        f"{chosen.experts} experts: silhouette {chosen.silhouette:.2f} (best {best:.2f} of {len(possible)} tried), "
        f"clusters of {chosen.smallest:,} to {chosen.largest:,} clips{budget}"
    )
    return Proposal(chosen.experts, text, tuple(tried))


def _named(possible: Sequence[Candidate], best: float) -> Candidate:
    return next(each for each in possible if each.silhouette == best)


def _try(vectors: Vectors, keys: Sequence[str], kinds: Sequence[str], settings: ClusterSettings) -> Candidate:
    try:
        smallest_cluster(settings, len(vectors))
        labels = cluster(vectors, keys, kinds, settings).labels
    except DataError as error:
        return Candidate(settings.experts, impossible=str(error))
    sizes = np.bincount(labels)
    score = float(np.nanmean(silhouettes(vectors, labels)))
    return Candidate(settings.experts, round(score, 4), int(sizes.min()), int(sizes.max()))
