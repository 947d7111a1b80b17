"""Randomness that anyone can replay: every draw is a function of (run, shard, epoch, step, purpose), on any device.

No state has to be saved. A trainer that was killed, its successor on another node and an auditor draw the same numbers, because
each draw has its own counter-based generator (Philox 4x64, Salmon et al. 2011), keyed by a 128-bit hash of those five.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def stream(run: str, shard: int, epoch: int, step: int, purpose: str) -> np.random.Generator:
    """A new generator. Equal arguments give equal numbers on every platform.

    Args:
        run: the run's id.
        shard: index of the shard.
        epoch: the epoch, from 0.
        step: the step in the epoch, from 0.
        purpose: what the numbers are for, so that two purposes at one place draw differently.
    """
    key = hashlib.sha256(f"{run}|{shard}|{epoch}|{step}|{purpose}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))


def of_lane(purpose: str, lane: int) -> str:
    """The purpose of a draw in one lane of a shard. Lane 0 draws as a run without lanes does."""
    return f"{purpose} of lane {lane}" if lane else purpose


def seed_of(run: str, shard: int, purpose: str, step: int = 0) -> int:
    """A 63-bit seed for code that makes its own generator (weight initialisation)."""
    return int(stream(run, shard, 0, step, purpose).integers(1 << 63))


def normals(generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Standard normals of `shape`, float32, on the CPU: equal on every device that they are moved to."""
    import torch  # here, because a node's supervisor computes the order of clips without it

    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


@lru_cache(maxsize=8)
def _pass_order(run: str, shard: int, number: int, clips: int, bucket: int) -> np.ndarray:
    return stream(run, shard, 0, number, f"order {bucket}" if bucket else "order").permutation(clips)


def clip_order(run: str, shard: int, clips: int, first: int, count: int, bucket: int = 0) -> np.ndarray:
    """The clips (row numbers in the shard) of its samples `first`, …, `first + count - 1`, int64 [count].

    Every pass over the `clips` clips is a new permutation, so the numbers of times that two clips have been seen never differ by
    more than one. `bucket`: number of the bucket that they are of.
    """
    first_pass, place = divmod(first, clips)
    if place + count <= clips:
        return _pass_order(run, shard, first_pass, clips, bucket)[place : place + count]
    samples = np.arange(first, first + count)
    order = np.empty(count, dtype=np.int64)
    for number in range(first_pass, (first + count - 1) // clips + 1):
        inside = samples // clips == number
        order[inside] = _pass_order(run, shard, number, clips, bucket)[samples[inside] % clips]
    return order
