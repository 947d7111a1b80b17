"""The mixture in the place of a stock transformer: its pipeline's call is read, and answered in that pipeline's terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lutetia.models.experts.classes.family import TIMESTEPS, read_usual_call
from lutetia.models.experts.classes.registry import family_of
from lutetia.models.experts.objectives import flow_time, from_velocity, matched, schedule_of
from lutetia.models.experts.pictures import Pictures
from lutetia.models.mixing.description import ExpertKind


@dataclass(frozen=True)
class FlowCall:
    """A stock pipeline's call in the mixture's terms."""

    latents: Tensor
    """[B, C, F, H, W] on the straight path."""
    time: Tensor
    """Flow time, [B]."""
    tokens: Tensor
    pooled: Tensor | None
    changed: dict[str, Any]
    """Fields of ExpertInputs as the pipeline gives them."""
    answer: Callable[[Tensor], Tensor]
    """Turns the velocity [B, C, F, H, W] into what the pipeline expects."""
    given: bool = False
    """Whether the first latent frame of all rows is given."""
    pictures: Pictures | None = None
    """Those that the latents came with, in channels of their own."""


def read_stock_call(kind: ExpertKind | None, config: Any, arguments: dict[str, Any]) -> FlowCall:
    """Read the call of a pipeline.

    Args:
        kind: the expert in whose terms the pipeline speaks; None: as to `WanTransformer3DModel`.
        config: that of the expert's class.
        arguments: of `forward`, by name.
    """
    family = family_of(kind.class_name) if kind else None
    read = (family and family.read_call) or read_usual_call
    call = read(config, arguments)
    time = exact_time(call.timestep, len(call.latents))
    tokens = call.tokens if call.mask is None else call.tokens * call.mask.to(call.tokens.dtype)[..., None]
    changed = {name: value for name, value in call.changed.items() if value is not None}
    if kind is None or family is None:
        return FlowCall(call.latents, time, tokens, call.pooled, changed, call.pack, call.given, call.pictures)
    inputs, schedule = kind.inputs or family.inputs, schedule_of(kind)
    if inputs.reversed:
        time = 1 - time
    time = flow_time(schedule, time)
    sign = -1.0 if inputs.reversed else 1.0
    latents = call.latents
    if schedule != "linear":
        scale = matched(schedule, time)[1].view(-1, 1, 1, 1, 1)
        latents = (latents.float() / scale).to(torch.promote_types(latents.dtype, torch.float32))

    def answer(flow: Tensor) -> Tensor:
        out = sign * from_velocity(kind.prediction, schedule, flow, latents, time)
        return call.pack(out.to(call.latents.dtype))

    return FlowCall(latents, time, tokens, call.pooled, changed, answer, call.given, call.pictures)


def exact_time(timestep: Tensor, rows: int) -> Tensor:
    """Times in [0, 1] of timesteps in 0…1000, `[rows]`. They are never rounded: bfloat16 has 128 times between 0.5 and 1."""
    exact = timestep if timestep.dtype == torch.float64 else timestep.float()
    return (exact / TIMESTEPS).expand(rows)


def stock_config(own: Mapping[str, Any], of_expert: Mapping[str, Any]) -> dict[str, Any]:
    """The mixture's configuration as a stock pipeline reads it: that of an expert, with the mixture's own other entries."""
    return {**own, **{key: value for key, value in of_expert.items() if not key.startswith("_")}}
