"""Training in float16: gradients of a scaled loss, so that small ones do not vanish.

Mixed Precision Training (Micikevicius et al., arXiv 1710.03740, section 3.2) multiplies the loss, and with it all gradients,
before the backward pass, and divides the gradients afterwards. Its usual form changes the factor over time and skips steps whose
gradients overflow, so a step would depend on what happened long before. Here every step begins with the same factor and is
computed again with a smaller one while a gradient overflows. No step is skipped and nothing has to be saved: a step stays a
function of the weights and its place in the run. Factors are powers of two, by which multiplication and division are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

FACTORS = (2.0**16, 2.0**11, 2.0**6, 2.0, 1.0)
"""Tried in this order, until no gradient overflows."""


def scaled_backward(backward: Callable[[float], Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """Compute gradients by `backward` with the largest factor under which all are finite, and divide them by it.

    Args:
        backward: adds the gradients of the loss times its argument to `parameters`, and returns the loss itself.
        parameters: whose gradients to scale back. They have none before.

    Returns:
        The loss. With the last factor, 1, gradients that still overflow are left as they are.
    """
    loss = torch.zeros(())
    for factor in FACTORS:
        loss = backward(factor)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if factor == FACTORS[-1] or not gradients or _all_finite(gradients):
            torch._foreach_div_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
            break
        for parameter in parameters:
            parameter.grad = None
    return loss


def _all_finite(gradients: Sequence[Tensor]) -> bool:
    """One number per tensor and one answer, so that an accelerator is waited for once."""
    norms = torch._foreach_norm(list(gradients), float("inf"))  # pyright: ignore[reportPrivateImportUsage]
    return bool(torch.isfinite(torch.stack(norms)).all())
