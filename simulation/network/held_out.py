"""A model of held-out losses on few clips, for settings with `held_out_clips`.

Logarithms of losses, so that noise is relative. A row is one clip with one noise and time:

    log loss(row) = level(draw, row) + quality(weights, clip) + jitter(weights, draw, row)

- `level`: how hard clip, noise and time are. The same for all weights that are scored in one draw; normal, deviation LEVEL.
- `quality`: sums up over the epochs. Each epoch adds a trend of the shard (learning that fades, overfitting that does not) and a
  normal change for each clip, of deviation EARLY in the first epoch and CLIP later.
- `jitter`: normal, deviation ROW.
- The raw parameters add RAW, log-normal with deviation RAW_SPREAD, and another normal change for each clip.

What an epoch adds follows from shard, epoch and parent alone, so all honest nodes end alike and a repeated epoch scores as
before.
The figures are those of a run measured on 30 clips of 32 pixels in two shards (docs/results/standstill.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from random import Random

NOISES = 4
LEVEL, EARLY, CLIP, ROW = 0.45, 0.5, 0.06, 0.06
LEARNS, OVERFITS = 0.15, 0.16
RAW, RAW_SPREAD, RAW_CLIP = 0.05, 0.9, 0.05


@dataclass(frozen=True, slots=True)
class Quality:
    """Logarithm of the loss of one set of weights over that of the initial model, for each held-out clip."""

    averages: tuple[float, ...]
    raw: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class HeldOutModel:
    """The held-out clips of a run drawn from `seed`: from `fewest` to `most` in each shard."""

    seed: int
    fewest: int
    most: int

    def initial(self, shard: int) -> Quality:
        nothing = (0.0,) * _clips(self.seed, shard, self.fewest, self.most)
        return Quality(nothing, nothing)

    def trained(self, shard: int, epoch: int, parent: str, before: Quality) -> Quality:
        """After the epoch that begins at weights `parent`, of quality `before`."""
        draw, shards = Random(f"{self.seed}|{shard}|{epoch}|{parent}"), Random(f"{self.seed}|{shard}|trend")
        overfits, raw = shards.uniform(0, OVERFITS), RAW * math.exp(shards.gauss(0, RAW_SPREAD))
        trend = overfits * math.exp(-epoch / 10) - LEARNS * math.exp(1 - epoch)
        spread = EARLY if epoch == 1 else CLIP
        averages = tuple(value + trend + draw.gauss(0, spread) for value in before.averages)
        return Quality(averages, tuple(value + raw + draw.gauss(0, RAW_CLIP) for value in averages))

    def rows(self, qualities: tuple[float, ...], weights: str, draw: str) -> list[float]:
        """The losses of weights, drawn for the result of digest `draw`."""
        level, jitter = Random(f"{self.seed}|{draw}"), Random(f"{weights}|{draw}")
        return [math.exp(level.gauss(0, LEVEL) + quality + jitter.gauss(0, ROW)) for quality in qualities for _ in range(NOISES)]


@lru_cache(maxsize=4096)
def _clips(seed: int, shard: int, fewest: int, most: int) -> int:
    return Random(f"{seed}|{shard}|clips").randint(fewest, most)
