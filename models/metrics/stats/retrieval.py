"""Does a clip show what its prompt says? Retrieve prompts from clips by a probe that was fitted on real pairs only.

It stands in for CLIP where its weights are not available, and reports name it so: `retrieval (ridge probe I3D to MiniLM)`.
A ridge regression maps the pooled I3D features of real training clips to the sentence vectors of their captions. It maps each
evaluated clip in the same way, and the candidates (held-out prompts) are ranked by cosine. CLIP itself is in `networks/clip.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors.torch import load_file, save_file

from lutetia.models.metrics.stats.intervals import Figure, mean, plain
from lutetia.system.errors import DataError
from lutetia.system.files import atomic_path

PROBE_NAME = "retrieval (ridge probe I3D to MiniLM)"
ALPHAS = tuple(10.0**power for power in range(-1, 6))
MIN_PAIRS = 20
Array = NDArray[np.float64]


@dataclass(frozen=True)
class RetrievalProbe:
    """A linear map from standardised features [D] to sentence space [E]; fitted on `pairs` real pairs with penalty `alpha`."""

    mean: Array
    scale: Array
    weight: Array
    offset: Array
    alpha: float
    pairs: int

    def __call__(self, features: ArrayLike) -> Array:
        """Features [N, D] to unit vectors [N, E]."""
        rows = (np.asarray(features, np.float64) - self.mean) / self.scale
        return _unit(rows @ self.weight + self.offset)


def fit_probe(features: ArrayLike, sentences: ArrayLike) -> RetrievalProbe:
    """Fit the probe on features [N, D] and sentence vectors [N, E] of real pairs; the penalty is chosen by leave-one-out.

    Do not fit it on generated clips: it would learn to ignore their faults. Raises DataError with fewer than 20 pairs.
    """
    from sklearn.linear_model import RidgeCV

    x, y = np.asarray(features, np.float64), np.asarray(sentences, np.float64)
    if len(x) != len(y) or len(x) < MIN_PAIRS:
        raise DataError(f"a retrieval probe needs {MIN_PAIRS} or more real pairs, not {len(x)} clips and {len(y)} captions")
    centre, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    ridge: Any = RidgeCV(alphas=ALPHAS).fit((x - centre) / scale, y)
    return RetrievalProbe(centre, scale, ridge.coef_.T.copy(), np.asarray(ridge.intercept_), float(ridge.alpha_), len(x))


def save_probe(path: Path, probe: RetrievalProbe) -> None:
    """Write a probe (safetensors, float64), so that later studies can use the same one."""
    arrays = {name: torch.from_numpy(getattr(probe, name)) for name in ("mean", "scale", "weight", "offset")}
    chosen = torch.tensor([probe.alpha, float(probe.pairs)], dtype=torch.float64)
    with atomic_path(path) as temporary:
        save_file({**arrays, "chosen": chosen}, temporary)


def load_probe(path: Path) -> RetrievalProbe:
    """Read a probe that `save_probe` wrote. Raises DataError if there is none."""
    if not path.is_file():
        raise DataError(f"there is no probe at {path}; fit one on real pairs")
    tensors = {name: value.numpy() for name, value in load_file(path).items()}
    alpha, pairs = tensors.pop("chosen")
    return RetrievalProbe(**tensors, alpha=float(alpha), pairs=int(pairs))


@dataclass(frozen=True)
class Retrieval:
    """How well prompts are found from clips.

    Attributes:
        recall_1: share of clips whose own prompt ranks first; 1 / `candidates` by chance.
        recall_5: share of clips whose own prompt is among the first five.
        mrr: mean reciprocal rank of the own prompt.
        candidates: number of prompts to choose from.
        ranks: rank of the own prompt of each clip [N], from 1.
    """

    recall_1: Figure
    recall_5: Figure
    mrr: Figure
    candidates: int
    ranks: NDArray[np.int64]


def rank(scores: ArrayLike, right: Sequence[int]) -> NDArray[np.int64]:
    """The rank, from 1, of candidate `right[i]` in row i of scores [N, candidates]. Half of the ties rank before it."""
    table = np.asarray(scores, np.float64)
    right_scores = table[np.arange(len(table)), np.asarray(right)][:, None]
    ties = (table == right_scores).sum(axis=1) - 1
    return ((table > right_scores).sum(axis=1) + 1 + (ties + 1) // 2).astype(np.int64)


def summarise(ranks: NDArray[np.int64], candidates: int, seeds: Sequence[int] = ()) -> Retrieval:
    """Recall at 1 and 5 and mean reciprocal rank of `ranks` [N], with intervals over clips."""
    columns = ((ranks <= 1).astype(float), (ranks <= 5).astype(float), 1 / ranks)
    first, fifth, reciprocal = (_mean(column, seeds) for column in columns)
    return Retrieval(first, fifth, reciprocal, candidates, ranks)


def retrieve(
    probe: RetrievalProbe,
    features: ArrayLike,
    captions: Sequence[str],
    candidates: Sequence[str],
    vectors: ArrayLike,
    seeds: Sequence[int] = (),
) -> Retrieval:
    """Rank the candidate prompts for each clip.

    Args:
        probe: maps features to sentence space.
        features: [N, D] of the clips.
        captions: the N prompts of the clips.
        candidates: M held-out prompts; a repeated wording counts once.
        vectors: sentence vectors [M, E] of the candidates.
        seeds: seeds of the sampling, for the record.

    Raises DataError if a caption is not among the candidates.
    """
    place: dict[str, int] = {}
    for number, candidate in enumerate(candidates):
        place.setdefault(candidate, number)
    unknown = next((caption for caption in captions if caption not in place), None)
    if unknown is not None:
        raise DataError(f"the prompt {unknown!r} is not among the {len(candidates)} candidates; add it, or remove the clip")
    kept = list(place.values())
    column = {candidate: number for number, candidate in enumerate(place)}
    scores = probe(features) @ _unit(np.asarray(vectors, np.float64)[kept]).T
    return summarise(rank(scores, [column[caption] for caption in captions]), len(kept), seeds)


def _mean(values: NDArray[np.float64], seeds: Sequence[int]) -> Figure:
    return mean(values, seeds=seeds) if len(values) > 1 else plain(float(values.mean()), len(values), seeds)


def _unit(rows: Array) -> Array:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
