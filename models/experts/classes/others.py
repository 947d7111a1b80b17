"""Classes that differ from Wan's call in an argument or two."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from diffusers.utils.import_utils import is_torchvision_available
from torch import Tensor, nn

from lutetia.models.experts.classes.family import Asked, Family, Patch, config_of
from lutetia.system.errors import ConfigError

Rotary = tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def _square(config: Any) -> Patch:
    return getattr(config, "patch_size_t", None) or 1, config.patch_size, config.patch_size


def _cube(config: Any) -> Patch:
    return tuple(config.patch_size)


def _call_sana(model: nn.Module, asked: Asked) -> Tensor:
    mask = asked.mask.to(asked.tokens.dtype)
    return model(asked.latents, asked.tokens, asked.timestep, encoder_attention_mask=mask, return_dict=False)[0]


def _call_latte(model: nn.Module, asked: Asked) -> Tensor:
    return model(asked.latents, asked.timestep, asked.tokens, return_dict=False)[0]


def _call_cosmos(model: nn.Module, asked: Asked) -> Tensor:
    latents = asked.latents
    if config_of(model).concat_padding_mask and not is_torchvision_available():
        raise ConfigError("CosmosTransformer3DModel with concat_padding_mask needs torchvision; install it, or set that to false")
    no_padding = latents.new_zeros(1, 1, *latents.shape[3:])
    return model(
        latents, asked.timestep, asked.tokens, fps=asked.inputs.fps, padding_mask=no_padding, return_dict=False
    )[0]  # fmt: skip


def _call_easyanimate(model: nn.Module, asked: Asked) -> Tensor:
    return model(asked.latents, asked.timestep, encoder_hidden_states=asked.tokens, return_dict=False)[0]


def _call_allegro(model: nn.Module, asked: Asked) -> Tensor:
    config = config_of(model)
    p_t, p, _ = _square(config)
    frames, height, width = asked.latents.shape[2:]
    scale = (config.interpolation_scale_t, config.interpolation_scale_h, config.interpolation_scale_w)
    grid = (frames // p_t, height // p, width // p)
    return model(
        asked.latents, asked.tokens, asked.timestep, encoder_attention_mask=asked.mask.to(asked.tokens.dtype),
        image_rotary_emb=_allegro_rotary(config.attention_head_dim, grid, scale, asked.latents.device), return_dict=False,
    )[0]  # fmt: skip


@lru_cache(maxsize=16)
def _allegro_rotary(head: int, grid: Patch, scale: tuple[float, float, float], device: torch.device) -> Rotary:
    """Like `AllegroPipeline._prepare_rotary_positional_embeddings`."""
    frames, *space = grid
    positions: Any = get_3d_rotary_pos_embed_allegro(
        head, ((0, 0), tuple(space)), tuple(space), frames, interpolation_scale=scale, device=device
    )
    *frequencies, t, h, w = positions
    places = torch.cartesian_prod(t.long(), h.long(), w.long()).T.reshape(3, 1, -1).contiguous()
    return tuple(frequencies), tuple(places)  # pyright: ignore[reportReturnType]


SANA_VIDEO = Family(_call_sana, _cube, "caption_channels")
LATTE = Family(_call_latte, _square, "caption_channels")
COSMOS = Family(_call_cosmos, _cube, "text_embed_dim")
EASY_ANIMATE = Family(_call_easyanimate, _square, "text_embed_dim")
ALLEGRO = Family(_call_allegro, _square, "caption_channels")
