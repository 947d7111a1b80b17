"""AdamW that keeps its moments in eight bits, its weights in bfloat16, or both.

The update is that of Loshchilov and Hutter (arXiv 1711.05101, algorithm 2), computed in float32, one tensor after another, so
that what is unpacked is never larger than one tensor. Weights in bfloat16 are kept as a sum of two: the weight, which the model
computes with, and what rounding took off, which the next update adds again (Kahan summation, as Zamirai et al., arXiv 2010.06192,
section 4). It is written with torch alone: an audit must repeat it on any device and with any version of other libraries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lutetia.models.training.states.eight_bit import Packed, pack_float, pack_root, unpack, unpack_root

FIRST, SECOND, REST = "exp_avg", "exp_avg_sq", "rest"


class SlimAdamW(torch.optim.Optimizer):
    """AdamW over parameters in float32 or bfloat16. `state[p]` holds `step`, both moments and, for bfloat16, the `rest`.

    Args:
        params: what to train.
        betas: decays of the first and second moment.
        weight_decay: decoupled.
        packed: whether moments are kept as `Packed`.
    """

    def __init__(
        self, params: Iterable[Tensor], betas: tuple[float, float], weight_decay: float, packed: bool, lr: float = 1e-3
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})
        self._packed = packed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient, which it drops at once."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), group)
                    parameter.grad = None

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        steps = float(state.get("step", 0.0)) + 1
        first, second = self.moment(parameter, FIRST), self.moment(parameter, SECOND)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = second.sqrt().div_((1 - beta2**steps) ** 0.5).add_(group["eps"])
        values = self.values(parameter)
        values.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(first, root, value=-group["lr"] / (1 - beta1**steps))
        self.set_values(parameter, values)
        self.set_moment(parameter, FIRST, first)
        self.set_moment(parameter, SECOND, second)
        state["step"] = torch.tensor(steps)

    def moment(self, parameter: Tensor, kind: str) -> Tensor:
        """A moment in float32, zeros before the first step. Not a copy if it is kept in float32."""
        kept = self.state[parameter].get(kind)
        if kept is None:
            return torch.zeros_like(parameter, dtype=torch.float32)
        return kept if isinstance(kept, Tensor) else (unpack if kind == FIRST else unpack_root)(kept)

    def set_moment(self, parameter: Tensor, kind: str, value: Tensor) -> None:
        if not self._packed:
            self.state[parameter][kind] = value
            return
        packed, kept = (pack_float if kind == FIRST else pack_root)(value), self.state[parameter].get(kind)
        if isinstance(kept, Packed):  # in place, so that who holds the old ones sees them change
            kept.codes.copy_(packed.codes)
            kept.exponents.copy_(packed.exponents)
        else:
            self.state[parameter][kind] = packed

    def values(self, parameter: Tensor) -> Tensor:
        """The parameter's value in float32: itself, or the sum of its two parts."""
        if parameter.dtype == torch.float32:
            return parameter.detach()
        rest = self.state[parameter].get(REST)
        return parameter.detach().float() if rest is None else parameter.detach().float().add_(rest)

    def set_values(self, parameter: Tensor, values: Tensor) -> None:
        if parameter.dtype == torch.float32:
            if values.data_ptr() != parameter.data_ptr():
                parameter.detach().copy_(values)
            return
        rounded = values.to(parameter.dtype).float()
        values = rounded + (values - rounded).to(
            parameter.dtype
        )  # what a state file will hold: read from it, it gives the same parts
        parameter.detach().copy_(values)
        rest = (values - parameter.detach().float()).to(parameter.dtype)
        kept = self.state[parameter].get(REST)
        if kept is None:
            self.state[parameter][REST] = rest
        else:
            kept.copy_(rest)
