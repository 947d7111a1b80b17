"""When each part of a shard is used: decisions of a node's supervisor and auditor, from the index and the order of clips."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lutetia.models.data.parts.index import ShardIndex
from lutetia.models.randomness import clip_order
from lutetia.protocol.schema.manifest import Manifest


def next_uses(manifest: Manifest, shard: int, index: ShardIndex, first: int) -> NDArray[np.int64]:
    """How many samples of the shard's budget are trained before each part is used, int64 [parts].

    Looks to the end of the next pass over the clips, so every part occurs.

    Args:
        manifest: the run.
        shard: index of the shard.
        index: its index.
        first: samples that are done.
    """
    clips = len(index)
    count = clips - first % clips + clips
    uses = np.full(len(index.parts), count, dtype=np.int64)
    places = index.parts_of(clip_order(manifest.run_id, shard, clips, first, count))
    for column in places.T:
        np.minimum.at(uses, column, np.arange(count))
    return uses


def parts_used(manifest: Manifest, shard: int, index: ShardIndex, first: int, samples: int) -> list[int]:
    """The parts that `samples` samples after the first `first` ones need, in the order of use."""
    uses = next_uses(manifest, shard, index, first)
    needed = np.flatnonzero(uses < samples)
    return needed[np.argsort(uses[needed], kind="stable")].tolist()


def to_fetch(uses: NDArray[np.int64], here: NDArray[np.bool_]) -> list[int]:
    """The parts that are not here, in the order of use."""
    missing = np.flatnonzero(~here)
    return missing[np.argsort(uses[missing], kind="stable")].tolist()
