"""Wan 2.1 and 2.2, and the classes that are called like it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lutetia.models.experts.classes.family import Asked, Family, StockCall, config_of, read_usual_call, with_one_time


def _call(model: nn.Module, asked: Asked) -> Tensor:
    timestep = asked.timestep_of(config_of(model).patch_size)
    return model(asked.latents, timestep, asked.tokens, return_dict=False)[0]


def _read_call(config: Any, arguments: dict[str, Any]) -> StockCall:
    """Wan 2.2 TI2V gives a timestep per patch."""
    call = read_usual_call(config, arguments)
    return with_one_time(call, call.latents.shape[2] // config["patch_size"][0])


WAN = Family(_call, lambda config: tuple(config.patch_size), "text_dim", takes_first_frame=True, read_call=_read_call)
LIKE_WAN = replace(WAN, takes_first_frame=False)
"""SkyReels-V2 and ChronoEdit, which have no other arguments in text-to-video."""
