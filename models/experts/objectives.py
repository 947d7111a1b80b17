"""Objectives: what experts predict, their training loss, and the conversion of every prediction to the velocity of the flow.

Flow time t runs from data (0) to noise (1) on the straight path `x_t = (1-t) x0 + t eps` with velocity `u = eps - x0`. An expert
may be trained on another path, `z_s = A(s) x0 + B(s) eps`, and predict velocity, x0 (`sample`) or eps. At equal signal-to-noise
ratio both paths show the same picture up to scale, so no expert has to be retrained: choose s with A/B = (1-t)/t, give the expert
`z = c x_t` with c = A/(1-t) = B/t, and convert its answer to u (heterogeneous DDM, arXiv 2603.06741; conversion rederived).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lutetia.models.experts.beta_table import table_flow_time, table_time
from lutetia.models.experts.classes.family import TIMESTEPS
from lutetia.protocol.schema.model.expert_spec import ExpertSpec
from lutetia.protocol.schema.model.pipeline_spec import BetaSchedule, NoisePart
from lutetia.protocol.schema.model.training_spec import TimeSampling

Prediction = Literal["velocity", "sample", "epsilon"]
Schedule = Literal["linear", "vp_cosine"] | BetaSchedule
Predict = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents [B, ...] on the expert's own path, its own time s [B] in [0, 1]) -> raw prediction like the latents."""

T_MIN = 0.05  # floor of t where x0 is turned into a velocity ("Back to Basics", arXiv 2511.13720)
ALPHA_MIN = 0.01  # floor of 1-t where eps is turned into x0 (heterogeneous DDM)
X0_LIMIT = 20.0  # and the clamp on that x0; latents have unit variance


def schedule_of(spec: Any) -> Schedule:
    """The noise path of an expert: its table of betas, or its named schedule. Takes an ExpertSpec or a mixture's ExpertEntry."""
    return spec.betas or spec.noise_schedule


def matched(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """The expert's own time s at the signal-to-noise ratio of flow time t, and the scale c of its input `z = c x_t`; both [B]."""
    if schedule == "linear":
        return t, torch.ones_like(t)
    if isinstance(schedule, BetaSchedule):
        return table_time(schedule, t), 1 / torch.hypot(1 - t, t)
    return torch.atan2(t, 1 - t) * (2 / math.pi), 1 / torch.hypot(1 - t, t)  # A = cos(pi s/2), B = sin(pi s/2)


def flow_time(schedule: Schedule, s: Tensor) -> Tensor:
    """The flow time `[B]` at an expert's own time `s [B]` in [0, 1]: the inverse of `matched`."""
    if schedule == "linear":
        return s
    if isinstance(schedule, BetaSchedule):
        return table_flow_time(schedule, s * TIMESTEPS)
    return torch.sin(s * (math.pi / 2)) / (torch.sin(s * (math.pi / 2)) + torch.cos(s * (math.pi / 2)))


def from_velocity(prediction: Prediction, schedule: Schedule, flow: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """What an expert would have answered, `[B, ...]`, where the flow's velocity is `flow`: the inverse of `to_velocity`."""
    t = _columns(t, x_t)
    x0, noise = x_t - t * flow, x_t + (1 - t) * flow
    if prediction == "sample":
        return x0
    if prediction == "epsilon":
        return noise
    if schedule == "linear":
        return flow
    scale = 1 / torch.hypot(1 - t, t)
    return scale * ((1 - t) * noise - t * x0)


def to_velocity(prediction: Prediction, schedule: Schedule, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The flow's velocity, `[B, ...]`, from an expert's raw answer.

    Args:
        prediction: what the expert predicts.
        schedule: the expert's path.
        out: its answer to `(c x_t, s)`, `[B, ...]`.
        x_t: noisy latents on the straight path, `[B, ...]`.
        t: flow time, `[B]`.
    """
    t = _columns(t, x_t)
    if prediction == "sample":
        return (x_t - out) / t.clamp_min(T_MIN)
    if prediction == "epsilon":
        x0 = ((x_t - t * out) / (1 - t).clamp_min(ALPHA_MIN)).clamp(-X0_LIMIT, X0_LIMIT)
        return out - x0
    if schedule == "linear":
        return out
    scale = 1 / torch.hypot(1 - t, t)
    a, b, z = scale * (1 - t), scale * t, scale * x_t
    return (b * z + a * out) - (a * z - b * out)  # out = A eps - B x0 and A^2 + B^2 = 1 (Salimans and Ho 2022)


def velocity(prediction: Prediction, schedule: Schedule, predict: Predict, x_t: Tensor, t: Tensor) -> Tensor:
    """The flow's velocity at `x_t [B, ...]`, `t [B]`, asked of an expert of any kind. Keeps the dtype of `x_t`.

    The conversion runs at least in single precision, because it subtracts nearly equal numbers.
    """
    exact = torch.promote_types(x_t.dtype, torch.float32)
    wide, time = x_t.to(exact), t.to(exact)
    s, scale = matched(schedule, time)
    z = wide if schedule == "linear" else wide * _columns(scale, wide)
    return to_velocity(prediction, schedule, predict(z, s).to(exact), wide, time).to(x_t.dtype)


def row_losses(spec: ExpertSpec, predict: Predict, x0: Tensor, noise: Tensor, t: Tensor, given: Tensor | None = None) -> Tensor:
    """The training loss of every row, `[B]`: the squared error's mean over the row's elements.

    `velocity`: error of the velocity on the expert's own path. `epsilon`: error of eps. `sample`: error of the velocity that x0
    implies, `(x_t - x0) / max(t, T_MIN)`; target and prediction use the same floor, so that the minimiser is E[x0 | x_t] at
    every t.

    Args:
        spec: prediction and noise schedule.
        predict: the expert.
        x0: clean latents, `[B, ...]`.
        noise: standard normals, `[B, ...]`.
        t: flow times, `[B]`.
        given: rows whose first latent frame is clean and not part of the loss, as Wan 2.2 TI2V is trained, bool `[B]`. They have
            more than one frame, and the schedule is linear. None: no row.
    """
    schedule = schedule_of(spec)
    s, scale = matched(schedule, t)
    time, scale = _columns(t, x0), _columns(scale, x0)
    x_t = torch.lerp(x0, noise, time)
    if schedule != "linear":
        x_t = scale * x_t
    if given is not None:
        x_t = with_first_frame(x_t, x0[:, :, :1], given)
    out = predict(x_t, s).to(x0.dtype)
    if spec.prediction == "sample":
        error = (out - x0) / time.clamp_min(T_MIN)
    elif spec.prediction == "epsilon":
        error = out - noise
    elif schedule == "linear":
        error = out - (noise - x0)
    else:
        error = out - scale * ((1 - time) * noise - time * x0)
    if given is None:
        return error.square().flatten(1).mean(1)
    frames = error.shape[2]
    counted = with_first_frame(error, torch.zeros_like(error[:, :, :1]), given)
    return counted.square().flatten(1).mean(1) * (frames / (frames - given.to(error.dtype)))


def with_first_frame(latents: Tensor, frame: Tensor, given: Tensor | None = None) -> Tensor:
    """The latents `[B, C, F, H, W]` with the first frames `[B, C, 1, H, W]` in the rows that are `given [B]`; None: in all."""
    if given is not None:
        frame = torch.where(given.view(-1, 1, 1, 1, 1), frame, latents[:, :, :1])
    return torch.cat([frame, latents[:, :, 1:]], dim=2)


def times(sampling: TimeSampling, uniforms: Tensor, part: NoisePart | None = None) -> Tensor:
    """Flow times [B] of the run's distribution from uniforms [B] in (0, 1): a logit-normal, then the resolution shift.

    With a part of the noise levels these are the times of that distribution that lie in it.
    """
    if part is None:
        return _times(sampling, uniforms)
    low, high = (_share_below(sampling, bound) for bound in part.span)
    return _times(sampling, low + (high - low) * uniforms.double()).clamp(*part.span)


def _times(sampling: TimeSampling, uniforms: Tensor) -> Tensor:
    normal = torch.special.ndtri(uniforms.double().clamp(1e-6, 1 - 1e-6))
    s = torch.sigmoid(sampling.mean + sampling.std * normal)
    return shift_time(s, sampling.shift).float()


def _share_below(sampling: TimeSampling, t: float) -> Tensor:
    """The share of the run's flow times below t: the inverse of `_times`."""
    s = torch.tensor(t / (sampling.shift - (sampling.shift - 1) * t), dtype=torch.float64)
    return torch.special.ndtr((torch.logit(s) - sampling.mean) / sampling.std)


def shift_time(s: Tensor, shift: float) -> Tensor:
    """`shift s / (1 + (shift-1) s)`: keeps the signal-to-noise ratio when clips have more pixels (SD3, Open-Sora 2.0)."""
    return shift * s / (1 + (shift - 1) * s)


def _columns(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1))
