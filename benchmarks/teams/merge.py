"""How the results of lanes become one state: means, and an outer step of Nesterov's method on the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
PARTS = ("parameters", "moments", "averages")


@dataclass(frozen=True)
class State:
    """What a node trains on from: parameters, moments of the optimiser, and moving averages of the parameters, by name."""

    parameters: Tensors
    moments: Tensors
    averages: Tensors


@dataclass(frozen=True)
class OuterStep:
    """An outer step on the parameters, with the change of a round as its gradient (DiLoCo, arXiv 2311.08105, algorithm 1).

    Attributes:
        rate: outer learning rate.
        momentum: of Nesterov's method. With rate 1 and momentum 0 the step is the mean of the lanes.
    """

    rate: float = 1.0
    momentum: float = 0.0

    def apply(self, parent: Tensors, mean: Tensors, velocity: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The new parameters, and the new velocity.

        Args:
            parent: parameters that the lanes started from.
            mean: mean of the lanes' parameters.
            velocity: of the step before; empty in the first round.
        """
        moved, velocities = dict[str, Tensor](), dict[str, Tensor]()
        for name, start in parent.items():
            gradient = start - mean[name]
            velocities[name] = self.momentum * velocity[name] + gradient if name in velocity else gradient
            moved[name] = start - self.rate * (gradient + self.momentum * velocities[name])
        return moved, velocities


def mean_state(states: Sequence[State], samples: Sequence[float]) -> State:
    """The mean of the states of lanes, weighted by the samples that each trained."""
    return State(*(mean_tensors([getattr(state, part) for state in states], samples) for part in PARTS))


def packed(state: State) -> dict[str, Tensor]:
    """The tensors of a state under one name each, for a file."""
    return {f"{part}:{name}": tensor for part in PARTS for name, tensor in getattr(state, part).items()}


def unpacked(tensors: Tensors) -> State:
    """The state that `packed` gave the tensors of."""
    split = ((name.partition(":"), tensor) for name, tensor in tensors.items())
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for (part, _, name), tensor in split:
        parts[part][name] = tensor
    return State(**parts)


def mean_tensors(parts: Sequence[Tensors], samples: Sequence[float]) -> dict[str, Tensor]:
    """The mean of tensors by name, weighted by samples; the arithmetic is that of `lutetia.models.training.lanes.merge`."""
    means = dict[str, Tensor]()
    for name, first in parts[0].items():
        value = torch.zeros_like(first, dtype=torch.float64)
        for part, count in zip(parts, samples, strict=True):
            value += part[name].double() * count
        means[name] = (value / sum(samples)).to(first.dtype)
    return means
