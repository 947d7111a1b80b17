"""Experts of either kind: networks that are trained whole, and adapters on a base."""

from __future__ import annotations

from torch import nn

from lutetia.models.experts.adapters.base_model import Base, build_base
from lutetia.models.experts.adapters.inject import add_adapter, reset_adapter
from lutetia.models.experts.families import build_expert, construct
from lutetia.models.experts.trained import load_trained, published_tensors
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.system.errors import ConfigError


def load_expert(spec: ExpertSpec, seed: int, base: Base | None) -> nn.Module:
    """An expert with its first weights, on the CPU. What is trained of it is in float32.

    Args:
        spec: the expert.
        seed: of the first weights, or of the adapter's.
        base: the files of its base; not looked at where the expert has no adapter.

    Raises ConfigError when the network cannot be built, or the base is missing or another.
    """
    if spec.adapter is None:
        return build_expert(spec, seed)
    if base is None:
        raise ConfigError(f"the expert adapts {spec.adapter.base.source}, which was not given; name its folder with --base")
    model = build_base(lambda: construct(spec), base, spec.adapter.base.dtype)
    add_adapter(model, spec.adapter)
    reset_adapter(model, seed)
    return model


def reset_expert(model: nn.Module, spec: ExpertSpec, seed: int) -> None:
    """Give the expert its first weights again; its base stays as it is."""
    if spec.adapter is None:
        load_trained(model, published_tensors(build_expert(spec, seed)))
    else:
        reset_adapter(model, seed)
