"""Checks, tensor by tensor, that optimiser moments can come from training: bounds from Adam's and Muon's definitions.

With gradients g clipped to norm c, first moments m = (1-b1) sum b1^k g and second moments v = (1-b2) sum b2^k g^2:

    v >= 0, and sum v <= c^2               a mean of squares
    |m|_2 <= c                             a mean of clipped gradients (Muon's momentum too)
    m^2 <= C v elementwise                 Cauchy-Schwarz, C = (1-b1)^2 / ((1-b2)(1 - b1^2/b2)), where b1^2 < b2

The last one bounds the damage that poisoned moments do to a trainer that resumes from them: a step moves no weight by more than
sqrt(C) times the learning rate. It also bounds how far a weight can be from its average of decay d, whatever was trained:

    |w - average| <= d / (1 - d) times the largest step
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from lutetia.models.tensor_files import TensorFile
from lutetia.models.training.checkpoint_checks import CheckpointMisfit
from lutetia.models.training.optimisers import MUON_RATE
from lutetia.models.training.states.compact import open_state
from lutetia.protocol.schema.manifest import CheckpointForm
from lutetia.protocol.schema.model.training_spec import Optimisation

_SLACK = 1.02  # rounding
_COMPACT_SLACK = 1.1  # rounding of roots and momenta to 8 bits
_TINY = 1e-8  # below Adam's epsilon nothing moves
FIRST, SECOND, MUON = "adamw.exp_avg.", "adamw.exp_avg_sq.", "muon.momentum_buffer."


def moment_ratio(optimisation: Optimisation) -> float:
    """C above; infinite if b1^2 >= b2."""
    b1, b2 = optimisation.beta1, optimisation.beta2
    if b1 * b1 >= b2:
        return math.inf
    return (1 - b1) ** 2 / ((1 - b2) * (1 - b1 * b1 / b2))


def largest_lag(optimisation: Optimisation, shape: Sequence[int], muon: bool) -> float:
    """How far an entry of a weight of this shape can be from its average, if weight decay is left out. Twice the bound above.

    A step of AdamW is at most sqrt(C) times the rate, or (1-b1) / sqrt(1-b2) times if its moments have just begun; one of Muon
    MUON_RATE sqrt(rows / columns) times, as singular values of its direction end below 1.3.
    """
    b1, b2 = optimisation.beta1, optimisation.beta2
    step = MUON_RATE * 1.3 * math.sqrt(max(1.0, shape[0] / shape[1])) if muon else math.sqrt(moment_ratio(optimisation))
    step = max(step, (1 - b1) / math.sqrt(1 - b2))
    decay = optimisation.ema_decay
    return 2 * optimisation.learning_rate * step * decay / (1 - decay)


def check_lag(path: Path, weights: Path, optimisation: Optimisation, form: CheckpointForm = "float32") -> None:
    """Raises CheckpointMisfit where a raw parameter of a checked state is farther from its average than steps can bring it."""
    with open_state(path, weights, form) as state, TensorFile(weights) as averages:
        names = set(state)
        for name in sorted(name.removeprefix("param.") for name in names if name.startswith("param.")):
            raw, average = state[f"param.{name}"].float(), averages[name].float()
            decay = optimisation.learning_rate * optimisation.weight_decay / (1 - optimisation.ema_decay)
            most = largest_lag(optimisation, raw.shape, MUON + name in names) + (0.01 + decay) * average.abs()
            if bool(((raw - average).abs() > most).any()):
                text = f"{name} in {path.name} is farther from its average than the run's learning rate can bring it; refused"
                raise CheckpointMisfit("norm", text)


def check_moments(path: Path, optimisation: Optimisation, form: CheckpointForm = "float32", weights: Path | None = None) -> None:
    """Raises CheckpointMisfit unless the moments of a checked state file can come from training.

    A compact state has no first moments: they are zeros, which contradict nothing. `weights`: the file that it belongs to.
    """
    norms = {FIRST: 0.0, SECOND: 0.0, MUON: 0.0}
    ratio = moment_ratio(optimisation)
    slack = _SLACK if form == "float32" else _COMPACT_SLACK
    with open_state(path, weights, form) as file:
        names = list(file)
        first, second = ({name.removeprefix(kind) for name in names if name.startswith(kind)} for kind in (FIRST, SECOND))
        if first != second and form == "float32":
            name = min(first ^ second)
            raise CheckpointMisfit("missing", f"{path.name} has one of Adam's two moments of {name} without the other; refused")
        for name in sorted(second):
            v = file[SECOND + name]
            m = file[FIRST + name] if form == "float32" else torch.zeros(())
            if bool((v < 0).any()):
                raise CheckpointMisfit("norm", f"the second moment of {name} in {path.name} has negative entries; refused")
            if bool((m.abs() > v.mul(ratio).sqrt().mul_(_SLACK).add_(_TINY)).any()):
                text = f"the moments of {name} in {path.name} contradict each other: no gradients give both; refused"
                raise CheckpointMisfit("norm", text)
            norms[FIRST] += torch.linalg.vector_norm(m, dtype=torch.float64).item() ** 2
            norms[SECOND] += v.sum(dtype=torch.float64).item()
        for name in (name for name in names if name.startswith(MUON)):
            norms[MUON] += torch.linalg.vector_norm(file[name], dtype=torch.float64).item() ** 2
    if not any(norms.values()):
        raise CheckpointMisfit(
            "missing", f"{path.name} holds no moments of the optimiser, although every step makes some; refused"
        )
    most = optimisation.gradient_clip
    for kind, squared in norms.items():
        if math.sqrt(squared) > most * slack:
            what = {FIRST: "first moments", SECOND: "second moments' roots", MUON: "momenta"}[kind]
            text = f"the {what} in {path.name} have norm {math.sqrt(squared):.3g}; clipped gradients give at most {most:g}"
            raise CheckpointMisfit("norm", f"{text}; refused")
