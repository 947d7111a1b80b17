"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised, all matrices of one shape together.

The update is that of `torch.optim.Muon`, whose Newton-Schulz iteration always runs in bfloat16, one matrix at a time. That takes
twenty times as long on a processor without bfloat16 units, so here it runs in float32 on a CPU and on cards without them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lutetia.models.device import multiplies_bfloat16

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic with the steepest start that still ends near 1
STEPS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Approximately U V^T for every matrix U S V^T of `[N, rows, columns]`: singular values end between 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum with decoupled weight decay. A step is scaled by sqrt(rows/columns) if that is above 1."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-3, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for (rows, columns), parameters in by_shape.items():
                updates = self._directions(parameters, group["momentum"])
                scale = math.sqrt(max(1.0, rows / columns))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
                torch._foreach_add_(parameters, updates, alpha=-group["lr"] * scale)  # pyright: ignore[reportPrivateImportUsage]

    def _directions(self, parameters: list[Tensor], momentum: float) -> list[Tensor]:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        moments = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in parameters]
        torch._foreach_lerp_(moments, gradients, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
        ahead = torch.stack([g.lerp(m, momentum) for g, m in zip(gradients, moments, strict=True)])
        fast = ahead.bfloat16() if multiplies_bfloat16(ahead.device) else ahead
        return list(orthogonalise(fast).to(ahead.dtype))
