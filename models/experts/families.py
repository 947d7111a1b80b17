"""Experts: any of the diffusers video transformers below, named by class and config, called in one way.

An expert keeps its diffusers class, config and weights unchanged, so its folder loads alone with `from_pretrained`. The classes
differ only in the arguments of `forward`; one `Family` per class handles that. Shapes of a call:
`latents [B, C, F, H, W]`, `time [B]` in [0, 1] with 1 = noise, `tokens [B, L, D]`, `pooled [B, P]`.
The null condition (dropped text, the unguided branch) is `tokens = 0, pooled = 0`.

To add a class, add an entry to `FAMILIES`.

If an expert's config has more input than output channels, it gets *position channels* beside the noisy latents, in the way that
image-to-video models get their condition: its `in_channels` are C + P with P a multiple of 6. A model with only rotary positions,
such as Wan, cannot tell where in the frame it is while everything around is noise; fixed maps of frame, row and column tell it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

from lutetia.models.experts.config_bounds import MOST_POSITION_CHANNELS, check_config
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.manifest import ExpertSpec, LatentSpec
from lutetia.system.errors import ConfigError

TIMESTEPS = 1000.0  # diffusers' transformers embed time as a timestep in [0, 1000]

Patch = tuple[int, int, int]
Schema = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Family:
    """How one diffusers class is called, and the names of its config entries that must agree with the latents and the text."""

    call: Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None], Tensor]
    """(model, latents [B, C, F, H, W], timestep [B] in 0…1000, tokens, pooled) -> prediction like latents."""
    patch: Callable[[Any], Patch]
    """Frames, height and width of a patch, from the config."""
    text_width: str
    pooled_width: str | None = None
    packed: bool = False
    """Whether in_channels counts a whole patch."""
    text_tokens: str | None = None


def _call_wan(model: nn.Module, x: Tensor, timestep: Tensor, tokens: Tensor, pooled: Tensor | None) -> Tensor:
    return model(x, timestep, tokens, return_dict=False)[0]


def _call_hunyuan(model: nn.Module, x: Tensor, timestep: Tensor, tokens: Tensor, pooled: Tensor | None) -> Tensor:
    config = _config(model)
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if pooled is None:
        pooled = tokens.new_zeros(len(tokens), config.pooled_projection_dim)
    guidance = torch.full_like(timestep, TIMESTEPS) if config.guidance_embeds else None  # 1.0: not distilled from a guided model
    return model(x, timestep, tokens, mask, pooled, guidance, return_dict=False)[0]


def _call_cogvideox(model: nn.Module, x: Tensor, timestep: Tensor, tokens: Tensor, pooled: Tensor | None) -> Tensor:
    frames_first = x.transpose(1, 2)
    rotary = None
    config = _config(model)
    if config.use_rotary_positional_embeddings:
        p_t, p, _ = _patch_cogvideox(config)
        grid = (x.shape[2] // p_t, x.shape[3] // p, x.shape[4] // p)
        base = (config.sample_height // p, config.sample_width // p)
        rotary = _cogvideox_rotary(config.attention_head_dim, grid, base, config.patch_size_t is not None, x.device)
    return model(frames_first, tokens, timestep, image_rotary_emb=rotary, return_dict=False)[0].transpose(1, 2)


@lru_cache(maxsize=16)
def _cogvideox_rotary(
    head: int, grid: Patch, base: tuple[int, int], patched_time: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
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


def _call_ltx(model: nn.Module, x: Tensor, timestep: Tensor, tokens: Tensor, pooled: Tensor | None) -> Tensor:
    """LTX takes a sequence of patches; they are packed and unpacked as in `LTXPipeline._pack_latents`."""
    p_t, p, _ = _patch_ltx(_config(model))
    batch, channels, frames, height, width = x.shape
    f, h, w = frames // p_t, height // p, width // p
    patches = x.reshape(batch, channels, f, p_t, h, p, w, p).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4, 7).flatten(1, 3)
    mask = torch.ones(tokens.shape[:2], dtype=tokens.dtype, device=tokens.device)
    out = model(patches, tokens, timestep, mask, num_frames=f, height=h, width=w, return_dict=False)[0]
    return out.reshape(batch, f, h, w, -1, p_t, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(batch, -1, frames, height, width)


def _patch_cogvideox(config: Any) -> Patch:
    return config.patch_size_t or 1, config.patch_size, config.patch_size


def _patch_ltx(config: Any) -> Patch:
    return config.patch_size_t, config.patch_size, config.patch_size


def _patch_hunyuan(config: Any) -> Patch:
    return config.patch_size_t, config.patch_size, config.patch_size


FAMILIES: Mapping[str, Family] = {
    "WanTransformer3DModel": Family(_call_wan, lambda config: tuple(config.patch_size), "text_dim"),
    "HunyuanVideoTransformer3DModel": Family(_call_hunyuan, _patch_hunyuan, "text_embed_dim", "pooled_projection_dim"),
    "LTXVideoTransformer3DModel": Family(_call_ltx, _patch_ltx, "caption_channels", packed=True),
    "CogVideoXTransformer3DModel": Family(_call_cogvideox, _patch_cogvideox, "text_embed_dim", text_tokens="max_text_seq_length"),
}


def family_of(class_name: str) -> Family:
    """How experts of this class are called. Raises ConfigError for a class that is not supported."""
    try:
        return FAMILIES[class_name]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"expert class {class_name!r} is not supported; use one of {known}") from None


def build_expert(spec: ExpertSpec, seed: int | None = None) -> nn.Module:
    """A newly initialised expert on the CPU in float32. Equal seeds give equal weights; torch's global generator is not used.

    Raises ConfigError if the class or a config key is unknown, or if diffusers refuses a value.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0 if seed is None else seed)
        return _construct(spec)


def _construct(spec: ExpertSpec) -> nn.Module:
    family_of(spec.class_name)
    check_config(spec)
    expert_class = getattr(diffusers, spec.class_name)
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.config.items()}
    unknown = config.keys() - inspect.signature(expert_class.__init__).parameters.keys()
    if unknown:
        raise ConfigError(f"the config of expert {spec.class_name} has unknown keys {sorted(unknown)}; remove or correct them")
    try:
        return expert_class(**config)
    except (TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, IndexError) as error:
        raise ConfigError(f"{spec.class_name} refuses its config: {error}; correct the run's expert config") from error


def call_expert(model: nn.Module, x_t: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor | None = None) -> Tensor:
    """The expert's raw prediction, in the shape of `x_t`; position channels are added here.

    Args:
        model: the expert.
        x_t: noisy latents on the expert's own path, `[B, C, F, H, W]`.
        t: time on the expert's own schedule, in [0, 1] with 1 = noise, `[B]`.
        tokens: `[B, L, D]`.
        pooled: `[B, P]`, or None.
    """
    family = family_of(type(model).__name__)
    extra = _input_channels(family, _config(model)) - x_t.shape[1]
    if extra:
        positions = position_channels(extra, *x_t.shape[2:], x_t.device, x_t.dtype)
        x_t = torch.cat([x_t, positions.expand(len(x_t), -1, -1, -1, -1)], dim=1)
    return family.call(model, x_t, t * TIMESTEPS, tokens, pooled)


@lru_cache(maxsize=16)
def position_channels(
    count: int, frames: int, height: int, width: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Fixed maps `[count, F, H, W]`, count a multiple of 6: `sin` and `cos` of pi/2, pi, 2 pi, … times the frame, the row and the
    column, each from -1 to 1.
    """
    axes = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in (frames, height, width)), indexing="ij")
    waves = [
        wave(math.pi * 2.0 ** (octave - 1) * axis)
        for axis in axes
        for octave in range(count // 6)
        for wave in (torch.sin, torch.cos)
    ]
    return torch.stack(waves).to(device, dtype)


def weight_schema(spec: ExpertSpec) -> Schema:
    """Name, shape and dtype of every tensor of the expert's weights, without allocating them. Raises like `build_expert`."""
    return dict(_schema_of(canonical(spec)))


@lru_cache(maxsize=64)
def _schema_of(document: bytes) -> Schema:
    model = build_meta(ExpertSpec.model_validate_json(document))
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}


def full_config(spec: ExpertSpec) -> dict[str, Any]:
    """The expert's config, completed with the defaults of its class. Raises like `build_expert`."""
    config = {key: value for key, value in _config(build_meta(spec)).items() if not key.startswith("_")}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def build_meta(spec: ExpertSpec) -> nn.Module:
    """The expert without memory for its weights (names, shapes and config only). Raises like `build_expert`."""
    with torch.device("meta"):
        return _construct(spec)


def check_fits(spec: ExpertSpec, latent: LatentSpec) -> None:
    """Raises ConfigError, naming both numbers, if the expert does not fit the run's latents or text, or has dropout."""
    model = build_meta(spec)
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        raise ConfigError(
            "the expert has dropout, whose masks cannot be replayed on another device or with another micro-batch; set it to 0"
        )
    config = _config(model)
    family = family_of(spec.class_name)
    p_t, p_h, p_w = family.patch(config)
    volume = p_t * p_h * p_w if family.packed else 1
    extra = _input_channels(family, config) - latent.channels
    if config.in_channels % volume or extra < 0 or extra % 6 or extra > MOST_POSITION_CHANNELS:
        raise ConfigError(
            f"the expert's in_channels is {config.in_channels} but the run's latents have {latent.channels} channels; "
            f"give it {latent.channels * volume}, or with position channels that plus a multiple of {6 * volume}, "
            f"at most {MOST_POSITION_CHANNELS * volume}"
        )
    agreements = [
        ("out_channels", config.out_channels or config.in_channels, latent.channels * volume),
        (family.text_width, config[family.text_width], latent.text_width),
    ]
    if family.pooled_width:
        agreements.append((family.pooled_width, config[family.pooled_width], latent.pooled_width))
    if family.text_tokens:
        agreements.append((family.text_tokens, config[family.text_tokens], latent.text_tokens))
    for key, has, needs in agreements:
        if has != needs:
            raise ConfigError(f"the expert's {key} is {has} but the run's data need {needs}; correct the expert config")
    for axis, size, patch in zip(("frames", "height", "width"), latent.shape[1:], (p_t, p_h, p_w), strict=True):
        if size % patch:
            raise ConfigError(
                f"the expert's patch of {patch} does not divide the latent's {axis} of {size}; correct the expert config"
            )

    try:
        _rehearse(spec, latent)
    except (RuntimeError, ValueError, TypeError, ArithmeticError, IndexError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ConfigError(f"{spec.class_name} cannot take the run's latents: {reason}; correct the expert config") from error


@torch.no_grad()
def _rehearse(spec: ExpertSpec, latent: LatentSpec) -> None:
    """One forward pass without memory or arithmetic. It finds the misfits that the rules of `check_fits` do not name."""
    with torch.device("meta"):
        x, t, text = torch.empty(1, *latent.shape), torch.empty(1), torch.empty(1, latent.text_tokens, latent.text_width)
        out = call_expert(_construct(spec), x, t, text, torch.empty(1, latent.pooled_width))
    if out.shape != x.shape:
        raise ValueError(f"it answers with shape {list(out.shape[1:])} instead of {list(x.shape[1:])}")


def _input_channels(family: Family, config: Any) -> int:
    return config.in_channels // (math.prod(family.patch(config)) if family.packed else 1)


def _config(model: nn.Module) -> Any:
    return model.config  # diffusers' ConfigMixin
