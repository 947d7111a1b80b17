"""Sampling: Euler steps along the flow from noise to data, with classifier-free guidance and one routing decision per step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lutetia.models.experts.objectives import shift_time
from lutetia.models.mixture import MixtureTransformer, Mode, combine
from lutetia.models.randomness import normals, stream

StepDone = Callable[[int, int], None]


@dataclass(frozen=True)
class SampledLatents:
    """`latents [N, C, F, H, W]` and the experts' weights of every step, `routing [steps, N, K]`."""

    latents: Tensor
    routing: Tensor


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """`steps + 1` times from 1 (noise) to 0 (data), as FlowMatchEuler's sigmas; a `shift` above 1 looks longer at high noise."""
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def initial_noise(shape: tuple[int, ...], seeds: Sequence[int]) -> Tensor:
    """`[len(seeds), *shape]` standard normals: a seed gives the same noise in whatever batch and on whatever device."""
    return torch.stack([normals(stream("sample", 0, 0, seed, "noise"), shape) for seed in seeds])


@torch.no_grad()
def sample(
    mixture: MixtureTransformer,
    tokens: Tensor,
    pooled: Tensor,
    noise: Tensor,
    *,
    times: Tensor,
    guidance: float = 1.0,
    mode: Mode | None = None,
    expert: int | None = None,
    seeds: Sequence[int] | None = None,
    on_step: StepDone | None = None,
) -> SampledLatents:
    """Integrate the flow from `noise [N, C, F, H, W]` at `times[0]` to `times[-1]` for texts `tokens [N, L, D]`, `pooled [N, P]`.

    `v = v(null) + guidance (v(text) - v(null))`, both branches with the same experts and weights. `expert` asks that one alone.
    Experts and router run in the dtype of `tokens`; the path itself is kept in the dtype of `noise`.
    """
    mixture.begin()
    x, routing = noise, []
    for step, (now, then) in enumerate(zip(times[:-1].tolist(), times[1:].tolist(), strict=True)):
        t = torch.full((len(x),), now, device=x.device)
        weights = _decide(mixture, x.to(tokens.dtype), t, pooled, mode, expert, seeds)
        x = x + (then - now) * guided_velocity(mixture, x, t, tokens, pooled, weights, guidance)
        routing.append(weights.float().cpu())
        if on_step:
            on_step(step + 1, len(times) - 1)
    return SampledLatents(x, torch.stack(routing))


def guided_velocity(
    mixture: MixtureTransformer, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor, weights: Tensor, guidance: float
) -> Tensor:
    """The velocity under guidance; both branches go through each expert as one batch."""
    if guidance == 1:
        return combine(mixture.expert, weights, x, t, tokens, pooled)
    both = combine(
        mixture.expert,
        torch.cat([weights, weights]),
        torch.cat([x, x]),
        torch.cat([t, t]),
        torch.cat([tokens, torch.zeros_like(tokens)]),
        torch.cat([pooled, torch.zeros_like(pooled)]),
    )
    given, null = both.chunk(2)
    return torch.lerp(null, given, guidance)


def _decide(
    mixture: MixtureTransformer,
    x: Tensor,
    t: Tensor,
    pooled: Tensor,
    mode: Mode | None,
    expert: int | None,
    seeds: Sequence[int] | None,
) -> Tensor:
    if expert is None:
        return mixture.route(x, t, pooled, mode, seeds)
    weights = x.new_zeros(len(x), mixture.count)
    weights[:, expert] = 1
    return weights
