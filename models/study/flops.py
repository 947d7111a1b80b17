"""FLOPs by torch's own counter on the real modules: multiplications and additions of matrix products and convolutions.

Modules live on the meta device, so counting takes no arithmetic. Attention is taken apart into products, which torch's counter
knows on every device. Element-wise work and the optimiser are not counted; they are the same per parameter on every side.
"""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lutetia.models.experts.families import build_meta, call_expert
from lutetia.models.mixing.router import router_of
from lutetia.protocol.schema.canonical import Frozen
from lutetia.protocol.schema.manifest import ExpertSpec, LatentSpec, RouterSpec


class Cost(Frozen):
    """Of one clip: `forward` FLOPs, and those of a training step's forward and backward pass together; and the parameters."""

    forward: int
    training: int
    parameters: int


def expert_cost(spec: ExpertSpec, latent: LatentSpec) -> Cost:
    """One expert on one clip. Raises ConfigError when it cannot be built."""
    model = build_meta(spec)
    with torch.device("meta"):
        x, t = torch.empty(1, *latent.shape), torch.empty(1)
        tokens, pooled = torch.empty(1, latent.text_tokens, latent.text_width), torch.empty(1, latent.pooled_width)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = call_expert(model, x, t, tokens, pooled)
        forward = counter.get_total_flops()
        out.sum().backward()
    return Cost(forward=forward, training=counter.get_total_flops(), parameters=_parameters(model))


def router_cost(spec: RouterSpec, latent: LatentSpec, experts: int) -> Cost:
    """The router on one clip."""
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
