"""Report on a clustering: sizes, silhouette, purity against known kinds, and a name for each cluster."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np
from pydantic import Field

from lutetia.models.data.cluster.kmeans import Clustering, Vectors
from lutetia.models.data.encode.text import split_words
from lutetia.protocol.schema.canonical import Frozen

_SILHOUETTE_CLIPS = 2000
_MAX_NAME = 48
_STOP_WORD_LIST = """
about above after all an and are as at be below by down for from has have her his in into is it its left more of off on one or out
over right she some than that the their them there they this to two under up very was were while with
"""
_STOP_WORDS = frozenset(_STOP_WORD_LIST.split())


class ClusterSummary(Frozen):
    """One cluster."""

    index: int = Field(description="number of the cluster, 0 the largest")
    name: str = Field(description="short name, from kinds or keywords")
    clips: int = Field(description="number of training and held-out clips")
    share: float = Field(description="share of these clips in all, 0 to 1")
    silhouette: float = Field(description="mean silhouette of its clips, -1 to 1")
    keywords: tuple[str, ...] = Field(description="most distinctive words of its captions")
    typical: tuple[str, ...] = Field(description="captions of the clips nearest to its centre")
    purity: float | None = Field(default=None, description="share of its most frequent kind, 0 to 1; none: no kinds")
    kinds: dict[str, int] = Field(default={}, description="kind to number of clips")


class ClusterReport(Frozen):
    """The whole clustering."""

    clusters: tuple[ClusterSummary, ...] = Field(description="the clusters, the largest first")
    silhouette: float = Field(description="mean silhouette of all clips, -1 to 1")
    purity: float | None = Field(
        default=None, description="share of clips of the most frequent kind of their cluster; none: no kinds"
    )
    nmi: float | None = Field(
        default=None, description="normalised mutual information of clusters and kinds, 0 to 1; none: no kinds"
    )
    largest_uncapped: float = Field(description="share of the largest cluster before large clusters were split, 0 to 1")


def summarise(clustering: Clustering, vectors: Vectors, captions: Sequence[str], kinds: Sequence[str]) -> ClusterReport:
    """Report on `clustering`; `vectors`, `captions` and `kinds` are those of its clips, in order. Deterministic."""
    labels, number = clustering.labels, int(clustering.labels.max()) + 1
    scores = silhouettes(vectors, labels)
    has_kinds = any(kinds)
    members = [np.flatnonzero(labels == index).tolist() for index in range(number)]
    words = keywords([[captions[i] for i in rows] for rows in members])
    tallies = [Counter(kinds[i] for i in rows) if has_kinds else Counter[str]() for rows in members]
    names = name_clusters(words, tallies, [[captions[i] for i in rows] for rows in members])
    clusters = [
        ClusterSummary(
            index=index,
            name=names[index],
            clips=len(rows),
            share=round(len(rows) / len(labels), 4),
            silhouette=round(float(np.nanmean(scores[rows])) if np.isfinite(scores[rows]).any() else 0.0, 4),
            keywords=tuple(words[index][:6]),
            typical=tuple(captions[i] for i in central(vectors, rows, 5)),
            purity=round(max(tallies[index].values()) / len(rows), 4) if has_kinds else None,
            kinds=dict(sorted(tallies[index].items())),
        )
        for index, rows in enumerate(members)
    ]
    return ClusterReport(
        clusters=tuple(clusters),
        silhouette=round(float(np.nanmean(scores)), 4) if number > 1 else 0.0,
        purity=round(_purity(labels, kinds), 4) if has_kinds else None,
        nmi=round(_mutual_information(labels, kinds), 4) if has_kinds else None,
        largest_uncapped=round(clustering.uncapped_share, 4),
    )


def central(vectors: Vectors, rows: Sequence[int], number: int) -> list[int]:
    """The `number` clips of `rows` that are nearest to their mean, nearest first."""
    members = vectors[np.asarray(rows)]
    distance = ((members - members.mean(0)) ** 2).sum(1)
    return [rows[i] for i in np.argsort(distance, kind="stable")[:number]]


def keywords(groups: Sequence[Sequence[str]]) -> list[list[str]]:
    """For each group of captions, its words, the most distinctive first: frequent in the group, rare in the others."""
    tallies = [Counter(word for caption in group for word in set(split_words(caption))) for group in groups]
    total, overall = sum(len(group) for group in groups), sum(tallies, Counter[str]())
    ranked = []
    for group, tally in zip(groups, tallies, strict=True):
        elsewhere = total - len(group)

        def weight(word: str, group: Sequence[str] = group, tally: Counter[str] = tally, elsewhere: int = elsewhere) -> float:
            inside = tally[word] / len(group)
            outside = (overall[word] - tally[word] + 0.5) / (elsewhere + 1)
            return inside * math.log(inside / outside) if len(word) > 1 and word not in _STOP_WORDS else -1.0

        scored = {word: weight(word) for word in tally}
        ranked.append(sorted((word for word in scored if scored[word] > 0), key=lambda word: (-scored[word], word)))
    return ranked


def name_clusters(words: Sequence[Sequence[str]], kinds: Sequence[Counter[str]], captions: Sequence[Sequence[str]]) -> list[str]:
    """Distinct short names that a manifest accepts: the kind of at least 80 % of the clips, else the two most distinctive words.

    Clusters with the same name get a further word that distinguishes them, or a number.
    """
    stems = []
    for group_words, tally in zip(words, kinds, strict=True):
        kind, hits = tally.most_common(1)[0] if tally else ("", 0)
        prevails = bool(kind) and hits >= 0.8 * tally.total()
        stems.append(
            _plain(kind) if prevails and _plain(kind) else "-".join(filter(None, map(_plain, group_words[:2]))) or "cluster"
        )
    names = list(stems)
    for stem in set(stems):
        same = [index for index, other in enumerate(stems) if other == stem]
        if len(same) > 1:
            for index, distinctive in zip(same, keywords([captions[number] for number in same]), strict=True):
                extra = next((_plain(word) for word in distinctive if _plain(word) and _plain(word) not in stem.split("-")), "")
                names[index] = f"{stem}-{extra}" if extra else stem
    taken: Counter[str] = Counter()
    for index, name in enumerate(names):
        taken[name] += 1
        names[index] = name if taken[name] == 1 else f"{name}-{taken[name]}"
    return names


def _plain(text: str) -> str:
    """The ASCII letters, digits and hyphens of `text`: the characters of a name in a manifest."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_text).strip("-")[: _MAX_NAME // 2]


def silhouettes(vectors: Vectors, labels: np.ndarray) -> np.ndarray:
    """One score per clip; beyond 2,000 clips an evenly spaced sample is scored and the others are NaN."""
    from sklearn.metrics import silhouette_samples

    scores = np.full(len(labels), np.nan)
    rows = np.unique(np.linspace(0, len(labels) - 1, min(len(labels), _SILHOUETTE_CLIPS)).astype(int))
    if 1 < len(set(labels[rows].tolist())) < len(rows):
        scores[rows] = silhouette_samples(vectors[rows].astype(np.float64), labels[rows])
    else:
        scores[rows] = 0.0
    return scores


def _purity(labels: np.ndarray, kinds: Sequence[str]) -> float:
    """The share of clips whose kind is the commonest of their cluster (Manning et al. 2008, 16.3)."""
    from sklearn.metrics.cluster import contingency_matrix

    return float(np.asarray(contingency_matrix(list(kinds), labels)).max(axis=0).sum() / len(labels))


def _mutual_information(labels: np.ndarray, kinds: Sequence[str]) -> float:
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(list(kinds), labels))
