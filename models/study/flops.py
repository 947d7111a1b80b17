"""FLOPs of the real modules by torch's counter: multiplications and additions of matrix products and convolutions.

The modules are on the meta device, so nothing is computed. Attention is split into matrix products, which the counter supports
on every device. Element-wise operations and the optimiser are not counted; per parameter they are the same for every arm.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lutetia.models.experts.families import build_meta, call_expert, family_of
from lutetia.models.experts.pictures import empty_pictures
from lutetia.models.mixing.router import router_of
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import Manifest
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.latent_spec import LatentSpec
from lutetia.protocol.schema.model.training_spec import RouterSpec


class Cost(Frozen):
    """The cost of a network on one clip."""

    forward: int = Field(description="FLOPs of a forward pass")
    training: int = Field(description="FLOPs of a forward and a backward pass")
    parameters: int = Field(description="number of parameters")


def expert_cost(spec: ExpertSpec, latent: LatentSpec) -> Cost:
    """The cost of one expert on one clip. Raises ConfigError if it cannot be built."""
    model = build_meta(spec)
    with torch.device("meta"):
        x, t = torch.empty(1, *latent.shape), torch.empty(1)
        tokens, pooled = torch.empty(1, latent.text_tokens, latent.text_width), torch.empty(1, latent.pooled_width)
        pictures = empty_pictures(latent, 1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        try:
            out = call_expert(model, x, t, tokens, pooled, pictures=pictures)
        except RuntimeError:
            return _by_formula(model, latent)
        forward = counter.get_total_flops()
        out.sum().backward()
    return Cost(forward=forward, training=counter.get_total_flops(), parameters=_parameters(model))


def _by_formula(model: Any, latent: LatentSpec) -> Cost:
    """For a class that the meta device cannot run (Mochi asks for that device's autocast, and drops padded text tokens).

    2 FLOPs a parameter and token, and 4 a pair of tokens, channel and block for the attention; the backward pass twice as many
    (Kaplan et al., arXiv 2001.08361, section 2.1).
    """
    config = model.config
    patch = family_of(type(model).__name__).patch(config)
    tokens = latent.text_tokens + math.prod(-(-size // step) for size, step in zip(latent.shape[1:], patch, strict=True))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    forward = 2 * tokens * _parameters(model) + 4 * tokens**2 * width * config["num_layers"]
    return Cost(forward=forward, training=3 * forward, parameters=_parameters(model))


def training_flops(manifest: Manifest) -> tuple[int, ...]:
    """FLOPs of a forward and a backward pass of each shard's expert on one sample, the mean over the buckets of the data.

    Raises ConfigError if an expert cannot be built.
    """
    buckets = [manifest.latent.in_bucket(number) for number in range(len(manifest.latent.buckets) + 1)]
    known: dict[str, int] = {}
    for shard in manifest.shards:
        spec = manifest.expert_of(shard.index)
        if (name := spec.model_dump_json()) not in known:
            known[name] = max(1, round(sum(expert_cost(spec, latent).training for latent in buckets) / len(buckets)))
    return tuple(known[manifest.expert_of(shard.index).model_dump_json()] for shard in manifest.shards)


def router_cost(spec: RouterSpec, latent: LatentSpec, experts: int) -> Cost:
    """The cost of the router on one clip."""
    with torch.device("meta"):
        model = router_of(latent, spec, experts)
        x, t, pooled = torch.empty(1, *latent.shape), torch.empty(1), torch.empty(1, latent.pooled_width)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = model(x, t, pooled)
        forward = counter.get_total_flops()
        out.sum().backward()
    return Cost(forward=forward, training=counter.get_total_flops(), parameters=_parameters(model))


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
