"""The model of the other part of the noise levels: a mixture of a run of its own, or the transformer of the pipeline.

Wan 2.2 A14B has two transformers, of which the first makes the steps at high noise and the second those at low noise. A run
trains experts for one of them, so its mixture makes clips together with a model of the other part.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from lutetia.models.experts.families import check_fits
from lutetia.models.experts.objectives import schedule_of
from lutetia.models.mixing.adapter_experts import GivenBase
from lutetia.models.mixing.denoisers import Denoiser, module_denoiser
from lutetia.models.mixing.description import ExpertKind
from lutetia.models.mixing.folder import MixtureFolder
from lutetia.models.mixture import MixtureTransformer
from lutetia.models.networks.model_ref import ModelRef, hub_errors, parse_ref, read_config
from lutetia.models.sources.pipeline import transformer_of
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.pipeline_spec import ExpertInputs, NoisePart
from lutetia.system.errors import ConfigError

_WHAT = "transformer"
_SHARED = ("channels", "vae", "mean", "std", "text_encoder", "text_tokens", "text", "text_width", "pooled_width")
"""What two mixtures must have in common to make a clip together, of their LatentSpec."""

log = logging.getLogger(__name__)


def stock_part(mixture: MixtureTransformer, part: NoisePart, latent: LatentSpec, hub: bool) -> MixtureTransformer:
    """The pipeline's own transformer for the part that `mixture` does not have, as a mixture of one; read when it is used.

    Args:
        mixture: of experts for `part`.
        part: of the noise levels.
        latent: of the mixture; its text encoder names the pipeline.
        hub: whether the transformer may be downloaded. A mixture may come from anybody, so nothing that it names is fetched
            without asking.

    Raises ConfigError when it is not here, or is another than the experts.
    """
    other = _opposite(part)
    ref = parse_ref(latent.text_encoder, _WHAT, (), hub).part(transformer_of(other))
    config = read_config(_WHAT, ref)
    entries = [ExpertKind.model_validate(entry) for entry in mixture.config["experts"]]
    like = next(entry for entry in entries if entry.folder)
    if config.get("_class_name") != like.class_name:
        raise ConfigError(f"{_WHAT} {ref.text!r} is a {config.get('_class_name')}, but the experts are {like.class_name}")
    inputs = (like.inputs or ExpertInputs()).model_copy(update={"noise_part": other})
    spec = ExpertSpec(
        class_name=like.class_name, config={key: value for key, value in config.items() if not key.startswith("_")},
        prediction=like.prediction, noise_schedule=like.noise_schedule, betas=like.betas, inputs=inputs,
    )  # fmt: skip
    check_fits(spec, latent)
    kind = like.model_copy(update={"inputs": inputs, "folder": "expert_000"})
    stock = MixtureTransformer([kind.entry], in_channels=mixture.config["in_channels"], text_conditioned=False)
    return stock.attach(None, lambda index: _read(ref, kind, stock))


def _read(ref: ModelRef, kind: ExpertKind, mixture: MixtureTransformer) -> Denoiser:
    with hub_errors(_WHAT, ref):
        model: Any = getattr(diffusers, kind.class_name).from_pretrained(
            ref.location, use_safetensors=True, torch_dtype=mixture.dtype, **ref.options
        )
    log.info("read %s for %s noise from %s", kind.class_name, mixture.noise_part and mixture.noise_part.side, ref.text)
    model = model.eval().to(mixture.device)
    return module_denoiser(model, kind.prediction, schedule_of(kind), lambda: mixture.call_of(kind))


def mixture_part(
    path: Path, part: NoisePart | None, latent: LatentSpec, dtype: torch.dtype, base: GivenBase = None, hub: bool = False
) -> MixtureTransformer:
    """The mixture in the folder `path`, which must be of the other part of the noise levels than `part`.

    Raises ConfigError if it is not, or was not trained on such latents and texts; IntegrityError if it is damaged.
    """
    folder = MixtureFolder(path)
    other = MixtureTransformer.from_pretrained(folder.path / "transformer", torch_dtype=dtype, base=base, hub=hub)
    if part is None or other.noise_part != _opposite(part):
        has, needs = _named(other.noise_part), _named(part and _opposite(part))
        raise ConfigError(f"the mixture {path} is of {has}, but {needs} would be needed beside this one; name another")
    theirs = folder.index().latent
    for field in _SHARED:
        if getattr(theirs, field) != getattr(latent, field):
            raise ConfigError(
                f"the mixture {path} was trained with {field} {getattr(theirs, field)}, this one with {getattr(latent, field)}; "
                "name one that was made from the same pipeline"
            )
    return other


def follow(other: MixtureTransformer, mixture: MixtureTransformer) -> MixtureTransformer:
    """`other`, on the device and in the data type of `mixture`, with as many experts in memory."""
    other.experts_in_memory = mixture.experts_in_memory
    if (other.device, other.dtype) != (mixture.device, mixture.dtype):
        nn.Module.to(other, mixture.device, mixture.dtype)
    return other


def _opposite(part: NoisePart) -> NoisePart:
    return part.model_copy(update={"side": "low" if part.side == "high" else "high"})


def _named(part: NoisePart | None) -> str:
    return f"{part.side} noise (boundary {part.boundary:g})" if part else "all noise levels"
