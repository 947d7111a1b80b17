"""Solvers: what turns the mixture's velocity into the next latents, with the times at which they ask for it.

`EulerSolver` is the default. `SchedulerSolver` drives a diffusers scheduler as its own pipeline does. A scheduler may work on
another noise path than the mixture's straight one (CogVideoX, DDIM); the state is then on that path, and converted at each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from lutetia.models.experts.beta_table import betas_of, is_flow, table_flow_time
from lutetia.models.experts.classes.family import TIMESTEPS
from lutetia.models.experts.objectives import Prediction, from_velocity

PREDICTIONS: dict[str, Prediction] = {"v_prediction": "velocity", "epsilon": "epsilon", "sample": "sample"}
"""diffusers' name of a prediction: ours."""
_MOCHI_NOISE = 0.025


class Solver(Protocol):
    """Turns noise into latents in steps."""

    times: Tensor
    """Flow time of every step, [steps], float32."""

    def latents(self, step: int, state: Tensor) -> Tensor:
        """The latents [N, C, F, H, W] on the straight path that the experts are asked about."""
        ...

    def advance(self, step: int, state: Tensor, flow: Tensor) -> Tensor:
        """The state after the step, from the velocity at `latents`."""
        ...


class EulerSolver:
    """Euler steps between `times [steps + 1]`, falling from 1 (noise) to 0 (data)."""

    def __init__(self, times: Tensor) -> None:
        self.times, self._points = times[:-1], times.tolist()

    def latents(self, step: int, state: Tensor) -> Tensor:
        return state

    def advance(self, step: int, state: Tensor, flow: Tensor) -> Tensor:
        return state + (self._points[step + 1] - self._points[step]) * flow


class SchedulerSolver:
    """Steps of a diffusers scheduler.

    Args:
        scheduler: of a class in `SchedulerSpec`.
        steps: how many.
        positions: positions of a latent, frames times height times width, on which the shift of some schedulers depends.
        grid: as in `SchedulerSpec`.
        generators: one for all clips, or one per clip, for schedulers that add noise.
    """

    def __init__(
        self, scheduler: Any, steps: int, positions: int, grid: str = "own", generators: Sequence[torch.Generator] | None = None
    ) -> None:
        self._scheduler = scheduler
        self._generators = generators[0] if generators and len(generators) == 1 else generators
        _set_timesteps(scheduler, steps, positions, grid)
        config = scheduler.config
        self._sde = type(scheduler).__name__ == "CogVideoXDPMScheduler"
        self._previous: Tensor | None = None
        self._flow = is_flow(type(scheduler).__name__, config)
        self._sign = -1.0 if config.get("invert_sigmas") else 1.0
        timesteps = scheduler.timesteps.float().cpu()
        if self._flow:
            self.times = timesteps / TIMESTEPS if self._sign > 0 else 1 - timesteps / TIMESTEPS
        else:
            self._betas = betas_of(config)
            self._prediction: Prediction = PREDICTIONS[config.get("prediction_type", "epsilon")]
            self.times = table_flow_time(self._betas, timesteps)

    def latents(self, step: int, state: Tensor) -> Tensor:
        if self._flow:
            return state
        t = self.times[step].item()
        return state * (t**2 + (1 - t) ** 2) ** 0.5

    def advance(self, step: int, state: Tensor, flow: Tensor) -> Tensor:
        t = self._scheduler.timesteps[step]
        if self._flow:
            return self._scheduler.step(self._sign * flow, t, state, return_dict=False)[0]
        time = self.times[step].to(state.device).expand(len(state))
        answer = from_velocity(self._prediction, self._betas, flow, self.latents(step, state), time)
        if not self._sde:
            return self._scheduler.step(answer, t, state, return_dict=False)[0]
        earlier = self._scheduler.timesteps[step - 1] if step else None
        frames_first = self._scheduler.step(  # noise is drawn in the layout of CogVideoX, frames before channels
            answer.transpose(1, 2), self._previous, t, earlier, state.transpose(1, 2), generator=self._generators,
            return_dict=False,
        )  # fmt: skip
        self._previous = cast(Tensor, frames_first[1])
        return frames_first[0].transpose(1, 2)


def _set_timesteps(scheduler: Any, steps: int, positions: int, grid: str) -> None:
    options: dict[str, Any] = {}
    if scheduler.config.get("use_dynamic_shifting"):
        options["mu"] = dynamic_shift(scheduler.config, positions)
    if grid == "own":
        scheduler.set_timesteps(steps, device="cpu", **options)
    else:
        levels = linear_quadratic(steps) if grid == "linear-quadratic" else np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=levels, device="cpu", **options)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)


def dynamic_shift(config: Any, positions: int) -> float:
    """The logarithm of the shift for a latent of so many positions, as LTX computes it (`calculate_shift` of diffusers)."""
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return low + (high - low) * (positions - first) / (last - first)


def linear_quadratic(steps: int) -> np.ndarray:
    """Mochi's noise levels: half of the steps for the first fortieth of the way, then ever longer ones."""
    half = steps // 2
    if half == 0:
        return np.ones(steps)
    rest = half - _MOCHI_NOISE * steps
    bend = rest / (half * (steps - half) ** 2)
    slope = _MOCHI_NOISE / half - 2 * rest / (steps - half) ** 2
    i = np.arange(steps)
    return 1 - np.where(i < half, i * _MOCHI_NOISE / half, bend * i**2 + slope * i + bend * half**2)
