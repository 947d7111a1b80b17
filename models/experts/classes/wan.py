"""Wan 2.1 and 2.2, and the classes that are called like it."""

from __future__ import annotations

from torch import Tensor, nn

from lutetia.models.experts.classes.family import Asked, Family


def _call(model: nn.Module, asked: Asked) -> Tensor:
    return model(asked.latents, asked.timestep, asked.tokens, return_dict=False)[0]


WAN = Family(_call, lambda config: tuple(config.patch_size), "text_dim")
