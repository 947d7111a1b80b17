"""Noise paths that a table of betas gives, as DDPM and CogVideoX have them: A(k) = sqrt(alpha_k), B(k) = sqrt(1 - alpha_k)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from torch import Tensor

from lutetia.models.experts.classes.family import TIMESTEPS
from lutetia.protocol.schema.canonical import canonical
from lutetia.protocol.schema.model.pipeline_spec import BetaSchedule
from lutetia.system.errors import ConfigError


def is_flow(class_name: str, config: Mapping[str, Any]) -> bool:
    """Whether a diffusers scheduler of this class and configuration samples by flow matching."""
    straight = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return class_name.startswith("FlowMatch") or bool(straight)


def betas_of(config: Mapping[str, Any]) -> BetaSchedule:
    """The table of a diffusers scheduler's configuration. Raises ConfigError for one that is not described by two betas."""
    kind = config.get("beta_schedule") or "linear"
    if config.get("trained_betas") is not None or kind not in ("linear", "scaled_linear"):
        raise ConfigError(f"the noise schedule {kind!r} of the scheduler is not supported; use linear or scaled_linear")
    return BetaSchedule(
        start=config.get("beta_start", 0.0001), end=config.get("beta_end", 0.02), kind=kind,
        steps=config.get("num_train_timesteps", 1000), snr_shift=config.get("snr_shift_scale") or 1.0,
        zero_snr=bool(config.get("rescale_betas_zero_snr")),
    )  # fmt: skip


def flow_times(betas: BetaSchedule) -> Tensor:
    """The flow time of each training timestep: that of equal signal-to-noise ratio, B / (A + B); float64, rising, `[steps]`."""
    return _flow_times(canonical(betas))


@lru_cache(maxsize=16)
def _flow_times(document: bytes) -> Tensor:
    betas = BetaSchedule.model_validate_json(document)
    alphas = CogVideoXDDIMScheduler(
        num_train_timesteps=betas.steps, beta_start=betas.start, beta_end=betas.end, beta_schedule=betas.kind,
        snr_shift_scale=betas.snr_shift, rescale_betas_zero_snr=betas.zero_snr,
    ).alphas_cumprod.double()  # fmt: skip
    signal, noise = alphas.sqrt(), (1 - alphas).sqrt()
    return noise / (signal + noise)


def table_time(betas: BetaSchedule, t: Tensor) -> Tensor:
    """The expert's own time `[B]` at flow time `t [B]`: the timestep, between two of the table where t is, over 1000."""
    table = flow_times(betas).to(t.device)
    exact = t.double().clamp(table[0], table[-1])
    above = torch.searchsorted(table, exact).clamp(1, len(table) - 1)
    share = (exact - table[above - 1]) / (table[above] - table[above - 1])
    return ((above - 1 + share) / TIMESTEPS).to(t.dtype)


def table_flow_time(betas: BetaSchedule, timestep: Tensor) -> Tensor:
    """The flow time `[B]`, float32, of a timestep `[B]` of the table, which may lie between two: inverse of `table_time`."""
    table = flow_times(betas).to(timestep.device)
    exact = timestep.double().clamp(0, len(table) - 1)
    below = exact.long().clamp(max=len(table) - 2)
    return torch.lerp(table[below], table[below + 1], exact - below).float()
