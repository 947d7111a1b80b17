"""CogVideoX 1.0 and 1.5. Frames stand before channels, and the caller computes the rotary positions."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

from lutetia.models.experts.classes.family import Asked, Family, Patch, StockCall, config_of, with_pictures

_OFFSET = 2.0
"""What CogVideoX 1.5's image-to-video tells its transformer as `ofs`, always."""


def _call(model: nn.Module, asked: Asked) -> Tensor:
    frames_first = asked.latents.transpose(1, 2)
    rotary = None
    config = config_of(model)
    if config.use_rotary_positional_embeddings:
        p_t, p, _ = _patch(config)
        shape = asked.latents.shape
        grid = (shape[2] // p_t, shape[3] // p, shape[4] // p)
        base = (config.sample_height // p, config.sample_width // p)
        rotary = _rotary(config.attention_head_dim, grid, base, config.patch_size_t is not None, asked.latents.device)
    offset = asked.latents.new_full((1,), _OFFSET) if config.ofs_embed_dim else None
    out = model(frames_first, asked.tokens, asked.timestep, ofs=offset, image_rotary_emb=rotary, return_dict=False)[0]
    return out.transpose(1, 2)


@lru_cache(maxsize=16)
def _rotary(head: int, grid: Patch, base: tuple[int, int], patched_time: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Like `CogVideoXPipeline._prepare_rotary_positional_embeddings` (version 1.0, or 1.5 with `patched_time`)."""
    frames, *space = grid
    if patched_time:
        cosine, sine = get_3d_rotary_pos_embed(head, None, space, frames, grid_type="slice", max_size=base, device=device)
    else:
        crop = resized_region((space[0], space[1]), base)
        cosine, sine = get_3d_rotary_pos_embed(head, crop, space, frames, device=device)
    return torch.as_tensor(cosine), torch.as_tensor(sine)


def resized_region(grid: tuple[int, int], base: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The region of the base grid that a grid (height, width) is resized into: (top, left), (bottom, right).

    A copy of diffusers' `get_resize_crop_region_for_grid`, whose import would also import a pipeline and text encoders.
    """
    (height, width), (base_height, base_width) = grid, base
    if height / width > base_height / base_width:
        width, height = round(base_height / height * width), base_height
    else:
        height, width = round(base_width / width * height), base_width
    top, left = round((base_height - height) / 2), round((base_width - width) / 2)
    return (top, left), (top + height, left + width)


def _patch(config: Any) -> Patch:
    return config.patch_size_t or 1, config.patch_size, config.patch_size


def _read_call(config: Any, arguments: Mapping[str, Any]) -> StockCall:
    call = StockCall(
        latents=arguments["hidden_states"].transpose(1, 2),
        timestep=arguments["timestep"],
        tokens=arguments["encoder_hidden_states"],
        pooled=None,
        mask=None,
        changed={},
        pack=lambda prediction: prediction.transpose(1, 2),
    )
    return with_pictures(call, config.get("out_channels") or config["in_channels"])


COGVIDEOX = Family(_call, _patch, "text_embed_dim", text_tokens="max_text_seq_length", takes_pictures=True, read_call=_read_call)
