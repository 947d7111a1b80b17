"""HunyuanVideo."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lutetia.models.experts.classes.family import TIMESTEPS, Asked, Family, Patch, config_of


def _call(model: nn.Module, asked: Asked) -> Tensor:
    config = config_of(model)
    pooled = asked.pooled
    if pooled is None:
        pooled = asked.tokens.new_zeros(len(asked.tokens), config.pooled_projection_dim)
    guidance = torch.full_like(asked.timestep, TIMESTEPS * asked.inputs.guidance) if config.guidance_embeds else None
    return model(
        asked.latents, asked.timestep, asked.tokens, asked.mask, pooled, guidance, return_dict=False
    )[0]  # fmt: skip


def _patch(config: Any) -> Patch:
    return config.patch_size_t, config.patch_size, config.patch_size


HUNYUAN_VIDEO = Family(_call, _patch, "text_embed_dim", "pooled_projection_dim")
