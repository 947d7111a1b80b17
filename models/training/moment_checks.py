"""Checks, tensor by tensor, that optimiser moments can come from training: bounds from Adam's and Muon's definitions.

With gradients g clipped to norm c, first moments m = (1-b1) sum b1^k g and second moments v = (1-b2) sum b2^k g^2:

    v >= 0, and sum v <= c^2               a mean of squares
    |m|_2 <= c                             a mean of clipped gradients (Muon's momentum too)
    m^2 <= C v elementwise                 Cauchy-Schwarz, C = (1-b1)^2 / ((1-b2)(1 - b1^2/b2)), where b1^2 < b2

The last one bounds the damage that poisoned moments do to a trainer that resumes from them: a step moves no weight by more than
sqrt(C) times the learning rate.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open

from lutetia.models.training.checkpoint_checks import CheckpointMisfit
from lutetia.protocol.schema.manifest import Optimisation

_SLACK = 1.02  # rounding
_TINY = 1e-8  # below Adam's epsilon nothing moves
FIRST, SECOND, MUON = "adamw.exp_avg.", "adamw.exp_avg_sq.", "muon.momentum_buffer."


def moment_ratio(optimisation: Optimisation) -> float:
    """C above; infinite if b1^2 >= b2."""
    b1, b2 = optimisation.beta1, optimisation.beta2
    if b1 * b1 >= b2:
        return math.inf
    return (1 - b1) ** 2 / ((1 - b2) * (1 - b1 * b1 / b2))


def check_moments(path: Path, optimisation: Optimisation) -> None:
    """Raises CheckpointMisfit unless the moments of a checked state file can come from training."""
    norms = {FIRST: 0.0, SECOND: 0.0, MUON: 0.0}
    ratio = moment_ratio(optimisation)
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        first, second = ({name.removeprefix(kind) for name in names if name.startswith(kind)} for kind in (FIRST, SECOND))
        if first != second:
            name = min(first ^ second)
            raise CheckpointMisfit("missing", f"{path.name} has one of Adam's two moments of {name} without the other; refused")
        for name in sorted(first):
            m, v = file.get_tensor(FIRST + name), file.get_tensor(SECOND + name)
            if bool((v < 0).any()):
                raise CheckpointMisfit("norm", f"the second moment of {name} in {path.name} has negative entries; refused")
            if bool((m.abs() > v.mul(ratio).sqrt().mul_(_SLACK).add_(_TINY)).any()):
                text = f"the moments of {name} in {path.name} contradict each other: no gradients give both; refused"
                raise CheckpointMisfit("norm", text)
            norms[FIRST] += torch.linalg.vector_norm(m, dtype=torch.float64).item() ** 2
            norms[SECOND] += v.sum(dtype=torch.float64).item()
        for name in (name for name in names if name.startswith(MUON)):
            norms[MUON] += torch.linalg.vector_norm(file.get_tensor(name), dtype=torch.float64).item() ** 2
    if not any(norms.values()):
        raise CheckpointMisfit(
            "missing", f"{path.name} holds no moments of the optimiser, although every step makes some; refused"
        )
    most = optimisation.gradient_clip
    for kind, squared in norms.items():
        if math.sqrt(squared) > most * _SLACK:
            what = {FIRST: "first moments", SECOND: "second moments' roots", MUON: "momenta"}[kind]
            text = f"the {what} in {path.name} have norm {math.sqrt(squared):.3g}; clipped gradients give at most {most:g}"
            raise CheckpointMisfit("norm", f"{text}; refused")
