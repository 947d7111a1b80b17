"""The held-out loss of one expert. Weights that are compared get the same clips, noise and times, so that only they differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lutetia.models.data.shards import ShardData
from lutetia.models.experts.families import build_expert, call_expert
from lutetia.models.experts.objectives import row_losses, times
from lutetia.models.randomness import normals, stream
from lutetia.models.training.checkpoint_io import read_weights
from lutetia.models.training.trainer import initial_seed
from lutetia.protocol.schema.manifest import Manifest

BINS = 10
_ROWS = 32  # per forward pass; does not change a row's noise


@dataclass(frozen=True)
class HoldoutLoss:
    """Held-out loss of one set of weights."""

    loss: float
    """Mean over clips and noises, at times of the run's distribution."""
    by_time: tuple[float | None, ...]
    """Means in ten equal bins of t; None for a bin without rows."""
    rows: tuple[float, ...]
    """The loss of each clip with each noise. The order does not depend on the weights."""


@torch.no_grad()
def holdout_loss(
    manifest: Manifest,
    shard: int,
    weights: Path | None,
    data: ShardData,
    *,
    draw: str | None = None,
    raw: bool = False,
    noises: int = 4,
    device: str | torch.device = "cpu",
) -> HoldoutLoss:
    """The loss on held-out clips. Times are stratified over all rows, so a few clips give a good estimate.

    Args:
        manifest: the run.
        shard: whose expert is scored.
        weights: a checkpoint's weights file. None: the shard's initial weights.
        data: the held-out clips.
        draw: fixes noise and times. The coordinator gives a secret one for each result, so that nobody can train on the very
            rows that will be scored. None: the run's id, for measurements that decide nothing.
        raw: `weights` is a checked state file; score its parameters, from which training continues, instead of averages.
        noises: rows per clip, each with its own noise and time.
        device: where to compute.

    Raises:
        CheckpointMisfit: the weights do not fit the expert.
    """
    spec = manifest.expert_of(shard)
    model = build_expert(spec, initial_seed(manifest, shard))
    if weights is not None and raw:
        _load_raw(model, weights)
    elif weights is not None:
        model.load_state_dict(read_weights(weights, manifest, shard))
    model = model.to(device).eval()
    clips, noise, t = holdout_rows(manifest, shard, data, draw=draw, noises=noises)
    losses = torch.empty(len(clips))
    for rows in torch.arange(len(clips)).split(_ROWS):
        tokens, pooled = data.tokens[clips[rows]].to(device), data.pooled[clips[rows]].to(device)
        latents = data.latents[clips[rows]].to(device)

        def answer(z, s, tokens=tokens, pooled=pooled):
            return call_expert(model, z, s, tokens, pooled)

        losses[rows] = row_losses(spec, answer, latents, noise[rows].to(device), t[rows].to(device)).cpu()
    bins = (t * BINS).long().clamp(0, BINS - 1)
    by_time = tuple(losses[bins == b].mean().item() if (bins == b).any() else None for b in range(BINS))
    return HoldoutLoss(losses.double().mean().item(), by_time, tuple(losses.tolist()))


def holdout_rows(
    manifest: Manifest, shard: int, data: ShardData, *, draw: str | None = None, noises: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that are scored: the clip of each [N], its noise [N, C, F, H, W] and its time [N]."""
    count = len(data) * noises
    numbers = stream(draw or manifest.run_id, shard, 0, 0, "holdout")
    clips = torch.arange(len(data)).repeat_interleave(noises)
    strata = torch.from_numpy(numbers.permutation(count))
    t = times(manifest.optimisation.time, (strata + torch.from_numpy(numbers.random(count))) / count)
    return clips, normals(numbers, (count, *data.latents.shape[1:])), t


def _load_raw(model: nn.Module, state: Path) -> None:
    """Reads one parameter at a time: a state is several times as large as its parameters."""
    with safe_open(state, framework="pt") as file:
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"param.{name}"))
