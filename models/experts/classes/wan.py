"""Wan 2.1 and 2.2, and the classes that are called like it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lutetia.models.experts.classes.family import Asked, Family, StockCall, read_usual_call
from lutetia.system.errors import UsageError


def _call(model: nn.Module, asked: Asked) -> Tensor:
    return model(asked.latents, asked.timestep, asked.tokens, return_dict=False)[0]


def _read_call(config: Any, arguments: dict[str, Any]) -> StockCall:
    """Wan 2.2 TI2V gives a timestep per patch, which are all the same in text-to-video."""
    call = read_usual_call(config, arguments)
    if call.timestep.ndim < 2:
        return call
    first = call.timestep[:, 0]
    if not (call.timestep == first[:, None]).all():
        raise UsageError("this mixture is text-to-video: it takes one timestep per clip; use the text-to-video pipeline")
    return replace(call, timestep=first)


WAN = Family(_call, lambda config: tuple(config.patch_size), "text_dim", read_call=_read_call)
"""Also of SkyReels-V2, which has no other arguments in text-to-video."""
