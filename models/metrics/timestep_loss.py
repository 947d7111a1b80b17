"""The flow-matching loss of a mixture on held-out clips by timestep. Every model gets the same clips, noise and times.

It needs no sampling and varies little, so it separates two models with far fewer clips than a Fréchet distance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from lutetia.models.metrics.clips import ClipSet
from lutetia.models.mixture import combine
from lutetia.models.randomness import normals, stream
from lutetia.protocol.schema.canonical import Frozen

BINS = 10
ROWS = 32  # clips per forward pass; the noise of a row does not depend on it


class TimedLoss(Frozen):
    """A held-out loss, overall and by timestep."""

    loss: float = Field(
        description="squared error of the velocity per element, mean over clips and noises, t uniform in (0, 1) or its part"
    )
    by_time: tuple[float | None, ...] = Field(
        min_length=BINS, max_length=BINS, description="means in ten equal bins of t, from 0 (data) to 1 (noise); none: empty bin"
    )


@torch.no_grad()
def flow_losses(
    pipeline: Any,
    clips: ClipSet,
    *,
    labels: Sequence[int] | None = None,
    noises: int = 2,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, TimedLoss]:
    """Squared error of the velocity per element, of "mixture" (with its own routing) and of every expert alone ("expert 0", …).

    Args:
        pipeline: a loaded `LutetiaPipeline`.
        clips: held-out clips.
        labels: the cluster of each clip; adds "right expert", where each clip goes to the expert of its cluster.
        noises: draws of noise and time per clip.
        seed: of the draws.
        on_progress: called with rows done and rows in all.
    """
    latents = torch.cat([pipeline.decoder.encode(part) for part in clips.frames.split(ROWS)])
    tokens, pooled = pipeline.text.encode(clips.captions)
    count = len(clips) * noises
    rows = torch.arange(len(clips)).repeat_interleave(noises)
    draw = stream("held-out flow loss", 0, 0, seed, "rows")
    t = ((torch.from_numpy(draw.permutation(count)) + torch.from_numpy(draw.random(count))) / count).float()
    if part := pipeline.transformer.noise_part:
        t = part.span[0] + (part.span[1] - part.span[0]) * t
    noise = normals(draw, (count, *latents.shape[1:]))
    names = ["mixture", *(["right expert"] if labels is not None else [])]
    experts = pipeline.transformer.config["experts"]
    names += [f"expert {index}" for index, entry in enumerate(experts) if entry["folder"]] if len(experts) > 1 else []
    errors = {name: torch.empty(count) for name in names}
    for part in torch.arange(count).split(ROWS):
        clip = rows[part]
        batch = _Rows(latents[clip], noise[part], t[part], tokens[clip], pooled[clip]).to(pipeline)
        right = None if labels is None else torch.tensor([labels[index] for index in clip.tolist()])
        for name in names:
            errors[name][part] = batch.errors(pipeline.transformer, name, right).cpu()
        if on_progress:
            on_progress(int(part[-1]) + 1, count)
    bins = (t * BINS).long().clamp(0, BINS - 1)
    return {name: _timed(values, bins) for name, values in errors.items()}


class _Rows:
    """Clips, noise and times of one forward pass."""

    def __init__(self, latents: Tensor, noise: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor) -> None:
        self.latents, self.noise, self.t, self.tokens, self.pooled = latents, noise, t, tokens, pooled

    def to(self, pipeline: Any) -> _Rows:
        device = pipeline.device
        return _Rows(*(x.to(device) for x in (self.latents, self.noise, self.t, self.tokens, self.pooled)))

    def errors(self, mixture: Any, name: str, right: Tensor | None) -> Tensor:
        """Mean squared error [N] of the velocity that `name` predicts."""
        time = self.t.view(-1, *[1] * (self.latents.ndim - 1))
        x_t = torch.lerp(self.latents, self.noise, time)
        if name == "mixture":
            mixture.begin()
            weights = mixture.route(x_t, self.t, self.pooled)
        else:
            chosen = right if name == "right expert" else torch.full((len(x_t),), int(name.rpartition(" ")[2]))
            assert chosen is not None
            weights = torch.nn.functional.one_hot(chosen.to(x_t.device), mixture.count).to(x_t)
        velocity = combine(mixture.expert, weights, x_t, self.t, self.tokens, self.pooled)
        return (velocity - (self.noise - self.latents)).square().flatten(1).mean(1)


def _timed(errors: Tensor, bins: Tensor) -> TimedLoss:
    groups = [errors[bins == index] for index in range(BINS)]
    by_time = tuple(float(values.double().mean()) if len(values) else None for values in groups)
    return TimedLoss(loss=float(errors.double().mean()), by_time=by_time)
