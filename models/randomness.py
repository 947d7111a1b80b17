"""Randomness that anyone can replay: every draw is a function of (run, shard, epoch, step, purpose), on any device.

Nothing here has a state to save. A killed trainer, its successor on another box and an auditor draw the same numbers, because
each draw has its own counter-based generator (Philox 4x64, Salmon et al. 2011) whose 128-bit key is a hash of what it is for.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def stream(run: str, shard: int, epoch: int, step: int, purpose: str) -> np.random.Generator:
    """A fresh generator for one purpose at one place of one run. Equal arguments give equal numbers, on every platform."""
    key = hashlib.sha256(f"{run}|{shard}|{epoch}|{step}|{purpose}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))


def seed_of(run: str, shard: int, purpose: str, step: int = 0) -> int:
    """A 63-bit seed for code that owns its generator (weight initialisation)."""
    return int(stream(run, shard, 0, step, purpose).integers(1 << 63))


def normals(generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Standard normals, float32, made on the CPU (the copy to a device follows), without a copy of their own."""
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


@lru_cache(maxsize=8)
def _pass_order(run: str, shard: int, number: int, clips: int) -> np.ndarray:
    return stream(run, shard, 0, number, "order").permutation(clips)


def clip_order(run: str, shard: int, clips: int, first: int, count: int) -> np.ndarray:
    """Which clips the shard's samples `first`, …, `first + count - 1` are: a fresh permutation for every pass over the shard.

    So after any number of samples no clip has been seen more than one time oftener than another.
    """
    whole, place = divmod(first, clips)
    if place + count <= clips:
        return _pass_order(run, shard, whole, clips)[place : place + count]
    samples = np.arange(first, first + count)
    order = np.empty(count, dtype=np.int64)
    for number in range(whole, (first + count - 1) // clips + 1):
        inside = samples // clips == number
        order[inside] = _pass_order(run, shard, number, clips)[samples[inside] % clips]
    return order
