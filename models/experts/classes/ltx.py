"""LTX-Video. It takes a sequence of patches, packed and unpacked as in `LTXPipeline._pack_latents`.

`LTXImageToVideoPipeline` gives a timestep per patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lutetia.models.experts.classes.family import Asked, Family, Patch, StockCall, config_of, with_one_time


def _call(model: nn.Module, asked: Asked) -> Tensor:
    patch = _patch(config_of(model))
    frames, height, width = (size // p for size, p in zip(asked.latents.shape[2:], patch, strict=True))
    times, mask = asked.timestep_of(patch), asked.mask.to(asked.tokens.dtype)
    out = model(
        _packed(asked.latents, patch), asked.tokens, times, mask, num_frames=frames, height=height, width=width,
        rope_interpolation_scale=asked.inputs.rope_scale, return_dict=False,
    )[0]  # fmt: skip
    return _unpacked(out, (frames, height, width), patch)


def _packed(latents: Tensor, patch: Patch) -> Tensor:
    p_t, p, _ = patch
    batch, channels, frames, height, width = latents.shape
    f, h, w = frames // p_t, height // p, width // p
    return latents.reshape(batch, channels, f, p_t, h, p, w, p).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4, 7).flatten(1, 3)


def _unpacked(sequence: Tensor, grid: Patch, patch: Patch) -> Tensor:
    (f, h, w), (p_t, p, _) = grid, patch
    blocks = sequence.reshape(len(sequence), f, h, w, -1, p_t, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return blocks.reshape(len(sequence), -1, f * p_t, h * p, w * p)


def _patch(config: Any) -> Patch:
    return config.patch_size_t, config.patch_size, config.patch_size


def _read_call(config: Any, arguments: Mapping[str, Any]) -> StockCall:
    patch = _patch(config)
    grid = arguments["num_frames"], arguments["height"], arguments["width"]
    call = StockCall(
        latents=_unpacked(arguments["hidden_states"], grid, patch),
        timestep=arguments["timestep"],
        tokens=arguments["encoder_hidden_states"],
        pooled=None,
        mask=arguments["encoder_attention_mask"],
        changed={"rope_scale": arguments.get("rope_interpolation_scale")},
        pack=lambda prediction: _packed(prediction, patch),
    )
    return with_one_time(call, grid[0])


LTX = Family(_call, _patch, "caption_channels", packed=True, takes_first_frame=True, read_call=_read_call)
