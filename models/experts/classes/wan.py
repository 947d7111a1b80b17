"""Wan 2.1 and 2.2, and the classes that are called like it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lutetia.models.experts.classes.family import Asked, Family, StockCall, config_of, read_usual_call
from lutetia.system.errors import UsageError


def _call(model: nn.Module, asked: Asked) -> Tensor:
    timestep = asked.timestep_of(config_of(model).patch_size)
    return model(asked.latents, timestep, asked.tokens, return_dict=False)[0]


def _read_call(config: Any, arguments: dict[str, Any]) -> StockCall:
    """Wan 2.2 TI2V gives a timestep per patch. In image-to-video that of the first frame's patches is 0."""
    call = read_usual_call(config, arguments)
    if call.timestep.ndim < 2:
        return call
    frames = call.latents.shape[2] // config["patch_size"][0]
    first, others = call.timestep.unflatten(1, (frames, -1)).split([1, frames - 1], dim=1)
    last = call.timestep[:, -1]
    given = frames > 1 and not first.any() and bool(last.any())
    if not (others == last.view(-1, 1, 1)).all() or not (given or (first == last.view(-1, 1, 1)).all()):
        raise UsageError("a mixture takes one timestep per clip, and 0 for a first frame that is given; use such a pipeline")
    return replace(call, timestep=last, given=given)


WAN = Family(_call, lambda config: tuple(config.patch_size), "text_dim", takes_first_frame=True, read_call=_read_call)
LIKE_WAN = replace(WAN, takes_first_frame=False)
"""SkyReels-V2 and ChronoEdit, which have no other arguments in text-to-video."""
