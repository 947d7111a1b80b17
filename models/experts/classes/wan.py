"""Wan 2.1 and 2.2, and the classes that are called like it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lutetia.models.experts.classes.family import (
    Asked,
    Family,
    StockCall,
    config_of,
    read_usual_call,
    with_one_time,
    with_pictures,
)


def _call(model: nn.Module, asked: Asked) -> Tensor:
    timestep = asked.timestep_of(config_of(model).patch_size)
    vision = {} if asked.vision is None else {"encoder_hidden_states_image": asked.vision}
    return model(asked.latents, timestep, asked.tokens, return_dict=False, **vision)[0]


def _read_call(config: Any, arguments: dict[str, Any]) -> StockCall:
    """Wan 2.2 TI2V gives a timestep per patch; image-to-video of others gives mask and picture behind the latents."""
    call = read_usual_call(config, arguments)
    channels = config.get("out_channels") or config["in_channels"]
    if (config["in_channels"] - channels) % 6:  # otherwise they are channels of positions
        call = with_pictures(call, channels, arguments.get("encoder_hidden_states_image"))
    return with_one_time(call, call.latents.shape[2] // config["patch_size"][0])


WAN = Family(
    _call, lambda config: tuple(config.patch_size), "text_dim", takes_first_frame=True, takes_pictures=True, read_call=_read_call
)
LIKE_WAN = replace(WAN, takes_first_frame=False, takes_pictures=False)
"""SkyReels-V2 and ChronoEdit, which have no other arguments in text-to-video."""
