"""Sampling: steps along the flow from noise to data, with classifier-free guidance and one routing decision per step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lutetia.models.experts.objectives import shift_time, with_first_frame
from lutetia.models.experts.pictures import Pictures
from lutetia.models.mixing.stock.solvers import EulerSolver, Solver
from lutetia.models.mixture import MixtureTransformer, Mode, combine, noised_first_frame
from lutetia.models.randomness import normals, seed_of, stream
from lutetia.system.errors import UsageError


@dataclass(frozen=True)
class SamplingState:
    """What one step turns into the next: the latents of N clips, and the texts of the two branches of guidance."""

    latents: Tensor
    """[N, C, F, H, W]"""
    tokens: Tensor
    """[N, L, D]: the prompts' token vectors."""
    pooled: Tensor
    """[N, P]: the prompts' pooled vectors. The router reads these for both branches."""
    negative_tokens: Tensor
    """[N, L, D]: the text that guidance leads away from; zeros for the null condition."""
    negative_pooled: Tensor
    """[N, P]"""


StepDone = Callable[[int, SamplingState], SamplingState | None]
"""(step, from 0; state after it) -> the state to continue from, or None to stop here."""


@dataclass(frozen=True)
class SampledLatents:
    """`latents [N, C, F, H, W]`, and the experts' weights at every step that was taken, `routing [steps, N, K]`.

    The weights are 0 in steps that a model of the other part of the noise levels made.
    """

    latents: Tensor
    routing: Tensor


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """`steps + 1` times from 1 (noise) to 0 (data), as FlowMatchEuler's sigmas; a `shift` above 1 adds steps at high noise."""
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def initial_noise(shape: tuple[int, ...], seeds: Sequence[int]) -> Tensor:
    """Standard normals `[len(seeds), *shape]`. A seed gives the same noise in any batch and on any device."""
    return torch.stack([normals(stream("sample", 0, 0, seed, "noise"), shape) for seed in seeds])


def solver_noise(seeds: Sequence[int], generator: torch.Generator | Sequence[torch.Generator] | None) -> list[torch.Generator]:
    """Generators for a solver that adds noise: those of the caller, else one per clip, of which each seed gives its own noise."""
    if generator is None:
        return [torch.Generator().manual_seed(seed_of("sample", 0, f"solver {seed}")) for seed in seeds]
    return [generator] if isinstance(generator, torch.Generator) else list(generator)


@torch.no_grad()
def sample(
    mixture: MixtureTransformer,
    tokens: Tensor,
    pooled: Tensor,
    noise: Tensor,
    *,
    times: Tensor | Solver,
    guidance: float = 1.0,
    negative: tuple[Tensor, Tensor] | None = None,
    mode: Mode | None = None,
    expert: int | None = None,
    seeds: Sequence[int] | None = None,
    on_step: StepDone | None = None,
    first_frame: Tensor | None = None,
    other: MixtureTransformer | None = None,
    pictures: Pictures | None = None,
) -> SampledLatents:
    """Integrate the flow from `noise` to data.

    The velocity of a step is `v(negative) + guidance (v(text) - v(negative))`; both branches use the same experts and weights.
    Experts and router run in the dtype of `tokens`; the path itself is kept in the dtype of `noise`.

    Args:
        tokens: the prompts' token vectors, [N, L, D].
        pooled: the prompts' pooled vectors, [N, P].
        noise: the starting latents, [N, C, F, H, W].
        times: a solver, or the flow times of Euler steps, falling from 1 (noise) to 0 (data), [steps + 1].
        guidance: strength of the prompt; 1 asks the experts once per step, without the negative branch.
        negative: token and pooled vectors that guidance leads away from. None: the null condition, zeros.
        mode: how experts are chosen. None: the mixture's own mode.
        expert: ask this expert alone, without the router.
        seeds: one per clip, for `sticky`.
        on_step: called after every step; may replace the state or stop the sampling.
        first_frame: latents of the clips' first frame, which the experts continue, [N, C, 1, H, W].
        other: what is asked at the noise levels that experts for a part of them do not have. Its weights are not returned.
        pictures: of each clip, for experts that take them in channels of their own.

    Raises UsageError without `other` for experts for a part of the noise levels.
    """
    if (mixture.noise_part is None) != (other is None):
        raise UsageError("experts for a part of the noise levels make clips only together with a model of the other part")
    null_tokens, null_pooled = negative or (torch.zeros_like(tokens), torch.zeros_like(pooled))
    state = SamplingState(noise, tokens, pooled, null_tokens, null_pooled)
    for each in (mixture, other) if other else (mixture,):
        each.begin()
    routing, before = [], mixture
    solver = EulerSolver(times) if isinstance(times, Tensor) else times
    for step, now in enumerate(solver.times.tolist()):
        x = solver.latents(step, state.latents)
        t = torch.full((len(x),), now, device=x.device)
        seen = x
        if first_frame is not None:
            x = with_first_frame(x, first_frame)
            seen = noised_first_frame(x, t)
        asked = other if other and mixture.noise_part and not mixture.noise_part.holds(now) else mixture
        if asked is not before and before.experts_in_memory is not None:
            before.free_experts()
        before = asked
        only = expert if asked.count == mixture.count else None
        weights = _decide(asked, seen.to(state.tokens.dtype), t, state.pooled, mode, only, seeds)
        flow = _guided_velocity(asked, replace(state, latents=x), t, weights, guidance, pictures)
        state = replace(state, latents=solver.advance(step, state.latents, flow))
        routing.append(weights.float().cpu() if asked is mixture else torch.zeros(len(x), mixture.count))
        changed = on_step(step, state) if on_step else state
        if changed is None:
            break
        state = changed
    latents = state.latents if first_frame is None else with_first_frame(state.latents, first_frame)
    return SampledLatents(latents, torch.stack(routing))


def _guided_velocity(
    mixture: MixtureTransformer,
    state: SamplingState,
    t: Tensor,
    weights: Tensor,
    guidance: float,
    pictures: Pictures | None,
) -> Tensor:
    """The velocity under guidance; both branches go through each expert as one batch."""
    x = state.latents
    if guidance == 1:
        return combine(mixture.expert, weights, x, t, state.tokens, state.pooled, pictures)
    both = combine(
        mixture.expert,
        torch.cat([weights, weights]),
        torch.cat([x, x]),
        torch.cat([t, t]),
        torch.cat([state.tokens, state.negative_tokens]),
        torch.cat([state.pooled, state.negative_pooled]),
        pictures.each(lambda tensor: torch.cat([tensor, tensor])) if pictures else None,
    )
    given, negative = both.chunk(2)
    return torch.lerp(negative, given, guidance)


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
