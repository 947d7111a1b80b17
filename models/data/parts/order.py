"""When each part of a shard is used: decisions of a node's supervisor and auditor, from the index and the order of clips."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lutetia.models.data.parts.batch_order import BatchOrder, batches_of_lane
from lutetia.models.data.parts.index import ShardIndex
from lutetia.protocol.schema.manifest import Manifest


def next_uses(manifest: Manifest, shard: int, index: ShardIndex, first: int, lane: int = 0) -> NDArray[np.int64]:
    """How many samples a node trains before it uses each part, int64 [parts].

    Looks as many samples ahead as two passes over the clips have; a part that does not occur there counts as used after them.

    Args:
        manifest: the run.
        shard: index of the shard.
        index: its index.
        first: samples of the shard's budget that are done, whole batches.
        lane: the lane that the node trains.
    """
    batch = manifest.optimisation.batch
    batches = 2 * -(-len(index) // batch)
    count = batches * batch
    uses = np.full(len(index.parts), count, dtype=np.int64)
    order = BatchOrder(manifest.run_id, shard, index.sizes, batch)
    places = index.parts_of(order.following(batches_of_lane(manifest, lane, first // batch, batches)))
    for column in places.T:
        np.minimum.at(uses, column, np.arange(count))
    return uses


def parts_used(manifest: Manifest, shard: int, index: ShardIndex, first: int, samples: int, lane: int = 0) -> list[int]:
    """The parts that `samples` samples after the first `first` ones need in a lane, in the order of use."""
    uses = next_uses(manifest, shard, index, first, lane)
    needed = np.flatnonzero(uses < samples)
    return needed[np.argsort(uses[needed], kind="stable")].tolist()


def to_fetch(uses: NDArray[np.int64], here: NDArray[np.bool_]) -> list[int]:
    """The parts that are not here, in the order of use."""
    missing = np.flatnonzero(~here)
    return missing[np.argsort(uses[missing], kind="stable")].tolist()
