"""Mochi. Its time runs from noise (0) to data (1000), and so does its velocity."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lutetia.models.experts.classes.family import Asked, Family, Patch
from lutetia.protocol.schema.model.pipeline_spec import ExpertInputs


def _call(model: nn.Module, asked: Asked) -> Tensor:
    return model(asked.latents, asked.tokens, asked.timestep, asked.mask, return_dict=False)[0]


def _patch(config: Any) -> Patch:
    return 1, config.patch_size, config.patch_size


MOCHI = Family(_call, _patch, "text_embed_dim", on_meta=False, inputs=ExpertInputs(reversed=True))
