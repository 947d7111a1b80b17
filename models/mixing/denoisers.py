"""Experts as denoisers of velocities, whatever they predict, and the reader of experts from a mixture's folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from lutetia.models.experts.families import call_expert
from lutetia.models.experts.objectives import Prediction, Schedule, schedule_of, velocity
from lutetia.models.experts.pictures import Pictures
from lutetia.models.mixing.description import ExpertKind
from lutetia.models.mixing.folder import MixtureFolder
from lutetia.protocol.schema.model.pipeline_spec import ExpertInputs

Denoiser = Callable[..., Tensor]
"""(x_t [B, ...], t [B], tokens [B, L, D], pooled [B, P] or None[, pictures of the rows]) -> velocity like x_t."""

log = logging.getLogger(__name__)


class FolderExperts:
    """Reads experts of a mixture folder with their own diffusers classes, onto the mixture's device and in its dtype."""

    def __init__(self, folder: MixtureFolder, mixture: Any) -> None:
        """`mixture` is the MixtureTransformer, whose `device` and `dtype` experts get."""
        self._folder, self._mixture = folder, mixture

    def __call__(self, index: int) -> Denoiser:
        entry = self._mixture.config["experts"][index]
        expert_class = getattr(diffusers, entry["class_name"])
        model = self._folder.load(expert_class, entry["folder"], torch_dtype=self._mixture.dtype).eval()
        model.to(self._mixture.device)
        log.info("read expert %d (%s) from %s", index, entry["class_name"], entry["folder"])
        kind = ExpertKind.model_validate({name: entry[name] for name in ExpertKind.model_fields if name in entry})
        return module_denoiser(model, kind.prediction, schedule_of(kind), lambda: self._mixture.call_of(kind))


@dataclass(frozen=True)
class ExpertCall:
    """What an expert is given at a call besides latents, time and text."""

    inputs: ExpertInputs | None = None
    """None: what its class needs."""
    given: bool = False
    """Whether the first latent frame of all rows is given, clean."""


def module_denoiser(
    model: nn.Module, prediction: Prediction, schedule: Schedule, call: Callable[[], ExpertCall] = ExpertCall
) -> Denoiser:
    """A diffusers expert as a denoiser of velocities. It runs on the device of its inputs and in the dtype of `tokens`.

    `call` says at each call what else the expert is given.
    """

    def denoise(x_t: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor | None, pictures: Pictures | None = None) -> Tensor:
        if next(model.parameters()).device != x_t.device:
            model.to(x_t.device)

        def ask(z: Tensor, s: Tensor) -> Tensor:
            asked = call()
            given = torch.ones(len(z), dtype=torch.bool, device=z.device) if asked.given else None
            return call_expert(model, z.to(tokens.dtype), s, tokens, pooled, asked.inputs, given, pictures)

        return velocity(prediction, schedule, ask, x_t, t)

    return denoise
