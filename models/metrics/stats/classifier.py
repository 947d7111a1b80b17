"""Prompts from clips by an independent classifier: one that shares neither network nor text encoder with the other metrics.

From EfficientNet-lite0 features of frames, logistic regressions say which words the caption holds, one per word that the real
training captions use often enough. A candidate prompt is scored by the probability of its words and of the absence of all others.
Fitted on real pairs only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lutetia.models.metrics.stats.intervals import Figure, mean
from lutetia.models.metrics.stats.retrieval import Retrieval, rank, summarise
from lutetia.system.errors import DataError

WORDS_NAME = "words of the prompt, balanced accuracy"
CLASSIFIER_NAME = "retrieval (word classifier on EfficientNet-lite0)"
MIN_PAIRS = 20
COMPONENTS = 128
Array = NDArray[np.float64]


def words(caption: str) -> set[str]:
    """The distinct lower-case words of a caption, without numbers' and letters' punctuation."""
    return set(re.findall(r"[a-z0-9]+", caption.lower()))


@dataclass(frozen=True)
class WordClassifier:
    """Probabilities of `vocabulary` from features: standardise, project on `axes`, then one logistic regression per word."""

    vocabulary: tuple[str, ...]
    mean: Array
    axes: Array
    weight: Array
    offset: Array
    pairs: int

    def log_odds(self, features: ArrayLike) -> Array:
        """Features [N, D] to log-odds [N, words]."""
        rows = (np.asarray(features, np.float64) - self.mean) @ self.axes
        return rows @ self.weight + self.offset

    def targets(self, captions: Sequence[str]) -> Array:
        """Which words of the vocabulary each caption holds: 0 or 1, [N, words]."""
        return np.array([[float(word in words(caption)) for word in self.vocabulary] for caption in captions])

    def scores(self, features: ArrayLike, candidates: Sequence[str]) -> Array:
        """The log-likelihood [N, candidates] of each candidate's words, up to a constant per clip."""
        return self.log_odds(features) @ self.targets(candidates).T


def fit_classifier(
    features: ArrayLike, captions: Sequence[str], *, min_count: int = 5, components: int = COMPONENTS
) -> WordClassifier:
    """Fit on real pairs: features [N, D] and their captions. Words in fewer than `min_count` captions, or missing from fewer, are
    left out, because nothing can be learnt of them. Raises DataError with fewer than 20 pairs or without any such word."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    rows = np.asarray(features, np.float64)
    if len(rows) != len(captions) or len(rows) < MIN_PAIRS:
        raise DataError(
            f"a word classifier needs {MIN_PAIRS} or more real pairs, not {len(rows)} clips and {len(captions)} captions"
        )
    counts = Counter(word for caption in captions for word in words(caption))
    vocabulary = tuple(sorted(word for word, n in counts.items() if min_count <= n <= len(rows) - min_count))
    if not vocabulary:
        raise DataError(
            f"no word stands in {min_count} or more of the {len(rows)} captions and lacks in as many; use more real pairs"
        )
    pca: Any = PCA(n_components=min(components, len(rows) - 1, rows.shape[1]), whiten=True, svd_solver="full").fit(rows)
    axes = pca.components_.T / np.sqrt(np.maximum(pca.explained_variance_, 1e-12))
    projected = (rows - pca.mean_) @ axes
    weight, offset = np.empty((axes.shape[1], len(vocabulary))), np.empty(len(vocabulary))
    holds = [words(caption) for caption in captions]
    for column, word in enumerate(vocabulary):
        present = np.array([word in held for held in holds])
        # C well below 1: there are about as many components as clips, and the candidates' order needs calibrated odds
        fitted = LogisticRegression(C=0.05, max_iter=200).fit(projected, present)
        weight[:, column], offset[column] = fitted.coef_[0], float(fitted.intercept_[0])
    return WordClassifier(vocabulary, np.asarray(pca.mean_), axes, weight, offset, len(rows))


@dataclass(frozen=True)
class Accuracy:
    """`retrieval` of whole prompts; `words`: balanced accuracy over the vocabulary (chance 0.5), the mean of `per_clip` [N]."""

    retrieval: Retrieval
    words: Figure
    per_clip: Array


def classify(
    classifier: WordClassifier,
    features: ArrayLike,
    captions: Sequence[str],
    candidates: Sequence[str],
    seeds: Sequence[int] = (),
) -> Accuracy:
    """Judge clips with `features` [N, D] made from `captions`, all of which must be among `candidates` (held-out prompts)."""
    distinct = list(dict.fromkeys(candidates))
    place = {candidate: number for number, candidate in enumerate(distinct)}
    unknown = next((caption for caption in captions if caption not in place), None)
    if unknown is not None:
        raise DataError(f"the prompt {unknown!r} is not among the {len(distinct)} candidates; add it, or judge other clips")
    ranks = rank(classifier.scores(features, distinct), [place[caption] for caption in captions])
    present = classifier.targets(captions) > 0
    said = classifier.log_odds(features) > 0
    found = (said & present).sum(axis=1) / np.maximum(present.sum(axis=1), 1)
    refused = (~said & ~present).sum(axis=1) / np.maximum((~present).sum(axis=1), 1)
    balanced = (found + refused) / 2
    return Accuracy(summarise(ranks, len(distinct), seeds), mean(balanced, seeds=seeds), balanced)
