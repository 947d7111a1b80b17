"""Retrieve prompts from clips by an independent classifier: it shares no network and no text encoder with the other metrics.

Logistic regressions on EfficientNet-lite0 features of frames predict which words the caption has; there is one for each word
that is frequent enough in the real training captions. The score of a candidate prompt is the probability of its words and of the
absence of all others. The classifier is fitted on real pairs only.
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
    """The distinct words and numbers of a caption, in lower case, without punctuation."""
    return set(re.findall(r"[a-z0-9]+", caption.lower()))


@dataclass(frozen=True)
class WordClassifier:
    """Features to probabilities of the words of `vocabulary`: centre, project on `axes`, one logistic regression per word."""

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
        """Which words of the vocabulary each caption has: 0 or 1, [N, words]."""
        return np.array([[float(word in words(caption)) for word in self.vocabulary] for caption in captions])

    def scores(self, features: ArrayLike, candidates: Sequence[str]) -> Array:
        """The log-likelihood [N, candidates] of each candidate's words, up to a constant per clip."""
        return self.log_odds(features) @ self.targets(candidates).T


def fit_classifier(
    features: ArrayLike, captions: Sequence[str], *, min_count: int = 5, components: int = COMPONENTS
) -> WordClassifier:
    """Fit the classifier on real pairs.

    Args:
        features: [N, D] of the clips.
        captions: their N captions.
        min_count: words that fewer captions have, or that fewer captions lack, are left out: there is too little to learn from.
        components: principal components of the features that are used, at most.

    Raises DataError with fewer than 20 pairs, or if no word is frequent enough.
    """
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
            f"no word is in {min_count} or more of the {len(rows)} captions and missing from as many; use more real pairs"
        )
    pca: Any = PCA(n_components=min(components, len(rows) - 1, rows.shape[1]), whiten=True, svd_solver="full").fit(rows)
    axes = pca.components_.T / np.sqrt(np.maximum(pca.explained_variance_, 1e-12))
    projected = (rows - pca.mean_) @ axes
    weight, offset = np.empty((axes.shape[1], len(vocabulary))), np.empty(len(vocabulary))
    caption_words = [words(caption) for caption in captions]
    for column, word in enumerate(vocabulary):
        present = np.array([word in each for each in caption_words])
        # C well below 1: there are about as many components as clips, and the candidates' order needs calibrated odds
        fitted = LogisticRegression(C=0.05, max_iter=200).fit(projected, present)
        weight[:, column], offset[column] = fitted.coef_[0], float(fitted.intercept_[0])
    return WordClassifier(vocabulary, np.asarray(pca.mean_), axes, weight, offset, len(rows))


@dataclass(frozen=True)
class Accuracy:
    """How well the classifier agrees with the prompts.

    Attributes:
        retrieval: retrieval of whole prompts.
        words: balanced accuracy over the vocabulary (0.5 by chance), the mean of `per_clip`.
        per_clip: balanced accuracy of each clip [N].
    """

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
    """Measure how well clips agree with their prompts.

    Args:
        classifier: fitted on real pairs.
        features: [N, D] of the clips.
        captions: the N prompts of the clips.
        candidates: held-out prompts to choose from.
        seeds: seeds of the sampling, for the record.

    Raises DataError if a caption is not among the candidates.
    """
    distinct = list(dict.fromkeys(candidates))
    place = {candidate: number for number, candidate in enumerate(distinct)}
    unknown = next((caption for caption in captions if caption not in place), None)
    if unknown is not None:
        raise DataError(f"the prompt {unknown!r} is not among the {len(distinct)} candidates; add it, or remove the clip")
    ranks = rank(classifier.scores(features, distinct), [place[caption] for caption in captions])
    present = classifier.targets(captions) > 0
    predicted = classifier.log_odds(features) > 0
    sensitivity = (predicted & present).sum(axis=1) / np.maximum(present.sum(axis=1), 1)
    specificity = (~predicted & ~present).sum(axis=1) / np.maximum((~present).sum(axis=1), 1)
    balanced = (sensitivity + specificity) / 2
    return Accuracy(summarise(ranks, len(distinct), seeds), mean(balanced, seeds=seeds), balanced)
