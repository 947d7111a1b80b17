"""Weights of a training loss by the time of its noise: min-SNR and those that flow matching uses."""

from __future__ import annotations

import torch
from torch import Tensor

from lutetia.models.experts.objectives import T_MIN, Predict, row_losses, schedule_of
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.loss_weighting import LossWeighting
from lutetia.protocol.schema.model.training_spec import Optimisation


def weighted_losses(
    optimisation: Optimisation,
    spec: ExpertSpec,
    predict: Predict,
    x0: Tensor,
    noise: Tensor,
    t: Tensor,
    given: Tensor | None = None,
) -> Tensor:
    """The loss of every row that the run trains and is judged by, `[B]`: `row_losses` times `loss_weights`."""
    losses = row_losses(spec, predict, x0, noise, t, given)
    return losses if optimisation.weighting is None else losses * loss_weights(optimisation.weighting, spec, t)


def loss_weights(weighting: LossWeighting, spec: ExpertSpec, t: Tensor) -> Tensor:
    """What the loss of `row_losses` is multiplied by, `[B]`.

    `min-snr` (Hang et al., arXiv 2303.09556, equation 7) weighs the error of x0 by min(SNR, gamma), with SNR = ((1-t)/t)^2 at
    flow time t. An expert's own error is turned into one of x0 first: times t^2 for a velocity on the straight path,
    t^2 / ((1-t)^2 + t^2) for one on a variance-preserving path, t^2 / (1-t)^2 for eps. `sigma-sqrt` (1 / t^2) and `cosmap`
    (2 / (pi (1 - 2t + 2t^2))) are those of Stable Diffusion 3 (Esser et al., arXiv 2403.03206) for velocities, as in diffusers.

    Args:
        weighting: of the run.
        spec: what the expert predicts, on which path.
        t: flow times, `[B]`.
    """
    floored = t.clamp_min(T_MIN)
    if weighting.kind == "sigma-sqrt":
        return floored**-2
    if weighting.kind == "cosmap":
        return 2 / (torch.pi * (1 - 2 * t + 2 * t**2))
    snr = ((1 - t) / floored) ** 2
    return snr.clamp_max(weighting.gamma) * _share_of_x0(spec, t, floored)


def _share_of_x0(spec: ExpertSpec, t: Tensor, floored: Tensor) -> Tensor:
    """The squared error of x0 over that which `row_losses` measures."""
    if spec.prediction == "epsilon":
        return (floored / (1 - t).clamp_min(T_MIN)) ** 2
    if spec.prediction == "velocity" and schedule_of(spec) != "linear":
        return t**2 / ((1 - t) ** 2 + t**2)
    return floored**2
