"""Which clips each batch of a shard holds: a function of its number alone, so that every peer knows the same order.

Each batch has clips of one bucket, so that its latents have one shape. In every cycle of batches each bucket has its share of
them, in an order drawn for the cycle; the clips of a bucket are passed over one after another. A single bucket needs no draw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from lutetia.models.randomness import clip_order, stream
from lutetia.protocol.schema.manifest import Manifest

_LONGEST_CYCLE = 4096
Steps = TypeVar("Steps", int, NDArray[np.int64])


@dataclass(frozen=True)
class BatchOrder:
    """The batches of one shard.

    Args:
        run: the run's id.
        shard: index of the shard.
        sizes: clips of each bucket; clips are numbered bucket by bucket.
        batch: clips per batch.
    """

    run: str
    shard: int
    sizes: tuple[int, ...]
    batch: int

    def clips(self, number: int) -> NDArray[np.int64]:
        """The clips of batch `number` (0, 1, …), int64 [batch]."""
        bucket, before = self._bucket(number)
        return self._clips_of(bucket, before, 1)

    def following(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The clips of these batches, whose numbers ascend, one after another, int64 [len(numbers) * batch]."""
        filled = [bucket for bucket, size in enumerate(self.sizes) if size]
        if len(filled) == 1 and len(numbers) == numbers[-1] - numbers[0] + 1:
            return self._clips_of(filled[0], int(numbers[0]), len(numbers))
        return np.concatenate([self.clips(each) for each in numbers.tolist()])

    def _clips_of(self, bucket: int, before: int, count: int) -> NDArray[np.int64]:
        """The clips of `count` batches of a bucket, after `before` batches of it."""
        order = clip_order(self.run, self.shard, self.sizes[bucket], before * self.batch, count * self.batch, bucket)
        return order + sum(self.sizes[:bucket])

    def _bucket(self, number: int) -> tuple[int, int]:
        """The bucket of batch `number`, and how many batches before it are of that bucket."""
        filled = [bucket for bucket, size in enumerate(self.sizes) if size]
        if len(filled) == 1:
            return filled[0], number
        counts = batches_of_a_cycle(self.sizes, self.batch)
        cycle, place = divmod(number, sum(counts))
        drawn = _drawn_cycle(self.run, self.shard, cycle, counts)
        bucket = int(drawn[place])
        return bucket, cycle * counts[bucket] + int((drawn[:place] == bucket).sum())


def batch_number(step: Steps, lane: int, lanes: int) -> Steps:
    """The number of the batch that `lane` of `lanes` trains at `step` of the shard's budget: the lanes take batches in turn."""
    return step * lanes + lane


def batches_of_lane(manifest: Manifest, lane: int, first: int, count: int) -> NDArray[np.int64]:
    """The numbers of the next `count` batches of a lane after the first `first` steps of the shard's budget, int64 [count].

    A lane that trains a share of every epoch goes on with the next epoch after it.
    """
    steps, whole = manifest.lane_steps(lane), manifest.steps_per_epoch
    done = first // whole * steps + min(first % whole, steps)
    epochs, places = np.divmod(np.arange(done, done + count), steps)
    return batch_number(epochs * whole + places, lane, manifest.lanes)


def batches_of_a_cycle(sizes: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """How many batches of each bucket a cycle has: by its share of the clips, at least one where there are clips.

    A cycle is long enough for the share of the smallest bucket, up to 4,096 batches.
    """
    total, smallest = sum(sizes), min(size for size in sizes if size)
    length = min(max(math.ceil(total / batch), math.ceil(total / smallest), len(sizes)), _LONGEST_CYCLE)
    exact = [length * size / total for size in sizes]
    counts = [max(int(share), 1 if share else 0) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda bucket: (int(exact[bucket]) - exact[bucket], bucket))
    for bucket in by_remainder[: max(0, length - sum(counts))]:
        counts[bucket] += 1
    return tuple(counts)


@lru_cache(maxsize=4)
def _drawn_cycle(run: str, shard: int, cycle: int, counts: tuple[int, ...]) -> NDArray[np.int64]:
    """The bucket of each batch of a cycle."""
    return stream(run, shard, 0, cycle, "buckets").permutation(np.repeat(np.arange(len(counts)), counts))
