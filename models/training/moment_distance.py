"""How far apart two optimisers' moments are: relative distances in what the next steps make of them.

Norms of the moments themselves are ruled by their largest entries, while AdamW divides by them: whoever changes the small ones
changes most weights' next steps and hardly any norm. So what is compared are

    Adam's direction m / (sqrt(v) + eps), and |ln sqrt(v)| entry by entry, which sets the size of later steps
    Muon's orthogonalised momentum, and the momentum itself, which says how long an old direction lasts

Honest ways of computing one epoch differ in these by about as much as in its weights (docs/explanation/audits.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lutetia.models.training.moment_checks import FIRST, MUON, SECOND
from lutetia.models.training.muon import orthogonalise

_EPSILON = 1e-8  # torch's default, with which AdamW divides
_MOST = 3.0  # a factor of twenty counts like any larger one


@dataclass
class _Apart:
    """Adds up the distance of pairs of tensors, and the length of the first of each pair."""

    distance: float = 0.0
    length: float = 0.0

    def add(self, tensor: Tensor, other: Tensor) -> None:
        self.distance += torch.dist(tensor.double(), other.double()).item() ** 2
        self.length += torch.linalg.vector_norm(tensor, dtype=torch.float64).item() ** 2

    @property
    def relative(self) -> float:
        if self.length == 0:
            return 0.0 if self.distance == 0 else math.inf
        return math.sqrt(self.distance / self.length)


def moment_distance(
    moments: Mapping[str, Tensor], other: Callable[[str], Tensor | None], device: torch.device | None = None
) -> float:
    """The largest of the distances above; 1 where nothing of the moments is left, 0 where there are none.

    Args:
        moments: by the names of `Snapshot.moments`.
        other: the tensor of that name in the other state. None: it has none, which counts as zeros.
        device: where to orthogonalise, which takes minutes for large matrices on a CPU.
    """
    direction, momentum, orthogonal = _Apart(), _Apart(), _Apart()
    logarithms, entries = 0.0, 0

    def pair(name: str) -> tuple[Tensor, Tensor]:
        tensor, found = moments[name], other(name)
        return tensor, torch.zeros_like(tensor) if found is None else found

    for name in moments:
        if name.startswith(FIRST):
            m, other_m = pair(name)
            scale, other_scale = (v.sqrt().add_(_EPSILON) for v in pair(SECOND + name.removeprefix(FIRST)))
            direction.add(m / scale, other_m / other_scale)
            logarithms += (other_scale / scale).log_().abs_().clamp_(max=_MOST).sum(dtype=torch.float64).item()
            entries += m.numel()
        elif name.startswith(MUON):
            matrix, other_matrix = pair(name)
            momentum.add(matrix, other_matrix)
            orthogonal.add(*(orthogonalise(each[None].to(device)).cpu() for each in (matrix, other_matrix)))
    mean_logarithm = logarithms / entries if entries else 0.0
    return max(direction.relative, mean_logarithm, momentum.relative, orthogonal.relative)
