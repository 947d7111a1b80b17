"""One training batch as a function of its place in the run: which clips, how much noise, which noise, whose text is dropped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..protocol.manifest import Manifest
from .data.shards import ShardData
from .objectives import times
from .randomness import clip_order, normals, stream


@dataclass(frozen=True)
class Batch:
    """Rows of one step: `latents` and `noise` [B, C, F, H, W], `time` [B] in flow time, `tokens` [B, L, D], `pooled` [B, P]."""

    latents: Tensor
    noise: Tensor
    time: Tensor
    tokens: Tensor
    pooled: Tensor

    def rows(self, first: int, last: int) -> Batch:
        """The micro-batch `first:last`; views, no copies."""
        return Batch(*(tensor[first:last] for tensor in self._tensors()))

    def to(self, device: torch.device) -> Batch:
        """On `device`; copies to an accelerator go through pinned memory and do not block."""
        if device.type == "cpu":
            return self
        return Batch(*(_pinned(tensor, device).to(device, non_blocking=True) for tensor in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.latents, self.noise, self.time, self.tokens, self.pooled

    def __len__(self) -> int:
        return len(self.time)


def batch_at(manifest: Manifest, shard: int, data: ShardData, epoch: int, step: int) -> Batch:
    """The batch of `step` (0, 1, …) of `epoch`. Made on the CPU in float32, so that it is the same wherever it is replayed.

    Times are stratified: row i's uniform lies in the i-th of B equal strata, which leaves every row's distribution as it is
    (rows are in random order) and takes most of the variance out of a small batch's loss.
    """
    run, size = manifest.run_id, manifest.optimisation.batch
    order = clip_order(run, shard, len(data), (epoch * manifest.steps_per_epoch + step) * size, size)
    clips = torch.from_numpy(order)
    latents = data.latents[clips]
    jitter = stream(run, shard, epoch, step, "time").random(size)
    uniforms = (torch.arange(size) + torch.from_numpy(jitter)) / size
    kept = torch.from_numpy(stream(run, shard, epoch, step, "text").random(size) >= manifest.optimisation.text_dropout)
    return Batch(
        latents=latents,
        noise=normals(stream(run, shard, epoch, step, "noise"), tuple(latents.shape)),
        time=times(manifest.optimisation.time, uniforms),
        tokens=data.tokens[clips] * kept[:, None, None],  # dropped text is the null condition: zeros
        pooled=data.pooled[clips] * kept[:, None],
    )


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory() if device.type == "cuda" else tensor
