"""Experts: any of the diffusers video transformers below, named by class and config, called in one way.

An expert keeps its diffusers class, config and weights unchanged, so its folder loads alone with `from_pretrained`. The classes
differ only in the arguments of `forward`; one `Family` per class handles that (`classes/`). Shapes of a call:
`latents [B, C, F, H, W]`, `time [B]` in [0, 1] with 1 = noise, `tokens [B, L, D]`, `pooled [B, P]`.
The null condition (dropped text, the unguided branch) is `tokens = 0, pooled = 0`, or that of the run's pipeline (`TextRecipe`).

To add a class, describe it in `classes/` and name it in `classes/registry.py`.

If an expert's config has more input than output channels, it gets *position channels* beside the noisy latents, in the way that
image-to-video models get their condition: its `in_channels` are C + P with P a multiple of 6. A model with only rotary positions,
such as Wan, cannot tell where in the frame it is while everything around is noise; fixed maps of frame, row and column tell it.
"""

from __future__ import annotations

import inspect
import math
from functools import lru_cache
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from lutetia.models.experts.adapters.inject import add_adapter
from lutetia.models.experts.classes.family import TIMESTEPS, Asked, Family, config_of
from lutetia.models.experts.classes.registry import FAMILIES, family_of
from lutetia.models.experts.config_bounds import MOST_POSITION_CHANNELS, check_config
from lutetia.models.experts.pictures import Pictures, empty_pictures
from lutetia.models.experts.trained import published_tensors
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.pipeline_spec import ExpertInputs
from lutetia.system.errors import ConfigError

__all__ = [
    "FAMILIES", "TIMESTEPS", "build_expert", "build_meta", "call_expert", "check_fits", "construct", "family_of", "full_config",
    "position_channels", "weight_schema",
]  # fmt: skip

_TOKENS_BESIDE_VISION = 512
"""diffusers' attention of Wan takes the last 512 vectors for text, and those before them for the picture."""
Schema = dict[str, tuple[tuple[int, ...], torch.dtype]]


def build_expert(spec: ExpertSpec, seed: int | None = None) -> nn.Module:
    """A newly initialised network on the CPU in float32. Equal seeds give equal weights; torch's global generator is not used.

    Raises ConfigError if the class or a config key is unknown, or if diffusers refuses a value.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0 if seed is None else seed)
        return construct(spec)


def construct(spec: ExpertSpec) -> nn.Module:
    """The network without its adapter, with weights from torch's global generator. Raises like `build_expert`."""
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


def call_expert(
    model: nn.Module,
    x_t: Tensor,
    t: Tensor,
    tokens: Tensor,
    pooled: Tensor | None = None,
    inputs: ExpertInputs | None = None,
    given: Tensor | None = None,
    pictures: Pictures | None = None,
) -> Tensor:
    """The expert's raw prediction, in the shape of `x_t`; channels of pictures and positions are added here.

    Args:
        model: the expert.
        x_t: noisy latents on the expert's own path, `[B, C, F, H, W]`.
        t: time on the expert's own schedule, in [0, 1] with 1 = noise, `[B]`.
        tokens: `[B, L, D]`.
        pooled: `[B, P]`, or None.
        inputs: what else it is given (`ExpertSpec.inputs`). None: what its class needs.
        given: rows whose first latent frame is clean and is only to be continued, bool `[B]`. None: no row, asked in the way that
            all classes know.
        pictures: of each row, for experts that take them in channels of their own.
    """
    family = family_of(type(model).__name__.removeprefix("FSDP"))  # `fully_shard` sets it before the name
    inputs = inputs or family.inputs
    if pictures:
        x_t = torch.cat([x_t, pictures.channels(x_t)], dim=1)
    vision = None if pictures is None or pictures.vision is None else pictures.vision.to(x_t)
    extra = _input_channels(family, config_of(model)) - x_t.shape[1]
    if extra:
        positions = position_channels(extra, *x_t.shape[2:], x_t.device, x_t.dtype)
        x_t = torch.cat([x_t, positions.expand(len(x_t), -1, -1, -1, -1)], dim=1)
    timestep = t * TIMESTEPS
    if inputs.reversed:
        return -family.call(model, Asked(x_t, TIMESTEPS - timestep, tokens, pooled, inputs, given, vision))
    return family.call(model, Asked(x_t, timestep, tokens, pooled, inputs, given, vision))


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
    """Name, shape and dtype of every tensor of the expert's weights file, none allocated. Raises like `build_expert`."""
    return dict(_schema_of(canonical(spec)))


@lru_cache(maxsize=64)
def _schema_of(document: bytes) -> Schema:
    model = build_meta(ExpertSpec.model_validate_json(document))
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in published_tensors(model).items()}


def full_config(spec: ExpertSpec) -> dict[str, Any]:
    """The expert's config, completed with the defaults of its class. Raises like `build_expert`."""
    config = {key: value for key, value in config_of(build_meta(spec)).items() if not key.startswith("_")}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def build_meta(spec: ExpertSpec) -> nn.Module:
    """The expert without memory for its weights (names, shapes and config only). Raises like `build_expert`."""
    with torch.device("meta"):
        model = construct(spec)
        if spec.adapter:
            add_adapter(model, spec.adapter)
        return model


def check_fits(spec: ExpertSpec, latent: LatentSpec) -> None:
    """Raises ConfigError, naming both numbers, if the expert does not fit the run's latents or text, or has dropout."""
    _check_fits(canonical(spec), canonical(latent))


@lru_cache(maxsize=64)  # each trainer asks again, and each replay has a trainer
def _check_fits(expert: bytes, latents: bytes) -> None:
    spec, latent = ExpertSpec.model_validate_json(expert), LatentSpec.model_validate_json(latents)
    model = build_meta(spec)
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        raise ConfigError(
            "the expert has dropout, whose masks cannot be replayed on another device or with another micro-batch; set it to 0"
        )
    config = config_of(model)
    family = family_of(spec.class_name)
    p_t, p_h, p_w = family.patch(config)
    _check_first_frame(spec, family, p_t)
    _check_pictures(spec, family, config, latent)
    volume = p_t * p_h * p_w if family.packed else 1
    extra = _input_channels(family, config) - latent.channels - (latent.channels + latent.picture.mask if latent.picture else 0)
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


def _check_pictures(spec: ExpertSpec, family: Family, config: Any, latent: LatentSpec) -> None:
    picture = latent.picture
    has = [key for key in ("image_dim", "pos_embed_seq_len") if config.get(key) is not None]
    if picture is None:
        if has:
            raise ConfigError(
                f"{spec.class_name} takes pictures ({has[0]} is set), but the data have none; use another transformer"
            )
        return
    if not family.takes_pictures or spec.first_frame is not None:
        raise ConfigError(
            f"{spec.class_name} cannot take the data's pictures as it is used; use the text-to-video data of its pipeline"
        )
    if (config.get("image_dim") or 0) != picture.vision_width or "pos_embed_seq_len" in has:
        raise ConfigError(
            f"{spec.class_name} has image_dim {config.get('image_dim')} and pos_embed_seq_len {config.get('pos_embed_seq_len')}, "
            f"but the data have one picture with vectors of {picture.vision_width or None}; build the data from the same pipeline"
        )
    if picture.vision_width and latent.text_tokens != _TOKENS_BESIDE_VISION:
        raise ConfigError(
            f"{spec.class_name} with an image encoder takes {_TOKENS_BESIDE_VISION} text tokens, not {latent.text_tokens}; "
            "leave text_tokens out"
        )


def _check_first_frame(spec: ExpertSpec, family: Family, frames: int) -> None:
    if spec.first_frame is None:
        return
    if not family.takes_first_frame:
        known = ", ".join(sorted(name for name, each in FAMILIES.items() if each.takes_first_frame))
        raise ConfigError(f"{spec.class_name} takes no first frame; leave first_frame out, or use one of {known}")
    if frames > 1 or spec.betas or spec.noise_schedule != "linear" or family.inputs.reversed:
        raise ConfigError(
            f"first_frame needs patches of one frame and flow matching, which this {spec.class_name} does not have; leave it out"
        )


@torch.no_grad()
def _rehearse(spec: ExpertSpec, latent: LatentSpec) -> None:
    """One forward pass without memory or arithmetic. It finds the misfits that the rules of `check_fits` do not name."""
    if not family_of(spec.class_name).on_meta:
        return
    with torch.device("meta"):
        x, t, text = torch.empty(1, *latent.shape), torch.empty(1), torch.empty(1, latent.text_tokens, latent.text_width)
        pooled, pictures = torch.empty(1, latent.pooled_width), empty_pictures(latent, 1)
        out = call_expert(construct(spec), x, t, text, pooled, spec.inputs, pictures=pictures)
    if out.shape != x.shape:
        raise ValueError(f"it answers with shape {list(out.shape[1:])} instead of {list(x.shape[1:])}")


def _input_channels(family: Family, config: Any) -> int:
    return config.in_channels // (math.prod(family.patch(config)) if family.packed else 1)
