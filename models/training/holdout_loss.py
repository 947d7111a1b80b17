"""The held-out loss of one expert: same clips, noise and times for every candidate, so that only the weights matter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from lutetia.models.data.shards import ShardData
from lutetia.models.experts.families import build_expert, call_expert
from lutetia.models.experts.objectives import row_losses, times
from lutetia.models.randomness import normals, stream
from lutetia.models.training.checkpoint_io import read_weights
from lutetia.models.training.trainer import initial_seed
from lutetia.protocol.schema.manifest import Manifest

BINS = 10
_ROWS = 32  # per forward pass; does not change which noise a row gets


@dataclass(frozen=True)
class HoldoutLoss:
    """`loss`: mean over clips and noises at the run's own time distribution. `by_time`: means in ten equal bins of t, or None."""

    loss: float
    by_time: tuple[float | None, ...]


@torch.no_grad()
def holdout_loss(
    manifest: Manifest,
    shard: int,
    weights: Path | None,
    data: ShardData,
    *,
    raw: bool = False,
    noises: int = 4,
    device: str | torch.device = "cpu",
) -> HoldoutLoss:
    """The loss of checkpoint `weights` (None: the shard's initial weights) on held-out `data`, `noises` times per clip.

    With `raw`, `weights` is a checked state file, and the parameters that training goes on from are scored instead of averages.
    Times are stratified over all rows, so the estimate varies little with the number of clips. Raises CheckpointRefused.
    """
    spec = manifest.expert_of(shard)
    model = build_expert(spec, initial_seed(manifest, shard))
    if weights is not None and raw:
        _load_raw(model, weights)
    elif weights is not None:
        model.load_state_dict(read_weights(weights, manifest, shard))
    model = model.to(device).eval()
    count = len(data) * noises
    draw = stream(manifest.run_id, shard, 0, 0, "holdout")
    clips = torch.arange(len(data)).repeat_interleave(noises)
    strata = torch.from_numpy(draw.permutation(count))
    t = times(manifest.optimisation.time, (strata + torch.from_numpy(draw.random(count))) / count)
    noise = normals(draw, (count, *data.latents.shape[1:]))
    losses = torch.empty(count)
    for rows in torch.arange(count).split(_ROWS):
        tokens, pooled = data.tokens[clips[rows]].to(device), data.pooled[clips[rows]].to(device)
        latents = data.latents[clips[rows]].to(device)

        def answer(z, s, tokens=tokens, pooled=pooled):
            return call_expert(model, z, s, tokens, pooled)

        losses[rows] = row_losses(spec, answer, latents, noise[rows].to(device), t[rows].to(device)).cpu()
    bins = (t * BINS).long().clamp(0, BINS - 1)
    by_time = tuple(losses[bins == b].mean().item() if (bins == b).any() else None for b in range(BINS))
    return HoldoutLoss(losses.double().mean().item(), by_time)


def _load_raw(model: nn.Module, state: Path) -> None:
    """Parameter by parameter: a state is several times as large as what is needed of it."""
    with safe_open(state, framework="pt") as file:
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(f"param.{name}"))
