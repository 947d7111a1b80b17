"""Assign each clip to a shard and a split. Test clips take no part in clustering; copies of a file always stay together."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lutetia.models.data.build_settings import ClusterSettings
from lutetia.models.data.cluster.kmeans import Labels, Vectors, cluster
from lutetia.models.data.cluster.report import ClusterReport, summarise
from lutetia.models.data.encode.cache import ArrayCache
from lutetia.models.data.encode.encoder import EmbeddedCaptions, PreparedClips, Recipe, cached_array
from lutetia.models.data.encode.features import Joiner
from lutetia.models.data.ingest.listing import ClipSource
from lutetia.system.errors import DataError

Split = Literal["train", "holdout", "test"]
_FEWEST_HELD_OUT = 8  # the held-out loss of fewer clips is too noisy
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """Shard, split and features [N, D] of each clip, and a report on the clusters."""

    shards: Labels
    splits: list[Split]
    vectors: Vectors
    report: ClusterReport

    def rows(self, shard: int, split: Split) -> list[int]:
        return [row for row, each in enumerate(self.splits) if each == split and self.shards[row] == shard]

    def count(self, split: Split) -> int:
        return self.splits.count(split)


def drop_copies_of_test_clips(prepared: PreparedClips) -> int:
    """Remove training clips whose file is also a test clip, so that no test clip is trained on. Returns how many."""
    test_digests = {digest for clip, digest in zip(prepared.clips, prepared.digests, strict=True) if clip.split == "test"}
    keep = [
        clip.split == "test" or digest not in test_digests for clip, digest in zip(prepared.clips, prepared.digests, strict=True)
    ]
    prepared.clips[:] = [clip for clip, kept in zip(prepared.clips, keep, strict=True) if kept]
    prepared.digests[:] = [digest for digest, kept in zip(prepared.digests, keep, strict=True) if kept]
    prepared.buckets[:] = [bucket for bucket, kept in zip(prepared.buckets, keep, strict=True) if kept]
    dropped = len(keep) - sum(keep)
    if dropped:
        _log.warning("%d training clips are copies of test clips and were left out", dropped)
    return dropped


def feature_vectors(
    prepared: PreparedClips, recipe: Recipe, cache: ArrayCache, embedded: EmbeddedCaptions, with_text: bool
) -> Vectors:
    """Features [N, D] of all clips, standardised by the training clips. `with_text` adds the embedded captions."""
    blocks = [
        np.stack(
            [
                cached_array(cache, recipe.features_key(digest, bucket, features))
                for digest, bucket in zip(prepared.digests, prepared.buckets, strict=True)
            ]
        )
        for features in recipe.features
    ]
    if with_text:
        blocks.append(np.stack([embedded.pooled[clip.caption].numpy() for clip in prepared.clips]))
    training = training_rows(prepared.clips)
    return Joiner([block[training] for block in blocks])(blocks)


def place_clips(prepared: PreparedClips, vectors: Vectors, settings: ClusterSettings, holdout: float) -> Placement:
    """Cluster the training clips, hold some out, and place each test clip by its features. Deterministic.

    Args:
        prepared: the clips.
        vectors: their features [N, D].
        settings: of the clustering.
        holdout: share of the training clips to hold out.
    """
    training = training_rows(prepared.clips)
    digests, kinds = [prepared.digests[row] for row in training], [prepared.clips[row].kind for row in training]
    clustering = cluster(vectors[training], digests, kinds, settings)
    report = summarise(clustering, vectors[training], [prepared.clips[row].caption for row in training], kinds)
    shards = np.zeros(len(prepared.clips), np.int64)
    splits: list[Split] = ["test"] * len(prepared.clips)
    shards[training] = clustering.labels
    for index in range(len(report.clusters)):
        rows = [row for row, label in zip(training, clustering.labels, strict=True) if label == index]
        held_out = _held_out([prepared.digests[row] for row in rows], holdout, report.clusters[index].name)
        for row in rows:
            splits[row] = "holdout" if prepared.digests[row] in held_out else "train"
    test = sorted(set(range(len(prepared.clips))) - set(training))
    if test:
        shards[test] = clustering.place(vectors[test])
    return Placement(shards, splits, vectors, report)


def training_rows(clips: Sequence[ClipSource]) -> list[int]:
    rows = [row for row, clip in enumerate(clips) if clip.split == "train"]
    if not rows:
        raise DataError("no clip is left for training; check the split column of the metadata")
    return rows


def _held_out(digests: Sequence[str], share: float, name: str) -> set[str]:
    """The digests to hold out: those with a rank below `share`, so that the choice does not depend on the number of clusters.

    In small clusters the lowest ranks are added: up to eight clips, but at most a quarter.
    """
    order = sorted(set(digests), key=_holdout_rank)
    if len(order) < 2:
        raise DataError(
            f"cluster {name} holds only copies of one clip, so none can be held out; remove the copies or use fewer experts"
        )
    below = sum(_holdout_rank(digest) < share for digest in order)
    return set(order[: min(max(below, min(_FEWEST_HELD_OUT, len(order) // 4), 1), len(order) - 1)])


def _holdout_rank(digest: str) -> float:
    """A fixed number from 0 to 1 for each digest."""
    return int.from_bytes(hashlib.sha256(f"lutetia-holdout|{digest}".encode()).digest()[:8], "big") / 2**64
