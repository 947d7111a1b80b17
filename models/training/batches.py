"""One training batch as a function of its place in the run: its clips, times, noise and dropped texts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lutetia.models.data.parts.batch_order import BatchOrder, batch_number
from lutetia.models.data.shards import ClipReader
from lutetia.models.experts.objectives import times
from lutetia.models.experts.pictures import Pictures
from lutetia.models.randomness import normals, of_lane, stream
from lutetia.protocol.schema.manifest import Manifest


@dataclass(frozen=True)
class Batch:
    """The rows of one step."""

    latents: Tensor
    """[B, C, F, H, W]"""
    noise: Tensor
    """[B, C, F, H, W]"""
    time: Tensor
    """[B], flow time in (0, 1)"""
    tokens: Tensor
    """[B, L, D]; the null condition where the text is dropped"""
    pooled: Tensor
    """[B, P]; the null condition where the text is dropped"""
    given: Tensor | None = None
    """Whether a row's first latent frame is given, bool [B]; None: the expert takes no first frames"""

    pictures: Pictures | None = None
    """Of each row's clip the first one; None: the data have none"""

    def rows(self, first: int, last: int) -> Batch:
        """The micro-batch of rows `first` to `last - 1`; views, not copies."""
        return self._with(lambda tensor: tensor[first:last])

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; copies to an accelerator use pinned memory and do not block."""
        if device.type == "cpu":
            return self
        return self._with(lambda tensor: _pinned(tensor, device).to(device, non_blocking=True))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Batch:
        given = None if self.given is None else change(self.given)
        return Batch(
            change(self.latents), change(self.noise), change(self.time), change(self.tokens), change(self.pooled), given,
            self.pictures.each(change) if self.pictures else None,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.time)


class Batches:
    """Makes the batches of one lane of a shard, on the CPU in float32, so that every machine replays the same ones.

    Batches of the shard's order go to the lanes in turn, so that no two lanes of an epoch have the same clips before a pass ends.
    """

    def __init__(self, manifest: Manifest, shard: int, data: ClipReader, lane: int = 0) -> None:
        self._run, self._shard, self._data = manifest.run_id, shard, data
        self._lane, self._lanes = lane, manifest.lanes
        self._steps, self._settings = manifest.steps_per_epoch, manifest.optimisation
        expert = manifest.expert_of(shard)
        self._first_frame, self._part = expert.first_frame, expert.noise_part
        self._order = BatchOrder(manifest.run_id, shard, tuple(data.sizes), manifest.optimisation.batch)

    def at(self, epoch: int, step: int) -> Batch:
        """The batch of `step` (0, 1, …) of `epoch` (0, 1, …).

        Times are stratified: row i's uniform lies in the i-th of B equal strata. As clips come in random order, every clip's
        time keeps its distribution, and a small batch's loss varies far less. Of the captions of a clip one is drawn.
        """
        size, place = self._settings.batch, (self._run, self._shard, epoch, step)
        number = batch_number(epoch * self._steps + step, self._lane, self._lanes)
        drawn = torch.from_numpy(stream(*place, of_lane("caption", self._lane)).random(size))
        clips = self._data.take(torch.from_numpy(self._order.clips(number)), captions=drawn)
        null = self._data.null or (None, None)
        jitter, dropout = stream(*place, of_lane("rows", self._lane)).random((2, size))
        kept = torch.from_numpy(dropout >= self._settings.text_dropout)
        return Batch(
            latents=clips.latents,
            noise=normals(stream(*place, of_lane("noise", self._lane)), tuple(clips.latents.shape)),
            time=times(self._settings.time, torch.from_numpy((np.arange(size) + jitter) / size), self._part),
            tokens=_or_null(clips.tokens, kept, null[0]),
            pooled=_or_null(clips.pooled, kept, null[1]),
            given=first_frames_given(
                self._first_frame, stream(*place, of_lane("first frame", self._lane)), clips.latents.shape[2], size
            ),
            pictures=clips.pictures,
        )


def first_frames_given(share: float | None, draw: np.random.Generator, frames: int, rows: int) -> Tensor | None:
    """Which of `rows` clips of `frames` latent frames are trained with their first frame given, bool [rows].

    None where the expert takes no first frames. A picture is never given: nothing would be left of it.
    """
    if share is None:
        return None
    return torch.from_numpy(draw.random(rows) < share) & (frames > 1)


class BatchesAhead:
    """Makes batches. For an accelerator it makes the next one in a thread, so that the device never waits for random numbers."""

    def __init__(self, batches: Batches, steps: int, device: torch.device) -> None:
        self._batches, self._steps = batches, steps
        self._pool = ThreadPoolExecutor(1, "batches") if device.type != "cpu" else None
        self._ahead: tuple[tuple[int, int], Future[Batch]] | None = None

    def take(self, epoch: int, step: int) -> Batch:
        if self._pool is None:
            return self._batches.at(epoch, step)
        ahead, self._ahead = self._ahead, None
        batch = ahead[1].result() if ahead and ahead[0] == (epoch, step) else self._batches.at(epoch, step)
        following = (epoch, step + 1) if step + 1 < self._steps else (epoch + 1, 0)
        self._ahead = following, self._pool.submit(self._batches.at, *following)
        return batch


def _or_null(texts: Tensor, kept: Tensor, null: Tensor | None) -> Tensor:
    """`texts [B, ...]`, in place those with the null condition where they are not kept; None: zeros."""
    if null is None:
        return texts.mul_(kept.float().view(-1, *[1] * (texts.ndim - 1)))
    texts[~kept] = null
    return texts


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor
