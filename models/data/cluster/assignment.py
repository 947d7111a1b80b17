"""Which shard and which split each clip goes to. Test clips take no part in clustering; a file's copies always stay together."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lutetia.models.data.cluster.kmeans import ClusterSettings, Labels, Vectors, cluster
from lutetia.models.data.cluster.report import ClusterReport, summarise
from lutetia.models.data.encode.cache import ArrayCache
from lutetia.models.data.encode.encoder import EmbeddedCaptions, PreparedClips, Recipe, cached_array
from lutetia.models.data.encode.features import Joiner
from lutetia.models.data.ingest.listing import ClipSource
from lutetia.system.errors import DataError

Split = Literal["train", "holdout", "test"]
_FEWEST_HELD_OUT = 8  # fewer would make the held-out loss a lottery
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """For each clip its shard, its split and its features; and what was found about the clusters."""

    shards: Labels
    splits: list[Split]
    vectors: Vectors
    report: ClusterReport

    def rows(self, shard: int, split: Split) -> list[int]:
        return [row for row, own in enumerate(self.splits) if own == split and self.shards[row] == shard]

    def count(self, split: Split) -> int:
        return self.splits.count(split)


def drop_copies_of_test_clips(prepared: PreparedClips) -> int:
    """Take out training clips whose file is also a test clip, so that nothing seen in training is tested. Returns how many."""
    tested = {digest for clip, digest in zip(prepared.clips, prepared.digests, strict=True) if clip.split == "test"}
    keep = [clip.split == "test" or digest not in tested for clip, digest in zip(prepared.clips, prepared.digests, strict=True)]
    prepared.clips[:] = [clip for clip, kept in zip(prepared.clips, keep, strict=True) if kept]
    prepared.digests[:] = [digest for digest, kept in zip(prepared.digests, keep, strict=True) if kept]
    dropped = len(keep) - sum(keep)
    if dropped:
        _log.warning("%d training clips are copies of test clips and were left out", dropped)
    return dropped


def feature_vectors(
    prepared: PreparedClips, recipe: Recipe, cache: ArrayCache, embedded: EmbeddedCaptions, with_text: bool
) -> Vectors:
    """[N, D] of all clips, standardised by the training clips."""
    blocks = [
        np.stack([cached_array(cache, recipe.features_key(digest, features)) for digest in prepared.digests])
        for features in recipe.features
    ]
    if with_text:
        blocks.append(np.stack([embedded.pooled[clip.caption].numpy() for clip in prepared.clips]))
    training = _training_rows(prepared.clips)
    return Joiner([block[training] for block in blocks])(blocks)


def place_clips(prepared: PreparedClips, vectors: Vectors, settings: ClusterSettings, holdout: float) -> Placement:
    """Cluster the training clips, split off holdouts, and put each test clip where its look belongs. Deterministic."""
    training = _training_rows(prepared.clips)
    digests, kinds = [prepared.digests[row] for row in training], [prepared.clips[row].kind for row in training]
    found = cluster(vectors[training], digests, kinds, settings)
    report = summarise(found, vectors[training], [prepared.clips[row].caption for row in training], kinds)
    shards = np.zeros(len(prepared.clips), np.int64)
    splits: list[Split] = ["test"] * len(prepared.clips)
    shards[training] = found.labels
    for index in range(len(report.clusters)):
        rows = [row for row, label in zip(training, found.labels, strict=True) if label == index]
        held = _held_out([prepared.digests[row] for row in rows], holdout, report.clusters[index].name)
        for row in rows:
            splits[row] = "holdout" if prepared.digests[row] in held else "train"
    others = sorted(set(range(len(prepared.clips))) - set(training))
    if others:
        shards[others] = found.place(vectors[others])
    return Placement(shards, splits, vectors, report)


def _training_rows(clips: Sequence[ClipSource]) -> list[int]:
    rows = [row for row, clip in enumerate(clips) if clip.split == "train"]
    if not rows:
        raise DataError("no clip is left for training; check the split column of the metadata")
    return rows


def _held_out(digests: Sequence[str], share: float, name: str) -> set[str]:
    """Which contents are held out: those whose rank is below `share`, whatever the clusters, so that studies with other numbers
    of clusters hold out the same clips; and in small clusters the lowest ranks, up to eight but at most a quarter.
    """
    order = sorted(set(digests), key=_holdout_rank)
    if len(order) < 2:
        raise DataError(
            f"cluster {name} holds copies of a single clip, so none can be held out; remove the copies or use fewer experts"
        )
    below = sum(_holdout_rank(digest) < share for digest in order)
    return set(order[: min(max(below, min(_FEWEST_HELD_OUT, len(order) // 4), 1), len(order) - 1)])


def _holdout_rank(digest: str) -> float:
    """A content's fixed place in 0..1."""
    return int.from_bytes(hashlib.sha256(f"lutetia-holdout|{digest}".encode()).digest()[:8], "big") / 2**64
